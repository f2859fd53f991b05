// SPDX-License-Identifier: Apache-2.0
// Layers of packed experts with biases at every level, and on emulated tiles: by chunks of rows, by runs of panels, with
// results that are written past the caches.
#include <doctest/doctest.h>

#include "support/emulated_amx.hpp"
#include "support/levels.hpp"
#include "support/packed_model.hpp"

namespace {

using moe::dim;
using int4_32 = moe::int4_groups<32>;
using int4_128 = moe::int4_groups<128, moe::bf16>;
using testing::distance, testing::packed_model, testing::packed_tolerance, testing::reference_of;
using biased_layer = testing::dense_layer<true>;

}  // namespace

TEST_SUITE("expert/packed_ffn") {
  TEST_CASE_TEMPLATE("biases are added before the activation and to the result, at every level, whatever the weights", T, float,
                     moe::f16, moe::bf16, std::int8_t, int4_128, moe::ternary) {
    const moe::shape s{.d = 70, .f = 50, .experts = 5};
    testing::model<biased_layer> dense(biased_layer(s), 300, s.d, 1);
    testing::at_every_level([&] {
      for (const dim tokens : {1, 7, 300}) {
        CAPTURE(tokens);
        const packed_model<T, moe::cpu<>, true> m(dense, tokens);
        CHECK(distance(m.y, reference_of(m, {dense.x.data(), tokens, s.d})) < packed_tolerance<T>);
      }
    });
  }
#if defined(MOE_X86)
  using emulated = moe::host_backend<testing::emulated_amx, moe::serial>;
  TEST_CASE_TEMPLATE("on emulated tiles a layer with biases equals the formulas: few rows, runs of panels, chunks of rows", T,
                     moe::bf16, std::int8_t, int4_32, moe::ternary) {
    if (!moe::includes(testing::highest_level(), moe::cpu_level::avx512)) return;
    for (const moe::shape s : {moe::shape{.d = 70, .f = 50, .experts = 2}, moe::shape{.d = 33, .f = 129, .experts = 5}}) {
      CAPTURE(s.d);
      testing::model<biased_layer> dense(biased_layer(s), 650, s.d, 1);
      for (const dim tokens : {1, 7, 40, 650}) {  // 650 rows of two experts: six chunks of 217
        CAPTURE(tokens);
        const packed_model<T, emulated, true> m(dense, tokens);
        CHECK(distance(m.y, reference_of(m, {dense.x.data(), tokens, s.d})) < packed_tolerance<T>);
      }
    }
    CHECK(testing::emulated_tiles::faults == 0);
  }
  TEST_CASE_TEMPLATE("on emulated tiles results that no cache holds are written past it, whole lines or not", T, moe::bf16,
                     std::int8_t) {
    if (!moe::includes(testing::highest_level(), moe::cpu_level::avx512)) return;
    const dim tokens = 400;
    for (const moe::shape s : {moe::shape{.d = 1344, .f = 32, .experts = 3}, moe::shape{.d = 1350, .f = 32, .experts = 3}}) {
      CAPTURE(s.d);
      REQUIRE(tokens * 2 * s.d >= moe::detail::many_results);
      testing::model<biased_layer> dense(biased_layer(s), tokens, s.d, 1);
      const packed_model<T, emulated, true> m(dense, tokens);
      CHECK(distance(m.y, reference_of(m, {dense.x.data(), tokens, s.d})) < packed_tolerance<T>);
    }
    CHECK(testing::emulated_tiles::faults == 0);
  }
#endif
}
