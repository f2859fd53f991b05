// SPDX-License-Identifier: Apache-2.0
/// Attention over bf16 on the tile unit of Intel processors: both products of forward, all five of backward. Scores, their
/// exponentials and sums are float32; the weights of the values are rounded to bf16, and in backward also the gradients of
/// scores and of outputs. Vectors work on one pair of blocks of rows while tiles multiply others. `Tiles` as in
/// packed_amx.hpp.
#pragma once

#include "moe/backend/cpu/attention_amx_blocks.hpp"

#if defined(MOE_X86_KERNELS)

namespace moe::arch::detail {

/// 2^x; 0 where x is -inf, and NaN stays.
MOE_TARGET(MOE_AVX512)
inline __m512 exp2_of_any(__m512 x) noexcept {
  constexpr __mmask16 all = 0xffff;
  constexpr int down = 0x09;
  // Off by at most 2.9e-6 of the value.
  constexpr float terms[] = {0.6930448412895203f, 0.241280198097229f, 0.052242472767829895f, 0.013426683843135834f};
  const __m512 part = _mm512_maskz_reduce_ps(all, x, down);
  __m512 p = _mm512_set1_ps(terms[3]);
  p = _mm512_fmadd_ps(p, part, _mm512_set1_ps(terms[2]));
  p = _mm512_fmadd_ps(p, part, _mm512_set1_ps(terms[1]));
  p = _mm512_fmadd_ps(p, part, _mm512_set1_ps(terms[0]));
  p = _mm512_fmadd_ps(p, part, _mm512_set1_ps(1.f));
  return _mm512_maskz_scalef_ps(all, p, x);
}
/// Lanes of a and b as halves side by side, halfway cases away from zero. A NaN stays one: tiles give none that is close to
/// infinity.
MOE_TARGET(MOE_AVX512)
inline __m512i halves_beside(__m512 a, __m512 b) noexcept {
  const __m512i half = _mm512_set1_epi32(0x8000);
  const __m512i low = _mm512_srli_epi32(_mm512_add_epi32(_mm512_castps_si512(a), half), 16);
  return _mm512_mask_mov_epi16(low, 0xaaaaaaaa, _mm512_add_epi32(_mm512_castps_si512(b), half));
}

/// One step of forward.
template <int Build, class Tiles>
class attention_tiles : public attention_tile_step<Build, Tiles, attention_step> {
  using base = attention_tile_step<Build, Tiles, attention_step>;
  using base::s_, base::h_, base::pair, base::block_bytes;
  using typename base::rules, typename base::row_pair;

 public:
  using base::base;

  /// While a pair of blocks is scored the one before gets its weights and the one before that adds up its values. A value
  /// that is not finite is left out of the tiles and added at the end.
  void run() noexcept {
    const bool finite = base::pack_rows(h_.v, h_.values);
    base::pack_columns(h_.k, h_.keys);
    const dim pairs = base::steps_of(s_.rows), ahead = base::steps_of(h_.k.cols) + base::steps_of(h_.v.cols);
    for (dim t = 0; t < pairs + 2; ++t) {
      const row_pair before = base::pair_at(t > 0 && t <= pairs ? t - 1 : 0);
      const dim rows = t > 0 && t <= pairs && !before.seen.empty() ? before.rows : 0;
      const auto unit = [&](dim r) noexcept {
        const key_range seen = seen_by(s_, before.first + r);
        if (seen.lo == 0 && seen.hi == attention_keys && h_.scale > 0)
          take_weights<true>(before, seen, r);
        else
          take_weights<false>(before, seen, r);
      };
      typename base::template beside<decltype(unit)> weights{unit, rows, moe::detail::blocks(rows, ahead * base::key_steps)};
      const auto beside = [&]() noexcept {
        weights();
        ask(4);  // of 12 pairs: as many as the next step reads
      };
      if (t < pairs) base::score(base::pair_at(t), h_.rows, h_.k.cols, h_.keys, scores_of(t), beside);
      if (t > 1) {
        const row_pair at = base::pair_at(t - 2);
        base::weigh(at, base::weights_of(t), h_.values, h_.v.cols, s_.state.o, beside);
        if (!finite) base::add_strange_keys(at, base::weights_of(t), h_.v, s_.state.o);
      }
      weights.finish();
    }
    Tiles::release();
  }

 private:
  /// So many lines of the keys and values of the next step come nearer.
  void ask(dim lines) noexcept {
    for (attention_ahead& a : next_) lines = a.ask(lines);
  }
  float* scores_of(dim t) const noexcept { return s_.p + t % 2 * pair * attention_pitch; }

  /// Weights of row r of a pair as halves, from its scores; the sums are of the floats.
  template <bool Whole>
  MOE_TARGET(MOE_AVX512)
  MOE_NO_INLINE void take_weights(const row_pair& at, key_range seen, dim r) noexcept {
    constexpr dim width = 16, vectors = attention_keys / width;
    const dim row = s_.at(at.first + r), t = at.first / pair;
    const dim first = Whole ? 0 : at.near().lo / width, end = Whole ? vectors : at.near().hi / width;
    const float* scores = scores_of(t) + r * attention_pitch;
    const __m512 scale = _mm512_set1_ps(h_.scale), none = _mm512_set1_ps(-moe::detail::infinity);
    __m512 x[vectors], most = none;
    MOE_UNROLL
    for (dim j = first; j < end; ++j) {
      x[j] = _mm512_loadu_ps(scores + j * width);
      if constexpr (!Whole)
        x[j] = _mm512_mask_mul_ps(none, rules::lanes(seen.lo - j * width, seen.hi - j * width), x[j], scale);
      most = _mm512_max_ps(most, x[j]);
    }
    if constexpr (Whole) most = _mm512_mul_ps(most, scale);
    const __m512 enough = _mm512_set1_ps(s_.state.largest[row] + slack);
    if (_mm512_cmp_ps_mask(most, enough, _CMP_NLE_UQ) != 0) raise(row, _mm512_reduce_max_ps(most));
    const __m512 shift = _mm512_set1_ps(finite_or_zero(s_.state.largest[row]));
    __m512 total = _mm512_setzero_ps();
    std::byte* to = base::weights_of(t) + base::place(r, base::key_steps);
    MOE_UNROLL
    for (dim j = first; j < end; j += 2) {
      const __m512 left = exp2_of_any(Whole ? _mm512_fmsub_ps(x[j], scale, shift) : _mm512_sub_ps(x[j], shift));
      const __m512 right = exp2_of_any(Whole ? _mm512_fmsub_ps(x[j + 1], scale, shift) : _mm512_sub_ps(x[j + 1], shift));
      total = _mm512_add_ps(total, _mm512_add_ps(left, right));
      _mm512_storeu_si512(to + j / 2 * block_bytes, halves_beside(left, right));
    }
    s_.state.sum[row] += _mm512_reduce_add_ps(total);
  }
  static float finite_or_zero(float largest) noexcept { return largest == -moe::detail::infinity ? 0.f : largest; }
  /// Weights are relative to the largest score of the first step, until one is 2^slack times as heavy: floats have room.
  static constexpr float slack = 8;
  /// The score of a row that its weights are relative to becomes `found`.
  MOE_TARGET(MOE_AVX512)
  MOE_NO_INLINE void raise(dim row, float found) noexcept {
    float& largest = s_.state.largest[row];
    const float fade = _mm512_cvtss_f32(exp2_512(_mm512_set1_ps(largest - finite_or_zero(found))));
    if (s_.state.sum[row] != 0) rules::scale(s_.state.o.row(row), fade, s_.state.o.cols);
    s_.state.sum[row] *= fade;
    largest = found;
  }

  static attention_ahead ahead_of(const stored_rows& m) noexcept { return {m.data, m.rows, m.stride, m.row_bytes}; }
  attention_ahead next_[2] = {ahead_of(s_.next_k), ahead_of(s_.next_v)};
};

/// One step of backward: as attend_backward, but for the scale of queries, which are as they are stored.
template <int Build, class Tiles>
class attention_backward_tiles : public attention_tile_step<Build, Tiles, attention_backward_step> {
  using base = attention_tile_step<Build, Tiles, attention_backward_step>;
  using base::s_, base::h_, base::pair, base::block_bytes, base::steps_of;
  using typename base::rules, typename base::row_pair;

 public:
  using base::base;

  /// Pairs of blocks of rows as in forward, then the sums by key over all of them. What is not finite is left out of the
  /// right operands and added at the end.
  void run() noexcept {
    const bool finite = base::pack_rows(h_.k, h_.key_rows);
    if (!h_.paired) pair_rows();
    base::pack_columns(h_.k, h_.keys);
    base::pack_columns(h_.v, h_.values);
    const dim pairs = steps_of(s_.rows), ahead = 2 * steps_of(h_.k.cols) + steps_of(h_.v.cols);
    for (dim t = 0; t < pairs + 2; ++t) {
      const row_pair before = base::pair_at(t > 0 && t <= pairs ? t - 1 : 0);
      const key_range near = before.near();
      const dim units = t > 0 && t <= pairs && !near.empty() ? tile_rows + (near.hi - near.lo) / tile_rows : 0;
      const auto unit = [&](dim u) noexcept {
        if (u < tile_rows)
          take_slopes(before, u);
        else
          turn(before, near.lo + (u - tile_rows) * tile_rows);
      };
      typename base::template beside<decltype(unit)> slopes{unit, units,
                                                            moe::detail::blocks(units, ahead * base::key_steps)};
      if (t < pairs) {
        const row_pair at = base::pair_at(t);
        base::score(at, h_.rows, h_.k.cols, h_.keys, s_.p + slot(t), slopes);
        base::score(at, h_.gradients, h_.v.cols, h_.values, s_.ds + slot(t), slopes);
      }
      if (t > 1) {
        const row_pair at = base::pair_at(t - 2);
        base::weigh(at, base::weights_of(t), h_.key_rows, h_.k.cols, s_.dq, slopes);
        if (!finite) base::add_strange_keys(at, base::weights_of(t), h_.k, s_.dq);
      }
      slopes.finish();
    }
    sum_by_key(turned(0), h_.gradients, h_.gradient_pairs, h_.v.cols, s_.dv);
    sum_by_key(turned(1), h_.rows, h_.row_pairs, h_.k.cols, s_.dk);
    Tiles::release();
  }

 private:
  static dim slot(dim t) noexcept { return t % 2 * pair * attention_pitch; }
  /// The transpose of p, or of ds, as a left operand.
  std::byte* turned(dim which) const noexcept {
    return h_.turned + which * attention_keys / tile_rows * steps_of(s_.rows) * block_bytes;
  }
  /// Column j of the step's row i in a left operand of the tile.
  auto row_of(const std::byte* blocks, dim steps) const noexcept {
    return [this, blocks, steps](dim i, dim j) noexcept {
      return reinterpret_cast<const bf16*>(blocks + base::place(s_.at(i), steps) + j / 32 * block_bytes) + j % 32;
    };
  }
  /// Rows and gradients as right operands: of the tile where the step has all its rows, so that later ones have them too.
  void pair_rows() noexcept {
    const dim d = steps_of(h_.k.cols), dv = steps_of(h_.v.cols);
    const bool rows = base::pack_rows(s_.rows, d * 32, row_of(h_.rows, d), h_.row_pairs);
    const bool gradients = base::pack_rows(s_.rows, dv * 32, row_of(h_.gradients, dv), h_.gradient_pairs);
    h_.finite = rows && gradients;
    h_.paired = s_.row == nullptr;
  }
  /// p and ds of rows r and r + 16 of a pair as halves: side by side, and those of ds as a left operand.
  MOE_TARGET(MOE_AVX512)
  MOE_NO_INLINE void take_slopes(const row_pair& at, dim r) noexcept {
    constexpr dim width = 16;
    const key_range near = at.near();
    const __m512 scale = _mm512_set1_ps(h_.scale);
    for (dim key = near.lo; key < near.hi; key += 2 * width) {
      __m512 p[2][2], ds[2][2];
      MOE_UNROLL
      for (dim half = 0; half < 2; ++half) {
        const dim i = r + half * tile_rows, row = s_.at(at.first + (i < at.rows ? i : 0));
        const key_range seen = i < at.rows ? seen_by(s_, at.first + i) : key_range{0, 0};
        const __m512 lse = _mm512_set1_ps(s_.state.largest[row]), delta = _mm512_set1_ps(s_.state.sum[row]);
        const dim from = slot(at.first / pair) + i * attention_pitch + key;
        MOE_UNROLL
        for (dim l = 0; l < 2; ++l) {
          const __mmask16 lanes = rules::lanes(seen.lo - key - l * width, seen.hi - key - l * width);
          const __m512 x = _mm512_fmsub_ps(_mm512_loadu_ps(s_.p + from + l * width), scale, lse);
          p[half][l] = _mm512_maskz_mov_ps(lanes, exp2_of_any(x));
          ds[half][l] =
              _mm512_maskz_mul_ps(lanes, p[half][l], _mm512_sub_ps(_mm512_loadu_ps(s_.ds + from + l * width), delta));
        }
        std::byte* to = base::weights_of(at.first / pair) + base::place(i, base::key_steps) + key / 32 * block_bytes;
        _mm512_storeu_si512(to, halves_beside(ds[half][0], ds[half][1]));
      }
      MOE_UNROLL
      for (dim l = 0; l < 2; ++l) {
        const dim to = r * attention_pitch + key + l * width;
        _mm512_store_si512(beside_[0] + to, halves_beside(p[0][l], p[1][l]));
        _mm512_store_si512(beside_[1] + to, halves_beside(ds[0][l], ds[1][l]));
      }
    }
  }
  /// Turns a pair's weights of keys key .. key + 16.
  void turn(const row_pair& at, dim key) noexcept {
    for (dim which = 0; which < 2; ++which) {
      const float* row[tile_rows];
      for (dim q = 0; q < tile_rows; ++q) row[q] = beside_[which] + q * attention_pitch + key;
      std::byte* to = turned(which) + base::place(key, steps_of(s_.rows)) + at.first / pair * block_bytes;
      blocks_avx512<Build>::template transpose<tile_rows>(row, 0, reinterpret_cast<float*>(to));
    }
  }
  /// to(key, .) += the sum over the step's rows that see it of weights(key, row) m(row, .), whose rows are in `right`.
  void sum_by_key(const std::byte* weights, const std::byte* m, const std::byte* right, dim width,
                  matrix_view<float> to) noexcept {
    const dim chunks = steps_of(s_.rows);
    const auto nothing = []() noexcept {};
    for (dim key = 0; key < to.rows; key += pair) {
      key_range seeing{chunks, 0};
      for (dim t = 0; t < chunks; ++t)
        if (const key_range near = base::pair_at(t).near(); near.lo <= key && near.hi > key)
          seeing = {t < seeing.lo ? t : seeing.lo, t + 1};
      if (seeing.empty()) continue;
      const dim keys = moe::detail::at_most(to.rows - key, pair);
      const std::byte* upper = weights + base::place(key, chunks) + seeing.lo * block_bytes;
      base::set_heights(keys);
      for (dim j = 0; j < width; j += pair)
        base::multiply(
            {upper, keys > tile_rows ? upper + chunks * block_bytes : nullptr,
             right + (j / pair * chunks + seeing.lo) * 2 * tile_bytes, seeing.hi - seeing.lo, to.row(key) + j, to.ld, true},
            nothing);
    }
    if (h_.finite) return;
    base::for_each_strange(s_.rows, width, row_of(m, steps_of(width)), [&](dim i, dim j, float value) noexcept {
      const key_range seen = seen_by(s_, i);
      for (dim key = seen.lo; key < seen.hi; ++key) to(key, j) += base::weight_at(weights, chunks, key, i) * value;
    });
  }

  alignas(64) float beside_[2][tile_rows * attention_pitch];  ///< pairs of halves: of p and of ds
};

template <int Build, class Tiles>
void attend_halves(const attention_step& s) noexcept {
  attention_tiles<Build, Tiles>(s).run();
}
template <int Build, class Tiles>
void attend_backward_halves(const attention_backward_step& s) noexcept {
  attention_backward_tiles<Build, Tiles>(s).run();
}

}  // namespace moe::arch::detail

#endif
