// SPDX-License-Identifier: Apache-2.0
/// Primitives on the host: how work is cut into tiles and shared between threads. The tiles follow from shapes and plan,
/// never from the number of threads; each element of a result has one writer and one order of additions, so results are
/// equal bit for bit for any executor. What a tile computes is a kernel, overloaded on the architecture's tag.
#pragma once

#include <concepts>
#include <limits>
#include <span>

#include "moe/core/call.hpp"
#include "moe/core/executor.hpp"
#include "moe/core/plan.hpp"
#include "moe/core/types.hpp"

namespace moe {

/// A backend on the host: kernels of level `Arch`, tiles run by `Ex`.
template <class Arch, class Ex>
  requires Executor<Ex>
struct host_backend {
  using space = host;
  using arch = Arch;
  [[no_unique_address]] Ex threads;

  constexpr host_backend() noexcept
    requires std::default_initializable<Ex>
      : threads() {}
  host_backend(Ex ex) noexcept : threads(ex) {}
  const Ex& executor() const noexcept { return threads; }
};

/// A backend whose memory the calling thread can read.
template <class B>
concept HostBackend = std::same_as<typename B::space, host>;

/// Loads and stores one float: the lane of elementwise rules where there is no vector type.
struct scalar_lane {
  using value = float;
  static float load(const float* p) noexcept { return *p; }
  static void store(float* p, float v) noexcept { *p = v; }
  static float sum(float v) noexcept { return v; }
};

namespace detail {

inline constexpr dim panel = 64;      // weight rows of a tile
inline constexpr dim row_block = 64;  // plan rows of a tile
inline constexpr dim row_chunk = 512; // plan rows of a tile that keeps its panel

inline dim at_most(dim n, dim bound) noexcept { return n < bound ? n : bound; }
inline dim blocks(dim n, dim size) noexcept { return (n + size - 1) / size; }

/// f(e, first row, rows, first column, columns) over tiles of an expert's rows and `width` columns.
template <HostBackend B, class F>
void for_each_tile(const call<B>& on, std::span<const idx> offsets, dim width, F f) noexcept {
  const dim experts = static_cast<dim>(offsets.size()) - 1, panels = blocks(width, panel);
  const auto at = [&](dim e) { return dim{offsets[static_cast<std::size_t>(e)]}; };
  dim tallest = 0;
  for (dim e = 0; e < experts; ++e) tallest = at(e + 1) - at(e) > tallest ? at(e + 1) - at(e) : tallest;
  const dim chunks = blocks(tallest, row_chunk);
  on.executor().for_each(experts * panels * chunks, 1, [&](dim unit, dim last) {
    for (; unit < last; ++unit) {
      const dim e = unit / (panels * chunks), j = unit / chunks % panels * panel;
      const dim begin = at(e) + unit % chunks * row_chunk, end = at_most(at(e + 1), begin + row_chunk);
      for (dim r = begin; r < end; r += row_block) f(e, r, at_most(end - r, row_block), j, at_most(width - j, panel));
    }
  });
}

/// f(e, first, last) over blocks of rows that lie in one expert.
template <HostBackend B, class F>
void for_each_block(const call<B>& on, const bank_rows& rows, F f) noexcept {
  const dim first = rows.first(), n = rows.last() - first;
  on.executor().for_each(n, row_block, [&](dim a, dim b) {
    dim e = 0;
    const auto end = [&] { return dim{rows.offsets[static_cast<std::size_t>(e) + 1]} - first; };
    while (a < b) {
      while (end() <= a) ++e;
      const dim stop = at_most(b, end());
      f(e, first + a, first + stop);
      a = stop;
    }
  });
}

}  // namespace detail

/// m = v
template <HostBackend B, class T>
void fill(const call<B>& on, matrix_view<T> m, T v) noexcept {
  on.executor().for_each(m.rows, 256, [&](dim r, dim last) {
    for (; r < last; ++r)
      for (dim c = 0; c < m.cols; ++c) m(r, c) = v;
  });
}
/// m[r] = v for the rows of a bank
template <HostBackend B>
void fill_rows(const call<B>& on, const bank_rows& rows, matrix_view<float> m, float v) noexcept {
  fill(on, m.slice(rows.first(), rows.last() - rows.first()), v);
}
/// to = from
template <HostBackend B, class T>
void copy(const call<B>& on, matrix_view<const T> from, matrix_view<T> to) noexcept {
  on.executor().for_each(to.rows, 256, [&](dim r, dim last) {
    for (; r < last; ++r)
      for (dim c = 0; c < to.cols; ++c) to(r, c) = from(r, c);
  });
}

/// to += from
template <HostBackend B>
void add(const call<B>& on, matrix_view<const float> from, matrix_view<float> to) noexcept {
  for_each_token(on, to.rows, [&](dim t) { axpy(typename B::arch{}, 1.f, from.row(t), to.row(t), to.cols); });
}

/// f(e, r) for every row r of a bank, e counted from the bank's first expert. `f` is called from many threads.
template <HostBackend B, class F>
void for_each_row(const call<B>& on, const bank_rows& rows, F f) noexcept {
  detail::for_each_block(on, rows, [&](dim e, dim r, dim last) {
    for (; r < last; ++r) f(e, r);
  });
}
/// The rows of a layer that every token passes through: one expert, row t is token t. Its offsets live in scratch.
template <HostBackend B>
bank_rows dense_rows(const call<B>& on) noexcept {
  const std::span<idx> offsets = on.scratch.template vector<idx>("offsets", 2);
  offsets[0] = 0;
  offsets[1] = static_cast<idx>(on.sizes.tokens);
  bank_rows rows;
  rows.offsets = offsets;
  return rows;
}
/// f(t) for every t in 0 .. n.
template <HostBackend B, class F>
void for_each_token(const call<B>& on, dim n, F f) noexcept {
  on.executor().for_each(n, 16, [&](dim t, dim last) {
    for (; t < last; ++t) f(t);
  });
}
/// ys(r, j) = f(e, r, j) for every row of a bank.
template <HostBackend B, class F>
void map_rows(const call<B>& on, const bank_rows& rows, matrix_view<float> ys, F f) noexcept {
  for_each_row(on, rows, [&](dim e, dim r) {
    for (dim j = 0; j < ys.cols; ++j) ys(r, j) = f(e, r, j);
  });
}
/// v[e] += the sum of e's rows, each times its weight where `xs` has weights.
template <HostBackend B>
void sum_rows(const call<B>& on, const bank_rows& rows, gathered<float> xs, matrix_view<float> v) noexcept {
  on.executor().for_each(rows.experts(), 1, [&](dim e, dim last) {
    for (; e < last; ++e)
      for (dim r = rows.offsets[static_cast<std::size_t>(e)]; r < rows.offsets[static_cast<std::size_t>(e) + 1]; ++r)
        axpy(typename B::arch{}, xs.scale(r), xs.row(r), v.row(e), v.cols);
  });
}
template <HostBackend B>
void sum_rows(const call<B>& on, const bank_rows& rows, matrix_view<const float> xs, matrix_view<float> v) noexcept {
  sum_rows(on, rows, gathered<float>{xs}, v);
}
template <HostBackend B>
void sum_rows(const call<B>& on, const bank_rows& rows, matrix_view<float> xs, matrix_view<float> v) noexcept {
  sum_rows(on, rows, gathered<float>{xs}, v);
}

/// The same into a column per expert, v[e](j, 0), as biases are laid out.
template <HostBackend B>
void sum_rows(const call<B>& on, const bank_rows& rows, gathered<float> xs, matrix_stack<float> v) noexcept {
  on.executor().for_each(rows.experts(), 1, [&](dim e, dim last) {
    for (; e < last; ++e) {
      const matrix_view<float> to = v[e];
      for (dim r = rows.offsets[static_cast<std::size_t>(e)]; r < rows.offsets[static_cast<std::size_t>(e) + 1]; ++r)
        for (dim j = 0; j < to.rows; ++j) to(j, 0) += xs.scale(r) * xs.row(r)[j];
    }
  });
}
/// s[r] += <x[r], v[e]> for every row of a bank, unweighted.
template <HostBackend B>
void dot_rows(const call<B>& on, const bank_rows& rows, gathered<float> xs, matrix_view<const float> v,
              std::span<float> s) noexcept {
  for_each_row(on, rows, [&](dim e, dim r) {
    s[static_cast<std::size_t>(r)] += dot(typename B::arch{}, xs.row(r), v.row(e), v.cols);
  });
}
/// s[r] += <x[r], z[r]> for every row of a bank, unweighted.
template <HostBackend B>
void dot_rows(const call<B>& on, const bank_rows& rows, gathered<float> xs, gathered<float> zs, std::span<float> s) noexcept {
  for_each_row(on, rows, [&](dim, dim r) {
    s[static_cast<std::size_t>(r)] += dot(typename B::arch{}, xs.row(r), zs.row(r), xs.cols());
  });
}
/// m[r] = v[e] for every row of a bank, v[e] a column per expert or empty for 0.
template <HostBackend B>
void start_rows(const call<B>& on, const bank_rows& rows, matrix_view<float> m, matrix_stack<const float> v) noexcept {
  for_each_row(on, rows, [&](dim e, dim r) {
    const matrix_view<const float> bias = v[e];
    for (dim j = 0; j < m.cols; ++j) m(r, j) = v.first ? bias(j, 0) : 0.f;
  });
}

/// out[r] += a[r] b[e]^T for every row of a bank: a[A,k] read through the plan, b[e] of n x k, out[A,n].
template <HostBackend B>
void grouped_gemm_nt(const call<B>& on, const bank_rows& rows, gathered<float> a, matrix_stack<const float> b,
                     matrix_view<float> out) noexcept {
  detail::for_each_tile(on, rows.offsets, b.first.rows, [&](dim e, dim r, dim m, dim j, dim n) {
    gemm_nt(typename B::arch{}, a.from(r), b[e].slice(j, n), out.slice(r, m).columns(j, n));
  });
}
/// out[r] += a[r] b[e] for every row of a bank: a[A,k] read through the plan, b[e] of k x n, out[A,n].
template <HostBackend B>
void grouped_gemm_nn(const call<B>& on, const bank_rows& rows, gathered<float> a, matrix_stack<const float> b,
                     matrix_view<float> out) noexcept {
  detail::for_each_tile(on, rows.offsets, b.first.cols, [&](dim e, dim r, dim m, dim j, dim n) {
    gemm_nn(typename B::arch{}, a.from(r), b[e].columns(j, n), out.slice(r, m).columns(j, n));
  });
}
/// c[e] += the sum over e's rows of a[r]^T b[r]: a[A,m] and b[A,n] read through the plan, c[e] of m x n.
template <HostBackend B>
void grouped_gemm_tn(const call<B>& on, const bank_rows& rows, gathered<float> a, gathered<float> b,
                     matrix_stack<float> c) noexcept {
  const dim panels = detail::blocks(c.first.rows, detail::panel);
  on.executor().for_each(rows.experts() * panels, 1, [&](dim unit, dim last) {
    for (; unit < last; ++unit) {
      const dim e = unit / panels, i = unit % panels * detail::panel, m = detail::at_most(c.first.rows - i, detail::panel);
      const dim r = rows.offsets[static_cast<std::size_t>(e)], depth = rows.offsets[static_cast<std::size_t>(e) + 1] - r;
      gathered<float> left = a.from(r);
      left.source = left.source.columns(i, m);
      gemm_tn(typename B::arch{}, left, b.from(r), depth, c[e].slice(i, m));
    }
  });
}

/// c[m,n] += a[m,k] b[n,k]^T
template <HostBackend B>
void gemm_nt(const call<B>& on, matrix_view<const float> a, matrix_view<const float> b, matrix_view<float> c) noexcept {
  const idx offsets[] = {0, static_cast<idx>(a.rows)};
  grouped_gemm_nt(on, {.offsets = offsets}, {a}, {b, 0}, c);
}
/// c[m,n] += a[m,k] b[k,n]
template <HostBackend B>
void gemm_nn(const call<B>& on, matrix_view<const float> a, matrix_view<const float> b, matrix_view<float> c) noexcept {
  const idx offsets[] = {0, static_cast<idx>(a.rows)};
  grouped_gemm_nn(on, {.offsets = offsets}, {a}, {b, 0}, c);
}
/// c[m,n] += a[k,m]^T b[k,n]
template <HostBackend B>
void gemm_tn(const call<B>& on, matrix_view<const float> a, matrix_view<const float> b, matrix_view<float> c) noexcept {
  const idx offsets[] = {0, static_cast<idx>(a.rows)};
  grouped_gemm_tn(on, {.offsets = offsets}, {a}, {b}, {c, 0});
}

/// f(t, r) for every row r of token t that lies in this bank, in the order of the token's choices, one thread a token.
template <HostBackend B, class F>
void for_each_row_by_token(const call<B>& on, const bank_rows& rows, F f) noexcept {
  const dim first = rows.first(), last = rows.last();
  if (rows.token_offsets.empty()) return for_each_token(on, last - first, [&](dim i) { f(i + first, i + first); });
  for_each_token(on, rows.tokens(), [&](dim t) {
    for (idx i = rows.token_offsets[static_cast<std::size_t>(t)]; i < rows.token_offsets[static_cast<std::size_t>(t) + 1]; ++i)
      if (const dim r = rows.position[static_cast<std::size_t>(i)]; r >= first && r < last) f(t, r);
  });
}
/// to[t] += the rows of token t that lie in this bank, each times its weight where `from` has weights, in the order of the
/// token's choices. Without token_offsets row r is token r.
template <HostBackend B>
void scatter_add_rows(const call<B>& on, const bank_rows& rows, gathered<float> from, matrix_view<float> to) noexcept {
  for_each_row_by_token(on, rows, [&](dim t, dim r) {
    axpy(typename B::arch{}, from.scale(r), from.row(r), to.row(t), to.cols);
  });
}

/// y[t] += the sum over t's rows of weight[r] ys[r], in the order of its choices.
template <HostBackend B, class Rows>
void combine_rows(const call<B>& on, const routing_plan& p, const Rows& ys, std::span<const float> weight,
                  matrix_view<float> y) noexcept {
  for_each_token(on, p.tokens(), [&](dim t) {
    for (idx i = p.token_offsets[static_cast<std::size_t>(t)]; i < p.token_offsets[static_cast<std::size_t>(t) + 1]; ++i)
      if (const idx r = p.position[static_cast<std::size_t>(i)]; r >= 0)
        add_one_row(typename B::arch{}, ys, r, weight.empty() ? 1.f : weight[static_cast<std::size_t>(r)], y.row(t), y.cols);
  });
}

/// For experts that store rows: dys[r] = weight[r] dy[token[r]] and dweight[r] += <dy[token[r]], ys[r]>.
template <HostBackend B>
void split_row_gradient(const call<B>& on, const bank_rows& rows, gathered<float> dy, matrix_view<const float> ys,
                        matrix_view<float> dys, std::span<float> dweight) noexcept {
  for_each_row(on, rows, [&](dim, dim r) {
    dweight[static_cast<std::size_t>(r)] += dot(typename B::arch{}, dy.row(r), ys.row(r), ys.cols);
    for (dim j = 0; j < dys.cols; ++j) dys(r, j) = dy.scale(r) * dy.row(r)[j];
  });
}

/// The K largest eligible keys of each token, ties to the lower expert: token_offsets is set and position holds the
/// chosen experts, best first, as group_by_expert reads them.
template <int K, HostBackend B>
void top_k_rows(const call<B>& on, matrix_view<const float> keys, routing_plan& p) noexcept {
  const auto at = [](dim i) { return static_cast<std::size_t>(i); };
  for_each_token(on, keys.rows, [&](dim t) {
    float best[K];
    idx* chosen = p.position.data() + t * K;
    int n = 0;
    for (idx e = 0; e < keys.cols; ++e) {
      const float key = keys(t, e);
      if (!(key > -std::numeric_limits<float>::infinity()) || (n == K && !(key > best[K - 1]))) continue;
      int j = n < K ? n++ : K - 1;
      for (; j > 0 && key > best[j - 1]; --j) {
        best[j] = best[j - 1];
        chosen[j] = chosen[j - 1];
      }
      best[j] = key;
      chosen[j] = e;
    }
    p.token_offsets[at(t + 1)] = n;
  });
  idx total = 0;  // tokens with fewer choices close up
  p.token_offsets[0] = 0;
  for (dim t = 0; t < keys.rows; ++t) {
    const idx n = p.token_offsets[at(t + 1)];
    if (total != t * K)
      for (idx j = 0; j < n; ++j) p.position[at(total + j)] = p.position[at(t * K + j)];
    p.token_offsets[at(t + 1)] = total += n;
  }
}

/// Groups assignments by expert. On entry token_offsets is set and position holds, for each choice of a token, its expert
/// e, or -1 - e where it was dropped; on return the plan is whole but for its weights.
template <HostBackend B>
void group_by_expert(const call<B>&, routing_plan& p) noexcept {
  const auto at = [](dim i) { return static_cast<std::size_t>(i); };
  for (idx& o : p.offsets) o = 0;
  const idx choices = p.token_offsets.back();
  for (idx i = 0; i < choices; ++i)
    if (const idx e = p.position[at(i)]; e >= 0) ++p.offsets[at(e) + 1];
  for (std::size_t e = 1; e < p.offsets.size(); ++e) p.offsets[e] += p.offsets[e - 1];
  // offsets[e] walks from the first to the last row of e, then the array is moved back by one expert.
  for (dim t = 0; t < p.tokens(); ++t)
    for (idx i = p.token_offsets[at(t)]; i < p.token_offsets[at(t + 1)]; ++i)
      if (const idx e = p.position[at(i)]; e >= 0) {
        const idx r = p.offsets[at(e)]++;
        p.token[at(r)] = static_cast<idx>(t);
        p.position[at(i)] = r;
      }
  for (std::size_t e = p.offsets.size() - 1; e > 0; --e) p.offsets[e] = p.offsets[e - 1];
  p.offsets[0] = 0;
}

}  // namespace moe
