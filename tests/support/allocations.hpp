// SPDX-License-Identifier: Apache-2.0
/// Counts every allocation of a program: operator new, and where the C library is glibc also malloc and its kin. One file of
/// the program stands in front of them: allocation/counting.cpp, apart from what is counted so that no call is inlined away.
#pragma once

#include <atomic>
#include <cstdlib>

namespace testing {

struct allocation_counts {
  long from_malloc = 0;  ///< malloc, calloc, realloc, memalign, aligned_alloc, posix_memalign
  long from_new = 0;     ///< every form of operator new
  friend bool operator==(const allocation_counts&, const allocation_counts&) = default;
};

namespace detail {
inline std::atomic<long> malloc_calls{0}, new_calls{0};
}

/// What f allocates, on any thread.
template <class F>
allocation_counts allocations_of(F&& f) {
  const long malloc_before = detail::malloc_calls, new_before = detail::new_calls;
  f();
  return {detail::malloc_calls - malloc_before, detail::new_calls - new_before};
}

}  // namespace testing

// A sanitizer brings its own malloc, which must not be replaced.
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define MOE_TEST_SANITIZED 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer) || __has_feature(memory_sanitizer)
#define MOE_TEST_SANITIZED 1
#endif
#endif
#if defined(__GLIBC__) && !defined(MOE_TEST_SANITIZED)
#define MOE_TEST_COUNTS_MALLOC 1
#endif
