// SPDX-License-Identifier: Apache-2.0
/// The only place that asks which compiler this is (docs/backends.md).
#pragma once

#if defined(MOE_SINGLE_INCLUDE)
#error "moe: the folder of headers and the single header are both included"
#endif

/// Marks a function that runs on the host and in a CUDA kernel.
#if defined(__CUDACC__)
#define MOE_HD __host__ __device__
#else
#define MOE_HD
#endif

/// Before a loop of a few constant steps over an array of sums: writes the steps out, so that the sums stay in registers.
/// Before a loop with a large body, MOE_NO_UNROLL keeps the registers of several steps from adding up.
#if defined(__CUDA_ARCH__)
#define MOE_UNROLL _Pragma("unroll")
#define MOE_NO_UNROLL _Pragma("unroll 1")
#elif defined(__GNUC__) && !defined(__CUDACC__)
#define MOE_UNROLL _Pragma("GCC unroll 16")
#define MOE_NO_UNROLL _Pragma("GCC unroll 1")
#else
#define MOE_UNROLL
#define MOE_NO_UNROLL
#endif

/// Checks an internal precondition in debug builds. Errors of a caller are exceptions instead (core/error.hpp).
#ifndef MOE_ASSERT
#include <cassert>
#define MOE_ASSERT(condition) assert(condition)
#endif

namespace moe::detail {

/// One turn of a loop that waits for another thread: leaves the core to its sibling for a moment.
inline void spin_pause() noexcept {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

/// Asks for the memory at p ahead of its use. Any address will do.
inline void prefetch([[maybe_unused]] const void* p) noexcept {
#if defined(__GNUC__)
  __builtin_prefetch(p);
#endif
}

}  // namespace moe::detail
