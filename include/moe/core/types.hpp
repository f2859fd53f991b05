// SPDX-License-Identifier: Apache-2.0
/// The integers that sizes and names are made of, and the sizes of a layer.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>

namespace moe {

/// Counts and strides, in elements.
using dim = std::ptrdiff_t;
/// Names a token, an expert or a row inside a plan.
using idx = std::int32_t;

namespace detail {
/// As a constant, since device code may not call what numeric_limits offers.
inline constexpr float infinity = std::numeric_limits<float>::infinity();

constexpr dim at_most(dim n, dim bound) noexcept { return n < bound ? n : bound; }
/// Blocks of `size` that hold n, and the size of all of them.
constexpr dim blocks(dim n, dim size) noexcept { return (n + size - 1) / size; }
constexpr dim round_up(dim n, dim size) noexcept { return blocks(n, size) * size; }
}  // namespace detail

/// Sizes of a layer. `tokens` is the bound or, inside a call, the number at hand.
struct shape {
  dim tokens = 0;   ///< T
  dim d = 0;        ///< model width
  dim f = 0;        ///< hidden width of an expert, where it has one
  dim experts = 0;  ///< E
};

/// Memory a program's threads can read; device memory is `moe::device` (backend/cuda.cuh).
struct host {};

}  // namespace moe
