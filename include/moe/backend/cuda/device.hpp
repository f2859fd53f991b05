// SPDX-License-Identifier: Apache-2.0
/// What runs on a device, written so that a host compiler reads it too: a function object over indices, or a block program.
/// A backend in device memory offers the two ways to launch them, and neither waits:
///
///   for_each(n, f)       f(i) for i in 0 .. n, each on a thread of its own
///   run(blocks, p)       p on `blocks` blocks of P::threads threads
///
/// A block program is a kernel cut at its barriers. Each thread has a `local`, each block a `shared`:
///
///   begin(block, thread, own) -> steps     the same number of steps on every thread of the block
///   load(step, thread, all, own)           barrier
///   use(step, thread, all, own)            barrier
///   end(thread, own)
///
/// So the tests run every kernel on the host, thread after thread, and compare with the scalar backend.
#pragma once

#include <concepts>
#include <type_traits>

#include "moe/core/call.hpp"
#include "moe/core/plan.hpp"

namespace moe {

/// Memory of an accelerator; the host cannot read it.
struct device {};

/// A backend whose memory only its kernels can read.
template <class B>
concept DeviceBackend = std::same_as<typename B::space, device>;

namespace arch {

/// One thread of a CUDA kernel, whole rows at a time.
struct cuda {};
/// One thread of a CUDA kernel that owns column `j` of the row being added to.
struct cuda_column {
  dim j;
};

/// y[j] += w x[j]
MOE_HD inline void axpy(cuda, float w, const float* x, float* y, dim n) noexcept {
  for (dim j = 0; j < n; ++j) y[j] += w * x[j];
}
MOE_HD inline void axpy(cuda_column own, float w, const float* x, float* y, dim) noexcept { y[own.j] += w * x[own.j]; }
/// sum of x[j] y[j]
MOE_HD inline float dot(cuda, const float* x, const float* y, dim n) noexcept {
  float sum = 0;
  for (dim j = 0; j < n; ++j) sum += x[j] * y[j];
  return sum;
}

}  // namespace arch

namespace detail {

/// The rows of a bank as kernels read them: pointers alone, since the members of a span are host functions.
struct device_rows {
  const idx *offsets = nullptr, *token_offsets = nullptr, *position = nullptr;
  dim experts = 1;
  dim whole = 0;  ///< rows of the one expert there is without offsets

  /// Rows 0 .. n of one expert.
  explicit device_rows(dim n) noexcept : whole(n) {}
  explicit device_rows(const bank_rows& rows) noexcept
      : offsets(rows.offsets.data()), token_offsets(rows.token_offsets.empty() ? nullptr : rows.token_offsets.data()),
        position(rows.position.data()), experts(rows.experts()) {}

  /// One past the last row of the experts before e.
  MOE_HD dim at(dim e) const noexcept { return offsets ? dim{offsets[e]} : e * whole; }
  MOE_HD dim count(dim e) const noexcept { return at(e + 1) - at(e); }
  MOE_HD bool holds(dim r) const noexcept { return r >= at(0) && r < at(experts); }
  /// The expert of a row that the bank holds.
  MOE_HD dim expert_of(dim r) const noexcept {
    dim low = 0, high = experts;  // at(low) <= r < at(high)
    while (high - low > 1) {
      const dim middle = low + (high - low) / 2;
      if (at(middle) <= r) low = middle;
      else high = middle;
    }
    return low;
  }
};

/// A function object that a kernel can be made of: an aggregate, as no lambda is, copied byte by byte.
template <class F>
inline constexpr bool has_device_path = std::is_aggregate_v<F> && std::is_trivially_copy_constructible_v<F>;

/// Launches what a policy hands to a primitive, wrapped in `Wrapped`.
template <class F, class B, class Wrapped>
void for_each_of(const call<B>& on, dim n, const Wrapped& f) noexcept {
  static_assert(has_device_path<F>, "moe: this policy has no device path [docs/backends.md]");
  if constexpr (has_device_path<F>) on.backend.for_each(n, f);
}

/// f(r, c) for each of n elements in rows of `cols`.
template <class F>
struct each_element {
  dim cols;
  F f;
  MOE_HD void operator()(dim i) const noexcept { f(i / cols, i % cols); }
};
template <class B, class F>
void for_each_element(const call<B>& on, dim rows, dim cols, const F& f) noexcept {
  on.backend.for_each(rows * cols, each_element<F>{cols, f});
}

}  // namespace detail
}  // namespace moe
