// SPDX-License-Identifier: Apache-2.0
/// self_attention over a cache: pieces of a prefill, and steps of decoding.
#pragma once

#include "moe/attention/self_attention.hpp"
#include "moe/backend/host_decode.hpp"

namespace moe {

namespace detail {

/// Rows first .. first + n of heads.
template <HeadViews X>
struct head_rows {
  X x;
  dim first, n;
  auto operator[](dim a) const noexcept { return x[a].slice(first, n); }
};

}  // namespace detail

template <class C, class B>
template <class T>
void self_attention<C, B>::cache<T>::truncate(dim s, dim n) {
  if constexpr (convolves)
    if (s >= 0 && s < tokens.sizes.sequences && n > 0 && n < tokens.length(s))
      throw shape_error("self_attention::cache::truncate: n is " + std::to_string(n) + ", expected 0 or " +
                        std::to_string(tokens.length(s)) + " (the length of sequence " + std::to_string(s) +
                        "): the convolution keeps its last keys only");
  tokens.truncate(s, n);
  if constexpr (convolves)
    if (n == 0) conv{}.reset(tail, s);
}

template <class C, class B>
template <class T>
std::size_t self_attention<C, B>::scratch_bytes(dim tokens, const cache<T>& past) const noexcept {
  return counted([&](arena& mem) {
    const kv_cache_shape& s = past.tokens.sizes;
    (void)carve_context(tokens, false, mem);
    count_project(tokens, mem);
    if constexpr (!rounds) (void)mem.matrix<float>("q", tokens, heads_.query_cols());
    (void)mem.matrix<idx>("blocks", s.sequences * heads_.heads, selection_.blocks_read());
    count_means(tokens, mem);
    const auto apart = [&](auto carve) {
      scratch_frame frame(mem);
      carve();
    };
    apart([&] {
      if (s.block > 0) (void)make_select_blocks_scratch(s, mem);
      make_decode_scratch(s, selection_.blocks_read(), mem);
    });
    apart([&] {
      (void)carve_rows<T>(s.capacity, mem);
      select([&] { return carve_blocks({}, 1, s.capacity, mem); }, [&](const auto& selection) {
        count_attend(backend_, problem({}), {tokens, s.capacity}, selection, mem);
      });
    });
  });
}

template <class C, class B>
template <class T>
void self_attention<C, B>::forward(const weights& w, input in, matrix_view<float> y, cache<T>& past, arena& mem) const {
  const dim tokens = in.x.rows, sequences = past.tokens.sizes.sequences;
  check_causal("self_attention::forward: ");
  scratch_frame frame(mem);
  (void)detail::opened(mem, scratch_bytes(tokens, past), "self_attention::forward: the arena", "scratch_bytes(T, cache)");
  context c = carve_context(tokens, false, mem);
  check_call(w, in, y, c, mem, "self_attention::forward: y", false);
  expect(in.sequences.count(), sequences, "self_attention::forward: in", "sequences", "S of the cache");
  bool one_each = tokens == sequences;
  for (dim s = 0; s < sequences; ++s) {
    const dim n = in.sequences.last(s, tokens) - in.sequences.first(s);
    one_each = one_each && n == 1;
    if (past.tokens.length(s) + n > past.tokens.sizes.capacity)
      throw shape_error("self_attention::forward: sequence " + std::to_string(s) + " of the cache holds " +
                        std::to_string(past.tokens.length(s)) + " tokens and " + std::to_string(n) +
                        " come, expected at most " + std::to_string(past.tokens.sizes.capacity) + " (capacity)");
  }
  in.sequences.past = past.tokens.lengths;
  rotary_.check(in.angles, in.sequences, tokens);

  mem.align();
  const call<B> on{backend_, mem, {.tokens = tokens, .d = d_}};
  if constexpr (convolves) project(on, w, in, c, past.tail);
  else project(on, w, in, c);
  past.tokens.append(on, packed_sequences{in.sequences.offsets, {}}, key_rows(c), value_rows(c));
  if (one_each) decode_tokens(on, c, past);
  else extend_tokens(on, in, c, past);
  project_back(on, w, c, y);
}

template <class C, class B>
template <class T>
void self_attention<C, B>::decode_tokens(const call<B>& on, const context& c, cache<T>& past) const {
  const dim h = heads_.heads;
  matrix_view<std::conditional_t<rounds, bf16, float>> q;
  if constexpr (rounds) {
    q = c.q_half;
  } else if constexpr (C::normalises_heads) {
    q = c.q;
  } else if constexpr (gates_queries) {
    q = c.q_gated;
  } else if constexpr (detail::fuses_logits<C>) {
    q = on.scratch.template matrix<float>("q", c.tokens, heads_.query_cols());
    for (dim a = 0; a < h; ++a)
      for (dim t = 0; t < c.tokens; ++t)
        std::memcpy(q.row(t) + a * heads_.d, queries(c)[a].row(t), static_cast<std::size_t>(heads_.d) * sizeof(float));
  } else {
    q = c.fused;
  }
  decode_options options;
  options.window = mask_.window;
  if (past.tokens.sizes.block > 0) {
    const matrix_view<idx> blocks = on.scratch.template matrix<idx>("blocks", c.tokens * h, selection_.blocks_read());
    select_blocks(on, past.tokens, q, blocks);
    options.blocks = blocks;
  }
  decode(on, past.tokens, q, c.gated, {}, options);
  if constexpr (gated)
    gate_.forward(on, logits(c.fused, c.logits), h, split_heads(c.gated, h), split_heads(c.gated, h));
}

template <class C, class B>
template <class T>
void self_attention<C, B>::extend_tokens(const call<B>& on, const input& in, const context& c, cache<T>& past) const noexcept {
  const auto gates = bind_gate(on, c);
  for (dim s = 0; s < past.tokens.sizes.sequences; ++s) {
    const dim first = in.sequences.first(s), n = in.sequences.last(s, c.tokens) - first;
    if (n == 0) continue;
    scratch_frame frame(on.scratch);
    const detail::head_rows<decltype(queries(c))> q{queries(c), first, n};
    const auto rows = carve_rows<T>(past.tokens.length(s), on.scratch);
    on.executor().for_each(heads_.kv_heads, 1, [&](dim a, dim last) {
      for (; a < last; ++a) {
        past.tokens.read_keys(s, a, 0, rows.first.columns(a * heads_.d, heads_.d));
        past.tokens.read_values(s, a, 0, rows.second.columns(a * heads_.dv, heads_.dv));
      }
    });
    // As a step of decoding chooses: by the means of the keys as they came, not as they are stored.
    const auto means = [&](const key_blocks& blocks) noexcept {
      for (dim b = 0; b < detail::blocks(past.tokens.length(s), blocks.block); ++b)
        for (dim a = 0; a < heads_.kv_heads; ++a) past.tokens.centroid(s, a, b, blocks.centroids.row(b) + a * heads_.d);
    };
    attend_tokens(on, problem({}), c, gates, first, q, split_heads(rows.first, heads_.kv_heads),
                  split_heads(rows.second, heads_.kv_heads), means);
  }
}

}  // namespace moe
