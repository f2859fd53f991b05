// SPDX-License-Identifier: Apache-2.0
/// Work whose threads need memory of their own.
#pragma once

#include <atomic>

#include "moe/backend/host_backend.hpp"

namespace moe::detail {

/// Memory for one thread at work, for as many as there are.
struct slot_memory {
  std::byte* first = nullptr;
  std::size_t bytes = 0;  ///< of one
  dim count = 0;

  arena operator[](dim i) const noexcept { return arena({first + static_cast<std::size_t>(i) * bytes, bytes}); }
};
/// carve(arena) once counts what a slot takes.
template <HostBackend B, class Carve>
slot_memory make_slots(const B& backend, arena& mem, Carve carve) noexcept {
  arena count;
  carve(count);
  slot_memory slots{nullptr, padded(count), backend.executor().concurrency()};
  mem.align();
  slots.first = reinterpret_cast<std::byte*>(mem.matrix<std::int8_t>("slots", slots.count, static_cast<dim>(slots.bytes)).data);
  return slots;
}
/// f(arena, take) once for each slot at work: take(unit) gives the next of `units`, or false when there are no more.
template <HostBackend B, class F>
void share_units(const call<B>& on, const slot_memory& slots, dim units, F f) noexcept {
  std::atomic<dim> next{0};
  const auto take = [&](dim& unit) noexcept { return (unit = next.fetch_add(1, std::memory_order_relaxed)) < units; };
  on.executor().for_each(at_most(slots.count, units), 1, [&](dim first, dim last) {
    for (; first < last; ++first) f(slots[first], take);
  });
}

}  // namespace moe::detail
