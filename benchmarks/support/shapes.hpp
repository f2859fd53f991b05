// SPDX-License-Identifier: Apache-2.0
/// Layers of published models, and what a row of the table is about.
#pragma once

#include <array>
#include <string>
#include <string_view>

#include "moe/core/types.hpp"

namespace bench {

using moe::dim;

inline constexpr std::array<dim, 6> default_tokens{1, 4, 32, 128, 512, 2048};
/// Experts of a token, at most.
inline constexpr int most_choices = 32;

/// A layer of gated feed-forward experts. `known_loop` is what a loop of Eigen products over the experts did on two quiet
/// cores of a 2.3 GHz Xeon with AVX-512 at each of `default_tokens`, in tokens per second; zeros where nobody measured.
struct model_shape {
  std::string name;
  dim d = 0, f = 0, experts = 0, k = 0;
  std::array<double, 6> known_loop{};

  double router_weights() const { return static_cast<double>(experts * d); }
  double expert_weights() const { return static_cast<double>(3 * d * f); }
  /// Of the products of the experts; those of the router do not count as work.
  double flops(dim tokens) const { return 2 * expert_weights() * static_cast<double>(k * tokens); }
};

inline const std::array<model_shape, 4>& named_shapes() {
  static const std::array<model_shape, 4> shapes{{{"S1", 1024, 3584, 8, 2, {185, 134, 481, 1999, 4647, 5112}},
                                                  {"S2", 2048, 768, 128, 8, {104, 99, 112, 319, 1184, 2455}},
                                                  {"S3", 2048, 1024, 64, 8, {78, 67, 106, 462, 1499, 2119}},
                                                  {"S4", 1024, 512, 96, 1, {2318, 2309, 2239, 2521, 5309, 17800}}}};
  return shapes;
}

/// Queries are the last m of n positions, each sees up to its own; h query heads share h_kv key heads, all of width d.
struct attention_shape {
  dim h = 0, h_kv = 0, d = 0, m = 0, n = 0;
};
enum class attention_gate { none, headwise, elementwise };
/// What is asked of attention: blocks of keys, of which each query takes k, its own among them (MoBA); a gate on the output.
struct attention_form {
  dim block = 0, k = 0;  ///< 0: all keys
  attention_gate gate = attention_gate::none;
  bool decode = false, backward = false;
};

/// The unit whose peak is the roof of a type's products.
enum class unit { fma, amx_bf16, amx_int8 };

/// A type of weights: its name in tables and files, the bytes of a weight with its scales, the unit that multiplies it, and
/// the largest relative error that outputs may have against float32 products of the weights that the library rounds to.
/// Ours comes from rounding activations alone: up to 0.5 % where those are bf16, 4.2 % where they are bytes with a scale for
/// each row, of which hidden ones have outliers; without the weakest of eight experts it would be 20 %. A peer may round weights
/// once more, in a way of its own.
struct weight_type {
  std::string_view name;
  double bytes;
  unit multiplies;
  double tolerance, peer_tolerance;
};

inline constexpr std::array<weight_type, 6> weight_types{{{"f32", 4, unit::fma, 1e-4, 1e-4},
                                                          {"bf16", 2, unit::amx_bf16, 2e-2, 2e-2},
                                                          {"f16", 2, unit::fma, 2e-3, 2e-3},
                                                          {"int8", 1, unit::amx_int8, 6e-2, 8e-2},
                                                          {"int4", 0.5625, unit::amx_int8, 6e-2, 0.4},
                                                          {"ternary", 0.25, unit::amx_int8, 6e-2, 8e-2}}};

}  // namespace bench
