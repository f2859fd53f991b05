// SPDX-License-Identifier: Apache-2.0
/// What a layer of attention computes on its way, forward and backward; what its features do not need stays empty.
///
/// Rows of T tokens and nothing of a pair of them. In floats a token, with q = h d_k, u = h_kv d_k, v = h_kv dv, o = h dv and
/// c1 to c5 logits of the gates G1 to G5:
///   context    q + u + v + o + h;  G1: o + c1;  G2 to G5: v + c2, u + c3, q + c4, d + c5;  heads normalised:
///              q + u + h + h_kv;  convolution: u;  k blocks of a query: h (k - 1)
///   slopes     q + u + v + o + h + c1 + .. + c5;  G5: d;  convolution: u
/// Of inference the context lacks the h beside q, the o beside c1, h + h_kv of the norms and the blocks.
#pragma once

#include "moe/attention/features.hpp"

namespace moe {

/// What forward of a self_attention computes; made for backward, it keeps what that reads.
struct attention_context {
  dim tokens = 0;
  bool training = false;
  matrix_view<float> fused, k_raw, v_raw;  ///< [T, projection::cols], [T, h_kv*d_k], [T, h_kv*dv]: of the projections
  matrix_view<float> logits, query_logits, key_logits, value_logits, layer_logits;  ///< [T, heads*head_cols], of the gates
  matrix_view<float> q_gated, k_gated, q, k_normed, k, v;  ///< on the way to attention, as wide as what they are made of
  matrix_view<float> o, gated;                             ///< [T, h*dv]: of attention before its gate, and behind it
  matrix_view<float> lse;                                  ///< [T,h]
  matrix_view<float> y;                                    ///< [T,d] before the gate of the layer
  rms_norm::context q_norm, k_norm;
  matrix_view<idx> chosen;                                 ///< [T*h, k-1], see key_blocks
};

namespace detail {

/// Gradients of what the context of the same name holds.
struct attention_slopes {
  matrix_view<float> dgated, delta, dfused, dk, dk_raw, dv, dlogits, dquery, dkey, dvalue, dlayer, dy;
};

/// T rows, or none.
struct row_carver {
  dim tokens;
  arena& mem;
  matrix_view<float> operator()(const char* name, bool wanted, dim cols) const noexcept {
    return wanted ? mem.matrix<float>(name, tokens, cols) : matrix_view<float>{};
  }
};

/// k: blocks of a query, or 0 where it meets all keys.
template <class C>
attention_context carve_attention_context(const attention_heads& h, dim d, dim T, bool training, dim k, arena& mem) noexcept {
  attention_context c;
  c.tokens = T;
  c.training = training;
  const row_carver rows{T, mem};
  constexpr bool norms = C::normalises_heads, gated = is_gate<typename C::output_gate>;
  c.fused = rows("fused", true, projection_of<C>::cols(h));
  c.k_raw = rows("k_raw", true, h.key_cols());
  c.v_raw = rows("v_raw", true, h.value_cols());
  c.logits = rows("logits", gated && !fuses_logits<C>, h.heads * C::output_gate::head_cols(h.dv));
  c.query_logits = rows("query_logits", is_gate<typename C::query_gate>, h.heads * C::query_gate::head_cols(h.d));
  c.key_logits = rows("key_logits", is_gate<typename C::key_gate>, h.kv_heads * C::key_gate::head_cols(h.d));
  c.value_logits = rows("value_logits", is_gate<typename C::value_gate>, h.kv_heads * C::value_gate::head_cols(h.dv));
  c.layer_logits = rows("layer_logits", is_gate<typename C::layer_gate>, C::layer_gate::head_cols(d));
  c.q_gated = rows("q_gated", is_gate<typename C::query_gate>, h.query_cols());
  c.k_gated = rows("k_gated", is_gate<typename C::key_gate>, h.key_cols());
  c.q = rows("q", norms, h.query_cols());
  c.k_normed = rows("k_normed", norms, h.key_cols());
  c.k = rows("k", convolves<C>, h.key_cols());
  c.v = rows("v", is_gate<typename C::value_gate>, h.value_cols());
  c.o = rows("o", training && gated, h.output_cols());
  c.gated = rows("gated", true, h.output_cols());
  c.lse = rows("lse", training, h.heads);
  c.y = rows("y", is_gate<typename C::layer_gate>, d);
  if (training && norms) {
    c.q_norm = rms_norm{}.make_context(T, mem, h.heads);
    c.k_norm = rms_norm{}.make_context(T, mem, h.kv_heads);
  }
  if (training && k > 0) c.chosen = mem.matrix<idx>("chosen", T * h.heads, k - 1);
  return c;
}
template <class C>
attention_slopes carve_attention_slopes(const attention_heads& h, dim d, dim T, arena& mem) noexcept {
  attention_slopes s;
  const row_carver rows{T, mem};
  s.dgated = rows("dgated", true, h.output_cols());
  s.delta = rows("delta", true, h.heads);
  s.dfused = rows("dfused", true, projection_of<C>::cols(h));
  s.dk = rows("dk", true, h.key_cols());
  s.dk_raw = rows("dk_raw", convolves<C>, h.key_cols());
  s.dv = rows("dv", true, h.value_cols());
  s.dlogits = rows("dlogits", is_gate<typename C::output_gate> && !fuses_logits<C>, h.heads * C::output_gate::head_cols(h.dv));
  s.dquery = rows("dquery", is_gate<typename C::query_gate>, h.heads * C::query_gate::head_cols(h.d));
  s.dkey = rows("dkey", is_gate<typename C::key_gate>, h.kv_heads * C::key_gate::head_cols(h.d));
  s.dvalue = rows("dvalue", is_gate<typename C::value_gate>, h.kv_heads * C::value_gate::head_cols(h.dv));
  s.dlayer = rows("dlayer", is_gate<typename C::layer_gate>, C::layer_gate::head_cols(d));
  s.dy = rows("dy", is_gate<typename C::layer_gate>, d);
  return s;
}

}  // namespace detail
}  // namespace moe
