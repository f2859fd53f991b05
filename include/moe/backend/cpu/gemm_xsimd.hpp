// SPDX-License-Identifier: Apache-2.0
/// Products on vectors, without a library: one tile of work on one thread, nothing allocated.
///
/// Each element of a result has one order of additions, which depends on the reduced dimension alone: neither on the other
/// rows and columns of the tile nor on the element's place among them. A token's result is the same bit for bit in any batch.
#pragma once

#include "moe/backend/cpu/simd.hpp"

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
    for (int m = 0; m < M; ++m) store_vector(last[m], load_vector<V>(x[m] + whole, part));
    for (int n = 0; n < N; ++n) store_vector(last[M + n], load_vector<V>(b + n * stride + whole, part));
    MOE_UNROLL
    for (int m = 0; m < M; ++m) x[m] = last[m];
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

template <class V, int N>
void dot_tile(gathered<float> a, matrix_view<const float> b, dim stride, matrix_view<float> c, dim step) noexcept {
  for (dim j = 0; j < step; ++j)
    for (dim first = 0; first < b.cols; first += dot_depth) {
      const dim k = b.cols - first < dot_depth ? b.cols - first : dot_depth;
      const float* next = first + k < b.cols ? b.row(j) + first + k : b.row(j + 1);
      dot_columns<V, N>(a, first, k, b.row(j) + first, stride, next, c.columns(j, c.cols - j), step);
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

inline constexpr int strips = 4;         // vectors side by side in a block of outer products, half of that with few registers
inline constexpr dim outer_depth = 128;  // rows of b that are packed at once, to stay in the nearest cache

template <class V>
inline constexpr dim block_columns = (registers<V> >= 32 ? strips : strips / 2) * width<V>;

/// Rows of floats side by side: row p holds source(p)[0 .. n], then zeros.
template <class V, class Row>
void pack(Row source, dim depth, dim n, float* packed) noexcept {
  constexpr dim W = width<V>, columns = block_columns<V>;
  for (dim p = 0; p < depth; ++p, packed += columns) {
    const float* from = source(p);
    dim j = 0;
    for (; j + W <= n; j += W) store_vector(packed + j, load_vector<V>(from + j));
    for (; j < columns; j += W) store_vector(packed + j, j < n ? load_vector<V>(from + j, n - j) : V(0.f));
  }
}

/// c(i + m, 0 .. n) += the sum over p of factor(m)[p * step] times row p of `packed`, one p after the other.
template <class V, int M, class Factor>
void outer_block(Factor factor, dim step, const float* packed, dim depth, matrix_view<float> c, dim i) noexcept {
  constexpr int W = width<V>, N = static_cast<int>(block_columns<V>) / W;
  const dim whole = c.cols / W, part = c.cols % W;
  const float* x[M];
  V sum[M][N];
  MOE_UNROLL
  for (int m = 0; m < M; ++m) {
    x[m] = factor(i + m);
    MOE_UNROLL
    for (int n = 0; n < N; ++n) {
      const float* at = c.row(i + m) + n * W;
      sum[m][n] = n < whole ? load_vector<V>(at) : load_vector<V>(at, n == whole ? part : 0);
    }
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
  for (int m = 0; m < M; ++m) {
    MOE_UNROLL
    for (int n = 0; n < N; ++n) {
      float* at = c.row(i + m) + n * W;
      if (n < whole) store_vector(at, sum[m][n]);
      else if (n == whole) store_vector(at, sum[m][n], part);
    }
  }
}
template <class V, class Factor>
void outer_rows(Factor factor, dim step, const float* packed, dim depth, matrix_view<float> c) noexcept {
  constexpr int M = block_rows<V>;
  dim i = 0;
  for (; i + M <= c.rows; i += M) outer_block<V, M>(factor, step, packed, depth, c, i);
  with_constant<M - 1>(c.rows - i, [&](auto m) { outer_block<V, m>(factor, step, packed, depth, c, i); });
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
      detail::outer_rows<V>([&](dim i) { return a.row(i) + first; }, 1, packed, depth, c.columns(j, n));
    }
}

/// c[m,n] += a[k,m]^T b[k,n], both over `depth` rows
template <class Set>
void gemm_tn(simd<Set>, gathered<float> a, gathered<float> b, dim depth, matrix_view<float> c) noexcept {
  using V = typename simd<Set>::vector;
  constexpr dim columns = detail::block_columns<V>;
  float left[detail::outer_depth * columns], right[detail::outer_depth * columns];
  for (dim first = 0; first < depth; first += detail::outer_depth)
    for (dim i = 0; i < c.rows; i += columns) {
      const dim k = depth - first < detail::outer_depth ? depth - first : detail::outer_depth;
      const dim m = c.rows - i < columns ? c.rows - i : columns;
      detail::pack<V>([&](dim p) { return a.row(first + p) + i; }, k, m, left);
      for (dim j = 0; j < c.cols; j += columns) {
        const dim n = c.cols - j < columns ? c.cols - j : columns;
        detail::pack<V>([&](dim p) { return b.row(first + p) + j; }, k, n, right);
        detail::outer_rows<V>([&](dim r) { return left + r; }, columns, right, k, c.slice(i, m).columns(j, n));
      }
    }
}

}  // namespace moe::arch
