// SPDX-License-Identifier: Apache-2.0
/// Selection and grouping on the host.
#pragma once

#include <limits>

#include "moe/backend/host_rows.hpp"

namespace moe {

namespace detail {

/// The K largest eligible of n keys, ties to the lower index, best first; how many there are.
template <int K>
idx best_keys(const float* keys, idx n, idx* chosen) noexcept {
  float best[K];
  int count = 0;
  for (idx e = 0; e < n; ++e) {
    const float key = keys[e];
    if (!(key > -std::numeric_limits<float>::infinity()) || (count == K && !(key > best[K - 1]))) continue;
    int j = count < K ? count++ : K - 1;
    for (; j > 0 && key > best[j - 1]; --j) {
      best[j] = best[j - 1];
      chosen[j] = chosen[j - 1];
    }
    best[j] = key;
    chosen[j] = e;
  }
  return count;
}
/// Tokens with fewer than k choices close up: token_offsets[t + 1] holds how many token t has, from t k on.
/// move(from, to) is called for every choice that moves.
template <class Move>
void close_choices(routing_plan& p, dim k, Move move) noexcept {
  idx total = 0;
  p.token_offsets[0] = 0;
  for (dim t = 0; t < p.tokens(); ++t) {
    const idx n = p.token_offsets[static_cast<std::size_t>(t + 1)];
    if (total != t * k)
      for (idx j = 0; j < n; ++j) move(static_cast<std::size_t>(t * k + j), static_cast<std::size_t>(total + j));
    p.token_offsets[static_cast<std::size_t>(t + 1)] = total += n;
  }
}

}  // namespace detail

/// The K largest eligible keys of each token, ties to the lower expert: token_offsets is set and position holds the
/// chosen experts, best first, as group_by_expert reads them.
template <int K, HostBackend B>
void top_k_rows(const call<B>& on, matrix_view<const float> keys, routing_plan& p) noexcept {
  for_each_token(on, keys.rows, [&](dim t) {
    p.token_offsets[static_cast<std::size_t>(t + 1)] =
        detail::best_keys<K>(keys.row(t), static_cast<idx>(keys.cols), p.position.data() + t * K);
  });
  detail::close_choices(p, K, [&](std::size_t from, std::size_t to) { p.position[to] = p.position[from]; });
}
/// The same of rows that come a run at a time, grouped by expert and weighed: fill(then) calls then(first, n) for each run,
/// from any thread, and weigh(t, chosen, n, weight) says what the choices of token t weigh. weight[T*K] is scratch.
template <int K, HostBackend B, class Fill, class Weigh>
void route_rows(const call<B>& on, matrix_view<const float> keys, routing_plan& p, std::span<float> weight, Fill fill,
                Weigh weigh) noexcept {
  fill([&](dim t, dim n) {
    for (const dim last = t + n; t < last; ++t) {
      idx* chosen = p.position.data() + t * K;
      const idx count = detail::best_keys<K>(keys.row(t), static_cast<idx>(keys.cols), chosen);
      p.token_offsets[static_cast<std::size_t>(t + 1)] = count;
      weigh(t, chosen, count, weight.data() + t * K);
    }
  });
  detail::close_choices(p, K, [&](std::size_t from, std::size_t to) {
    p.position[to] = p.position[from];
    weight[to] = weight[from];
  });
  group_by_expert(on, p);
  for (std::size_t i = 0, n = static_cast<std::size_t>(p.token_offsets.back()); i < n; ++i)
    p.weight[static_cast<std::size_t>(p.position[i])] = weight[i];
}

/// f(call) with a call that runs on this thread alone: steps on a part of the tokens, inside a unit of work.
template <HostBackend B, class F>
void on_this_thread(const call<B>& on, F f) noexcept {
  using alone = host_backend<typename B::arch, serial>;
  const alone backend{serial{}};
  f(call<alone>{backend, on.scratch, on.sizes, on.training, on.rng});
}

/// As many choices of each token as keep(t, chosen, n) says of its n: the first of them stay. Before group_by_expert.
template <HostBackend B, class F>
void shorten_choices(const call<B>&, routing_plan& p, F keep) noexcept {
  const auto at = [](dim i) { return static_cast<std::size_t>(i); };
  idx total = 0, first = 0;
  for (dim t = 0; t < p.tokens(); ++t) {
    const idx last = p.token_offsets[at(t + 1)], n = keep(t, p.position.data() + first, last - first);
    for (idx j = 0; j < n; ++j) p.position[at(total + j)] = p.position[at(first + j)];
    p.token_offsets[at(t + 1)] = total += n;
    first = last;
  }
}

/// The choices of each token from a function object: list.count(t) says how many, list(t, chosen) writes them. Before
/// group_by_expert.
template <HostBackend B, class F>
void list_choices(const call<B>& on, routing_plan& p, F list) noexcept {
  const auto at = [](dim i) { return static_cast<std::size_t>(i); };
  for_each_token(on, p.tokens(), [&](dim t) { p.token_offsets[at(t + 1)] = list.count(t); });
  p.token_offsets[0] = 0;
  for (dim t = 0; t < p.tokens(); ++t) p.token_offsets[at(t + 1)] += p.token_offsets[at(t)];
  for_each_token(on, p.tokens(), [&](dim t) { list(t, p.position.data() + p.token_offsets[at(t)]); });
}

/// Groups assignments by expert. On entry token_offsets is set and position holds, for each choice of a token, its expert
/// e, or -1 - e where it was dropped; on return the plan is whole but for its weights.
template <HostBackend B>
void group_by_expert(const call<B>&, routing_plan& p) noexcept {
  const auto at = [](dim i) { return static_cast<std::size_t>(i); };
  for (idx& o : p.offsets) o = 0;
  const idx choices = p.token_offsets.back();
  for (idx i = 0; i < choices; ++i)
    if (const idx e = p.position[at(i)]; e >= 0) ++p.offsets[at(e) + 1];
  for (std::size_t e = 1; e < p.offsets.size(); ++e) p.offsets[e] += p.offsets[e - 1];
  // offsets[e] walks from the first to the last row of e, then the array is moved back by one expert.
  for (dim t = 0; t < p.tokens(); ++t)
    for (idx i = p.token_offsets[at(t)]; i < p.token_offsets[at(t + 1)]; ++i)
      if (const idx e = p.position[at(i)]; e >= 0) {
        const idx r = p.offsets[at(e)]++;
        p.token[at(r)] = static_cast<idx>(t);
        p.position[at(i)] = r;
      }
  for (std::size_t e = p.offsets.size() - 1; e > 0; --e) p.offsets[e] = p.offsets[e - 1];
  p.offsets[0] = 0;
}

}  // namespace moe
