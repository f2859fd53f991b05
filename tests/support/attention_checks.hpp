// SPDX-License-Identifier: Apache-2.0
/// What tests of attention ask of its numbers.
#pragma once

#include <doctest/doctest.h>

#include <concepts>

#include "support/attention_trial.hpp"
#include "support/levels.hpp"

namespace testing {

/// Elements are widened, which is exact, so the type of storage does not matter: what is left are float32 sums of some
/// hundred terms of size one, and 1e-5 leaves them a factor of three. Tiles round the weights of values to bf16: off by
/// 2^-9 of the largest value, which is four here.
template <class T>
double attention_tolerance() {
  return std::same_as<T, moe::bf16> && halves_in_use() ? 1e-2 : 1e-5;
}
inline void expect_near(const attention_floats& got, const reference::attention_numbers<double>& wanted,
                        double off = attention_tolerance<float>()) {
  CHECK(reference::worst_difference(got.o, wanted.o) < off);
  CHECK(reference::worst_difference(got.lse, wanted.lse) < attention_tolerance<float>());
  CHECK(reference::worst_difference(got.dq, wanted.dq) < 3 * off);
  CHECK(reference::worst_difference(got.dk, wanted.dk) < 3 * off);
  CHECK(reference::worst_difference(got.dv, wanted.dv) < 3 * off);
}
inline void expect_equal(const attention_floats& a, const attention_floats& b) {
  CHECK(a.o == b.o);
  CHECK(a.lse == b.lse);
  CHECK(a.dq == b.dq);
  CHECK(a.dk == b.dk);
  CHECK(a.dv == b.dv);
}
/// Rows first .. first + n of `cols` elements.
template <class T>
std::vector<T> rows(const std::vector<T>& v, dim first, dim n, dim cols) {
  return {v.begin() + first * cols, v.begin() + (first + n) * cols};
}

}  // namespace testing
