// SPDX-License-Identifier: Apache-2.0
/// Products on vectors, without a library: one tile of work on one thread, nothing allocated.
///
/// Each element of a result has one order of additions, which depends on the reduced dimension alone: neither on the other
/// rows and columns of the tile nor on the element's place among them. A token's result is the same bit for bit in any batch.
#pragma once

#include "moe/backend/cpu/simd.hpp"

#if !defined(MOE_SEPARATE_KERNELS)

namespace moe::arch {

namespace detail {

/// Columns of a block of dot products: as many streams of weights are read at once.
inline constexpr int streams = 4;
/// How far a dot product goes before its lanes are summed: that much of `streams` weight rows stays in the nearest cache.
inline constexpr dim dot_depth = 1024;
/// Rows of a block of dot products, and of a block of outer products.
template <class V>
inline constexpr int block_rows = registers<V> >= 32 ? 6 : 3;

/// Walks over memory that is needed soon, `pace` bytes for every vector of the loop that carries it along.
struct prefetch_walk {
  const char* at;
  dim pace;
};

/// c(i + m, n * step) += the dot product of rows a[i + m] and b[n], both over k floats from `first`; b's rows are `stride`
/// floats apart.
template <class V, int M, int N>
void dot_block(gathered<float> a, dim i, dim first, dim k, const float* b, dim stride, prefetch_walk ahead, matrix_view<float> c,
               dim step) noexcept {
  constexpr int W = width<V>;
  const float* x[M];
  V sum[M][N];
  MOE_UNROLL
  for (int m = 0; m < M; ++m) {
    x[m] = a.row(i + m) + first;
    MOE_UNROLL
    for (int n = 0; n < N; ++n) sum[m][n] = V(0.f);
  }
  float last[M + N][W];  // the last, shorter part of each row, filled up with zeros
  for (dim part = k % W, whole = k - part;;) {
    for (dim p = 0; p < whole; p += W, ahead.at += ahead.pace) {
      V v[M];
      MOE_UNROLL
      for (int m = 0; m < M; ++m) v[m] = load_vector<V>(x[m] + p);
      MOE_UNROLL
      for (int n = 0; n < N; ++n) {
        moe::detail::prefetch(ahead.at + n * stride * dim{sizeof(float)});
        const V w = load_vector<V>(b + n * stride + p);
        MOE_UNROLL
        for (int m = 0; m < M; ++m) sum[m][n] = multiply_add(v[m], w, sum[m][n]);
      }
    }
    if (part == 0) break;
    MOE_UNROLL
    for (int n = 0; n < N; ++n) store_vector(last[M + n], load_last<V>(b + n * stride, k, part));
    MOE_UNROLL
    for (int m = 0; m < M; ++m) {
      store_vector(last[m], load_last<V>(x[m], k, part));
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
    if constexpr (N == 4) sum_four(sum[m][0], sum[m][1], sum[m][2], sum[m][3], total);
    else sum_four(sum[m][0], V(0.f), V(0.f), V(0.f), total);
    MOE_UNROLL
    for (int n = 0; n < N; ++n) c(i + m, n * step) += total[n];
  }
}

/// All rows of a tile against N columns of it. While one block works, the weights of the next come nearer: `next` is where
/// they lie, and each block of rows asks for its share.
template <class V, int N>
void dot_columns(gathered<float> a, dim first, dim k, const float* b, dim stride, const float* next, matrix_view<float> c,
                 dim step) noexcept {
  constexpr int M = block_rows<V>;
  const dim blocks = (c.rows + M - 1) / M, line = dim{sizeof(V)}, pace = (line + blocks - 1) / blocks;
  prefetch_walk ahead{reinterpret_cast<const char*>(blocks == 1 ? b + 256 : next), pace};
  dim i = 0;
  for (; i + M <= c.rows; i += M, ahead.at += pace * (k / width<V>))
    dot_block<V, M, N>(a, i, first, k, b, stride, ahead, c, step);
  with_constant<M - 1>(c.rows - i, [&](auto m) { dot_block<V, m, N>(a, i, first, k, b, stride, ahead, c, step); });
}

/// Few rows follow each weight row to its end, as it lies in memory; many stay within one depth, so that they, too, are read
/// from a near cache.
template <class V, int N>
void dot_tile(gathered<float> a, matrix_view<const float> b, dim stride, matrix_view<float> c, dim step) noexcept {
  const dim cuts = (b.cols + dot_depth - 1) / dot_depth;
  const bool few = c.rows <= block_rows<V>;
  const auto row_of = [&](dim i) { return few ? i / cuts : i % step; };
  const auto first_of = [&](dim i) { return (few ? i % cuts : i / step) * dot_depth; };
  for (dim i = 0; i < step * cuts; ++i) {
    const dim j = row_of(i), first = first_of(i), k = b.cols - first < dot_depth ? b.cols - first : dot_depth;
    dot_columns<V, N>(a, first, k, b.row(j) + first, stride, b.row(row_of(i + 1)) + first_of(i + 1), c.columns(j, c.cols - j), step);
  }
}

}  // namespace detail

/// c[m,n] += a[m,k] b[n,k]^T. The rows of b are read as four streams, each a quarter of the tile and contiguous.
template <class Set>
void gemm_nt(simd<Set>, gathered<float> a, matrix_view<const float> b, matrix_view<float> c) noexcept {
  using V = typename simd<Set>::vector;
  const dim step = c.cols / detail::streams, whole = step * detail::streams;
  detail::dot_tile<V, detail::streams>(a, b, step * b.ld, c, step);
  detail::dot_tile<V, 1>(a, b.slice(whole, c.cols - whole), 0, c.columns(whole, c.cols - whole), c.cols - whole);
}

namespace detail {

inline constexpr dim outer_depth = 128;  // rows of b that are packed at once, to stay in the nearest cache

/// Vectors side by side in a block of outer products, and their floats.
template <class V>
inline constexpr int strips = registers<V> >= 32 ? 4 : 2;
template <class V>
inline constexpr dim block_columns = strips<V> * width<V>;

/// Row p of `packed` = row(p)[0 .. n], then zeros up to the width of a block.
template <class V, class Row>
void pack(Row row, dim depth, dim n, float* packed) noexcept {
  constexpr dim W = width<V>;
  for (dim p = 0; p < depth; ++p)
    for (dim j = 0; j < block_columns<V>; j += W, packed += W)
      store_vector(packed, j + W <= n ? load_vector<V>(row(p) + j) : load_vector<V>(row(p) + j, n > j ? n - j : 0));
}

/// c(i + m, all columns of a block) += the sum over p of a[i + m][first + p * step] times row p of `packed`, in order.
template <class V, int M>
void outer_block(gathered<float> a, dim i, dim first, dim step, const float* packed, dim depth, float* c, dim ld) noexcept {
  constexpr int W = width<V>, N = strips<V>;
  const float* x[M];
  V sum[M][N];
  MOE_UNROLL
  for (int m = 0; m < M; ++m) {
    x[m] = a.row(i + m) + first;
    MOE_UNROLL
    for (int n = 0; n < N; ++n) sum[m][n] = load_vector<V>(c + m * ld + n * W);
  }
  for (dim p = 0; p < depth; ++p, packed += N * W) {
    V v[N];
    MOE_UNROLL
    for (int n = 0; n < N; ++n) v[n] = load_vector<V>(packed + n * W);
    MOE_UNROLL
    for (int m = 0; m < M; ++m) {
      const V w(x[m][p * step]);
      MOE_UNROLL
      for (int n = 0; n < N; ++n) sum[m][n] = multiply_add(w, v[n], sum[m][n]);
    }
  }
  MOE_UNROLL
  for (int m = 0; m < M; ++m)
    MOE_UNROLL
    for (int n = 0; n < N; ++n) store_vector(c + m * ld + n * W, sum[m][n]);
}

/// The same for all rows of c, which is at most a block wide.
template <class V>
void outer_rows(gathered<float> a, dim first, dim step, const float* packed, dim depth, matrix_view<float> c) noexcept {
  constexpr int M = block_rows<V>;
  constexpr dim columns = block_columns<V>;
  float padded[M * columns];
  for (dim i = 0; i < c.rows; i += M) {
    const dim m = c.rows - i < M ? c.rows - i : M;
    const bool whole = c.cols == columns;
    for (dim r = 0; !whole && r < m; ++r)
      for (dim j = 0; j < columns; ++j) padded[r * columns + j] = j < c.cols ? c(i + r, j) : 0.f;
    with_constant<M>(m, [&](auto rows) {
      outer_block<V, rows>(a, i, first, step, packed, depth, whole ? c.row(i) : padded, whole ? c.ld : columns);
    });
    for (dim r = 0; !whole && r < m; ++r)
      for (dim j = 0; j < c.cols; ++j) c(i + r, j) = padded[r * columns + j];
  }
}

}  // namespace detail

/// c[m,n] += a[m,k] b[k,n]
template <class Set>
void gemm_nn(simd<Set>, gathered<float> a, matrix_view<const float> b, matrix_view<float> c) noexcept {
  using V = typename simd<Set>::vector;
  constexpr dim columns = detail::block_columns<V>;
  float packed[detail::outer_depth * columns];
  for (dim j = 0; j < c.cols; j += columns)
    for (dim first = 0; first < b.rows; first += detail::outer_depth) {
      const dim depth = b.rows - first < detail::outer_depth ? b.rows - first : detail::outer_depth;
      const dim n = c.cols - j < columns ? c.cols - j : columns;
      detail::pack<V>([&](dim p) { return b.row(first + p) + j; }, depth, n, packed);
      detail::outer_rows<V>(a, first, 1, packed, depth, c.columns(j, n));
    }
}

/// c[m,n] += a[k,m]^T b[k,n], both over `depth` rows
template <class Set>
void gemm_tn(simd<Set>, gathered<float> a, gathered<float> b, dim depth, matrix_view<float> c) noexcept {
  using V = typename simd<Set>::vector;
  constexpr dim columns = detail::block_columns<V>;
  float left[detail::outer_depth * columns], right[detail::outer_depth * columns];
  const gathered<float> transposed{{left, columns, 1, 1}};
  for (dim first = 0; first < depth; first += detail::outer_depth)
    for (dim i = 0; i < c.rows; i += columns) {
      const dim k = depth - first < detail::outer_depth ? depth - first : detail::outer_depth;
      const dim m = c.rows - i < columns ? c.rows - i : columns;
      detail::pack<V>([&](dim p) { return a.row(first + p) + i; }, k, m, left);
      for (dim j = 0; j < c.cols; j += columns) {
        const dim n = c.cols - j < columns ? c.cols - j : columns;
        detail::pack<V>([&](dim p) { return b.row(first + p) + j; }, k, n, right);
        detail::outer_rows<V>(transposed, 0, columns, right, k, c.slice(i, m).columns(j, n));
      }
    }
}

}  // namespace moe::arch

#endif
