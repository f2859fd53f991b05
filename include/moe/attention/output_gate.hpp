// SPDX-License-Identifier: Apache-2.0
/// Gates on the heads of attention, and where their logits lie.
#pragma once

#include "moe/attention/heads.hpp"
#include "moe/concepts.hpp"
#include "moe/expert/activation.hpp"

namespace moe {

/// 1 / (1 + exp(-z)). The slope is exact where the value rounds to one.
struct sigmoid {
  template <class V>
  MOE_HD V operator()(V z) const noexcept {
    return detail::sigmoid(z);
  }
  template <class V>
  MOE_HD V slope(V z) const noexcept {
    using std::exp;
    const V e = exp(detail::where(z < V(0), z, -z));
    return e / ((V(1) + e) * (V(1) + e));
  }
};
/// 1/2 + sigmoid(z)/2, which cannot close.
struct ns_sigmoid {
  template <class V>
  MOE_HD V operator()(V z) const noexcept {
    return V(0.5f) + V(0.5f) * detail::sigmoid(z);
  }
  template <class V>
  MOE_HD V slope(V z) const noexcept {
    return V(0.5f) * sigmoid{}.slope(z);
  }
};

/// One logit for each channel of each head.
struct elementwise {
  static constexpr bool shared = false;
  static constexpr dim head_cols(dim width) noexcept { return width; }
};
/// One logit for each head.
struct headwise {
  static constexpr bool shared = false;
  static constexpr dim head_cols(dim) noexcept { return 1; }
};
/// One logit for each channel of each head; their mean over the heads gates every head alike.
struct head_shared {
  static constexpr bool shared = true;
  static constexpr dim head_cols(dim width) noexcept { return width; }
};

/// y g(s)
struct multiplicative {
  static constexpr bool scales = true;
};
/// y + g(s)
struct additive {
  static constexpr bool scales = false;
};

/// y' = y * g(s), or y + g(s), for n heads of the same width, with logits s from the same input as the queries: no norm and
/// no rotation touches them. On the output of attention, n = h and the width is dv: position G1. The same gate acts on
/// values and keys (G2, G3: n = h_kv), on queries (G4) and, with n = 1, on the output of the layer (G5).
///
/// saves    nothing: backward reads y before the gate and s. It never divides y' by g, which is small by design.
/// backward dy = dy' * g(s);  ds = dy' y g'(s), its sum over the head where one logit gates all of it
///          and so <dy, y> = <dy', y'> for a multiplicative gate: what attention calls delta comes from either pair.
/// Tensors are floats or halves; g and its slope are computed in float from s.
/// Qiu et al. 2025, Gated Attention for Large Language Models, arXiv:2505.06708
template <class Granularity = elementwise, class Activation = sigmoid, class Form = multiplicative>
struct output_gate {
  using granularity = Granularity;
  static constexpr bool scales = Form::scales;

  [[no_unique_address]] Activation activation{};

  /// Logits of a head, and of a token: columns of their projection.
  static constexpr dim head_cols(dim width) noexcept { return Granularity::head_cols(width); }
  static constexpr dim cols(dim n, dim width) noexcept { return n * head_cols(width); }
  /// Parameters that the projection of the logits has, without a bias.
  static constexpr dim parameters(dim model, dim n, dim width) noexcept { return model * cols(n, width); }

  /// The logits' means over the heads, where they are shared.
  matrix_view<float> make_scratch(dim tokens, dim width, arena& mem) const noexcept {
    return Granularity::shared ? mem.matrix<float>("mean", tokens, width) : matrix_view<float>{};
  }
  /// Logits as `apply` wants them: [a].row(t) gates head a of token t. Shared logits are averaged into `mean`.
  template <class B, HeadViews S>
  auto bind(const call<B>& on, const S& s, dim n, matrix_view<float> mean) const noexcept {
    if constexpr (Granularity::shared) {
      for_each_token(on, s[0].rows, average<S>{s, n, mean});
      return matrix_stack<const float>{mean, 0};
    } else {
      return s;
    }
  }

  /// Gates one head of one token in place, as in the epilogue of attention. `s` are its logits, from `bind`.
  template <class Arch, class T>
  void apply(Arch arch, const T* s, float* y, dim width) const noexcept {
    if constexpr (whole_heads) {
      const float g = activation(static_cast<float>(*s));
      for (dim j = 0; j < width; ++j) y[j] = join(y[j], g);
    } else {
      for (dim j = 0; j < width; j += piece) {
        float wide[piece];
        const dim n = detail::at_most(width - j, piece);
        for_each_lane(arch, n, [this, from = in_float(s + j, wide, n), to = y + j](dim i, auto lane) {
          lane.store(to + i, join(lane.load(to + i), activation(lane.load(from + i))));
        });
      }
    }
  }

  /// to = the gated y; they may be the same. Takes make_scratch from on.scratch.
  template <class B, HeadViews S, HeadViews Y, HeadViews To>
  void forward(const call<B>& on, const S& s, dim n, const Y& y, const To& to) const noexcept {
    scratch_frame frame(on.scratch);
    const auto logits = bind(on, s, n, make_scratch(y[0].rows, y[0].cols, on.scratch));
    for_each_token(on, y[0].rows,
                   gate_token<typename B::arch, std::remove_cv_t<decltype(logits)>, Y, To>{*this, logits, n, y, to});
  }
  /// From y before the gate. dy and ds are overwritten; dy may be dto.
  template <class B, HeadViews S, HeadViews Y, HeadViews DTo, HeadViews DY, HeadViews DS>
  void backward(const call<B>& on, const S& s, dim n, const Y& y, const DTo& dto, const DY& dy,
                const DS& ds) const noexcept {
    scratch_frame frame(on.scratch);
    const auto logits = bind(on, s, n, make_scratch(y[0].rows, y[0].cols, on.scratch));
    for_each_token(on, y[0].rows,
                   differentiate<typename B::arch, std::remove_cv_t<decltype(logits)>, Y, DTo, DY, DS>{*this, logits, n, y,
                                                                                                       dto, dy, ds});
  }

 private:
  static constexpr dim piece = 64;  // floats at once where tensors are halves
  static constexpr bool whole_heads = std::is_same_v<Granularity, headwise>;

  template <class V>
  static V join(V y, V g) noexcept {
    if constexpr (Form::scales)
      return y * g;
    else
      return y + g;
  }
  /// x itself, or its n halves as floats at `to`.
  template <class T>
  static const float* in_float(const T* x, float* to, dim n) noexcept {
    if constexpr (std::is_same_v<T, float>) {
      return x;
    } else {
      for (dim j = 0; j < n; ++j) to[j] = static_cast<float>(x[j]);
      return to;
    }
  }
  template <class T>
  static void put(const float* from, T* to, dim n) noexcept {
    for (dim j = 0; j < n; ++j) to[j] = T(from[j]);
  }

  template <class S>
  struct average {
    S s;
    dim n;
    matrix_view<float> mean;
    void operator()(dim t) const noexcept {
      float* to = mean.row(t);
      for (dim j = 0; j < mean.cols; ++j) to[j] = 0;
      for (dim a = 0; a < n; ++a) {
        const auto* from = s[a].row(t);
        for (dim j = 0; j < mean.cols; ++j) to[j] += static_cast<float>(from[j]);
      }
      for (dim j = 0; j < mean.cols; ++j) to[j] /= static_cast<float>(n);
    }
  };
  template <class Arch, class S, class Y, class To>
  struct gate_token {
    output_gate gate;
    S s;
    dim n;
    Y y;
    To to;
    void operator()(dim t) const noexcept {
      for (dim a = 0; a < n; ++a) {
        const auto* from = y[a].row(t);
        const auto* logit = s[a].row(t);
        for (dim j = 0; j < y[a].cols; j += piece) {
          float near[piece];
          const dim m = detail::at_most(y[a].cols - j, piece);
          for (dim i = 0; i < m; ++i) near[i] = static_cast<float>(from[j + i]);
          gate.apply(Arch{}, whole_heads ? logit : logit + j, near, m);
          put(near, to[a].row(t) + j, m);
        }
      }
    }
  };
  /// dy = dto g(s) and ds = dto y g'(s), in float and for at most a piece.
  template <class Arch>
  void slopes(Arch arch, const float* s, const float* y, const float* dto, float* dy, float* ds, dim n) const noexcept {
    for_each_lane(arch, n, [=, this](dim j, auto lane) {
      const auto z = lane.load(s + j), up = lane.load(dto + j);
      if constexpr (Form::scales) {
        lane.store(ds + j, up * lane.load(y + j) * activation.slope(z));
        lane.store(dy + j, up * activation(z));
      } else {
        lane.store(ds + j, up * activation.slope(z));
        lane.store(dy + j, up);
      }
    });
  }
  template <class Arch, class S, class Y, class DTo, class DY, class DS>
  struct differentiate {
    output_gate gate;
    S s;
    dim n;
    Y y;
    DTo dto;
    DY dy;
    DS ds;
    void operator()(dim t) const noexcept {
      if constexpr (whole_heads) {
        for (dim a = 0; a < n; ++a) whole_head(t, a);
      } else {
        for (dim j = 0; j < y[0].cols; j += piece) channels(t, j, detail::at_most(y[0].cols - j, piece));
      }
    }
    void whole_head(dim t, dim a) const noexcept {
      const float z = static_cast<float>(s[a](t, 0)), g = gate.activation(z);
      const auto* value = y[a].row(t);
      const auto* up = dto[a].row(t);
      auto* to = dy[a].row(t);
      using out = std::remove_cvref_t<decltype(*to)>;
      const float sum = detail::sum_of(y[a].cols, [value, up](dim j) {
        return Form::scales ? static_cast<float>(up[j]) * static_cast<float>(value[j]) : static_cast<float>(up[j]);
      });
      for (dim j = 0; j < y[a].cols; ++j)
        to[j] = out(Form::scales ? static_cast<float>(up[j]) * g : static_cast<float>(up[j]));
      const float slope = sum * gate.activation.slope(z);
      put(&slope, &ds[a](t, 0), 1);
    }
    void channels(dim t, dim j, dim m) const noexcept {
      float wide[3][piece], dvalue[piece], dlogit[piece], total[piece] = {};
      for (dim a = 0; a < n; ++a) {
        gate.slopes(Arch{}, in_float(s[a].row(t) + j, wide[0], m), in_float(y[a].row(t) + j, wide[1], m),
                    in_float(dto[a].row(t) + j, wide[2], m), dvalue, dlogit, m);
        put(dvalue, dy[a].row(t) + j, m);
        if constexpr (Granularity::shared)
          for (dim i = 0; i < m; ++i) total[i] += dlogit[i];
        else
          put(dlogit, ds[a].row(t) + j, m);
      }
      if constexpr (Granularity::shared) {
        for (dim i = 0; i < m; ++i) total[i] /= static_cast<float>(n);
        for (dim a = 0; a < n; ++a) put(total, ds[a].row(t) + j, m);
      }
    }
  };
};

/// The output of attention as it is.
struct no_output_gate {
  static constexpr dim head_cols(dim) noexcept { return 0; }
};

/// One projection for queries and gate logits, in the layout of the published checkpoints: for each key head the queries of
/// its group, G*d columns, then their logits, G or G*dv columns. Splitting all columns into queries and logits is wrong for
/// more than one key head. Nothing is moved: both are views of the fused rows, of gradients as well.
template <class Gate>
struct grouped_projection {
  static constexpr dim group_cols(const attention_heads& h) noexcept { return h.group() * (h.d + Gate::head_cols(h.dv)); }
  static constexpr dim cols(const attention_heads& h) noexcept { return h.kv_heads * group_cols(h); }

  template <class T>
  static constexpr grouped_heads<T> queries(matrix_view<T> fused, const attention_heads& h) noexcept {
    return {fused.columns(0, h.d), h.group(), h.d, group_cols(h)};
  }
  template <class T>
  static constexpr grouped_heads<T> logits(matrix_view<T> fused, const attention_heads& h) noexcept {
    const dim own = Gate::head_cols(h.dv);
    return {fused.columns(h.group() * h.d, own), h.group(), own, group_cols(h)};
  }
};

/// Logits from a matrix of their own, the heads side by side as those of the queries.
template <class Gate>
struct separate_projection {
  static constexpr dim cols(const attention_heads& h) noexcept { return h.query_cols(); }
  static constexpr dim logit_cols(const attention_heads& h) noexcept { return h.heads * Gate::head_cols(h.dv); }

  template <class T>
  static constexpr matrix_stack<T> queries(matrix_view<T> q, const attention_heads& h) noexcept {
    return split_heads(q, h.heads);
  }
  template <class T>
  static constexpr matrix_stack<T> logits(matrix_view<T> s, const attention_heads& h) noexcept {
    return split_heads(s, h.heads);
  }
};

}  // namespace moe
