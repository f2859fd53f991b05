// SPDX-License-Identifier: Apache-2.0
/// What a layer of attention is made of.
#pragma once

#include "moe/attention/key_convolution.hpp"
#include "moe/attention/output_gate.hpp"
#include "moe/attention/problem.hpp"
#include "moe/attention/rotary.hpp"
#include "moe/core/dtype.hpp"
#include "moe/norm/rms_norm.hpp"

namespace moe {

/// Keys as they are.
struct no_key_convolution {
  using weights = nothing;
};

/// All keys that the mask shows.
struct dense_attention {
  static constexpr bool blocks = false;

  void check(const attention_mask&) const noexcept {}
  dim blocks_read() const noexcept { return 0; }
};
/// The best k blocks of `block` keys, the query's own among them; or all keys, where a layer is to be dense.
/// Lu et al. 2025 (MoBA), arXiv:2502.13189
struct block_attention {
  static constexpr bool blocks = true;
  dim block = 128;
  dim k = 8;
  bool dense = false;

  /// Throws shape_error for sizes under 1, and for a mask that blocks do not keep.
  void check(const attention_mask& mask) const {
    const auto positive = [](dim n, const char* name) {
      if (n <= 0)
        throw shape_error(std::string("self_attention: ") + name + " is " + std::to_string(n) + ", expected at least 1");
    };
    positive(block, "block");
    positive(k, "k");
    if (!dense && (!mask.causal || mask.window > 0))
      throw shape_error("self_attention: mask is not plain causal, expected it to be for blocks of keys");
  }
  /// Of a head, in a step of decoding; 0: all keys.
  dim blocks_read() const noexcept { return dense ? 0 : k; }
};

/// The features of a self_attention; derive from it and name what is different:
///
///   struct gated : moe::attention_features {
///     using rotary = moe::rotary<>;
///     using output_gate = moe::output_gate<moe::headwise>;
///   };
///
/// In this order: projections, with biases; the gates of queries (G4), keys (G3) and values (G2); the norm of the heads of
/// queries and keys; rotation; key convolution; attention; its gate (G1); the projection of the output; the gate of the
/// layer (G5). Logits of gates come from the same input, neither normalised nor rotated.
/// G1 to G5: Qiu et al. 2025, Gated Attention for Large Language Models, arXiv:2505.06708
struct attention_features {
  /// Of queries, keys and values as attention reads them: float, or bf16, to which they are rounded once, so that attention
  /// multiplies halves where the machine has instructions for it (levels avx512_bf16 and amx). Weights and gradients stay
  /// floats.
  using element = float;
  using selection = dense_attention;
  using rotary = no_rotary;
  using key_convolution = no_key_convolution;
  using output_gate = no_output_gate;
  using query_gate = no_output_gate;
  using key_gate = no_output_gate;
  using value_gate = no_output_gate;
  using layer_gate = no_output_gate;
  /// Where the logits of output_gate come from: a matrix of their own, or grouped_projection, columns of the queries' one.
  template <class Gate>
  using projection = separate_projection<Gate>;
  static constexpr bool normalises_heads = false;
  static constexpr bool biased = false;  ///< queries (with fused logits), keys and values
};

/// Weights of a self_attention, and their gradients; what its features do not need stays empty.
template <class C>
struct attention_weights {
  matrix_view<float> q;              ///< [projection::cols, d]
  matrix_view<float> k, v;           ///< [h_kv*d_k, d], [h_kv*dv, d]
  matrix_view<float> o;              ///< [d, h*dv]
  matrix_view<float> q_bias, k_bias, v_bias;                           ///< [., 1]
  matrix_view<float> output_gate;                                      ///< [h*head_cols, d], where it is not fused
  matrix_view<float> query_gate, key_gate, value_gate, layer_gate;     ///< [heads*head_cols, d]
  rms_norm::weights q_norm, k_norm;  ///< [d_k]
  [[no_unique_address]] typename C::key_convolution::weights convolution{};

  template <class F>
  void each(const F& f) const {
    f(q, k, v, o, q_bias, k_bias, v_bias, output_gate, query_gate, key_gate, value_gate, layer_gate, q_norm, k_norm,
      convolution);
  }
};

namespace detail {

/// The last keys that a convolution keeps of each sequence.
template <class Conv>
struct key_tail {
  using type = typename Conv::template tail<float>;
};
template <>
struct key_tail<no_key_convolution> {
  using type = nothing;
};

template <class C>
inline constexpr bool rounds = !std::same_as<typename C::element, float>;
template <class Gate>
inline constexpr bool is_gate = !std::same_as<Gate, no_output_gate>;
template <class C>
inline constexpr bool convolves = !std::same_as<typename C::key_convolution, no_key_convolution>;
template <class C>
using projection_of = typename C::template projection<typename C::output_gate>;
/// Whether the logits of the output gate are columns of the projection of queries.
template <class C>
inline constexpr bool fuses_logits = std::same_as<projection_of<C>, grouped_projection<typename C::output_gate>>;

template <class C>
attention_weights<C> carve_attention_weights(const attention_heads& h, dim d, const typename C::key_convolution& convolution,
                                             arena& mem) noexcept {
  attention_weights<C> w;
  const auto matrix = [&](const char* name, dim rows) { return mem.matrix<float>(name, rows, d); };
  const auto bias = [&](const char* name, dim rows) { return mem.matrix<float>(name, rows, 1, initial::zeros); };
  const auto gate = [&]<class Gate>(Gate, const char* name, dim n, dim width) {
    return is_gate<Gate> ? matrix(name, n * Gate::head_cols(width)) : matrix_view<float>{};
  };
  const dim q = projection_of<C>::cols(h);
  w.q = matrix("q", q);
  w.k = matrix("k", h.key_cols());
  w.v = matrix("v", h.value_cols());
  w.o = mem.matrix<float>("o", d, h.output_cols());
  if constexpr (C::biased) {
    w.q_bias = bias("q_bias", q);
    w.k_bias = bias("k_bias", h.key_cols());
    w.v_bias = bias("v_bias", h.value_cols());
  }
  if constexpr (!fuses_logits<C>) w.output_gate = gate(typename C::output_gate{}, "output_gate", h.heads, h.dv);
  w.query_gate = gate(typename C::query_gate{}, "query_gate", h.heads, h.d);
  w.key_gate = gate(typename C::key_gate{}, "key_gate", h.kv_heads, h.d);
  w.value_gate = gate(typename C::value_gate{}, "value_gate", h.kv_heads, h.dv);
  w.layer_gate = gate(typename C::layer_gate{}, "layer_gate", 1, d);
  if constexpr (C::normalises_heads) {
    arena::scope q_scope(mem, "q_norm");
    w.q_norm = rms_norm{}.make_weights(h.d, mem);
  }
  if constexpr (C::normalises_heads) {
    arena::scope k_scope(mem, "k_norm");
    w.k_norm = rms_norm{}.make_weights(h.d, mem);
  }
  if constexpr (convolves<C>) {
    arena::scope scope(mem, "convolution");
    w.convolution = convolution.make_weights(h.key_cols(), mem);
  }
  return w;
}
/// Throws shape_error for weights of another shape.
template <class C>
void check_attention_weights(const attention_weights<C>& w, const attention_heads& h, dim d) {
  const auto gate = [&]<class Gate>(Gate, matrix_view<float> m, const char* what, dim n, dim width) {
    if constexpr (is_gate<Gate>) expect(m, n * Gate::head_cols(width), d, what, "heads*head_cols x d");
  };
  expect(w.q, projection_of<C>::cols(h), d, "self_attention: q", "columns of the projection x d");
  expect(w.k, h.key_cols(), d, "self_attention: k", "h_kv*d_k x d");
  expect(w.v, h.value_cols(), d, "self_attention: v", "h_kv*dv x d");
  expect(w.o, d, h.output_cols(), "self_attention: o", "d x h*dv");
  if constexpr (C::biased) {
    expect(w.q_bias, projection_of<C>::cols(h), 1, "self_attention: q_bias", "columns of the projection x 1");
    expect(w.k_bias, h.key_cols(), 1, "self_attention: k_bias", "h_kv*d_k x 1");
    expect(w.v_bias, h.value_cols(), 1, "self_attention: v_bias", "h_kv*dv x 1");
  }
  if constexpr (!fuses_logits<C>)
    gate(typename C::output_gate{}, w.output_gate, "self_attention: output_gate", h.heads, h.dv);
  gate(typename C::query_gate{}, w.query_gate, "self_attention: query_gate", h.heads, h.d);
  gate(typename C::key_gate{}, w.key_gate, "self_attention: key_gate", h.kv_heads, h.d);
  gate(typename C::value_gate{}, w.value_gate, "self_attention: value_gate", h.kv_heads, h.dv);
  gate(typename C::layer_gate{}, w.layer_gate, "self_attention: layer_gate", 1, d);
  if constexpr (C::normalises_heads) {
    rms_norm{}.check(w.q_norm, h.d, "self_attention: q_norm");
    rms_norm{}.check(w.k_norm, h.d, "self_attention: k_norm");
  }
  if constexpr (convolves<C>) typename C::key_convolution{}.check(w.convolution, h.key_cols());
}

}  // namespace detail
}  // namespace moe
