// SPDX-License-Identifier: Apache-2.0
/// The blocks of keys that rows of bf16 choose, on the tile unit of Intel processors. A mean of float32 is the sum of three
/// halves, exactly, and tiles add up in float32, so scores are as good as those of multiply-adds. `Tiles` as in
/// packed_amx.hpp.
#pragma once

#include <bit>

#include "moe/backend/cpu/attention_amx_blocks.hpp"

#if defined(MOE_X86_KERNELS)

namespace moe::arch::detail {

/// sums[j] += rows[0][j], then rows[1][j] ..
template <int Build>
MOE_TARGET(MOE_AVX512)
void add_halves_in_order(const bf16* const* rows, dim n, float* sums, dim d) noexcept {
  constexpr dim width = 16;
  for (dim j = 0; j < d; j += width) {
    const __mmask16 some = static_cast<__mmask16>(d - j < width ? (1u << (d - j)) - 1 : 0xffff);
    __m512 sum = _mm512_maskz_loadu_ps(some, sums + j);
    for (dim i = 0; i < n; ++i) {
      const __m512i wide = _mm512_maskz_cvtepu16_epi32(some, _mm256_maskz_loadu_epi16(some, rows[i] + j));
      sum = _mm512_add_ps(sum, _mm512_castsi512_ps(_mm512_maskz_slli_epi32(some, wide, 16)));
    }
    _mm512_mask_storeu_ps(sums + j, some, sum);
  }
}

template <int Build, class Tiles>
class attention_tile_ranking : attention_tile_blocks<Build, Tiles> {
  using base = attention_tile_blocks<Build, Tiles>;
  using base::pair, base::block_bytes, base::steps_of, base::place;
  using typename base::rules;

 public:
  static void run(const attention_ranking& a) noexcept {
    base::full_tiles();
    const attention_tile_ranking all(a);
    all.split_means();
    for (dim i = 0; i < a.count; i += pair) all.rank_rows(i, moe::detail::at_most(a.count - i, pair));
    Tiles::release();
  }

 private:
  static constexpr dim parts = 3, width = 16;

  explicit attention_tile_ranking(const attention_ranking& a) noexcept : a_(a), steps_(steps_of(a.means.cols)) {}

  /// Means as left operands: 16 of them, the upper 8 bits of their fractions, the next and the last; zeros beside.
  MOE_TARGET(MOE_AVX512)
  void split_means() const noexcept {
    const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000u)), exponent = _mm512_set1_epi32(0x7f800000);
    for (dim c = 0; c < a_.means.rows; ++c)
      for (dim j = 0; j < steps_ * 32; j += width) {
        __m512 left = rules::seen_floats(a_.means.row(c) + j, 0, a_.means.cols - j);
        const __mmask16 strange = _mm512_cmpeq_epi32_mask(_mm512_and_si512(_mm512_castps_si512(left), exponent), exponent);
        for (dim part = 0; part < parts; ++part) {
          const __m512 half = _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(left), upper));
          // A NaN may have its bits below: its sum with itself has one above, too.
          const __m512 taken = part > 0 ? half : _mm512_mask_mov_ps(half, strange, _mm512_add_ps(left, left));
          std::byte* to = a_.parts + ((c / width * parts + part) * steps_ + j / 32) * block_bytes + c % width * line_bytes;
          _mm256_storeu_si256(reinterpret_cast<__m256i*>(to) + j % 32 / width,
                              _mm512_maskz_cvtepi32_epi16(0xffff, _mm512_srli_epi32(_mm512_castps_si512(taken), 16)));
          left = _mm512_maskz_sub_ps(static_cast<__mmask16>(~strange), left, half);
        }
      }
  }
  void rank_rows(dim i, dim rows) const noexcept {
    const dim last = a_.own[i + rows - 1], n = moe::detail::at_most(last - a_.first, a_.means.rows);
    if (n <= 0 || last <= a_.room) return;
    turn(i, rows);
    for (dim c = 0; c < n; c += pair) score(c);
    for (dim r = 0; r < rows; r += width) choose(i, r, moe::detail::at_most(rows - r, width));
  }
  /// Rows as columns.
  void turn(dim i, dim rows) const noexcept {
    for (dim half = 0; half * tile_rows < rows; ++half)
      for (dim j = 0; j < steps_; ++j)
        turn_pairs(reinterpret_cast<const bf16*>(a_.rows + ((i + half * tile_rows) * steps_ + j) * line_bytes), steps_ * 32,
                   reinterpret_cast<float*>(a_.turned + (j * 2 + half) * tile_bytes));
  }
  /// scores(c, row) of 32 means: the smallest parts first.
  void score(dim c) const noexcept {
    on_tiles(Tiles{}, [&](auto tiles) noexcept { score_on<decltype(tiles)>(c); });
  }
  template <class T>
  MOE_TARGET(MOE_AMX)
  void score_on(dim c) const noexcept {
    T::compiler_fence();
    T::zero0();
    T::zero1();
    T::zero2();
    T::zero3();
    const dim next = parts * steps_ * block_bytes;
    for (dim part = parts - 1; part >= 0; --part) {
      const std::byte* upper = a_.parts + (c / width * parts + part) * steps_ * block_bytes;
      for (dim j = 0; j < steps_; ++j, upper += block_bytes) {
        const std::byte* right = a_.turned + j * 2 * tile_bytes;
        T::load4(upper, line_bytes);
        T::load6(right, line_bytes);
        T::add_halves0();
        T::load7(right + tile_bytes, line_bytes);
        T::add_halves1();
        T::load5(upper + next, line_bytes);
        T::add_halves2();
        T::add_halves3();
      }
    }
    float* to = a_.scores + c * pair;
    constexpr dim stride = pair * dim{sizeof(float)};
    T::store0(to, stride);
    T::store1(to + width, stride);
    T::store2(to + width * pair, stride);
    T::store3(to + width * pair + width, stride);
    T::compiler_fence();
  }

  /// Of rows i + r .. + n.
  MOE_TARGET(MOE_AVX512)
  void choose(dim i, dim r, dim n) const noexcept {
    alignas(64) idx ends[width];
    dim least = a_.means.rows, most = 0;
    for (dim l = 0; l < width; ++l) {
      const dim own = l < n ? a_.own[i + r + l] : 0;
      const dim end = own > a_.room && own > a_.first ? moe::detail::at_most(own - a_.first, a_.means.rows) : 0;
      ends[l] = static_cast<idx>(end);
      least = end < least ? end : least;
      most = end > most ? end : most;
    }
    float* best = a_.best + (i + r) * a_.room;
    idx* which = a_.which + (i + r) * a_.room;
    const column_scores s{a_.scores + r, _mm512_load_si512(ends), least, most};
    constexpr dim known = 8;
    if (a_.room <= known)
      with_constant<known>(a_.room, [&](auto room) { choose_few<room>(s, best, which); });
    else
      for (dim j = 0; j < most; ++j)
        rules::insert(s[j], _mm512_set1_epi32(static_cast<int>(a_.first + j)), best, which, a_.room);
  }
  /// Scores of means, of 16 rows each; -inf where they are not eligible.
  struct column_scores {
    const float* scores;
    __m512i ends;
    dim least, most;

    MOE_TARGET(MOE_AVX512)
    __m512 operator[](dim j) const noexcept {
      const __m512 none = _mm512_set1_ps(-moe::detail::infinity);
      const __m512 s = _mm512_max_ps(_mm512_loadu_ps(scores + j * pair), none);  // not NaN
      if (j < least) return s;
      return _mm512_mask_mov_ps(none, _mm512_cmpgt_epi32_mask(ends, _mm512_set1_epi32(static_cast<int>(j))), s);
    }
  };
  /// First the Room-th best score of each row, then the blocks that are better, and the first that are as good.
  template <int Room>
  MOE_TARGET(MOE_AVX512)
  void choose_few(const column_scores& s, float* best, idx* which) const noexcept {
    const __m512 none = _mm512_set1_ps(-moe::detail::infinity);
    __m512 top[Room];
    MOE_UNROLL
    for (int k = 0; k < Room; ++k) top[k] = none;
    for (dim j = 0; j < s.most; ++j) {
      __m512 x = s[j];
      MOE_UNROLL
      for (int k = 0; k < Room; ++k) {
        const __m512 above = _mm512_max_ps(top[k], x);
        x = _mm512_min_ps(top[k], x);
        top[k] = above;
      }
    }
    const __m512 bound = top[Room - 1];
    const __mmask16 some = _mm512_cmp_ps_mask(bound, none, _CMP_GT_OQ);
    alignas(64) std::uint16_t better[attention_keys] = {}, equal[attention_keys] = {};  // bits of rows
    for (dim j = 0; j < s.most; ++j) {
      const __m512 x = s[j];
      better[j] = _mm512_cmp_ps_mask(x, bound, _CMP_GT_OQ);
      equal[j] = _mm512_mask_cmp_ps_mask(some, x, bound, _CMP_EQ_OQ);
    }
    alignas(64) float values[Room * width];
    alignas(64) idx numbers[Room * width];
    for (dim l = 0; l < width; ++l) {
      std::uint64_t taken[2], as_good[2];
      for (dim w = 0; w < 2; ++w) {
        taken[w] = bits_of_row(better + w * 64, l);
        as_good[w] = bits_of_row(equal + w * 64, l);
      }
      int left = Room - std::popcount(taken[0]) - std::popcount(taken[1]);
      for (dim w = 0; w < 2; ++w)
        for (; as_good[w] != 0 && left > 0; --left) {
          taken[w] |= as_good[w] & (0 - as_good[w]);
          as_good[w] &= as_good[w] - 1;
        }
      for (int k = 0; k < Room; ++k) {
        const bool any = (taken[0] | taken[1]) != 0;
        const dim w = taken[0] != 0 ? 0 : 1, j = any ? w * 64 + std::countr_zero(taken[w]) : 0;
        values[k * width + l] = any ? s.scores[j * pair + l] : -moe::detail::infinity;
        numbers[k * width + l] = static_cast<idx>(a_.first + j);
        taken[w] &= taken[w] - 1;
      }
    }
    for (int k = 0; k < Room; ++k)
      rules::insert(_mm512_load_ps(values + k * width), _mm512_load_si512(numbers + k * width), best, which, Room);
  }
  /// Bit l of 64 numbers.
  MOE_TARGET(MOE_AVX512)
  static std::uint64_t bits_of_row(const std::uint16_t* rows, dim l) noexcept {
    const __m128i up = _mm_cvtsi32_si128(static_cast<int>(15 - l));
    const std::uint64_t low = _mm512_movepi16_mask(_mm512_sll_epi16(_mm512_load_si512(rows), up));
    const std::uint64_t high = _mm512_movepi16_mask(_mm512_sll_epi16(_mm512_load_si512(rows + 32), up));
    return low | high << 32;
  }

  const attention_ranking& a_;
  dim steps_;
};

}  // namespace moe::arch::detail

#endif
