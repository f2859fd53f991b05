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
  matrix_view<bf16> q_half, k_half, v_half;                ///< the same rounded, as attention reads them; or empty
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

/// Which rows of floats on the way to attention are kept for backward: all where attention reads floats; else those that a
/// norm, a gate, the convolution or fused logits are differentiated from. The others are scratch of the projections.
template <class C>
struct kept_rows {
  static constexpr bool floats = !rounds<C>, norms = C::normalises_heads;
  static constexpr bool q = floats, q_gated = floats || norms,
                        fused = q_gated || fuses_logits<C> || is_gate<typename C::query_gate>;
  static constexpr bool k_normed = floats || convolves<C>, k_gated = k_normed || norms,
                        k_raw = k_gated || is_gate<typename C::key_gate>;
  static constexpr bool v_raw = floats || is_gate<typename C::value_gate>;
};
/// Carves those that are kept into c, or the others.
template <class C>
void carve_rows_on_the_way(const attention_heads& h, bool kept, attention_context& c, arena& mem) noexcept {
  using keeps = kept_rows<C>;
  const auto rows = [&](matrix_view<float>& to, const char* name, bool wanted, bool is_kept, dim cols) {
    if (wanted && is_kept == kept) to = mem.matrix<float>(name, c.tokens, cols);
  };
  constexpr bool norms = C::normalises_heads, floats = !rounds<C>;
  rows(c.fused, "fused", true, keeps::fused, projection_of<C>::cols(h));
  rows(c.k_raw, "k_raw", true, keeps::k_raw, h.key_cols());
  rows(c.v_raw, "v_raw", true, keeps::v_raw, h.value_cols());
  rows(c.q_gated, "q_gated", is_gate<typename C::query_gate>, keeps::q_gated, h.query_cols());
  rows(c.k_gated, "k_gated", is_gate<typename C::key_gate>, keeps::k_gated, h.key_cols());
  rows(c.q, "q", norms, keeps::q, h.query_cols());
  rows(c.k_normed, "k_normed", norms, keeps::k_normed, h.key_cols());
  rows(c.k, "k", floats && convolves<C>, true, h.key_cols());
  rows(c.v, "v", floats && is_gate<typename C::value_gate>, true, h.value_cols());
}
/// k: blocks of a query, or 0 where it meets all keys.
template <class C>
attention_context carve_attention_context(const attention_heads& h, dim d, dim T, bool training, dim k, arena& mem) noexcept {
  attention_context c;
  c.tokens = T;
  c.training = training;
  const row_carver rows{T, mem};
  constexpr bool norms = C::normalises_heads, gated = is_gate<typename C::output_gate>;
  carve_rows_on_the_way<C>(h, true, c, mem);
  if constexpr (rounds<C>) {
    c.q_half = mem.matrix<bf16>("q_half", T, h.query_cols());
    c.k_half = mem.matrix<bf16>("k_half", T, h.key_cols());
    c.v_half = mem.matrix<bf16>("v_half", T, h.value_cols());
  }
  c.logits = rows("logits", gated && !fuses_logits<C>, h.heads * C::output_gate::head_cols(h.dv));
  c.query_logits = rows("query_logits", is_gate<typename C::query_gate>, h.heads * C::query_gate::head_cols(h.d));
  c.key_logits = rows("key_logits", is_gate<typename C::key_gate>, h.kv_heads * C::key_gate::head_cols(h.d));
  c.value_logits = rows("value_logits", is_gate<typename C::value_gate>, h.kv_heads * C::value_gate::head_cols(h.dv));
  c.layer_logits = rows("layer_logits", is_gate<typename C::layer_gate>, C::layer_gate::head_cols(d));
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
