// SPDX-License-Identifier: Apache-2.0
#include <doctest/doctest.h>

#include <algorithm>

#include "kernels/run.hpp"

#if defined(XSIMD_HPP) || defined(XSIMD_CONFIG_HPP)
#error "a file with separate kernels includes no xsimd"
#endif
#if defined(_IMMINTRIN_H_INCLUDED) || defined(__IMMINTRIN_H)
#error "a file with separate kernels includes no intrinsics"
#endif

static_assert(std::same_as<moe::arch::native, moe::arch::compiled>);

namespace {

/// A form that the library does not know.
struct cube {
  template <class V>
  V operator()(V z) const noexcept { return z * z * z; }
  template <class V>
  V slope(V z) const noexcept { return V(3) * z * z; }
};

}  // namespace

TEST_SUITE("backend/cpu/compiled") {
  TEST_CASE("kernels from the library give the bits of kernels in the file") {
    const auto here = run_all(), whole = run_whole();
    REQUIRE(here.size() == whole.size());
    constexpr std::size_t gelu = 1;
    for (std::size_t i = 0; i < here.size(); ++i) {
      CAPTURE(i);
      // How the compiler fuses the products and sums of a form depends on what it is inlined in: y has equal bits, gradients
      // of gelu's, which has many, a few units in the last place.
      for (std::size_t j = 0; j < whole[i].size(); ++j) {
        const bool fused = i == gelu && j >= 70 * 37;
        if (here[i][j] != whole[i][j]) CHECK_MESSAGE((fused && std::fabs(here[i][j] - whole[i][j]) < 4e-6f), j);
      }
      CHECK(std::any_of(here[i].begin(), here[i].end(), [](float v) { return v != 0; }));
      CHECK(std::all_of(here[i].begin(), here[i].end(), [](float v) { return v - v == 0; }));
    }
  }
  TEST_CASE("a form that the library does not know runs in the user's file") {
    using layer = moe::layer<moe::linear_gate, moe::top_k<2>, moe::basic_ffn_expert<moe::plain<cube>>, moe::weighted_sum, moe::cpu<>>;
    const auto g = testing::gradcheck(layer({.tokens = 12, .d = 8, .f = 12, .experts = 4}), 12, 8, 1);
    INFO("worst in " << g.where);
    CHECK(g.worst < 1e-2);
  }
}
