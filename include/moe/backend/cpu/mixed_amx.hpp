// SPDX-License-Identifier: Apache-2.0
/// Products of float32 rows with bf16 weights, and gradients of such weights, on the tile unit of Intel processors. Floats
/// are rounded to bf16, to nearest even, on their way into a tile; sums are float32.
///
/// All rows of a tile are packed for a cut of the reduced dimension and stay in the second cache, while pairs of panels of
/// 32 columns are packed one after the other into the first, and those of the next pair are asked for. Weights come as they
/// lie in memory, in either orientation.
/// `Tiles` are the instructions; tests put a plain C++ copy of them in their place.
#pragma once

#include "moe/backend/cpu/blocks_avx512.hpp"
#include "moe/backend/cpu/packed_amx.hpp"

#if defined(MOE_X86_KERNELS)

namespace moe::arch::detail {

/// Bits of v rounded to bf16, in the upper half of each lane; a NaN stays one. The lower halves hold anything.
MOE_TARGET(MOE_AVX512)
inline __m512i rounded_halves(__m512 v) noexcept {
  const __m512i u = _mm512_castps_si512(v), odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  const __m512i near = _mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), odd);
  return _mm512_mask_or_epi32(near, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), u, _mm512_set1_epi32(0x400000));
}
/// The first n floats at p, and zeros.
MOE_TARGET(MOE_AVX512)
inline __m512 first_floats(const float* p, dim n) noexcept {
  if (n <= 0) return _mm512_setzero_ps();
  return _mm512_maskz_loadu_ps(static_cast<__mmask16>(n < 16 ? (1u << n) - 1 : 0xffff), p);
}
/// Lanes of two rows rounded to halves side by side: the upper row's first.
MOE_TARGET(MOE_AVX512)
inline __m512i paired_halves(__m512 upper, __m512 lower) noexcept {
  constexpr int second = 0xca;  // of a where the mask is set, else of b
  return _mm512_ternarylogic_epi32(_mm512_set1_epi32(static_cast<int>(0xffff0000u)), rounded_halves(lower),
                                   _mm512_srli_epi32(rounded_halves(upper), 16), second);
}

/// The packed operands of a tile of a product, and the product.
template <int Build, class Tiles>
class tile_product {
 public:
  static constexpr dim most_rows = 256, cut = 256, columns = 2 * panel_rows;  // of a layer, no tile has more rows

  /// Row r of `left` = rows[r], from its element `first`.
  MOE_TARGET(MOE_AVX512)
  void take_rows(gathered<float> rows, dim first) noexcept {
    for (dim r = 0; r < m_; ++r) {
      const float* x = rows.row(r) + first;
      const dim height = height_of(r / tile_rows);
      std::byte* to = left_ + (r / tile_rows * tile_rows * steps_ + r % tile_rows) * line_bytes;
      for (dim p = 0; p < depth_; p += 32, to += height * line_bytes) {
        const __m512i low = _mm512_srli_epi32(rounded_halves(first_floats(x + p, depth_ - p)), 16);
        const __m512i high = _mm512_srli_epi32(rounded_halves(first_floats(x + p + 16, depth_ - p - 16)), 16);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_maskz_cvtepi32_epi16(0xffff, low));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 32), _mm512_maskz_cvtepi32_epi16(0xffff, high));
      }
    }
  }
  /// Row r of `left` = column r of the rows from `first` on.
  MOE_TARGET(MOE_AVX512)
  void take_columns(gathered<float> rows, dim first) noexcept {
    alignas(64) float pairs[tile_rows * tile_rows];
    const float* row[tile_rows];
    for (dim q = 0; q < tile_rows; ++q) row[q] = pairs + q * tile_rows;
    for (dim b = 0; b * tile_rows < m_; ++b)
      for (dim s = 0; s < steps_; ++s) {
        for (dim q = 0; q < tile_rows; ++q) {
          const __m512i pair = pair_of(rows, first, 32 * s + 2 * q, b * tile_rows, height_of(b));
          _mm512_store_si512(pairs + q * tile_rows, pair);
        }
        auto* to = reinterpret_cast<float*>(left_ + (b * tile_rows * steps_ + s * height_of(b)) * line_bytes);
        blocks_avx512<Build>::template transpose<tile_rows>(row, 0, to);
      }
  }
  /// The right operand = the columns j .. j + n of the rows from `first` on, floats.
  MOE_TARGET(MOE_AVX512)
  void meet_rows(gathered<float> rows, dim first, dim j, dim n) noexcept {
    const place next = after(first, j);
    for (dim s = 0; s < steps_; ++s)
      for (dim q = 0; q < tile_rows; ++q) {
        const dim p = 32 * s + 2 * q;
        for (dim l = 0; l < n; l += tile_rows)
          _mm512_store_si512(right(s, l) + q * line_bytes, pair_of(rows, first, p, j + l, n - l));
        for (dim r = next.first + p; r < at_most(next.first + p + 2, reduced_); ++r)
          for (dim l = 0; l < columns; l += tile_rows) moe::detail::prefetch_second(rows.row(r) + next.j + l);
      }
    fill_up(n);
  }
  /// The same of weights.
  MOE_TARGET(MOE_AVX512)
  void meet_rows(matrix_view<const bf16> w, dim first, dim j, dim n) noexcept {
    const __m512i order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
    const __m512i none = _mm512_setzero_si512();
    const place next = after(first, j);
    for (dim s = 0; s < steps_; ++s)
      for (dim q = 0; q < tile_rows; ++q)
        for (dim l = 0; l < n; l += panel_rows) {
          const dim p = 32 * s + 2 * q;
          moe::detail::prefetch_second(w.row(next.first + p) + next.j + l);
          moe::detail::prefetch_second(w.row(next.first + p + 1) + next.j + l);
          const __mmask32 some = n - l < 32 ? (1u << (n - l)) - 1 : 0xffffffffu;
          __m512i upper = none, lower = none;
          if (p < depth_) upper = _mm512_maskz_loadu_epi16(some, w.row(first + p) + j + l);
          if (p + 1 < depth_) lower = _mm512_maskz_loadu_epi16(some, w.row(first + p + 1) + j + l);
          upper = _mm512_maskz_permutexvar_epi64(0xff, order, upper);
          lower = _mm512_maskz_permutexvar_epi64(0xff, order, lower);
          _mm512_store_si512(right(s, l) + q * line_bytes, _mm512_unpacklo_epi16(upper, lower));
          _mm512_store_si512(right(s, l + tile_rows) + q * line_bytes, _mm512_unpackhi_epi16(upper, lower));
        }
  }
  /// The right operand's columns = n weight rows from row j on, from their element `first`.
  MOE_TARGET(MOE_AVX512)
  void meet_columns(matrix_view<const bf16> w, dim first, dim j, dim n) noexcept {
    static constexpr float zeros[tile_rows] = {};
    float last[tile_rows][tile_rows];
    const float* row[tile_rows];  // of pairs of halves, which are moved as they are
    const place next = after(first, j);
    for (dim l = 0; l < round_up(n, panel_rows); l += tile_rows)
      for (dim s = 0; s < steps_; ++s) {
        const dim left = depth_ - 32 * s;
        for (dim i = 0; i < tile_rows; ++i) {
          row[i] = zeros;
          moe::detail::prefetch_second(w.row(next.j + l + i) + next.first + 32 * s);
          if (l + i >= n) continue;
          const bf16* from = w.row(j + l + i) + first + 32 * s;
          row[i] = reinterpret_cast<const float*>(from);
          if (left >= 32) continue;
          _mm512_storeu_si512(last[i], _mm512_maskz_loadu_epi16((1u << left) - 1, from));
          row[i] = last[i];
        }
        blocks_avx512<Build>::template transpose<tile_rows>(row, 0, reinterpret_cast<float*>(right(s, l)));
      }
  }

  /// c[m,n] += left right over `depth` in all, a cut and a pair of panels at a time: take(first) packs the rows of a cut,
  /// meet(first, j, n) columns of the other operand.
  template <class Take, class Meet>
  void run(dim depth, matrix_view<float> c, Take take, Meet meet) noexcept {
    m_ = c.rows;
    columns_ = c.cols;
    reduced_ = depth;
    heights_ = {};  // released below
    for (dim first = 0; first < depth; first += cut) {
      depth_ = moe::detail::at_most(depth - first, cut);
      steps_ = moe::detail::blocks(depth_, 32);
      take(first);
      for (dim j = 0; j < c.cols; j += columns) {
        const dim n = moe::detail::at_most(c.cols - j, columns);
        meet(first, j, n);
        for (dim b = 0; b * tile_rows < m_; b += 2)
          for (dim l = 0; l < n; l += panel_rows) multiply(b, l, c.columns(j, n));
      }
    }
    Tiles::release();
  }

 private:
  /// Where a pair of panels starts: its cut of the reduced dimension and its first column.
  struct place {
    dim first, j;
  };
  place after(dim first, dim j) const noexcept {
    return j + columns < columns_ ? place{first, j + columns} : place{first + cut, 0};
  }
  dim height_of(dim block) const noexcept { return moe::detail::at_most(m_ - block * tile_rows, tile_rows); }
  std::byte* right(dim step, dim column) noexcept {
    return right_ + ((column / panel_rows * steps_ + step) * panel_rows + column % panel_rows) * line_bytes;
  }
  /// Rows first + p and the next of `rows`, n columns from j on, side by side.
  MOE_TARGET(MOE_AVX512)
  __m512i pair_of(gathered<float> rows, dim first, dim p, dim j, dim n) const noexcept {
    __m512 upper = _mm512_setzero_ps(), lower = upper;
    if (p < depth_) upper = first_floats(rows.row(first + p) + j, n);
    if (p + 1 < depth_) lower = first_floats(rows.row(first + p + 1) + j, n);
    return paired_halves(upper, lower);
  }
  /// The second half of a panel that has none.
  void fill_up(dim n) noexcept {
    const dim l = round_up(n, tile_rows);
    for (dim s = 0; l % panel_rows != 0 && s < steps_; ++s) std::memset(right(s, l), 0, tile_bytes);
  }
  /// Two blocks of rows, from block b on, against the panel that starts with column l.
  void multiply(dim b, dim l, matrix_view<float> c) noexcept {
    const bool two = (b + 1) * tile_rows < m_, whole = c.cols - l >= panel_rows;
    const dim upper = height_of(b), lower = two ? height_of(b + 1) : 1, n = whole ? panel_rows : c.cols - l;
    const matrix_view<float> to = c.slice(b * tile_rows, upper + (two ? lower : 0)).columns(l, n);
    const matrix_view<float> sums = whole ? to : matrix_view<float>{edge_, to.rows, n, panel_rows};
    const auto copy = [n](matrix_view<float> from, matrix_view<float> into) {
      for (dim r = 0; r < from.rows; ++r)
        std::memcpy(into.row(r), from.row(r), static_cast<std::size_t>(n) * sizeof(float));
    };
    if (!whole) copy(to, sums);
    heights_.set(upper, lower);
    const std::byte* rows = left_ + b * tile_rows * steps_ * line_bytes;
    multiply_tiles<Build, Tiles, false>({rows, two ? rows + tile_rows * steps_ * line_bytes : nullptr, upper * line_bytes,
                                         lower * line_bytes, right(0, l), steps_, nullptr, 0, sums.data,
                                         sums.ld * dim{sizeof(float)}, true});
    if (!whole) copy(sums, to);
  }

  alignas(64) std::byte left_[most_rows * cut * sizeof(bf16)];
  alignas(64) std::byte right_[columns * cut * sizeof(bf16)];
  alignas(64) float edge_[2 * tile_rows * panel_rows] = {};
  dim m_ = 0, columns_ = 0, reduced_ = 0;  // of the product
  dim depth_ = 0, steps_ = 0;              // of the cut
  tile_heights<Tiles> heights_;
};

/// f(first row, rows) for parts of c that a tile_product takes at once.
template <class Product, class F>
void for_each_part(dim rows, F f) noexcept {
  for (dim i = 0; i < rows; i += Product::most_rows) f(i, moe::detail::at_most(rows - i, Product::most_rows));
}

/// c[m,n] += a[m,k] b[n,k]^T
template <int Build, class Tiles>
void product_nt_amx(gathered<float> a, matrix_view<const bf16> b, matrix_view<float> c) noexcept {
  tile_product<Build, Tiles> product;
  for_each_part<tile_product<Build, Tiles>>(c.rows, [&](dim i, dim m) {
    product.run(
        b.cols, c.slice(i, m), [&](dim first) { product.take_rows(a.from(i), first); },
        [&](dim first, dim j, dim n) { product.meet_columns(b, first, j, n); });
  });
}
/// c[m,n] += a[m,k] b[k,n]
template <int Build, class Tiles>
void product_nn_amx(gathered<float> a, matrix_view<const bf16> b, matrix_view<float> c) noexcept {
  tile_product<Build, Tiles> product;
  for_each_part<tile_product<Build, Tiles>>(c.rows, [&](dim i, dim m) {
    product.run(
        b.rows, c.slice(i, m), [&](dim first) { product.take_rows(a.from(i), first); },
        [&](dim first, dim j, dim n) { product.meet_rows(b, first, j, n); });
  });
}
/// c[m,n] += a[k,m]^T b[k,n], both over `depth` rows
template <int Build, class Tiles>
void product_tn_amx(gathered<float> a, gathered<float> b, dim depth, matrix_view<float> c) noexcept {
  tile_product<Build, Tiles> product;
  for_each_part<tile_product<Build, Tiles>>(c.rows, [&](dim i, dim m) {
    gathered<float> left = a;
    left.source = left.source.columns(i, m);
    product.run(
        depth, c.slice(i, m), [&](dim first) { product.take_columns(left, first); },
        [&](dim first, dim j, dim n) { product.meet_rows(b, first, j, n); });
  });
}

}  // namespace moe::arch::detail

namespace moe::arch {

/// Few rows meet the weights in dot products, many on tiles.
template <int Build, class Tiles = detail::hardware_tiles>
mixed_kernels mixed_kernels_of(basic_amx<Build>, Tiles = {}) noexcept {
  return {&detail::product_nt<detail::blocks_avx512<Build>, bf16>,
          &detail::product_nt_amx<Build, Tiles>,
          &detail::product_nn_amx<Build, Tiles>,
          &detail::product_tn_amx<Build, Tiles>,
          512,
          detail::tile_product<Build, Tiles>::most_rows};
}

}  // namespace moe::arch

#endif
