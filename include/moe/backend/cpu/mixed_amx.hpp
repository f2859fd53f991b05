// SPDX-License-Identifier: Apache-2.0
/// Products of rows with bf16 weights, and gradients of such weights, on tiles, of Intel processors or of vectors. Rows are
/// rounded to bf16, to nearest even, before: `halves`; sums are float32.
///
/// Rows go into tiles as they lie in memory. The other operand is packed for a cut of the reduced dimension; 32 columns of
/// it stay in the first cache while all rows pass by. Weights come as they lie in memory, in either orientation. `Tiles` as
/// in packed_amx.hpp.
#pragma once

#include "moe/backend/cpu/blocks_avx512.hpp"
#include "moe/backend/cpu/packed_amx.hpp"

#if defined(MOE_X86_KERNELS)

namespace moe::arch::detail {

/// The first n halves at p, and zeros.
MOE_TARGET(MOE_AVX512)
inline __m512i first_halves(const bf16* p, dim n) noexcept {
  return _mm512_maskz_loadu_epi16(n < 32 ? (1u << n) - 1 : 0xffffffffu, p);
}

/// Rows of at most 32 halves, each filled up to 32 with zeros.
MOE_TARGET(MOE_AVX512)
inline void round_up_rows(matrix_view<const bf16> from, bf16* to) noexcept {
  for (dim r = 0; r < from.rows; ++r) _mm512_storeu_si512(to + r * 32, first_halves(from.row(r), from.cols));
}

/// Lines of weights that are asked for while tiles are multiplied: a line of each of eight rows that lie in pages of their
/// own, then the next line of each. Hardware that sees a page's lines in turn runs ahead of them, and a line that is on its
/// way already does not hold a buffer of the first cache, which tiles need too.
class weights_ahead {
 public:
  weights_ahead() noexcept = default;
  explicit weights_ahead(matrix_view<const bf16> m) noexcept : m_(m), apart_(moe::detail::blocks(m.rows, together)) {}

  void ask(dim lines) noexcept {
    for (; lines > 0 && row_ < apart_; --lines) {
      if (const dim r = row_ + run_ * apart_; r < m_.rows) moe::detail::prefetch_second(m_.row(r) + at_);
      if (++run_ < together) continue;
      run_ = 0;
      if ((at_ += 32) < m_.cols) continue;
      at_ = 0;
      ++row_;
    }
  }

 private:
  static constexpr dim together = 8;

  matrix_view<const bf16> m_{};
  dim apart_ = 0, row_ = 0, run_ = 0, at_ = 0;
};

/// Sums of at most 32 columns that are done. They are written past the caches, a few rows at a time while the next ones are
/// multiplied: a core that waits for memory would multiply nothing. To be settled.
class sums_behind {
 public:
  sums_behind() noexcept = default;
  /// Rows of the sums have room for 32 floats and lie `stride` apart.
  sums_behind(const float* sums, dim stride, matrix_view<float> to) noexcept
      : sums_(sums), to_(to.data), stride_(stride), ld_(to.ld), rows_(to.rows), cols_(to.cols), whole_(is_whole(to)) {}

  MOE_TARGET(MOE_AVX512)
  void write(dim rows) noexcept {
    for (; rows > 0 && rows_ > 0; --rows, --rows_, sums_ += stride_, to_ += ld_) {
      const __m512 left = _mm512_loadu_ps(sums_), right = _mm512_loadu_ps(sums_ + 16);
      if (whole_) {
        _mm512_stream_ps(to_, left);
        _mm512_stream_ps(to_ + 16, right);
      } else {
        _mm512_mask_storeu_ps(to_, first_lanes(cols_), left);
        _mm512_mask_storeu_ps(to_ + 16, first_lanes(cols_ - 16), right);
      }
    }
  }

 private:
  static bool is_whole(matrix_view<float> m) noexcept {
    return m.cols == panel_rows && m.ld % 16 == 0 && reinterpret_cast<std::uintptr_t>(m.data) % line_bytes == 0;
  }

  const float* sums_ = nullptr;
  float* to_ = nullptr;
  dim stride_ = 0, ld_ = 0, rows_ = 0, cols_ = 0;
  bool whole_ = false;
};

/// One or two blocks of rows against 32 packed columns: sums = or += over `steps` steps.
struct rows_work {
  const bf16 *upper, *lower;  ///< lower: null where there is one block
  dim row, step;              ///< halves from row to row, from step to step
  const std::byte* columns;
  dim steps;
  float *sums, *below;  ///< below: of the lower block
  dim stride;           ///< floats from row to row of the sums
  bool add;
  weights_ahead* ahead = nullptr;  ///< where rows pass by, so many of its lines come nearer in every step
  dim lines = 0;
  sums_behind* behind = nullptr;  ///< so many of its rows are written in every step
  dim written = 0;
};

/// Which operand passes by, loaded so that the first cache keeps the other one.
enum class passing { rows, columns };

template <int Build, class Tiles, passing Pass>
MOE_TARGET(MOE_AMX)
MOE_NO_INLINE void multiply_rows(const rows_work& w) noexcept {
  Tiles::compiler_fence();
  const bool two = w.lower != nullptr;
  const dim stride = w.stride * dim{sizeof(float)}, row = w.row * dim{sizeof(bf16)};
  if (w.add) {
    Tiles::load0(w.sums, stride);
    Tiles::load1(w.sums + tile_rows, stride);
    if (two) Tiles::load2(w.below, stride);
    if (two) Tiles::load3(w.below + tile_rows, stride);
  } else {
    Tiles::zero0();
    Tiles::zero1();
    Tiles::zero2();
    Tiles::zero3();
  }
  const std::byte* q = w.columns;
  for (dim s = 0; s < w.steps; ++s, q += 2 * tile_bytes) {
    const bf16 *upper = w.upper + s * w.step, *lower = two ? w.lower + s * w.step : nullptr;
    if constexpr (Pass == passing::rows) {
      Tiles::load6(q, line_bytes);
      Tiles::pass4(upper, row);
      Tiles::add_halves0();
      Tiles::load7(q + tile_bytes, line_bytes);
      Tiles::add_halves1();
      w.ahead->ask(w.lines);
      w.behind->write(w.written);
      if (two) Tiles::pass5(lower, row);
    } else {
      Tiles::pass6(q, line_bytes);
      Tiles::load4(upper, row);
      Tiles::add_halves0();
      Tiles::pass7(q + tile_bytes, line_bytes);
      Tiles::add_halves1();
      w.behind->write(w.written);
      if (two) Tiles::load5(lower, row);
    }
    if (!two) continue;
    Tiles::add_halves2();
    Tiles::add_halves3();
  }
  Tiles::store0(w.sums, stride);
  Tiles::store1(w.sums + tile_rows, stride);
  if (two) Tiles::store2(w.below, stride);
  if (two) Tiles::store3(w.below + tile_rows, stride);
  Tiles::compiler_fence();
}

/// Asks for the first lines of rows p and the next, if they are there. Where a few columns of all rows are read, no hardware
/// knows that the next row comes after them.
inline void ask_rows(matrix_view<const bf16> w, dim p) noexcept {
  if (p < w.rows) moe::detail::prefetch_second(w.row(p));
  if (p + 1 < w.rows) moe::detail::prefetch_second(w.row(p + 1));
}

/// Rows p and the next of n columns of w, side by side: sixteen columns go to `left`, sixteen to `right`.
MOE_TARGET(MOE_AVX512)
inline void pair_rows(matrix_view<const bf16> w, dim p, dim n, void* left, void* right) noexcept {
  const __m512i order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
  __m512i upper = _mm512_setzero_si512(), lower = upper;
  if (p < w.rows) upper = first_halves(w.row(p), n);
  if (p + 1 < w.rows) lower = first_halves(w.row(p + 1), n);
  upper = _mm512_maskz_permutexvar_epi64(0xff, order, upper);
  lower = _mm512_maskz_permutexvar_epi64(0xff, order, lower);
  _mm512_store_si512(left, _mm512_unpacklo_epi16(upper, lower));
  _mm512_store_si512(right, _mm512_unpackhi_epi16(upper, lower));
}

/// to[p][i] = row i of w, its pair p of halves, of 16 rows and pairs.
MOE_TARGET(MOE_AVX512)
inline void turn_pairs(const bf16* w, dim ld, float* to) noexcept {
  __m512 v[4][4];  // a vector takes four pairs of four rows that are four apart; each row is read once
  MOE_UNROLL
  for (int j = 0; j < 4; ++j) {
    const float* row[4];
    MOE_UNROLL
    for (int i = 0; i < 4; ++i) row[i] = reinterpret_cast<const float*>(w + (j + 4 * i) * ld);
    MOE_UNROLL
    for (int q = 0; q < 4; ++q) {
      v[q][j] = _mm512_castps128_ps512(_mm_loadu_ps(row[0] + 4 * q));
      v[q][j] = _mm512_insertf32x4(v[q][j], _mm_loadu_ps(row[1] + 4 * q), 1);
      v[q][j] = _mm512_insertf32x4(v[q][j], _mm_loadu_ps(row[2] + 4 * q), 2);
      v[q][j] = _mm512_insertf32x4(v[q][j], _mm_loadu_ps(row[3] + 4 * q), 3);
    }
  }
  MOE_UNROLL
  for (int q = 0; q < 4; ++q, to += 4 * tile_rows) {
    const __m512 a = _mm512_maskz_unpacklo_ps(0xffff, v[q][0], v[q][1]),
                 b = _mm512_maskz_unpackhi_ps(0xffff, v[q][0], v[q][1]);
    const __m512 c = _mm512_maskz_unpacklo_ps(0xffff, v[q][2], v[q][3]),
                 d = _mm512_maskz_unpackhi_ps(0xffff, v[q][2], v[q][3]);
    _mm512_store_ps(to, _mm512_shuffle_ps(a, c, 0x44));
    _mm512_store_ps(to + tile_rows, _mm512_shuffle_ps(a, c, 0xee));
    _mm512_store_ps(to + 2 * tile_rows, _mm512_shuffle_ps(b, d, 0x44));
    _mm512_store_ps(to + 3 * tile_rows, _mm512_shuffle_ps(b, d, 0xee));
  }
}

/// Depth of the right operand that is packed at a time: of 32 columns it stays in the first cache while all rows pass by.
inline constexpr dim half_cut = 512;
/// Bytes of so many columns of it.
constexpr dim packed_bytes(dim columns) noexcept { return round_up(columns, panel_rows) * half_cut * dim{sizeof(bf16)}; }

/// Packs the first n columns of w, at most half_cut deep: 32 columns after another, of each step after step.
MOE_TARGET(MOE_AVX512)
inline void pack_columns(matrix_view<const bf16> w, dim n, std::byte* to) noexcept {
  constexpr dim asked = 8;
  const dim steps = blocks(w.rows, 32);
  for (dim p = 0; p < steps * 32; p += 2) {
    std::byte* at = to + p / 32 * 2 * tile_bytes + p % 32 / 2 * line_bytes;
    for (dim j = 0; j < n; j += panel_rows, at += steps * 2 * tile_bytes) {
      const matrix_view<const bf16> lines = w.columns(j, n - j);
      ask_rows(lines, p + asked);
      pair_rows(lines, p, lines.cols, at, at + tile_bytes);
    }
  }
}
/// The same of the rows of w, as columns.
MOE_TARGET(MOE_AVX512)
inline void pack_rows(matrix_view<const bf16> w, std::byte* to) noexcept {
  const dim steps = blocks(w.cols, 32);
  for (dim j = 0; j < w.rows; j += panel_rows, to += steps * 2 * tile_bytes)
    for (dim i = 0; i < panel_rows; i += tile_rows)
      for (dim p = 0; p < w.cols; p += 32) {
        auto* tile = reinterpret_cast<float*>(to + (p / 32 * 2 + i / tile_rows) * tile_bytes);
        const bf16* from = w.row(j + i) + p;
        if (j + i + tile_rows <= w.rows && p + 32 <= w.cols) {
          turn_pairs(from, w.ld, tile);
          continue;
        }
        alignas(64) bf16 edge[tile_rows * 32];
        for (dim r = 0; r < tile_rows; ++r) {
          const __m512i row = j + i + r < w.rows ? first_halves(from + r * w.ld, w.cols - p) : _mm512_setzero_si512();
          _mm512_store_si512(edge + r * 32, row);
        }
        turn_pairs(edge, 32, tile);
      }
}

/// A product of rows with weights that are packed a cut of the reduced dimension at a time. Weights that come next are asked
/// for meanwhile.
template <int Build, class Tiles>
class halves_product {
 public:
  explicit halves_product(matrix_view<const bf16> a) noexcept : a_(a), lines_(blocks(panel_rows, blocks(a.rows, pair))) {}
  ~halves_product() { Tiles::release(); }

  void ask(matrix_view<const bf16> next) noexcept { ahead_ = weights_ahead(next); }
  /// c, 32 columns that are done, also go to `out`. To be settled.
  void keep(matrix_view<const float> c, matrix_view<float> out) noexcept { behind_ = sums_behind(c.data, c.ld, out); }
  void settle() noexcept {
    behind_.write(a_.rows);
    settle_lines();
  }

  /// c[m,32] = or += columns `first` and on of a, `depth` of them, times packed columns.
  void multiply(dim first, dim depth, const std::byte* columns, matrix_view<float> c, bool add) noexcept {
    const dim whole = depth / 32, written = blocks(pair, whole > 0 ? whole : 1);
    for (dim b = 0; b < c.rows; b += pair) {
      const dim m = at_most(c.rows - b, pair), upper = at_most(m, tile_rows), lower = m - upper;
      float* sums = c.row(b);
      bool more = add;
      const auto part = [&](const bf16* rows, dim ld, dim step, dim steps) {
        multiply_rows<Build, Tiles, passing::rows>({rows, lower > 0 ? rows + upper * ld : nullptr, ld, 32,
                                                    columns + step * 2 * tile_bytes, steps, sums, sums + upper * c.ld, c.ld,
                                                    more, &ahead_, lines_, &behind_, written});
        more = true;
      };
      heights_.set(upper, lower > 0 ? lower : 1);
      if (whole > 0) part(a_.row(b) + first, a_.ld, 0, whole);
      if (whole * 32 == depth) continue;
      round_up_rows(a_.slice(b, m).columns(first + whole * 32, depth - whole * 32), last_);
      part(last_, 32, whole, 1);
    }
    behind_.write(a_.rows);
  }

 private:
  static constexpr dim pair = 2 * tile_rows;

  alignas(64) bf16 last_[pair * 32];
  matrix_view<const bf16> a_;
  dim lines_;  // asked for in a step: a panel's in the steps of one
  weights_ahead ahead_;
  sums_behind behind_;
  tile_heights<Tiles> heights_;
};

/// c[m,n] = or += a[m,k] b[n,k]^T, also to `out`. 32 rows of b are met by all rows of a, as many columns of which as stay in
/// the second cache.
template <int Build, class Tiles>
void product_nt_amx(matrix_view<const bf16> a, matrix_view<const bf16> b, matrix_view<float> c, bool add,
                    matrix_view<float> out, matrix_view<const bf16> next, std::byte* room) noexcept {
  constexpr dim kept = dim{1} << 18;
  const dim deep = kept / c.rows < half_cut ? half_cut : kept / c.rows / half_cut * half_cut;
  halves_product<Build, Tiles> product(a);
  const auto part = [deep](matrix_view<const bf16> w, dim first, dim j) {
    return w.slice(j, at_most(w.rows - j, panel_rows)).columns(first, at_most(w.cols - first, deep));
  };
  for (dim first = 0; first < a.cols; first += deep)
    for (dim j = 0; j < c.cols; j += panel_rows) {
      const matrix_view<const bf16> w = part(b, first, j);
      if (j + panel_rows < c.cols)
        product.ask(part(b, first, j + panel_rows));
      else if (first + deep < a.cols)
        product.ask(part(b, first + deep, 0));
      else if (next)
        product.ask(part(next, 0, 0));
      for (dim cut = 0; cut < w.cols; cut += half_cut) {
        const dim depth = at_most(w.cols - cut, half_cut);
        pack_rows(w.columns(cut, depth), room);
        product.multiply(first + cut, depth, room, c.columns(j, w.rows), add || first + cut > 0);
      }
      if (out && first + w.cols == a.cols) product.keep(c.columns(j, w.rows), out.columns(j, w.rows));
    }
  if (out) product.settle();
}
/// c[m,n] = or += a[m,k] b[k,n], also to `out`. Rows of b are met a cut at a time, in all columns.
template <int Build, class Tiles>
void product_nn_amx(matrix_view<const bf16> a, matrix_view<const bf16> b, matrix_view<float> c, bool add,
                    matrix_view<float> out, std::byte* room) noexcept {
  halves_product<Build, Tiles> product(a);
  for (dim first = 0; first < a.cols; first += half_cut) {
    const dim depth = at_most(a.cols - first, half_cut);
    pack_columns(b.slice(first, depth), c.cols, room);
    const std::byte* columns = room;
    for (dim j = 0; j < c.cols; j += panel_rows, columns += blocks(depth, 32) * 2 * tile_bytes) {
      const dim n = at_most(c.cols - j, panel_rows);
      product.multiply(first, depth, columns, c.columns(j, n), add || first > 0);
      if (out && first + depth == a.cols) product.keep(c.columns(j, n), out.columns(j, n));
    }
  }
  if (out) product.settle();
}

/// Columns of a as rows: sixteen after another, of each step after step.
MOE_TARGET(MOE_AVX512)
inline void turn_columns(matrix_view<const bf16> a, bf16* to) noexcept {
  alignas(64) bf16 pairs[2][tile_rows * 32];
  const dim block = round_up(a.rows, 32) * tile_rows;
  for (dim p = 0; p < a.rows; p += 32)
    for (dim i = 0; i < a.cols; i += 32) {
      const matrix_view<const bf16> lines = a.columns(i, a.cols - i);
      for (dim q = 0; q < tile_rows; ++q) {
        ask_rows(lines, p + 32 + 2 * q);
        pair_rows(lines, p + 2 * q, lines.cols, pairs[0] + q * 32, pairs[1] + q * 32);
      }
      for (dim h = 0; h < 2; ++h)
        turn_pairs(pairs[h], 32, reinterpret_cast<float*>(to + (i / tile_rows + h) * block + p * tile_rows));
    }
}

/// to += from, the rows of which are 32 floats.
MOE_TARGET(MOE_AVX512)
inline void add_sums(const float* from, matrix_view<float> to) noexcept {
  for (dim r = 0; r < to.rows; ++r, from += panel_rows)
    for (dim j = 0; j < to.cols; j += 16) {
      const __mmask16 some = first_lanes(to.cols - j);
      const __m512 sum = _mm512_add_ps(_mm512_loadu_ps(from + j), _mm512_maskz_loadu_ps(some, to.row(r) + j));
      _mm512_mask_storeu_ps(to.row(r) + j, some, sum);
    }
}

/// Columns of a that are turned at a time for a gradient, and halves of b that are packed: both stay in the second cache.
inline constexpr dim turned_columns = 256, packed_halves = 1024 * half_cut;

/// Bytes of room for the next.
inline dim gradient_room_amx(dim m, dim n) noexcept {
  return packed_bytes(at_most(m, turned_columns)) + at_most(packed_bytes(n), packed_halves * dim{sizeof(bf16)});
}
/// c[m,n] = or += a[k,m]^T b[k,n], at most half_cut deep; `columns` are those of b, packed, and `left` room for some of a's.
/// A pair of blocks of a's columns stays in the first cache while columns of b pass by, so that rows of c are read and
/// written as they lie in memory. To be settled where it does not add.
template <int Build, class Tiles>
void product_tn_packed(matrix_view<const bf16> a, const std::byte* columns, matrix_view<float> c, bool add,
                       bf16* left) noexcept {
  constexpr dim pair = 2 * tile_rows;
  alignas(64) float sums[2][pair * panel_rows];
  sums_behind behind;
  dim turn = 0;
  tile_heights<Tiles> heights;
  const dim steps = blocks(a.rows, 32), block = steps * 32 * tile_rows;
  const dim written = steps > 0 ? blocks(pair, steps) : 0;
  for (dim i = 0; i < c.rows; i += pair) {
    const dim m = at_most(c.rows - i, pair), upper = at_most(m, tile_rows), lower = m - upper, turned = i % turned_columns;
    if (turned == 0) turn_columns(a.columns(i, at_most(c.rows - i, turned_columns)), left);
    const bf16* rows = left + turned / tile_rows * block;
    heights.set(upper, lower > 0 ? lower : 1);
    for (dim j = 0; j < c.cols; j += panel_rows) {
      const matrix_view<float> to = c.slice(i, m).columns(j, at_most(c.cols - j, panel_rows));
      float* own = sums[turn];
      multiply_rows<Build, Tiles, passing::columns>({rows, lower > 0 ? rows + block : nullptr, 32, 32 * tile_rows,
                                                     columns + j * steps * line_bytes, steps, own, own + upper * panel_rows,
                                                     panel_rows, false, nullptr, 0, &behind, written});
      behind.write(pair);
      if (add) {
        add_sums(own, to);
      } else {
        behind = sums_behind(own, panel_rows, to);
        turn = 1 - turn;
      }
    }
  }
  behind.write(pair);
  Tiles::release();
}
/// c[m,n] = or += a[k,m]^T b[k,n], and c2 likewise of a2^T b where there is a c2. b is packed once for both.
template <int Build, class Tiles>
void product_tn_amx(matrix_view<const bf16> a, matrix_view<const bf16> b, matrix_view<float> c, matrix_view<const bf16> a2,
                    matrix_view<float> c2, bool add, std::byte* room) noexcept {
  auto* left = reinterpret_cast<bf16*>(room);
  std::byte* right = room + packed_bytes(at_most(c.rows, turned_columns));
  for (dim first = 0; first < b.rows || (first == 0 && !add); first += half_cut) {  // no rows: sums of nothing
    const dim depth = at_most(b.rows - first, half_cut);
    const dim band = packed_halves / round_up(depth > 0 ? depth : 1, 32) / panel_rows * panel_rows;
    for (dim from = 0; from < b.cols; from += band) {
      const dim n = at_most(b.cols - from, band);
      pack_columns(b.slice(first, depth).columns(from, n), n, right);
      const auto part = [&](matrix_view<const bf16> l, matrix_view<float> to) {
        product_tn_packed<Build, Tiles>(l.slice(first, depth), right, to.columns(from, n), add || first > 0, left);
      };
      part(a, c);
      if (c2) part(a2, c2);
    }
    if (!add) settle_lines();
  }
}

}  // namespace moe::arch::detail

namespace moe::arch {

/// Few rows meet the weights in dot products, many, rounded, on tiles.
template <int Build, class Tiles = detail::hardware_tiles>
mixed_kernels mixed_kernels_of(basic_amx<Build>, Tiles = {}) noexcept {
  return {
      &detail::product_nt<detail::blocks_avx512<Build>, bf16>,
      nullptr,
      nullptr,
      nullptr,
      {&detail::round_floats<Build>, &detail::round_floats<Build, true>, &detail::settle_lines,
       &detail::stream_floats<Build>, &detail::packed_bytes, &detail::gradient_room_amx,
       &detail::product_nt_amx<Build, Tiles>, &detail::product_nn_amx<Build, Tiles>, &detail::product_tn_amx<Build, Tiles>}};
}

}  // namespace moe::arch

#endif
