// SPDX-License-Identifier: Apache-2.0
#include <doctest/doctest.h>

#include "moe/moe.hpp"

#include "kernels/run.hpp"

#if defined(XSIMD_HPP) || defined(XSIMD_CONFIG_HPP)
#error "a file with separate kernels includes no xsimd"
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
    CHECK(run_layer<moe::ffn_expert>() == run_whole_swiglu());
    CHECK(run_layer<moe::basic_ffn_expert<moe::plain<moe::gelu>>>() == run_whole_gelu());
  }
  TEST_CASE("a form that the library does not know runs in the user's file") {
    using layer = moe::layer<moe::linear_gate, moe::top_k<2>, moe::basic_ffn_expert<moe::plain<cube>>, moe::weighted_sum, moe::cpu<>>;
    const auto g = testing::gradcheck(layer({.tokens = 12, .d = 8, .f = 12, .experts = 4}), 12, 8, 1);
    INFO("worst in " << g.where);
    CHECK(g.worst < 1e-2);
  }
}
