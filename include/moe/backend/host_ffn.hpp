// SPDX-License-Identifier: Apache-2.0
/// Primitives of feed-forward experts on the host: products with the activation applied while the tile is in cache.
#pragma once

#include "moe/backend/host_gemm.hpp"
#include "moe/backend/host_rows.hpp"

namespace moe {

/// z = x W^T + b and a = form(z) for every row of a bank, a tile at a time. Gated forms take two stacks: z[A,2f] holds gate
/// then up. z may be empty (inference): then it lives in the tile alone. Biases, a column per expert, may be empty.
template <HostBackend B, class Form>
void grouped_up(const call<B>& on, const bank_rows& rows, gathered<float> x, const Form& form,
                matrix_stack<const float> gate, matrix_stack<const float> gate_bias, matrix_stack<const float> up,
                matrix_stack<const float> up_bias, matrix_view<float> z, matrix_view<float> a) noexcept {
  typename B::arch arch{};
  const dim f = a.cols;
  detail::for_each_tile(on, rows.offsets, f, up.first.cols, 16, [&](const detail::tile& t) {
    detail::tile_result results[2];
    const auto product = [&](int which, matrix_stack<const float> w, matrix_stack<const float> bias) {
      const matrix_view<float> c = results[which].view(t);
      detail::start(arch, c, t, bias);
      gemm_nt(arch, x.from(t.row), w[t.expert].slice(t.column, t.columns), c);
      if (z) detail::copy_tile(arch, c, detail::part_of(z.columns(which * f, f), t));
      return c;
    };
    matrix_view<float> g;
    if constexpr (Form::gated) g = product(0, gate, gate_bias);
    const matrix_view<float> u = product(Form::gated, up, up_bias), to = detail::part_of(a, t);
    for (dim r = 0; r < t.rows; ++r)
      for_each_lane(arch, t.columns, [&, r](dim j, auto lane) {
        if constexpr (Form::gated) lane.store(to.row(r) + j, form(lane.load(g.row(r) + j), lane.load(u.row(r) + j)));
        else lane.store(to.row(r) + j, form(lane.load(u.row(r) + j)));
      });
  });
}

/// The same step backward, row by row. On entry a holds da' = dy W_down, unweighted. Then for each row, with its weight w:
/// dweight += <da', form(z)>, dz = slope(z, w da'), and a = w form(z), ready for the gradient of down.
template <HostBackend B, class Form>
void grouped_up_backward(const call<B>& on, const bank_rows& rows, const Form& form, const float* weight,
                         matrix_view<const float> z, matrix_view<float> a, matrix_view<float> dz,
                         std::span<float> dweight) noexcept {
  typename B::arch arch{};
  const dim f = a.cols;
  for_each_row(on, rows, [&](dim, dim r) {
    const float w = weight ? weight[r] : 1.f;
    float sum = 0;
    for_each_lane(arch, f, [&](dim c, auto lane) {
      using V = typename decltype(lane)::value;
      const V da = lane.load(a.row(r) + c);
      V value;
      if constexpr (Form::gated) {
        const V g = lane.load(z.row(r) + c), u = lane.load(z.row(r) + f + c);
        V dg, du;
        value = form.slope(g, u, V(w) * da, dg, du);
        lane.store(dz.row(r) + c, dg);
        lane.store(dz.row(r) + f + c, du);
      } else {
        V dv;
        value = form.slope(lane.load(z.row(r) + c), V(w) * da, dv);
        lane.store(dz.row(r) + c, dv);
      }
      sum += lane.sum(value * da);
      lane.store(a.row(r) + c, V(w) * value);
    });
    if (!dweight.empty()) dweight[static_cast<std::size_t>(r)] += sum;
  });
}

}  // namespace moe
