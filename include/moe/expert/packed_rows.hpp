// SPDX-License-Identifier: Apache-2.0
/// Packed experts without kernels of their own: what a device runs, an element of a result at a time. Bits of integer sums,
/// and of the bytes that go into them, are those of the kernels of the host.
#pragma once

#include "moe/backend/packed.hpp"
#include "moe/concepts.hpp"

namespace moe {

namespace detail {

/// The bytes of a bank's rows, and a scale for each.
struct byte_rows {
  matrix_view<std::int8_t> q;
  matrix_view<float> scale;  ///< [rows,1]

  static byte_rows make(const char* name, dim rows, dim cols, arena& mem) noexcept {
    return {mem.matrix<std::int8_t>(name, rows, cols), mem.matrix<float>("scale", rows, 1)};
  }
};
/// What products by rows take from their scratch.
struct packed_rows_scratch {
  byte_rows x, a;
  matrix_view<float> hidden;

  static packed_rows_scratch make(shape s, dim rows, arena& mem) noexcept {
    return {byte_rows::make("x", rows, s.d, mem), byte_rows::make("a", rows, s.f, mem),
            mem.matrix<float>("hidden", rows, s.f)};
  }
};

// What kernels are made of has names: nvcc wants them.
template <class T>
struct quantise_row {
  gathered<float> x;
  byte_rows to;

  MOE_HD void operator()(dim, dim r) const noexcept {
    const float* v = x.row(r);
    const float largest = magnitude(v, to.q.cols) + packing<T>::margin, per = to_bytes(largest);
    for (dim j = 0; j < to.q.cols; ++j) to.q(r, j) = static_cast<std::int8_t>(per != 0 ? std::nearbyint(v[j] * per) : 0.f);
    to.scale(r, 0) = largest / 127;
  }
};

/// Products of one kind of panel, `step` of which begin 32 rows of an expert's result.
template <class T>
struct packed_product {
  matrix_view<const typename packing<T>::unit> panels;
  const float *scale, *bias;  ///< as the panels' rows; bias: or null
  dim of_expert, step;        ///< panels
  byte_rows x;

  static packed_product of(const packed_matrix<T>& w, std::span<const float> bias, dim rows, dim step,
                           byte_rows x) noexcept {
    return {w.panels, w.scale.data(), bias.empty() ? nullptr : bias.data(), panels_of(rows) * step, step, x};
  }
  /// Row r times row j of the expert's matrix, of the kind `turn`.
  MOE_HD float operator()(dim e, dim r, dim j, dim turn = 0) const noexcept {
    const dim panel = e * of_expert + j / panel_rows * step + turn, row = panel * panel_rows + j % panel_rows;
    std::int32_t sum = 0;
    for (dim k = 0; k < x.q.cols; ++k) sum += x.q(r, k) * packing<T>::code(panels.row(panel), j % panel_rows, k);
    return x.scale(r, 0) * scale[row] * static_cast<float>(sum) + (bias ? bias[row] : 0.f);
  }
};
template <class T, class Form>
struct hidden_element {
  packed_product<T> up;
  Form form;

  MOE_HD float operator()(dim e, dim r, dim j) const noexcept {
    if constexpr (Form::gated)
      return form(up(e, r, j), up(e, r, j, 1));
    else
      return form(up(e, r, j));
  }
};

}  // namespace detail

/// As packed_ffn, on any backend with for_each_row and map_rows, for weights with one integer and one scale of their row
/// each.
template <class B, class T, class Form>
void packed_ffn_by_rows(const call<B>& on, const bank_rows& rows, gathered<float> x, const Form& form,
                        const packed_matrix<T>& up, std::span<const float> up_bias, const packed_matrix<T>& down,
                        std::span<const float> down_bias, matrix_view<float> ys) noexcept {
  static_assert(requires { packing<T>::margin; }, "moe: this policy has no device path [docs/backends.md]");
  using product = detail::packed_product<T>;
  scratch_frame frame(on.scratch);
  const auto s = detail::packed_rows_scratch::make(on.sizes, ys.rows, on.scratch);
  for_each_row(on, rows, detail::quantise_row<T>{x, s.x});
  map_rows(on, rows, s.hidden,
           detail::hidden_element<T, Form>{product::of(up, up_bias, on.sizes.f, Form::gated ? 2 : 1, s.x), form});
  for_each_row(on, rows, detail::quantise_row<T>{gathered<float>{s.hidden}, s.a});
  map_rows(on, rows, ys, product::of(down, down_bias, on.sizes.d, 1, s.a));
}

}  // namespace moe
