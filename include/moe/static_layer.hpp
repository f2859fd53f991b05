// SPDX-License-Identifier: Apache-2.0
/// A small layer of fixed shape for a control loop: arrays for memory, one token at a time, no heap, no threads, no packing.
#pragma once

#include <array>

#include "moe/backend/scalar.hpp"
#include "moe/expert/activation.hpp"
#include "moe/expert/ffn.hpp"
#include "moe/router/weigh.hpp"

namespace moe {

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
  struct weights {
    std::array<float, E * D> router{};           ///< [E,d]
    std::array<float, E * wide * F * D> in{};    ///< [E,f,d] up; when gated [E,2f,d]: gate rows, then up rows, of each expert
    std::array<float, E * D * F> down{};         ///< [E,d,f]
  };
  struct context {
    std::array<float, E> scores{};
    std::array<idx, K> expert{};                 ///< best first
    std::array<float, K> weight{};
    std::array<float, K * wide * F> z{};         ///< pre-activations
    int chosen = 0;                              ///< fewer than K where fewer are eligible
  };

  weights w{};
  [[no_unique_address]] Form form{};
  [[no_unique_address]] Rule rule{};

  /// Copies the weights of a run-time layer of the same shape, up and gate separate, no biases.
  void load(matrix_view<const float> gate, const ffn_weights& from) {
    expect(gate, E, D, "static_layer: gate", "E x d");
    basic_ffn_expert<Form>{form}.check(from, {.tokens = 1, .d = D, .f = F, .experts = E});
    copy_rows(gate, w.router.data());
    for (int e = 0; e < E; ++e) {
      float* to = &w.in[at(e * wide * F * D)];
      if constexpr (Form::gated) to = copy_rows(from.gate.slice(e * F, F), to);
      copy_rows(from.up.slice(e * F, F), to);
    }
    copy_rows(from.down, w.down.data());
  }

  /// y[D] from x[D].
  void forward(const float* x, float* y, context& c) const noexcept {
    for (int e = 0; e < E; ++e) c.scores[at(e)] = dot(level, x, &w.router[at(e * D)], D);
    choose(c);
    for (int j = 0; j < D; ++j) y[j] = 0;
    for (int i = 0; i < c.chosen; ++i) {
      float* z = &c.z[at(i * wide * F)];
      const int e = c.expert[at(i)];
      for (int j = 0; j < wide * F; ++j) z[j] = dot(level, x, &w.in[at((e * wide * F + j) * D)], D);
      std::array<float, F> a;
      for (int j = 0; j < F; ++j) a[at(j)] = value(z, j);
      for (int j = 0; j < D; ++j) y[j] += c.weight[at(i)] * dot(level, a.data(), &w.down[at((e * D + j) * F)], F);
    }
  }
  void forward(const float* x, float* y) const noexcept {
    context c;
    forward(x, y, c);
  }

  /// dy[D] -> dx[D] (+=), dw (+=), with the context and x of forward.
  void backward(const float* x, const context& c, const float* dy, float* dx, weights& dw) const noexcept {
    std::array<float, K> dweight{};
    for (int i = 0; i < c.chosen; ++i) dweight[at(i)] = expert_backward(x, c, i, dy, dx, dw);
    std::array<float, E> dscores{};
    const small_plan p(c);
    std::array<float, K> by_row{};
    for (int i = 0; i < c.chosen; ++i) by_row[at(p.position[at(i)])] = dweight[at(i)];
    moe::detail::weigh_token_backward<Rule>{rule, p.pointers(), {c.scores.data(), 1, E}, by_row.data(), {dscores.data(), 1, E}}(0);
    for (int e = 0; e < E; ++e) {
      axpy(level, dscores[at(e)], &w.router[at(e * D)], dx, D);
      axpy(level, dscores[at(e)], x, &dw.router[at(e * D)], D);
    }
  }

 private:
  static constexpr arch::scalar level{};
  static constexpr std::size_t at(int i) noexcept { return static_cast<std::size_t>(i); }

  static float* copy_rows(matrix_view<const float> from, float* to) noexcept {
    for (dim r = 0; r < from.rows; ++r)
      for (dim j = 0; j < from.cols; ++j) *to++ = from(r, j);
    return to;
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
  float value(const float* z, int j) const noexcept {
    if constexpr (Form::gated) return form(z[j], z[F + j]);
    else return form(z[j]);
  }
  /// Returns dweight of choice i.
  float expert_backward(const float* x, const context& c, int i, const float* dy, float* dx, weights& dw) const noexcept {
    const int e = c.expert[at(i)];
    const float *z = &c.z[at(i * wide * F)], weight = c.weight[at(i)];
    float share = 0;
    for (int j = 0; j < F; ++j) {
      float da = 0;
      for (int k = 0; k < D; ++k) da += dy[k] * w.down[at((e * D + k) * F + j)];
      float dz[2] = {}, a;
      if constexpr (Form::gated) a = form.slope(z[j], z[F + j], weight * da, dz[0], dz[1]);
      else a = form.slope(z[j], weight * da, dz[0]);
      share += da * a;
      for (int k = 0; k < D; ++k) dw.down[at((e * D + k) * F + j)] += weight * dy[k] * a;
      for (int half = 0; half < wide; ++half) {
        const int row = (e * wide * F + half * F + j) * D;
        axpy(level, dz[half], x, &dw.in[at(row)], D);
        axpy(level, dz[half], &w.in[at(row)], dx, D);
      }
    }
    return share;
  }
};

}  // namespace moe
