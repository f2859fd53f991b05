// SPDX-License-Identifier: Apache-2.0
/// Steps of attention over bf16 on the tile unit of Intel processors: operands in its blocks, and the products that forward
/// and backward share. `Tiles` as in packed_amx.hpp.
#pragma once

#include "moe/backend/attention_kernels.hpp"
#include "moe/backend/cpu/attention_avx512.hpp"
#include "moe/backend/cpu/mixed_amx.hpp"
#include "moe/backend/cpu/vector_tiles.hpp"

#if defined(MOE_X86_KERNELS)

#define MOE_AMX_AVX512 MOE_AMX "," MOE_AVX512

namespace moe::arch::detail {

/// Left operands lie in blocks of 16 rows by 32 columns, right ones in pairs of tiles: 32 of the reduced dimension down, two
/// side by side, by 32 columns.
template <int Build, class Tiles>
class attention_tile_blocks {
 protected:
  using rules = attention_avx512<Build>;
  static constexpr dim pair = 2 * tile_rows, block_bytes = tile_rows * line_bytes, key_steps = attention_keys / 32;

 public:
  /// Row r of a left operand: the floats lo .. hi of the first n, a multiple of 32, rounded to nearest even; zeros beside.
  MOE_TARGET(MOE_AVX512)
  static void round_row(const float* from, dim lo, dim hi, dim n, dim steps, dim r, std::byte* blocks) noexcept {
    std::byte* to = blocks + place(r, steps);
    for (dim j = 0; j < n; j += 32, to += block_bytes) {
      const __m512 low = rules::seen_floats(from + j, lo - j, hi - j);
      const __m512 high = rules::seen_floats(from + j + 16, lo - j - 16, hi - j - 16);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), halves_of(low));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 32), halves_of(high));
    }
  }
  /// The same of d halves.
  MOE_TARGET(MOE_AVX512)
  static void take_row(const bf16* from, dim d, dim r, std::byte* blocks) noexcept {
    std::byte* to = blocks + place(r, moe::detail::blocks(d, 32));
    for (dim j = 0; j < d; j += 32, to += block_bytes) _mm512_storeu_si512(to, first_halves(from + j, d - j));
  }
  static void take_floats(const float* from, dim d, dim r, std::byte* blocks) noexcept {
    round_row(from, 0, d, moe::detail::round_up(d, 32), moe::detail::blocks(d, 32), r, blocks);
  }

 protected:
  /// Where row r of a left operand begins that is `steps` blocks wide.
  static dim place(dim r, dim steps) noexcept { return (r / tile_rows * steps * tile_rows + r % tile_rows) * line_bytes; }
  static dim steps_of(dim columns) noexcept { return moe::detail::blocks(columns, 32); }

  /// Zero where they are not finite, which `strange` is told.
  MOE_TARGET(MOE_AVX512)
  static __m512i finite_halves(const bf16* p, dim n, __mmask32& strange) noexcept {
    const __m512i halves = first_halves(p, n), exponent = _mm512_set1_epi16(0x7f80);
    const __mmask32 other = _mm512_cmpeq_epi16_mask(_mm512_and_si512(halves, exponent), exponent);
    strange |= other;
    return _mm512_maskz_mov_epi16(~other, halves);
  }
  /// Rounded to nearest even.
  MOE_TARGET(MOE_AVX512)
  static __m256i halves_of(__m512 v) noexcept {
    return _mm512_maskz_cvtepi32_epi16(0xffff, _mm512_srli_epi32(rounded_halves(v), 16));
  }

  /// The rows of m as the columns of a right operand, which reduces over their elements.
  MOE_TARGET(MOE_AVX512)
  static void pack_columns(matrix_view<const bf16> m, std::byte* to) noexcept {
    alignas(64) std::byte near[tile_rows * line_bytes];
    for (dim first = 0; first < m.rows; first += pair)
      for (dim j = 0; j < m.cols; j += 32)
        for (dim half = 0; half < 2; ++half, to += tile_bytes) {
          const dim above = first + half * tile_rows;
          if (above + tile_rows <= m.rows && j + 32 <= m.cols) {
            turn_pairs(m.row(above) + j, m.ld, reinterpret_cast<float*>(to));
            continue;
          }
          for (dim r = 0; r < tile_rows; ++r) {
            const __m512i line =
                above + r < m.rows ? first_halves(m.row(above + r) + j, m.cols - j) : _mm512_setzero_si512();
            _mm512_store_si512(near + r * line_bytes, line);
          }
          turn_pairs(reinterpret_cast<const bf16*>(near), 32, reinterpret_cast<float*>(to));
        }
  }
  /// The same of a right operand's rows, over which it reduces: columns at(i, j) .. of row i, of `cols` that there are; 16
  /// rows lie beside the 16 after them. What is not finite would reach columns and rows that do not see it and is left out;
  /// whether there was nothing such.
  template <class At>
  MOE_TARGET(MOE_AVX512)
  static bool pack_rows(dim rows, dim cols, At at, std::byte* to) noexcept {
    const dim chunks = steps_of(rows);
    __mmask32 strange = 0;
    for (dim j = 0; j < cols; j += 32)
      for (dim chunk = 0; chunk < chunks; ++chunk, to += tile_bytes)
        for (dim i = chunk * 32; i < chunk * 32 + tile_rows; ++i, to += line_bytes) {
          const bf16 *upper = i < rows ? at(i, j) : nullptr, *lower = i + tile_rows < rows ? at(i + tile_rows, j) : nullptr;
          const __m512i a = upper ? finite_halves(upper, cols - j, strange) : _mm512_setzero_si512();
          const __m512i b = lower ? finite_halves(lower, cols - j, strange) : _mm512_setzero_si512();
          store_pairs(a, b, to);
        }
    return strange == 0;
  }
  static bool pack_rows(matrix_view<const bf16> m, std::byte* to) noexcept {
    return pack_rows(m.rows, m.cols, [&](dim i, dim j) noexcept { return m.row(i) + j; }, to);
  }
  /// f(i, j, value) for what pack_rows left out.
  template <class At, class F>
  static void for_each_strange(dim rows, dim cols, At at, F f) noexcept {
    for (dim i = 0; i < rows; ++i)
      for (dim j = 0; j < cols; ++j)
        if (const float value = static_cast<float>(*at(i, j)); value - value != 0) f(i, j, value);
  }
  /// Element c of row r of a left operand that reduces over what pack_rows made.
  static float weight_at(const std::byte* weights, dim steps, dim r, dim c) noexcept {
    const auto* line = reinterpret_cast<const bf16*>(weights + place(r, steps) + c / 32 * block_bytes);
    return static_cast<float>(line[c % tile_rows * 2 + c % 32 / tile_rows]);
  }
  /// All of their rows.
  static void full_tiles() noexcept {
    tile_shapes s;
    for (int t = 0; t < 8; ++t) {
      s.bytes_per_row[t] = line_bytes;
      s.rows[t] = tile_rows;
    }
    Tiles::shape(s);
  }

  /// One or two blocks of a left operand by a pair of tiles of a right one: sums = or += over `steps` steps.
  struct product {
    const std::byte *upper, *lower, *right;  ///< lower: null where there is one block
    dim steps;
    float* sums;
    dim ld;
    bool add;
  };
  /// One step of a product: blocks a and, where there is one, b by the pair of tiles at q.
  template <class T>
  MOE_TARGET(MOE_AMX_AVX512)
  MOE_INLINE static void multiply_step(const std::byte* a, const std::byte* b, const std::byte* q) noexcept {
    T::load4(a, line_bytes);
    T::load6(q, line_bytes);
    T::add_halves0();
    T::load7(q + tile_bytes, line_bytes);
    T::add_halves1();
    if (b == nullptr) return;
    T::load5(b, line_bytes);
    T::add_halves2();
    T::add_halves3();
  }
  /// beside() runs once a step: what it does on vectors overlaps with the tile unit.
  template <class Beside>
  static void multiply(const product& w, Beside&& beside) noexcept {
    on_tiles(Tiles{}, [&](auto tiles) noexcept { multiply_on<decltype(tiles)>(w, beside); });
  }
  /// Work on vectors in units, so many after each step of the products that run meanwhile.
  template <class Unit>
  struct beside {
    Unit unit;
    dim end, each, next = 0;

    void operator()() noexcept {
      for (dim n = 0; n < each && next < end; ++n) unit(next++);
    }
    void finish() noexcept {
      while (next < end) unit(next++);
    }
  };

 private:
  template <class T, class Beside>
  MOE_TARGET(MOE_AMX_AVX512)
  MOE_NO_INLINE static void multiply_on(const product& w, Beside& beside) noexcept {
    T::compiler_fence();
    const dim stride = w.ld * dim{sizeof(float)};
    auto* c = reinterpret_cast<std::byte*>(w.sums);
    std::byte* below = c + tile_rows * stride;
    const std::byte *a = w.upper, *b = w.lower, *q = w.right;
    if (w.add) {
      T::load0(c, stride);
      T::load1(c + line_bytes, stride);
      if (b) T::load2(below, stride);
      if (b) T::load3(below + line_bytes, stride);
    } else {
      T::zero0();
      T::zero1();
      T::zero2();
      T::zero3();
    }
    for (dim s = 0; s < w.steps; ++s, a += block_bytes, q += 2 * tile_bytes) {
      multiply_step<T>(a, b, q);
      if (b) b += block_bytes;
      beside();
    }
    T::store0(c, stride);
    T::store1(c + line_bytes, stride);
    if (w.lower) T::store2(below, stride);
    if (w.lower) T::store3(below + line_bytes, stride);
    T::compiler_fence();
  }

  /// Halves of a and b side by side: columns 0 .. 16 to one tile, 16 .. 32 to the next.
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
};

/// A step of rows that may lie apart.
template <int Build, class Tiles, class Step>
class attention_tile_step : public attention_tile_blocks<Build, Tiles> {
  using blocks = attention_tile_blocks<Build, Tiles>;

 protected:
  using blocks::for_each_strange, blocks::weight_at;
  using blocks::pair, blocks::block_bytes, blocks::key_steps, blocks::place, blocks::steps_of, blocks::multiply;

 public:
  explicit attention_tile_step(const Step& s) noexcept : s_(s), h_(*s.halves) {}

 protected:
  /// Where the weights of pair t of blocks lie: two pairs are at work at a time.
  std::byte* weights_of(dim t) const noexcept { return h_.weights + t % 2 * 2 * key_steps * block_bytes; }
  dim key_chunks() const noexcept { return steps_of(h_.k.rows); }
  bool sees(dim i, dim key) const noexcept {
    const key_range seen = seen_by(s_, i);
    return key >= seen.lo && key < seen.hi;
  }

  /// Rows of the step that fill one or two blocks, and the keys that the first to the last of them see.
  struct row_pair {
    dim first, rows;
    key_range seen;

    /// From where a chunk of 32 keys begins to where one ends.
    key_range near() const noexcept {
      return seen.empty() ? key_range{0, 0} : key_range{seen.lo / 32 * 32, moe::detail::round_up(seen.hi, 32)};
    }
    dim lower_rows() const noexcept { return rows > tile_rows ? rows - tile_rows : 0; }
  };
  /// Pair number t. Rows ascend, and so do the keys that they see.
  row_pair pair_at(dim t) const noexcept {
    const dim i = t * pair, n = moe::detail::at_most(s_.rows - i, pair);
    return {i, n, {seen_by(s_, i).lo, seen_by(s_, i + n - 1).hi}};
  }
  void set_heights(dim rows) noexcept {
    heights_.set(moe::detail::at_most(rows, tile_rows), rows > tile_rows ? rows - tile_rows : tile_rows);
  }

  /// scores(i, key) = row i of a left operand, the tile's, with `width` columns, times the columns that pack_columns made.
  template <class Beside>
  void score(const row_pair& at, const std::byte* rows, dim width, const std::byte* packed, float* scores,
             Beside& beside) noexcept {
    if (at.seen.empty()) return;
    const dim steps = steps_of(width);
    set_heights(at.rows);
    const std::byte* upper = rows_at(rows, steps, at.first);
    const std::byte* lower = at.lower_rows() > 0 ? rows_at(rows, steps, at.first + tile_rows) : nullptr;
    for (dim key = at.seen.lo / pair * pair; key < at.seen.hi; key += pair)
      multiply({upper, lower, packed + key / pair * steps * 2 * tile_bytes, steps, scores + key, attention_pitch, false},
               beside);
  }
  /// to(row, .) += weights, a left operand of one pair, times the rows that pack_rows made of `width` columns.
  template <class Beside>
  void weigh(const row_pair& at, const std::byte* weights, const std::byte* packed, dim width, matrix_view<float> to,
             Beside& beside) noexcept {
    if (at.seen.empty()) return;
    const dim first = at.seen.lo / 32, n = steps_of(at.seen.hi) - first;
    set_heights(at.rows);
    const std::byte* upper = weights + first * block_bytes;
    const std::byte* lower = at.lower_rows() > 0 ? upper + key_steps * block_bytes : nullptr;
    const bool together = s_.at(at.first + at.rows - 1) - s_.at(at.first) == at.rows - 1;
    for (dim j = 0; j < width; j += pair) {
      float near[pair * pair];
      constexpr std::size_t bytes = pair * sizeof(float);
      const auto row = [&](dim r) noexcept { return to.row(s_.at(at.first + r)) + j; };
      for (dim r = 0; !together && r < at.rows; ++r) std::memcpy(near + r * pair, row(r), bytes);
      multiply({upper, lower, packed + (j / pair * key_chunks() + first) * 2 * tile_bytes, n, together ? row(0) : near,
                together ? to.ld : pair, true},
               beside);
      for (dim r = 0; !together && r < at.rows; ++r) std::memcpy(row(r), near + r * pair, bytes);
    }
  }

  /// The same of what pack_rows left out of the rows of m, for the rows that see it.
  void add_strange_keys(const row_pair& at, const std::byte* weights, matrix_view<const bf16> m,
                        matrix_view<float> to) const noexcept {
    const auto row = [&](dim i, dim j) noexcept { return m.row(i) + j; };
    for_each_strange(m.rows, m.cols, row, [&](dim key, dim j, float value) noexcept {
      for (dim r = 0; r < at.rows; ++r)
        if (sees(at.first + r, key)) to(s_.at(at.first + r), j) += weight_at(weights, key_steps, r, key) * value;
    });
  }

  const Step& s_;
  attention_halves& h_;
  tile_heights<Tiles> heights_;

 private:
  /// Where block i / 16 of the step's rows lies: of the tile, or gathered.
  const std::byte* rows_at(const std::byte* rows, dim steps, dim i) noexcept {
    if (s_.row == nullptr) return rows + i / tile_rows * steps * block_bytes;
    const dim n = moe::detail::at_most(s_.rows - i, tile_rows);
    std::byte* block = h_.gathered + i % pair / tile_rows * steps * block_bytes;
    for (dim r = 0; r < n; ++r)
      for (dim j = 0; j < steps; ++j)
        std::memcpy(block + (j * tile_rows + r) * line_bytes, rows + place(s_.at(i + r), steps) + j * block_bytes,
                    line_bytes);
    return block;
  }
};

}  // namespace moe::arch::detail

#endif
