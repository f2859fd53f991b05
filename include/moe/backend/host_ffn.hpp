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
    float local[2][detail::row_block * detail::panel];
    const dim j = t.column, n = t.columns;
    const auto rows_of = [&](int which) {
      return z ? z.slice(t.row, t.rows).columns(which * f + j, n) : matrix_view<float>{local[which], t.rows, n};
    };
    const matrix_view<float> first = rows_of(0), second = Form::gated ? rows_of(1) : first;
    if constexpr (Form::gated) {
      detail::start(first, gate_bias, t.expert, j);
      gemm_nt(arch, x.from(t.row), gate[t.expert].slice(j, n), first);
    }
    detail::start(second, up_bias, t.expert, j);
    gemm_nt(arch, x.from(t.row), up[t.expert].slice(j, n), second);
    for (dim i = 0; i < t.rows; ++i)
      for_each_lane(arch, n, [&, g = first.row(i), u = second.row(i), to = a.row(t.row + i) + j](dim c, auto lane) {
        if constexpr (Form::gated) lane.store(to + c, form(lane.load(g + c), lane.load(u + c)));
        else lane.store(to + c, form(lane.load(u + c)));
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
