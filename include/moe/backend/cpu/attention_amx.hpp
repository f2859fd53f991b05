// SPDX-License-Identifier: Apache-2.0
/// Attention over bf16 on the tile unit of Intel processors: both products of forward. Scores, their exponentials and sums
/// are float32; the weights of the values are rounded to bf16. `Tiles` as in packed_amx.hpp.
#pragma once

#include "moe/backend/attention_kernels.hpp"
#include "moe/backend/cpu/attention_avx512.hpp"
#include "moe/backend/cpu/mixed_amx.hpp"

#if defined(MOE_X86_KERNELS)

namespace moe::arch::detail {

/// One step of forward: rows and weights lie in blocks of 16 rows by 32 columns, keys and values in pairs of tiles.
template <int Build, class Tiles>
class attention_tiles {
  using rules = attention_avx512<Build>;
  static constexpr dim pair = 2 * tile_rows, block_bytes = tile_rows * line_bytes;

 public:
  explicit attention_tiles(const attention_step& s) noexcept : s_(s), h_(*s.halves) {}

  /// A value that is not finite is left out of the tiles, where it would reach rows that do not see it, and added at the end.
  void run() noexcept {
    const bool finite = pack_values();
    pack_keys();
    Tiles::compiler_fence();
    score();
    weigh();
    if (!finite) add_what_is_not_finite();
  }

  /// Row r of a tile, unscaled, into the blocks.
  MOE_TARGET(MOE_AVX512)
  static void take_row(const bf16* from, dim d, dim r, std::byte* blocks) noexcept {
    const dim steps = moe::detail::blocks(d, 32);
    std::byte* to = blocks + (r / tile_rows * steps * tile_rows + r % tile_rows) * line_bytes;
    for (dim j = 0; j < d; j += 32, to += block_bytes) _mm512_storeu_si512(to, first_halves(from + j, d - j));
  }

 private:
  MOE_TARGET(MOE_AVX512)
  static __m512i first_halves(const bf16* p, dim n) noexcept {
    return _mm512_maskz_loadu_epi16(n < 32 ? (1u << n) - 1 : 0xffffffffu, p);
  }

  /// Zero where they are not, which `strange` is told.
  MOE_TARGET(MOE_AVX512)
  static __m512i finite_halves(const bf16* p, dim n, __mmask32& strange) noexcept {
    const __m512i halves = first_halves(p, n), exponent = _mm512_set1_epi16(0x7f80);
    const __mmask32 other = _mm512_cmpeq_epi16_mask(_mm512_and_si512(halves, exponent), exponent);
    strange |= other;
    return _mm512_maskz_mov_epi16(~other, halves);
  }
  /// To the rows that see it.
  void add_what_is_not_finite() noexcept {
    for (dim key = 0; key < h_.v.rows; ++key)
      for (dim j = 0; j < h_.v.cols; ++j) {
        const float value = static_cast<float>(h_.v(key, j));
        for (dim i = 0; value - value != 0 && i < s_.rows; ++i)
          if (const key_range seen = seen_by(s_, i); key >= seen.lo && key < seen.hi)
            s_.state.o(s_.at(i), j) += s_.p[i * attention_pitch + key] * value;
      }
  }

  dim steps() const noexcept { return moe::detail::blocks(s_.state.q.cols, 32); }
  dim chunks() const noexcept { return moe::detail::blocks(h_.k.rows, 32); }

  /// Two tiles for each 32 keys and 32 channels: channels in pairs down, keys across.
  MOE_TARGET(MOE_AVX512)
  void pack_keys() const noexcept {
    alignas(64) std::byte near[tile_rows * line_bytes];
    const float* row[tile_rows];
    for (dim r = 0; r < tile_rows; ++r) row[r] = reinterpret_cast<const float*>(near + r * line_bytes);
    std::byte* to = h_.keys;
    for (dim key = 0; key < chunks() * 32; key += pair)
      for (dim j = 0; j < steps() * 32; j += 32)
        for (dim half = 0; half < 2; ++half, to += tile_bytes) {
          for (dim r = 0; r < tile_rows; ++r) {
            const dim at = key + half * tile_rows + r;
            const __m512i line = at < h_.k.rows ? first_halves(h_.k.row(at) + j, h_.k.cols - j) : _mm512_setzero_si512();
            _mm512_store_si512(near + r * line_bytes, line);
          }
          blocks_avx512<Build>::template transpose<tile_rows>(row, 0, reinterpret_cast<float*>(to));
        }
  }
  /// Two tiles for each 32 channels and 32 keys: keys in pairs down, channels across. Whether all values are finite.
  MOE_TARGET(MOE_AVX512)
  bool pack_values() const noexcept {
    __mmask32 strange = 0;
    for (dim j = 0; j < moe::detail::round_up(h_.v.cols, 32); j += 32)
      for (dim key = 0; key < chunks() * 32; key += 2) {
        const auto value = [&](dim at) { return at < h_.v.rows ? h_.v.row(at) + j : nullptr; };
        const bf16 *upper = value(key), *lower = value(key + 1);
        const __m512i a = upper ? finite_halves(upper, h_.v.cols - j, strange) : _mm512_setzero_si512();
        const __m512i b = lower ? finite_halves(lower, h_.v.cols - j, strange) : _mm512_setzero_si512();
        std::byte* to = h_.values + ((j / 32 * chunks() + key / 32) * 2 * tile_rows + key % 32 / 2) * line_bytes;
        store_pairs(a, b, to);
      }
    return strange == 0;
  }
  /// Halves of a and b side by side: channels 0 .. 16 to one tile, 16 .. 32 to the next.
  MOE_TARGET(MOE_AVX512)
  static void store_pairs(__m512i a, __m512i b, std::byte* to) noexcept {
    constexpr __mmask16 all = 0xffff;
    const __m512i low = _mm512_maskz_cvtepu16_epi32(all, _mm512_castsi512_si256(a));
    const __m512i high = _mm512_maskz_cvtepu16_epi32(all, _mm512_maskz_extracti64x4_epi64(0xff, a, 1));
    const __m512i low_b = _mm512_maskz_cvtepu16_epi32(all, _mm512_castsi512_si256(b));
    const __m512i high_b = _mm512_maskz_cvtepu16_epi32(all, _mm512_maskz_extracti64x4_epi64(0xff, b, 1));
    _mm512_storeu_si512(to, _mm512_or_si512(low, _mm512_slli_epi32(low_b, 16)));
    _mm512_storeu_si512(to + tile_bytes, _mm512_or_si512(high, _mm512_slli_epi32(high_b, 16)));
  }

  /// f(first row, whether there are two blocks, what they see) for pairs of blocks of the step's rows.
  template <class F>
  void for_each_pair(F f) noexcept {
    tile_heights<Tiles> heights;
    for (dim i = 0; i < s_.rows; i += pair) {
      const dim n = moe::detail::at_most(s_.rows - i, pair), upper = moe::detail::at_most(n, tile_rows), lower = n - upper;
      const key_range seen = seen_by_any(s_, i, n);
      if (seen.empty()) continue;
      heights.set(upper, lower > 0 ? lower : tile_rows);
      f(i, lower > 0, seen);
    }
    Tiles::release();
  }
  /// Where block i / 16 of rows lies: of the tile, or gathered.
  const std::byte* rows_at(dim i) noexcept {
    if (s_.row == nullptr) return h_.rows + i / tile_rows * steps() * block_bytes;
    const dim n = moe::detail::at_most(s_.rows - i, tile_rows);
    for (dim r = 0; r < n; ++r) {
      const dim from = s_.at(i + r);
      for (dim j = 0; j < steps(); ++j)
        std::memcpy(h_.gathered + ((i % pair / tile_rows * steps() + j) * tile_rows + r) * line_bytes,
                    h_.rows + ((from / tile_rows * steps() + j) * tile_rows + from % tile_rows) * line_bytes, line_bytes);
    }
    return h_.gathered + i % pair / tile_rows * steps() * block_bytes;
  }
  void score() noexcept {
    for_each_pair([&](dim i, bool two, key_range seen) noexcept {
      const std::byte* upper = rows_at(i);
      const std::byte* lower = two ? rows_at(i + tile_rows) : nullptr;
      for (dim key = seen.lo / pair * pair; key < seen.hi; key += pair)
        multiply_tiles<Build, Tiles, false>({upper, lower, block_bytes, block_bytes,
                                             h_.keys + key / pair * steps() * 2 * tile_bytes, steps(), upper, 0,
                                             s_.p + i * attention_pitch + key, attention_pitch * dim{sizeof(float)}, false});
    });
  }
  void weigh() noexcept {
    for (dim i = 0; i < s_.rows; ++i) take_weights(i);
    for_each_pair([&](dim i, bool two, key_range seen) noexcept {
      const dim first = seen.lo / 32, n = moe::detail::blocks(seen.hi, 32) - first;
      const std::byte* upper = h_.weights + (i / tile_rows * most_chunks + first) * block_bytes;
      const dim rows = moe::detail::at_most(s_.rows - i, pair);
      const bool together = s_.at(i + rows - 1) - s_.at(i) == rows - 1;
      for (dim j = 0; j < moe::detail::round_up(h_.v.cols, pair); j += pair) {
        float near[pair * pair];
        constexpr std::size_t bytes = pair * sizeof(float);
        for (dim r = 0; !together && r < rows; ++r) std::memcpy(near + r * pair, s_.state.o.row(s_.at(i + r)) + j, bytes);
        multiply_tiles<Build, Tiles, false>(
            {upper, two ? upper + most_chunks * block_bytes : nullptr, block_bytes, block_bytes,
             h_.values + (j / pair * chunks() + first) * 2 * tile_bytes, n, upper, 0, together ? s_.state.o.row(s_.at(i)) + j : near,
             (together ? s_.state.o.ld : pair) * dim{sizeof(float)}, true});
        for (dim r = 0; !together && r < rows; ++r) std::memcpy(s_.state.o.row(s_.at(i + r)) + j, near + r * pair, bytes);
      }
    });
  }
  /// Weights of row i as halves, from its scores; the sums are of the floats.
  MOE_TARGET(MOE_AVX512)
  void take_weights(dim i) noexcept {
    float* p = s_.p + i * attention_pitch;
    const key_range seen = seen_by(s_, i);
    std::byte* to = h_.weights + (i / tile_rows * most_chunks * tile_rows + i % tile_rows) * line_bytes;
    if (!seen.empty()) {
      const dim r = s_.at(i);
      const dim first = seen.lo / tile_rows * tile_rows;
      rules::scale(p + first, h_.scale, seen.hi - first);
      const float fade = rules::softmax(p, seen.lo, seen.hi, s_.state.largest[r], s_.state.sum[r]);
      if (fade != 1) rules::scale(s_.state.o.row(r), fade, s_.state.o.cols);
    }
    for (dim j = 0; j < chunks() * 32; j += 32, to += block_bytes) {
      const __m512 low = rules::seen_floats(p + j, seen.lo - j, seen.hi - j);
      const __m512 high = rules::seen_floats(p + j + 16, seen.lo - j - 16, seen.hi - j - 16);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), halves_of(low));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 32), halves_of(high));
    }
  }
  /// Rounded to nearest even.
  MOE_TARGET(MOE_AVX512)
  static __m256i halves_of(__m512 v) noexcept {
    return _mm512_maskz_cvtepi32_epi16(0xffff, _mm512_srli_epi32(rounded_halves(v), 16));
  }

  static constexpr dim most_chunks = attention_keys / 32;
  const attention_step& s_;
  const attention_halves& h_;
};

template <int Build, class Tiles>
void attend_halves(const attention_step& s) noexcept {
  attention_tiles<Build, Tiles>(s).run();
}
template <int Build, class Tiles>
constexpr attention_kernels attention_on_tiles() noexcept {
  attention_kernels k = attention_of<attention_avx512<Build>>;
  k.take_halves = &attention_tiles<Build, Tiles>::take_row;
  k.attend_halves = &attend_halves<Build, Tiles>;
  return k;
}

}  // namespace moe::arch::detail

#endif
