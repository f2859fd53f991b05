// SPDX-License-Identifier: Apache-2.0
/// Activations at the border of a layer on the host: float or bf16. Inside they are float: tokens of bf16 are widened once
/// on the way in, sums are rounded to bf16 once on the way out, to nearest even.
#pragma once

#include "moe/concepts.hpp"
#include "moe/core/dtype.hpp"

namespace moe::detail {

template <class View>
concept bf16_rows = std::convertible_to<const View&, matrix_view<const bf16>>;
/// What a function that reads `Input` takes; bf16 in place of floats where `Plain`: the input is a matrix on the host.
template <class Given, class Input, bool Plain>
concept passes_for_input = std::convertible_to<const Given&, Input> || (Plain && bf16_rows<Given>);
template <class Given, class Output, bool Plain>
concept passes_for_output = std::convertible_to<const Given&, Output> || (Plain && std::same_as<Given, matrix_view<bf16>>);

/// The element type that a call asks scratch for: bf16 where one of its views is of it.
template <class In, class Out>
using border_of = std::conditional_t<bf16_rows<In> || std::same_as<Out, matrix_view<bf16>>, bf16, float>;
template <class Border>
constexpr const char* scratch_sizer() noexcept {
  return std::same_as<Border, bf16> ? "scratch_bytes<bf16>(T)" : "scratch_bytes(T)";
}

/// The view that the library works on: a `Wanted`, or one of bf16.
template <class Wanted, class Given>
auto at_border(const Given& given) noexcept {
  if constexpr (std::convertible_to<const Given&, Wanted>) {
    const Wanted wanted = given;
    return wanted;
  } else {
    return given;
  }
}

/// f(j, n) for runs of n of `all` elements, whole ones of a constant length: compilers make vectors of what they do.
template <class F>
void in_runs(dim all, F f) noexcept {
  constexpr dim run = 16;
  dim j = 0;
  for (; j + run <= all; j += run) f(j, std::integral_constant<dim, run>{});
  f(j, all - j);
}
inline void widen(const bf16* from, float* to, dim n) noexcept {
  in_runs(n, [=](dim j, auto run) {
    for (dim i = 0; i < run; ++i) to[j + i] = static_cast<float>(from[j + i]);
  });
}
inline void round(const float* from, bf16* to, dim n) noexcept {
  in_runs(n, [=](dim j, auto run) {
    for (dim i = 0; i < run; ++i) to[j + i] = bf16(from[j + i]);
  });
}

/// n elements of a result, which f(first, to, count) makes as floats.
template <class F>
void put(float* y, dim n, F f) noexcept { f(dim{0}, y, n); }
template <class F>
void put(bf16* y, dim n, F f) noexcept {
  constexpr dim most = 256;
  float near[most];
  for (dim first = 0; first < n; first += most) {
    const dim count = at_most(n - first, most);
    f(first, near, count);
    round(near, y + first, count);
  }
}

/// Rows as floats: those of bf16 widened into scratch.
inline matrix_view<float> make_widened(dim rows, dim cols, arena& mem) noexcept {
  return mem.matrix<float>("wide", rows, cols);
}
template <class B>
matrix_view<const float> widened(const call<B>& on, matrix_view<const bf16> x) noexcept {
  const matrix_view<float> to = make_widened(x.rows, x.cols, on.scratch);
  for_each_token(on, x.rows, [&](dim t) { widen(x.row(t), to.row(t), x.cols); });
  return to;
}
/// An `Input`, in which rows of bf16 are widened ones.
template <class Input, class B, class Given>
Input as_floats(const call<B>& on, const Given& x) noexcept {
  if constexpr (std::convertible_to<const Given&, Input>) return x;
  else return widened(on, x);
}
/// f(y), or f(rows of floats in scratch), which are then rounded to y.
template <class Output, class B, class Given, class F>
void with_floats(const call<B>& on, const Given& y, F f) {
  if constexpr (std::convertible_to<const Given&, Output>) {
    const Output out = y;
    f(out);
  } else {
    const matrix_view<float> wide = make_widened(y.rows, y.cols, on.scratch);
    f(wide);
    for_each_token(on, y.rows, [&](dim t) { round(wide.row(t), y.row(t), y.cols); });
  }
}

}  // namespace moe::detail
