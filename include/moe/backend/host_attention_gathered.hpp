// SPDX-License-Identifier: Apache-2.0
/// Attention over halves where rows gather the keys that they meet block by block, on a level with products of bf16: what
/// attend does then. Keys and values are packed once for all tiles where several of them meet the same ones, else by the
/// tile that meets them.
#pragma once

#include "moe/backend/host_attention_tiles.hpp"

namespace moe::detail {

/// A selection whose rows are far apart says `gathers`.
template <class Selection>
inline constexpr bool gathers = requires { Selection::gathers; };

/// Complete blocks of all key heads as tiles read them: 2 (d + dv) bytes for each key and key head, d and dv rounded up to
/// multiples of 32, and a byte for each 32 keys. Empty where blocks are no multiple of 32 or tiles of queries are few.
struct packed_blocks {
  std::byte* data = nullptr;
  bool* finite = nullptr;
  dim keys = 0, width = 0, block = 0;  ///< width: bytes of a key

  bool has(const attention_tile& t, const step_range& r) const noexcept {
    return data && r.key / block * block + block <= t.in.keys;
  }
  std::byte* at(dim head, dim key) const noexcept { return data + (head * keys + key) * width; }
  bool& finite_at(dim head, dim key) const noexcept { return finite[head * blocks(keys, 32) + key / 32]; }
};
template <class Selection>
packed_blocks carve_packed_blocks(const attention_kernels& k, const attention_problem& p, attention_sizes n,
                                  const Selection& selection, dim height, arena& mem) noexcept {
  constexpr dim tile = 32, halves = 2, few = 2;
  packed_blocks b;
  if (!k.meet_halves || selection.block % tile != 0 || n.queries <= few * height * p.sequences()) return b;
  b.keys = n.keys;
  b.width = halves * (round_up(p.heads.d, tile) + round_up(p.heads.dv, tile));
  b.block = selection.block;
  b.data = reinterpret_cast<std::byte*>(mem.matrix<std::int8_t>("packed", p.heads.kv_heads * n.keys, b.width).data);
  b.finite = reinterpret_cast<bool*>(mem.matrix<std::int8_t>("finite", p.heads.kv_heads, blocks(n.keys, tile)).data);
  return b;
}
/// Memory of one thread's stream; `ring`: for keys and values that are packed when they are met.
struct stream_slot {
  attention_stream stream;
  attention_ranking ranking;
  std::byte* ring[attention_stream::depth];
};
inline stream_slot carve_stream(const attention_kernels& k, const attention_heads& h, dim rows, arena& mem) noexcept {
  stream_slot s{};
  if (!k.meet_halves) return s;
  constexpr dim pair = attention_stream::pair::most;
  const auto block = [&](const char* name, dim n, dim width) { return carve_blocks_of_halves(name, n, width, mem); };
  s.stream.d = h.d;
  s.stream.dv = h.dv;
  s.stream.rows = block("rows", rows, h.d);
  s.stream.gathered = block("gathered", pair, h.d);
  for (std::byte*& weights : s.stream.weights) weights = block("weights", pair, attention_keys);
  s.stream.scores = mem.matrix<float>("scores", pair, attention_keys).data;
  s.stream.squares = mem.matrix<float>("squares", 2 * pair, pair).data;
  s.stream.totals = mem.matrix<float>("totals", pair, 16).data;
  s.ranking.rows = s.stream.rows;
  s.ranking.parts = block("parts", 3 * attention_keys, h.d);
  s.ranking.turned = block("turned", pair, h.d);
  s.ranking.scores = mem.matrix<float>("block_scores", attention_keys, pair).data;
  for (std::byte*& step : s.ring) step = block("step", attention_keys, round_up(h.d, 32) + round_up(h.dv, 32));
  return s;
}
template <HostBackend B, class Selection>
slot_memory make_attention_slots(const B& backend, const attention_problem& p, attention_sizes n, const Selection& selection,
                                 dim rows, arena& mem) noexcept {
  return make_slots(backend, mem, [&](arena& a) {
    const attention_kernels k = attention_kernels_of(typename B::arch{});
    (void)carve_attention_slot(k, p.heads, rows, a);
    (void)selection.carve(p, n, rows, a);
    if constexpr (gathers<Selection>)
      (void)carve_stream(k, p.heads, rows, a);
    else
      (void)carve_halves(k, p, rows, a);
  });
}
/// Queries of a tile, unscaled, one after another.
template <HeadViews Q>
void take_queries(const attention_problem& p, const attention_tile& t, const Q& q, std::byte* rows) noexcept {
  const dim group = p.heads.group(), d = p.heads.d * dim{sizeof(bf16)}, width = round_up(p.heads.d, 32) * dim{sizeof(bf16)};
  for (dim r = 0; r < t.queries * group; ++r, rows += width) {
    std::memcpy(rows, q[t.head * group + r % group].row(t.in.query + t.first + r / group), static_cast<std::size_t>(d));
    std::memset(rows + d, 0, static_cast<std::size_t>(width - d));
  }
}
inline attention_ahead ahead_of(matrix_view<const bf16> m) noexcept {
  constexpr dim bytes = sizeof(bf16);
  return {reinterpret_cast<const std::byte*>(m.data), m.rows, m.ld * bytes, m.cols * bytes};
}

template <HostBackend B, HeadViews K, HeadViews V>
void pack_blocks(const call<B>& on, const attention_kernels& kernels, const attention_problem& p, const K& k, const V& v,
                 const packed_blocks& packed) noexcept {
  for (dim number = 0; number < p.sequences(); ++number) {
    const attention_sequence in = p.sequence(number, attention_sizes{0, k[0].rows});
    const dim heads = p.heads.kv_heads;
    on.executor().for_each(in.keys / packed.block * heads, 1, [&](dim unit, dim last) {
      for (; unit < last; ++unit) {
        const dim g = unit % heads, first = unit / heads * packed.block;
        for_each_key_step(first, first + packed.block, [&](dim key, dim keys) {
          packed.finite_at(g, in.key + key) = kernels.pack_halves(
              k[g].slice(in.key + key, keys), v[g].slice(in.key + key, keys), packed.at(g, in.key + key));
        });
      }
    });
  }
}

/// attend over halves.
template <HostBackend B, HeadViews Q, HeadViews K, HeadViews V, class Selection, class Finish>
void attend_gathered(const call<B>& on, const attention_kernels& kernels, const attention_problem& p, const Q& q, const K& k,
                     const V& v, const Selection& selection, Finish finish) noexcept {
  scratch_frame frame(on.scratch);
  const attention_sizes n{q[0].rows, k[0].rows};
  const attention_grid grid(p, n, selection.rows(p.heads));
  const dim group = p.heads.group();
  const packed_blocks packed = carve_packed_blocks(kernels, p, n, selection, grid.height(), on.scratch);
  const slot_memory slots = make_attention_slots(on.backend, p, n, selection, grid.rows(), on.scratch);
  if (packed.data) pack_blocks(on, kernels, p, k, v, packed);
  share_units(on, slots, grid.size(), [&](arena mem, auto take) {
    attention_slot s = carve_attention_slot(kernels, p.heads, grid.rows(), mem);
    typename Selection::slot chosen = selection.carve(p, n, grid.rows(), mem);
    stream_slot own = carve_stream(kernels, p.heads, grid.rows(), mem);
    own.stream.scale = p.score_scale() * log2_e;
    s.ranking = &own.ranking;
    for (dim unit; take(unit);) {
      const attention_tile t = grid[unit];
      start_rows(p, t, s);
      take_queries(p, t, q, own.stream.rows);
      selection.choose(kernels, p, t, s, chosen);
      own.stream.state = s.state;
      dim visits = 0;
      for_each_step_and_next(selection, p, t, s, chosen, [&](const step_range& r, const step_range& next) {
        const auto keys_of = [&](const step_range& x) { return k[t.head].slice(t.in.key + x.key, x.keys); };
        const auto values_of = [&](const step_range& x) { return v[t.head].slice(t.in.key + x.key, x.keys); };
        attention_visit visit{r.row, r.rows, r.key, keys_of(r), values_of(r), nullptr, true, {}};
        if (packed.has(t, r)) {
          visit.packed = packed.at(t.head, t.in.key + r.key);
          visit.finite = packed.finite_at(t.head, t.in.key + r.key);
        } else {
          std::byte* to = own.ring[visits++ % attention_stream::depth];
          visit.finite = kernels.pack_halves(visit.k, visit.v, to);
          visit.packed = to;
        }
        if (packed.has(t, next)) {
          visit.next[0] = {packed.at(t.head, t.in.key + next.key), next.keys, packed.width, packed.width};
        } else {
          visit.next[0] = ahead_of(keys_of(next));
          visit.next[1] = ahead_of(values_of(next));
        }
        kernels.meet_halves(own.stream, visit);
      });
      kernels.end_halves(own.stream);
      for (dim r = 0; r < s.state.q.rows; ++r) {
        const float lse = finish_row(kernels, s, r);
        finish(t.in.query + t.first + r / group, t.head * group + r % group, s.state.o.row(r), lse);
      }
    }
  });
}

}  // namespace moe::detail
