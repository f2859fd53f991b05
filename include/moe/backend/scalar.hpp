// SPDX-License-Identifier: Apache-2.0
/// The lowest rung of the ladder: every kernel in plain C++, without third-party headers. The reference the other rungs are
/// tested against and the fallback they stand on.
///
/// A kernel is one tile of work on one thread, over views and values. Products add to c and read the rows of a `gathered`
/// operand unweighted; floats accumulate in float.
#pragma once

#include "moe/backend/host.hpp"

namespace moe {

namespace arch {

struct scalar {};

namespace detail {

inline constexpr int lanes = 8;  // independent partial sums, so that the compiler can vectorise a dot product

/// M x N dot products at once. Each element has one order of additions; which of them fuse is the compiler's choice.
template <int M, int N>
void dot_block(gathered<float> a, dim i, matrix_view<const float> b, dim j, matrix_view<float> c) noexcept {
  float sum[M][N][lanes] = {};
  const float *pa[M], *pb[N];
  for (int m = 0; m < M; ++m) pa[m] = a.row(i + m);
  for (int n = 0; n < N; ++n) pb[n] = b.row(j + n);
  const dim whole = b.cols / lanes * lanes;
  for (dim k = 0; k < whole; k += lanes)
    for (int m = 0; m < M; ++m)
      for (int n = 0; n < N; ++n)
        for (int l = 0; l < lanes; ++l) sum[m][n][l] += pa[m][k + l] * pb[n][k + l];
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n) {
      float* s = sum[m][n];
      for (dim k = whole; k < b.cols; ++k) s[k - whole] += pa[m][k] * pb[n][k];
      c(i + m, j + n) += ((s[0] + s[4]) + (s[1] + s[5])) + ((s[2] + s[6]) + (s[3] + s[7]));
    }
}

/// M x (N lanes) outer products summed over k; element(k, m) is a's factor, row(k) is b's row.
template <int M, class Element, class Row>
void outer_block(dim depth, Element element, Row row, dim i, dim j, dim n, matrix_view<float> c) noexcept {
  constexpr int width = 2 * lanes;
  float sum[M][width] = {};
  if (n == width) {
    for (dim k = 0; k < depth; ++k) {
      const float* b = row(k) + j;
      for (int m = 0; m < M; ++m)
        for (int l = 0; l < width; ++l) sum[m][l] += element(k, i + m) * b[l];
    }
  } else {
    for (dim k = 0; k < depth; ++k) {
      const float* b = row(k) + j;
      for (int m = 0; m < M; ++m)
        for (dim l = 0; l < n; ++l) sum[m][l] += element(k, i + m) * b[l];
    }
  }
  for (int m = 0; m < M; ++m)
    for (dim l = 0; l < n; ++l) c(i + m, j + l) += sum[m][l];
}
template <class Element, class Row>
void outer_tile(dim depth, Element element, Row row, matrix_view<float> c) noexcept {
  for (dim j = 0; j < c.cols; j += 2 * lanes) {
    const dim n = c.cols - j < 2 * lanes ? c.cols - j : 2 * lanes;
    dim i = 0;
    for (; i + 4 <= c.rows; i += 4) outer_block<4>(depth, element, row, i, j, n, c);
    for (; i < c.rows; ++i) outer_block<1>(depth, element, row, i, j, n, c);
  }
}

}  // namespace detail

/// c[m,n] += a[m,k] b[n,k]^T
inline void gemm_nt(scalar, gathered<float> a, matrix_view<const float> b, matrix_view<float> c) noexcept {
  for (dim j = 0; j < c.cols;) {
    const dim n = c.cols - j >= 4 ? 4 : 1;
    dim i = 0;
    for (; i + 2 <= c.rows; i += 2) n == 4 ? detail::dot_block<2, 4>(a, i, b, j, c) : detail::dot_block<2, 1>(a, i, b, j, c);
    for (; i < c.rows; ++i) n == 4 ? detail::dot_block<1, 4>(a, i, b, j, c) : detail::dot_block<1, 1>(a, i, b, j, c);
    j += n;
  }
}
/// c[m,n] += a[m,k] b[k,n]
inline void gemm_nn(scalar, gathered<float> a, matrix_view<const float> b, matrix_view<float> c) noexcept {
  detail::outer_tile(b.rows, [&](dim k, dim i) { return a.row(i)[k]; }, [&](dim k) { return b.row(k); }, c);
}
/// c[m,n] += a[k,m]^T b[k,n], both over `depth` rows
inline void gemm_tn(scalar, gathered<float> a, gathered<float> b, dim depth, matrix_view<float> c) noexcept {
  detail::outer_tile(depth, [&](dim k, dim i) { return a.row(k)[i]; }, [&](dim k) { return b.row(k); }, c);
}
/// y[j] += w x[j]
MOE_HD inline void axpy(scalar, float w, const float* x, float* y, dim n) noexcept {
  for (dim j = 0; j < n; ++j) y[j] += w * x[j];
}
/// sum of x[j] y[j]
MOE_HD inline float dot(scalar, const float* x, const float* y, dim n) noexcept {
  float sum[detail::lanes] = {};
  dim j = 0;
  for (; j + detail::lanes <= n; j += detail::lanes)
    for (int l = 0; l < detail::lanes; ++l) sum[l] += x[j + l] * y[j + l];
  for (; j < n; ++j) sum[j % detail::lanes] += x[j] * y[j];
  return ((sum[0] + sum[4]) + (sum[1] + sum[5])) + ((sum[2] + sum[6]) + (sum[3] + sum[7]));
}
/// f(j, lane) for j in 0 .. n in steps of the lane's width: how an elementwise rule runs at the level of the build.
template <class F>
void for_each_lane(scalar, dim n, F f) noexcept {
  for (dim j = 0; j < n; ++j) f(j, scalar_lane{});
}

}  // namespace arch

/// The scalar backend.
template <class Ex = default_executor>
using scalar = host_backend<arch::scalar, Ex>;

}  // namespace moe
