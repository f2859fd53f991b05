// SPDX-License-Identifier: Apache-2.0
/// Asks the processor and the system what they can do. The one header that reads CPUID.
#pragma once

#include <cstdint>

#include "moe/core/config.hpp"

#if defined(MOE_X86)
#if defined(_MSC_VER)
#include <intrin.h>
#else
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace moe::detail {

/// What an x86 processor says of itself, and what of it the system saves when threads change places.
struct cpu_facts {
  std::uint32_t leaf1_ecx = 0, leaf7_ebx = 0, leaf7_ecx = 0, leaf7_edx = 0, leaf7_1_eax = 0;
  std::uint64_t saved_state = 0;  ///< XCR0
  bool tiles_granted = false;     ///< the system gave this process the tiles of AMX
  bool amd = false;               ///< AMD made the processor
};

#if defined(MOE_X86)

/// A subleaf of leaf `leaf`: eax, ebx, ecx, edx; zeros where the processor has no such leaf.
struct cpuid_leaf {
  std::uint32_t part[4] = {};
  explicit cpuid_leaf(std::uint32_t leaf, std::uint32_t sub = 0) noexcept {
#if defined(_MSC_VER)
    int all[4];
    __cpuidex(all, 0, 0);
    if (static_cast<std::uint32_t>(all[0]) < leaf) return;
    __cpuidex(all, static_cast<int>(leaf), static_cast<int>(sub));
    for (int i = 0; i < 4; ++i) part[i] = static_cast<std::uint32_t>(all[i]);
#else
    __get_cpuid_count(leaf, sub, part, part + 1, part + 2, part + 3);
#endif
  }
};

/// XCR0; only where the system has switched it on (bit 27 of leaf 1).
inline std::uint64_t read_saved_state() noexcept {
#if defined(_MSC_VER)
  return _xgetbv(0);
#else
  std::uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return low | std::uint64_t{high} << 32;
#endif
}

/// Linux hands out the tiles' eight kilobytes a thread on demand, to a whole process. A system that refuses or does not know
/// the question leaves everything else as it is.
inline bool ask_for_tiles() noexcept {
#if defined(__linux__) && defined(SYS_arch_prctl)
  constexpr long request_permission = 0x1023, tile_data = 18;
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
  return false;
#endif
}

inline cpu_facts probe_cpu() noexcept {
  cpu_facts facts;
  facts.leaf1_ecx = cpuid_leaf(1).part[2];
  const cpuid_leaf features(7);
  facts.leaf7_ebx = features.part[1];
  facts.leaf7_ecx = features.part[2];
  facts.leaf7_edx = features.part[3];
  facts.leaf7_1_eax = cpuid_leaf(7, 1).part[0];
  facts.amd = cpuid_leaf(0).part[2] == 0x444d4163u;  // "cAMD", the end of "AuthenticAMD"
  if (facts.leaf1_ecx >> 27 & 1) facts.saved_state = read_saved_state();
  if (facts.saved_state >> 17 & 1) facts.tiles_granted = ask_for_tiles();
  return facts;
}

#endif

}  // namespace moe::detail
