// SPDX-License-Identifier: Apache-2.0
/// Optimizers over flat buffers: parameters, gradients and moments are spans of one length and one layout, so a model is
/// one loop, whatever it is made of. An optimizer holds configuration; its moments are carved like all other memory:
///
///   const moe::adamw optimizer{.decay = 0.1f};
///   moe::buffer memory(optimizer.state_bytes(n));
///   moe::arena mem(memory.bytes());
///   const moe::adamw::state moments = optimizer.make_state(n, mem);      // zeros, where a fresh start begins
///   optimizer.step(executor, {.rate = schedule(t), .step = t}, w, dw, moments);
///
/// A copy of the weights in another type, which a layer reads, is written along with them: a weight_copy (train/mixed.hpp) is
/// the last argument of `step`.
///
/// `step` throws shape_error for lengths or hyper-parameters that cannot work. It returns false, and writes nothing, when
/// `scale` is not finite: what the norm of a gradient with a NaN or an infinity leads to (train/clip.hpp). It does not
/// look for such values itself; without the norm they reach weights and moments. Padding between tensors stays zero, and
/// sub-spans are fine: a tensor with a decay of its own takes a call of its own. Results do not depend on the executor.
/// Compiled with -fno-math-errno the loop of AdamW is vectorised.
#pragma once

#include <cmath>
#include <limits>
#include <span>
#include <string>

#include "moe/core/arena.hpp"
#include "moe/core/error.hpp"
#include "moe/core/executor.hpp"
#include "moe/train/mixed.hpp"

namespace moe {

/// What changes from one update to the next.
struct update {
  float rate;         ///< learning rate, as a schedule gives it (train/schedule.hpp)
  dim step = 0;       ///< updates done before this one
  float scale = 1.f;  ///< multiplies the gradients: clip_factor (train/clip.hpp), 1/batch
};

namespace detail {

inline constexpr dim update_block = 16384;  // elements that a thread takes at a time

/// "adamw: beta1 is 1.000000, expected 0 <= beta1 < 1"
inline void expect_hyper(bool good, float v, const char* what, const char* wanted) {
  if (!good) throw shape_error(std::string(what) + " is " + std::to_string(v) + ", expected " + wanted);
}
inline bool is_fraction(float v) noexcept { return v >= 0.f && v < 1.f; }
inline bool is_amount(float v) noexcept { return v >= 0.f && v < std::numeric_limits<float>::infinity(); }

inline void expect_elements(std::size_t got, std::size_t wanted, const char* what) {
  expect(static_cast<dim>(got), static_cast<dim>(wanted), what, "elements", "as many as parameters");
}

}  // namespace detail

/// Adam with bias correction and decoupled weight decay: with g = scale dw and t = step + 1,
///
///   m = beta1 m + (1 - beta1) g          v = beta2 v + (1 - beta2) g^2
///   w = w - rate (m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + epsilon) + decay w)
///
/// Kingma & Ba 2015, arXiv:1412.6980, algorithm 1. Loshchilov & Hutter 2019, arXiv:1711.05101, algorithm 2; there the
/// schedule alone multiplies the decay, here, as in the common frameworks, the whole rate does.
struct adamw {
  float beta1 = 0.9f, beta2 = 0.999f, epsilon = 1e-8f, decay = 0.01f;

  struct state {
    std::span<float> m, v;  ///< as many as parameters
  };

  state make_state(dim n, arena& mem) const noexcept {
    return {mem.vector<float>("m", n, initial::zeros), mem.vector<float>("v", n, initial::zeros)};
  }
  std::size_t state_bytes(dim n) const noexcept {
    arena count;
    (void)make_state(n, count);
    return count.used();
  }

  template <Executor X>
  bool step(const X& executor, update u, std::span<float> w, std::span<const float> dw, state s,
            const weight_copy& copy = {}) const {
    check(u, w, dw, s);
    copy.check(w.size(), "adamw: w");
    if (!std::isfinite(u.scale)) return false;
    const double t = static_cast<double>(u.step) + 1;
    const double mean = 1 - std::pow(double{beta1}, t), square = 1 - std::pow(double{beta2}, t);
    const auto rate = static_cast<float>(u.rate / mean), root = static_cast<float>(1 / std::sqrt(square));
    const float shrink = u.rate * decay;
    executor.for_each(static_cast<dim>(w.size()), detail::update_block, [&](dim first, dim last) {
      for (auto i = static_cast<std::size_t>(first); i < static_cast<std::size_t>(last); ++i) {
        const float g = u.scale * dw[i];
        const float m = beta1 * s.m[i] + (1 - beta1) * g, v = beta2 * s.v[i] + (1 - beta2) * g * g;
        s.m[i] = m;
        s.v[i] = v;
        w[i] -= rate * m / (root * std::sqrt(v) + epsilon) + shrink * w[i];
      }
      copy.write(w, static_cast<std::size_t>(first), static_cast<std::size_t>(last));
    });
    return true;
  }

 private:
  void check(const update& u, std::span<const float> w, std::span<const float> dw, const state& s) const {
    detail::expect_hyper(detail::is_fraction(beta1), beta1, "adamw: beta1", "0 <= beta1 < 1");
    detail::expect_hyper(detail::is_fraction(beta2), beta2, "adamw: beta2", "0 <= beta2 < 1");
    detail::expect_hyper(detail::is_amount(epsilon) && epsilon > 0, epsilon, "adamw: epsilon", "0 < epsilon, finite");
    detail::expect_hyper(detail::is_amount(decay), decay, "adamw: decay", "0 <= decay, finite");
    detail::expect_hyper(detail::is_amount(u.rate), u.rate, "adamw: rate", "0 <= rate, finite");
    if (u.step < 0) throw shape_error("adamw: step is " + std::to_string(u.step) + ", expected 0 <= step");
    detail::expect_elements(dw.size(), w.size(), "adamw: dw");
    detail::expect_elements(s.m.size(), w.size(), "adamw: m");
    detail::expect_elements(s.v.size(), w.size(), "adamw: v");
  }
};

/// Stochastic gradient descent with momentum and decoupled weight decay: with g = scale dw,
///
///   m = momentum m + g          w = w - rate (m + decay w)
///
/// Sutskever et al. 2013, in the form without dampening; Loshchilov & Hutter 2019, arXiv:1711.05101, algorithm 1.
struct sgd {
  float momentum = 0.9f, decay = 0.f;

  struct state {
    std::span<float> m;  ///< as many as parameters
  };

  state make_state(dim n, arena& mem) const noexcept { return {mem.vector<float>("m", n, initial::zeros)}; }
  std::size_t state_bytes(dim n) const noexcept {
    arena count;
    (void)make_state(n, count);
    return count.used();
  }

  template <Executor X>
  bool step(const X& executor, update u, std::span<float> w, std::span<const float> dw, state s,
            const weight_copy& copy = {}) const {
    check(u, w, dw, s);
    copy.check(w.size(), "sgd: w");
    if (!std::isfinite(u.scale)) return false;
    const float shrink = u.rate * decay;
    executor.for_each(static_cast<dim>(w.size()), detail::update_block, [&](dim first, dim last) {
      for (auto i = static_cast<std::size_t>(first); i < static_cast<std::size_t>(last); ++i) {
        const float m = momentum * s.m[i] + u.scale * dw[i];
        s.m[i] = m;
        w[i] -= u.rate * m + shrink * w[i];
      }
      copy.write(w, static_cast<std::size_t>(first), static_cast<std::size_t>(last));
    });
    return true;
  }

 private:
  void check(const update& u, std::span<const float> w, std::span<const float> dw, const state& s) const {
    detail::expect_hyper(detail::is_fraction(momentum), momentum, "sgd: momentum", "0 <= momentum < 1");
    detail::expect_hyper(detail::is_amount(decay), decay, "sgd: decay", "0 <= decay, finite");
    detail::expect_hyper(detail::is_amount(u.rate), u.rate, "sgd: rate", "0 <= rate, finite");
    detail::expect_elements(dw.size(), w.size(), "sgd: dw");
    detail::expect_elements(s.m.size(), w.size(), "sgd: m");
  }
};

}  // namespace moe
