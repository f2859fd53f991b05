// SPDX-License-Identifier: Apache-2.0
/// Selection and grouping on the host.
#pragma once

#include <limits>

#include "moe/backend/host_rows.hpp"

namespace moe {

/// The K largest eligible keys of each token, ties to the lower expert: token_offsets is set and position holds the
/// chosen experts, best first, as group_by_expert reads them.
template <int K, HostBackend B>
void top_k_rows(const call<B>& on, matrix_view<const float> keys, routing_plan& p) noexcept {
  const auto at = [](dim i) { return static_cast<std::size_t>(i); };
  for_each_token(on, keys.rows, [&](dim t) {
    float best[K];
    idx* chosen = p.position.data() + t * K;
    int n = 0;
    for (idx e = 0; e < keys.cols; ++e) {
      const float key = keys(t, e);
      if (!(key > -std::numeric_limits<float>::infinity()) || (n == K && !(key > best[K - 1]))) continue;
      int j = n < K ? n++ : K - 1;
      for (; j > 0 && key > best[j - 1]; --j) {
        best[j] = best[j - 1];
        chosen[j] = chosen[j - 1];
      }
      best[j] = key;
      chosen[j] = e;
    }
    p.token_offsets[at(t + 1)] = n;
  });
  idx total = 0;  // tokens with fewer choices close up
  p.token_offsets[0] = 0;
  for (dim t = 0; t < keys.rows; ++t) {
    const idx n = p.token_offsets[at(t + 1)];
    if (total != t * K)
      for (idx j = 0; j < n; ++j) p.position[at(total + j)] = p.position[at(t * K + j)];
    p.token_offsets[at(t + 1)] = total += n;
  }
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
