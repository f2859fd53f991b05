// SPDX-License-Identifier: Apache-2.0
/// What a level offers for products with packed weights: a table of plain functions per element type, since the level is
/// known only at run time. A product takes rows that were prepared for it: gathered, converted to the operand of the level,
/// and laid out in the order in which it reads them. One tile of work on one thread; nothing is allocated.
#pragma once

#include <cstring>

#include "moe/backend/packed.hpp"
#include "moe/backend/scalar.hpp"

namespace moe {

/// What activations become: floats, halves, or bytes with a scale a row: x ~ scale q, q in -127 .. 127, scale = (max|x| +
/// packing<T>::margin) / 127. A row that is not finite has a scale of NaN, and so results of NaN.
enum class operand : std::uint8_t { f32, bf16, i8 };

/// k of a line of 64 bytes.
constexpr dim line_depth(operand o) noexcept { return o == operand::f32 ? 16 : o == operand::bf16 ? 32 : 64; }

/// Rows ready for a product, in lines of 64 bytes. A block of `height` rows (the last may be lower) holds the first line of
/// each of its rows, then the second of each, and so on for a stretch of lines; after the last block comes the next stretch.
/// Quantised rows have factors: scale, the sum of q, and its sums over 32 k each where four-bit weights want them.
struct prepared_rows {
  std::byte* data = nullptr;
  float* factors = nullptr;
  dim rows = 0, lines = 0, height = 1, stretch = 1, factor_count = 0;

  dim blocks() const noexcept { return detail::blocks(rows, height); }
  dim height_of(dim block) const noexcept { return detail::at_most(rows - block * height, height); }
  /// Lines of the stretch that begins with line l.
  dim stretch_at(dim l) const noexcept { return detail::at_most(lines - l, stretch); }
  /// Line l, the first of a stretch, of the first row of a block.
  std::byte* block(dim b, dim l = 0) const noexcept {
    return data + (l * rows + b * height * stretch_at(l)) * detail::line_bytes;
  }
  std::byte* line(dim r, dim l) const noexcept {
    const dim first = l / stretch * stretch, b = r / height;
    return block(b, first) + ((l - first) * height_of(b) + r % height) * detail::line_bytes;
  }
  /// Bytes from a line of row r to its next one in a stretch.
  dim stride(dim r) const noexcept { return height_of(r / height) * detail::line_bytes; }
  float* factor(dim r) const noexcept { return factors + r * factor_count; }
  /// Lines first .. first + n of row r = those at `from`, one after another.
  void take(dim r, const std::byte* from, dim first, dim n) const noexcept {
    for (dim l = first, step = stride(r), last = first + n; l < last;) {
      std::byte* to = line(r, l);
      const dim end = detail::at_most(last, (l / stretch + 1) * stretch);
      for (; l < end; ++l, to += step, from += detail::line_bytes)
        std::memcpy(to, from, static_cast<std::size_t>(detail::line_bytes));
    }
  }
};

/// c[rows, 32 panels] = a W^T for consecutive panels.
struct panel_product {
  const std::byte* weights = nullptr;  ///< first panel
  dim panel_bytes = 0, panels = 0;
  const float* scale = nullptr;  ///< of the rows of the first panel, or null
  std::byte* scratch = nullptr;
  matrix_view<float> c;
};

/// One level's kernels for one element type of weights.
struct packed_kernels {
  operand activations;
  dim height;         ///< rows of a block
  dim chunk;          ///< rows that are prepared together: they stay in the second cache beside the weights
  bool sums_of_32;    ///< factors hold the sums over 32 k
  dim scratch_per_k;  ///< bytes of panel_product::scratch for each k
  /// k floats into lines at `to`, the last filled up with zeros; factors where the operand is i8.
  void (*prepare)(const float* x, dim k, std::byte* to, float* factors, bool sums_of_32) noexcept;
  void (*multiply)(const prepared_rows& a, const panel_product& p) noexcept;
  bool writes_once = true;  ///< a result is written when it is ready, not added to in memory
  dim stretch = 0;          ///< lines, at most, of a stretch of four and more blocks; 0: all
  /// A copy for results that are not read again soon; null: none that is faster.
  void (*stream)(matrix_view<const float> from, matrix_view<float> to) noexcept = nullptr;

  /// How n rows lie: blocks of nearly equal height, and stretches of nearly equal length. Two or three blocks wait for
  /// memory, not for the second cache: their stretches are longer, and sums are loaded less often.
  void lay_out(prepared_rows& p, dim n) const noexcept {
    p.rows = n;
    p.height = detail::blocks(n, detail::blocks(n, height));
    p.stretch = p.lines;
    if (stretch == 0 || n <= height) return;
    const dim most = n <= 3 * height ? 4 * stretch : stretch;
    p.stretch = detail::blocks(p.lines, detail::blocks(p.lines, most));
  }
  dim lines(dim padded_k) const noexcept { return padded_k / line_depth(activations); }
  dim factor_count(dim padded_k) const noexcept {
    return activations != operand::i8 ? 0 : 2 + (sums_of_32 ? padded_k / 32 : 0);
  }
};

namespace arch {

/// Names an element type of packed weights when kernels are looked up: kernels_of(arch, weights_of<T>{}).
template <class T>
struct weights_of {};

namespace detail {

using moe::detail::line_bytes, moe::detail::panel_rows, moe::detail::tile_bytes, moe::detail::tile_rows;

/// How far ahead of a product its weights are asked for: from memory into the second cache, from there into the first. A
/// block that waits has few instructions in flight, and a line from the second cache comes late while many come from memory.
inline constexpr dim from_memory = 8 * tile_bytes, from_second = 2 * tile_bytes;

// The plain rung. Products add up in the order of k, and integers exactly, as on every other rung.
template <int Build>
void prepare_f32(const float* x, dim k, std::byte* to, float*, bool) noexcept {
  for (dim i = 0; i < k; i += 16, to += line_bytes) {
    float line[16] = {};
    std::memcpy(line, x + i, static_cast<std::size_t>(k - i < 16 ? k - i : 16) * sizeof(float));
    std::memcpy(to, line, sizeof line);
  }
}
template <int Build, class T = std::int8_t>
void prepare_i8(const float* x, dim k, std::byte* to, float* factors, bool sums_of_32) noexcept {
  const float largest = moe::detail::magnitude(x, k) + packing<T>::margin, per = moe::detail::to_bytes(largest);
  std::int32_t total = 0, part = 0;
  for (dim i = 0; i < moe::detail::round_up(k, sums_of_32 ? 128 : 64); ++i) {
    const auto q = static_cast<std::int8_t>(i < k && per != 0 ? std::nearbyint(x[i] * per) : 0);
    std::memcpy(to + i, &q, 1);
    total += q;
    part += q;
    if (sums_of_32 && i % 32 == 31) {
      factors[2 + i / 32] = static_cast<float>(part);
      part = 0;
    }
  }
  factors[0] = largest / 127;
  factors[1] = static_cast<float>(total);
}

template <int Build, class T>
void multiply_plain(const prepared_rows& a, const panel_product& p) noexcept {
  constexpr dim slot = 4 / static_cast<dim>(sizeof(T)), per_line = 16 / slot;
  for (dim j = 0; j < p.panels; ++j)
    for (dim r = 0; r < a.rows; ++r)
      for (dim half = 0; half < 2; ++half) {
        const std::byte* w = p.weights + j * p.panel_bytes + half * tile_bytes;
        float sum[tile_rows] = {};
        for (dim l = 0, i = 0; l < a.lines; ++l) {
          float x[16];
          std::memcpy(x, a.line(r, l), sizeof x);
          for (dim n = 0; n < per_line; ++n, w += line_bytes) {
            T q[tile_rows * slot];
            std::memcpy(q, w, sizeof q);
            for (dim s = 0; s < slot; ++s)
              for (dim o = 0; o < tile_rows; ++o) sum[o] += x[n * slot + s] * static_cast<float>(q[o * slot + s]);
            if (++i % 16 == 0) w += tile_bytes;
          }
        }
        std::memcpy(p.c.row(r) + j * panel_rows + half * tile_rows, sum, sizeof sum);
      }
}
template <int Build>
void multiply_bytes(const prepared_rows& a, const panel_product& p) noexcept {
  for (dim j = 0; j < p.panels; ++j)
    for (dim r = 0; r < a.rows; ++r)
      for (dim half = 0; half < 2; ++half) {
        std::int32_t sum[tile_rows] = {};
        for (dim l = 0; l < a.lines; ++l) {
          std::int8_t x[64];
          std::memcpy(x, a.line(r, l), sizeof x);
          const std::byte* w = p.weights + j * p.panel_bytes + (2 * l + half) * tile_bytes;
          for (dim n = 0; n < 16; ++n)
            for (dim o = 0; o < tile_rows; ++o)
              for (dim s = 0; s < 4; ++s) sum[o] += x[4 * n + s] * static_cast<std::int32_t>(w[n * line_bytes + 4 * o + s]);
        }
        const float* f = a.factor(r);
        for (dim o = 0; o < tile_rows; ++o)
          p.c(r, j * panel_rows + half * tile_rows + o) =
              f[0] * p.scale[j * panel_rows + half * tile_rows + o] *
              static_cast<float>(sum[o] - 128 * static_cast<std::int32_t>(f[1]));
      }
}
template <int Build>
void multiply_ternary(const prepared_rows& a, const panel_product& p) noexcept {
  using rule = packing<ternary>;
  for (dim j = 0; j < p.panels; ++j)
    for (dim r = 0; r < a.rows; ++r)
      for (dim half = 0; half < 2; ++half) {
        std::int32_t sum[tile_rows] = {};
        for (dim l = 0; l < a.lines; ++l) {
          std::int8_t x[64];
          std::memcpy(x, a.line(r, l), sizeof x);
          const std::byte* w = p.weights + j * p.panel_bytes + l * rule::step_bytes + half * rule::half_bytes;
          for (dim k = 0; k < 64; ++k)
            for (dim o = 0; o < tile_rows; ++o)
              sum[o] += x[k] * (static_cast<std::int32_t>(w[rule::place(o, k)]) >> rule::shift(k) & 3);
        }
        const float* f = a.factor(r);
        for (dim o = 0; o < tile_rows; ++o)
          p.c(r, j * panel_rows + half * tile_rows + o) =
              f[0] * p.scale[j * panel_rows + half * tile_rows + o] * (static_cast<float>(sum[o]) - f[1]);
      }
}
/// Each group's integer sum, less 8 for every weight, times its scale.
template <int Build, class T>
void multiply_groups(const prepared_rows& a, const panel_product& p) noexcept {
  using rule = packing<T>;
  for (dim j = 0; j < p.panels; ++j) {
    const auto* panel = reinterpret_cast<const int4*>(p.weights + j * p.panel_bytes);
    for (dim r = 0; r < a.rows; ++r)
      for (dim o = 0; o < panel_rows; ++o) {
        float total = 0;
        for (dim first = 0; first < a.lines * 64; first += T::group) {
          std::int32_t sum = 0;
          for (dim k = first; k < first + T::group; ++k)
            sum += static_cast<std::int8_t>(a.line(r, k / 64)[k % 64]) * rule::code(panel, o, k);
          total += rule::scale(panel, o, first) * static_cast<float>(sum);
        }
        p.c(r, j * panel_rows + o) = a.factor(r)[0] * total;
      }
  }
}

}  // namespace detail

template <int Build, class T>
packed_kernels kernels_of(basic_scalar<Build>, weights_of<T>) noexcept {
  return {operand::f32, 1, 64, false, 0, detail::prepare_f32<Build>, detail::multiply_plain<Build, T>};
}
template <int Build>
packed_kernels kernels_of(basic_scalar<Build>, weights_of<std::int8_t>) noexcept {
  return {operand::i8, 1, 64, false, 0, detail::prepare_i8<Build>, detail::multiply_bytes<Build>};
}
template <int Build>
packed_kernels kernels_of(basic_scalar<Build>, weights_of<ternary>) noexcept {
  return {operand::i8, 1, 64, false, 0, detail::prepare_i8<Build, ternary>, detail::multiply_ternary<Build>};
}
template <int Build, int Group, class Scale>
packed_kernels kernels_of(basic_scalar<Build>, weights_of<int4_groups<Group, Scale>>) noexcept {
  return {operand::i8, 1, 64, true, 0, detail::prepare_i8<Build>, detail::multiply_groups<Build, int4_groups<Group, Scale>>};
}

}  // namespace arch
}  // namespace moe
