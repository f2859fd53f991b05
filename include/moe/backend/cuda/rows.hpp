// SPDX-License-Identifier: Apache-2.0
/// Primitives over rows on a device. Contracts: backend/host_rows.hpp. Every sum has one writer and a fixed order.
#pragma once

#include "moe/backend/cuda/device.hpp"
#include "moe/concepts.hpp"

namespace moe {

namespace detail {

template <class T>
struct fill_element {
  matrix_view<T> m;
  T v;
  MOE_HD void operator()(dim r, dim c) const noexcept { m(r, c) = v; }
};
struct fill_bank_element {
  device_rows rows;
  matrix_view<float> m;
  float v;
  MOE_HD void operator()(dim r, dim c) const noexcept {
    if (rows.holds(r)) m(r, c) = v;
  }
};
struct start_element {
  device_rows rows;
  matrix_view<float> m;
  matrix_stack<const float> v;
  MOE_HD void operator()(dim r, dim c) const noexcept {
    if (rows.holds(r)) m(r, c) = v.first ? v[rows.expert_of(r)](c, 0) : 0.f;
  }
};
template <class T>
struct copy_element {
  matrix_view<const T> from;
  matrix_view<T> to;
  MOE_HD void operator()(dim r, dim c) const noexcept { to(r, c) = from(r, c); }
};
struct add_element {
  matrix_view<const float> from;
  matrix_view<float> to;
  MOE_HD void operator()(dim r, dim c) const noexcept { to(r, c) += from(r, c); }
};
struct dense_offset {
  idx* offsets;
  idx tokens;
  MOE_HD void operator()(dim e) const noexcept { offsets[e] = e ? tokens : 0; }
};

template <class F>
struct each_token {
  F f;
  MOE_HD void operator()(dim t) const noexcept { f(t); }
};
template <class F>
struct each_row {
  device_rows rows;
  F f;
  MOE_HD void operator()(dim r) const noexcept {
    if (rows.holds(r)) f(rows.expert_of(r), r);
  }
};
template <class F>
struct map_element {
  device_rows rows;
  matrix_view<float> ys;
  F f;
  MOE_HD void operator()(dim r, dim j) const noexcept {
    if (rows.holds(r)) ys(r, j) = f(rows.expert_of(r), r, j);
  }
};
template <class F>
struct each_row_of_token {
  device_rows rows;
  F f;
  MOE_HD void operator()(dim t) const noexcept {
    if (!rows.token_offsets) {
      if (rows.holds(t)) f(t, t);
      return;
    }
    for (idx i = rows.token_offsets[t]; i < rows.token_offsets[t + 1]; ++i)
      if (const dim r = rows.position[i]; rows.holds(r)) f(t, r);
  }
};

/// to(t, j) += its rows' column j
struct scatter_column {
  gathered<float> from;
  matrix_view<float> to;
  dim j;
  MOE_HD void operator()(dim t, dim r) const noexcept { to(t, j) += from.scale(r) * from.row(r)[j]; }
};
struct scatter_element {
  device_rows rows;
  gathered<float> from;
  matrix_view<float> to;
  MOE_HD void operator()(dim t, dim j) const noexcept { each_row_of_token<scatter_column>{rows, {from, to, j}}(t); }
};
template <class Rows>
struct combine_element {
  const idx *token_offsets, *position;
  Rows ys;
  const float* weight;
  matrix_view<float> y;
  MOE_HD void operator()(dim t, dim j) const noexcept {
    y(t, j) = 0;
    for (idx i = token_offsets[t]; i < token_offsets[t + 1]; ++i)
      if (const idx r = position[i]; r >= 0)
        add_one_row(arch::cuda_column{j}, ys, r, weight ? weight[r] : 1.f, y.row(t), y.cols);
  }
};
/// to[e](j) += the sum of e's rows, each times its weight.
template <class To>
struct sum_element {
  device_rows rows;
  gathered<float> xs;
  To to;
  MOE_HD void operator()(dim e, dim j) const noexcept {
    for (dim r = rows.at(e); r < rows.at(e + 1); ++r) element(to, e, j) += xs.scale(r) * xs.row(r)[j];
  }

 private:
  MOE_HD static float& element(const matrix_view<float>& m, dim e, dim j) noexcept { return m(e, j); }
  MOE_HD static float& element(const matrix_stack<float>& m, dim e, dim j) noexcept { return m[e](j, 0); }
};

/// s[r] += the sum over j of f(e, r, j), 32 threads a row, whose partial sums are added in their order. s may be null.
template <class F>
struct sum_over_columns {
  static constexpr int lanes = 32, threads = 256;
  struct shared { float part[threads]; };
  struct local { dim row; };

  device_rows rows;
  dim cols;
  float* s;
  F f;

  MOE_HD dim begin(dim block, int thread, local& own) const noexcept {
    own.row = block * (threads / lanes) + thread / lanes;
    return 1;
  }
  MOE_HD void load(dim, int thread, shared& all, const local& own) const noexcept {
    float sum = 0;
    if (rows.holds(own.row)) {
      const dim e = rows.expert_of(own.row);
      MOE_NO_UNROLL
      for (dim j = thread % lanes; j < cols; j += lanes) sum += f(e, own.row, j);
    }
    all.part[thread] = sum;
  }
  MOE_HD void use(dim, int thread, const shared& all, const local& own) const noexcept {
    if (thread % lanes != 0 || !s || !rows.holds(own.row)) return;
    float sum = 0;
    for (int l = 0; l < lanes; ++l) sum += all.part[thread + l];
    s[own.row] += sum;
  }
  MOE_HD void end(int, const local&) const noexcept {}
};
template <class B, class F>
void sum_columns(const call<B>& on, const bank_rows& rows, dim cols, float* s, const F& f) noexcept {
  using program = sum_over_columns<F>;
  constexpr dim each = program::threads / program::lanes;
  on.backend.run((rows.room(on.sizes) + each - 1) / each, program{device_rows(rows), cols, s, f});
}

struct dot_with_expert {
  gathered<float> x;
  matrix_view<const float> v;
  MOE_HD float operator()(dim e, dim r, dim j) const noexcept { return x.row(r)[j] * v(e, j); }
};
struct dot_with_row {
  gathered<float> x, z;
  MOE_HD float operator()(dim, dim r, dim j) const noexcept { return x.row(r)[j] * z.row(r)[j]; }
};
struct split_element {
  gathered<float> dy;
  matrix_view<const float> ys;
  matrix_view<float> dys;
  MOE_HD float operator()(dim, dim r, dim j) const noexcept {
    const float v = dy.row(r)[j];
    dys(r, j) = dy.scale(r) * v;
    return v * ys(r, j);
  }
};

}  // namespace detail

template <DeviceBackend B, class T>
void fill(const call<B>& on, matrix_view<T> m, T v) noexcept {
  detail::for_each_element(on, m.rows, m.cols, detail::fill_element<T>{m, v});
}
template <DeviceBackend B>
void fill_rows(const call<B>& on, const bank_rows& rows, matrix_view<float> m, float v) noexcept {
  detail::for_each_element(on, m.rows, m.cols, detail::fill_bank_element{detail::device_rows(rows), m, v});
}
template <DeviceBackend B>
void start_rows(const call<B>& on, const bank_rows& rows, matrix_view<float> m, matrix_stack<const float> v) noexcept {
  detail::for_each_element(on, m.rows, m.cols, detail::start_element{detail::device_rows(rows), m, v});
}
template <DeviceBackend B, class T>
void copy(const call<B>& on, matrix_view<const T> from, matrix_view<T> to) noexcept {
  detail::for_each_element(on, to.rows, to.cols, detail::copy_element<T>{from, to});
}
template <DeviceBackend B>
void add(const call<B>& on, matrix_view<const float> from, matrix_view<float> to) noexcept {
  detail::for_each_element(on, to.rows, to.cols, detail::add_element{from, to});
}
template <DeviceBackend B>
bank_rows dense_rows(const call<B>& on) noexcept {
  const std::span<idx> offsets = on.scratch.template vector<idx>("offsets", 2);
  on.backend.for_each(2, detail::dense_offset{offsets.data(), static_cast<idx>(on.sizes.tokens)});
  bank_rows rows;
  rows.offsets = offsets;
  return rows;
}

template <DeviceBackend B, class F>
void for_each_token(const call<B>& on, dim n, const F& f) noexcept {
  detail::for_each_of<F>(on, n, detail::each_token<F>{f});
}
template <DeviceBackend B, class F>
void for_each_row(const call<B>& on, const bank_rows& rows, const F& f) noexcept {
  detail::for_each_of<F>(on, rows.room(on.sizes), detail::each_row<F>{detail::device_rows(rows), f});
}
template <DeviceBackend B, class F>
void for_each_row_by_token(const call<B>& on, const bank_rows& rows, const F& f) noexcept {
  const dim tokens = rows.token_offsets.empty() ? on.sizes.tokens : rows.tokens();
  detail::for_each_of<F>(on, tokens, detail::each_row_of_token<F>{detail::device_rows(rows), f});
}
template <DeviceBackend B, class F>
void map_rows(const call<B>& on, const bank_rows& rows, matrix_view<float> ys, const F& f) noexcept {
  using element = detail::map_element<F>;
  detail::for_each_of<F>(on, ys.rows * ys.cols,
                         detail::each_element<element>{ys.cols, element{detail::device_rows(rows), ys, f}});
}

template <DeviceBackend B>
void sum_rows(const call<B>& on, const bank_rows& rows, gathered<float> xs, matrix_view<float> v) noexcept {
  detail::for_each_element(on, rows.experts(), v.cols,
                           detail::sum_element<matrix_view<float>>{detail::device_rows(rows), xs, v});
}
template <DeviceBackend B>
void sum_rows(const call<B>& on, const bank_rows& rows, matrix_view<const float> xs, matrix_view<float> v) noexcept {
  sum_rows(on, rows, gathered<float>{xs}, v);
}
template <DeviceBackend B>
void sum_rows(const call<B>& on, const bank_rows& rows, matrix_view<float> xs, matrix_view<float> v) noexcept {
  sum_rows(on, rows, gathered<float>{xs}, v);
}
template <DeviceBackend B>
void sum_rows(const call<B>& on, const bank_rows& rows, gathered<float> xs, matrix_stack<float> v) noexcept {
  detail::for_each_element(on, rows.experts(), v.first.rows,
                           detail::sum_element<matrix_stack<float>>{detail::device_rows(rows), xs, v});
}
template <DeviceBackend B>
void dot_rows(const call<B>& on, const bank_rows& rows, gathered<float> xs, matrix_view<const float> v,
              std::span<float> s) noexcept {
  detail::sum_columns(on, rows, v.cols, s.data(), detail::dot_with_expert{xs, v});
}
template <DeviceBackend B>
void dot_rows(const call<B>& on, const bank_rows& rows, gathered<float> xs, gathered<float> zs,
              std::span<float> s) noexcept {
  detail::sum_columns(on, rows, xs.cols(), s.data(), detail::dot_with_row{xs, zs});
}
template <DeviceBackend B>
void split_row_gradient(const call<B>& on, const bank_rows& rows, gathered<float> dy, matrix_view<const float> ys,
                        matrix_view<float> dys, std::span<float> dweight) noexcept {
  detail::sum_columns(on, rows, ys.cols, dweight.data(), detail::split_element{dy, ys, dys});
}

template <DeviceBackend B>
void scatter_add_rows(const call<B>& on, const bank_rows& rows, gathered<float> from, matrix_view<float> to) noexcept {
  detail::for_each_element(on, to.rows, to.cols, detail::scatter_element{detail::device_rows(rows), from, to});
}
/// Row sources add themselves through the `axpy` of the tag they are handed: here a thread's own column.
template <DeviceBackend B, class Rows>
void combine_rows(const call<B>& on, const routing_plan& p, const Rows& ys, std::span<const float> weight,
                  matrix_view<float> y) noexcept {
  detail::for_each_element(on, y.rows, y.cols,
                           detail::combine_element<Rows>{p.token_offsets.data(), p.position.data(), ys, weight.data(), y});
}

}  // namespace moe
