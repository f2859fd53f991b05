// SPDX-License-Identifier: Apache-2.0
/// The level that kernels chosen at run time use: found once in a process, capped by the environment variable MOE_CPU_LEVEL,
/// and told with its reason.
#pragma once

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <string_view>

#include "moe/backend/cpu/probe.hpp"

/// The features of a level, for MOE_TARGET.
#define MOE_AVX2 "avx2,fma,f16c"
#define MOE_AVX512 "avx512f,avx512bw,avx512dq,avx512vl," MOE_AVX2
#define MOE_AVX512_VNNI MOE_AVX512 ",avx512vnni"
#define MOE_AVX512_BF16 MOE_AVX512_VNNI ",avx512bf16"
#define MOE_AMX "amx-tile,amx-bf16,amx-int8"

namespace moe {

/// The rungs. On x86 each stands on the one before it; neon stands on scalar.
enum class cpu_level : std::uint8_t {
  scalar,
  neon,
  avx2,         ///< with FMA and F16C
  avx512,       ///< F, BW, DQ and VL
  avx512_vnni,  ///< products of bytes
  avx512_bf16,  ///< products of halves, where they are faster than those of floats
  amx           ///< tiles, bf16 and int8
};

inline constexpr cpu_level every_cpu_level[] = {cpu_level::scalar, cpu_level::neon,        cpu_level::avx2,
                                                cpu_level::avx512, cpu_level::avx512_vnni, cpu_level::avx512_bf16,
                                                cpu_level::amx};

constexpr std::string_view name(cpu_level l) noexcept {
  constexpr std::string_view names[] = {"scalar", "neon", "avx2", "avx512", "avx512_vnni", "avx512_bf16", "amx"};
  return names[static_cast<int>(l)];
}

/// Whether a machine of level `machine` runs the kernels of `wanted`.
constexpr bool includes(cpu_level machine, cpu_level wanted) noexcept {
  return wanted == cpu_level::scalar || wanted == machine ||
         (wanted != cpu_level::neon && machine != cpu_level::neon && wanted < machine);
}

/// A level that was asked for and that there is not, or not here.
struct level_error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

/// What runs, what the machine could run, and why it is what runs.
struct cpu_level_report {
  cpu_level level, machine;
  const char* why;
};

namespace detail {

struct machine_level {
  cpu_level level;
  const char* why;  ///< what keeps it from the next one
};

/// The highest level whose features the processor has and whose registers the system saves.
constexpr machine_level level_of(const cpu_facts& c) noexcept {
  const auto has = [](auto bits, auto all) { return (bits & all) == all; };
  constexpr std::uint32_t fma = 1u << 12, f16c = 1u << 29, avx = 1u << 28, avx2 = 1u << 5;
  constexpr std::uint32_t f = 1u << 16, dq = 1u << 17, bw = 1u << 30, vl = 1u << 31, vnni = 1u << 11;
  constexpr std::uint32_t amx_bf16 = 1u << 22, amx_tile = 1u << 24, amx_int8 = 1u << 25;
  constexpr std::uint32_t avx512_bf16 = 1u << 5;  // of subleaf 1
  constexpr std::uint64_t of_256 = 0x6, of_512 = 0xe6, of_tiles = 0x60000;
  if (!has(c.leaf1_ecx, fma | f16c | avx) || !has(c.leaf7_ebx, avx2))
    return {cpu_level::scalar, "the processor lacks AVX2, FMA or F16C"};
  if (!has(c.saved_state, of_256)) return {cpu_level::scalar, "the system does not save registers of 256 bits"};
  if (!has(c.leaf7_ebx, f | dq | bw | vl)) return {cpu_level::avx2, "the processor lacks AVX-512 (F, BW, DQ and VL)"};
  if (!has(c.saved_state, of_512)) return {cpu_level::avx2, "the system does not save registers of 512 bits"};
  if (!has(c.leaf7_ecx, vnni)) return {cpu_level::avx512, "the processor lacks AVX-512 VNNI"};
  // Products of halves do twice the work of products of floats on AMD's, and no more or half of it on Intel's.
  // Every processor with AMX has them, too.
  const cpu_level below = c.amd && has(c.leaf7_1_eax, avx512_bf16) ? cpu_level::avx512_bf16 : cpu_level::avx512_vnni;
  if (!has(c.leaf7_edx, amx_bf16 | amx_tile | amx_int8)) return {below, "the processor lacks AMX with bf16 and int8"};
  if (!has(c.saved_state, of_tiles) || !c.tiles_granted) return {below, "the system refused the tiles of AMX"};
  return {cpu_level::amx, "the processor and the system have every level"};
}

/// Found at the first call, once in a process.
inline machine_level this_machine() noexcept {
#if defined(MOE_X86)
  static const machine_level found = level_of(probe_cpu());
  return found;
#elif defined(__aarch64__)
  return {cpu_level::neon, "every 64-bit ARM processor has NEON"};
#else
  return {cpu_level::scalar, "there are no vector kernels for this processor"};
#endif
}

/// The level that `text` names, for a machine of level `machine`. Throws level_error, which names `what` asked.
inline cpu_level level_named(std::string_view text, cpu_level machine, const char* what) {
  std::string had;
  for (const cpu_level l : every_cpu_level) {
    if (!includes(machine, l)) continue;
    if (name(l) == text) return l;
    had.append(had.empty() ? "" : ", ").append(name(l));
  }
  for (const cpu_level l : every_cpu_level)
    if (name(l) == text)
      throw level_error(std::string(what) + " asks for " + std::string(text) + ", this machine has " + had + " (" +
                        this_machine().why + ") [docs/backends.md]");
  throw level_error(std::string(what) + " is \"" + std::string(text) + "\", expected one of " + had + " [docs/backends.md]");
}

/// The level that the compiler's flags promise, by their number build_level.
constexpr cpu_level level_of_flags(int build) noexcept {
  return build == 3 ? cpu_level::avx512 : build == 2 ? cpu_level::avx2 : cpu_level::scalar;
}
/// Throws level_error where a program was compiled for more than this machine has.
inline void check_flags(cpu_level flags, machine_level machine) {
  if (!includes(machine.level, flags))
    throw level_error("moe: compiled for " + std::string(name(flags)) + ", this machine has " +
                      std::string(name(machine.level)) + " (" + machine.why + ") [docs/backends.md]");
}

/// What MOE_CPU_LEVEL says, or nothing.
inline std::string_view wanted_level() noexcept {
  const char* text = std::getenv("MOE_CPU_LEVEL");
  return text == nullptr ? std::string_view() : std::string_view(text);
}

struct level_in_use {
  std::atomic<cpu_level> level;
  std::atomic<const char*> why;
  level_in_use() noexcept : level(this_machine().level), why(this_machine().why) {
    const std::string_view wanted = wanted_level();
    if (wanted.empty()) return;
    why = "MOE_CPU_LEVEL names no level of this machine";  // until somebody checks
    for (const cpu_level l : every_cpu_level)
      if (name(l) == wanted && includes(this_machine().level, l)) {
        level = l;
        why = "MOE_CPU_LEVEL asks for it";
      }
  }
};
inline level_in_use& current_level() noexcept {
  static level_in_use current;
  return current;
}

}  // namespace detail

/// The level of every kernel that is chosen at run time. Throws nothing: see check_cpu_level.
inline cpu_level cpu_level_in_use() noexcept { return detail::current_level().level.load(std::memory_order_relaxed); }

/// The same with its reason: "runs avx2 of amx: MOE_CPU_LEVEL asks for it".
inline cpu_level_report report_cpu_level() noexcept {
  return {cpu_level_in_use(), detail::this_machine().level, detail::current_level().why.load(std::memory_order_relaxed)};
}

/// Throws level_error where MOE_CPU_LEVEL names no level, or one that this machine lacks, and where the compiler's flags
/// promise what it lacks: of this file, whose number is in the name. Called wherever a cpu backend is made; until it has
/// been, such a value is as if it were not set.
template <int Build = detail::build_level>
void check_cpu_level() {
  detail::check_flags(detail::level_of_flags(Build), detail::this_machine());
  if (const std::string_view wanted = detail::wanted_level(); !wanted.empty())
    detail::level_named(wanted, detail::this_machine().level, "MOE_CPU_LEVEL");
}

/// Runs at `level` from now on, MOE_CPU_LEVEL or not. Throws level_error where this machine lacks it. Not while a layer runs.
inline void use_cpu_level(cpu_level level) {
  detail::level_named(name(level), detail::this_machine().level, "moe::use_cpu_level");
  detail::current_level().level = level;
  detail::current_level().why = "moe::use_cpu_level asks for it";
}

}  // namespace moe
