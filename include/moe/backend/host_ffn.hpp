// SPDX-License-Identifier: Apache-2.0
/// Primitives of feed-forward experts on the host: products with the activation applied while the tile is in cache.
#pragma once

#include "moe/backend/host_gemm.hpp"
#include "moe/backend/host_rows.hpp"

namespace moe {

/// a[j] = form(gate[j], up[j]) or form(up[j]) for j in 0 .. n.
template <class Arch, class Form>
void activate(Arch arch, const Form& form, const float* gate, const float* up, float* a, dim n) noexcept {
  for_each_lane(arch, n, [&](dim j, auto lane) {
    if constexpr (Form::gated)
      lane.store(a + j, form(lane.load(gate + j), lane.load(up + j)));
    else
      lane.store(a + j, form(lane.load(up + j)));
  });
}
/// Backward, where a holds da': dgate, dup = slope(gate, up, w a), then a = w form(gate, up). Returns <a as it was, form>.
template <class Arch, class Form>
float activate_backward(Arch arch, const Form& form, float w, const float* gate, const float* up, float* a, float* dgate,
                        float* dup, dim n) noexcept {
  float share = 0;
  for_each_lane(arch, n, [&](dim j, auto lane) {
    using V = typename decltype(lane)::value;
    const V da = lane.load(a + j);
    V value, du;
    if constexpr (Form::gated) {
      V dg;
      value = form.slope(lane.load(gate + j), lane.load(up + j), V(w) * da, dg, du);
      lane.store(dgate + j, dg);
    } else {
      value = form.slope(lane.load(up + j), V(w) * da, du);
    }
    lane.store(dup + j, du);
    share += lane.sum(value * da);
    lane.store(a + j, V(w) * value);
  });
  return share;
}

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
      detail::multiply_nt(arch, t, x, w, c);
      if (z) detail::copy_tile(arch, c, detail::part_of(z.columns(which * f, f), t));
      return c;
    };
    matrix_view<float> g;
    if constexpr (Form::gated) g = product(0, gate, gate_bias);
    const matrix_view<float> u = product(Form::gated, up, up_bias), to = detail::part_of(a, t);
    for (dim r = 0; r < t.rows; ++r) activate(arch, form, Form::gated ? g.row(r) : nullptr, u.row(r), to.row(r), t.columns);
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
    const float* up = z.row(r) + (Form::gated ? f : 0);
    float* dup = dz.row(r) + (Form::gated ? f : 0);
    const float share = activate_backward(arch, form, weight ? weight[r] : 1.f, z.row(r), up, a.row(r), dz.row(r), dup, f);
    if (!dweight.empty()) dweight[static_cast<std::size_t>(r)] += share;
  });
}

}  // namespace moe
