// SPDX-License-Identifier: Apache-2.0
/// Feed-forward experts.
#pragma once

#include "moe/concepts.hpp"
#include "moe/core/error.hpp"
#include "moe/expert/activation.hpp"

namespace moe {

/// How the rows of gate and up lie in memory. Each layout is two stacks of views over what a checkpoint holds.
/// Two tensors, up[E*f,d] and gate[E*f,d].
struct separate {
  struct weights { matrix_view<float> up, gate; };
  static weights make(dim experts, dim f, dim d, arena& mem) noexcept {
    return {mem.matrix<float>("up", experts * f, d), mem.matrix<float>("gate", experts * f, d)};
  }
  static matrix_stack<float> gate(const weights& w, dim f) noexcept { return stack(w.gate, f); }
  static matrix_stack<float> up(const weights& w, dim f) noexcept { return stack(w.up, f); }
  static bool frozen(const weights& w) noexcept { return !w.up || !w.gate; }
  static void check(const weights& w, dim experts, dim f, dim d) {
    expect(w.up, experts * f, d, "ffn_expert: up", "E*f x d");
    expect(w.gate, experts * f, d, "ffn_expert: gate", "E*f x d");
  }
};

/// y = down form(up x [, gate x]), one expert after another in the rows of each tensor.
///
/// weights  layout of up and gate, down[E*d,f]
/// saves    z[A,f], or z[A,2f] when gated: 4 A f or 8 A f bytes; nothing of width d
/// adds to  dx, dup, dgate, ddown, dweight
/// The router's gradient is <da_r, a_r>, so expert rows are not kept: Guo et al. 2025 (SonicMoE), arXiv:2512.14080.
template <class Form = glu<silu>, class Layout = separate>
struct basic_ffn_expert {
  using input = matrix_view<const float>;
  using input_grad = matrix_view<float>;
  using output = matrix_view<float>;
  struct weights {
    typename Layout::weights in;
    matrix_view<float> down;
  };
  using weights_grad = weights;
  struct context { matrix_view<float> z; };
  struct scratch { matrix_view<float> a; };
  struct backward_scratch { matrix_view<float> a, dz, dx; };

  dim count = 0;  ///< experts of this bank; 0: those of the layer
  dim f = 0;      ///< hidden width; 0: that of the layer
  [[no_unique_address]] Form form{};

  dim experts(shape s) const noexcept { return count ? count : s.experts; }
  dim hidden(shape s) const noexcept { return f ? f : s.f; }

  void check(shape s) const {
    if (hidden(s) <= 0) throw shape_error("ffn_expert: f is " + std::to_string(hidden(s)) + ", expected at least 1");
  }
  void check(const weights& w, shape s) const {
    Layout::check(w.in, experts(s), hidden(s), s.d);
    expect(w.down, experts(s) * s.d, hidden(s), "ffn_expert: down", "E*d x f");
  }
  weights make_weights(shape s, arena& mem) const noexcept {
    return {Layout::make(experts(s), hidden(s), s.d, mem), mem.matrix<float>("down", experts(s) * s.d, hidden(s))};
  }
  context make_context(shape s, dim rows, arena& mem) const noexcept {
    return {mem.matrix<float>("z", rows, (Form::gated ? 2 : 1) * hidden(s))};
  }
  output make_output(shape s, dim rows, arena& mem) const noexcept { return mem.matrix<float>("ys", rows, s.d); }
  scratch make_scratch(shape s, dim rows, arena& mem) const noexcept { return {mem.matrix<float>("a", rows, hidden(s))}; }
  backward_scratch make_backward_scratch(shape s, dim rows, arena& mem) const noexcept {
    return {mem.matrix<float>("a", rows, hidden(s)), mem.matrix<float>("dz", rows, (Form::gated ? 2 : 1) * hidden(s)),
            mem.matrix<float>("dx", rows, s.d)};
  }

  template <class B>
  void forward(const call<B>& on, const weights& w, const input& x, const bank_rows& rows, output ys,
               context& ctx) const noexcept {
    scratch_frame frame(on.scratch);
    const dim f_ = hidden(on.sizes);
    const scratch s = make_scratch(on.sizes, ys.rows, on.scratch);
    grouped_up(on, rows, rows.gather(x), form, Layout::gate(w.in, f_), {}, Layout::up(w.in, f_), {}, ctx.z, s.a);
    fill_rows(on, rows, ys, 0.f);
    grouped_gemm_nt(on, rows, gathered<float>{s.a}, stack(w.down, on.sizes.d), ys);
  }

  template <class B>
  void backward(const call<B>& on, const weights& w, const input& x, const bank_rows& rows, const context& ctx,
                gathered<float> dys, input_grad dx, weights_grad& dw, std::span<float> dweight) const noexcept {
    scratch_frame frame(on.scratch);
    const dim f_ = hidden(on.sizes), d = on.sizes.d;
    const backward_scratch s = make_backward_scratch(on.sizes, ctx.z.rows, on.scratch);
    fill_rows(on, rows, s.a, 0.f);
    grouped_gemm_nn(on, rows, dys, stack(w.down, d), s.a);
    grouped_up_backward(on, rows, form, dys.weight, ctx.z, s.a, s.dz, dweight);
    if (dw.down) grouped_gemm_tn(on, rows, dys, {s.a}, stack(dw.down, d));

    const gathered<float> dgate{s.dz.columns(0, f_)}, dup{s.dz.columns(Form::gated ? f_ : 0, f_)};
    if (!Layout::frozen(dw.in)) {
      if constexpr (Form::gated) grouped_gemm_tn(on, rows, dgate, rows.gather(x), Layout::gate(dw.in, f_));
      grouped_gemm_tn(on, rows, dup, rows.gather(x), Layout::up(dw.in, f_));
    }
    if (!dx) return;
    fill_rows(on, rows, s.dx, 0.f);
    if constexpr (Form::gated) grouped_gemm_nn(on, rows, dgate, Layout::gate(w.in, f_), s.dx);
    grouped_gemm_nn(on, rows, dup, Layout::up(w.in, f_), s.dx);
    scatter_add_rows(on, rows, s.dx, dx);
  }
};

/// SwiGLU: down(silu(gate x) * up x).
using ffn_expert = basic_ffn_expert<>;

}  // namespace moe
