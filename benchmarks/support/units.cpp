// SPDX-License-Identifier: Apache-2.0
#include "support/units.hpp"

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "moe/backend/cpu/level.hpp"
#include "support/measure.hpp"

#if defined(MOE_X86)
#include <immintrin.h>
#endif

namespace bench {
namespace {

bool has(moe::cpu_level l) { return moe::includes(moe::cpu_level_in_use(), l); }

double fma_plain(int turns) {
  constexpr int lanes = 64;
  float a[lanes], x = 1.0000001f, y = 1e-9f;
  std::fill_n(a, lanes, 1.f);
  keep(x);
  for (int i = 0; i < turns; ++i)
    for (int j = 0; j < lanes; ++j) a[j] = a[j] * x + y;
  keep(a);
  return 2. * lanes * turns;
}

#if defined(MOE_X86)
// Sums begin with different numbers: of equal ones, a compiler keeps one.
MOE_TARGET("avx2,fma") double fma_avx2(int turns) {
  const __m256 x = _mm256_set1_ps(1.0000001f), y = _mm256_set1_ps(1e-9f);
  __m256 a[12];
  for (int j = 0; j < 12; ++j) a[j] = _mm256_set1_ps(static_cast<float>(j));
  for (int i = 0; i < turns; ++i) {
#pragma GCC unroll 12
    for (int j = 0; j < 12; ++j) a[j] = _mm256_fmadd_ps(a[j], x, y);
  }
  keep(a);
  return 2. * 12 * 8 * turns;
}
MOE_TARGET("avx512f") double fma_avx512(int turns) {
  const __m512 x = _mm512_set1_ps(1.0000001f), y = _mm512_set1_ps(1e-9f);
  __m512 a[16];
  for (int j = 0; j < 16; ++j) a[j] = _mm512_set1_ps(static_cast<float>(j));
  for (int i = 0; i < turns; ++i) {
#pragma GCC unroll 16
    for (int j = 0; j < 16; ++j) a[j] = _mm512_fmadd_ps(a[j], x, y);
  }
  keep(a);
  return 2. * 16 * 16 * turns;
}

MOE_TARGET("avx512f,avx512bw,avx512vnni") double bytes_vnni(int turns) {
#if defined(__GNUC__)
  typedef int ints __attribute__((vector_size(64)));  // GCC 12 keeps an array of __m512i in memory
#else
  using ints = __m512i;
#endif
  const __m512i x = _mm512_set1_epi8(3), y = _mm512_set1_epi8(5);
  ints a[16];
  for (int j = 0; j < 16; ++j) a[j] = (ints)_mm512_set1_epi32(j);
  for (int i = 0; i < turns; ++i) {
#pragma GCC unroll 16
    for (int j = 0; j < 16; ++j) a[j] = (ints)_mm512_dpbusd_epi32((__m512i)a[j], x, y);
  }
  keep(a);
  return 2. * 16 * 64 * turns;
}

MOE_TARGET("avx512f,avx512bf16") double halves_avx512(int turns) {
  const __m512 ones = _mm512_set1_ps(1.0000001f);
  __m512bh x;
  std::memcpy(&x, &ones, sizeof x);
  __m512 a[16];
  for (int j = 0; j < 16; ++j) a[j] = _mm512_set1_ps(static_cast<float>(j));
  for (int i = 0; i < turns; ++i) {
#pragma GCC unroll 16
    for (int j = 0; j < 16; ++j) a[j] = _mm512_dpbf16_ps(a[j], x, x);
  }
  keep(a);
  return 2. * 16 * 32 * turns;
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

MOE_TARGET("amx-tile") void clear_tiles() {
  _tile_loadconfig(&whole_tiles);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}
// Two tiles, read from the first cache, by two.
MOE_TARGET("amx-tile,amx-bf16") double tiles_bf16(int turns) {
  clear_tiles();
  for (int i = 0; i < turns / 16; ++i) {
    _tile_loadd(4, some_tile.bytes, 64);
    _tile_loadd(6, some_tile.bytes, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, some_tile.bytes, 64);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, some_tile.bytes, 64);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_release();
  return 4. * 2 * 16 * 16 * 32 * (turns / 16);
}
MOE_TARGET("amx-tile,amx-int8") double tiles_int8(int turns) {
  clear_tiles();
  for (int i = 0; i < turns / 16; ++i) {
    _tile_loadd(4, some_tile.bytes, 64);
    _tile_loadd(6, some_tile.bytes, 64);
    _tile_dpbusd(0, 4, 6);
    _tile_loadd(7, some_tile.bytes, 64);
    _tile_dpbusd(1, 4, 7);
    _tile_loadd(5, some_tile.bytes, 64);
    _tile_dpbusd(2, 5, 6);
    _tile_dpbusd(3, 5, 7);
  }
  _tile_release();
  return 4. * 2 * 16 * 16 * 64 * (turns / 16);
}
#endif
#endif

}  // namespace

unit_loops loops_in_use() {
  unit_loops found{.fma_f32 = fma_plain};
#if defined(MOE_X86)
  if (has(moe::cpu_level::avx2)) found.fma_f32 = fma_avx2;
  if (has(moe::cpu_level::avx512)) found.fma_f32 = fma_avx512;
  if (has(moe::cpu_level::avx512_vnni)) found.vnni_int8 = bytes_vnni;
  if (has(moe::cpu_level::avx512_bf16)) found.avx512_bf16 = halves_avx512;
#if defined(__GNUC__) && defined(__x86_64__)
  if (has(moe::cpu_level::amx)) {
    found.amx_bf16 = tiles_bf16;
    found.amx_int8 = tiles_int8;
  }
#endif
#endif
  return found;
}

}  // namespace bench
