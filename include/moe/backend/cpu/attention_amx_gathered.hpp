// SPDX-License-Identifier: Apache-2.0
/// Attention over bf16 on the tile unit of Intel processors where the rows of a tile meet keys block by block and lie apart:
/// two blocks of rows at a time are gathered, scored, weighed and merged into what their rows have summed so far. `Tiles` as
/// in packed_amx.hpp.
#pragma once

#include "moe/backend/cpu/attention_amx.hpp"
#include "moe/backend/cpu/attention_amx_ranking.hpp"

#if defined(MOE_X86_KERNELS)

namespace moe::arch::detail {

/// Squares of 32 rows by 32 keys, or by 32 columns of their sums, are vectors' work while the tiles after them are
/// multiplied: what lies between two products stays in the first cache, past which keys and values come from the second.
template <int Build, class Tiles>
class attention_tile_stream : attention_tile_blocks<Build, Tiles> {
  using base = attention_tile_blocks<Build, Tiles>;
  using base::pair, base::block_bytes, base::key_steps, base::steps_of, base::place;
  using typename base::rules;
  using pair_record = attention_stream::pair;

 public:
  /// Keys as columns, then values as rows: of a step, as tiles read them. Whether every value is finite.
  static bool pack(matrix_view<const bf16> k, matrix_view<const bf16> v, std::byte* to) noexcept {
    base::pack_columns(k, to);
    return base::pack_rows(v, to + moe::detail::round_up(k.rows, pair) * steps_of(k.cols) * line_bytes);
  }
  static void meet(attention_stream& f, const attention_visit& visit) noexcept {
    if (f.idle) base::full_tiles();
    f.idle = false;
    for (dim i = 0; i < 2; ++i) f.next[i] = visit.next[i];
    for (dim i = 0; i < visit.rows; i += pair) {
      push(f, visit, i);
      attention_tile_stream(f).run();
    }
  }
  /// Lets what is under way end.
  static void end(attention_stream& f) noexcept {
    f.next[0] = f.next[1] = {};
    for (dim i = 1; i < attention_stream::depth; ++i) {
      move_on(f).rows = 0;
      attention_tile_stream(f).run();
    }
    attention_tile_stream(f).finish_work();
    f.idle = true;
    Tiles::release();
  }

 private:
  explicit attention_tile_stream(attention_stream& f) noexcept : f_(f), d_steps_(steps_of(f.d)) {}

  static pair_record& move_on(attention_stream& f) noexcept {
    f.turn = (f.turn + 1) % attention_stream::depth;
    return f.pairs[f.turn];
  }
  static void push(attention_stream& f, const attention_visit& visit, dim i) noexcept {
    pair_record& p = move_on(f);
    p.weights = f.weights[f.turn % 2];
    p.rows = moe::detail::at_most(visit.rows - i, pair);
    p.keys = visit.k.rows;
    const idx* rows = visit.row + i;
    // Rows ascend, and so do the keys that they see.
    p.whole =
        p.keys % pair == 0 && f.state.first[rows[p.rows - 1]] <= visit.key && f.state.end[rows[0]] >= visit.key + p.keys;
    for (dim r = 0; r < p.rows; ++r) {
      p.at[r] = rows[r];
      p.o[r] = f.state.o.row(rows[r]);
      p.first[r] = 0;
      p.end[r] = static_cast<idx>(p.keys);
    }
    for (dim r = 0; !p.whole && r < p.rows; ++r) {
      const dim first = f.state.first[rows[r]] - visit.key, end = f.state.end[rows[r]] - visit.key;
      p.first[r] = static_cast<idx>(first > 0 ? first : 0);
      p.end[r] = static_cast<idx>(moe::detail::at_most(end, p.keys));
    }
    const dim lo = p.first[0], hi = p.end[p.rows - 1];
    p.lo = lo < hi ? lo / pair * pair : 0;
    p.hi = lo < hi ? moe::detail::round_up(hi, pair) : 0;
    p.packed = visit.packed;
    p.v = visit.v;
    p.finite = visit.finite;
  }
  pair_record& stage(dim before) const noexcept {
    return f_.pairs[(f_.turn + attention_stream::depth - before) % attention_stream::depth];
  }

  void run() noexcept {
    pair_record &s = stage(1), &w = stage(2);
    start(s);
    score(s, s.whole);
    for (dim r = 0; !s.whole && r < s.rows; ++r) begins_in(s, r) ? take_row_anew(s, r) : take_row(s, r);
    gather(stage(0));  // long before tiles load it
    weigh(w);
    if (f_.under_way.of != &w) finish_work();
    if (const unsigned strange = s.rows > 0 ? add_totals(s) : 0; strange != 0) {
      if (s.whole) {
        gather(s);
        score(s, false);
        gather(stage(0));
      }
      for (dim r = 0; r < s.rows; ++r)
        if ((strange >> r & 1) != 0) take_row_anew(s, r);
    }
  }
  /// Squares of scores for vectors to weigh while the next ones are multiplied, or all of them for take_row.
  void score(pair_record& s, bool beside) noexcept {
    for (dim key = s.lo; s.rows > 0 && key < s.hi; key += pair) {
      float* to = beside ? next_square() : f_.scores + key / pair * square;
      multiply(f_.gathered, d_steps_, s.rows, s.packed + key / pair * d_steps_ * 2 * tile_bytes, d_steps_, to);
      if (beside) f_.under_way = {&s, to, key, s.rows, 0, false};
    }
  }
  void weigh(pair_record& w) noexcept {
    const dim chunks = steps_of(w.keys), first = w.lo / pair, steps = (w.hi - w.lo) / pair;
    for (dim j = 0; w.rows > 0 && steps > 0 && j < f_.dv; j += pair) {
      const std::byte* values = w.packed + moe::detail::round_up(w.keys, pair) * d_steps_ * line_bytes;
      float* to = next_square();
      multiply(w.weights + first * block_bytes, key_steps, w.rows, values + (j / pair * chunks + first) * 2 * tile_bytes,
               steps, to);
      if (!w.finite) add_strange_values(w, j, to);
      f_.under_way = {&w, to, j, w.rows, 0, true};
    }
  }

  /// Floats of a square: four tiles, one after another.
  static constexpr dim square = pair * pair, beyond = tile_bytes / dim{sizeof(float)};
  static dim in_square(dim r) noexcept { return (r / tile_rows * pair + r % tile_rows) * tile_rows; }
  float* next_square() const noexcept { return f_.under_way.square == f_.squares ? f_.squares + square : f_.squares; }

  /// A pair of blocks of a left operand, `width` steps wide, by a pair of tiles of a right one. Meanwhile vectors do what is
  /// under way.
  void multiply(const std::byte* a, dim width, dim rows, const std::byte* q, dim steps, float* to) noexcept {
    on_tiles(Tiles{}, [&](auto tiles) noexcept { multiply_on<decltype(tiles)>(a, width, rows, q, steps, to); });
  }
  template <class T>
  MOE_TARGET(MOE_AMX_AVX512)
  MOE_NO_INLINE
      void multiply_on(const std::byte* a, dim width, dim rows, const std::byte* q, dim steps, float* to) noexcept {
    T::compiler_fence();
    const std::byte* b = rows > tile_rows ? a + width * block_bytes : nullptr;
    const dim each = moe::detail::blocks(f_.under_way.rows, steps);
    T::zero0();
    T::zero1();
    T::zero2();
    T::zero3();
    for (dim s = 0; s < steps; ++s, a += block_bytes, q += 2 * tile_bytes) {
      base::template multiply_step<T>(a, b, q);
      if (b) b += block_bytes;
      do_work(each);
      ask(8);
    }
    finish_work();
    auto* c = reinterpret_cast<std::byte*>(to);
    T::store0(c, line_bytes);
    T::store1(c + tile_bytes, line_bytes);
    if (b) T::store2(c + 2 * tile_bytes, line_bytes);
    if (b) T::store3(c + 3 * tile_bytes, line_bytes);
    T::compiler_fence();
  }
  void do_work(dim rows) noexcept {
    attention_stream::work& w = f_.under_way;
    const dim from = w.done, end = from + moe::detail::at_most(w.rows - from, rows);
    if (from >= end) return;
    w.done = end;
    w.sums ? merge(w, from, end) : take_square(w, from, end);
  }
  void finish_work() noexcept {
    do_work(pair);
    f_.under_way.rows = f_.under_way.done = 0;
  }

  MOE_TARGET(MOE_AVX512)
  void gather(const pair_record& p) const noexcept {
    for (dim r = 0; r < p.rows; ++r) {
      const std::byte* from = f_.rows + p.at[r] * d_steps_ * line_bytes;
      std::byte* to = f_.gathered + place(r, d_steps_);
      for (dim j = 0; j < d_steps_; ++j) _mm512_store_si512(to + j * block_bytes, _mm512_load_si512(from + j * line_bytes));
    }
  }
  MOE_TARGET(MOE_AVX512)
  MOE_NO_INLINE void merge(const attention_stream::work& w, dim r, dim end) const noexcept {
    const pair_record& p = *w.of;
    for (; r < end; ++r) {
      const float* from = w.square + in_square(r);
      float* o = p.o[r] + w.column;
      const __m512 fade = _mm512_set1_ps(p.fade[r]);
      _mm512_storeu_ps(o, _mm512_fmadd_ps(_mm512_loadu_ps(o), fade, _mm512_load_ps(from)));
      _mm512_storeu_ps(o + 16, _mm512_fmadd_ps(_mm512_loadu_ps(o + 16), fade, _mm512_load_ps(from + beyond)));
    }
  }
  /// What pack left out of columns j .. j + 32.
  static void add_strange_values(const pair_record& p, dim j, float* to) noexcept {
    const auto value_at = [&](dim key, dim c) noexcept { return p.v.row(key) + j + c; };
    base::for_each_strange(
        p.keys, moe::detail::at_most(p.v.cols - j, pair), value_at, [&](dim key, dim c, float value) noexcept {
          for (dim r = 0; r < p.rows; ++r)
            if (key >= p.first[r] && key < p.end[r])
              to[in_square(r) + c / 16 * beyond + c % 16] += base::weight_at(p.weights, key_steps, r, key) * value;
        });
  }
  void ask(dim lines) noexcept {
    for (attention_ahead& a : f_.next) lines = a.ask(lines);
  }

  MOE_TARGET(MOE_AVX512)
  void start(pair_record& p) const noexcept {
    for (dim r = 0; r < p.rows; r += 16) {
      _mm512_store_ps(p.fade + r, _mm512_set1_ps(1));
      const __m512 largest = of_rows(f_.state.largest, p, r);
      const __mmask16 met = _mm512_cmp_ps_mask(largest, _mm512_set1_ps(-moe::detail::infinity), _CMP_NEQ_UQ);
      _mm512_store_ps(p.shift + r, _mm512_maskz_mov_ps(met, largest));
    }
    for (dim r = 0; r < p.rows; ++r) _mm512_store_ps(f_.totals + r * 16, _mm512_setzero_ps());
  }
  /// Weights of rows r .. end of a square as halves, relative to `shift`; the totals are of the floats.
  MOE_TARGET(MOE_AVX512)
  MOE_NO_INLINE void take_square(const attention_stream::work& w, dim r, dim end) const noexcept {
    const pair_record& p = *w.of;
    std::byte* to = p.weights + w.column / pair * block_bytes;
    const __m512 scale = _mm512_set1_ps(f_.scale);
    for (; r < end; ++r) {
      const float* from = w.square + in_square(r);
      const __m512 shift = _mm512_set1_ps(p.shift[r]);
      const __m512 left = exp2_of_any(_mm512_fmsub_ps(_mm512_load_ps(from), scale, shift));
      const __m512 right = exp2_of_any(_mm512_fmsub_ps(_mm512_load_ps(from + beyond), scale, shift));
      float* total = f_.totals + r * 16;
      _mm512_store_ps(total, _mm512_add_ps(_mm512_load_ps(total), _mm512_add_ps(left, right)));
      _mm512_store_si512(to + place(r, key_steps), halves_beside(left, right));
    }
  }
  /// Those of rows r .. r + 16 of a pair.
  MOE_TARGET(MOE_AVX512)
  static __m512 of_rows(const float* values, const pair_record& p, dim r) noexcept {
    return _mm512_mask_i32gather_ps(_mm512_setzero_ps(), rules::lanes(0, p.rows - r), _mm512_loadu_si512(p.at + r), values,
                                    4);
  }
  /// The sums of 16 rows of 16 floats.
  MOE_TARGET(MOE_AVX512)
  static __m512 sums_of_rows(const float* rows) noexcept {
    __m512 a[8], b[4], c[2];
    MOE_UNROLL
    for (int i = 0; i < 8; ++i) {
      const __m512 x = _mm512_load_ps(rows + i * 16), y = _mm512_load_ps(rows + (i + 8) * 16);
      a[i] = _mm512_add_ps(_mm512_shuffle_f32x4(x, y, 0x44), _mm512_shuffle_f32x4(x, y, 0xee));
    }
    MOE_UNROLL
    for (int i = 0; i < 4; ++i)  // lanes: rows i, i + 8, i + 4, i + 12
      b[i] = _mm512_add_ps(_mm512_shuffle_f32x4(a[i], a[i + 4], 0x88), _mm512_shuffle_f32x4(a[i], a[i + 4], 0xdd));
    MOE_UNROLL
    for (int i = 0; i < 2; ++i) c[i] = _mm512_add_ps(_mm512_unpacklo_ps(b[i], b[i + 2]), _mm512_unpackhi_ps(b[i], b[i + 2]));
    const __m512 sums = _mm512_add_ps(_mm512_unpacklo_ps(c[0], c[1]), _mm512_unpackhi_ps(c[0], c[1]));
    return _mm512_shuffle_f32x4(sums, sums, 0xd8);
  }
  /// What a pair brings to the sums of its rows. Returns those whose sums would leave the range that weights are meant for.
  MOE_TARGET(MOE_AVX512)
  unsigned add_totals(const pair_record& p) const noexcept {
    unsigned strange = 0;
    for (dim r = 0; r < p.rows; r += 16) {
      const __m512 now = _mm512_add_ps(of_rows(f_.state.sum, p, r), sums_of_rows(f_.totals + r * 16));
      const __mmask16 good = _mm512_cmp_ps_mask(now, _mm512_set1_ps(1 / room), _CMP_GE_OQ) &
                             _mm512_cmp_ps_mask(now, _mm512_set1_ps(room), _CMP_LE_OQ);
      const __mmask16 there = rules::lanes(0, p.rows - r), taken = there & good;
      strange |= static_cast<unsigned>(static_cast<__mmask16>(there & ~good)) << r;
      const __m512i at = _mm512_loadu_si512(p.at + r);
      _mm512_mask_i32scatter_ps(f_.state.sum, taken, at, now, 4);
      _mm512_mask_i32scatter_ps(f_.state.largest, taken, at, _mm512_load_ps(p.shift + r), 4);
    }
    return strange;
  }
  /// Weights of a row are relative to what they were before, 0 at first, as long as its sum stays within this range: bf16 has
  /// the exponents of floats. Else, and where a row begins with few keys, they are relative to its largest score. Either
  /// way no other row matters.
  static constexpr float room = 1 << 24;
  /// Whether row r has met no key before, and meets fewer than 32 now.
  bool begins_in(const pair_record& p, dim r) const noexcept {
    return f_.state.largest[p.at[r]] == -moe::detail::infinity && p.end[r] - p.first[r] < pair;
  }

  /// Which of keys key .. key + 16 of the visit row r sees.
  static __mmask16 seen(const pair_record& p, dim r, dim key) noexcept {
    return rules::lanes(p.first[r] - key, p.end[r] - key);
  }
  /// What take_square does, of a row that may see a part of the keys.
  MOE_TARGET(MOE_AVX512)
  MOE_NO_INLINE void take_row(const pair_record& p, dim r) const noexcept {
    const __m512 scale = _mm512_set1_ps(f_.scale), shift = _mm512_set1_ps(p.shift[r]);
    __m512 total = _mm512_setzero_ps();
    for (dim key = p.lo; key < p.hi; key += pair) {
      const float* from = f_.scores + in_square(r) + key / pair * square;
      const __m512 left = _mm512_maskz_mov_ps(
          seen(p, r, key), exp2_of_any(_mm512_fmsub_ps(_mm512_load_ps(from), scale, shift)));
      const __m512 right = _mm512_maskz_mov_ps(
          seen(p, r, key + 16), exp2_of_any(_mm512_fmsub_ps(_mm512_load_ps(from + beyond), scale, shift)));
      total = _mm512_add_ps(total, _mm512_add_ps(left, right));
      _mm512_store_si512(p.weights + place(r, key_steps) + key / pair * block_bytes, halves_beside(left, right));
    }
    _mm512_store_ps(f_.totals + r * 16, total);
  }
  /// The same relative to the largest score of the row, unless that is -inf.
  MOE_TARGET(MOE_AVX512)
  MOE_NO_INLINE void take_row_anew(pair_record& p, dim r) const noexcept {
    const __m512 scale = _mm512_set1_ps(f_.scale), none = _mm512_set1_ps(-moe::detail::infinity);
    __m512 most = none;
    for (dim key = p.lo; key < p.hi; key += pair) {
      const float* from = f_.scores + in_square(r) + key / pair * square;
      most = _mm512_max_ps(most, _mm512_mask_mul_ps(none, seen(p, r, key), _mm512_load_ps(from), scale));
      most = _mm512_max_ps(most, _mm512_mask_mul_ps(none, seen(p, r, key + 16), _mm512_load_ps(from + beyond), scale));
    }
    const float found = _mm512_reduce_max_ps(most);
    float &largest = f_.state.largest[p.at[r]], &sum = f_.state.sum[p.at[r]], *total = f_.totals + r * 16;
    const bool any = found != -moe::detail::infinity;
    if (any) p.shift[r] = found;
    take_row(p, r);
    if (any) {
      p.fade[r] = _mm512_cvtss_f32(exp2_512(_mm512_set1_ps(largest - found)));
      largest = found;
      sum = sum * p.fade[r] + _mm512_reduce_add_ps(_mm512_load_ps(total));
    }
    _mm512_store_ps(total, _mm512_setzero_ps());  // they are added
  }
  static float finite_or_zero(float largest) noexcept { return largest == -moe::detail::infinity ? 0.f : largest; }

  attention_stream& f_;
  dim d_steps_;
};

template <int Build, class Tiles>
constexpr attention_kernels attention_on_tiles() noexcept {
  attention_kernels k = attention_of<attention_avx512<Build>>;
  k.take_halves = &attention_tiles<Build, Tiles>::take_row;
  k.round_halves = &attention_tiles<Build, Tiles>::take_floats;
  k.attend_halves = &attend_halves<Build, Tiles>;
  k.backward_halves = &attend_backward_halves<Build, Tiles>;
  k.pack_halves = &attention_tile_stream<Build, Tiles>::pack;
  k.end_halves = &attention_tile_stream<Build, Tiles>::end;
  k.add_halves = &add_halves_in_order<Build>;
  k.rank_halves = &attention_tile_ranking<Build, Tiles>::run;
  k.meet_halves = &attention_tile_stream<Build, Tiles>::meet;
  return k;
}

}  // namespace moe::arch::detail

#endif
