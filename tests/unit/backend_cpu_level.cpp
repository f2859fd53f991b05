// SPDX-License-Identifier: Apache-2.0
#include <doctest/doctest.h>

#include <algorithm>
#include <fstream>
#include <initializer_list>
#include <string>

#include "moe/backend/cpu/ladder.hpp"
#include "moe/backend/cpu/level.hpp"
#if defined(__linux__) && defined(__x86_64__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

using moe::cpu_level, moe::detail::cpu_facts, moe::detail::level_of;

namespace {

/// A processor with every level, on a system that saves and grants everything.
constexpr cpu_facts everything{0x30001000u | 1u << 27,
                               1u << 5 | 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31,
                               1u << 11,
                               1u << 22 | 1u << 24 | 1u << 25,
                               1u << 5,
                               0x600e7,
                               true};

constexpr cpu_facts by_amd(cpu_facts c) {
  c.amd = true;
  return c;
}

constexpr cpu_facts without(cpu_facts c, std::uint32_t cpu_facts::*part, int bit) {
  c.*part &= ~(1u << bit);
  return c;
}
constexpr cpu_facts saving(std::uint64_t state) {
  cpu_facts c = everything;
  c.saved_state = state;
  return c;
}

std::string message_of(std::string_view text, cpu_level machine) {
  try {
    moe::detail::level_named(text, machine, "MOE_CPU_LEVEL");
  } catch (const moe::level_error& e) {
    return e.what();
  }
  return "";
}

int rung(moe::arch::scalar) { return 0; }
int rung(moe::arch::avx512) { return 2; }

}  // namespace

TEST_SUITE("backend/cpu/level") {
  TEST_CASE("each missing feature takes the level below the one that needs it") {
    CHECK(level_of(everything).level == cpu_level::amx);
    CHECK(level_of({}).level == cpu_level::scalar);
    for (const int bit : {12, 28, 29}) CHECK(level_of(without(everything, &cpu_facts::leaf1_ecx, bit)).level == cpu_level::scalar);
    CHECK(level_of(without(everything, &cpu_facts::leaf7_ebx, 5)).level == cpu_level::scalar);
    for (const int bit : {16, 17, 30, 31})
      CHECK(level_of(without(everything, &cpu_facts::leaf7_ebx, bit)).level == cpu_level::avx2);
    CHECK(level_of(without(everything, &cpu_facts::leaf7_ecx, 11)).level == cpu_level::avx512);
    for (const int bit : {22, 24, 25})
      CHECK(level_of(without(everything, &cpu_facts::leaf7_edx, bit)).level == cpu_level::avx512_vnni);
    CHECK(level_of(without(everything, &cpu_facts::leaf7_1_eax, 5)).level == cpu_level::amx);
  }
  TEST_CASE("products of halves are a level of their own where they are faster, which is on AMD's processors") {
    const cpu_facts without_tiles = without(everything, &cpu_facts::leaf7_edx, 24);
    CHECK(level_of(without_tiles).level == cpu_level::avx512_vnni);
    CHECK(level_of(by_amd(without_tiles)).level == cpu_level::avx512_bf16);
    CHECK(level_of(by_amd(without(without_tiles, &cpu_facts::leaf7_1_eax, 5))).level == cpu_level::avx512_vnni);
    CHECK(level_of(by_amd(without(without_tiles, &cpu_facts::leaf7_ecx, 11))).level == cpu_level::avx512);
    CHECK(level_of(by_amd(everything)).level == cpu_level::amx);
  }
  TEST_CASE("registers that the system does not save are not used") {
    CHECK(level_of(saving(0)).level == cpu_level::scalar);
    CHECK(level_of(saving(0x3)).level == cpu_level::scalar);
    CHECK(level_of(saving(0x7)).level == cpu_level::avx2);
    CHECK(level_of(saving(0xe7)).level == cpu_level::avx512_vnni);
  }
  TEST_CASE("a refusal of tiles is survived and told") {
    cpu_facts refused = everything;
    refused.tiles_granted = false;
    CHECK(level_of(refused).level == cpu_level::avx512_vnni);
    CHECK(std::string(level_of(refused).why) == "the system refused the tiles of AMX");
  }
  TEST_CASE("a machine includes the levels that its own stands on") {
    CHECK(includes(cpu_level::amx, cpu_level::avx2));
    CHECK(includes(cpu_level::avx2, cpu_level::avx2));
    CHECK_FALSE(includes(cpu_level::avx2, cpu_level::avx512));
    CHECK_FALSE(includes(cpu_level::amx, cpu_level::neon));
    CHECK_FALSE(includes(cpu_level::neon, cpu_level::avx2));
    for (const cpu_level l : moe::every_cpu_level) CHECK(includes(l, cpu_level::scalar));
  }
  TEST_CASE("a level asked for by name is found, or the message says what there is") {
    CHECK(moe::detail::level_named("avx2", cpu_level::amx, "MOE_CPU_LEVEL") == cpu_level::avx2);
    CHECK(message_of("AVX2", cpu_level::avx512) ==
          "MOE_CPU_LEVEL is \"AVX2\", expected one of scalar, avx2, avx512 [docs/backends.md]");
    const std::string lacking = message_of("amx", cpu_level::avx2);
    CHECK(lacking.starts_with("MOE_CPU_LEVEL asks for amx, this machine has scalar, avx2 ("));
    CHECK(lacking.ends_with(") [docs/backends.md]"));
  }
  TEST_CASE("a program compiled for more than the machine has says so") {
    using moe::detail::check_flags, moe::detail::level_of_flags;
    const moe::detail::machine_level machine{cpu_level::avx2, "the processor lacks AVX-512"};
    CHECK_NOTHROW(check_flags(level_of_flags(0), machine));
    CHECK_NOTHROW(check_flags(level_of_flags(2), machine));
    CHECK_NOTHROW(check_flags(level_of_flags(4), {cpu_level::neon, ""}));
    CHECK_THROWS_WITH_AS(check_flags(level_of_flags(3), machine),
                         "moe: compiled for avx512, this machine has avx2 (the processor lacks AVX-512) [docs/backends.md]",
                         moe::level_error);
  }
#if defined(__linux__) && defined(__x86_64__)
  TEST_CASE("the machine has the level that the system's list of features and its answer to a request for tiles say") {
    std::ifstream cpu("/proc/cpuinfo");
    std::string line;
    bool found = false, amd = false;
    while (!found && std::getline(cpu, line)) {
      amd = amd || (line.starts_with("vendor_id") && line.ends_with("AuthenticAMD"));
      found = line.starts_with("flags");
    }
    if (!found) {
      MESSAGE("skipped: this system has no list of features");
      return;
    }
    line += ' ';
    const auto all = [&](std::initializer_list<const char*> features) {
      return std::all_of(features.begin(), features.end(),
                         [&](const char* f) { return line.find(' ' + std::string(f) + ' ') != std::string::npos; });
    };
    cpu_level wanted = cpu_level::scalar;
    if (all({"avx2", "fma", "f16c"})) {
      wanted = cpu_level::avx2;
      if (all({"avx512f", "avx512bw", "avx512dq", "avx512vl"})) wanted = cpu_level::avx512;
      if (wanted == cpu_level::avx512 && all({"avx512_vnni"})) wanted = cpu_level::avx512_vnni;
      constexpr long request_permission = 0x1023, tile_data = 18;
      if (wanted == cpu_level::avx512_vnni && amd && all({"avx512_bf16"})) wanted = cpu_level::avx512_bf16;
      if (wanted >= cpu_level::avx512_vnni && all({"amx_tile", "amx_bf16", "amx_int8"}) &&
          syscall(SYS_arch_prctl, request_permission, tile_data) == 0)
        wanted = cpu_level::amx;
    }
    CAPTURE(line);
    CHECK(std::string(name(moe::report_cpu_level().machine)) == name(wanted));
  }
#endif
  TEST_CASE("a program chooses among the levels of the machine, and the report says so") {
    const moe::cpu_level_report before = moe::report_cpu_level();
    CHECK(includes(before.machine, before.level));
    for (const cpu_level l : moe::every_cpu_level) {
      CAPTURE(name(l));
      if (includes(before.machine, l)) {
        moe::use_cpu_level(l);
        CHECK(moe::cpu_level_in_use() == l);
        CHECK(std::string(moe::report_cpu_level().why) == "moe::use_cpu_level asks for it");
      } else {
        CHECK_THROWS_AS(moe::use_cpu_level(l), moe::level_error);
      }
    }
    moe::use_cpu_level(before.level);
  }
  TEST_CASE("a tag takes the overload of the nearest level below it") {
    CHECK(rung(moe::arch::amx{}) == 2);
    CHECK(rung(moe::arch::avx512{}) == 2);
    CHECK(rung(moe::arch::avx2{}) == 0);
    CHECK(rung(moe::arch::neon{}) == 0);
  }
}
