// SPDX-License-Identifier: Apache-2.0
/// What attention on the host is made of: how it is cut into tiles of rows, memory of one thread, steps.
#pragma once

#include "moe/attention/problem.hpp"
#include "moe/backend/attention_kernels.hpp"
#include "moe/backend/host_slots.hpp"

namespace moe {

namespace detail {

inline constexpr float log2_e = 1.4426950408889634f, ln_2 = 0.6931471805599453f;

/// Queries `first` .. `first` + n of a sequence under the heads of key head `head`.
struct attention_tile {
  attention_sequence in;
  dim head, first, queries;
};

/// Tiles of `height` queries, at least one; a later one, which sees more keys, comes earlier.
class attention_grid {
 public:
  attention_grid(const attention_problem& p, attention_sizes n, dim rows) noexcept
      : p_(p), n_(n), height_(rows > p.heads.group() ? rows / p.heads.group() : 1) {}

  dim height() const noexcept { return height_; }
  /// Most rows of a tile.
  dim rows() const noexcept { return height_ * p_.heads.group(); }
  dim size() const noexcept {
    dim tiles = 0;
    for (dim s = 0; s < p_.sequences(); ++s) tiles += tiles_of(s);
    return tiles;
  }
  attention_tile operator[](dim i) const noexcept {
    dim s = 0;
    for (dim n; i >= (n = tiles_of(s)); ++s) i -= n;
    const attention_sequence a = p_.sequence(s, n_);
    const dim first = (blocks(a.queries, height_) - 1 - i / p_.heads.kv_heads) * height_;
    return {a, i % p_.heads.kv_heads, first, at_most(a.queries - first, height_)};
  }

 private:
  dim tiles_of(dim s) const noexcept { return blocks(p_.sequence(s, n_).queries, height_) * p_.heads.kv_heads; }
  const attention_problem& p_;
  attention_sizes n_;
  dim height_;
};

/// Rows of float, bf16 or f16 as floats: as they are, or widened into `near`.
template <class T>
matrix_view<const float> as_floats([[maybe_unused]] const attention_kernels& k, matrix_view<T> m, float* near) noexcept {
  using element = std::remove_const_t<T>;
  if constexpr (std::same_as<element, float>) {
    return m;
  } else {
    for (dim r = 0; r < m.rows; ++r) {
      if constexpr (std::same_as<element, bf16>)
        k.widen_bf16(m.row(r), near + r * m.cols, m.cols);
      else
        k.widen_f16(m.row(r), near + r * m.cols, m.cols);
    }
    return {near, m.rows, m.cols};
  }
}
/// The same as one row of floats at `to`.
template <class T>
void load_floats(const attention_kernels& k, matrix_view<T> row, float* to) noexcept {
  const matrix_view<const float> from = as_floats(k, row, to);
  if (from.data != to) std::memcpy(to, from.data, static_cast<std::size_t>(from.cols) * sizeof(float));
}

/// Memory of one thread at work on tiles of `rows` rows.
struct attention_slot {
  attention_rows_state state;
  dim *first, *end;
  float *panel, *p;
  const attention_ranking* ranking = nullptr;  ///< where the level ranks blocks by halves
};

inline attention_slot carve_attention_slot(const attention_kernels& k, const attention_heads& h, dim rows,
                                           arena& mem) noexcept {
  const dim dv = round_up(h.dv, k.columns), widest = h.d > h.dv ? h.d : h.dv;
  attention_slot s;
  s.state.q = mem.matrix<float>("q", rows, h.d);
  s.state.o = mem.matrix<float>("o", rows, dv);
  s.state.largest = mem.matrix<float>("largest", rows, 1).data;
  s.state.sum = mem.matrix<float>("sum", rows, 1).data;
  s.state.first = s.first = reinterpret_cast<dim*>(mem.matrix<std::int64_t>("first", rows, 1).data);
  s.state.end = s.end = reinterpret_cast<dim*>(mem.matrix<std::int64_t>("end", rows, 1).data);
  s.panel = mem.matrix<float>("panel", attention_keys > widest ? attention_keys : widest, k.columns).data;
  s.p = mem.matrix<float>("p", rows, attention_pitch).data;
  return s;
}

/// Rows of a tile with nothing summed yet; row (i, a) is i * group + a.
inline void start_rows(const attention_problem& p, const attention_tile& t, attention_slot& s) noexcept {
  const dim group = p.heads.group();
  s.state.q.rows = s.state.o.rows = t.queries * group;
  for (dim r = 0; r < s.state.q.rows; ++r) {
    s.state.largest[r] = -infinity;
    s.state.sum[r] = 0;
    s.first[r] = t.in.first_key(t.first + r / group, p.mask);
    s.end[r] = t.in.end_key(t.first + r / group, p.mask);
  }
  std::memset(s.state.o.data, 0, static_cast<std::size_t>(s.state.o.rows * s.state.o.ld) * sizeof(float));
}
/// Their queries, scaled.
template <HeadViews Q>
void load_queries(const attention_kernels& k, const attention_problem& p, const attention_tile& t, const Q& q,
                  attention_slot& s) noexcept {
  const dim group = p.heads.group();
  const float scale = p.score_scale() * log2_e;
  for (dim r = 0; r < s.state.q.rows; ++r) {
    load_floats(k, q[t.head * group + r % group].slice(t.in.query + t.first + r / group, 1), s.state.q.row(r));
    k.scale(s.state.q.row(r), scale, p.heads.d);
  }
}
/// o of row r, normalised in place; returns its lse.
inline float finish_row(const attention_kernels& k, attention_slot& s, dim r) noexcept {
  const float sum = s.state.sum[r];
  k.scale(s.state.o.row(r), sum != 0 ? 1.f / sum : 0.f, s.state.o.cols);
  return sum != 0 ? (s.state.largest[r] + std::log2(sum)) * ln_2 : -infinity;
}

/// Keys `key` .. `key` + `keys` of a tile's sequence, and the rows of the tile that meet them: ascending, or null for all.
struct step_range {
  dim key = 0, keys = 0;
  const idx* row = nullptr;
  dim rows = 0;
};
/// The rows that a step reads of one head.
template <HeadViews X>
stored_rows rows_of(const attention_tile& t, const X& heads, const step_range& r) noexcept {
  return stored_rows(heads[t.head].slice(t.in.key + r.key, r.keys));
}
/// A step, and what the one after it reads.
template <HeadViews K, HeadViews V>
attention_step step_of(const attention_tile& t, const K& keys, const V& values, const step_range& r, const step_range& next,
                       const attention_slot& s) noexcept {
  return {s.state, r.row,   r.rows, rows_of(t, keys, r),    rows_of(t, values, r),
          r.key,   s.panel, s.p,    rows_of(t, keys, next), rows_of(t, values, next)};
}

/// Heads of bf16 alone.
template <class... X>
inline constexpr bool all_halves =
    (std::same_as<std::remove_cvref_t<decltype(*std::declval<const X&>()[0].data)>, bf16> && ...);
/// n rows of `width` halves in blocks of 16 by 32.
inline std::byte* carve_blocks_of_halves(const char* name, dim n, dim width, arena& mem) noexcept {
  constexpr dim high = 16, wide = 32, bytes = 2;
  return reinterpret_cast<std::byte*>(mem.matrix<std::int8_t>(name, round_up(n, high), bytes * round_up(width, wide)).data);
}
/// For a tile of `rows` rows and a step, where the level has products of halves.
inline attention_halves carve_halves(const attention_kernels& k, const attention_problem& p, dim rows, arena& mem) noexcept {
  if (!k.attend_halves) return {};
  constexpr dim pair = 32;
  const auto block = [&](const char* name, dim n, dim width) { return carve_blocks_of_halves(name, n, width, mem); };
  const attention_heads& h = p.heads;
  attention_halves b{};
  b.scale = p.score_scale() * log2_e;
  b.rows = block("rows", rows, h.d);
  b.gathered = block("gathered", pair, h.d > h.dv ? h.d : h.dv);
  b.keys = block("keys", attention_keys, h.d);
  b.values = block("values", attention_keys, h.dv);
  b.weights = block("weights", round_up(rows, pair), attention_keys);
  return b;
}
/// Queries of a tile, unscaled.
template <HeadViews Q>
void take_halves(const attention_kernels& k, const attention_problem& p, const attention_tile& t, const Q& q,
                 std::byte* rows) noexcept {
  const dim group = p.heads.group();
  for (dim r = 0; r < t.queries * group; ++r)
    k.take_halves(q[t.head * group + r % group].row(t.in.query + t.first + r / group), p.heads.d, r, rows);
}
/// A step on halves.
template <HeadViews K, HeadViews V>
attention_step step_of_halves(const attention_tile& t, const K& keys, const V& values, const step_range& r,
                              const step_range& next, const attention_slot& s, attention_halves& b) noexcept {
  b.k = keys[t.head].slice(t.in.key + r.key, r.keys);
  b.v = values[t.head].slice(t.in.key + r.key, r.keys);
  attention_step step = step_of(t, keys, values, r, next, s);
  step.halves = &b;
  return step;
}

/// f(key, n) for the steps that cover keys first .. end of a sequence; equal steps for all tiles.
template <class F>
void for_each_key_step(dim first, dim end, F f) noexcept {
  for (dim key = first; key < end; key += attention_keys) f(key, at_most(end - key, attention_keys));
}

/// f(range, the next one, or an empty one) for every step.
template <class Selection, class F>
void for_each_step_and_next(const Selection& selection, const attention_problem& p, const attention_tile& t,
                            const attention_slot& s, const typename Selection::slot& chosen, F f) noexcept {
  step_range now{};
  selection.for_each_step(p, t, s, chosen, [&](const step_range& next) {
    if (now.rows > 0) f(now, next);
    now = next;
  });
  if (now.rows > 0) f(now, step_range{});
}

}  // namespace detail

}  // namespace moe
