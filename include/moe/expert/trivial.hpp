// SPDX-License-Identifier: Apache-2.0
/// Experts that cost nothing or next to it. They store no rows and gather none: the combine asks them to add themselves.
/// Jin et al. 2024 (MoE++), arXiv:2410.07348
#pragma once

#include "moe/concepts.hpp"
#include "moe/core/error.hpp"

namespace moe {

/// y = 0. Choosing it skips the layer.
struct zero_expert {
  using input = matrix_view<const float>;
  using input_grad = matrix_view<float>;
  struct output {
    template <class Arch>
    MOE_HD void add_row(Arch, dim, float, float*, dim) const noexcept {}
  };
  using weights = nothing;
  using context = nothing;

  output make_output(shape, dim, arena&) const noexcept { return {}; }
  template <class B>
  void forward(const call<B>&, const weights&, const input&, const bank_rows&, output&, context&) const noexcept {}
  template <class B>
  void backward(const call<B>&, const weights&, const input&, const bank_rows&, const context&, gathered<float>, input_grad,
                weights&, std::span<float>) const noexcept {}
};

namespace detail {

/// dweight[r] += <dy, x> and dx[t] += weight[r] dy, for rows that are their input.
template <class B>
void copy_backward(const call<B>& on, matrix_view<const float> x, const bank_rows& rows, gathered<float> dys,
                   matrix_view<float> dx, std::span<float> dweight) noexcept {
  if (!dweight.empty()) dot_rows(on, rows, dys, rows.gather(x), dweight);
  if (dx) scatter_add_rows(on, rows, dys, dx);
}

}  // namespace detail

/// y = x.
///
/// adds to  dx, dweight
struct copy_expert {
  using input = matrix_view<const float>;
  using input_grad = matrix_view<float>;
  struct output {
    gathered<float> x;
    template <class Arch>
    MOE_HD void add_row(Arch arch, dim r, float w, float* y, dim n) const noexcept { axpy(arch, w, x.row(r), y, n); }
  };
  using weights = nothing;
  using context = nothing;

  output make_output(shape, dim, arena&) const noexcept { return {}; }
  template <class B>
  void forward(const call<B>&, const weights&, const input& x, const bank_rows& rows, output& ys, context&) const noexcept {
    ys.x = rows.gather(x);
  }
  template <class B>
  void backward(const call<B>& on, const weights&, const input& x, const bank_rows& rows, const context&,
                gathered<float> dys, input_grad dx, weights&, std::span<float> dweight) const noexcept {
    detail::copy_backward(on, x, rows, dys, dx, dweight);
  }
};

/// y = a0 x + a1 v_e with (a0, a1) = softmax(mix_e x).
///
/// weights  v[E,d], mix[E*2,d]      saves  nothing      adds to  dx, dv, dmix, dweight
struct constant_expert {
  using input = matrix_view<const float>;
  using input_grad = matrix_view<float>;
  struct weights { matrix_view<float> v, mix; };
  using weights_grad = weights;
  using context = nothing;
  struct output {
    gathered<float> x;
    matrix_view<const float> v;
    matrix_view<float> share;     ///< [A,2]  a0, a1
    matrix_view<idx> expert;      ///< [A,1]  of the bank
    template <class Arch>
    MOE_HD void add_row(Arch arch, dim r, float w, float* y, dim n) const noexcept {
      axpy(arch, w * share(r, 0), x.row(r), y, n);
      axpy(arch, w * share(r, 1), v.row(expert(r, 0)), y, n);
    }
  };
  struct backward_scratch {
    matrix_view<float> share;
    matrix_view<idx> expert;
    matrix_view<float> factor;  ///< [4,A]  of dy for dx, of dy for dv, of x for the two rows of mix
  };

  void check(const weights& w, shape s) const {
    expect(w.v, s.experts, s.d, "constant_expert: v", "E x d");
    expect(w.mix, 2 * s.experts, s.d, "constant_expert: mix", "E*2 x d");
  }
  weights make_weights(shape s, arena& mem) const noexcept {
    return {mem.matrix<float>("v", s.experts, s.d), mem.matrix<float>("mix", 2 * s.experts, s.d)};
  }
  output make_output(shape, dim rows, arena& mem) const noexcept {
    return {{}, {}, mem.matrix<float>("share", rows, 2), mem.matrix<idx>("expert", rows, 1)};
  }
  template <class B>
  void forward(const call<B>& on, const weights& w, const input& x, const bank_rows& rows, output& ys,
               context&) const noexcept {
    ys.x = rows.gather(x);
    ys.v = w.v;
    for_each_row(on, rows, shares<typename B::arch>{w.mix, ys.x, ys.share, ys.expert});
  }
  template <class B>
  void backward(const call<B>& on, const weights& w, const input& x, const bank_rows& rows, const context&,
                gathered<float> dys, input_grad dx, weights_grad& dw, std::span<float> dweight) const noexcept {
    scratch_frame frame(on.scratch);
    const auto [share, expert, factor] = make_backward_scratch(on.sizes, rows.room(on.sizes), on.scratch);
    const gathered<float> gx = rows.gather(x);
    for_each_row(on, rows, shares<typename B::arch>{w.mix, gx, share, expert});
    for_each_row(on, rows, gradient<typename B::arch>{w.v, gx, dys, share, factor, dweight.data()});
    const auto weighed = [factors = factor](gathered<float> g, int i) {
      g.weight = factors.row(i);
      return g;
    };
    if (dw.v) sum_rows(on, rows, weighed(dys, 1), dw.v);
    for (int i = 0; i < 2 && dw.mix; ++i)
      sum_rows(on, rows, weighed(gx, 2 + i), matrix_view<float>{dw.mix.row(i), rows.experts(), dw.mix.cols, 2 * dw.mix.ld});
    if (!dx) return;
    scatter_add_rows(on, rows, weighed(dys, 0), dx);
    for (int i = 0; i < 2; ++i) {
      const matrix_view<const float> mix{w.mix.row(i), rows.experts(), w.mix.cols, 2 * w.mix.ld};
      scatter_add_rows(on, rows, gathered<float>{mix, expert.data, factor.row(2 + i)}, dx);
    }
  }
  backward_scratch make_backward_scratch(shape, dim rows, arena& mem) const noexcept {
    return {mem.matrix<float>("share", rows, 2), mem.matrix<idx>("expert", rows, 1), mem.matrix<float>("factor", 4, rows)};
  }

  // What kernels are made of is public: nvcc wants to name it.
  template <class Arch>
  struct shares {
    matrix_view<const float> mix;
    gathered<float> x;
    matrix_view<float> share;
    matrix_view<idx> expert;
    MOE_HD void operator()(dim e, dim r) const noexcept {
      const float z0 = dot(Arch{}, mix.row(2 * e), x.row(r), mix.cols), z1 = dot(Arch{}, mix.row(2 * e + 1), x.row(r), mix.cols);
      using std::exp;
      share(r, 0) = 1.f / (1.f + exp(z1 - z0));
      share(r, 1) = 1.f / (1.f + exp(z0 - z1));
      expert(r, 0) = static_cast<idx>(e);
    }
  };
  template <class Arch>
  struct gradient {
    matrix_view<const float> v;
    gathered<float> x, dy;
    matrix_view<const float> share;
    matrix_view<float> factor;
    float* dweight;
    MOE_HD void operator()(dim e, dim r) const noexcept {
      const float a0 = share(r, 0), a1 = share(r, 1), w = dy.scale(r);
      const float d0 = dot(Arch{}, dy.row(r), x.row(r), v.cols), d1 = dot(Arch{}, dy.row(r), v.row(e), v.cols);
      if (dweight) dweight[r] += a0 * d0 + a1 * d1;
      const float dz = w * a0 * a1 * (d0 - d1);
      factor(0, r) = w * a0;
      factor(1, r) = w * a1;
      factor(2, r) = dz;
      factor(3, r) = -dz;
    }
  };
};

}  // namespace moe
