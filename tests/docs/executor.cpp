// SPDX-License-Identifier: Apache-2.0
#include <doctest/doctest.h>

#include "moe/moe.hpp"
#include "support/testing.hpp"

namespace {

// [own]
/// Hands every chunk to the job system of a host application.
struct job_system {
  int workers = 4;
  int concurrency() const noexcept { return workers; }
  template <class F>
  void for_each(moe::dim n, moe::dim grain, F&& f) const {
    for (moe::dim first = 0; first < n; first += grain) f(first, first + grain < n ? first + grain : n);  // submit and wait
  }
};
static_assert(moe::Executor<job_system>);
using backend = moe::scalar<job_system>;  // or moe::cpu<moe::arch::native, job_system>
using ffn = moe::layer<moe::linear_gate, moe::top_k<2>, moe::ffn_expert, moe::weighted_sum, backend>;
const ffn layer({.tokens = 64, .d = 32, .f = 64, .experts = 8}, backend{job_system{8}});
// [/own]

}  // namespace

TEST_SUITE("docs/backends") {
  TEST_CASE("a layer runs on the executor it was given") {
    CHECK(layer.backend().executor().concurrency() == 8);
    testing::model<ffn> m(layer, 16, 32, 1);
    m.forward();
    using plain = moe::layer<moe::linear_gate, moe::top_k<2>, moe::ffn_expert, moe::weighted_sum, moe::scalar<moe::serial>>;
    testing::model<plain> wanted(plain({.tokens = 64, .d = 32, .f = 64, .experts = 8}), 16, 32, 1);
    wanted.forward();
    CHECK(m.y == wanted.y);
  }
}
