// SPDX-License-Identifier: Apache-2.0
/// A small layer of fixed shape for a control loop: arrays for memory, one token at a time, no heap, no threads, no packing.
#pragma once

#include <array>

#include "moe/backend/cpu/at_level.hpp"
#include "moe/backend/scalar.hpp"
#include "moe/expert/activation.hpp"
#include "moe/expert/ffn.hpp"
#include "moe/router/weigh.hpp"

namespace moe {

namespace detail {

/// f(n, lane) for n in 0 .. N a vector at a time, the last one perhaps a part.
template <class V, int N, class F>
MOE_INLINE void fixed_lanes(F f) noexcept {
  constexpr int last = N % V::width;
  for (int n = 0; n < N - last; n += V::width) f(n, arch::lanes_of_row<V>{V::width});
  if constexpr (last > 0) f(N - last, arch::lanes_of_row<V>{last});
}
template <class V, int N>
MOE_INLINE float fixed_dot(const float* x, const float* y) noexcept {
  V sum(0);
  fixed_lanes<V, N>([&](int n, auto lane) { sum = multiply_add(lane.load(x + n), lane.load(y + n), sum); });
  return sum.sum();
}
/// y += w x
template <class V, int N>
MOE_INLINE void fixed_axpy(float w, const float* x, float* y) noexcept {
  fixed_lanes<V, N>([&](int n, auto lane) { lane.store(y + n, multiply_add(V(w), lane.load(x + n), lane.load(y + n))); });
}

/// out[n] = sum over k of x[k] w[k][n], or += where Add, for Columns vectors of n: up to eight sums in registers, several of
/// them for one column where there are few.
template <class V, int K, int N, bool Add, int Columns>
MOE_INLINE void fixed_columns(const float* x, const float* w, float* out) noexcept {
  constexpr int parts = Columns > 4 ? 1 : Columns > 2 ? 2 : Columns > 1 ? 4 : 8;
  V sum[parts][Columns];
  MOE_UNROLL
  for (int p = 0; p < parts; ++p) {
    MOE_UNROLL
    for (int c = 0; c < Columns; ++c) sum[p][c] = V(0);
  }
  for (int k = 0; k < K; k += parts) {
    MOE_UNROLL
    for (int p = 0; p < parts; ++p) {
      if (K % parts != 0 && k + p >= K) break;
      const V b(x[k + p]);
      MOE_UNROLL
      for (int c = 0; c < Columns; ++c) sum[p][c] = multiply_add(b, V::load(w + (k + p) * N + c * V::width), sum[p][c]);
    }
  }
  MOE_UNROLL
  for (int half = parts / 2; half > 0; half /= 2) {
    MOE_UNROLL
    for (int p = 0; p < half; ++p) {
      MOE_UNROLL
      for (int c = 0; c < Columns; ++c) sum[p][c] = sum[p][c] + sum[p + half][c];
    }
  }
  MOE_UNROLL
  for (int c = 0; c < Columns; ++c) {
    float* to = out + c * V::width;
    (Add ? V::load(to) + sum[0][c] : sum[0][c]).store(to);
  }
}

/// The same for every n from First to N, in vectors as wide as fit.
template <class V, int K, int N, bool Add, int First = 0>
MOE_INLINE void fixed_product(const float* x, const float* w, float* out) noexcept {
  constexpr int left = N - First, columns = left / V::width < 8 ? left / V::width : 8;
  if constexpr (columns > 0) {
    fixed_columns<V, K, N, Add, columns>(x, w + First, out + First);
    fixed_product<V, K, N, Add, First + columns * V::width>(x, w, out);
  } else if constexpr (left > 0 && V::width > 4) {
    fixed_product<typename V::half, K, N, Add, First>(x, w, out);
  } else {
    for (int n = First; n < N; ++n) {
      float sum = Add ? out[n] : 0;
      for (int k = 0; k < K; ++k) sum += x[k] * w[k * N + n];
      out[n] = sum;
    }
  }
}

/// The same backwards: dx[k] += <dout, w[k]>, dw[k] += x[k] dout.
template <class V, int K, int N>
MOE_INLINE void fixed_product_backward(const float* x, const float* w, const float* dout, float* dx, float* dw) noexcept {
  for (int k = 0; k < K; ++k) {
    dx[k] += fixed_dot<V, N>(dout, w + k * N);
    fixed_axpy<V, N>(x[k], dout, dw + k * N);
  }
}

}  // namespace detail

/// y = sum over the K best experts of weight_e down_e form(gate_e x, up_e x), with the score rules and activations of the
/// large layers and their results. Everything is a value: copy it, keep it on the stack, place it in read-only memory.
///
///   static_layer<16, 32, 4, 2> policy;  policy.load(w.gate.w, w.experts);  policy.forward(x, y);
///
/// weights  public arrays, zero at first; `load` takes those of a run-time layer
/// saves    scores, choices, their weights and pre-activations, in `context`
template <int D, int F, int E, int K, class Form = glu<silu>, class Rule = softmax_over_kept>
class static_layer {
  static_assert(D > 0 && F > 0 && E > 0, "moe::static_layer: d, f and E must be at least 1");
  static_assert(K > 0 && K <= E, "moe::static_layer: k must be at least 1 and at most E");
  static constexpr int wide = Form::gated ? 2 : 1;

 public:
  /// Transposed: what one number of an input adds to all outputs lies together.
  struct weights {
    alignas(64) std::array<float, D * E> router{};         ///< [d,E]
    alignas(64) std::array<float, E * D * wide * F> in{};  ///< [E,d,f] up; when gated [E,d,2f]: of gate, then of up
    alignas(64) std::array<float, E * F * D> down{};       ///< [E,f,d]
  };
  struct context {
    alignas(64) std::array<float, K * wide * F> z{};  ///< pre-activations
    std::array<float, E> scores{};
    std::array<idx, K> expert{};                      ///< best first
    std::array<float, K> weight{};
    int chosen = 0;                                   ///< fewer than K where fewer are eligible
  };

  weights w{};
  [[no_unique_address]] Form form{};
  [[no_unique_address]] Rule rule{};

  /// Copies the weights of a run-time layer of the same shape, up and gate separate, no biases.
  /// errors   shape_error; level_error where MOE_CPU_LEVEL asks for what there is not
  void load(matrix_view<const float> gate, const ffn_weights& from) {
    check_cpu_level();
    expect(gate, E, D, "static_layer: gate", "E x d");
    basic_ffn_expert<Form>{form}.check(from, {.tokens = 1, .d = D, .f = F, .experts = E});
    transpose(gate, w.router.data(), E);
    for (int e = 0; e < E; ++e) {
      float* to = &w.in[at(e * D * wide * F)];
      if constexpr (Form::gated) {
        transpose(from.gate.slice(e * F, F), to, wide * F);
        to += F;
      }
      transpose(from.up.slice(e * F, F), to, wide * F);
      transpose(from.down.slice(e * D, D), &w.down[at(e * F * D)], D);
    }
  }

  /// y[D] from x[D], at the level in use (backend/cpu/level.hpp).
  void forward(const float* x, float* y, context& c) const noexcept {
    arch::at_level_in_use<moe::detail::build_level>([&](auto level) { run<typename decltype(level)::type>(x, y, c); });
  }
  void forward(const float* x, float* y) const noexcept {
    context c;
    forward(x, y, c);
  }

  /// dy[D] -> dx[D] (+=), dw (+=), with the context and x of forward.
  void backward(const float* x, const context& c, const float* dy, float* dx, weights& dw) const noexcept {
    arch::at_level_in_use<moe::detail::build_level>(
        [&](auto level) { run_backward<typename decltype(level)::type>(x, c, dy, dx, dw); });
  }

 private:
  static constexpr int in_size = D * wide * F, down_size = F * D;  // of one expert
  static constexpr std::size_t at(int i) noexcept { return static_cast<std::size_t>(i); }

  /// to[j * step + r] = from(r, j)
  static void transpose(matrix_view<const float> from, float* to, int step) noexcept {
    for (dim r = 0; r < from.rows; ++r)
      for (dim j = 0; j < from.cols; ++j) to[j * step + r] = from(r, j);
  }

  template <class V>
  MOE_INLINE void run(const float* x, float* y, context& c) const noexcept {
    moe::detail::fixed_product<V, D, E, false>(x, w.router.data(), c.scores.data());
    choose(c);
    for (int j = 0; j < D; ++j) y[j] = 0;
    for (int i = 0; i < c.chosen; ++i) {
      const int e = c.expert[at(i)];
      float* z = &c.z[at(i * wide * F)];
      moe::detail::fixed_product<V, D, wide * F, false>(x, &w.in[at(e * in_size)], z);
      alignas(64) float a[F];  // weighted
      moe::detail::fixed_lanes<V, F>([&](int j, auto lane) {
        const V weight(c.weight[at(i)]);
        if constexpr (Form::gated) lane.store(a + j, weight * form(lane.load(z + j), lane.load(z + F + j)));
        else lane.store(a + j, weight * form(lane.load(z + j)));
      });
      moe::detail::fixed_product<V, F, D, true>(a, &w.down[at(e * down_size)], y);
    }
  }
  template <class V>
  MOE_INLINE void run_backward(const float* x, const context& c, const float* dy, float* dx, weights& dw) const noexcept {
    const small_plan p(c);
    std::array<float, K> dweight{};  // by row of the plan
    for (int i = 0; i < c.chosen; ++i) dweight[at(p.position[at(i)])] = expert_backward<V>(x, c, i, dy, dx, dw);
    std::array<float, E> dscores{};
    const matrix_view<const float> scores{c.scores.data(), 1, E};
    moe::detail::weigh_token_backward<Rule>{rule, p.pointers(), scores, dweight.data(), {dscores.data(), 1, E}}(0);
    moe::detail::fixed_product_backward<V, D, E>(x, w.router.data(), dscores.data(), dx, dw.router.data());
  }
  /// Returns dweight of choice i.
  template <class V>
  MOE_INLINE float expert_backward(const float* x, const context& c, int i, const float* dy, float* dx,
                                   weights& dw) const noexcept {
    const int e = c.expert[at(i)];
    const float *z = &c.z[at(i * wide * F)], weight = c.weight[at(i)];
    alignas(64) float a[F], dz[wide * F];
    for (int j = 0; j < F; ++j) a[j] = moe::detail::fixed_dot<V, D>(dy, &w.down[at(e * down_size + j * D)]);
    float share = 0;
    moe::detail::fixed_lanes<V, F>([&](int j, auto lane) {
      const V da = lane.load(a + j);
      V value, dg, du;
      if constexpr (Form::gated) {
        value = form.slope(lane.load(z + j), lane.load(z + F + j), V(weight) * da, dg, du);
        lane.store(dz + F + j, du);
      } else {
        value = form.slope(lane.load(z + j), V(weight) * da, dg);
      }
      lane.store(dz + j, dg);
      lane.store(a + j, V(weight) * value);
      share += lane.sum(value * da);
    });
    for (int j = 0; j < F; ++j) moe::detail::fixed_axpy<V, D>(a[j], dy, &dw.down[at(e * down_size + j * D)]);
    moe::detail::fixed_product_backward<V, D, wide * F>(x, &w.in[at(e * in_size)], dz, dx, &dw.in[at(e * in_size)]);
    return share;
  }

  /// The choices of the one token as a plan, for the score rules.
  struct small_plan {
    std::array<idx, E + 1> offsets{};
    std::array<idx, K> position{};
    mutable std::array<float, K> weight{};
    idx token_offsets[2] = {};

    explicit small_plan(const context& c) noexcept {
      token_offsets[1] = c.chosen;
      for (int i = 0; i < c.chosen; ++i) ++offsets[at(c.expert[at(i)]) + 1];
      for (int e = 0; e < E; ++e) offsets[at(e) + 1] += offsets[at(e)];
      for (int i = 0; i < c.chosen; ++i) {
        position[at(i)] = offsets[at(c.expert[at(i)])];
        weight[at(position[at(i)])] = c.weight[at(i)];
      }
    }
    moe::detail::plan_pointers pointers() const noexcept {
      return {offsets.data(), token_offsets, position.data(), weight.data(), idx{E}};
    }
  };

  void choose(context& c) const noexcept {
    row_statistics row{};
    constexpr bool ranks = !Rule::ranks_by_score;
    if constexpr (ranks && Rule::over == reduction::all) row = moe::detail::statistics(c.scores.data(), E);
    float best[K] = {};
    c.chosen = 0;
    for (idx e = 0; e < E; ++e) {
      const float z = c.scores[at(e)], key = ranks && eligible(z) ? rule.key(z, row) : z;
      if (!eligible(key) || (c.chosen == K && !(key > best[K - 1]))) continue;
      int j = c.chosen < K ? c.chosen++ : K - 1;
      for (; j > 0 && key > best[j - 1]; --j) {
        best[j] = best[j - 1];
        c.expert[at(j)] = c.expert[at(j - 1)];
      }
      best[j] = key;
      c.expert[at(j)] = e;
    }
    const small_plan p(c);
    moe::detail::weigh_token<Rule>{rule, p.pointers(), {c.scores.data(), 1, E}}(0);
    for (int i = 0; i < c.chosen; ++i) c.weight[at(i)] = p.weight[at(p.position[at(i)])];
  }
};

}  // namespace moe
