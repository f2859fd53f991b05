// SPDX-License-Identifier: Apache-2.0
// What packed weights keep of weights that are normally distributed: the figures of docs/backends.md.
#include <doctest/doctest.h>

#include <cmath>

#include "moe/backend/packed.hpp"
#include "support/testing.hpp"

namespace {

using moe::dim;

/// The root mean square of the error over that of the weights, in percent: 32 rows of 4096.
template <class T>
double error_percent() {
  constexpr dim n = 32, k = 4096;
  const std::vector<float> w = testing::normals(n * k, 9);
  moe::arena count;
  (void)moe::packed_matrix<T>::make("w", "scale", 1, k, count);
  const moe::buffer memory(moe::padded(count));
  moe::arena mem(memory.bytes());
  auto packed = moe::packed_matrix<T>::make("w", "scale", 1, k, mem);
  packed.pack(0, moe::matrix_view<const float>{w.data(), n, k});
  double error = 0, size = 0;
  for (dim i = 0; i < n * k; ++i) {
    const double v = w[static_cast<std::size_t>(i)], off = packed.weight(0, i / k, i % k) - v;
    error += off * off;
    size += v * v;
  }
  return 100 * std::sqrt(error / size);
}
/// The stated figure, to its two digits.
template <class T>
void check(double stated) {
  CHECK(std::fabs(error_percent<T>() / stated - 1) < 0.03);
}

}  // namespace

TEST_SUITE("backend/packed") {
  TEST_CASE("normally distributed weights keep what the docs say, whatever the type of a scale") {
    CHECK(error_percent<float>() == 0);
    check<moe::bf16>(0.17);
    check<moe::f16>(0.021);
    check<std::int8_t>(0.86);
    check<moe::int4_groups<32>>(8.6);
    check<moe::int4_groups<32, moe::bf16>>(8.6);
    check<moe::int4_groups<128>>(10.3);
    check<moe::int4_groups<128, moe::bf16>>(10.3);
    check<moe::ternary>(51);
  }
}
