// SPDX-License-Identifier: Apache-2.0
/// Products of rows with bf16 weights, and gradients of such weights, on the tile unit of Intel processors. Rows are rounded
/// to bf16, to nearest even, before: `halves`; sums are float32.
///
/// Rows go into tiles as they lie in memory. Of the other operand 32 columns are packed for a cut of the reduced dimension
/// and stay in the first cache while all rows pass by; meanwhile those of the next come nearer. Weights come as they lie in
/// memory, in either orientation. `Tiles` are the instructions; tests put a plain C++ copy of them in their place.
#pragma once

#include "moe/backend/cpu/blocks_avx512.hpp"
#include "moe/backend/cpu/packed_amx.hpp"

#if defined(MOE_X86_KERNELS)

namespace moe::arch::detail {

/// The first n halves at p, and zeros.
MOE_TARGET(MOE_AVX512)
inline __m512i first_halves(const bf16* p, dim n) noexcept {
  return _mm512_maskz_loadu_epi16(n < 32 ? (1u << n) - 1 : 0xffffffffu, p);
}

/// Rows of at most 32 halves, each filled up to 32 with zeros.
MOE_TARGET(MOE_AVX512)
inline void round_up_rows(matrix_view<const bf16> from, bf16* to) noexcept {
  for (dim r = 0; r < from.rows; ++r) _mm512_storeu_si512(to + r * 32, first_halves(from.row(r), from.cols));
}

/// Memory that is asked for while tiles are multiplied: in each step one line or two, next to each other, of `rows` rows.
struct tile_prefetch {
  const void* from = nullptr;
  dim step = 0, stride = 0;  ///< bytes from step to step, from row to row
  dim rows = 0, lines = 1;

  void ask(dim s) const noexcept {
    const char* at = static_cast<const char*>(from) + s * step;
    for (dim r = 0; r < rows; ++r, at += stride) {
      moe::detail::prefetch_second(at);
      if (lines == 2) moe::detail::prefetch_second(at + line_bytes);
    }
  }
};

/// One or two blocks of rows against 32 packed columns: sums = or += over `steps` steps.
struct rows_work {
  const bf16 *upper, *lower;  ///< lower: null where there is one block
  dim row, step;              ///< halves from row to row, from step to step
  const std::byte* columns;
  dim steps;
  float *sums, *below;  ///< below: of the lower block
  dim stride;           ///< floats from row to row of the sums
  bool add;
};

template <int Build, class Tiles>
MOE_TARGET(MOE_AMX)
MOE_NO_INLINE
    void multiply_rows(const rows_work& w, const tile_prefetch& ahead, const tile_prefetch& further = {}) noexcept {
  Tiles::compiler_fence();
  const bool two = w.lower != nullptr;
  const dim stride = w.stride * dim{sizeof(float)}, row = w.row * dim{sizeof(bf16)};
  if (w.add) {
    Tiles::load0(w.sums, stride);
    Tiles::load1(w.sums + tile_rows, stride);
    if (two) Tiles::load2(w.below, stride);
    if (two) Tiles::load3(w.below + tile_rows, stride);
  } else {
    Tiles::zero0();
    Tiles::zero1();
    Tiles::zero2();
    Tiles::zero3();
  }
  const std::byte* q = w.columns;
  for (dim s = 0; s < w.steps; ++s, q += 2 * tile_bytes) {
    Tiles::load6(q, line_bytes);
    Tiles::pass4(w.upper + s * w.step, row);
    Tiles::add_halves0();
    Tiles::load7(q + tile_bytes, line_bytes);
    Tiles::add_halves1();
    ahead.ask(s);
    further.ask(s);
    if (!two) continue;
    Tiles::pass5(w.lower + s * w.step, row);
    Tiles::add_halves2();
    Tiles::add_halves3();
  }
  Tiles::store0(w.sums, stride);
  Tiles::store1(w.sums + tile_rows, stride);
  if (two) Tiles::store2(w.below, stride);
  if (two) Tiles::store3(w.below + tile_rows, stride);
  Tiles::compiler_fence();
}

/// Rows p and the next of n columns of w, side by side: sixteen columns go to `left`, sixteen to `right`.
MOE_TARGET(MOE_AVX512)
inline void pair_rows(matrix_view<const bf16> w, dim p, dim n, void* left, void* right) noexcept {
  const __m512i order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
  __m512i upper = _mm512_setzero_si512(), lower = upper;
  if (p < w.rows) upper = first_halves(w.row(p), n);
  if (p + 1 < w.rows) lower = first_halves(w.row(p + 1), n);
  upper = _mm512_maskz_permutexvar_epi64(0xff, order, upper);
  lower = _mm512_maskz_permutexvar_epi64(0xff, order, lower);
  _mm512_store_si512(left, _mm512_unpacklo_epi16(upper, lower));
  _mm512_store_si512(right, _mm512_unpackhi_epi16(upper, lower));
}

/// to[p][i] = row i of w, its pair p of halves, of 16 rows and pairs.
MOE_TARGET(MOE_AVX512)
inline void turn_pairs(const bf16* w, dim ld, float* to) noexcept {
  __m512 v[4][4];  // a vector takes four pairs of four rows that are four apart; each row is read once
  MOE_UNROLL
  for (int j = 0; j < 4; ++j) {
    const float* row[4];
    MOE_UNROLL
    for (int i = 0; i < 4; ++i) row[i] = reinterpret_cast<const float*>(w + (j + 4 * i) * ld);
    MOE_UNROLL
    for (int q = 0; q < 4; ++q) {
      v[q][j] = _mm512_castps128_ps512(_mm_loadu_ps(row[0] + 4 * q));
      v[q][j] = _mm512_insertf32x4(v[q][j], _mm_loadu_ps(row[1] + 4 * q), 1);
      v[q][j] = _mm512_insertf32x4(v[q][j], _mm_loadu_ps(row[2] + 4 * q), 2);
      v[q][j] = _mm512_insertf32x4(v[q][j], _mm_loadu_ps(row[3] + 4 * q), 3);
    }
  }
  MOE_UNROLL
  for (int q = 0; q < 4; ++q, to += 4 * tile_rows) {
    const __m512 a = _mm512_maskz_unpacklo_ps(0xffff, v[q][0], v[q][1]),
                 b = _mm512_maskz_unpackhi_ps(0xffff, v[q][0], v[q][1]);
    const __m512 c = _mm512_maskz_unpacklo_ps(0xffff, v[q][2], v[q][3]),
                 d = _mm512_maskz_unpackhi_ps(0xffff, v[q][2], v[q][3]);
    _mm512_store_ps(to, _mm512_shuffle_ps(a, c, 0x44));
    _mm512_store_ps(to + tile_rows, _mm512_shuffle_ps(a, c, 0xee));
    _mm512_store_ps(to + 2 * tile_rows, _mm512_shuffle_ps(b, d, 0x44));
    _mm512_store_ps(to + 3 * tile_rows, _mm512_shuffle_ps(b, d, 0xee));
  }
}

/// 32 columns of the right operand of a product, packed over at most Cut of the reduced dimension.
template <dim Cut>
class packed_columns {
 public:
  const std::byte* step(dim s) const noexcept { return data_ + 2 * s * tile_bytes; }

  /// The first n columns of w.
  MOE_TARGET(MOE_AVX512)
  void take_columns(matrix_view<const bf16> w, dim n) noexcept {
    for (dim p = 0; p < round_up(w.rows, 32); p += 2) {
      std::byte* to = data_ + p / 32 * 2 * tile_bytes + p % 32 / 2 * line_bytes;
      pair_rows(w, p, n, to, to + tile_bytes);
    }
  }
  /// The rows of w.
  MOE_TARGET(MOE_AVX512)
  void take_rows(matrix_view<const bf16> w) noexcept {
    for (dim p = 0; p < w.cols; p += 32)
      for (dim i = 0; i < panel_rows; i += tile_rows) {
        auto* tile = reinterpret_cast<float*>(data_ + (p / 32 * 2 + i / tile_rows) * tile_bytes);
        const bf16* from = w.row(i) + p;
        if (i + tile_rows <= w.rows && p + 32 <= w.cols) {
          turn_pairs(from, w.ld, tile);
          continue;
        }
        alignas(64) bf16 edge[tile_rows * 32];
        for (dim r = 0; r < tile_rows; ++r) {
          const __m512i row = i + r < w.rows ? first_halves(from + r * w.ld, w.cols - p) : _mm512_setzero_si512();
          _mm512_store_si512(edge + r * 32, row);
        }
        turn_pairs(edge, 32, tile);
      }
  }

 private:
  alignas(64) std::byte data_[panel_rows * Cut * sizeof(bf16)];
};

inline void copy_floats(matrix_view<float> from, matrix_view<float> to) noexcept {
  for (dim r = 0; r < to.rows; ++r) std::memcpy(to.row(r), from.row(r), static_cast<std::size_t>(to.cols) * sizeof(float));
}

/// c[m,n] += a[m,k] b, 32 columns and a cut of k at a time: take(packed, first, depth, j, n) packs columns j .. j + n of b,
/// next(first, j, part, parts) is what to ask for meanwhile of those that come next.
template <int Build, class Tiles, class Take, class Next>
void multiply_halves(matrix_view<const bf16> a, matrix_view<float> c, Take take, Next next) noexcept {
  constexpr dim cut = 512, pair = 2 * tile_rows;
  packed_columns<cut> packed;
  alignas(64) float edge[pair * panel_rows];
  alignas(64) bf16 last[pair * 32];
  tile_heights<Tiles> heights;
  for (dim first = 0; first < a.cols; first += cut)
    for (dim j = 0; j < c.cols; j += panel_rows) {
      const dim depth = at_most(a.cols - first, cut), whole = depth / 32 * 32, n = at_most(c.cols - j, panel_rows);
      const bool more = j + n < c.cols;
      take(packed, first, depth, j, n);
      for (dim b = 0; b < c.rows; b += pair) {
        const dim m = at_most(c.rows - b, pair), upper = at_most(m, tile_rows), lower = m - upper;
        const matrix_view<float> to = c.slice(b, m).columns(j, n);
        const matrix_view<float> sums = n == panel_rows ? to : matrix_view<float>{edge, m, n, panel_rows};
        const auto multiply = [&](const bf16* rows, dim ld, dim step, dim steps, const tile_prefetch& ahead) {
          multiply_rows<Build, Tiles>({rows, lower > 0 ? rows + upper * ld : nullptr, ld, 32, packed.step(step), steps,
                                       sums.data, sums.data + upper * sums.ld, sums.ld, true},
                                      ahead);
        };
        heights.set(upper, lower > 0 ? lower : 1);
        if (n < panel_rows) copy_floats(to, sums);
        if (whole > 0)
          multiply(a.row(b) + first, a.ld, 0, whole / 32,
                   next(more ? first : first + cut, more ? j + n : 0, b / pair, blocks(c.rows, pair)));
        if (whole < depth) {
          round_up_rows(a.slice(b, m).columns(first + whole, depth - whole), last);
          multiply(last, 32, whole / 32, 1, {});
        }
        if (n < panel_rows) copy_floats(sums, to);
      }
    }
  Tiles::release();
}

/// c[m,n] += a[m,k] b[n,k]^T
template <int Build, class Tiles>
void product_nt_amx(matrix_view<const bf16> a, matrix_view<const bf16> b, matrix_view<float> c) noexcept {
  const dim row = b.ld * dim{sizeof(bf16)};
  multiply_halves<Build, Tiles>(
      a, c, [&](auto& to, dim first, dim depth, dim j, dim n) { to.take_rows(b.slice(j, n).columns(first, depth)); },
      [&](dim first, dim j, dim part, dim parts) -> tile_prefetch {
        const dim rows = blocks(panel_rows, parts), r = j + part * rows;
        if (first >= b.cols || r >= b.rows) return {};
        return {b.row(r) + first, line_bytes, row, at_most(b.rows - r, rows)};
      });
}
/// c[m,n] += a[m,k] b[k,n]
template <int Build, class Tiles>
void product_nn_amx(matrix_view<const bf16> a, matrix_view<const bf16> b, matrix_view<float> c) noexcept {
  const dim row = b.ld * dim{sizeof(bf16)};
  multiply_halves<Build, Tiles>(
      a, c, [&](auto& to, dim first, dim depth, dim j, dim n) { to.take_columns(b.slice(first, depth).columns(j, n), n); },
      [&](dim first, dim j, dim part, dim parts) -> tile_prefetch {
        const dim rows = blocks(32, parts), r = first + part * rows * 16;
        if (r + rows * 16 > b.rows) return {};
        return {b.row(r) + j, rows * row, row, rows};
      });
}

/// Columns of a as rows, for a product with packed columns: block after block of sixteen, step after step.
template <dim Rows, dim Cut>
class turned_columns {
 public:
  const bf16* block(dim b) const noexcept { return data_ + b * tile_rows * Cut; }

  MOE_TARGET(MOE_AVX512)
  void take(matrix_view<const bf16> a) noexcept {
    alignas(64) bf16 pairs[2][tile_rows * 32];
    for (dim i = 0; i < a.cols; i += 32)
      for (dim p = 0; p < a.rows; p += 32) {
        for (dim q = 0; q < tile_rows; ++q)
          pair_rows(a.columns(i, a.cols - i), p + 2 * q, a.cols - i, pairs[0] + q * 32, pairs[1] + q * 32);
        for (dim h = 0; h < 2; ++h)
          turn_pairs(pairs[h], 32, reinterpret_cast<float*>(data_ + (i + h * tile_rows) * Cut + p * tile_rows));
      }
  }

 private:
  alignas(64) bf16 data_[Rows * Cut];
};

/// to += from, the rows of which are 32 floats
MOE_TARGET(MOE_AVX512)
inline void add_sums(const float* from, matrix_view<float> to) noexcept {
  for (dim r = 0; r < to.rows; ++r, from += panel_rows)
    for (dim j = 0; j < to.cols; j += 16) {
      const __mmask16 some = static_cast<__mmask16>(to.cols - j < 16 ? (1u << (to.cols - j)) - 1 : 0xffff);
      const __m512 sum = _mm512_add_ps(_mm512_loadu_ps(from + j), _mm512_maskz_loadu_ps(some, to.row(r) + j));
      _mm512_mask_storeu_ps(to.row(r) + j, some, sum);
    }
}

inline constexpr dim tile_gradient_rows = 128;

/// c[m,n] += a[k,m]^T b[k,n], m at most tile_gradient_rows
template <int Build, class Tiles>
void gradient_of_halves(matrix_view<const bf16> a, matrix_view<const bf16> b, matrix_view<float> c) noexcept {
  constexpr dim cut = 256, pair = 2 * tile_rows;
  turned_columns<tile_gradient_rows, cut> left;
  packed_columns<cut> right;
  alignas(64) float sums[pair * panel_rows];
  tile_heights<Tiles> heights;
  const dim row = b.ld * dim{sizeof(bf16)}, parts = blocks(c.rows, pair);
  for (dim first = 0; first < a.rows; first += cut) {
    const dim depth = at_most(a.rows - first, cut), steps = blocks(depth, 32);
    left.take(a.slice(first, depth));
    for (dim j = 0; j < c.cols; j += panel_rows) {
      const dim n = at_most(c.cols - j, panel_rows);
      const bool more = j + n < c.cols;
      right.take_columns(b.slice(first, depth).columns(j, n), n);
      for (dim i = 0; i < c.rows; i += pair) {
        const dim m = at_most(c.rows - i, pair), upper = at_most(m, tile_rows), lower = m - upper;
        const bool below = i + pair < c.rows;
        const dim share = blocks(32, parts), r = first + i / pair * share * steps;
        tile_prefetch ahead, further;
        if (below || more) {
          const dim next = below ? i + pair : 0, lines = at_most(c.rows - next, pair) / steps;
          ahead = {c.row(next) + (below ? j : j + n), lines * c.ld * dim{sizeof(float)}, c.ld * dim{sizeof(float)}, lines,
                   2};
        }
        if (more && r + share * steps <= first + depth) further = {b.row(r) + j + n, share * row, row, share};
        heights.set(upper, lower > 0 ? lower : 1);
        const bf16* block = left.block(i / tile_rows);
        multiply_rows<Build, Tiles>({block, lower > 0 ? block + tile_rows * cut : nullptr, 32, 32 * tile_rows, right.step(0),
                                     steps, sums, sums + upper * panel_rows, panel_rows, false},
                                    ahead, further);
        add_sums(sums, c.slice(i, m).columns(j, n));
      }
    }
  }
  Tiles::release();
}
template <int Build, class Tiles>
void product_tn_amx(matrix_view<const bf16> a, matrix_view<const bf16> b, matrix_view<float> c) noexcept {
  for (dim i = 0; i < c.rows; i += tile_gradient_rows) {
    const dim m = at_most(c.rows - i, tile_gradient_rows);
    gradient_of_halves<Build, Tiles>(a.columns(i, m), b, c.slice(i, m));
  }
}

}  // namespace moe::arch::detail

namespace moe::arch {

/// Few rows meet the weights in dot products, many, rounded, on tiles.
template <int Build, class Tiles = detail::hardware_tiles>
mixed_kernels mixed_kernels_of(basic_amx<Build>, Tiles = {}) noexcept {
  return {&detail::product_nt<detail::blocks_avx512<Build>, bf16>,
          nullptr,
          nullptr,
          nullptr,
          detail::outer_columns,
          detail::tile_gradient_rows,
          {&detail::round_floats<Build>, &detail::product_nt_amx<Build, Tiles>, &detail::product_nn_amx<Build, Tiles>,
           &detail::product_tn_amx<Build, Tiles>}};
}

}  // namespace moe::arch

#endif
