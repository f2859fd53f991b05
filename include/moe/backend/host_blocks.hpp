// SPDX-License-Identifier: Apache-2.0
/// Products and rows in blocks that fit vector registers, for every level that says what its vectors are: `L`, a vector type
/// and its operations. One tile of work on one thread; nothing is allocated.
///
/// Each element of a result has one order of additions, which depends on the reduced dimension alone: neither on the other
/// rows and columns of the tile nor on its place among them. A token's result is the same bit for bit in any batch.
#pragma once

#include <cstring>
#include <type_traits>
#include <utility>

#include "moe/core/view.hpp"

namespace moe::arch::detail {

/// f(n) with n as a constant of 1 .. N: the block that is as high as what is left. Nothing for other n.
template <int N, class F>
void with_constant(dim n, F f) noexcept {
  [&]<int... I>(std::integer_sequence<int, I...>) {
    (void)((n == I + 1 ? (f(std::integral_constant<int, I + 1>{}), true) : false) || ...);
  }(std::make_integer_sequence<int, N>{});
}

/// Columns of a block of dot products: as many streams of weights are read at once.
inline constexpr int streams = 4;
/// How far a dot product goes before its lanes are summed: that much of `streams` weight rows stays in the nearest cache.
inline constexpr dim dot_depth = 1024;
/// Rows of a block of dot products.
template <class L>
inline constexpr int dot_rows = L::many_registers ? 6 : 3;

/// Walks over memory that is needed soon, `pace` bytes for every vector of the loop that carries it along.
struct prefetch_walk {
  const char* at;
  dim pace;
};

/// c(i + m, n * step) += the dot product of rows a[i + m] and b[n], both over k floats from `first`; b's rows are `stride`
/// floats apart.
template <class L, int M, int N>
MOE_NO_INLINE void dot_block(gathered<float> a, dim i, dim first, dim k, const float* b, dim stride, prefetch_walk ahead,
                             matrix_view<float> c, dim step) noexcept {
  using V = typename L::vector;
  constexpr int W = L::width;
  const float* x[M];
  V sum[M][N];
  MOE_UNROLL
  for (int m = 0; m < M; ++m) {
    x[m] = a.row(i + m) + first;
    MOE_UNROLL
    for (int n = 0; n < N; ++n) sum[m][n] = L::all(0);
  }
  float last[M + N][W];  // the last, shorter part of each row, filled up with zeros
  for (dim part = k % W, whole = k - part;;) {
    for (dim p = 0; p < whole; p += W, ahead.at += ahead.pace) {
      V v[M];
      MOE_UNROLL
      for (int m = 0; m < M; ++m) v[m] = L::load(x[m] + p);
      MOE_UNROLL
      for (int n = 0; n < N; ++n) {
        moe::detail::prefetch(ahead.at + n * stride * dim{sizeof(float)});
        const V w = L::load(b + n * stride + p);
        MOE_UNROLL
        for (int m = 0; m < M; ++m) sum[m][n] = L::multiply_add(v[m], w, sum[m][n]);
      }
    }
    if (part == 0) break;
    MOE_UNROLL
    for (int n = 0; n < N; ++n) L::store(last[M + n], L::load_last(b + n * stride, k, part));
    MOE_UNROLL
    for (int m = 0; m < M; ++m) {
      L::store(last[m], L::load_last(x[m], k, part));
      x[m] = last[m];
    }
    b = last[M];
    stride = W;
    part = 0;
    whole = W;
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

/// All rows of a tile against N columns of it. While one block works, the weights of the next come nearer: `next` is where
/// they lie, and each block of rows asks for its share. A block alone asks for its own, a kilobyte ahead.
template <class L, int N>
void dot_columns(gathered<float> a, dim first, dim k, const float* b, dim stride, const float* next, matrix_view<float> c,
                 dim step) noexcept {
  constexpr int M = dot_rows<L>;
  const dim blocks = (c.rows + M - 1) / M, line = dim{sizeof(typename L::vector)}, pace = (line + blocks - 1) / blocks;
  prefetch_walk ahead{reinterpret_cast<const char*>(blocks == 1 ? b + 1024 / sizeof(float) : next), pace};
  dim i = 0;
  for (; i + M <= c.rows; i += M, ahead.at += pace * (k / L::width))
    dot_block<L, M, N>(a, i, first, k, b, stride, ahead, c, step);
  with_constant<M - 1>(c.rows - i, [&](auto m) { dot_block<L, m, N>(a, i, first, k, b, stride, ahead, c, step); });
}

/// Few rows follow each weight row to its end, as it lies in memory; many stay within one depth, so that they, too, are read
/// from a near cache.
template <class L, int N>
void dot_tile(gathered<float> a, matrix_view<const float> b, dim stride, matrix_view<float> c, dim step) noexcept {
  const dim cuts = (b.cols + dot_depth - 1) / dot_depth;
  const bool few = c.rows <= dot_rows<L>;
  const auto row_of = [&](dim i) { return few ? i / cuts : i % step; };
  const auto first_of = [&](dim i) { return (few ? i % cuts : i / step) * dot_depth; };
  for (dim i = 0; i < step * cuts; ++i) {
    const dim j = row_of(i), first = first_of(i), k = b.cols - first < dot_depth ? b.cols - first : dot_depth;
    dot_columns<L, N>(a, first, k, b.row(j) + first, stride, b.row(row_of(i + 1)) + first_of(i + 1),
                      c.columns(j, c.cols - j), step);
  }
}

/// c[m,n] += a[m,k] b[n,k]^T. The rows of b are read as four streams, each a quarter of the tile and contiguous.
template <class L>
void product_nt(gathered<float> a, matrix_view<const float> b, matrix_view<float> c) noexcept {
  const dim step = c.cols / streams, whole = step * streams;
  dot_tile<L, streams>(a, b, step * b.ld, c, step);
  dot_tile<L, 1>(a, b.slice(whole, c.cols - whole), 0, c.columns(whole, c.cols - whole), c.cols - whole);
}

inline constexpr dim outer_depth = 128, outer_columns = 64;  // of b that are packed at once, to stay in the nearest cache

/// Rows of a block of outer products, its vectors side by side, and their floats.
inline constexpr int outer_rows = 6;
template <class L>
inline constexpr int strips = L::many_registers ? 4 : 2;
template <class L>
inline constexpr dim block_columns = strips<L> * L::width;

/// Rows of n <= outer_columns floats as blocks read them: block after block, in each row after row, filled up with zeros.
template <class L, class Row>
void pack(Row row, dim depth, dim n, float* packed) noexcept {
  constexpr dim W = L::width, columns = block_columns<L>;
  for (dim p = 0; p < depth; ++p) {
    const float* from = row(p);
    const auto place = [&](dim j) { return packed + j / columns * depth * columns + p * columns + j % columns; };
    dim j = 0;
    for (; j + W <= n; j += W) L::store(place(j), L::load(from + j));
    for (; j < n; ++j) *place(j) = from[j];
    for (; j % columns != 0; ++j) *place(j) = 0;
  }
}

/// c(i + m, all columns of a block) += the sum over p of a[i + m][first + p * step] times row p of `packed`, in order.
template <class L, int M>
MOE_NO_INLINE void outer_block(gathered<float> a, dim i, dim first, dim step, const float* packed, dim depth, float* c,
                               dim ld) noexcept {
  using V = typename L::vector;
  constexpr int W = L::width, N = strips<L>;
  const float* x[M];
  V sum[M][N];
  MOE_UNROLL
  for (int m = 0; m < M; ++m) {
    x[m] = a.row(i + m) + first;
    MOE_UNROLL
    for (int n = 0; n < N; ++n) sum[m][n] = L::load(c + m * ld + n * W);
  }
  for (dim p = 0; p < depth; ++p, packed += N * W) {
    V v[N];
    MOE_UNROLL
    for (int n = 0; n < N; ++n) v[n] = L::load(packed + n * W);
    MOE_UNROLL
    for (int m = 0; m < M; ++m) {
      const V w = L::all(x[m][p * step]);
      MOE_UNROLL
      for (int n = 0; n < N; ++n) sum[m][n] = L::multiply_add(w, v[n], sum[m][n]);
    }
  }
  MOE_UNROLL
  for (int m = 0; m < M; ++m) {
    MOE_UNROLL
    for (int n = 0; n < N; ++n) L::store(c + m * ld + n * W, sum[m][n]);
  }
}

/// The same for all of c, which is as wide as what was packed.
template <class L>
void outer_tile(gathered<float> a, dim first, dim step, const float* packed, dim depth, matrix_view<float> c) noexcept {
  constexpr int M = outer_rows;
  constexpr dim columns = block_columns<L>;
  float padded[M * columns];
  for (dim j = 0; j < c.cols; j += columns, packed += depth * columns)
    for (dim i = 0; i < c.rows; i += M) {
      const dim m = c.rows - i < M ? c.rows - i : M, n = c.cols - j < columns ? c.cols - j : columns;
      const matrix_view<float> to = c.slice(i, m).columns(j, n);
      const bool whole = n == columns;
      for (dim r = 0; !whole && r < m; ++r)
        for (dim l = 0; l < columns; ++l) padded[r * columns + l] = l < n ? to(r, l) : 0.f;
      with_constant<M>(m, [&](auto rows) {
        outer_block<L, rows>(a, i, first, step, packed, depth, whole ? to.data : padded, whole ? to.ld : columns);
      });
      for (dim r = 0; !whole && r < m; ++r)
        for (dim l = 0; l < n; ++l) to(r, l) = padded[r * columns + l];
    }
}

/// c[m,n] += a[m,k] b[k,n]
template <class L>
void product_nn(gathered<float> a, matrix_view<const float> b, matrix_view<float> c) noexcept {
  float packed[outer_depth * outer_columns];
  for (dim j = 0; j < c.cols; j += outer_columns)
    for (dim first = 0; first < b.rows; first += outer_depth) {
      const dim depth = b.rows - first < outer_depth ? b.rows - first : outer_depth;
      const dim n = c.cols - j < outer_columns ? c.cols - j : outer_columns;
      pack<L>([&](dim p) { return b.row(first + p) + j; }, depth, n, packed);
      outer_tile<L>(a, first, 1, packed, depth, c.columns(j, n));
    }
}

/// c[m,n] += a[k,m]^T b[k,n], both over `depth` rows
template <class L>
void product_tn(gathered<float> a, gathered<float> b, dim depth, matrix_view<float> c) noexcept {
  float left[outer_depth * outer_columns], right[outer_depth * outer_columns];
  for (dim first = 0; first < depth; first += outer_depth)
    for (dim i = 0; i < c.rows; i += outer_columns) {
      const dim k = depth - first < outer_depth ? depth - first : outer_depth;
      const dim m = c.rows - i < outer_columns ? c.rows - i : outer_columns;
      for (dim p = 0; p < k; ++p)
        std::memcpy(left + p * outer_columns, a.row(first + p) + i, static_cast<std::size_t>(m) * sizeof(float));
      for (dim j = 0; j < c.cols; j += outer_columns) {
        const dim n = c.cols - j < outer_columns ? c.cols - j : outer_columns;
        pack<L>([&](dim p) { return b.row(first + p) + j; }, k, n, right);
        outer_tile<L>(gathered<float>{{left, m, 1, 1}}, 0, outer_columns, right, k, c.slice(i, m).columns(j, n));
      }
    }
}

/// y[j] += w x[j]
template <class L>
void add_scaled(float w, const float* x, float* y, dim n) noexcept {
  constexpr dim W = L::width;
  const auto weight = L::all(w);
  dim j = 0;
  for (; j + W <= n; j += W) L::store(y + j, L::multiply_add(weight, L::load(x + j), L::load(y + j)));
  if (j == n) return;
  const auto last = L::multiply_add(weight, L::load(x + j, n - j), L::load(y + j, n - j));
  L::store(y + j, last, n - j);
}

/// sum of x[j] y[j]
template <class L>
float dot_product(const float* x, const float* y, dim n) noexcept {
  constexpr dim W = L::width;
  typename L::vector sum[4] = {L::all(0), L::all(0), L::all(0), L::all(0)};
  dim j = 0;
  for (; j + 4 * W <= n; j += 4 * W) {
    MOE_UNROLL
    for (int i = 0; i < 4; ++i) sum[i] = L::multiply_add(L::load(x + j + i * W), L::load(y + j + i * W), sum[i]);
  }
  for (; j + W <= n; j += W) sum[0] = L::multiply_add(L::load(x + j), L::load(y + j), sum[0]);
  if (j < n) sum[1] = L::multiply_add(L::load(x + j, n - j), L::load(y + j, n - j), sum[1]);
  float total[4];
  L::sum_four(sum[0], sum[1], sum[2], sum[3], total);
  return (total[0] + total[1]) + (total[2] + total[3]);
}

}  // namespace moe::arch::detail
