// SPDX-License-Identifier: Apache-2.0
/// Feed-forward experts.
#pragma once

#include "moe/concepts.hpp"
#include "moe/core/error.hpp"
#include "moe/expert/activation.hpp"
#include "moe/expert/layout.hpp"

namespace moe {

/// Tensors of feed-forward experts, one expert after another in their rows. Which of them there are follows from the form
/// (gated or not), the layout and the biases; the others stay empty. Biases are columns, so that a layout splits them as it
/// splits the weights, and floats whatever the type W of the weights.
template <class W>
struct basic_ffn_weights {
  matrix_view<W> up, gate;                ///< [E*f, d]    separate
  matrix_view<W> gate_up;                 ///< [E*2f, d]   chunked or interleaved
  matrix_view<W> down;                    ///< [E*d, f]
  matrix_view<float> up_bias, gate_bias;  ///< [E*f, 1]
  matrix_view<float> gate_up_bias;        ///< [E*2f, 1]
  matrix_view<float> down_bias;           ///< [E*d, 1]
};
using ffn_weights = basic_ffn_weights<float>;

/// y = down form(gate x, up x) + bias, or down form(up x) + bias for forms that are not gated.
///
/// weights  basic_ffn_weights<W>, W = float or bf16; their gradients are floats, ffn_weights, whatever W is
/// saves    z[A,2f] when gated, else z[A,f]: the pre-activations, gate then up; nothing of width d
/// adds to  dx, the gradients of all weights, dweight
/// errors   shape_error when f is not positive or a tensor does not fit
/// With bf16 weights all else stays float32, but where the level multiplies bf16 (AMX, AMD) each product rounds its rows to
/// it (docs/numerics.md). Masters, moments and the step that rounds: train/mixed.hpp. The router's gradient is <da_r, a_r>,
/// so no expert row is kept: Guo et al. 2025 (SonicMoE), arXiv:2512.14080.
template <class Form = glu<silu>, class Layout = separate, bool Biased = false, class W = float>
struct basic_ffn_expert {
  static_assert(std::same_as<W, float> || std::same_as<W, bf16>, "moe::basic_ffn_expert: weights must be float or bf16");
  static constexpr bool gated = Form::gated, fused = Form::gated && Layout::fused, replaces_gradients = true;
  using input = matrix_view<const float>;
  using input_grad = matrix_view<float>;
  using output = matrix_view<float>;
  using weights = basic_ffn_weights<W>;
  using weights_grad = ffn_weights;
  struct context { matrix_view<float> z; };
  struct scratch { matrix_view<float> a; };
  struct backward_scratch { matrix_view<float> a, dz, dx; };

  [[no_unique_address]] Form form{};

  void check(shape s) const {
    if (s.f <= 0) throw shape_error("ffn_expert: f is " + std::to_string(s.f) + ", expected at least 1");
  }
  void check(const weights& w, shape s) const {
    const dim n = s.experts * s.f;
    if constexpr (fused) expect(w.gate_up, 2 * n, s.d, "ffn_expert: gate_up", "E*2f x d");
    else expect(w.up, n, s.d, "ffn_expert: up", "E*f x d");
    if constexpr (gated && !fused) expect(w.gate, n, s.d, "ffn_expert: gate", "E*f x d");
    expect(w.down, s.experts * s.d, s.f, "ffn_expert: down", "E*d x f");
    if constexpr (Biased) {
      if constexpr (fused) expect(w.gate_up_bias, 2 * n, 1, "ffn_expert: gate_up_bias", "E*2f x 1");
      else expect(w.up_bias, n, 1, "ffn_expert: up_bias", "E*f x 1");
      if constexpr (gated && !fused) expect(w.gate_bias, n, 1, "ffn_expert: gate_bias", "E*f x 1");
      expect(w.down_bias, s.experts * s.d, 1, "ffn_expert: down_bias", "E*d x 1");
    }
  }
  weights make_weights(shape s, arena& mem) const noexcept { return carve<W>(s, mem); }
  weights_grad make_gradients(shape s, arena& mem) const noexcept { return carve<float>(s, mem); }
  context make_context(shape s, dim rows, arena& mem) const noexcept { return {mem.column<float>("z", rows, width(s))}; }
  output make_output(shape s, dim rows, arena& mem) const noexcept { return mem.matrix<float>("ys", rows, s.d); }
  scratch make_scratch(shape s, dim rows, arena& mem) const noexcept { return {apart("a", rows, s.f, mem)}; }
  backward_scratch make_backward_scratch(shape s, dim rows, arena& mem) const noexcept {
    return {apart("a", rows, s.f, mem), apart("dz", rows, width(s), mem), apart("dx", rows, s.d, mem)};
  }
  /// The same, and what products take while they run.
  template <class B>
  void make_scratch(const B& backend, shape s, dim rows, arena& mem) const noexcept {
    (void)make_scratch(s, rows, mem);
    if constexpr (std::same_as<W, bf16>) count_half_products(backend, s, rows, false, mem);
  }
  template <class B>
  void make_backward_scratch(const B& backend, shape s, dim rows, arena& mem) const noexcept {
    (void)make_backward_scratch(s, rows, mem);
    if constexpr (std::same_as<W, bf16>) count_half_products(backend, s, rows, true, mem);
  }

  /// Rows of gate and up of each expert, and their biases, wherever the layout has them.
  template <class T>
  static matrix_stack<T> gate_of(const basic_ffn_weights<T>& w, dim f) noexcept { return gate(w.gate, w.gate_up, f); }
  template <class T>
  static matrix_stack<T> up_of(const basic_ffn_weights<T>& w, dim f) noexcept { return up(w.up, w.gate_up, f); }
  template <class T>
  static matrix_stack<float> gate_bias_of(const basic_ffn_weights<T>& w, dim f) noexcept {
    return gate(w.gate_bias, w.gate_up_bias, f);
  }
  template <class T>
  static matrix_stack<float> up_bias_of(const basic_ffn_weights<T>& w, dim f) noexcept {
    return up(w.up_bias, w.gate_up_bias, f);
  }

  template <class B, class... Then>
  void forward(const call<B>& on, const weights& w, const input& x, const bank_rows& rows, output ys, context& ctx,
               const Then&... then) const noexcept {
    scratch_frame frame(on.scratch);
    const dim f = on.sizes.f, d = on.sizes.d;
    const scratch s = make_scratch(on.sizes, ys.rows, on.scratch);
    const matrix_stack<const W> gate = gate_of(w, f), up = up_of(w, f);
    grouped_up(on, rows, to_multiply(on, rows, rows.gather(x), ys), form, gate,
               matrix_stack<const float>(gate_bias_of(w, f)), up, matrix_stack<const float>(up_bias_of(w, f)), ctx.z, s.a);
    grouped_gemm_nt(on, rows, to_multiply(on, s.a), stack<const W>(w.down, d), stack<const float>(w.down_bias, d), ys,
                    then...);
  }

  template <class B>
  void backward(const call<B>& on, const weights& w, const input& x, const bank_rows& rows, const context& ctx,
                gathered<float> dys, input_grad dx, weights_grad& dw, std::span<float> dweight) const noexcept {
    scratch_frame frame(on.scratch);
    const dim f = on.sizes.f, d = on.sizes.d;
    const backward_scratch s = make_backward_scratch(on.sizes, ctx.z.rows, on.scratch);
    const dim half = detail::round_up(d, 32) / 2;  // room for a row of bf16, in whole lines
    const auto xs = to_multiply(on, rows, rows.gather(x), s.dx.columns(0, half)),
               dy = to_multiply(on, rows, dys, s.dx.columns(half, half));
    constexpr bool rounds = !std::same_as<W, float>;
    if constexpr (rounds) {
      round_by_token(on, rows, xs);
      round_by_token(on, rows, dy);
    }
    const auto a = to_multiply(on, s.a), dz = to_multiply(on, s.dz);
    const auto dgate = columns(dz, 0, f), dup = columns(dz, gated ? f : 0, f);
    const matrix_stack<const W> gate = gate_of(w, f), up = up_of(w, f);
    grouped_dgrad(on, rows, dy, stack<const W>(w.down, d), {}, {}, s.a);
    if constexpr (Biased) add_bias_share(on, rows, dys, w.down_bias, dweight);
    if constexpr (rounds && !Biased) grouped_up_backward<true>(on, rows, form, dys.weight, ctx.z, s.a, s.dz, dweight);
    else grouped_up_backward(on, rows, form, dys.weight, ctx.z, s.a, s.dz, dweight);
    if constexpr (Biased) {
      if (on.gradients == gradient_mode::replace)
        for (const auto& bias : {dw.up_bias, dw.gate_bias, dw.gate_up_bias, dw.down_bias}) detail::clear(on, bias);
      if (dw.down_bias) sum_rows(on, rows, dys, stack(dw.down_bias, d));
      add_bias_gradient(on, rows, s.dz.columns(gated ? f : 0, f), up_bias_of(dw, f));
      if constexpr (gated) add_bias_gradient(on, rows, s.dz.columns(0, f), gate_bias_of(dw, f));
    }
    if constexpr (rounds && Biased) {  // in place: nobody reads the floats any more
      round_rows(on, rows, a);
      round_rows(on, rows, dz);
    }
    if (dw.down) grouped_wgrad<W>(on, rows, dy, a, stack(dw.down, d), on.gradients);
    grouped_wgrad<W>(on, rows, dup, xs, up_of(dw, f), dgate, gated ? gate_of(dw, f) : matrix_stack<float>{}, on.gradients);
    if (!dx) return;
    grouped_dgrad(on, rows, dup, up, dgate, gated ? gate : matrix_stack<const W>{}, s.dx);
    scatter_add_rows(on, rows, gathered<float>{s.dx}, dx);
  }

 private:
  static dim width(shape s) noexcept { return (gated ? 2 : 1) * s.f; }
  /// Rows an odd number of lines apart: products read several at once, and rows a power of two apart share a place in a cache.
  static matrix_view<float> apart(const char* name, dim rows, dim cols, arena& mem) noexcept {
    return mem.matrix<float>(name, rows, detail::round_up(cols, 32) + 16).columns(0, cols);
  }
  template <class T>
  static basic_ffn_weights<T> carve(shape s, arena& mem) noexcept {
    const dim n = s.experts * s.f;
    basic_ffn_weights<T> w;
    if constexpr (fused) w.gate_up = mem.matrix<T>("gate_up", 2 * n, s.d);
    else w.up = mem.matrix<T>("up", n, s.d);
    if constexpr (gated && !fused) w.gate = mem.matrix<T>("gate", n, s.d);
    w.down = mem.matrix<T>("down", s.experts * s.d, s.f);
    if constexpr (Biased) {
      if constexpr (fused) w.gate_up_bias = mem.matrix<float>("gate_up_bias", 2 * n, 1, initial::zeros);
      else w.up_bias = mem.matrix<float>("up_bias", n, 1, initial::zeros);
      if constexpr (gated && !fused) w.gate_bias = mem.matrix<float>("gate_bias", n, 1, initial::zeros);
      w.down_bias = mem.matrix<float>("down_bias", s.experts * s.d, 1, initial::zeros);
    }
    return w;
  }
  template <class T>
  static matrix_stack<T> gate(matrix_view<T> alone, matrix_view<T> both, dim f) noexcept {
    if constexpr (fused) return Layout::gate(both, f);
    else return stack(alone, f);
  }
  template <class T>
  static matrix_stack<T> up(matrix_view<T> alone, matrix_view<T> both, dim f) noexcept {
    if constexpr (fused) return Layout::up(both, f);
    else return stack(alone, f);
  }
  /// Rows as products with weights of type W read them: gathered floats, or mixed_rows with `room` for their halves.
  template <class B>
  static auto to_multiply(const call<B>& on, const bank_rows& rows, gathered<float> x, matrix_view<float> room) noexcept {
    if constexpr (std::same_as<W, float>) return x;
    else return mixed(on, rows, x, room);
  }
  template <class B>
  static auto to_multiply(const call<B>& on, matrix_view<float> m) noexcept {
    if constexpr (std::same_as<W, float>) return gathered<float>{m};
    else return mixed(on, m);
  }
  template <class Rows>
  static Rows columns(Rows m, dim first, dim n) noexcept {
    if constexpr (std::same_as<W, float>) m.source = m.source.columns(first, n);
    else m = m.columns(first, n);
    return m;
  }
  template <class B>
  static void add_bias_gradient(const call<B>& on, const bank_rows& rows, matrix_view<float> dz,
                                matrix_stack<float> dbias) noexcept {
    if (dbias.first) sum_rows(on, rows, gathered<float>{dz}, dbias);
  }
  /// dweight[r] += <dy, down_bias[e]>
  template <class B>
  static void add_bias_share(const call<B>& on, const bank_rows& rows, gathered<float> dys, matrix_view<float> bias,
                             std::span<float> dweight) noexcept {
    if (dweight.empty()) return;
    const matrix_view<const float> one{bias.data, rows.experts(), dys.cols()};
    dot_rows(on, rows, dys, one, dweight);
  }
};

/// SwiGLU: down(silu(gate x) * up x).
using ffn_expert = basic_ffn_expert<>;
/// The same with weights of bf16.
using bf16_ffn_expert = basic_ffn_expert<glu<silu>, separate, false, bf16>;
/// The expert of gpt-oss: clamped and shifted gate, interleaved rows, biases.
using gpt_oss_expert = basic_ffn_expert<gpt_oss_glu, interleaved, true>;

}  // namespace moe
