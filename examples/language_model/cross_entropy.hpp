// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cmath>
#include <span>

#include "window_embedding.hpp"

namespace demo {

/// bits[t] = -log2 softmax(logits[t])[target of t]. Returns their mean over the tokens.
template <class B>
double cross_entropy(const moe::call<B>& on, moe::matrix_view<const float> logits, const windows& in,
                     std::span<float> bits) noexcept {
  for_each_token(on, logits.rows, [&](moe::dim t) {
    const float* z = logits.row(t);
    const float top = *std::max_element(z, z + logits.cols);
    float sum = 0;
    for (moe::dim j = 0; j < logits.cols; ++j) sum += std::exp(z[j] - top);
    bits[static_cast<std::size_t>(t)] = (std::log(sum) + top - z[in.target(t)]) * 1.44269504f;
  });
  double total = 0;
  for (moe::dim t = 0; t < logits.rows; ++t) total += bits[static_cast<std::size_t>(t)];
  return total / static_cast<double>(logits.rows);
}

/// logits become the gradient of the mean over tokens of -ln softmax(logits[t])[target of t] (in nats, as optimizers are
/// tuned for): (softmax - one_hot) / T.
template <class B>
void cross_entropy_backward(const moe::call<B>& on, moe::matrix_view<float> logits, const windows& in) noexcept {
  const float share = 1.f / static_cast<float>(logits.rows);
  for_each_token(on, logits.rows, [&](moe::dim t) {
    float* z = logits.row(t);
    const float top = *std::max_element(z, z + logits.cols);
    float sum = 0;
    for (moe::dim j = 0; j < logits.cols; ++j) sum += z[j] = std::exp(z[j] - top);
    for (moe::dim j = 0; j < logits.cols; ++j) z[j] *= share / sum;
    z[in.target(t)] -= share;
  });
}

}  // namespace demo
