// SPDX-License-Identifier: Apache-2.0
/// Weights packed once, at load time, for products x W^T. One layout per element type, whatever the instruction set: a
/// packed checkpoint moves between machines, and the level that runs is known only at run time.
///
/// A panel is 32 rows of W. Along k it is cut into steps of two tiles, rows 0 .. 15 and 16 .. 31, a kilobyte each: 16 lines
/// of 64 bytes, where a line holds four bytes of each of its 16 rows, as dot-product and tile instructions read them. So a
/// tile is 16 floats, 32 halves or 64 bytes deep. Rows and k are filled up with weights of zero.
#pragma once

#include <cmath>
#include <span>
#include <vector>

#include "moe/core/arena.hpp"

namespace moe {

/// Four-bit weights with a scale of type Scale (f16 or bf16) for every `Group` of them along k: w = scale q, q in -8 .. 7,
/// where the weight of largest magnitude is -8 or, when the scale is rounded, close to it.
/// A panel is blocks of 128 k: four tiles of 512 bytes (k 0 .. 63 of rows 0 .. 15 and of rows 16 .. 31, then k 64 .. 127),
/// where a byte holds q + 8 of k in its lower half and of k + 32 in its upper; then the block's scales, 32 rows side by
/// side.
template <int Group = 32, class Scale = f16>
struct int4_groups {
  static_assert(Group == 32 || Group == 128, "moe::int4_groups: the group must be 32 or 128 weights");
  static constexpr dim group = Group;
  using scale = Scale;
};

namespace detail {

inline constexpr dim panel_rows = 32, tile_rows = 16, line_bytes = 64, tile_bytes = 1024;

/// Panels of n weight rows.
constexpr dim panels_of(dim n) noexcept { return blocks(n, panel_rows); }

/// The largest magnitude of n floats, or NaN where one of them is not finite.
MOE_HD inline float magnitude(const float* v, dim n) noexcept {
  float largest = 0;
  bool finite = true;
  for (dim i = 0; i < n; ++i) {
    largest = std::fabs(v[i]) > largest ? std::fabs(v[i]) : largest;
    finite = finite && v[i] - v[i] == 0;
  }
  return finite ? largest : NAN;
}

/// What a row of that magnitude is multiplied by to become bytes of -127 .. 127: 0, where it holds zeros, numbers too small for
/// such a factor, or one that is not finite.
MOE_HD inline float to_bytes(float largest) noexcept {
  const float per = 127 / largest;
  return per - per == 0 ? per : 0;
}

/// Elements of T as they are, without scales.
template <class T>
struct plain_packing {
  using unit = T;
  static constexpr bool scaled = false;
  static constexpr dim depth = tile_bytes / tile_rows / static_cast<dim>(sizeof(T)),
                       step_bytes = 2 * tile_bytes;  // of a step

  /// Where weight (r, k) of a panel is, in elements.
  MOE_HD static constexpr dim place(dim r, dim k) noexcept {
    constexpr dim size = sizeof(T), slot = 4 / size;
    return (k / depth * step_bytes + r / tile_rows * tile_bytes + k % depth / slot * line_bytes + r % tile_rows * 4) / size +
           k % slot;
  }
  static void pack(const float* w, dim k, dim r, T* panel, float*) noexcept {
    for (dim i = 0; i < k; ++i) panel[place(r, i)] = static_cast<T>(w[i]);
  }
  static float weight(const T* panel, dim r, dim k, float) noexcept { return static_cast<float>(panel[place(r, k)]); }
};

}  // namespace detail

/// What packed weights of type T are made of: float, bf16, f16, std::int8_t, int4_groups<...> or ternary.
template <class T>
struct packing;
template <>
struct packing<float> : detail::plain_packing<float> {};
template <>
struct packing<bf16> : detail::plain_packing<bf16> {};
template <>
struct packing<f16> : detail::plain_packing<f16> {};

/// Symmetric, one scale a row: w = scale q, q in -127 .. 127, scale = max|w| / 127. Stored as the unsigned byte q + 128, so
/// that a product with signed bytes needs a correction by the other operand's sum alone. The scale of a row that is not
/// finite is NaN, and so are its results.
template <>
struct packing<std::int8_t> : detail::plain_packing<std::int8_t> {
  static constexpr bool scaled = true;
  static constexpr float margin = 0;  ///< on top of the largest magnitude of a row that meets them

  static void pack(const float* w, dim k, dim r, std::int8_t* panel, float* scale) noexcept {
    const float largest = detail::magnitude(w, k), per = detail::to_bytes(largest);
    scale[r] = largest / 127;
    for (dim i = 0; i < detail::round_up(k, depth); ++i) {
      const float q = i < k && per != 0 ? std::nearbyint(w[i] * per) : 0;
      panel[place(r, i)] = static_cast<std::int8_t>(static_cast<std::uint8_t>(static_cast<int>(q) + 128));
    }
  }
  MOE_HD static int code(const std::int8_t* panel, dim r, dim k) noexcept {
    return static_cast<std::uint8_t>(panel[place(r, k)]) - 128;
  }
  static float weight(const std::int8_t* panel, dim r, dim k, float scale) noexcept {
    return scale * static_cast<float>(code(panel, r, k));
  }
};

/// One scale a matrix: w = scale q, q in -1, 0, 1, scale = mean|w| + 1e-5. A byte holds q + 1 of four k that are 16 apart,
/// lowest first, so that a line of 64 bytes is four lines of bytes, two bits apart: a step of 64 k is 256 bytes of rows
/// 0 .. 15 and as many of rows 16 .. 31. The scale of a matrix that is not finite is NaN, and so are its results.
/// Ma et al. 2024 (BitNet b1.58), arXiv:2402.17764
template <>
struct packing<ternary> {
  using unit = ternary;
  static constexpr bool scaled = true;
  static constexpr float margin = 1e-5f;
  static constexpr dim depth = 64, half_bytes = 256, step_bytes = 2 * half_bytes;

  MOE_HD static constexpr dim place(dim r, dim k) noexcept {
    return k / depth * step_bytes + r / detail::tile_rows * half_bytes + k % 16 / 4 * detail::line_bytes +
           r % detail::tile_rows * 4 + k % 4;
  }
  MOE_HD static constexpr int shift(dim k) noexcept { return static_cast<int>(k % depth / 16) * 2; }

  template <class U>
  static float scale_of(matrix_view<const U> w) noexcept {
    double sum = 0;
    for (dim r = 0; r < w.rows; ++r)
      for (dim k = 0; k < w.cols; ++k) sum += std::fabs(static_cast<float>(w(r, k)));
    const float mean = static_cast<float>(sum / static_cast<double>(w.rows * w.cols));
    return mean - mean == 0 ? mean + margin : NAN;
  }
  /// q of a weight, half to even.
  static float rounded(float w, float scale) noexcept {
    const float q = std::nearbyint(w / scale);
    return q > 1 ? 1 : q < -1 ? -1 : q == q ? q : 0;
  }
  /// scale[r] is given: that of the matrix.
  static void pack(const float* w, dim k, dim r, ternary* panel, float* scale) noexcept {
    for (dim i = 0; i < detail::round_up(k, depth); ++i) {
      const int code = static_cast<int>(i < k ? rounded(w[i], scale[r]) : 0) + 1;
      std::uint8_t& byte = panel[place(r, i)].bits;
      byte = static_cast<std::uint8_t>((byte & ~(3 << shift(i))) | code << shift(i));
    }
  }
  MOE_HD static int code(const ternary* panel, dim r, dim k) noexcept {
    return (panel[place(r, k)].bits >> shift(k) & 3) - 1;
  }
  static float weight(const ternary* panel, dim r, dim k, float scale) noexcept {
    return scale * static_cast<float>(code(panel, r, k));
  }
};

template <int Group, class Scale>
struct packing<int4_groups<Group, Scale>> {
  using unit = int4;
  static constexpr bool scaled = true;  // a row's scale is max|w| / 127, for products with many rows, which widen to bytes
  static constexpr dim depth = 128, scale_bytes = depth / Group * detail::panel_rows * 2, step_bytes = 2048 + scale_bytes;

  static constexpr dim place(dim r, dim k) noexcept {
    const dim in = k % 64 % 32;
    return k / depth * step_bytes + (k % depth / 64 * 2 + r / 16) * 512 + in / 4 * detail::line_bytes + r % 16 * 4 + in % 4;
  }
  static Scale* scales(int4* panel, dim k) noexcept {
    return reinterpret_cast<Scale*>(panel + k / depth * step_bytes + 2048) + k % depth / Group * detail::panel_rows;
  }
  static void pack(const float* w, dim k, dim r, int4* panel, float* row_scale) noexcept {
    row_scale[r] = 0;
    for (dim first = 0; first < detail::round_up(k, depth); first += Group) {
      const dim n = k - first < Group ? (k > first ? k - first : 0) : Group;
      float extreme = detail::magnitude(w + first, n);
      for (dim i = 0; i < n; ++i)
        if (w[first + i] == -extreme) extreme = -extreme;  // its sign: the extreme itself becomes -8
      const Scale s(-extreme / 8);
      const float unit = static_cast<float>(s);
      scales(panel, first)[r] = s;
      for (dim i = 0; i < Group; ++i) {
        float q = i < n && unit - unit == 0 && unit != 0 ? std::nearbyint(w[first + i] / unit) : 0;
        q = q < -8 ? -8 : q > 7 ? 7 : q;
        const unsigned code = static_cast<unsigned>(static_cast<int>(q) + 8);
        std::uint8_t& byte = panel[place(r, first + i)].bits;
        const dim in = (first + i) % 64;
        byte = static_cast<std::uint8_t>(in < 32 ? (byte & 0xf0u) | code : (byte & 0x0fu) | code << 4);
        if (std::fabs(q * unit) > row_scale[r] * 127 || unit - unit != 0) row_scale[r] = std::fabs(q * unit) / 127;
      }
    }
  }
  static int code(const int4* panel, dim r, dim k) noexcept {
    const unsigned byte = panel[place(r, k)].bits;
    return static_cast<int>(k % 64 < 32 ? byte & 15u : byte >> 4) - 8;
  }
  static float scale(const int4* panel, dim r, dim k) noexcept {
    return static_cast<float>(scales(const_cast<int4*>(panel), k)[r]);
  }
  static float weight(const int4* panel, dim r, dim k, float) noexcept {
    return scale(panel, r, k) * static_cast<float>(code(panel, r, k));
  }
};

/// A stack of E matrices [rows, cols], packed. Forms that are gated keep gate and up in one stack, a panel of each in turn.
template <class T>
struct packed_matrix {
  using pack_rule = packing<T>;
  using unit = typename pack_rule::unit;

  matrix_view<unit> panels;  ///< [E * panels, elements of a panel]
  std::span<float> scale;    ///< [E * 32 panels], of each row, where the type has one
  dim cols = 0;              ///< k of the unpacked matrix

  static constexpr dim panel_bytes(dim cols) noexcept {
    return detail::blocks(cols, pack_rule::depth) * pack_rule::step_bytes;
  }
  static packed_matrix make(const char* name, const char* scale_name, dim panels, dim cols, arena& mem) noexcept {
    packed_matrix m{mem.matrix<unit>(name, panels, panel_bytes(cols) / static_cast<dim>(sizeof(unit))), {}, cols};
    if constexpr (pack_rule::scaled) m.scale = mem.vector<float>(scale_name, panels * detail::panel_rows, initial::ones);
    return m;
  }
  const unit* panel(dim i) const noexcept { return panels.row(i); }
  const float* panel_scale(dim i) const noexcept {
    return pack_rule::scaled ? scale.data() + i * detail::panel_rows : nullptr;
  }

  /// Weight (r, k) of the i-th panel, as products take it.
  float weight(dim i, dim r, dim k) const noexcept {
    return pack_rule::weight(panel(i), r, k, pack_rule::scaled ? panel_scale(i)[r] : 1.f);
  }
  /// Packs the matrix w into panels first, first + step, ...
  template <class U>
  void pack(dim first, matrix_view<const U> w, dim step = 1) {
    std::vector<float> row(static_cast<std::size_t>(cols));
    if constexpr (requires { pack_rule::scale_of(w); }) {
      const float whole = pack_rule::scale_of(w);
      for (dim r = 0; r < detail::round_up(w.rows, detail::panel_rows); ++r)
        scale[static_cast<std::size_t>((first + r / detail::panel_rows * step) * detail::panel_rows + r % detail::panel_rows)] =
            whole;
    }
    for (dim i = first, r = 0; r < w.rows; i += step)
      for (dim in = 0; in < detail::panel_rows; ++in, ++r) {
        for (dim k = 0; k < cols; ++k) row[static_cast<std::size_t>(k)] = r < w.rows ? static_cast<float>(w(r, k)) : 0.f;
        pack_rule::pack(row.data(), cols, in, panels.row(i),
                        pack_rule::scaled ? scale.data() + i * detail::panel_rows : nullptr);
      }
  }
};

}  // namespace moe
