// SPDX-License-Identifier: Apache-2.0
// A layer allocates nothing after it is made: forward, replay and backward run on memory the caller gave.
#include <doctest/doctest.h>

#include <cstring>
#include <string>
#include <vector>

#include "moe/backend/executor/thread_pool.hpp"
#include "moe/core/recorded_plan.hpp"
#include "moe/moe.hpp"
#include "support/allocations.hpp"
#include "support/any_weights.hpp"
#include "support/testing.hpp"

#if __has_include("moe/backend/cpu.hpp") && __has_include(<xsimd/xsimd.hpp>)
#define MOE_TEST_CPU 1
#include "moe/backend/cpu.hpp"
#endif

namespace {

using moe::dim;
constexpr testing::allocation_counts nothing_allocated{};

template <class B, class Router = moe::top_k<2>, class Expert = moe::ffn_expert>
using layer = moe::layer<moe::linear_gate, Router, Expert, moe::weighted_sum, B>;

/// A pointer that the compiler cannot optimise away.
void* volatile sink;
template <class T>
T* kept(T* p) {
  sink = p;
  return p;
}
struct alignas(128) overaligned {
  char byte;
};

/// Warms up, so that threads exist and libraries have made their tables, then counts.
template <class L>
void expect_no_allocation(const L& net) {
  const dim T = 70, d = net.sizes().d;
  testing::model<L> m(net, T, d, 1);
  m.forward();
  const moe::recorded_plan recorded = moe::record(m.ctx.plan);
  const auto replay = [&] { m.net.replay(m.w, m.in, recorded.plan(), m.y_view(), m.ctx, m.work); };
  replay();
  m.backward();
  CHECK(testing::allocations_of([&] { m.forward(); }) == nothing_allocated);
  CHECK(testing::allocations_of([&] { m.backward(); }) == nothing_allocated);
  CHECK(testing::allocations_of(replay) == nothing_allocated);
  testing::model<L> inference(net, T, d, 1, false);
  CHECK(testing::allocations_of([&] { inference.forward(); }) == nothing_allocated);
}

/// The same of a layer that does not train.
template <class L>
void expect_no_allocation_of_inference(const L& net) {
  testing::model<L> m(net, 70, net.sizes().d, 1, false);
  testing::fill_other_weights(m);
  m.forward();
  CHECK(testing::allocations_of([&] { m.forward(); }) == nothing_allocated);
}

constexpr moe::shape shape{.d = 33, .f = 70, .experts = 5};

}  // namespace

TEST_SUITE("layer") {
  TEST_CASE("the counters count every way to allocate") {
    const auto of_new = [](auto allocate) { return testing::allocations_of(allocate).from_new; };
    CHECK(of_new([] { sink = std::vector<int>(100).data(); }) == 1);
    CHECK(of_new([] { delete kept(new int); }) == 1);
    CHECK(of_new([] { delete[] kept(new (std::nothrow) int[4]); }) == 1);
    CHECK(of_new([] { delete kept(new overaligned); }) == 1);
#if defined(MOE_TEST_COUNTS_MALLOC)
    const auto of_malloc = [](auto allocate) { return testing::allocations_of(allocate).from_malloc; };
    CHECK(of_malloc([] { delete kept(new int); }) == 1);
    CHECK(of_malloc([] { std::free(kept(std::malloc(3))); }) == 1);
    CHECK(of_malloc([] { std::free(kept(std::calloc(3, 3))); }) == 1);
    CHECK(of_malloc([] { std::free(kept(std::realloc(nullptr, 300))); }) == 1);
    CHECK(of_malloc([] { std::free(kept(std::aligned_alloc(64, 64))); }) == 1);
    CHECK(of_malloc([] { std::free(kept(strdup("a copy"))); }) == 1);  // from within the C library
    CHECK(of_malloc([] {
            void* p = nullptr;
            if (posix_memalign(&p, 64, 64) == 0) std::free(kept(p));
          }) == 1);
#endif
    CHECK(testing::allocations_of([] {}) == nothing_allocated);
  }
  TEST_CASE("the scalar backend allocates nothing on one thread") {
    expect_no_allocation(layer<moe::scalar<moe::serial>>(shape));
  }
  TEST_CASE("a static layer allocates nothing") {
    static moe::static_layer<33, 70, 5, 2> net;
    static decltype(net)::weights dw;
    std::vector<float> x = testing::normals(33, 1), y(33), dx(33);
    decltype(net)::context c;
    net.forward(x.data(), y.data(), c);  // the level is found once in a process
    CHECK(testing::allocations_of([&] { net.forward(x.data(), y.data(), c); }) == nothing_allocated);
    CHECK(testing::allocations_of([&] { net.backward(x.data(), c, y.data(), dx.data(), dw); }) == nothing_allocated);
  }
  TEST_CASE("the scalar backend allocates nothing with a thread pool") {
    const moe::thread_pool pool(3);
    using backend = moe::scalar<moe::pool_executor>;
    expect_no_allocation(layer<backend>(shape, backend(moe::pool_executor(pool))));
  }
#if defined(_OPENMP)
  TEST_CASE("the scalar backend allocates nothing with OpenMP") {
    const int before = omp_get_max_threads();
    omp_set_num_threads(3);
    expect_no_allocation(layer<moe::scalar<moe::openmp>>(shape));
    omp_set_num_threads(before);
  }
#endif
#if defined(MOE_TEST_CPU)
  TEST_CASE("the CPU backend allocates nothing, on one thread or several") {
    expect_no_allocation(layer<moe::cpu<>>(shape));
    expect_no_allocation(layer<moe::cpu<>, moe::top_k<2>, moe::bf16_ffn_expert>(shape));
    expect_no_allocation_of_inference(layer<moe::cpu<>, moe::top_k<2>, moe::packed_ffn_expert<moe::bf16>>(shape));
    expect_no_allocation_of_inference(layer<moe::cpu<>, moe::top_k<2>, moe::packed_ffn_expert<moe::int4_groups<32>>>(shape));
    const moe::thread_pool pool(3);
    using backend = moe::cpu<moe::arch::native, moe::pool_executor>;
    expect_no_allocation(layer<backend>(shape, backend(moe::pool_executor(pool))));
  }
#endif
  TEST_CASE("sets of different experts and other forms allocate nothing") {
    using B = moe::scalar<moe::serial>;
    expect_no_allocation(layer<B, moe::top_k<3>, moe::gpt_oss_expert>(shape));
    using set =
        moe::expert_set<moe::ffn_expert, moe::basic_ffn_expert<moe::plain<moe::gelu>>, moe::copy_expert, moe::zero_expert>;
    const set experts{{.count = 2}, {.count = 1, .f = 9}, {.count = 1}, {.count = 1}};
    expect_no_allocation(layer<B, moe::top_k<2>, set>(shape, experts));
  }
  TEST_CASE("a refused call allocates only its message") {
    testing::model<layer<moe::scalar<moe::serial>>> m(layer<moe::scalar<moe::serial>>(shape), 4, shape.d, 1);
    const auto counts = testing::allocations_of(
        [&] { CHECK_THROWS_AS(m.net.forward(m.w, {m.x.data(), 3, shape.d}, m.y_view(), m.ctx, m.work), moe::shape_error); });
    CHECK(counts.from_new > 0);
  }
}
