// SPDX-License-Identifier: Apache-2.0
/// Sums over tokens, equal bit for bit for any executor.
#pragma once

#include "moe/concepts.hpp"
#include "moe/router/weigh.hpp"

namespace moe::detail {

inline constexpr dim sum_block = 64;  // tokens

/// Groups of `group` tokens, the last one of what is left; 0: one group of all.
struct token_groups {
  dim tokens, size;

  token_groups(dim T, dim group) noexcept : tokens(T), size(group > 0 ? group : T > 0 ? T : 1) {}
  MOE_HD dim count() const noexcept { return tokens > 0 ? (tokens + size - 1) / size : 1; }
  MOE_HD dim blocks() const noexcept { return (size + sum_block - 1) / sum_block; }  ///< of each group
};

inline matrix_view<float> make_partial_sums(token_groups g, dim width, arena& mem) noexcept {
  return mem.matrix<float>("partial_sums", g.count() * g.blocks(), width);
}

template <class Add>
struct sum_one_block {
  token_groups g;
  matrix_view<float> partial;
  Add add;
  MOE_HD void operator()(dim b) const noexcept {
    const dim group = b / g.blocks(), end = (group + 1) * g.size < g.tokens ? (group + 1) * g.size : g.tokens;
    const dim first = group * g.size + b % g.blocks() * sum_block, last = first + sum_block < end ? first + sum_block : end;
    for (dim c = 0; c < partial.cols; ++c) partial(b, c) = 0;
    for (dim t = first; t < last; ++t) add(t, partial.row(b));
  }
};
struct sum_blocks {
  token_groups g;
  matrix_view<const float> partial;
  matrix_view<float> sums;
  MOE_HD void operator()(dim i) const noexcept {
    const dim group = i / sums.cols, c = i % sums.cols;
    double sum = 0;
    for (dim b = 0; b < g.blocks(); ++b) sum += partial(group * g.blocks() + b, c);
    sums(group, c) = static_cast<float>(sum);
  }
};

/// sums[G, width]: for each group what add(t, row) adds to row[width] for its tokens t. Blocks of a fixed length add in
/// token order, then the blocks in theirs, in double.
template <class B, class Add>
void sum_tokens(const call<B>& on, token_groups g, Add add, matrix_view<float> sums) noexcept {
  scratch_frame frame(on.scratch);
  const matrix_view<float> partial = make_partial_sums(g, sums.cols, on.scratch);
  for_each_token(on, partial.rows, sum_one_block<Add>{g, partial, add});
  for_each_token(on, sums.rows * sums.cols, sum_blocks{g, partial, sums});
}

}  // namespace moe::detail
