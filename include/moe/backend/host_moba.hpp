// SPDX-License-Identifier: Apache-2.0
/// Block attention on the host: which blocks of keys each query meets under each head, and the tiles that follow from it.
///
/// MoBA, Lu et al. 2025, arXiv:2502.13189, executed as in FlashMoBA, Xiao et al. 2025, arXiv:2511.11571: the rows of a tile
/// that chose a block are read as one dense tile, and the scores of all blocks are never stored.
#pragma once

#include <algorithm>

#include "moe/backend/host_attention.hpp"
#include "moe/backend/host_rows.hpp"

namespace moe {

namespace detail {

/// Whether a number is 2^50 or more, or none.
inline bool any_large(const float* x, dim n) noexcept {
  int large = 0;
  for (dim j = 0; j < n; ++j) large |= !(std::fabs(x[j]) < 0x1p50f);
  return large != 0;
}
/// The same of 32 halves.
inline bool any_large(const bf16* x) noexcept {
  constexpr int size = 0x7fff, bound = 0x5880;
  int large = 0;
  for (dim j = 0; j < 32; ++j) large |= (x[j].bits & size) >= bound;
  return large != 0;
}

}  // namespace detail

/// Every query meets its own block of `block` keys, up to its own position, and under each head the k - 1 earlier blocks
/// whose mean key has the largest product with it (the lower block where two are equal); all of them where there are fewer.
/// A block whose product is NaN or -inf is never among them. A causal mask without a window.
struct key_blocks {
  static constexpr bool gathers = true;
  /// Of a tile: as many as make packing keys cheap, for a block meets a part of them only.
  dim rows(const attention_heads& h) const noexcept {
    constexpr dim floats = 1 << 19, least = 384;
    return floats / (h.d + h.dv) > least ? floats / (h.d + h.dv) : least;
  }

  dim block = 128;                 ///< keys per block, B
  dim k = 8;                       ///< blocks of a query, its own among them
  matrix_view<float> centroids{};  ///< [centroid_rows, h_kv*d]
  matrix_view<idx> chosen{};       ///< [T*h, k-1]: earlier blocks, -1: none; kept for backward, or empty

  /// Blocks of all sequences, and the first of one of them.
  dim centroid_rows(dim sequences, dim keys) const noexcept { return keys / block + sequences; }
  dim first_centroid(const attention_sequence& in) const noexcept { return in.key / block + in.number; }

  /// Memory of one thread: what it ranks, and the rows of each block. They are those of one tile, so 32 bits count them;
  /// rows of `chosen`, which holds all tokens, are counted with 64.
  struct slot {
    dim *none, *own;            ///< [R] zeros, and the own block of a row, or -1
    float* best;                ///< [R,k-1], in groups of rows that are ranked at once
    idx* which;                 ///< the same
    idx *offsets, *list, *all;  ///< rows by block; all rows
  };
  slot carve(const attention_problem& p, attention_sizes n, dim tile_rows, arena& mem) const noexcept;
  void choose(const attention_kernels& kernels, const attention_problem& p, const detail::attention_tile& t,
              detail::attention_slot& s, slot& b) const noexcept;
  void recall(const attention_problem& p, const detail::attention_tile& t, detail::attention_slot& s,
              slot& b) const noexcept;
  template <class F>
  void for_each_step(const attention_problem& p, const detail::attention_tile& t, const detail::attention_slot& s,
                     const slot& b, F f) const noexcept;

 private:
  static constexpr dim lanes = arch::detail::rank_rows;  ///< of rows that are ranked at once: [k-1,lanes]
  dim earlier() const noexcept { return k - 1; }
  dim place(dim r, dim j) const noexcept { return (r / lanes * earlier() + j) * lanes + r % lanes; }
  idx* chosen_by(const attention_problem& p, const detail::attention_tile& t, dim r) const noexcept {
    const dim group = p.heads.group(), token = t.in.query + t.first + r / group;
    return chosen.row(token * p.heads.heads + t.head * group + r % group);
  }
  void find_own(const detail::attention_slot& s, slot& b) const noexcept;
  void refuse(matrix_view<const float> means, const detail::attention_slot& s, slot& b) const noexcept;
  void rank(const attention_kernels& kernels, dim first, dim n, const detail::attention_slot& s, slot& b) const noexcept;
  void group_by_block(dim rows_here, slot& b) const noexcept;
};

inline key_blocks::slot key_blocks::carve(const attention_problem&, attention_sizes n, dim tile_rows,
                                          arena& mem) const noexcept {
  const auto indices = [&](const char* name, dim count) { return mem.matrix<std::int32_t>(name, count, 1).data; };
  slot b;
  b.none = reinterpret_cast<dim*>(mem.matrix<std::int64_t>("none", tile_rows, 1).data);
  b.own = reinterpret_cast<dim*>(mem.matrix<std::int64_t>("own", tile_rows, 1).data);
  b.best = mem.matrix<float>("best", detail::round_up(tile_rows, lanes), earlier()).data;
  b.which = indices("which", detail::round_up(tile_rows, lanes) * earlier());
  b.offsets = indices("offsets", detail::blocks(n.keys, block) + 2);
  b.list = indices("list", tile_rows * earlier());
  b.all = indices("all", tile_rows);
  return b;
}

inline void key_blocks::find_own(const detail::attention_slot& s, slot& b) const noexcept {
  for (dim r = 0; r < s.state.q.rows; ++r) {
    b.none[r] = 0;
    b.own[r] = s.end[r] > 0 ? (s.end[r] - 1) / block : -1;
    b.all[r] = static_cast<idx>(r);
  }
  const dim all = detail::round_up(s.state.q.rows, lanes) * earlier();
  std::fill_n(b.best, all, -detail::infinity);
  std::fill_n(b.which, all, idx{-1});
  for (dim r = 0; r < s.state.q.rows && b.own[r] <= earlier(); ++r)
    for (dim j = 0; j < b.own[r]; ++j) b.which[place(r, j)] = static_cast<idx>(j);
}
/// Rows with no more earlier blocks than they may choose have all of them, and give back those that are never chosen. Sums
/// of products of numbers below 2^50 are numbers, so that hardly any is computed.
inline void key_blocks::refuse(matrix_view<const float> means, const detail::attention_slot& s, slot& b) const noexcept {
  constexpr dim piece = 32;
  const dim d = means.cols;
  const auto large_row = [&](dim r) {
    if (!s.ranking) return detail::any_large(s.state.q.row(r), d);
    bool large = false;
    for (dim j = 0; j < d; j += piece) large |= detail::any_large(s.ranking->elements(r, j, d));
    return large;
  };
  const auto element = [&](dim r, dim j) {
    return s.ranking ? static_cast<float>(s.ranking->elements(r, j, d)[j % piece]) : s.state.q(r, j);
  };
  bool large_mean = false;
  for (dim c = 0; c < means.rows; ++c) large_mean |= detail::any_large(means.row(c), d);
  for (dim r = 0; r < s.state.q.rows && b.own[r] <= earlier(); ++r) {
    if (b.own[r] <= 0 || (!large_mean && !large_row(r))) continue;
    for (dim c = 0; c < b.own[r]; ++c) {
      float score = 0;
      for (dim j = 0; j < d; ++j) score += element(r, j) * means(c, j);
      if (!(score > -detail::infinity)) b.which[place(r, c)] = -1;
    }
  }
}
/// Keeps the best of blocks first .. first + n, whose scores are in p, with those kept so far, best first.
inline void key_blocks::rank(const attention_kernels& kernels, dim first, dim n, const detail::attention_slot& s,
                             slot& b) const noexcept {
  const dim rows_here = s.state.q.rows, room = earlier();
  for (dim r = 0; r < rows_here; r += lanes) {
    const float* scores[lanes];
    idx earlier_here[lanes];
    for (dim l = 0; l < lanes; ++l) {
      const dim at = detail::at_most(r + l, rows_here - 1);
      scores[l] = s.p + at * attention_pitch;
      const bool takes_all = b.own[at] <= room;
      earlier_here[l] = takes_all || at < r + l ? 0 : static_cast<idx>(detail::at_most(b.own[at] - first, n));
    }
    kernels.rank(scores, earlier_here, static_cast<idx>(first), b.best + r * room, b.which + r * room, room);
  }
}
/// The rows of each block, ascending.
inline void key_blocks::group_by_block(dim rows_here, slot& b) const noexcept {
  const dim last = rows_here > 0 ? b.own[rows_here - 1] : -1;
  for (dim j = 0; j <= last + 1; ++j) b.offsets[j] = 0;
  for (dim i = 0; i < detail::round_up(rows_here, lanes) * earlier(); ++i)
    if (b.which[i] >= 0) ++b.offsets[b.which[i] + 1];
  for (dim j = 0; j < last; ++j) b.offsets[j + 1] += b.offsets[j];
  for (dim r = 0; r < rows_here; ++r) {
    const idx* which = b.which + place(r, 0);
    for (dim j = 0; j < earlier(); ++j, which += lanes)
      if (*which >= 0) b.list[b.offsets[*which]++] = static_cast<idx>(r);
  }
  for (dim j = last; j > 0; --j) b.offsets[j] = b.offsets[j - 1];  // each now ended where the next begins
  b.offsets[0] = 0;
}

inline void key_blocks::choose(const attention_kernels& kernels, const attention_problem& p, const detail::attention_tile& t,
                               detail::attention_slot& s, slot& b) const noexcept {
  find_own(s, b);
  const dim n = s.state.q.rows, blocks_before = b.own[n - 1];
  const matrix_view<float> all =
      centroids.columns(t.head * p.heads.d, p.heads.d).slice(first_centroid(t.in), blocks_before > 0 ? blocks_before : 0);
  refuse(all.slice(0, detail::at_most(all.rows, earlier())), s, b);
  if (all.rows > earlier() && earlier() > 0)
    detail::for_each_key_step(0, all.rows, [&](dim first, dim some) {
      const matrix_view<float> means = all.slice(first, some);
      if (s.ranking) {
        attention_ranking of = *s.ranking;
        of.count = n;
        of.first = first;
        of.room = earlier();
        of.means = means;
        of.own = b.own;
        of.best = b.best;
        of.which = b.which;
        return kernels.rank_halves(of);
      }
      attention_step step{s.state, nullptr, n, stored_rows(means), {}, first, s.panel, s.p};
      step.state.first = b.none;
      step.state.end = b.own;
      kernels.score(step);
      rank(kernels, first, some, s, b);
    });
  for (dim r = 0; chosen && r < n; ++r)
    for (dim j = 0; j < earlier(); ++j) chosen_by(p, t, r)[j] = b.which[place(r, j)];
  group_by_block(n, b);
}
inline void key_blocks::recall(const attention_problem& p, const detail::attention_tile& t, detail::attention_slot& s,
                               slot& b) const noexcept {
  find_own(s, b);
  for (dim r = 0; r < s.state.q.rows; ++r)
    for (dim j = 0; j < earlier(); ++j) b.which[place(r, j)] = chosen_by(p, t, r)[j];
  group_by_block(s.state.q.rows, b);
}
template <class F>
void key_blocks::for_each_step(const attention_problem&, const detail::attention_tile& t, const detail::attention_slot& s,
                               const slot& b, F f) const noexcept {
  const dim n = s.state.q.rows;
  const auto meet = [&](dim first, dim end, const idx* row, dim some) {
    if (some > 0)
      detail::for_each_key_step(first, end, [&](dim key, dim keys) { f(detail::step_range{key, keys, row, some}); });
  };
  for (dim j = 0; j < b.own[n - 1]; ++j)
    meet(j * block, (j + 1) * block, b.list + b.offsets[j], b.offsets[j + 1] - b.offsets[j]);
  for (dim r = 0, end; r < n; r = end) {
    for (end = r + 1; end < n && b.own[end] == b.own[r];) ++end;
    if (b.own[r] >= 0) meet(b.own[r] * block, detail::at_most((b.own[r] + 1) * block, t.in.keys), b.all + r, end - r);
  }
}

/// Memory that prepare_key_blocks fills for so many sequences: h_kv d floats for each block.
inline key_blocks carve_key_blocks(const attention_heads& h, dim sequences, dim keys, dim block, dim k,
                                   arena& mem) noexcept {
  key_blocks b{block, k};
  b.centroids = mem.matrix<float>("centroids", b.centroid_rows(sequences, keys), h.key_cols());
  return b;
}
/// What prepare_key_blocks takes from its scratch.
template <HostBackend B>
detail::slot_memory count_prepare_key_blocks(const B& backend, const attention_heads& h, arena& mem) noexcept {
  return detail::make_slots(backend, mem, [&](arena& a) { (void)a.matrix<float>("key", 1, h.d); });
}
/// centroids[c, g*d ..] = the mean of the keys of block c under key head g, added up in the order of the keys; the last
/// block of a sequence may be short.
template <HostBackend B, HeadViews K>
void prepare_key_blocks(const call<B>& on, const attention_problem& p, const K& k, const key_blocks& b) noexcept {
  const attention_kernels kernels = attention_kernels_of(typename B::arch{});
  const dim d = p.heads.d;
  scratch_frame frame(on.scratch);
  const detail::slot_memory slots = count_prepare_key_blocks(on.backend, p.heads, on.scratch);
  for (dim number = 0; number < p.sequences(); ++number) {
    const attention_sequence in = p.sequence(number, attention_sizes{0, k[0].rows});
    detail::share_units(on, slots, detail::blocks(in.keys, b.block), [&](arena mem, auto take) {
      float* key = mem.matrix<float>("key", 1, d).data;
      for (dim c; take(c);) {
        const dim first = in.key + c * b.block, n = detail::at_most(in.keys - c * b.block, b.block);
        float* means = b.centroids.row(b.first_centroid(in) + c);
        std::memset(means, 0, static_cast<std::size_t>(p.heads.key_cols()) * sizeof(float));
        for (dim i = first; i < first + n;) {  // all heads of some keys, which lie together
          constexpr dim some = 4;
          const dim now = kernels.add_halves ? detail::at_most(first + n - i, some) : 1;
          for (dim g = 0; g < p.heads.kv_heads; ++g) {
            if constexpr (detail::all_halves<K>)
              if (kernels.add_halves) {
                const bf16* row[some];
                for (dim l = 0; l < now; ++l) row[l] = k[g].row(i + l);
                kernels.add_halves(row, now, means + g * d, d);
                continue;
              }
            for (dim l = i; l < i + now; ++l)
              axpy(typename B::arch{}, 1.f, detail::as_floats(kernels, k[g].slice(l, 1), key).data, means + g * d, d);
          }
          i += now;
        }
        for (dim j = 0; j < p.heads.key_cols(); ++j) means[j] /= static_cast<float>(n);
      }
    });
  }
}

}  // namespace moe
