// SPDX-License-Identifier: Apache-2.0
/// One tile of a product on one thread, from the blocks `K` of a level: lane_blocks, or a class with the same functions.
/// Weights of type W are float or bf16; bf16 are widened to floats as they are read, or packed. Nothing is allocated.
///
/// Each element of a result has one order of additions, which depends on the reduced dimension alone: neither on the other
/// rows and columns of the tile nor on its place among them. There are two orders for a b^T: dot products, which read each
/// weight once in the order of memory, for few rows; and outer products with weights that were packed, for many.
#pragma once

#include <cstring>
#include <type_traits>
#include <utility>

#include "moe/backend/host_blocks.hpp"

namespace moe::arch {

namespace detail {

/// f(n) with n as a constant of 1 .. N: the block that is as high as what is left. Nothing for other n.
template <int N, class F>
void with_constant(dim n, F f) noexcept {
  [&]<int... I>(std::integer_sequence<int, I...>) {
    (void)((n == I + 1 ? (f(std::integral_constant<int, I + 1>{}), true) : false) || ...);
  }(std::make_integer_sequence<int, N>{});
}
using moe::detail::at_most, moe::detail::blocks, moe::detail::round_up;

/// How far a dot product goes before its lanes are summed: that much of `streams` weight rows stays in the nearest cache.
inline constexpr dim dot_depth = 1024;

/// All rows of a tile against N columns of it. While one block works, the weights of the next come nearer: `next` is where
/// they lie, and each block of rows asks for its share. A block alone asks for its own, a kilobyte ahead.
template <class K, int N, class W>
void dot_columns(gathered<float> a, dim first, dim k, const W* b, dim stride, const W* next, matrix_view<float> c,
                 dim step) noexcept {
  constexpr int M = K::dot_rows;
  const dim turns = blocks(c.rows, M), line = K::width * dim{sizeof(W)}, pace = blocks(line, turns);
  prefetch_walk ahead{reinterpret_cast<const char*>(turns == 1 ? b + 1024 / sizeof(W) : next), pace};
  dim i = 0;
  for (; i + M <= c.rows; i += M, ahead.at += pace * (k / K::width))
    K::template dot_block<M, N>(a, i, first, k, b, stride, ahead, c, step);
  with_constant<M - 1>(c.rows - i, [&](auto m) { K::template dot_block<m, N>(a, i, first, k, b, stride, ahead, c, step); });
}

/// Few rows follow each weight row to its end, as it lies in memory; more stay within one depth, so that they, too, are read
/// from a near cache.
template <class K, int N, class W>
void dot_tile(gathered<float> a, matrix_view<const W> b, dim stride, matrix_view<float> c, dim step) noexcept {
  const dim cuts = blocks(b.cols, dot_depth);
  const bool few = c.rows <= K::dot_rows;
  const auto row_of = [&](dim i) { return few ? i / cuts : i % step; };
  const auto first_of = [&](dim i) { return (few ? i % cuts : i / step) * dot_depth; };
  for (dim i = 0; i < step * cuts; ++i) {
    const dim j = row_of(i), first = first_of(i), k = at_most(b.cols - first, dot_depth);
    dot_columns<K, N>(a, first, k, b.row(j) + first, stride, b.row(row_of(i + 1)) + first_of(i + 1),
                      c.columns(j, c.cols - j), step);
  }
}

/// c[m,n] += a[m,k] b[n,k]^T by dot products. The rows of b are read as four streams, each a quarter of the tile and
/// contiguous.
template <class K, class W>
void product_nt(gathered<float> a, matrix_view<const W> b, matrix_view<float> c) noexcept {
  const dim step = c.cols / streams, whole = step * streams;
  dot_tile<K, streams>(a, b, step * b.ld, c, step);
  dot_tile<K, 1>(a, b.slice(whole, c.cols - whole), 0, c.columns(whole, c.cols - whole), c.cols - whole);
}

/// Weights as blocks of outer products read them: block after block of columns, in each row after row, filled up with zeros.
template <class K>
float* packed_place(float* packed, dim depth, dim p, dim j) noexcept {
  return packed + j / K::columns * depth * K::columns + p * K::columns + j % K::columns;
}
/// Rows of n <= outer_columns elements.
template <class K, class Row>
void pack(Row row, dim depth, dim n, float* packed) noexcept {
  constexpr dim columns = K::columns;
  for (dim p = 0; n == columns && p < depth; ++p) K::widen(row(p), packed + p * columns, columns);
  for (dim p = 0; n != columns && p < depth; ++p) {
    const auto* from = row(p);
    for (dim j = 0; j < n; j += columns) {
      float* to = packed_place<K>(packed, depth, p, j);
      const dim some = at_most(n - j, columns);
      K::widen(from + j, to, some);
      for (dim l = some; l < columns; ++l) to[l] = 0;
    }
  }
}
/// K::width columns of that, from n of as many rows: element first + p of row l goes to to[p * K::columns + l].
template <class K>
void pack_strip(const float* const* row, dim n, dim first, dim depth, float* to) noexcept {
  constexpr dim W = K::width;
  dim p = 0;
  for (; n == W && p + W <= depth; p += W) K::transpose(row, first + p, to + p * K::columns);
  for (; p < depth; ++p)
    for (dim l = 0; l < W; ++l) to[p * K::columns + l] = l < n ? row[l][first + p] : 0.f;
}
/// Columns of at most outer_columns rows of b: element p of a row j goes to row p.
template <class K, class T>
void pack_transposed(matrix_view<const T> b, dim first, dim depth, float* packed) noexcept {
  constexpr dim W = K::width;
  for (dim j = 0; j < round_up(b.rows, K::columns); j += W) {
    const dim n = b.rows - j < W ? (b.rows > j ? b.rows - j : 0) : W;
    const float* row[W];
    if constexpr (std::same_as<T, float>) {
      for (dim l = 0; l < n; ++l) row[l] = b.row(j + l);
      pack_strip<K>(row, n, first, depth, packed_place<K>(packed, depth, 0, j));
    } else {
      alignas(64) float wide[W * outer_depth];
      for (dim l = 0; l < n; ++l) {
        K::widen(b.row(j + l) + first, wide + l * outer_depth, depth);
        row[l] = wide + l * outer_depth;
      }
      pack_strip<K>(row, n, 0, depth, packed_place<K>(packed, depth, 0, j));
    }
  }
}

/// c += the sum over p of a[i][first + p] times row p of what was packed, which is as wide as c. While a block works,
/// the rows of the next come nearer, those of c where they lie far from each other, and its share of the pieces that are
/// packed next, next(0 .. pieces).
template <class K, class Next>
void outer_tile(gathered<float> a, dim first, const float* packed, dim depth, matrix_view<float> c, dim pieces,
                Next next) noexcept {
  constexpr int M = outer_rows;
  constexpr dim columns = K::columns;
  if (c.rows == 0 || c.cols == 0) return;
  const dim turns = blocks(c.cols, columns) * blocks(c.rows, M), share = blocks(pieces, turns);
  float padded[M * columns];
  for (dim j = 0, piece = 0; j < c.cols; j += columns, packed += depth * columns)
    for (dim i = 0, m; i < c.rows; i += m) {
      const dim rest = c.rows - i, n = at_most(c.cols - j, columns);
      m = rest > M * (M - 1) ? M : blocks(rest, blocks(rest, M));  // the last blocks are of nearly equal height
      prefetch_list ahead(packed);
      for (dim s = 0; s < share && piece < pieces; ++s, ++piece) ahead.add(next(piece));
      for (dim r = i + m; r < at_most(i + m + M, c.rows); ++r) {
        ahead.add(a.row(r) + first);
        if (c.ld > outer_columns) ahead.add(c.row(r) + j);
      }
      const matrix_view<float> to = c.slice(i, m).columns(j, n);
      const bool whole = n == columns;
      for (dim r = 0; !whole && r < m; ++r)
        for (dim l = 0; l < columns; ++l) padded[r * columns + l] = l < n ? to(r, l) : 0.f;
      with_constant<M>(m, [&](auto rows) {
        K::template outer_block<rows>(a, i, first, packed, depth, ahead, whole ? to.data : padded,
                                      whole ? to.ld : columns);
      });
      for (dim r = 0; !whole && r < m; ++r)
        for (dim l = 0; l < n; ++l) to(r, l) = padded[r * columns + l];
    }
}

/// c[m,n] += a[m,k] b[n,k]^T by outer products: every cut of b is packed once for all rows.
template <class K, class W>
void product_nt_packed(gathered<float> a, matrix_view<const W> b, matrix_view<float> c) noexcept {
  alignas(64) float packed[outer_depth * outer_columns];
  for (dim j = 0; j < c.cols; j += outer_columns)
    for (dim first = 0; first < b.cols; first += outer_depth) {
      const dim depth = at_most(b.cols - first, outer_depth), n = at_most(c.cols - j, outer_columns), after = first + depth;
      pack_transposed<K, W>(b.slice(j, n), first, depth, packed);
      outer_tile<K>(a, first, packed, depth, c.columns(j, n), after < b.cols ? n : 0,
                    [&](dim l) { return b.row(j + l) + after; });
    }
}

/// c[m,n] += a[m,k] b[k,n]
template <class K, class W>
void product_nn(gathered<float> a, matrix_view<const W> b, matrix_view<float> c) noexcept {
  alignas(64) float packed[outer_depth * outer_columns];
  for (dim j = 0; j < c.cols; j += outer_columns)
    for (dim first = 0; first < b.rows; first += outer_depth) {
      const dim depth = at_most(b.rows - first, outer_depth), n = at_most(c.cols - j, outer_columns), after = first + depth;
      pack<K>([&](dim p) { return b.row(first + p) + j; }, depth, n, packed);
      outer_tile<K>(a, first, packed, depth, c.columns(j, n), at_most(b.rows - after, outer_depth),
                    [&](dim p) { return b.row(after + p) + j; });
    }
}

/// Columns of a in a tile of product_tn: they are transposed for all columns of b, which are packed for all of them. More
/// would not fit the stack of every thread.
inline constexpr dim gradient_rows = 128;

/// Row i of the result, outer_depth floats long = column i of n columns of a, from row `first` on.
template <class K>
void transpose_rows(gathered<float> a, dim first, dim depth, dim n, float* to) noexcept {
  constexpr dim W = K::width;
  for (dim p = 0; p < depth; p += W) {
    const float* row[W];
    const bool whole = p + W <= depth;
    for (dim l = 0; l < at_most(depth - p, W); ++l) row[l] = a.row(first + p + l);
    dim i = 0;
    for (; whole && i + W <= n; i += W) K::template transpose<outer_depth>(row, i, to + i * outer_depth + p);
    for (; i < n; ++i)
      for (dim l = 0; l < at_most(depth - p, W); ++l) to[i * outer_depth + p + l] = row[l][i];
  }
}

/// c[m,n] += a[k,m]^T b[k,n], both over `depth` rows
template <class K>
void product_tn(gathered<float> a, gathered<float> b, dim depth, matrix_view<float> c) noexcept {
  alignas(64) float left[gradient_rows * outer_depth];
  alignas(64) float right[outer_columns * outer_depth];
  const dim strips = blocks(c.cols, outer_columns);
  for (dim i = 0; i < c.rows; i += gradient_rows) {
    const dim m = at_most(c.rows - i, gradient_rows);
    gathered<float> mine = a;
    mine.source = mine.source.columns(i, m);
    for (dim first = 0; first < depth; first += outer_depth) {
      const dim k = at_most(depth - first, outer_depth);
      const dim after = at_most(depth - first - k, outer_depth), share = blocks(after, strips);
      transpose_rows<K>(mine, first, k, m, left);
      for (dim j = 0; j < c.cols; j += outer_columns) {
        // What is needed next comes nearer: the columns of b that are packed next, and a share of the next rows of a.
        const dim n = at_most(c.cols - j, outer_columns), row = j / outer_columns * share;
        const bool done = j + n == c.cols;
        const dim from = done ? first + k : first, at = done ? 0 : j + n, rows = done ? after : k;
        const dim more = row < after ? at_most(after - row, share) : 0;
        pack<K>([&](dim p) { return b.row(first + p) + j; }, k, n, right);
        outer_tile<K>(gathered<float>{{left, m, outer_depth}}, 0, right, k, c.slice(i, m).columns(j, n), rows + more,
                      [&](dim p) { return p < rows ? b.row(from + p) + at : mine.row(first + k + row + p - rows); });
      }
    }
  }
}

}  // namespace detail

/// Products with bf16 weights of rows that were rounded to bf16 before, and gradients of such weights. They work in `room`,
/// aligned to a line.
struct half_kernels {
  /// To nearest even, the halves may lie where the floats lay. Null: this level multiplies floats.
  void (*round)(const float*, bf16*, dim) noexcept = nullptr;
  /// The same for halves that are not read again soon. Others read them after `settle` and the next join.
  void (*round_past)(const float*, bf16*, dim) noexcept = nullptr;
  void (*settle)() noexcept = nullptr;
  /// A copy for results that are not read again soon.
  void (*stream)(matrix_view<const float> from, matrix_view<float> to) noexcept = nullptr;
  dim (*product_room)(dim n) noexcept = nullptr;          ///< bytes for gemm_nt and gemm_nn
  dim (*gradient_room)(dim m, dim n) noexcept = nullptr;  ///< bytes for gemm_tn
  /// c[m,n] = or, where `add`, += a[m,k] b[n,k]^T. Rows of c have room for whole blocks of 32. `out`, which may be empty,
  /// gets a copy, as from `stream`. `next`, which may be empty, are the weights of the product after this one.
  void (*gemm_nt)(matrix_view<const bf16> a, matrix_view<const bf16> b, matrix_view<float> c, bool add,
                  matrix_view<float> out, matrix_view<const bf16> next, std::byte* room) noexcept = nullptr;
  /// The same of a[m,k] b[k,n].
  void (*gemm_nn)(matrix_view<const bf16> a, matrix_view<const bf16> b, matrix_view<float> c, bool add,
                  matrix_view<float> out, std::byte* room) noexcept = nullptr;
  /// c[m,n] = or, where `add`, += a[k,m]^T b[k,n] and, where there is a c2, c2[m,n] likewise of a2[k,m]^T b. k may be 0.
  /// Others read c after the next join.
  void (*gemm_tn)(matrix_view<const bf16> a, matrix_view<const bf16> b, matrix_view<float> c, matrix_view<const bf16> a2,
                  matrix_view<float> c2, bool add, std::byte* room) noexcept = nullptr;
};

/// What a level computes products of float32 rows with bf16 weights with, and the float32 gradients of such weights: the
/// products of float32 by another type of weights, chosen at run time. Results add to c. A level that rounds rows has the
/// first of them, for few rows, and half_kernels.
struct mixed_kernels {
  void (*gemm_nt)(gathered<float>, matrix_view<const bf16>, matrix_view<float>) noexcept;
  void (*gemm_nt_packed)(gathered<float>, matrix_view<const bf16>, matrix_view<float>) noexcept;
  void (*gemm_nn)(gathered<float>, matrix_view<const bf16>, matrix_view<float>) noexcept;
  void (*gemm_tn)(gathered<float>, gathered<float>, dim, matrix_view<float>) noexcept;
  half_kernels halves = {};
};

namespace detail {

template <class K>
inline constexpr mixed_kernels mixed_from_blocks{
    &product_nt<K, bf16>, &product_nt_packed<K, bf16>, &product_nn<K, bf16>, &product_tn<K>};

}  // namespace detail
}  // namespace moe::arch
