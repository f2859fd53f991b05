// SPDX-License-Identifier: Apache-2.0
/// Products with packed weights on the tile unit of Intel processors: bf16 and bytes.
///
/// A product of up to 32 rows with a panel keeps four tiles of sums. Few rows follow each panel to its end, as it lies in
/// memory; many rows pass, a stretch of them after another, by the stretch of a panel that stays in the first cache, while
/// the next panel's comes into the second.
/// `Tiles` are the instructions; tests put a plain C++ copy of them in their place. Code for them writes to nothing that it
/// loaded until the sums of it are stored, so that vector_tiles.hpp can stand for them, too.
#pragma once

#include "moe/backend/cpu/packed_amx_weights.hpp"
#include "moe/backend/cpu/packed_bf16_avx512.hpp"
#include "moe/backend/cpu/packed_int4_avx512.hpp"
#include "moe/backend/cpu/packed_ternary_avx512.hpp"

#if defined(MOE_X86_KERNELS)

namespace moe::arch::detail {

/// What the configuration instruction reads.
struct alignas(64) tile_shapes {
  std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
  std::uint16_t bytes_per_row[16] = {};
  std::uint8_t rows[16] = {};
};

/// The instructions take tile numbers as literals: 0 .. 3 hold sums, of two blocks of rows by two of weight rows; 4 and 5
/// the rows; 6 and 7 the weights.
struct hardware_tiles {
#define MOE_EACH_TILE(n) \
  MOE_TARGET(MOE_AMX) static void load##n(const void* p, dim stride) noexcept { _tile_loadd(n, p, stride); }
  MOE_EACH_TILE(0)
  MOE_EACH_TILE(1)
  MOE_EACH_TILE(2)
  MOE_EACH_TILE(3)
  MOE_EACH_TILE(4)
  MOE_EACH_TILE(5)
  MOE_EACH_TILE(6)
  MOE_EACH_TILE(7)
#undef MOE_EACH_TILE
  /// The same, but the first cache keeps what it has.
  MOE_TARGET(MOE_AMX) static void pass4(const void* p, dim stride) noexcept { _tile_stream_loadd(4, p, stride); }
  MOE_TARGET(MOE_AMX) static void pass5(const void* p, dim stride) noexcept { _tile_stream_loadd(5, p, stride); }
  MOE_TARGET(MOE_AMX) static void pass6(const void* p, dim stride) noexcept { _tile_stream_loadd(6, p, stride); }
  MOE_TARGET(MOE_AMX) static void pass7(const void* p, dim stride) noexcept { _tile_stream_loadd(7, p, stride); }
#define MOE_EACH_TILE(n, a, b)                                                                           \
  MOE_TARGET(MOE_AMX) static void store##n(void* p, dim stride) noexcept { _tile_stored(n, p, stride); } \
  MOE_TARGET(MOE_AMX) static void zero##n() noexcept { _tile_zero(n); }                                  \
  MOE_TARGET(MOE_AMX) static void add_halves##n() noexcept { _tile_dpbf16ps(n, a, b); }                  \
  MOE_TARGET(MOE_AMX) static void add_bytes##n() noexcept { _tile_dpbsud(n, a, b); }
  MOE_EACH_TILE(0, 4, 6)
  MOE_EACH_TILE(1, 4, 7)
  MOE_EACH_TILE(2, 5, 6)
  MOE_EACH_TILE(3, 5, 7)
#undef MOE_EACH_TILE
  MOE_TARGET(MOE_AMX) static void shape(const tile_shapes& s) noexcept {
    compiler_fence();  // GCC 12 takes the operand for eight bytes
    _tile_loadconfig(&s);
  }
  MOE_TARGET(MOE_AMX) static void release() noexcept { _tile_release(); }
  /// GCC 12 does not know that tiles read memory.
  static void compiler_fence() noexcept {
#if defined(__GNUC__)
    __asm__ volatile("" ::: "memory");
#endif
  }
};

/// Memory that is asked for while tiles are multiplied: in each step the next `lines` lines of `runs` pieces of memory that
/// follow each other, each `run_bytes` long; after `window` steps the pieces after those begin. Several pieces at once, in
/// pages of their own, let the hardware's prefetching run ahead in each: a line that is asked for is then mostly on its way
/// already, and frees its buffer of the first cache, which tiles need too, early.
struct tiles_ahead {
  const std::byte* at = nullptr;
  dim runs = 0, run_bytes = 0, lines = 1, window = 1 << 20;
};

/// One or two tiles of prepared rows against one panel: sums = or += over `steps` steps.
struct tile_work {
  const std::byte *upper, *lower;  ///< lower: null where there is one tile
  dim step;                        ///< bytes from step to step, of both
  dim steps;
  tiles_ahead ahead;
  void* sums;
  dim stride;  ///< bytes from row to row of the sums
  bool add;
  dim upper_rows;  ///< the sums of `lower` start so many rows down
};

/// Rows that `Pass` leave the first cache to the weights.
template <int Build, class Tiles, bool Bytes, bool Pass = false, class Weights = stored_weights>
MOE_TARGET(MOE_AMX "," MOE_AVX512_VNNI)
MOE_NO_INLINE void multiply_tiles(const tile_work& w, Weights weights) noexcept {
  Tiles::compiler_fence();
  auto* c = static_cast<std::byte*>(w.sums);
  std::byte* below = c + w.upper_rows * w.stride;
  const bool two = w.lower != nullptr;
  if (w.add) {
    Tiles::load0(c, w.stride);
    Tiles::load1(c + line_bytes, w.stride);
    if (two) Tiles::load2(below, w.stride);
    if (two) Tiles::load3(below + line_bytes, w.stride);
  } else {
    Tiles::zero0();
    Tiles::zero1();
    Tiles::zero2();
    Tiles::zero3();
  }
  const std::byte *a = w.upper, *b = w.lower, *window = w.ahead.at, *ahead = window;
  dim left = w.ahead.window;
  for (dim s = 0; s < w.steps; ++s, a += w.step) {
    const std::byte* q = weights.next();
    Tiles::load6(q, line_bytes);
    if constexpr (Pass)
      Tiles::pass4(a, line_bytes);
    else
      Tiles::load4(a, line_bytes);
    if constexpr (Bytes)
      Tiles::add_bytes0();
    else
      Tiles::add_halves0();
    Tiles::load7(q + tile_bytes, line_bytes);
    if constexpr (Bytes)
      Tiles::add_bytes1();
    else
      Tiles::add_halves1();
    for (dim r = 0; r < w.ahead.runs; ++r)
      for (dim l = 0; l < w.ahead.lines; ++l) moe::detail::prefetch_second(ahead + r * w.ahead.run_bytes + l * line_bytes);
    ahead += w.ahead.lines * line_bytes;
    if (--left == 0) {
      left = w.ahead.window;
      ahead = window += w.ahead.runs * w.ahead.run_bytes;
    }
    if (!two) continue;
    if constexpr (Pass)
      Tiles::pass5(b, line_bytes);
    else
      Tiles::load5(b, line_bytes);
    b += w.step;
    if constexpr (Bytes)
      Tiles::add_bytes2();
    else
      Tiles::add_halves2();
    if constexpr (Bytes)
      Tiles::add_bytes3();
    else
      Tiles::add_halves3();
  }
  Tiles::store0(c, w.stride);
  Tiles::store1(c + line_bytes, w.stride);
  if (two) Tiles::store2(below, w.stride);
  if (two) Tiles::store3(below + line_bytes, w.stride);
  Tiles::compiler_fence();
}

/// Tiles as high as the blocks they hold.
template <class Tiles>
class tile_heights {
 public:
  void set(dim upper, dim lower) noexcept {
    if (upper == upper_ && lower == lower_) return;
    upper_ = upper;
    lower_ = lower;
    tile_shapes s;
    for (int t = 0; t < 8; ++t) {
      s.bytes_per_row[t] = line_bytes;
      s.rows[t] = static_cast<std::uint8_t>(t >= 6 ? tile_rows : t == 2 || t == 3 || t == 5 ? lower : upper);
    }
    Tiles::shape(s);
  }

 private:
  dim upper_ = 0, lower_ = 0;
};

/// A block of rows against a panel from a step on.
template <class Tiles>
tile_work work_of(const prepared_rows& a, const panel_product& p, dim b, dim panel, dim step, dim n,
                  tile_heights<Tiles>& heights) noexcept {
  const dim height = a.height_of(b), upper = height <= tile_rows ? height : (height + 1) / 2, lower = height - upper;
  const std::byte* rows = a.block(b, step);
  heights.set(upper, lower > 0 ? lower : 1);
  return {rows, lower > 0 ? rows + upper * line_bytes : nullptr, height * line_bytes,         n,
          {},   p.c.row(b * a.height) + panel * panel_rows,      p.c.ld * dim{sizeof(float)}, step > 0,
          upper};
}

/// A product, finish(block, panel) after each of its sums: floats, or integers in their place.
template <int Build, class Tiles, bool Bytes, class Finish>
void multiply_panels(const prepared_rows& a, const panel_product& p, Finish finish) noexcept {
  const dim blocks = a.blocks(), steps = a.lines;
  constexpr dim pages = 4, page_bytes = 4096, step_bytes = stored_weights::step_bytes, lines = step_bytes / line_bytes;
  tile_heights<Tiles> heights;
  if (blocks == 1) {
    for (dim j = 0; j < p.panels; ++j) {
      const std::byte* own = p.weights + j * p.panel_bytes;
      tile_work w = work_of(a, p, 0, j, 0, steps, heights);
      w.ahead = {own + pages * page_bytes, pages, page_bytes, lines / pages, page_bytes / tile_bytes * pages / 2};
      multiply_tiles<Build, Tiles, Bytes>(w, stored_weights(own));
      finish(0, j);
    }
  } else {
    const dim share = moe::detail::blocks(lines, blocks);
    for (dim step = 0; step < steps; step += a.stretch)
      for (dim j = 0; j < p.panels; ++j) {
        const dim n = a.stretch_at(step), end = step + n;
        // The same stretch of the next panel, else the next stretch of the first one, else what comes after these panels.
        const bool last = j + 1 == p.panels, over = last && end == steps;
        const std::byte* ahead = p.weights + (last && !over ? 0 : j + 1) * p.panel_bytes +
                                 (!last  ? step
                                  : over ? 0
                                         : end) *
                                     step_bytes;
        for (dim b = 0; b < blocks; ++b) {
          tile_work w = work_of(a, p, b, j, step, n, heights);
          w.ahead = {ahead + b * n * line_bytes, share, blocks * n * line_bytes};
          multiply_tiles<Build, Tiles, Bytes, true>(w, stored_weights(p.weights + j * p.panel_bytes + step * step_bytes));
          if (end == steps) finish(b, j);
        }
      }
  }
  Tiles::release();
}
/// The same with codes that become bytes in p.scratch: of one block of rows just before they are read; of more a stretch of
/// a panel, half of it beside the last block's products with the stretch before, half beside its own first block's.
template <int Build, class Tiles, class Codes, class Finish>
void multiply_codes(const prepared_rows& a, const panel_product& p, Finish finish) noexcept {
  const dim blocks = a.blocks(), steps = a.lines;
  constexpr dim lines = moe::detail::blocks(Codes::step_bytes, line_bytes), few_steps = 4;
  tile_heights<Tiles> heights;
  const auto codes_of = [&](dim j) noexcept { return Codes(p.weights + j * p.panel_bytes, p.scale + j * panel_rows); };
  if (blocks == 1) {
    for (dim j = 0; j < p.panels; ++j) {
      const Codes codes = codes_of(j);
      tile_work w = work_of(a, p, 0, j, 0, steps, heights);
      w.ahead = {p.weights + j * p.panel_bytes + from_memory, 1, 0, lines};
      multiply_tiles<Build, Tiles, true>(
          w, widened_weights<Codes>(codes, 0, steps, p.scratch, moe::detail::at_most(steps, few_steps)));
      finish(0, j);
    }
  } else {
    const dim share = moe::detail::blocks(lines, blocks), pieces = moe::detail::blocks(steps, a.stretch) * p.panels;
    const auto step_of = [&](dim piece) noexcept { return piece / p.panels * a.stretch; };
    for (dim i = 0, ready = 0; i < pieces; ++i) {
      const dim j = i % p.panels, step = step_of(i), n = a.stretch_at(step), end = step + n, after = step_of(i + 1);
      const Codes codes = codes_of(j), next = codes_of(i + 1 < pieces ? (i + 1) % p.panels : j);
      const dim next_halves = i + 1 < pieces ? 2 * a.stretch_at(after) : 0;
      const std::byte* ahead = i + 1 < pieces ? p.weights + (i + 1) % p.panels * p.panel_bytes + after * Codes::step_bytes
                                              : p.weights + p.panels * p.panel_bytes;
      for (dim b = 0; b < blocks; ++b) {
        tile_work w = work_of(a, p, b, j, step, n, heights);
        w.ahead = {ahead + b * n * line_bytes, share, blocks * n * line_bytes};
        if (b == 0 && i == 0)
          multiply_tiles<Build, Tiles, true, true>(w, widened_weights<Codes>(codes, 0, n, p.scratch, n));
        else if (b == 0)
          multiply_tiles<Build, Tiles, true, true>(w, weights_beside_codes<Codes>(p.scratch, codes, step, 2 * n, ready));
        else if (b + 1 == blocks)
          multiply_tiles<Build, Tiles, true, true>(w, weights_beside_codes<Codes>(p.scratch, next, after, next_halves));
        else
          multiply_tiles<Build, Tiles, true, true>(w, stored_weights(p.scratch));
        if (end == steps) finish(b, j);
      }
      ready = moe::detail::at_most(n - 1, next_halves);
    }
  }
  Tiles::release();
}

template <int Build, class Tiles>
void multiply_halves_amx(const prepared_rows& a, const panel_product& p) noexcept {
  multiply_panels<Build, Tiles, false>(a, p, [](dim, dim) {});
}
/// Integers of a block and a panel become floats; `zero` is the byte of a weight of zero.
template <int Build>
MOE_TARGET(MOE_AVX512)
MOE_NO_INLINE void scale_sums(const prepared_rows& a, const panel_product& p, dim b, dim panel, std::int32_t zero) noexcept {
  const float* scale = p.scale + panel * panel_rows;
  const __m512 left = _mm512_loadu_ps(scale), right = _mm512_loadu_ps(scale + 16);
  for (dim r = b * a.height, end = r + a.height_of(b); r < end; ++r) {
    const __m512 unit = _mm512_set1_ps(a.factor(r)[0]);
    const __m512i shift = _mm512_set1_epi32(zero * static_cast<std::int32_t>(a.factor(r)[1]));
    float* c = p.c.row(r) + panel * panel_rows;
    const __m512 low = _mm512_maskz_cvtepi32_ps(0xffff, _mm512_sub_epi32(_mm512_loadu_si512(c), shift));
    const __m512 high = _mm512_maskz_cvtepi32_ps(0xffff, _mm512_sub_epi32(_mm512_loadu_si512(c + 16), shift));
    _mm512_storeu_ps(c, _mm512_mul_ps(_mm512_mul_ps(unit, left), low));
    _mm512_storeu_ps(c + 16, _mm512_mul_ps(_mm512_mul_ps(unit, right), high));
  }
}
/// One row or two read weights from memory faster without tiles.
template <int Build, class Tiles>
void multiply_bytes_amx(const prepared_rows& a, const panel_product& p) noexcept {
  if (a.rows <= 2) return multiply_512<Build, std::int8_t>(a, p);
  multiply_panels<Build, Tiles, true>(a, p, [&](dim b, dim panel) noexcept { scale_sums<Build>(a, p, b, panel, 128); });
}
template <int Build, class Tiles, class T>
void multiply_int4_amx(const prepared_rows& a, const panel_product& p) noexcept {
  if (a.rows <= rows_512) return multiply_int4_512<Build, T>(a, p);
  multiply_codes<Build, Tiles, int4_codes<Build, T>>(
      a, p, [&](dim b, dim panel) noexcept { scale_sums<Build>(a, p, b, panel, 128); });
}
template <int Build, class Tiles>
void multiply_ternary_amx(const prepared_rows& a, const panel_product& p) noexcept {
  if (a.rows <= 4) return multiply_ternary_512<Build>(a, p);
  multiply_codes<Build, Tiles, ternary_codes<Build>>(
      a, p, [&](dim b, dim panel) noexcept { scale_sums<Build>(a, p, b, panel, 1); });
}

/// What was written past the caches is there for others after the next join.
inline void settle_lines() noexcept { _mm_sfence(); }
/// to = from, past the caches: whole lines that are written are not read before.
template <int Build>
MOE_TARGET(MOE_AVX512)
void stream_floats(matrix_view<const float> from, matrix_view<float> to) noexcept {
  for (dim r = 0; r < to.rows; ++r) {
    const float* at = from.row(r);
    float* row = to.row(r);
    dim j = 0;
    if (reinterpret_cast<std::uintptr_t>(row) % line_bytes == 0)
      for (; j + 16 <= to.cols; j += 16) _mm512_stream_ps(row + j, _mm512_loadu_ps(at + j));
    for (; j < to.cols; j += 16) {
      const __mmask16 some = static_cast<__mmask16>(to.cols - j < 16 ? (1u << (to.cols - j)) - 1 : 0xffff);
      _mm512_mask_storeu_ps(row + j, some, _mm512_maskz_loadu_ps(some, at + j));
    }
  }
  settle_lines();
}

}  // namespace moe::arch::detail

namespace moe::arch {

template <int Build, class Tiles = detail::hardware_tiles>
packed_kernels kernels_of(basic_amx<Build>, weights_of<bf16>, Tiles = {}) noexcept {
  return {operand::bf16,
          2 * detail::tile_rows,
          320,
          false,
          0,
          detail::prepare_bf16_512<Build>,
          detail::multiply_halves_amx<Build, Tiles>,
          false,
          16,
          detail::stream_floats<Build>};
}
template <int Build, class Tiles = detail::hardware_tiles>
packed_kernels kernels_of(basic_amx<Build>, weights_of<std::int8_t>, Tiles = {}) noexcept {
  return {operand::i8,
          2 * detail::tile_rows,
          320,
          false,
          0,
          detail::prepare_i8_512<Build>,
          detail::multiply_bytes_amx<Build, Tiles>,
          false,
          16,
          detail::stream_floats<Build>};
}
template <int Build, class Tiles = detail::hardware_tiles>
packed_kernels kernels_of(basic_amx<Build>, weights_of<ternary>, Tiles = {}) noexcept {
  return {operand::i8,
          2 * detail::tile_rows,
          320,
          false,
          32,
          detail::prepare_i8_512<Build, ternary>,
          detail::multiply_ternary_amx<Build, Tiles>,
          false,
          16,
          detail::stream_floats<Build>};
}
template <int Build, int Group, class Scale, class Tiles = detail::hardware_tiles>
packed_kernels kernels_of(basic_amx<Build>, weights_of<int4_groups<Group, Scale>>, Tiles = {}) noexcept {
  return {operand::i8,
          2 * detail::tile_rows,
          320,
          true,
          32,
          detail::prepare_groups_512<Build, Group>,
          detail::multiply_int4_amx<Build, Tiles, int4_groups<Group, Scale>>,
          false,
          16,
          detail::stream_floats<Build>};
}

}  // namespace moe::arch

#endif
