// SPDX-License-Identifier: Apache-2.0
/// A router alone: its memory, its plan as lists of choices, and comparisons with the references.
#pragma once

#include <doctest/doctest.h>

#include "moe/backend/scalar.hpp"
#include "moe/core/recorded_plan.hpp"
#include "reference_routing.hpp"
#include "testing.hpp"

namespace testing {

using backend_of_routing = moe::scalar<moe::serial>;

/// A router over scores[T,E] with all that it writes.
template <class R, class B = backend_of_routing>
struct routing {
  R router;
  moe::shape sizes;
  std::vector<float> scores, dscores;
  B backend;
  moe::buffer memory, scratch_memory;
  moe::arena mem, scratch;
  typename R::weights w;
  moe::detail::weights_grad<R> dw;
  moe::routing_plan plan;
  typename R::context ctx;
  bool training;

  routing(R r, dim T, dim E, std::vector<float> z, bool trains = true, B b = {})
      : router(r),
        sizes{.tokens = T, .experts = E},
        scores(std::move(z)),
        dscores(scores.size()),
        backend(b),
        memory(bytes(r, sizes)),
        scratch_memory(scratch_bytes(r, sizes)),
        mem(memory.bytes()),
        scratch(scratch_memory.bytes()),
        training(trains) {
    moe::detail::check_shape(router, sizes);
    carve(mem);
  }
  routing(const routing&) = delete;
  routing& operator=(const routing&) = delete;

  moe::call<B> on() { return {backend, scratch, sizes, training, moe::rng(1)}; }
  moe::matrix_view<const float> score_view() const { return {scores.data(), sizes.tokens, sizes.experts}; }

  routing& forward() {
    router.forward(on(), w, score_view(), plan, ctx);
    return *this;
  }
  /// Gives this router's plan the assignments of another, weighed anew.
  routing& replay(const moe::routing_plan& from) {
    const auto copy = [](auto a, auto b, dim n) { std::copy(a.begin(), a.begin() + n, b.begin()); };
    copy(from.offsets, plan.offsets, from.experts() + 1);
    copy(from.token, plan.token, from.rows());
    copy(from.token_offsets, plan.token_offsets, from.tokens() + 1);
    copy(from.position, plan.position, from.token_offsets.back());
    router.weigh(on(), w, score_view(), plan, ctx);
    return *this;
  }
  /// dscores of the loss sum of g[t,e] weight[t,e] over the rows.
  routing& backward(const std::vector<float>& g) {
    std::vector<float> dweight(static_cast<std::size_t>(router.max_rows(sizes)));
    for (dim e = 0; e < sizes.experts; ++e)
      for (dim r = plan.offsets[at(e)]; r < plan.offsets[at(e + 1)]; ++r)
        dweight[at(r)] = g[at(plan.token[at(r)] * sizes.experts + e)];
    std::fill(dscores.begin(), dscores.end(), 77.f);  // overwritten
    router.backward(on(), w, plan, ctx, dweight, {dscores.data(), sizes.tokens, sizes.experts}, dw);
    return *this;
  }

  idx expert_of(idx choice) const {
    const idx r = plan.position[at(choice)];
    if (r < 0) return -1 - r;
    idx e = 0;
    while (plan.offsets[at(e + 1)] <= r) ++e;
    return e;
  }
  /// The choices of every token that were kept.
  std::vector<reference::choices> choices() const {
    std::vector<reference::choices> all(at(sizes.tokens));
    for (dim t = 0; t < sizes.tokens; ++t)
      for (idx i = plan.token_offsets[at(t)]; i < plan.token_offsets[at(t + 1)]; ++i)
        if (const idx r = plan.position[at(i)]; r >= 0) all[at(t)].push_back({expert_of(i), double{plan.weight[at(r)]}});
    return all;
  }
  /// The experts of token t, dropped ones as -1 - e.
  std::vector<dim> experts_of(dim t) const {
    std::vector<dim> list;
    for (idx i = plan.token_offsets[at(t)]; i < plan.token_offsets[at(t + 1)]; ++i)
      list.push_back(plan.position[at(i)] < 0 ? plan.position[at(i)] : expert_of(i));
    return list;
  }
  std::vector<float> weights_of(dim t) const {
    std::vector<float> list;
    const auto all = choices();
    for (const reference::choice& c : all[at(t)]) list.push_back(static_cast<float>(c.weight));
    return list;
  }

  static std::size_t at(dim i) { return static_cast<std::size_t>(i); }

 private:
  void carve(moe::arena& from) {
    w = moe::detail::make_weights(router, sizes, from);
    dw = moe::detail::make_gradients(router, sizes, from);
    plan = moe::make_plan(sizes, router.max_rows(sizes), from);
    if (training) ctx = moe::detail::make_context(router, sizes, from);
  }
  static std::size_t bytes(const R& r, moe::shape s) {
    moe::arena count;
    (void)moe::detail::make_weights(r, s, count);
    (void)moe::detail::make_gradients(r, s, count);
    (void)moe::make_plan(s, r.max_rows(s), count);
    (void)moe::detail::make_context(r, s, count);
    return moe::padded(count);
  }
  static std::size_t scratch_bytes(const R& r, moe::shape s) {
    moe::arena count;
    moe::detail::count_scratch(r, count, s);
    moe::detail::count_backward_scratch(r, count, s);
    return moe::padded(count);
  }
};

/// Equal experts in equal order, and weights within 2e-6 of the largest.
inline void expect_choices(const std::vector<reference::choices>& got, const std::vector<reference::choices>& want) {
  REQUIRE(got.size() == want.size());
  for (std::size_t t = 0; t < want.size(); ++t) {
    CAPTURE(t);
    REQUIRE(got[t].size() == want[t].size());
    double largest = 0;
    for (const auto& c : want[t]) largest = std::max(largest, std::abs(c.weight));
    for (std::size_t j = 0; j < want[t].size(); ++j) {
      CHECK(got[t][j].expert == want[t][j].expert);
      CHECK(std::abs(got[t][j].weight - want[t][j].weight) <= 2e-6 * largest);
    }
  }
}

/// Scores a good distance apart from each other, so that no probe of a finite difference changes an order.
inline std::vector<float> apart(dim T, dim E, std::uint64_t seed, float spread = 3) {
  const moe::rng random(seed);
  std::vector<float> z;
  for (dim t = 0; t < T; ++t) {
    std::vector<float> row;
    for (dim e = 0; e < E; ++e)
      row.push_back(spread * (2 * (static_cast<float>(e) + 0.8f * random.uniform(static_cast<std::uint64_t>(t * E + e))) /
                                  static_cast<float>(E) -
                              1));
    for (dim e = E - 1; e > 0; --e)
      std::swap(row[static_cast<std::size_t>(e)],
                row[random(static_cast<std::uint64_t>((T + t) * E + e)) % static_cast<std::uint64_t>(e + 1)]);
    z.insert(z.end(), row.begin(), row.end());
  }
  return z;
}

}  // namespace testing
