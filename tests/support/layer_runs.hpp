// SPDX-License-Identifier: Apache-2.0
/// Whole runs of a layer, forward and backward, and what every host backend owes them.
#pragma once

#include <doctest/doctest.h>

#include <vector>

#include "moe/backend/executor/thread_pool.hpp"
#include "moe/combine/weighted_sum.hpp"
#include "moe/expert/ffn.hpp"
#include "moe/gate/linear.hpp"
#include "moe/router/top_k.hpp"
#include "support/executors.hpp"
#include "support/testing.hpp"

namespace testing {

template <int K, class B>
using ffn_layer = moe::layer<moe::linear_gate, moe::top_k<K>, moe::ffn_expert, moe::weighted_sum, B>;
/// Nothing but sums, products and comparisons: with small whole numbers exact in float.
template <class B>
using exact_layer = moe::layer<moe::linear_gate, moe::top_k<2, moe::select_only>, moe::basic_ffn_expert<moe::glu<moe::relu>>,
                               moe::weighted_sum, B>;

struct results {
  std::vector<float> y, dx, dw;
  friend bool operator==(const results&, const results&) = default;
};

template <class L>
results run(model<L>& m) {
  m.forward();
  m.backward();
  return {m.y, m.dx, {m.gradients().begin(), m.gradients().end()}};
}
template <class L>
results run(const L& net, dim T, std::uint64_t seed) {
  model<L> m(net, T, net.sizes().d, seed);
  return run(m);
}
/// Whole numbers everywhere: |score| <= 4 d, |y| <= 2 * 2 f (4 d)^2, sums over T tokens likewise below 2^24.
template <class L>
void make_whole(model<L>& m, std::uint64_t seed) {
  m.x = integers(static_cast<dim>(m.x.size()), seed, 2);
  m.dy = integers(static_cast<dim>(m.dy.size()), seed + 1, 2);
  m.in = m.x_view();
  m.din = {m.dx.data(), m.tokens, m.d};
  const auto w = integers(static_cast<dim>(m.weights().size()), seed + 2, 2);
  std::copy(w.begin(), w.end(), m.weights().begin());
}
template <class B>
results run_whole(const B& backend, moe::shape s, std::uint64_t seed) {
  model<exact_layer<B>> m(exact_layer<B>(s, backend), s.tokens, s.d, seed);
  make_whole(m, seed);
  return run(m);
}

/// `Arch` on every executor, with 1 to 4 threads; results_of(backend) is asked once for each.
template <class Arch, class Run>
void expect_same_bits_from_every_executor(Run results_of) {
  const results alone = results_of(moe::host_backend<Arch, moe::serial>{});
  CHECK(results_of(moe::host_backend<Arch, moe::serial>{}) == alone);  // run to run
  for (int threads = 1; threads <= 4; ++threads) {
    CAPTURE(threads);
    const moe::thread_pool pool(threads);
    CHECK(results_of(moe::host_backend<Arch, moe::pool_executor>(moe::pool_executor(pool))) == alone);
#if defined(_OPENMP)
    const int before = omp_get_max_threads();
    omp_set_num_threads(threads);
    CHECK(results_of(moe::host_backend<Arch, moe::openmp>{}) == alone);
    omp_set_num_threads(before);
#endif
  }
  for (std::uint64_t seed = 0; seed < 5; ++seed)
    CHECK(results_of(moe::host_backend<Arch, shuffling>(shuffling{seed})) == alone);
}

}  // namespace testing
