// SPDX-License-Identifier: Apache-2.0
/// The only place that asks which compiler this is (docs/backends.md).
#pragma once

/// Marks a function that runs on the host and in a CUDA kernel.
#if defined(__CUDACC__)
#define MOE_HD __host__ __device__
#else
#define MOE_HD
#endif

/// Checks an internal precondition in debug builds. Errors of a caller are exceptions instead (core/error.hpp).
#ifndef MOE_ASSERT
#include <cassert>
#define MOE_ASSERT(condition) assert(condition)
#endif
