// SPDX-License-Identifier: Apache-2.0
/// What attention reads: queries are tokens, blocks of keys are experts.
#pragma once

#include "moe/concepts.hpp"
#include "moe/core/error.hpp"

namespace moe {

/// One head of one sequence: q[T,d], k[N,d], v[N,dv]. With fewer queries than keys, query t stands at position N - T + t.
struct attention_input {
  matrix_view<const float> q, k, v;

  MOE_HD dim position(dim t) const noexcept { return k.rows - q.rows + t; }
  void check(const shape& s, const char* what) const {
    const auto fits = [](matrix_view<const float> m, dim rows, dim cols) { return m.rows == rows && m.cols == cols && m.ld >= cols; };
    if (fits(q, s.tokens, s.d) && fits(k, k.rows, s.d) && fits(v, k.rows, v.cols) && k.rows >= q.rows) return;
    const std::string name(what);
    expect(q, s.tokens, s.d, (name + ".q").c_str(), "T x d");
    expect(k, k.rows, s.d, (name + ".k").c_str(), "N x d");
    expect(v, k.rows, v.cols, (name + ".v").c_str(), "N x dv");
    throw shape_error(name + ".k has " + std::to_string(k.rows) + " rows, expected at least " + std::to_string(q.rows) + " (T)");
  }
};
struct attention_gradient {
  matrix_view<float> q, k, v;
  void check(const shape& s, const char* what) const { attention_input{q, k, v}.check(s, what); }
};

/// Partial softmax of a query over one block: its output and the log-sum-exp of its scaled scores.
struct attention_rows {
  matrix_view<float> o;    ///< [A,dv]
  matrix_view<float> lse;  ///< [A,1]
};

}  // namespace moe
