// SPDX-License-Identifier: Apache-2.0
/// Activations and the forms built on them: elementwise rules, written once for a float, a SIMD batch and a CUDA thread.
/// An activation offers act(z) and its slope; a form says how the pre-activations of an expert become its activation.
#pragma once

#include <cmath>
#include <type_traits>

#include "moe/core/config.hpp"

namespace moe {

namespace detail {

/// yes where the condition holds; batches bring their own select.
template <class C, class V>
MOE_HD V where(C condition, V yes, V no) noexcept {
  if constexpr (std::is_same_v<C, bool>) return condition ? yes : no;
  else return select(condition, yes, no);
}
template <class V>
MOE_HD V sigmoid(V z) noexcept {
  using std::exp;
  return V(1) / (V(1) + exp(-z));
}

}  // namespace detail

/// z
struct identity {
  template <class V>
  MOE_HD V operator()(V z) const noexcept { return z; }
  template <class V>
  MOE_HD V slope(V) const noexcept { return V(1); }
};

/// max(z, 0), and NaN of NaN; the slope at 0 is 0.
struct relu {
  template <class V>
  MOE_HD V operator()(V z) const noexcept { return detail::where(z < V(0), V(0), z); }
  template <class V>
  MOE_HD V slope(V z) const noexcept { return detail::where(z > V(0), V(1), V(0)); }
};

/// max(z, 0)^2
struct relu_squared {
  template <class V>
  MOE_HD V operator()(V z) const noexcept { return relu{}(z) * relu{}(z); }
  template <class V>
  MOE_HD V slope(V z) const noexcept { return V(2) * relu{}(z); }
};

/// z / (1 + exp(-z))
struct silu {
  template <class V>
  MOE_HD V operator()(V z) const noexcept { return z * detail::sigmoid(z); }
  template <class V>
  MOE_HD V slope(V z) const noexcept {
    const V s = detail::sigmoid(z);
    return s * (V(1) + z * (V(1) - s));
  }
};

/// z Phi(z) with the exact normal distribution function: z/2 (1 + erf(z / sqrt 2)).
struct gelu {
  template <class V>
  MOE_HD V operator()(V z) const noexcept { return z * normal(z); }
  template <class V>
  MOE_HD V slope(V z) const noexcept {
    using std::exp;
    return normal(z) + z * exp(V(-0.5f) * z * z) * V(0.398942280401f);
  }

 private:
  template <class V>
  MOE_HD static V normal(V z) noexcept {
    using std::erf;
    return V(0.5f) * (V(1) + erf(z * V(0.707106781187f)));
  }
};

/// z/2 (1 + tanh(sqrt(2/pi) (z + 0.044715 z^3)))
struct gelu_tanh {
  template <class V>
  MOE_HD V operator()(V z) const noexcept { return V(0.5f) * z * (V(1) + inner(z)); }
  template <class V>
  MOE_HD V slope(V z) const noexcept {
    z = detail::where(z > V(flat), V(flat), detail::where(z < V(-flat), V(-flat), z));
    const V t = inner(z);
    const V du = V(root) * (V(1) + V(3 * cubic) * z * z);
    return V(0.5f) * (V(1) + t + z * (V(1) - t * t) * du);
  }

 private:
  static constexpr float root = 0.797884560803f, cubic = 0.044715f;
  static constexpr float flat = 16;  // beyond it the slope is 0 or 1, and z^2 may be infinite
  template <class V>
  MOE_HD static V inner(V z) noexcept {
    using std::tanh;
    return tanh(V(root) * (z + V(cubic) * z * z * z));
  }
};

/// a = act(z). `slope` sets dz and returns the value: backward needs both.
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

/// a = act(g) u. Shazeer 2020, arXiv:2002.05202
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

/// A gated form over clamped pre-activations: g <- min(g, limit), u <- clamp(u, -limit, limit) before the product. A clamp
/// passes the gradient at the limit itself, and NaN stays NaN. DeepSeek-V4 clamps glu<silu>.
template <class Form>
struct clamped {
  static_assert(Form::gated, "moe::clamped: the form must be a gated one");
  static constexpr bool gated = true;
  [[no_unique_address]] Form form{};
  float limit = 7.f;

  template <class V>
  MOE_HD V operator()(V g, V u) const noexcept { return form(below(g), between(u)); }
  template <class V>
  MOE_HD V slope(V g, V u, V da, V& dg, V& du) const noexcept {
    const V value = form.slope(below(g), between(u), da, dg, du);
    dg = detail::where(g <= V(limit), dg, V(0));
    du = detail::where(u <= V(limit), detail::where(u >= V(-limit), du, V(0)), V(0));
    return value;
  }

 private:
  template <class V>
  MOE_HD V below(V v) const noexcept { return detail::where(v > V(limit), V(limit), v); }
  template <class V>
  MOE_HD V between(V v) const noexcept { return detail::where(v < V(-limit), V(-limit), below(v)); }
};

/// a = (u + 1) g sigmoid(alpha g): the product of gpt-oss, there clamped: gpt_oss_glu.
struct shifted_glu {
  static constexpr bool gated = true;
  float alpha = 1.702f;

  template <class V>
  MOE_HD V operator()(V g, V u) const noexcept { return (u + V(1)) * (g * detail::sigmoid(V(alpha) * g)); }
  template <class V>
  MOE_HD V slope(V g, V u, V da, V& dg, V& du) const noexcept {
    const V s = detail::sigmoid(V(alpha) * g), v = g * s;
    dg = da * (u + V(1)) * (s + V(alpha) * v * (V(1) - s));
    du = da * v;
    return (u + V(1)) * v;
  }
};
using gpt_oss_glu = clamped<shifted_glu>;

}  // namespace moe
