// SPDX-License-Identifier: Apache-2.0
/// Clipping by the global norm. Nothing is scaled here: the factor goes into the update, where it costs no pass of its own.
///
///   const double norm = moe::global_norm(executor, {dw, embedding_gradients});
///   const float factor = moe::clip_factor(norm, 1.f);
///   const bool done = optimizer.step(executor, {.rate = rate, .step = t, .scale = factor}, w, dw, moments);
///
/// A NaN or an infinity anywhere makes norm and factor NaN or infinite, and the optimizer then returns false and leaves
/// weights and moments as they were. Finite gradients never overflow the norm.
#pragma once

#include <cmath>
#include <initializer_list>
#include <limits>
#include <span>
#include <string>

#include "moe/core/error.hpp"
#include "moe/core/executor.hpp"

namespace moe {

namespace detail {

/// Eight sums side by side, so that adding is neither one long chain nor in an order the compiler chooses.
inline double square_sum(const float* v, dim n) noexcept {
  double lane[8] = {};
  dim i = 0;
  for (; i + 8 <= n; i += 8)
    for (dim j = 0; j < 8; ++j) lane[j] += double{v[i + j]} * double{v[i + j]};
  for (dim j = 0; i + j < n; ++j) lane[j] += double{v[i + j]} * double{v[i + j]};
  return ((lane[0] + lane[4]) + (lane[2] + lane[6])) + ((lane[1] + lane[5]) + (lane[3] + lane[7]));
}

template <Executor X>
double square_sum(const X& executor, std::span<const float> v) {
  constexpr dim block = 4096, batch = 128;
  double part[batch];
  double sum = 0;
  for (dim done = 0, n = static_cast<dim>(v.size()); done < n; done += block * batch) {
    const dim left = n - done, parts = left < block * batch ? (left + block - 1) / block : batch;
    executor.for_each(parts, 1, [&](dim first, dim last) {
      for (dim p = first; p < last; ++p)
        part[p] = square_sum(v.data() + done + p * block, left - p * block < block ? left - p * block : block);
    });
    for (dim p = 0; p < parts; ++p) sum += part[p];
  }
  return sum;
}

}  // namespace detail

/// The Euclidean norm of all buffers together. Sums blocks of a fixed size, in order, in double: the same to the last bit
/// on every executor.
template <Executor X>
double global_norm(const X& executor, std::initializer_list<std::span<const float>> gradients) {
  double sum = 0;
  for (const auto g : gradients) sum += detail::square_sum(executor, g);
  return std::sqrt(sum);
}
template <Executor X>
double global_norm(const X& executor, std::span<const float> gradients) {
  return global_norm(executor, {gradients});
}

/// min(1, max_norm / norm), NaN when the norm is not finite. Pascanu et al. 2013, arXiv:1211.5063, algorithm 1.
inline float clip_factor(double norm, float max_norm) {
  if (!(max_norm > 0)) throw shape_error("clip_factor: max_norm is " + std::to_string(max_norm) + ", expected above 0");
  if (!std::isfinite(norm)) return std::numeric_limits<float>::quiet_NaN();
  return norm <= max_norm ? 1.f : static_cast<float>(max_norm / norm);
}

}  // namespace moe
