// SPDX-License-Identifier: Apache-2.0
/// What a step of decoding asks of a backend, and the units of work that it is cut into.
#pragma once

#include <span>

#include "moe/backend/decode_kernels.hpp"
#include "moe/core/arena.hpp"

namespace moe {

/// What a query sees of its cache, and the factor of scores. Its own key is the last one: append it first.
struct decode_options {
  dim window = 0;                   ///< the last keys that are seen; 0: all
  float scale = 0;                  ///< 0: 1 / sqrt(d)
  matrix_view<const idx> blocks{};  ///< [S*h, k] blocks that a head sees, -1 for none; or empty: all. See select_blocks.
};

/// What decoding reads of a cache: S sequences of up to N tokens, h query heads on h_kv keys of width d and values of dv.
struct cached_sizes {
  dim sequences = 0, capacity = 0, heads = 0, kv_heads = 0, d = 0, dv = 0;
  dim block = 0;  ///< keys of a block that is selected, or 0

  constexpr dim group() const noexcept { return heads / kv_heads; }
};
template <class T>
struct cached_keys {
  cached_sizes sizes;
  matrix_view<const T> k, v;                  ///< [S*h_kv, N d] and N dv, see decode_layout
  matrix_view<const float> k_scale, v_scale;  ///< [S*h_kv, N], bytes only
  std::span<const idx> lengths;               ///< [S]

  dim length(dim s) const noexcept { return lengths[static_cast<std::size_t>(s)]; }
};

namespace detail {

/// Keys of a unit of work.
inline constexpr dim decode_chunk = 512;

/// Units of a step, with the partial results of the heads that take part in each.
struct decode_units {
  std::span<idx> sequence_offsets;  ///< [S*h_kv + 1] units of a key head of a sequence
  matrix_view<idx> keys;            ///< [units, 3] first key, one beyond the last, and the key head (of all sequences)
  matrix_view<idx> pick;            ///< [units, G] the heads of the group that take part, and then -1
  matrix_view<float> o;             ///< [units * G, dv], G and dv padded
  matrix_view<float> largest, sum;  ///< [units, G]
  matrix_view<std::int8_t> q;       ///< [S*h, 4 d] prepared
  matrix_view<float> row;           ///< [S*h, d] padded: queries as floats
  std::span<std::int32_t> done;     ///< [S*h_kv] finished units of a key head of a sequence: memory of counters
};

/// Most units of any step: chunks of whole sequences, or k blocks for each head.
inline dim most_units(const cached_sizes& s, dim k) noexcept {
  return k > 0 ? s.sequences * s.heads * k : s.sequences * s.kv_heads * (blocks(s.capacity, decode_chunk) + 1);
}
inline decode_units carve_units(const cached_sizes& s, dim k, arena& mem) noexcept {
  const dim heads = round_up(s.group(), decode_heads), units = most_units(s, k), queries = s.sequences * s.heads;
  decode_units u;
  u.sequence_offsets = mem.vector<idx>("unit_offsets", s.sequences * s.kv_heads + 1);
  u.keys = mem.matrix<idx>("unit_keys", units, 3);
  u.pick = mem.matrix<idx>("unit_heads", units, s.group());
  u.o = mem.matrix<float>("unit_o", units * heads, round_up(s.dv, kv_pad));
  u.largest = mem.matrix<float>("unit_largest", units, heads);
  u.sum = mem.matrix<float>("unit_sum", units, heads);
  u.q = mem.matrix<std::int8_t>("queries", queries, 4 * round_up(s.d, kv_pad));
  u.row = mem.matrix<float>("query_rows", queries, round_up(s.d, kv_pad));
  u.done = mem.vector<std::int32_t>("units_done", s.sequences * s.kv_heads);
  return u;
}

}  // namespace detail
}  // namespace moe
