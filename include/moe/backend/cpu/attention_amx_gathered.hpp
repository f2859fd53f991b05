// SPDX-License-Identifier: Apache-2.0
/// Attention over bf16 on the tile unit of Intel processors where the rows of a tile meet keys block by block and lie apart:
/// two blocks of rows at a time are gathered, scored, weighed and merged into what their rows have summed so far. `Tiles` as
/// in packed_amx.hpp.
#pragma once

#include "moe/backend/cpu/attention_amx.hpp"
#include "moe/backend/cpu/attention_amx_ranking.hpp"

#if defined(MOE_X86_KERNELS)

namespace moe::arch::detail {

/// What a pair of blocks of rows needs between its scores and its sums lies in the first cache, while keys and values pass
/// by from the second one.
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
      move_on(f);
      attention_tile_stream(f).run();
    }
    f.pairs[attention_stream::depth - 1].rows = 0;
    f.idle = true;
    Tiles::release();
  }

 private:
  /// A store and a load whose addresses differ by a multiple of 4096 wait for one another: blocks do not lie so far apart.
  static constexpr dim apart = 512;

  explicit attention_tile_stream(attention_stream& f) noexcept : f_(f), d_steps_(steps_of(f.d)) {}

  static void move_on(attention_stream& f) noexcept {
    for (dim i = attention_stream::depth - 1; i > 0; --i) f.pairs[i] = f.pairs[i - 1];
    f.pairs[0].rows = 0;
  }
  static void push(attention_stream& f, const attention_visit& visit, dim i) noexcept {
    move_on(f);
    pair_record& p = f.pairs[0];
    p.rows = moe::detail::at_most(visit.rows - i, pair);
    p.keys = visit.k.rows;
    for (dim r = 0; r < p.rows; ++r) {
      const idx row = p.at[r] = visit.row[i + r];
      const dim first = f.state.first[row] - visit.key, end = f.state.end[row] - visit.key;
      p.first[r] = static_cast<idx>(first > 0 ? first : 0);
      p.end[r] = static_cast<idx>(moe::detail::at_most(end, p.keys));
    }
    const dim lo = p.first[0], hi = p.end[p.rows - 1];  // rows ascend, and so do the keys that they see
    p.lo = lo < hi ? lo / 32 * 32 : 0;
    p.hi = lo < hi ? moe::detail::round_up(hi, 32) : 0;
    p.packed = visit.packed;
    p.v = visit.v;
    p.finite = visit.finite;
  }
  const pair_record& gathering() const noexcept { return f_.pairs[0]; }
  pair_record& scoring() const noexcept { return f_.pairs[1]; }
  const pair_record& weighing() const noexcept { return f_.pairs[2]; }
  const pair_record& merging() const noexcept { return f_.pairs[3]; }

  /// What one stage writes the next one reads after another's work: tiles read badly what vectors have just written.
  void run() noexcept {
    score();
    weigh();
    for (dim r = 0; r < scoring().rows; ++r) take_weights(r);
  }
  static std::byte* row_of(std::byte* blocks, dim steps, dim r) noexcept {
    return blocks + r / tile_rows * (steps * block_bytes + apart) + r % tile_rows * line_bytes;
  }

  MOE_TARGET(MOE_AVX512)
  void gather(dim r) const noexcept {
    const std::byte* from = f_.rows + place(gathering().at[r], d_steps_);
    std::byte* to = row_of(f_.gathered, d_steps_, r);
    for (dim j = 0; j < d_steps_; ++j) _mm512_store_si512(to + j * block_bytes, _mm512_load_si512(from + j * block_bytes));
  }
  /// While tiles score a pair vectors merge the one that was weighed before.
  void score() noexcept {
    const pair_record& p = scoring();
    const std::byte *upper = f_.gathered, *lower = p.rows > tile_rows ? row_of(f_.gathered, d_steps_, tile_rows) : nullptr;
    const auto unit = [this](dim r) noexcept { merge(r); };
    typename base::template beside<decltype(unit)> merges{unit, merging().rows, 2};
    const auto beside = [&]() noexcept {
      merges();
      ask(8);
    };
    for (dim key = p.lo; p.rows > 0 && key < p.hi; key += pair)
      base::multiply({upper, lower, p.packed + key / pair * d_steps_ * 2 * tile_bytes, d_steps_, f_.scores + key,
                      attention_pitch, false},
                     beside);
    merges.finish();
  }
  /// While tiles weigh the values vectors gather the next rows.
  void weigh() noexcept {
    const pair_record& p = weighing();
    const auto unit = [this](dim r) noexcept {
      gather(r);
      ask_for_sums(r);
    };
    typename base::template beside<decltype(unit)> rows{unit, gathering().rows, 2};
    const auto beside = [&]() noexcept {
      rows();
      ask(8);
    };
    const dim chunks = steps_of(p.keys), first = p.lo / 32;
    for (dim j = 0; p.rows > 0 && j < f_.dv; j += pair) {
      const std::byte* values = p.packed + moe::detail::round_up(p.keys, pair) * d_steps_ * line_bytes;
      const std::byte* upper = f_.weights + first * block_bytes;
      const std::byte* lower = p.rows > tile_rows ? row_of(f_.weights, key_steps, tile_rows) + first * block_bytes : nullptr;
      base::multiply({upper, lower, values + (j / pair * chunks + first) * 2 * tile_bytes, (p.hi - p.lo) / 32, f_.sums + j,
                      sums_pitch(), false},
                     beside);
      if (!p.finite) add_strange_values(j);
    }
    rows.finish();
  }
  dim sums_pitch() const noexcept { return moe::detail::round_up(f_.dv, pair) + 16; }
  MOE_TARGET(MOE_AVX512)
  void merge(dim r) const noexcept {
    const pair_record& p = merging();
    const __m512 fade = _mm512_set1_ps(p.fade[r]);
    const float* from = f_.sums + r * sums_pitch();
    float* o = f_.state.o.row(p.at[r]);
    for (dim j = 0; j < f_.dv; j += 16)
      _mm512_storeu_ps(o + j, _mm512_fmadd_ps(_mm512_loadu_ps(o + j), fade, _mm512_loadu_ps(from + j)));
  }
  /// What pack left out of columns j .. j + 32.
  void add_strange_values(dim j) const noexcept {
    const pair_record& p = weighing();
    const auto value_at = [&](dim key, dim c) noexcept { return p.v.row(key) + j + c; };
    base::for_each_strange(
        p.keys, moe::detail::at_most(f_.dv - j, pair), value_at, [&](dim key, dim c, float value) noexcept {
          for (dim r = 0; r < p.rows; ++r)
            if (key >= p.first[r] && key < p.end[r])
              f_.sums[r * sums_pitch() + j + c] +=
                  base::weight_at(row_of(f_.weights, key_steps, r / tile_rows * tile_rows), key_steps, r % tile_rows, key) *
                  value;
        });
  }
  /// What merge reads next.
  void ask_for_sums(dim r) const noexcept {
    if (r >= weighing().rows) return;
    constexpr dim line = line_bytes / dim{sizeof(float)};
    const float* o = f_.state.o.row(weighing().at[r]);
    for (dim j = 0; j < f_.dv; j += line) moe::detail::prefetch_second(o + j);
  }
  void ask(dim lines) noexcept {
    for (attention_ahead& a : f_.next) lines = a.ask(lines);
  }

  void take_weights(dim r) noexcept {
    pair_record& p = scoring();
    p.fade[r] = 1;
    if (p.first[r] == 0 && p.end[r] == p.keys && f_.scale > 0) {
      if (p.keys == 128) return take_weights<8, true>(p, r);
      if (p.keys == 64) return take_weights<4, true>(p, r);
      if (p.keys == 32) return take_weights<2, true>(p, r);
    }
    take_weights<8, false>(p, r);
  }
  /// Weights of row r of a pair as halves, from its scores; the sums are of the floats.
  template <dim Vectors, bool Whole>
  MOE_TARGET(MOE_AVX512)
  void take_weights(pair_record& p, dim r) noexcept {
    constexpr dim width = 16;
    const dim row = p.at[r];
    const dim first = Whole ? 0 : p.lo / width, end = Whole ? Vectors : p.hi / width;
    const float* from = f_.scores + r * attention_pitch;
    const __m512 scale = _mm512_set1_ps(f_.scale), none = _mm512_set1_ps(-moe::detail::infinity);
    __m512 x[Vectors], most = none;
    MOE_UNROLL
    for (dim j = first; j < end; ++j) {
      x[j] = _mm512_loadu_ps(from + j * width);
      if constexpr (!Whole)
        x[j] = _mm512_mask_mul_ps(none, rules::lanes(p.first[r] - j * width, p.end[r] - j * width), x[j], scale);
      most = _mm512_max_ps(most, x[j]);
    }
    if constexpr (Whole) most = _mm512_mul_ps(most, scale);
    const __m512 enough = _mm512_set1_ps(f_.state.largest[row] + slack);
    if (_mm512_cmp_ps_mask(most, enough, _CMP_NLE_UQ) != 0) p.fade[r] = raise(row, _mm512_reduce_max_ps(most));
    const __m512 shift = _mm512_set1_ps(finite_or_zero(f_.state.largest[row]));
    __m512 total = _mm512_setzero_ps();
    std::byte* to = row_of(f_.weights, key_steps, r);
    MOE_UNROLL
    for (dim j = first; j < end; j += 2) {
      const __m512 left = exp2_of_any(Whole ? _mm512_fmsub_ps(x[j], scale, shift) : _mm512_sub_ps(x[j], shift));
      const __m512 right = exp2_of_any(Whole ? _mm512_fmsub_ps(x[j + 1], scale, shift) : _mm512_sub_ps(x[j + 1], shift));
      total = _mm512_add_ps(total, _mm512_add_ps(left, right));
      _mm512_store_si512(to + j / 2 * block_bytes, halves_beside(left, right));
    }
    f_.state.sum[row] += _mm512_reduce_add_ps(total);
  }
  static float finite_or_zero(float largest) noexcept { return largest == -moe::detail::infinity ? 0.f : largest; }
  /// Weights are relative to the largest score of the first step, until one is 2^slack times as heavy: floats have room.
  static constexpr float slack = 8;
  /// The score of a row that its weights are relative to becomes `found`; returns by what its earlier ones are multiplied.
  MOE_TARGET(MOE_AVX512)
  MOE_NO_INLINE float raise(dim row, float found) const noexcept {
    float& largest = f_.state.largest[row];
    const float fade = _mm512_cvtss_f32(exp2_512(_mm512_set1_ps(largest - finite_or_zero(found))));
    f_.state.sum[row] *= fade;
    largest = found;
    return fade;
  }

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
