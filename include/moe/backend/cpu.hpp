// SPDX-License-Identifier: Apache-2.0
/// The CPU backend: float32 kernels at the level that the compiler's flags choose, or at one that is chosen at run time.
#pragma once

#include "moe/backend/cpu/attention_levels.hpp"
#include "moe/backend/cpu/compiled.hpp"
#include "moe/backend/cpu/decode_levels.hpp"
#include "moe/backend/cpu/dynamic.hpp"
#include "moe/backend/cpu/gemm_xsimd.hpp"
#include "moe/backend/cpu/mixed_levels.hpp"
#include "moe/backend/cpu/packed_levels.hpp"
#include "moe/backend/cpu/rows_xsimd.hpp"
#include "moe/backend/cpu/simd.hpp"
#include "moe/backend/host.hpp"
#include "moe/backend/host_decode.hpp"
#include "moe/backend/host_ffn.hpp"
#include "moe/backend/host_packed.hpp"

namespace moe {

/// `cpu<>` runs at the level of the build on the threads of OpenMP, where the program is compiled with it; a thread_pool or
/// an executor of one's own is the second argument. `cpu<arch::dynamic>` runs at the highest level of the machine.
/// errors   level_error, when one is made while MOE_CPU_LEVEL asks for what this machine lacks
template <class Arch = arch::native, class Ex = default_executor>
using cpu = host_backend<Arch, Ex>;

}  // namespace moe
