// SPDX-License-Identifier: Apache-2.0
/// Attention of one query a sequence to the keys and values of a cache.
#pragma once

#include "moe/attention/kv_cache.hpp"
#include "moe/backend/decode_units.hpp"

namespace moe {

namespace detail {

template <class T>
void check_blocks(const kv_cache<T>& cache, matrix_view<const idx> blocks) {
  const dim heads = cache.sizes.heads.heads;
  expect(blocks, cache.sizes.sequences * heads, blocks.cols, "decode: blocks", "S*h x k");
  if (cache.sizes.block == 0) throw shape_error("decode: blocks are given, but the cache was made without (block = 0)");
  for (dim r = 0; r < blocks.rows; ++r)
    for (dim i = 0; i < blocks.cols; ++i) {
      const dim count = detail::blocks(cache.length(r / heads), cache.sizes.block);
      if (blocks(r, i) < -1 || blocks(r, i) >= count)
        throw shape_error("decode: blocks(" + std::to_string(r) + ", " + std::to_string(i) + ") is " +
                          std::to_string(blocks(r, i)) + ", expected below " + std::to_string(count) + " (of its sequence)");
    }
}

}  // namespace detail

/// What decode takes from on.scratch at every level, d and dv padded to multiples of 32; k: columns of `blocks`, or 0. 8 d
/// bytes for each query head, and for each unit 4 (dv + 2) bytes for each head of a group, a multiple of four of them:
/// units are chunks of 512 keys for each sequence and key head, or k for each query head.
inline void make_decode_scratch(const kv_cache_shape& s, dim k, arena& mem) noexcept {
  (void)detail::carve_units(s.read_sizes(), k, mem);
}

/// o = softmax(scale q k^T) v of one query a sequence, with the log-sum-exp of its scaled scores:
/// q[S, h*d], o[S, h*dv], lse[S, h] or empty. The query heads that share a key head are read together, so every byte of the
/// cache is read once. A sequence without keys: o = 0, lse = -inf.
///
/// Work is cut by the cache's lengths and merged in the order of the keys, so bits do not depend on the threads. With bytes,
/// levels from avx512_vnni on round queries and weights to 16 bits (2^-16 of the largest of a query and of a tile of keys),
/// beside the rounding of the cache.
/// errors   shape_error for sizes that do not fit, too little scratch, a block beyond the keys
template <class B, class T, class In, class Out>
void decode(const call<B>& on, const kv_cache<T>& cache, matrix_view<In> q, matrix_view<Out> o, matrix_view<float> lse = {},
            decode_options options = {}) {
  const attention_heads& h = cache.sizes.heads;
  const dim sequences = cache.sizes.sequences;
  expect(q, sequences, h.query_cols(), "decode: q", "S x h*d");
  expect(o, sequences, h.output_cols(), "decode: o", "S x h*dv");
  if (lse) expect(lse, sequences, h.heads, "decode: lse", "S x h");
  if (options.window < 0 || (options.window > 0 && options.blocks))
    throw shape_error("decode: window is " + std::to_string(options.window) + ", expected " +
                      (options.blocks ? "0 beside blocks" : "at least 0"));
  if (options.blocks) detail::check_blocks(cache, options.blocks);
  arena count;
  count.rewind(on.scratch.mark());
  make_decode_scratch(cache.sizes, options.blocks.cols, count);
  expect_bytes(on.scratch.left(), count.peak() - on.scratch.mark(), "decode: scratch", "make_decode_scratch(sizes, k)");
  if (options.scale == 0) options.scale = 1 / std::sqrt(static_cast<float>(h.d));
  attend_cache(on, cache.read(), q, options, o, lse);
}

}  // namespace moe
