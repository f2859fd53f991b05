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

namespace detail {

/// z = x W^T + b and a = form(z) for one tile. One product at a time grows close together; that of the gate then waits in z or,
/// where nobody keeps z, in a: two of them would not fit the stack of every thread. But where rows are rounded, a holds halves;
/// then tiles of a z that nobody keeps are small enough for both.
template <class Arch, class W, class Form>
struct up_tile {
  static constexpr dim both = row_block * panel / 2;  // elements of each product

  tile_products<Arch, W> products;
  const Form& form;
  rows_for<W> x;
  matrix_stack<const W> gate, up;
  matrix_stack<const float> gate_bias, up_bias;
  matrix_view<float> z, a;
  matrix_view<bf16> halves;  ///< of a, or none

  /// A wide tile of z grows where it belongs, a narrow one, or one that nobody keeps, in `near`.
  matrix_view<float> product(const tile& t, int which, bool narrow, matrix_view<float> near) const noexcept {
    const matrix_view<float> to = z ? part_of(z.columns(which * a.cols, a.cols), t) : matrix_view<float>{};
    const matrix_view<float> c = narrow ? near : to;
    const bool first = Form::gated && which == 0;
    start(Arch{}, c, t, first ? gate_bias : up_bias);
    multiply_nt(products, t, x, first ? gate : up, c);
    if (z && narrow) copy_tile(Arch{}, c, to);
    return c;
  }
  void operator()(const tile& t) const noexcept {
    tile_result place;
    matrix_view<float> near = place.view(t);
    const bool narrow = place.holds(t), rounds = halves && t.is_tall();
    const matrix_view<float> to = part_of(a, t);
    matrix_view<float> g = z && Form::gated ? part_of(z.columns(0, a.cols), t) : to;
    if constexpr (Form::gated) {
      const matrix_view<float> c = product(t, 0, narrow, near);
      if (!z && rounds) {
        g = c;
        near.data += both;
      } else if (!z) {
        copy_tile(Arch{}, c, to);
      }
    }
    const matrix_view<float> u = product(t, Form::gated, narrow, near);
    for (dim r = 0; r < t.rows; ++r)
      if (rounds) activate_rounded(g.row(r), u.row(r), part_of(halves, t).row(r), t.columns);
      else activate(Arch{}, form, g.row(r), u.row(r), to.row(r), t.columns);
  }
  void activate_rounded(const float* g, const float* u, bf16* to, dim n) const noexcept {
    if constexpr (std::same_as<W, bf16>)
      for (dim j = 0; j < n; j += panel) {
        float row[panel];
        const dim some = at_most(n - j, panel);
        activate(Arch{}, form, g + j, u + j, row, some);
        products.halves.round(row, to + j, some);
      }
  }
};

}  // namespace detail

/// z = x W^T + b and a = form(z) for every row of a bank, a tile at a time. Gated forms take two stacks: z[A,2f] holds gate
/// then up. z may be empty (inference): then it lives in the tile alone. Biases, a column per expert, may be empty. Weights
/// are float or bf16; with bf16 and a level that rounds rows, a holds the halves of an expert's rows unless they are few.
template <HostBackend B, class Form, class W>
void grouped_up(const call<B>& on, const bank_rows& rows, const rows_for<W>& x, const Form& form, matrix_stack<const W> gate,
                matrix_stack<const float> gate_bias, matrix_stack<const W> up, matrix_stack<const float> up_bias,
                matrix_view<float> z, matrix_view<float> a) noexcept {
  using tile_of_up = detail::up_tile<typename B::arch, W, Form>;
  tile_of_up one{{}, form, x, gate, up, gate_bias, up_bias, z, a, {}};
  if constexpr (std::same_as<W, bf16>) one.halves = mixed(on, a).halves;
  const dim depth = up.first.cols;
  dim columns = one.products.columns(depth), tallest = one.products.rows();
  if (!z) {
    columns = one.halves ? 32 : detail::panel;
    tallest = detail::at_most(tallest, tile_of_up::both / columns);
  }
  detail::for_each_tile(on, detail::tile_grid(rows.offsets, a.cols, depth, 16, columns, tallest), one);
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
