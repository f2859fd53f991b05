// SPDX-License-Identifier: Apache-2.0
/// What a call runs with.
#pragma once

#include "moe/core/arena.hpp"
#include "moe/core/rng.hpp"

namespace moe {

/// What backward does with the gradients of weights: adds to what is there, or takes the place of whatever is there.
enum class gradient_mode : unsigned char { add, replace };

/// Handed to every policy: the backend and its level, scratch memory, the sizes at hand, and the random numbers. Primitives
/// are free functions over it, found by argument-dependent lookup: `gemm_nt(on, x, w.up, z)`.
template <class B>
struct call {
  using backend_type = B;
  using arch = typename B::arch;

  const B& backend;
  arena& scratch;
  shape sizes;            ///< of the layer, with the tokens of this call; of the bank inside a set of experts
  bool training = false;  ///< noise, jitter and dropout act
  moe::rng rng{};
  gradient_mode gradients = gradient_mode::add;  ///< replace: for policies alone that say replaces_gradients

  const auto& executor() const noexcept { return backend.executor(); }
  call with(shape s) const noexcept { return {backend, scratch, s, training, rng, gradients}; }
};

}  // namespace moe
