// SPDX-License-Identifier: Apache-2.0
#include "support/limits.hpp"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <memory>

#include "moe/backend/cpu/level.hpp"
#include "support/measure.hpp"

#if defined(MOE_X86)
#include <immintrin.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace bench {
namespace {

// --- Reading from memory ---

struct freed {
  void operator()(std::byte* p) const { std::free(p); }
};
using big_block = std::unique_ptr<std::byte, freed>;

// More than any cache holds, in huge pages where the system has them.
constexpr std::size_t block_bytes = std::size_t{1} << 30;

big_block make_block() {
  big_block block(static_cast<std::byte*>(std::aligned_alloc(std::size_t{2} << 20, block_bytes)));
#if defined(__linux__)
  if (block) madvise(block.get(), block_bytes, MADV_HUGEPAGE);
#endif
  if (block) std::fill_n(block.get(), block_bytes, std::byte{1});
  return block;
}

// Keeps the compiler from leaving out what nobody reads.
template <class T>
void keep(const T& value) {
#if defined(__GNUC__)
  __asm__ volatile("" : : "m"(value) : "memory");
#else
  static volatile unsigned char sink;
  sink = *reinterpret_cast<const volatile unsigned char*>(&value);
#endif
}

// Reads `bytes` as `Streams` streams side by side, asking for what comes 1 KiB later in each: the fastest found on the
// machines this was tried on.
template <int Streams>
void read_plain(const std::byte* p, std::size_t bytes) {
  constexpr std::size_t ahead = 1024, words = 64 / sizeof(std::uint64_t);
  const std::size_t part = bytes / Streams;
  std::uint64_t sum[words] = {};
  for (std::size_t i = 0; i < part; i += 64)
    for (int s = 0; s < Streams; ++s) {
      const std::byte* line = p + static_cast<std::size_t>(s) * part + i;
#if defined(__GNUC__)
      __builtin_prefetch(line + ahead);
#endif
      const auto* v = reinterpret_cast<const std::uint64_t*>(line);
      for (std::size_t j = 0; j < words; ++j) sum[j] += v[j];
    }
  keep(sum);
}

#if defined(MOE_X86)
template <int Streams>
MOE_TARGET("avx512f") void read_avx512(const std::byte* p, std::size_t bytes) {
  constexpr std::size_t ahead = 1024;
  const std::size_t part = bytes / Streams;
  __m512i sum[Streams];
  for (int s = 0; s < Streams; ++s) sum[s] = _mm512_setzero_si512();
  for (std::size_t i = 0; i < part; i += 64)
    for (int s = 0; s < Streams; ++s) {
      const std::byte* line = p + static_cast<std::size_t>(s) * part + i;
      _mm_prefetch(reinterpret_cast<const char*>(line + ahead), _MM_HINT_T0);
      sum[s] = _mm512_add_epi64(sum[s], _mm512_load_si512(line));
    }
  keep(sum);
}
#endif

bool has(moe::cpu_level l) { return moe::includes(moe::cpu_level_in_use(), l); }

// --- Multiply-adds with everything in registers ---

constexpr long turns = 1 << 20;

double fma_plain() {
  constexpr int lanes = 64;
  float a[lanes], x = 1.0000001f, y = 1e-9f;
  std::fill_n(a, lanes, 1.f);
  keep(x);
  for (long i = 0; i < turns; ++i)
    for (int j = 0; j < lanes; ++j) a[j] = a[j] * x + y;
  keep(a);
  return 2. * lanes * turns;
}

#if defined(MOE_X86)
MOE_TARGET("avx2,fma") double fma_avx2() {
  const __m256 x = _mm256_set1_ps(1.0000001f), y = _mm256_set1_ps(1e-9f);
  __m256 a[12];
  for (auto& v : a) v = _mm256_set1_ps(1.f);
  for (long i = 0; i < turns; ++i) {
#pragma GCC unroll 12
    for (int j = 0; j < 12; ++j) a[j] = _mm256_fmadd_ps(a[j], x, y);
  }
  keep(a);
  return 2. * 12 * 8 * turns;
}
MOE_TARGET("avx512f") double fma_avx512() {
  const __m512 x = _mm512_set1_ps(1.0000001f), y = _mm512_set1_ps(1e-9f);
  __m512 a[16];
  for (auto& v : a) v = _mm512_set1_ps(1.f);
  for (long i = 0; i < turns; ++i) {
#pragma GCC unroll 16
    for (int j = 0; j < 16; ++j) a[j] = _mm512_fmadd_ps(a[j], x, y);
  }
  keep(a);
  return 2. * 16 * 16 * turns;
}

MOE_TARGET("avx512f,avx512bw,avx512vnni") double bytes_vnni() {
  const __m512i x = _mm512_set1_epi8(3), y = _mm512_set1_epi8(5);
  __m512i a[16];
  for (auto& v : a) v = _mm512_setzero_si512();
  for (long i = 0; i < turns; ++i) {
#pragma GCC unroll 16
    for (int j = 0; j < 16; ++j) a[j] = _mm512_dpbusd_epi32(a[j], x, y);
  }
  keep(a);
  return 2. * 16 * 64 * turns;
}

#if defined(__GNUC__) && defined(__x86_64__)
struct alignas(64) tile_config {
  std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
  std::uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
// Static: GCC 12 takes the instruction for one that reads 8 bytes, and leaves out the stores to a local one.
const tile_config whole_tiles;

// Numbers, not zeros, which a processor may multiply with less power.
struct alignas(64) tile_data {
  std::uint8_t bytes[1024];
  tile_data() { std::fill_n(bytes, sizeof bytes, std::uint8_t{0x3f}); }
};
const tile_data some_tile;

MOE_TARGET("amx-tile") void load_tiles() {
  _tile_loadconfig(&whole_tiles);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_loadd(4, some_tile.bytes, 64);
  _tile_loadd(5, some_tile.bytes, 64);
  _tile_loadd(6, some_tile.bytes, 64);
  _tile_loadd(7, some_tile.bytes, 64);
}
// Four products of two tiles by two: 16 x 16 results, 64 bytes of k.
MOE_TARGET("amx-tile,amx-bf16") double tiles_bf16() {
  load_tiles();
  for (long i = 0; i < turns / 16; ++i) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_release();
  return 4. * 2 * 16 * 16 * 32 * (turns / 16);
}
MOE_TARGET("amx-tile,amx-int8") double tiles_int8() {
  load_tiles();
  for (long i = 0; i < turns / 16; ++i) {
    _tile_dpbusd(0, 4, 6);
    _tile_dpbusd(1, 4, 7);
    _tile_dpbusd(2, 5, 6);
    _tile_dpbusd(3, 5, 7);
  }
  _tile_release();
  return 4. * 2 * 16 * 16 * 64 * (turns / 16);
}
#endif
#endif

// Tries until a few tries had the processor to themselves, and returns the best of all; clears `quiet` where they never had.
class limit {
 public:
  limit(int threads, bool& quiet) : threads_(threads), quiet_(quiet) {}

  /// Of amount / second, where `work(thread)` returns the amount that one of the threads did.
  double operator()(const std::function<double(int)>& work) const {
    constexpr int wanted = 3, tries = 30;
    double best = 0;
    int undisturbed = 0;
    for (int t = 0; t < tries && undisturbed < wanted; ++t) {
      const bool alone = wait_for_quiet(threads_, 2);
      double amount = 0;
      const double time = together(threads_, [&](int thread) {
        const double mine = work(thread);
        if (thread == 0) amount = mine * threads_;
      });
      best = std::max(best, amount / time);
      undisturbed += alone;
    }
    quiet_ = quiet_ && undisturbed == wanted;
    return best;
  }

 private:
  int threads_;
  bool& quiet_;
};

double read_rate(const limit& most, int threads, const std::byte* block, void (*read)(const std::byte*, std::size_t)) {
  const std::size_t part = block_bytes / static_cast<std::size_t>(threads) / 4096 * 4096;
  return most([&](int thread) {
    read(block + static_cast<std::size_t>(thread) * part, part);
    return static_cast<double>(part);
  });
}

// Several calls of `work`, which returns the operations that it does.
double rate(const limit& most, double (*work)()) {
  return most([&](int) {
    double mine = 0;
    for (int i = 0; i < 4; ++i) mine += work();
    return mine;
  });
}

}  // namespace

machine_limits measure_limits(int threads) {
  machine_limits found{.threads = threads};
  const limit most(threads, found.quiet);
  const big_block block = make_block();
  const auto read = [&](auto... ways) {
    if (block) found.dram_read = std::max({read_rate(most, threads, block.get(), ways)...});
  };
#if defined(MOE_X86)
  if (has(moe::cpu_level::avx512))
    read(read_avx512<1>, read_avx512<2>, read_avx512<4>);
  else
#endif
    read(read_plain<1>, read_plain<2>, read_plain<4>);

  auto* fma = fma_plain;
#if defined(MOE_X86)
  if (has(moe::cpu_level::avx2)) fma = fma_avx2;
  if (has(moe::cpu_level::avx512)) fma = fma_avx512;
  if (has(moe::cpu_level::avx512_vnni)) found.vnni_int8 = rate(most, bytes_vnni);
#if defined(__GNUC__) && defined(__x86_64__)
  if (has(moe::cpu_level::amx)) {
    found.amx_bf16 = rate(most, tiles_bf16);
    found.amx_int8 = rate(most, tiles_int8);
  }
#endif
#endif
  found.fma_f32 = rate(most, fma);
  return found;
}

}  // namespace bench
