// SPDX-License-Identifier: Apache-2.0
/// Fills a flat buffer of parameters from its catalogue (core/arena.hpp):
///
///   std::vector<moe::slot> list;
///   moe::arena names(list);
///   (void)layer.make_weights(names);
///   moe::initialise(executor, params.bytes(), list, moe::rng(seed));
///
///   initial::fan_in   gain * normal / sqrt(cols)       LeCun et al. 1998, Efficient BackProp
///   initial::zeros    0
///   initial::ones     1
///
/// Element i of the n-th tensor is a function of (random, n, i): equal for every executor and, up to rounding, for every
/// element type. What lies between tensors is not touched. Throws shape_error, before it writes, for tensors that reach
/// beyond the memory and for element types that are no floating-point numbers.
#pragma once

#include <cmath>
#include <span>
#include <string>
#include <vector>

#include "moe/core/arena.hpp"
#include "moe/core/error.hpp"
#include "moe/core/executor.hpp"
#include "moe/core/rng.hpp"

namespace moe {

namespace detail {

template <class T, Executor X>
void initialise_slot(const X& executor, std::span<std::byte> memory, const slot& s, rng random, float gain) {
  T* const v = reinterpret_cast<T*>(memory.data() + s.offset);
  const auto deviation = static_cast<float>(gain / std::sqrt(static_cast<double>(s.cols)));
  executor.for_each(static_cast<dim>(s.bytes / sizeof(T)), 4096, [&](dim first, dim last) {
    for (dim i = first; i < last; ++i)
      v[i] = T(s.start == initial::fan_in ? deviation * random.normal(static_cast<std::uint64_t>(i))
                                          : (s.start == initial::ones ? 1.f : 0.f));
  });
}

inline void expect_fillable(const slot& s, std::size_t memory) {
  if (s.type != element::f32 && s.type != element::bf16 && s.type != element::f16)
    throw shape_error("initialise: " + s.name + " is " + name(s.type) + ", expected f32, bf16 or f16");
  if (s.offset > memory || s.bytes > memory - s.offset)
    throw shape_error("initialise: " + s.name + " ends at byte " + std::to_string(s.offset + s.bytes) +
                      ", expected at most " + std::to_string(memory) + " (the memory)");
}

}  // namespace detail

template <Executor X>
void initialise(const X& executor, std::span<std::byte> memory, std::span<const slot> list, rng random, float gain = 1.f) {
  if (!std::isfinite(gain)) throw shape_error("initialise: gain is " + std::to_string(gain) + ", expected a finite number");
  for (const slot& s : list) detail::expect_fillable(s, memory.size());
  for (std::size_t n = 0; n < list.size(); ++n) {
    const rng own = random.split(n);
    if (list[n].type == element::f32) detail::initialise_slot<float>(executor, memory, list[n], own, gain);
    else if (list[n].type == element::bf16) detail::initialise_slot<bf16>(executor, memory, list[n], own, gain);
    else detail::initialise_slot<f16>(executor, memory, list[n], own, gain);
  }
}

}  // namespace moe
