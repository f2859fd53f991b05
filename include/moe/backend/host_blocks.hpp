// SPDX-License-Identifier: Apache-2.0
/// Products and rows in blocks that fit vector registers, for every level that says what its vectors are: `L`, a vector type
/// and its operations. What a processor has better instructions for offers the same functions in a class of its own.
/// Weights of type W, float or bf16, become floats on their way into a register.
#pragma once

#include <cstring>

#include "moe/core/dtype.hpp"
#include "moe/core/view.hpp"

namespace moe::arch::detail {

/// Columns of a block of dot products: as many streams of weights are read at once.
inline constexpr int streams = 4;

/// What is packed for blocks of outer products at once, to stay in the nearest cache.
inline constexpr dim outer_depth = 128, outer_columns = 64;
/// Rows of a block of outer products.
inline constexpr int outer_rows = 6;

/// Walks over memory that is needed soon, `pace` bytes for every vector of the loop that carries it along.
struct prefetch_walk {
  const char* at;
  dim pace;
};

/// Memory that is needed soon, in pieces of `reach` bytes, or of fewer where it lies in shorter rows: a block of outer
/// products asks for one in as many steps as the piece has lines.
struct prefetch_list {
  static constexpr dim reach = 512, line = 64, most = outer_depth / 2;
  const char* piece[most];
  dim count = 0, shift = 3;  ///< log2 of a piece's lines
  dim first = 0;  ///< so many pieces come into the first cache, too

  /// Starts with memory that is near already.
  explicit prefetch_list(const void* near, dim piece_bytes = reach) noexcept {
    while (shift > 1 && bytes() > piece_bytes) --shift;
    for (dim i = 0; i < pieces(outer_depth); ++i) piece[i] = static_cast<const char*>(near);
  }
  dim bytes() const noexcept { return line << shift; }
  /// That so many steps ask for.
  dim pieces(dim n) const noexcept { return n >> shift; }
  void add(const void* p) noexcept {
    if (count < most) piece[count++] = static_cast<const char*>(p);
  }
  void ask(dim step) const noexcept {
    const char* at = piece[step >> shift] + (step & ((dim{1} << shift) - 1)) * line;
    if ((step >> shift) < first) moe::detail::prefetch(at);
    else moe::detail::prefetch_second(at);
  }
};

/// The blocks of a level, from its lanes.
template <class L>
struct lane_blocks {
  using V = typename L::vector;
  static constexpr int width = L::width, dot_rows = L::many_registers ? 6 : 3, strips = L::many_registers ? 4 : 2;
  static constexpr dim columns = strips * width;  // of a block of outer products

  /// c(i + m, n * step) += the dot product of rows a[i + m] and b[n], both over k elements from `first`; b's rows are `stride`
  /// elements apart.
  template <int M, int N, class W>
  MOE_NO_INLINE static void dot_block(gathered<float> a, dim i, dim first, dim k, const W* b, dim stride, prefetch_walk ahead,
                                      matrix_view<float> c, dim step) noexcept {
    const float* x[M];
    V sum[M][N];
    MOE_UNROLL
    for (int m = 0; m < M; ++m) {
      x[m] = a.row(i + m) + first;
      MOE_UNROLL
      for (int n = 0; n < N; ++n) sum[m][n] = L::all(0);
    }
    const dim part = k % width;
    for (dim p = 0; p < k - part; p += width, ahead.at += ahead.pace) {
      V v[M];
      MOE_UNROLL
      for (int m = 0; m < M; ++m) v[m] = L::load(x[m] + p);
      MOE_UNROLL
      for (int n = 0; n < N; ++n) {
        moe::detail::prefetch(ahead.at + n * stride * dim{sizeof(W)});
        const V w = L::load(b + n * stride + p);
        MOE_UNROLL
        for (int m = 0; m < M; ++m) sum[m][n] = L::multiply_add(v[m], w, sum[m][n]);
      }
    }
    if (part > 0) {
      float last[M][width];  // the last, shorter part of each row, filled up with zeros
      MOE_UNROLL
      for (int m = 0; m < M; ++m) L::store(last[m], L::load_last(x[m], k, part));
      MOE_UNROLL
      for (int n = 0; n < N; ++n) {
        const V w = L::load_last(b + n * stride, k, part);
        MOE_UNROLL
        for (int m = 0; m < M; ++m) sum[m][n] = L::multiply_add(L::load(last[m]), w, sum[m][n]);
      }
    }
    MOE_UNROLL
    for (int m = 0; m < M; ++m) {
      float total[4];
      if constexpr (N == 4)
        L::sum_four(sum[m][0], sum[m][1], sum[m][2], sum[m][3], total);
      else
        L::sum_four(sum[m][0], L::all(0), L::all(0), L::all(0), total);
      MOE_UNROLL
      for (int n = 0; n < N; ++n) c(i + m, n * step) += total[n];
    }
  }

  /// c(m, all columns of a block) += the sum over p of a[i + m][first + p] times row p of `packed`, in order. c(m, .) lies
  /// at c + at[m] * ld, or at c + m * ld where `at` is null.
  template <int M>
  MOE_NO_INLINE static void outer_block(gathered<float> a, dim i, dim first, const float* packed, dim depth,
                                        const prefetch_list& ahead, float* c, dim ld, const idx* at = nullptr) noexcept {
    const float* x[M];
    float* y[M];
    V sum[M][strips];
    MOE_UNROLL
    for (int m = 0; m < M; ++m) {
      x[m] = a.row(i + m) + first;
      y[m] = c + (at ? at[m] : m) * ld;
      MOE_UNROLL
      for (int n = 0; n < strips; ++n) sum[m][n] = L::load(y[m] + n * width);
    }
    for (dim p = 0; p < depth; ++p, packed += columns) {
      ahead.ask(p);
      V v[strips];
      MOE_UNROLL
      for (int n = 0; n < strips; ++n) v[n] = L::load(packed + n * width);
      MOE_UNROLL
      for (int m = 0; m < M; ++m) {
        const V w = L::all(x[m][p]);
        MOE_UNROLL
        for (int n = 0; n < strips; ++n) sum[m][n] = L::multiply_add(w, v[n], sum[m][n]);
      }
    }
    MOE_UNROLL
    for (int m = 0; m < M; ++m) {
      MOE_UNROLL
      for (int n = 0; n < strips; ++n) L::store(y[m] + n * width, sum[m][n]);
    }
  }

  /// to[p * Step + j] = row[j][first + p] for `width` rows and as many p.
  template <dim Step = columns>
  static void transpose(const float* const* row, dim first, float* to) noexcept {
    for (int j = 0; j < width; ++j)
      for (int p = 0; p < width; ++p) to[p * Step + j] = row[j][first + p];
  }

  /// to[j] = from[j]
  static void widen(const float* from, float* to, dim n) noexcept {
    std::memcpy(to, from, static_cast<std::size_t>(n) * sizeof(float));
  }
  static void widen(const bf16* from, float* to, dim n) noexcept {
    for (dim j = 0; j < n; ++j) to[j] = static_cast<float>(from[j]);
  }

  /// y[j] += w x[j]
  static void add_scaled(float w, const float* x, float* y, dim n) noexcept {
    const auto weight = L::all(w);
    dim j = 0;
    for (; j + width <= n; j += width) L::store(y + j, L::multiply_add(weight, L::load(x + j), L::load(y + j)));
    if (j == n) return;
    const auto last = L::multiply_add(weight, L::load(x + j, n - j), L::load(y + j, n - j));
    L::store(y + j, last, n - j);
  }

  /// sum of x[j] y[j]
  static float dot_product(const float* x, const float* y, dim n) noexcept {
    V sum[4] = {L::all(0), L::all(0), L::all(0), L::all(0)};
    dim j = 0;
    for (; j + 4 * width <= n; j += 4 * width) {
      MOE_UNROLL
      for (int i = 0; i < 4; ++i) sum[i] = L::multiply_add(L::load(x + j + i * width), L::load(y + j + i * width), sum[i]);
    }
    for (; j + width <= n; j += width) sum[0] = L::multiply_add(L::load(x + j), L::load(y + j), sum[0]);
    if (j < n) sum[1] = L::multiply_add(L::load(x + j, n - j), L::load(y + j, n - j), sum[1]);
    float total[4];
    L::sum_four(sum[0], sum[1], sum[2], sum[3], total);
    return (total[0] + total[1]) + (total[2] + total[3]);
  }
};

}  // namespace moe::arch::detail
