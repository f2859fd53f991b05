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

/// z = x W^T + b and a = form(z) for one tile. One product at a time grows close together; that of the gate then waits in z
/// or, where nobody keeps z, in a: two of them would not fit the stack of every thread.
template <class Arch, class W, class Form>
struct up_tile {
  tile_products<Arch, W> products;
  const Form& form;
  rows_for<W> x;
  matrix_stack<const W> gate, up;
  matrix_stack<const float> gate_bias, up_bias;
  matrix_view<float> z, a;

  void operator()(const tile& t) const noexcept {
    tile_result near;
    const auto product = [&](matrix_stack<const W> w, matrix_stack<const float> bias, matrix_view<float> to) {
      const matrix_view<float> c = near.view(t);
      start(Arch{}, c, t, bias);
      multiply_nt(products, t, x, w, c);
      if (to) copy_tile(Arch{}, c, to);
    };
    const auto kept = [&](int which) { return z ? part_of(z.columns(which * a.cols, a.cols), t) : matrix_view<float>{}; };
    const matrix_view<float> to = part_of(a, t);
    matrix_view<float> g = to;
    if constexpr (Form::gated) {
      if (z) g = kept(0);
      product(gate, gate_bias, g);
    }
    product(up, up_bias, kept(Form::gated));
    for (dim r = 0; r < t.rows; ++r) activate(Arch{}, form, g.row(r), near.view(t).row(r), to.row(r), t.columns);
  }
};

/// The same where rows are rounded, by those who come to need them first: both products grow together, and a holds the halves
/// of an expert's rows unless they are few.
template <HostBackend B, class Form>
void halves_up(const call<B>& on, const bank_rows& rows, const mixed_rows& x, const Form& form,
               matrix_stack<const bf16> gate, matrix_stack<const float> gate_bias, matrix_stack<const bf16> up,
               matrix_stack<const float> up_bias, matrix_view<float> z, matrix_view<float> a) noexcept {
  constexpr dim widest = Form::gated ? half_columns / 2 : half_columns;
  using arch = typename B::arch;
  scratch_frame frame(on.scratch);
  const dim f = a.cols;
  const half_slots<B> slots(on.backend, a.rows, (Form::gated ? 2 : 1) * round_up(f, 32), on.scratch);
  const matrix_view<bf16> halves = mixed(on, a).halves;
  helpers rounding;
  for_each_tile(
      on, slots, half_grid(rows.offsets, f, up.first.cols, Form::gated ? 2 : 1),
      [&](const half_slot& slot, const tile& t, const tile& next) {
        if (t.is_tall()) with_helpers(on, rounding, [&](const auto& all) { round_by_token(all, rows, x); });
        const matrix_view<float> sums = slot.sums.slice(0, t.rows);
        const matrix_view<float> g = sums.columns(0, t.columns),
                                 u = sums.columns(Form::gated ? round_up(t.columns, 32) : 0, t.columns);
        const auto kept = [&](int which) { return z ? part_of(z.columns(which * f, f), t) : matrix_view<float>{}; };
        if constexpr (Form::gated) half_product(arch{}, slot, t, x, gate, gate_bias, g, kept(0), rows_of(up, t));
        half_product(arch{}, slot, t, x, up, up_bias, u, kept(Form::gated), rows_of(Form::gated ? gate : up, next));
        for (dim r = 0; r < t.rows; ++r) {
          float row[widest];
          activate(arch{}, form, g.row(r), u.row(r), t.is_tall() ? row : part_of(a, t).row(r), t.columns);
          if (t.is_tall()) slots.kernels.round(row, part_of(halves, t).row(r), t.columns);
        }
      });
}

}  // namespace detail

/// z = x W^T + b and a = form(z) for every row of a bank, a tile at a time. Gated forms take two stacks: z[A,2f] holds gate
/// then up. z may be empty (inference): then it lives in the tile alone. Biases, a column per expert, may be empty. Weights
/// are float or bf16; with bf16 and a level that rounds rows, a holds the halves of an expert's rows unless they are few.
template <HostBackend B, class Form, class W>
void grouped_up(const call<B>& on, const bank_rows& rows, const rows_for<W>& x, const Form& form, matrix_stack<const W> gate,
                matrix_stack<const float> gate_bias, matrix_stack<const W> up, matrix_stack<const float> up_bias,
                matrix_view<float> z, matrix_view<float> a) noexcept {
  if constexpr (std::same_as<W, bf16>)
    if (x.halves) return detail::halves_up(on, rows, x, form, gate, gate_bias, up, up_bias, z, a);
  const detail::up_tile<typename B::arch, W, Form> one{{}, form, x, gate, up, gate_bias, up_bias, z, a};
  detail::for_each_tile(on, detail::tile_grid(rows.offsets, a.cols, up.first.cols, 16), one);
}

namespace detail {

/// The same for a row whose a and dz, gate then up, become halves in the place of the floats.
template <class Arch, class Form>
float activate_backward_rounded(Arch arch, const arch::half_kernels& k, const Form& form, float w, const float* gate,
                                const float* up, float* a, bf16* dgate, bf16* dup, dim n) noexcept {
  constexpr dim width = 256;
  float share = 0;
  for (dim j = 0; j < n; j += width) {
    alignas(64) float dg[width], du[width];
    const dim some = at_most(n - j, width);
    share += activate_backward(arch, form, w, gate + j, up + j, a + j, dg, du, some);
    k.round(a + j, reinterpret_cast<bf16*>(a) + j, some);
    if constexpr (Form::gated) k.round(dg, dgate + j, some);
    k.round(du, dup + j, some);
  }
  return share;
}

}  // namespace detail

/// The same step backward, row by row. On entry a holds da' = dy W_down, unweighted. Then for each row, with its weight w:
/// dweight += <da', form(z)>, dz = slope(z, w da'), and a = w form(z), ready for the gradient of down. With Round, a and dz
/// become halves where the level rounds rows.
template <bool Round = false, HostBackend B, class Form>
void grouped_up_backward(const call<B>& on, const bank_rows& rows, const Form& form, const float* weight,
                         matrix_view<const float> z, matrix_view<float> a, matrix_view<float> dz,
                         std::span<float> dweight) noexcept {
  typename B::arch arch{};
  const dim f = a.cols;
  const auto each = [&](auto row) {
    for_each_row(on, rows, [&](dim, dim r) {
      const float share = row(r, weight ? weight[r] : 1.f, z.row(r), z.row(r) + (Form::gated ? f : 0));
      if (!dweight.empty()) dweight[static_cast<std::size_t>(r)] += share;
    });
  };
  if constexpr (Round) {
    const arch::half_kernels k = mixed_kernels_of(arch).halves;
    if (const matrix_view<bf16> halves = mixed(on, dz).halves)
      return each([&](dim r, float w, const float* gate, const float* up) {
        bf16* dgate = halves.row(r);
        return detail::activate_backward_rounded(arch, k, form, w, gate, up, a.row(r), dgate, dgate + (Form::gated ? f : 0),
                                                 f);
      });
  }
  each([&](dim r, float w, const float* gate, const float* up) {
    float* dgate = dz.row(r);
    return activate_backward(arch, form, w, gate, up, a.row(r), dgate, dgate + (Form::gated ? f : 0), f);
  });
}

}  // namespace moe
