// SPDX-License-Identifier: Apache-2.0
/// The blocks that a query of a step of decoding reads.
#pragma once

#include "moe/attention/kv_cache.hpp"

namespace moe {

/// What select_blocks takes from on.scratch: 4 (d + blocks) bytes for each query head.
struct select_blocks_scratch {
  matrix_view<float> q, scores;  ///< [S*h, d] and [S*h, blocks]
};
inline select_blocks_scratch make_select_blocks_scratch(const kv_cache_shape& s, arena& mem) noexcept {
  const dim queries = s.sequences * s.heads.heads;
  return {mem.matrix<float>("q", queries, s.heads.d), mem.matrix<float>("scores", queries, s.blocks())};
}

namespace detail {

/// Puts the k best of n scores, the lower one of equals first, into `best` and -1 where there are fewer. NaN and -inf are
/// never chosen.
inline void keep_best(const float* score, dim n, idx* best, dim k) noexcept {
  dim kept = 0;
  for (dim b = 0; b < n; ++b) {
    if (!(score[b] > -infinity) || (kept == k && !(k > 0 && score[b] > score[best[k - 1]]))) continue;
    dim at = kept < k ? kept++ : k - 1;
    for (; at > 0 && score[b] > score[best[at - 1]]; --at) best[at] = best[at - 1];
    best[at] = static_cast<idx>(b);
  }
  for (; kept < k; ++kept) best[kept] = -1;
}
/// Ascending, -1 last.
inline void sort_blocks(idx* b, dim k) noexcept {
  const auto after = [](idx x, idx y) { return y >= 0 && (x < 0 || x > y); };
  for (dim i = 1; i < k; ++i)
    for (dim j = i; j > 0 && after(b[j - 1], b[j]); --j) {
      const idx kept = b[j];
      b[j] = b[j - 1];
      b[j - 1] = kept;
    }
}
template <class Arch, class T, class In>
void select_of(const kv_cache<T>& cache, matrix_view<In> q, dim r, const select_blocks_scratch& scratch, idx* chosen,
               dim k) noexcept {
  const attention_heads& h = cache.sizes.heads;
  const dim s = r / h.heads, a = r % h.heads, length = cache.length(s);
  const dim own = length > 0 ? (length - 1) / cache.sizes.block : -1;
  const matrix_view<float> mean = cache.centroids_of(s, h.key_head(a));
  float *row = scratch.q.row(r), *score = scratch.scores.row(r);
  for (dim j = 0; j < h.d; ++j) row[j] = static_cast<float>(q(s, a * h.d + j));
  for (dim b = 0; b < own; ++b) score[b] = dot(Arch{}, row, mean.row(b), h.d);
  keep_best(score, own, chosen, k - 1);
  chosen[k - 1] = static_cast<idx>(own);
  sort_blocks(chosen, k);
}

}  // namespace detail

/// blocks[S*h, k], ascending, for q[S, h*d]: of each query head its own block, the one that holds the last key, and those
/// k-1 of the blocks before it whose mean key has the largest product with q; the lower block wins a tie. Where there are
/// fewer, -1 stands at the end. As in the prefill, k counts the own block. errors   shape_error for sizes that do not fit, a
/// cache without blocks, too little scratch MoBA, Lu et al. 2025, arXiv:2502.13189
template <class B, class T, class In>
void select_blocks(const call<B>& on, const kv_cache<T>& cache, matrix_view<In> q, matrix_view<idx> blocks) {
  const attention_heads& h = cache.sizes.heads;
  expect(q, cache.sizes.sequences, h.query_cols(), "select_blocks: q", "S x h*d");
  expect(blocks, cache.sizes.sequences * h.heads, blocks.cols, "select_blocks: blocks", "S*h x k");
  if (blocks.cols < 1) throw shape_error("select_blocks: blocks has 0 columns, expected at least 1 (k)");
  if (cache.sizes.block == 0) throw shape_error("select_blocks: the cache was made without blocks (block = 0)");
  arena count;
  count.rewind(on.scratch.mark());
  (void)make_select_blocks_scratch(cache.sizes, count);
  expect_bytes(on.scratch.left(), count.peak() - on.scratch.mark(), "select_blocks: scratch",
               "make_select_blocks_scratch(sizes)");
  scratch_frame frame(on.scratch);
  const select_blocks_scratch s = make_select_blocks_scratch(cache.sizes, on.scratch);
  on.executor().for_each(blocks.rows, 1, [&](dim r, dim last) {
    for (; r < last; ++r) detail::select_of<typename B::arch>(cache, q, r, s, blocks.row(r), blocks.cols);
  });
}

}  // namespace moe
