// SPDX-License-Identifier: Apache-2.0
/// Products on a device: a block a tile of 64 x 64, both operands staged through shared memory, 4 x 4 sums a thread in
/// float32, added in the order of the reduced dimension. Contracts: backend/host_gemm.hpp.
#pragma once

#include "moe/backend/cuda/tiles.hpp"

namespace moe {

namespace detail {

/// The block program of a product P. P says what a tile is and where its numbers come from and go to:
///
///   outputs                    results that share the left operand
///   a_along_k, b_along_k       the operand is contiguous in the reduced dimension
///   tile(block)                its tile; depth(tile): the length of the reduced dimension
///   a(tile, i, k), b(tile, which, j, k)
///   store(tile, i, j, sums)    sums[outputs] of element i, j of the tile
template <class P>
struct product_program {
  static constexpr int threads = 256, side = static_cast<int>(tile_side), step_depth = 16, each = 4;
  static constexpr int padded = side + 4;  // rows of shared memory start in different banks
  struct shared { float a[step_depth][padded], b[P::outputs][step_depth][padded]; };
  struct local {
    block_tile tile;
    dim depth;
    float sum[P::outputs][each][each];
  };

  P product;

  MOE_HD dim begin(dim block, int, local& own) const noexcept {
    own.tile = product.tile(block);
    own.depth = own.tile.rows > 0 ? product.depth(own.tile) : 0;
    for (auto& output : own.sum)
      for (auto& row : output)
        for (float& s : row) s = 0;
    return (own.depth + step_depth - 1) / step_depth;
  }
  MOE_HD void load(dim step, int thread, shared& all, const local& own) const noexcept {
    const dim first = step * step_depth;
    for (int s = 0; s < each; ++s) {
      const at to = place(thread, s, P::a_along_k);
      all.a[to.k][to.i] = first + to.k < own.depth && to.i < own.tile.rows ? product.a(own.tile, to.i, first + to.k) : 0.f;
    }
    for (int which = 0; which < P::outputs; ++which)
      for (int s = 0; s < each; ++s) {
        const at to = place(thread, s, P::b_along_k);
        all.b[which][to.k][to.i] =
            first + to.k < own.depth && to.i < own.tile.columns ? product.b(own.tile, which, to.i, first + to.k) : 0.f;
      }
  }
  MOE_HD void use(dim, int thread, const shared& all, local& own) const noexcept {
    const int row = thread / each_side, column = thread % each_side;
    for (int k = 0; k < step_depth; ++k) {
      float a[each];
      for (int i = 0; i < each; ++i) a[i] = all.a[k][row + i * each_side];
      for (int which = 0; which < P::outputs; ++which)
        for (int j = 0; j < each; ++j) {
          const float b = all.b[which][k][column + j * each_side];
          for (int i = 0; i < each; ++i) own.sum[which][i][j] += a[i] * b;
        }
    }
  }
  MOE_HD void end(int thread, const local& own) const noexcept {
    const int row = thread / each_side, column = thread % each_side;
    MOE_UNROLL
    for (int i = 0; i < each; ++i) {
      MOE_UNROLL
      for (int j = 0; j < each; ++j) {
        float sums[P::outputs];
        for (int which = 0; which < P::outputs; ++which) sums[which] = own.sum[which][i][j];
        const int r = row + i * each_side, c = column + j * each_side;
        if (r < own.tile.rows && c < own.tile.columns) product.store(own.tile, r, c, sums);
      }
    }
  }

 private:
  static constexpr int each_side = side / each;
  struct at { int k, i; };
  /// Which element of a staged operand a thread brings: neighbours read neighbours.
  MOE_HD static at place(int thread, int s, bool along_k) noexcept {
    const int n = thread + s * threads;
    return along_k ? at{n % step_depth, n / step_depth} : at{n / side, n % side};
  }
};

/// out[r] += a[r] b[e]^T, or a[r] b[e] where not `Transposed`; with `Starts`, out[r] = bias[e] + the product.
template <bool Transposed, bool Starts = false>
struct row_product {
  static constexpr int outputs = 1;
  static constexpr bool a_along_k = true, b_along_k = Transposed;

  device_rows rows;
  gathered<float> left;
  matrix_stack<const float> right, bias;
  matrix_view<float> out;

  MOE_HD block_tile tile(dim block) const noexcept { return find_tile(rows, out.cols, block); }
  MOE_HD dim depth(const block_tile&) const noexcept { return Transposed ? right.first.cols : right.first.rows; }
  MOE_HD float a(const block_tile& t, dim i, dim k) const noexcept { return left.row(t.row + i)[k]; }
  MOE_HD float b(const block_tile& t, int, dim j, dim k) const noexcept {
    return Transposed ? right[t.expert](t.column + j, k) : right[t.expert](k, t.column + j);
  }
  MOE_HD void store(const block_tile& t, dim i, dim j, const float (&sum)[1]) const noexcept {
    float& to = out(t.row + i, t.column + j);
    if constexpr (Starts) to = (bias.first ? bias[t.expert](t.column + j, 0) : 0.f) + sum[0];
    else to += sum[0];
  }
};

/// c[e] += or, to replace it, = the sum over e's rows of a[r]^T b[r].
struct outer_product {
  static constexpr int outputs = 1;
  static constexpr bool a_along_k = false, b_along_k = false;

  device_rows rows;
  gathered<float> left, right;
  matrix_stack<float> out;
  gradient_mode mode;

  MOE_HD block_tile tile(dim block) const noexcept { return find_tile_of_stack(out.first.rows, out.first.cols, block); }
  MOE_HD dim depth(const block_tile& t) const noexcept { return rows.count(t.expert); }
  MOE_HD float a(const block_tile& t, dim i, dim k) const noexcept { return left.row(rows.at(t.expert) + k)[t.row + i]; }
  MOE_HD float b(const block_tile& t, int, dim j, dim k) const noexcept {
    return right.row(rows.at(t.expert) + k)[t.column + j];
  }
  MOE_HD void store(const block_tile& t, dim i, dim j, const float (&sum)[1]) const noexcept {
    float& to = out[t.expert](t.row + i, t.column + j);
    to = mode == gradient_mode::add ? to + sum[0] : sum[0];
  }
};

/// Blocks for a result of at most `room` rows.
inline dim product_blocks(const device_rows& rows, dim room, dim width) noexcept {
  return most_row_tiles(room, rows.experts) * tiles_of(width);
}
template <class B, class P>
void run_row_product(const call<B>& on, const P& p) noexcept {
  on.backend.run(product_blocks(p.rows, p.out.rows, p.out.cols), product_program<P>{p});
}
template <class B>
void run_outer_product(const call<B>& on, const outer_product& p) noexcept {
  const dim tiles = tiles_of(p.out.first.rows) * tiles_of(p.out.first.cols);
  on.backend.run(p.rows.experts * tiles, product_program<outer_product>{p});
}

}  // namespace detail

template <DeviceBackend B>
void grouped_gemm_nt(const call<B>& on, const bank_rows& rows, gathered<float> a, matrix_stack<const float> b,
                     matrix_view<float> out) noexcept {
  detail::run_row_product(on, detail::row_product<true>{detail::device_rows(rows), a, b, {}, out});
}
template <DeviceBackend B>
void grouped_gemm_nt(const call<B>& on, const bank_rows& rows, gathered<float> a, matrix_stack<const float> b,
                     matrix_stack<const float> bias, matrix_view<float> out) noexcept {
  detail::run_row_product(on, detail::row_product<true, true>{detail::device_rows(rows), a, b, bias, out});
}
template <DeviceBackend B>
void grouped_gemm_nn(const call<B>& on, const bank_rows& rows, gathered<float> a, matrix_stack<const float> b,
                     matrix_view<float> out) noexcept {
  detail::run_row_product(on, detail::row_product<false>{detail::device_rows(rows), a, b, {}, out});
}
template <DeviceBackend B>
void grouped_dgrad(const call<B>& on, const bank_rows& rows, gathered<float> dz, matrix_stack<const float> w,
                   gathered<float> dz2, matrix_stack<const float> w2, matrix_view<float> dx) noexcept {
  detail::run_row_product(on, detail::row_product<false, true>{detail::device_rows(rows), dz, w, {}, dx});
  if (w2.first) grouped_gemm_nn(on, rows, dz2, w2, dx);
}
template <DeviceBackend B>
void grouped_gemm_tn(const call<B>& on, const bank_rows& rows, gathered<float> a, gathered<float> b,
                     matrix_stack<float> c) noexcept {
  detail::run_outer_product(on, detail::outer_product{detail::device_rows(rows), a, b, c, gradient_mode::add});
}
template <class W, DeviceBackend B>
  requires std::same_as<W, float>
void grouped_wgrad(const call<B>& on, const bank_rows& rows, gathered<float> a, gathered<float> b, matrix_stack<float> c,
                   gradient_mode mode) noexcept {
  detail::run_outer_product(on, detail::outer_product{detail::device_rows(rows), a, b, c, mode});
}
template <class W, DeviceBackend B>
  requires std::same_as<W, float>
void grouped_wgrad(const call<B>& on, const bank_rows& rows, gathered<float> a, gathered<float> b, matrix_stack<float> c,
                   gathered<float> a2, matrix_stack<float> c2, gradient_mode mode) noexcept {
  if (c.first) grouped_wgrad<W>(on, rows, a, b, c, mode);
  if (c2.first) grouped_wgrad<W>(on, rows, a2, b, c2, mode);
}

template <DeviceBackend B>
void gemm_nt(const call<B>& on, matrix_view<const float> a, matrix_view<const float> b, matrix_view<float> c) noexcept {
  detail::run_row_product(on, detail::row_product<true>{detail::device_rows(a.rows), {a}, {b, 0}, {}, c});
}
template <DeviceBackend B>
void gemm_nt(const call<B>& on, matrix_view<const float> a, matrix_view<const float> b, matrix_view<const float> bias,
             matrix_view<float> c) noexcept {
  detail::run_row_product(on, detail::row_product<true, true>{detail::device_rows(a.rows), {a}, {b, 0}, {bias, 0}, c});
}
template <DeviceBackend B>
void gemm_nn(const call<B>& on, matrix_view<const float> a, matrix_view<const float> b, matrix_view<float> c) noexcept {
  detail::run_row_product(on, detail::row_product<false>{detail::device_rows(a.rows), {a}, {b, 0}, {}, c});
}
template <DeviceBackend B>
void gemm_tn(const call<B>& on, matrix_view<const float> a, matrix_view<const float> b, matrix_view<float> c) noexcept {
  detail::run_outer_product(on, detail::outer_product{detail::device_rows(a.rows), {a}, {b}, {c, 0}, gradient_mode::add});
}

}  // namespace moe
