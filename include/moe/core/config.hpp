// SPDX-License-Identifier: Apache-2.0
/// The only place that asks which compiler this is (docs/backends.md).
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

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

/// A function with a loop that needs all registers to itself.
#if defined(_MSC_VER)
#define MOE_NO_INLINE __declspec(noinline)
#elif defined(__GNUC__)
#define MOE_NO_INLINE __attribute__((noinline))
#else
#define MOE_NO_INLINE
#endif

/// A function that has no code of its own: it becomes a part of its callers, compiled for their processor. MOE_FLATTEN does
/// the same to all that a function calls.
#if defined(_MSC_VER)
#define MOE_INLINE __forceinline
#define MOE_FLATTEN
#elif defined(__GNUC__)
#define MOE_INLINE inline __attribute__((always_inline))
#define MOE_FLATTEN __attribute__((flatten))
#else
#define MOE_INLINE inline
#define MOE_FLATTEN
#endif

/// The compiler has vector types of its own, of any width.
#if defined(__GNUC__) && !defined(__CUDACC__)
#define MOE_VECTORS 1
#endif

/// A function for processors with the named features, whatever the compiler's flags; called only where they are. Its callees
/// are intrinsics and other such functions: the attribute does not reach into lambdas. MSVC takes every intrinsic anywhere.
#if (defined(__x86_64__) || defined(_M_X64)) && !defined(__CUDACC__)
#define MOE_X86 1
#endif
#if defined(MOE_X86) && defined(__GNUC__)
#define MOE_TARGET(features) __attribute__((target(features)))
#else
#define MOE_TARGET(features)
#endif

/// Clang halves vectors of 512 bits where the flags name a processor that would rather have it so; here they stay whole.
#if defined(__clang__)
#define MOE_WHOLE_VECTORS __attribute__((min_vector_width(512)))
#else
#define MOE_WHOLE_VECTORS
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

/// Floats that the compiler computes with side by side, as many as its flags make fast, and a number for those flags.
#if defined(MOE_VECTORS)
#if defined(__AVX__)
typedef float float_group __attribute__((vector_size(32)));
#else
typedef float float_group __attribute__((vector_size(16)));
#endif
#else
struct float_group {
  float lane[4];
  float& operator[](std::ptrdiff_t l) noexcept { return lane[l]; }
  friend float_group operator+(float_group x, float_group y) noexcept {
    for (int l = 0; l < 4; ++l) x.lane[l] += y.lane[l];
    return x;
  }
  friend float_group operator*(float_group x, float_group y) noexcept {
    for (int l = 0; l < 4; ++l) x.lane[l] *= y.lane[l];
    return x;
  }
  friend float_group operator+(float_group x, float y) noexcept { return x + float_group{{y, y, y, y}}; }
};
#endif
#if defined(__aarch64__)
constexpr int build_level = 4;
#elif defined(__AVX512F__)
constexpr int build_level = 3;
#elif defined(__AVX2__) && defined(__FMA__)
constexpr int build_level = 2;
#elif defined(__AVX__)
constexpr int build_level = 1;
#else
constexpr int build_level = 0;
#endif

/// Asks for the memory at p ahead of its use. Any address will do.
inline void prefetch([[maybe_unused]] const void* p) noexcept {
#if defined(__GNUC__)
  __builtin_prefetch(p);
#endif
}
/// The same, as far as the second cache.
inline void prefetch_second([[maybe_unused]] const void* p) noexcept {
#if defined(__GNUC__)
  __builtin_prefetch(p, 0, 2);
#endif
}

/// Wishes for large pages under the memory at p: weights are streamed, and small pages cost a walk each.
inline void prefer_large_pages([[maybe_unused]] void* p, [[maybe_unused]] std::size_t bytes) noexcept {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr std::uintptr_t small = 4096, worthwhile = std::uintptr_t{4} << 20;
  const std::uintptr_t first = (reinterpret_cast<std::uintptr_t>(p) + small - 1) / small * small;
  const std::uintptr_t last = (reinterpret_cast<std::uintptr_t>(p) + bytes) / small * small;
  if (last > first && last - first >= worthwhile) (void)::madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

}  // namespace moe::detail
