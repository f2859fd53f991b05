// SPDX-License-Identifier: Apache-2.0
/// Primitives of feed-forward experts on a device. Contracts: backend/host_ffn.hpp.
#pragma once

#include "moe/backend/cuda/gemm.hpp"
#include "moe/backend/cuda/rows.hpp"

namespace moe {

namespace detail {

/// z = x W^T + b for gate and up at once, and a = form(z).
template <class Form>
struct up_product {
  static constexpr int outputs = Form::gated ? 2 : 1;
  static constexpr bool a_along_k = true, b_along_k = true;

  device_rows rows;
  gathered<float> x;
  Form form;
  matrix_stack<const float> right[outputs], bias[outputs];
  matrix_view<float> z, out;

  MOE_HD block_tile tile(dim block) const noexcept { return find_tile(rows, out.cols, block); }
  MOE_HD dim depth(const block_tile&) const noexcept { return right[0].first.cols; }
  MOE_HD float a(const block_tile& t, dim i, dim k) const noexcept { return x.row(t.row + i)[k]; }
  MOE_HD float b(const block_tile& t, int which, dim j, dim k) const noexcept {
    return right[which][t.expert](t.column + j, k);
  }
  MOE_HD void store(const block_tile& t, dim i, dim j, const float (&sum)[outputs]) const noexcept {
    const dim r = t.row + i, c = t.column + j;
    float v[outputs];
    for (int o = 0; o < outputs; ++o) {
      v[o] = (bias[o].first ? bias[o][t.expert](c, 0) : 0.f) + sum[o];
      if (z) z(r, o * out.cols + c) = v[o];
    }
    if constexpr (Form::gated) out(r, c) = form(v[0], v[1]);
    else out(r, c) = form(v[0]);
  }
};

/// One element of the step back; gives its share of dweight.
template <class Form>
struct up_gradient {
  Form form;
  const float* weight;
  matrix_view<const float> z;
  matrix_view<float> a, dz;

  MOE_HD float operator()(dim, dim r, dim j) const noexcept {
    const float w = weight ? weight[r] : 1.f, da = a(r, j);
    float value;
    if constexpr (Form::gated) {
      const dim f = a.cols;
      float dg, du;
      value = form.slope(z(r, j), z(r, f + j), w * da, dg, du);
      dz(r, j) = dg;
      dz(r, f + j) = du;
    } else {
      float dv;
      value = form.slope(z(r, j), w * da, dv);
      dz(r, j) = dv;
    }
    a(r, j) = w * value;
    return value * da;
  }
};

}  // namespace detail

template <DeviceBackend B, class Form>
void grouped_up(const call<B>& on, const bank_rows& rows, gathered<float> x, const Form& form,
                matrix_stack<const float> gate, matrix_stack<const float> gate_bias, matrix_stack<const float> up,
                matrix_stack<const float> up_bias, matrix_view<float> z, matrix_view<float> a) noexcept {
  const detail::device_rows r(rows);
  if constexpr (Form::gated)
    detail::run_row_product(on, detail::up_product<Form>{r, x, form, {gate, up}, {gate_bias, up_bias}, z, a});
  else
    detail::run_row_product(on, detail::up_product<Form>{r, x, form, {up}, {up_bias}, z, a});
}

template <DeviceBackend B, class Form>
void grouped_up_backward(const call<B>& on, const bank_rows& rows, const Form& form, const float* weight,
                         matrix_view<const float> z, matrix_view<float> a, matrix_view<float> dz,
                         std::span<float> dweight) noexcept {
  detail::sum_columns(on, rows, a.cols, dweight.data(), detail::up_gradient<Form>{form, weight, z, a, dz});
}

}  // namespace moe
