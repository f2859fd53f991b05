// SPDX-License-Identifier: Apache-2.0
/// Activations and the forms built on them: elementwise rules, written once for a float, a SIMD batch and a CUDA thread.
#pragma once

#include <cmath>

#include "moe/core/config.hpp"

namespace moe {

/// z / (1 + exp(-z))
struct silu {
  template <class V>
  MOE_HD V operator()(V z) const noexcept {
    using std::exp;
    return z / (V(1) + exp(-z));
  }
  template <class V>
  MOE_HD V slope(V z) const noexcept {
    using std::exp;
    const V s = V(1) / (V(1) + exp(-z));
    return s * (V(1) + z * (V(1) - s));
  }
};

/// A form says how pre-activations become the activation of an expert. `slope` returns the value as well: backward needs
/// both.
/// a = act(z)
template <class Act>
struct plain {
  static constexpr bool gated = false;
  [[no_unique_address]] Act act{};

  template <class V>
  MOE_HD V operator()(V z) const noexcept { return act(z); }
  template <class V>
  MOE_HD V slope(V z, V da, V& dz) const noexcept {
    dz = da * act.slope(z);
    return act(z);
  }
};

/// a = act(g) * u
template <class Act>
struct glu {
  static constexpr bool gated = true;
  [[no_unique_address]] Act act{};

  template <class V>
  MOE_HD V operator()(V g, V u) const noexcept { return act(g) * u; }
  template <class V>
  MOE_HD V slope(V g, V u, V da, V& dg, V& du) const noexcept {
    const V v = act(g);
    dg = da * u * act.slope(g);
    du = da * v;
    return v * u;
  }
};

}  // namespace moe
