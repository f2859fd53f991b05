// SPDX-License-Identifier: Apache-2.0
/// What attention computes: heads, sequences, and which keys a query sees.
#pragma once

#include <cmath>

#include "moe/attention/heads.hpp"

namespace moe {

/// Query i of m stands at position n - m + i of the n keys of its sequence; it may have more queries than keys.
struct attention_mask {
  bool causal = true;  ///< no key after its own position
  dim window = 0;      ///< only the last so many up to its own position; 0: all. For causal masks
};

/// Tokens that bring queries, tokens that bring keys, over all sequences.
struct attention_sizes {
  dim queries, keys;
};

/// One sequence: its number, where its queries and its keys begin, and how many there are.
struct attention_sequence {
  dim number, query, queries, key, keys;

  dim position(dim i) const noexcept { return keys - queries + i; }
  /// Query i sees keys first_key .. end_key.
  dim first_key(dim i, attention_mask m) const noexcept {
    return m.causal && m.window > 0 && position(i) >= m.window ? position(i) + 1 - m.window : 0;
  }
  dim end_key(dim i, attention_mask m) const noexcept { return !m.causal ? keys : position(i) < 0 ? 0 : position(i) + 1; }
};

/// o_t = sum over the keys j that t sees of softmax_j(scale <q_t, k_j>) v_j, head by head.
struct attention_problem {
  attention_heads heads;
  attention_mask mask{};
  packed_sequences query_sequences{}, key_sequences{};  ///< as many of both
  float scale = 0;                                      ///< 0: 1 / sqrt(d)

  float score_scale() const noexcept { return scale != 0 ? scale : 1.f / std::sqrt(static_cast<float>(heads.d)); }
  dim sequences() const noexcept {
    return query_sequences.offsets.empty() ? 1 : static_cast<dim>(query_sequences.offsets.size()) - 1;
  }
  attention_sequence sequence(dim s, attention_sizes n) const noexcept {
    const auto i = static_cast<std::size_t>(s);
    attention_sequence a{s, 0, n.queries, 0, n.keys};
    if (const auto of = query_sequences.offsets; !of.empty()) {
      a.query = of[i];
      a.queries = of[i + 1] - a.query;
    }
    if (const auto of = key_sequences.offsets; !of.empty()) {
      a.key = of[i];
      a.keys = of[i + 1] - a.key;
    }
    return a;
  }

  void check(attention_sizes n, const char* what = "attention") const {
    heads.check(what);
    query_sequences.check(n.queries, what, ": query_sequences");
    key_sequences.check(n.keys, what, ": key_sequences");
    if (query_sequences.offsets.size() != key_sequences.offsets.size())
      throw shape_error(std::string(what) + ": key_sequences has " + std::to_string(key_sequences.offsets.size()) +
                        " offsets, expected " + std::to_string(query_sequences.offsets.size()) + " (as query_sequences)");
    if (mask.window < 0 || (mask.window > 0 && !mask.causal))
      throw shape_error(std::string(what) + ": mask.window is " + std::to_string(mask.window) + ", expected " +
                        (mask.causal ? "at least 0" : "0 where mask.causal is false"));
  }
};

}  // namespace moe
