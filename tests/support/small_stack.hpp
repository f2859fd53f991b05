// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <doctest/doctest.h>

#if defined(__linux__) && !defined(MOE_TEST_SANITIZED)
#include <pthread.h>
#define MOE_TEST_SMALL_STACK 1

namespace testing {

/// Runs f() on a thread with the stack of 128 KiB that some C libraries give one.
template <class F>
void on_a_small_stack(F f) {
  pthread_attr_t small;
  pthread_attr_init(&small);
  CHECK(pthread_attr_setstacksize(&small, 128 << 10) == 0);
  pthread_t thread{};
  const auto work = [](void* what) -> void* {
    (*static_cast<F*>(what))();
    return nullptr;
  };
  CHECK(pthread_create(&thread, &small, work, &f) == 0);
  pthread_join(thread, nullptr);
  pthread_attr_destroy(&small);
}

}  // namespace testing
#endif
