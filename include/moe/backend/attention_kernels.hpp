// SPDX-License-Identifier: Apache-2.0
/// What a level offers for attention: a table of plain functions, since the level is known only at run time. One step is
/// the rows of a tile (a query under one head each) against up to attention_keys keys of one key head, on one thread.
/// Nothing is allocated.
///
/// An element of a result is added up in the order of the keys, whatever other rows are in the tile, and nothing is read of
/// a key that a row does not see: what is not finite there stays there.
#pragma once

#include "moe/backend/attention_rules.hpp"
#include "moe/backend/scalar.hpp"

namespace moe {

/// Keys of one step, and the floats from one row of scores to the next: not a power of two, so that the scores of one key
/// lie in different sets of the nearest cache.
inline constexpr dim attention_keys = 128, attention_pitch = attention_keys + 16;

/// Rows of a tile and their running softmax, base 2: q is scaled by log2(e) / sqrt(d) or what stands for it.
struct attention_rows_state {
  matrix_view<float> q;      ///< [R,d]
  matrix_view<float> o;      ///< [R,dv], rows padded to a multiple of the level's columns: sum of 2^(s - largest) v
  float* largest = nullptr;  ///< [R] of the scores so far, -inf at first
  float* sum = nullptr;      ///< [R] of 2^(s - largest)
  const dim *first = nullptr, *end = nullptr;  ///< [R] the keys that a row sees
};

/// A step over bf16 as a level with products of bf16 reads it: keys and values as they are, blocks of 16 lines of 64 bytes
/// for them, the tile's rows and what lies between the products in its order (carve_halves).
struct attention_halves {
  matrix_view<const bf16> k, v;
  std::byte *rows, *gathered, *keys, *values, *weights;
  float scale;  ///< of the scores, log2(e) included
  /// Of backward alone: the gradients of outputs as `rows`; what is reduced over, in pairs; weights by key.
  std::byte *gradients, *key_rows, *row_pairs, *gradient_pairs, *turned;
  bool paired, finite;  ///< row_pairs and gradient_pairs hold the tile already; every number in them
};

/// Memory that is asked for while something else is computed.
struct attention_ahead {
  const std::byte* at = nullptr;
  dim rows = 0, stride = 0, bytes = 0, done = 0;  ///< bytes of a row, of them asked for

  /// Its next lines, at most so many, come nearer; returns how many are left over.
  dim ask(dim lines) noexcept {
    constexpr dim line = 64;
    for (; lines > 0 && rows > 0; --lines) {
      detail::prefetch_second(at + done);
      if ((done += line) < bytes) continue;
      done = 0;
      at += stride;
      --rows;
    }
    return lines;
  }
};
/// Rows of a tile that meet keys `key` .. `key` + k.rows of their sequence, which pack_halves packed.
struct attention_visit {
  const idx* row;  ///< ascending
  dim rows, key;
  matrix_view<const bf16> k, v;
  const std::byte* packed;  ///< stays as it is until depth - 1 more visits have been met
  bool finite;              ///< every value
  attention_ahead next[2];  ///< what the visit after this one reads
};
/// A tile's rows on their way through visits, a pair of blocks at a time: the pair that came last is gathered, the one
/// before is scored and the one before that adds up its values.
struct attention_stream {
  struct pair {
    static constexpr dim most = 32;
    dim rows = 0, keys, lo, hi;  ///< keys lo .. hi, multiples of 32, are seen by some row
    const std::byte* packed;
    matrix_view<const bf16> v;
    bool finite, whole;  ///< whole: every row sees every key, a multiple of 32
    std::byte* weights;
    idx at[most], first[most], end[most];  ///< rows, and the keys of the visit that they see
    float* o[most];
    alignas(64) float shift[most], fade[most];  ///< what weights are relative to; by what earlier sums are multiplied
  };
  /// What vectors do with a square of 32 rows that tiles made: the weights of its 32 keys, or to merge 32 columns of sums.
  struct work {
    pair* of;
    const float* square;
    dim column, rows = 0, done = 0;
    bool sums;
  };
  static constexpr dim depth = 4;  ///< the last sums of a pair are merged meanwhile
  attention_rows_state state;
  dim d, dv;
  float scale;      ///< of the scores, log2(e) included
  std::byte* rows;  ///< [R, d], padded to a multiple of 32
  std::byte *gathered, *weights[2];
  float *scores, *squares, *totals;  ///< of a pair and all keys of a step; of two squares; of a pair, 16 floats a row
  attention_ahead next[2];
  pair pairs[depth];
  dim turn = 0;  ///< of pairs, which one came last
  work under_way;
  bool idle = true;  ///< no pair is under way
};

/// Rows of a tile and the means of blocks `first` .. `first` + means.rows, at most attention_keys: best and which as in
/// rank.
struct attention_ranking {
  const std::byte* rows;  ///< as in attention_stream
  std::byte *parts, *turned;
  float* scores;
  dim count, first, room;
  matrix_view<const float> means;
  const dim* own;  ///< ascending: a row may choose the blocks before its own, where they are more than `room`
  float* best;
  idx* which;

  /// Elements j .. j + 32 of row r, of d: zeros after the last.
  const bf16* elements(dim r, dim j, dim d) const noexcept {
    constexpr dim wide = 32, bytes = 64;
    return reinterpret_cast<const bf16*>(rows + (r * detail::blocks(d, wide) + j / wide) * bytes);
  }
};

/// Rows of float, bf16 or f16 as they lie.
struct stored_rows {
  enum class element { f32, bf16, f16 };

  stored_rows() = default;
  template <class T>
  explicit stored_rows(matrix_view<T> m) noexcept
      : data(reinterpret_cast<const std::byte*>(m.data)),
        rows(m.rows),
        cols(m.cols),
        stride(m.ld * dim{sizeof(T)}),
        row_bytes(m.cols * dim{sizeof(T)}),
        type(std::same_as<std::remove_const_t<T>, float>  ? element::f32
             : std::same_as<std::remove_const_t<T>, bf16> ? element::bf16
                                                          : element::f16) {}
  template <class T>
  const T* row(dim i) const noexcept {
    return reinterpret_cast<const T*>(data + i * stride);
  }

  const std::byte* data = nullptr;
  dim rows = 0, cols = 0, stride = 0, row_bytes = 0;  ///< stride in bytes
  element type = element::f32;
};

/// The chosen rows against keys `key` .. `key` + k.rows of their sequence.
struct attention_step {
  attention_rows_state state;
  const idx* row = nullptr;  ///< the rows, ascending, or null: all
  dim rows = 0;
  stored_rows k, v;
  dim key = 0;
  float *panel = nullptr, *p = nullptr;  ///< scratch
  stored_rows next_k{}, next_v{};        ///< of the step after this one: asked for while this one computes
  attention_halves* halves = nullptr;    ///< where k and v are read on tiles

  dim at(dim i) const noexcept { return row ? row[i] : i; }
  gathered<float> queries() const noexcept { return {state.q, row}; }
};

/// One step of backward. In its state `o` is the gradient of the output, `largest` the log2-sum of forward and `sum` delta,
/// where delta[r] = <do_r, o_r>. With p = 2^(s - largest) and ds = p (do v^T - delta), adds ds k to dq, ds^T q to dk and p^T
/// do to dv: of the scaled q, so the caller multiplies dq by the scale and dk by ln 2.
struct attention_backward_step : attention_step {
  matrix_view<float> dq, dk, dv;  ///< of all rows of the tile, and of the keys of the step; rows padded as those of o
  float *ds = nullptr, *packed_rows = nullptr, *turned = nullptr;  ///< scratch

  gathered<float> gradients() const noexcept { return {state.o.columns(0, v.cols), row}; }
};

/// One level's kernels.
struct attention_kernels {
  dim columns;  ///< rows of o and of gradients are padded to a multiple of it
  void (*widen_bf16)(const bf16* from, float* to, dim n) noexcept;
  void (*widen_f16)(const f16* from, float* to, dim n) noexcept;
  void (*scale)(float* x, float w, dim n) noexcept;
  void (*rank)(const float* const* s, const idx* n, idx first, float* best, idx* which, dim room) noexcept;
  void (*score)(const attention_step&) noexcept;  ///< p = q k^T, no more
  void (*attend)(const attention_step&) noexcept;
  void (*backward)(const attention_backward_step&) noexcept;
  /// Where the level has products of bf16, else null: row r of a tile into the blocks, as it is or rounded; and the steps,
  /// of the q that is not scaled: backward's dk is multiplied by the scale of scores, as dq is.
  void (*take_halves)(const bf16* row, dim d, dim r, std::byte* blocks) noexcept = nullptr;
  void (*round_halves)(const float* row, dim d, dim r, std::byte* blocks) noexcept = nullptr;
  void (*attend_halves)(const attention_step&) noexcept = nullptr;
  void (*backward_halves)(const attention_backward_step&) noexcept = nullptr;
  /// Where rows meet blocks of keys: the sum of rows for their mean; a step's keys and values packed, whether every value is
  /// finite; the rows that meet them; the end of a tile.
  void (*add_halves)(const bf16* const* rows, dim n, float* sums, dim d) noexcept = nullptr;  ///< in order
  bool (*pack_halves)(matrix_view<const bf16> k, matrix_view<const bf16> v, std::byte* to) noexcept = nullptr;
  void (*rank_halves)(const attention_ranking&) noexcept = nullptr;
  void (*meet_halves)(attention_stream&, const attention_visit&) noexcept = nullptr;
  void (*end_halves)(attention_stream&) noexcept = nullptr;
};

namespace arch {
namespace detail {

/// Keys [lo, hi) of a step.
struct key_range {
  dim lo, hi;
  bool empty() const noexcept { return lo >= hi; }
};
template <class Step>
key_range seen_by(const Step& s, dim i) noexcept {
  const dim r = s.at(i), lo = s.state.first[r] - s.key, hi = s.state.end[r] - s.key;
  return {lo > 0 ? lo : 0, hi < s.k.rows ? hi : s.k.rows};
}
/// What any of the rows i .. i + m sees; and what all of them see.
template <class Step>
key_range seen_by_any(const Step& s, dim i, dim m) noexcept {
  key_range all{s.k.rows, 0};
  for (dim r = i; r < i + m; ++r) {
    const key_range own = seen_by(s, r);
    if (own.empty()) continue;
    all = {own.lo < all.lo ? own.lo : all.lo, own.hi > all.hi ? own.hi : all.hi};
  }
  return all;
}
template <class Step>
key_range seen_by_each(const Step& s, dim i, dim m) noexcept {
  key_range all{0, s.k.rows};
  for (dim r = i; r < i + m; ++r) {
    const key_range own = seen_by(s, r);
    all = {own.lo > all.lo ? own.lo : all.lo, own.hi < all.hi ? own.hi : all.hi};
  }
  return all;
}
/// Whether every row sees every key.
template <class Step>
bool all_seen(const Step& s) noexcept {
  const key_range each = seen_by_each(s, 0, s.rows);
  return each.lo == 0 && each.hi == s.k.rows;
}

/// Elements j .. j + n of row i as floats: as they are, or widened into `near`.
template <class A>
const float* floats_of(const stored_rows& m, dim i, dim j, dim n, float* near) noexcept {
  if (m.type == stored_rows::element::f32) return m.row<float>(i) + j;
  if (m.type == stored_rows::element::bf16)
    A::blocks::widen(m.row<bf16>(i) + j, near, n);
  else
    A::widen(m.row<f16>(i) + j, near, n);
  return near;
}
/// Columns j .. j + columns of m, and zeros, row after row: a panel of a right operand that is reduced over rows.
template <class A>
void pack_rows(const stored_rows& m, dim j, float* panel) noexcept {
  constexpr dim columns = A::blocks::columns;
  const dim n = at_most(m.cols - j, columns);
  for (dim i = 0; i < m.rows; ++i, panel += columns) {
    const float* from = floats_of<A>(m, i, j, n, panel);
    if (from != panel && n == columns) std::memcpy(panel, from, columns * sizeof(float));  // of a size that is known
    else if (from != panel) A::blocks::widen(from, panel, n);
    for (dim l = n; l < columns; ++l) panel[l] = 0;
  }
}
/// Rows j .. j + columns of m, and zeros, column after column: a panel of one that is reduced over columns.
template <class A>
void pack_columns(const stored_rows& m, dim j, float* panel) noexcept {
  using K = typename A::blocks;
  constexpr dim W = K::width, piece = 64;
  static constexpr float zeros[piece] = {};
  const dim n = at_most(m.rows - j, K::columns);
  float near[W * piece];
  for (dim i = 0; i < K::columns; i += W)
    for (dim p = 0; p < m.cols; p += piece) {
      const dim wide = at_most(m.cols - p, piece), whole = wide / W * W;
      const float* row[W];
      for (dim l = 0; l < W; ++l) row[l] = i + l < n ? floats_of<A>(m, j + i + l, p, wide, near + l * piece) : zeros;
      float* to = panel + p * K::columns + i;
      for (dim c = 0; c < whole; c += W) K::transpose(row, c, to + c * K::columns);
      for (dim c = whole; c < wide; ++c)
        for (dim l = 0; l < W; ++l) to[c * K::columns + l] = row[l][c];
    }
}

/// Walks over what the next step reads, a piece of a row at a time.
class upcoming_walk {
 public:
  explicit upcoming_walk(const attention_step& s) noexcept : left_(s.next_k), after_(s.next_v) {}
  /// Nothing yet, in pieces that suit those rows.
  prefetch_list list(const void* near) const noexcept {
    return prefetch_list(near, left_.rows > 0 ? left_.row_bytes : prefetch_list::reach);
  }
  /// As much as so many steps of a product may ask for.
  void fill(prefetch_list& ahead, dim steps) noexcept {
    while (left_.rows > 0 && ahead.count < ahead.pieces(steps)) {
      ahead.add(left_.data + done_);
      if ((done_ += ahead.bytes()) < left_.row_bytes) continue;
      done_ = 0;
      left_.data += left_.stride;
      if (--left_.rows > 0) continue;
      left_ = after_;
      after_ = {};
    }
  }

 private:
  stored_rows left_, after_;
  dim done_ = 0;  ///< bytes of the row
};

/// c(r, a panel of columns) += a[i + r, lo .. hi) times rows lo .. hi of a packed panel; c(r, .) lies as outer_block says.
/// soon(r) are floats that the block after this one reads, at most `width` each for r below outer_rows, or null.
template <class K, class Soon>
void add_panel(gathered<float> a, dim i, dim m, key_range depth, const float* panel, float* c, dim ld, upcoming_walk& next,
               dim width, Soon soon, const idx* at = nullptr) noexcept {
  for (dim lo = depth.lo; lo < depth.hi; lo += outer_depth) {
    const dim n = at_most(depth.hi - lo, outer_depth);
    prefetch_list ahead = next.list(panel);
    for (dim r = 0; r < outer_rows; ++r)
      if (const float* p = soon(r))
        for (dim l = 0; l < width; l += ahead.bytes() / dim{sizeof(float)}) ahead.add(p + l);
    ahead.first = ahead.count;  // those rows; keys, a page apart where heads are many, would push each other out of it
    next.fill(ahead, n);
    with_constant<outer_rows>(
        m, [&](auto rows) { K::template outer_block<rows>(a, i, lo, panel + lo * K::columns, n, ahead, c, ld, at); });
  }
}

/// Nothing but what the next step reads.
inline const float* nothing_soon(dim) noexcept { return nullptr; }

/// f(i, m) for the blocks of rows of a step.
template <class Step, class F>
void for_each_block(const Step& s, F f) noexcept {
  for (dim i = 0; i < s.rows; i += outer_rows) f(i, at_most(s.rows - i, outer_rows));
}

/// scores(i, .) = a_i k^T for the panels of keys that a row of the block sees; the others stay as they are.
template <class A, class Step>
void score_rows(const Step& s, gathered<float> a, const stored_rows& k, float* scores, upcoming_walk& next) noexcept {
  using K = typename A::blocks;
  const dim depth = a.cols();
  const bool all = all_seen(s);
  const key_range every{0, s.k.rows}, any = all ? every : seen_by_any(s, 0, s.rows);
  for (dim j = any.lo / K::columns * K::columns; j < any.hi; j += K::columns) {
    pack_columns<A>(k, j, s.panel);
    for_each_block(s, [&](dim i, dim m) {
      const key_range seen = all ? every : seen_by_any(s, i, m);
      if (seen.hi <= j || seen.lo >= j + K::columns) return;
      float* c = scores + i * attention_pitch + j;
      for (dim r = 0; r < m; ++r) std::memset(c + r * attention_pitch, 0, K::columns * sizeof(float));
      const auto soon = [&](dim r) { return i + m + r < s.rows ? a.row(i + m + r) : nullptr; };
      add_panel<K>(a, i, m, {0, depth}, s.panel, c, attention_pitch, next, depth, soon);
    });
  }
}

/// to(row, .) += w(i, seen) m[seen, .] for the rows of a step. Each row adds up the keys that it sees, in their order. Where
/// it fades, what is there is multiplied first by the number after the row's last weight.
template <class A, bool Fades = false, class Step>
void weigh_rows(const Step& s, const float* weights, const stored_rows& rows, matrix_view<float> to,
                upcoming_walk& next) noexcept {
  using K = typename A::blocks;
  const gathered<float> w{{weights, s.rows, attention_keys, attention_pitch}};
  const bool all = all_seen(s);
  for (dim j = 0; j < to.cols; j += K::columns) {
    pack_rows<A>(rows, j, s.panel);
    for_each_block(s, [&](dim i, dim m) {
      const float* panel = s.panel;
      for (dim r = i; r < i + m && Fades; ++r)
        if (const float fade = weights[r * attention_pitch + attention_keys]; fade != 1)
          A::scale(to.row(s.at(r)) + j, fade, K::columns);
      const auto alone = [&](dim r, key_range range) {
        if (!range.empty()) add_panel<K>(w, r, 1, range, panel, to.row(s.at(r)) + j, to.ld, next, 0, nothing_soon);
      };
      const key_range each = all ? key_range{0, s.k.rows} : seen_by_each(s, i, m);
      for (dim r = i; r < i + m && !all; ++r) {
        const key_range own = seen_by(s, r);
        alone(r, each.empty() ? own : key_range{own.lo, each.lo});
      }
      if (each.empty()) return;
      const auto soon = [&](dim r) { return s.row && i + m + r < s.rows ? to.row(s.at(i + m + r)) + j : nullptr; };
      float* from = (s.row ? to.data : to.row(i)) + j;
      add_panel<K>(w, i, m, each, panel, from, to.ld, next, K::columns, soon, s.row ? s.row + i : nullptr);
      for (dim r = i; r < i + m && !all; ++r) alone(r, {each.hi, seen_by(s, r).hi});
    });
  }
}

template <class A>
void score(const attention_step& s) noexcept {
  upcoming_walk next(s);
  score_rows<A>(s, s.queries(), s.k, s.p, next);
}

/// One step of forward, with the rules `A` of a level: its blocks of products and its exponentials.
template <class A>
void attend(const attention_step& s) noexcept {
  upcoming_walk next(s);
  score_rows<A>(s, s.queries(), s.k, s.p, next);
  for (dim i = 0; i < s.rows; ++i) {
    const key_range seen = seen_by(s, i);
    const dim r = s.at(i);
    float* scores = s.p + i * attention_pitch;
    scores[attention_keys] = seen.empty() ? 1.f : A::softmax(scores, seen.lo, seen.hi, s.state.largest[r], s.state.sum[r]);
  }
  weigh_rows<A, true>(s, s.p, s.v, s.state.o, next);
}

/// to(key, .) += the sum over the rows of a step that see it of w(row, key) m(row, .)
template <class K>
void sum_rows_by_key(const attention_step& s, const float* weights, gathered<float> m, float* packed, float* turned,
                     matrix_view<float> to) noexcept {
  const dim rows = s.rows;
  for (dim j = 0; j < m.cols(); j += outer_columns)
    pack<K>([&](dim p) { return m.row(p) + j; }, rows, at_most(m.cols() - j, outer_columns), packed + j * rows);
  const gathered<float> w{{weights, rows, attention_keys, attention_pitch}}, by_key{{turned, to.rows, outer_depth}};
  for (dim first = 0; first < rows; first += outer_depth) {
    const dim end = first + at_most(rows - first, outer_depth);
    transpose_rows<K>(w, first, end - first, to.rows, turned);
    for (dim key = 0; key < to.rows; key += outer_rows) {
      const dim n = at_most(to.rows - key, outer_rows);
      key_range seeing{end, first};  // rows that see one of the keys
      for (dim i = first; i < end; ++i)
        if (const key_range seen = seen_by(s, i); seen.lo < key + n && seen.hi > key)
          seeing = {i < seeing.lo ? i : seeing.lo, i + 1};
      for (dim j = 0; j < to.cols && !seeing.empty(); j += K::columns) {
        const float* panel = packed + j * rows + seeing.lo * K::columns;
        const prefetch_list ahead(panel);
        with_constant<outer_rows>(n, [&](auto some) {
          K::template outer_block<some>(by_key, key, seeing.lo - first, panel, seeing.hi - seeing.lo, ahead, to.row(key) + j,
                                        to.ld);
        });
      }
    }
  }
}

/// One step of backward.
template <class A>
void attend_backward(const attention_backward_step& s) noexcept {
  using K = typename A::blocks;
  upcoming_walk next(s);
  score_rows<A>(s, s.queries(), s.k, s.p, next);
  score_rows<A>(s, s.gradients(), s.v, s.ds, next);
  for (dim i = 0; i < s.rows; ++i) {
    const key_range seen = seen_by(s, i);
    const dim r = s.at(i), row = i * attention_pitch;
    A::slopes(s.p + row, s.ds + row, seen.lo, seen.hi, s.k.rows, s.state.largest[r], s.state.sum[r]);
  }
  weigh_rows<A>(s, s.ds, s.k, s.dq, next);
  sum_rows_by_key<K>(s, s.p, s.gradients(), s.packed_rows, s.turned, s.dv);
  sum_rows_by_key<K>(s, s.ds, s.queries(), s.packed_rows, s.turned, s.dk);
}

template <class A>
inline constexpr attention_kernels attention_of{A::blocks::columns, &A::blocks::widen, &A::widen,  &A::scale,
                                                &A::rank,           &score<A>,         &attend<A>, &attend_backward<A>};

}  // namespace detail

template <int Build>
attention_kernels attention_kernels_of(basic_scalar<Build>) noexcept {
  return detail::attention_of<detail::attention_loops<detail::lane_blocks<detail::plain_lanes<Build>>>>;
}

}  // namespace arch
}  // namespace moe
