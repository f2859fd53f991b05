// SPDX-License-Identifier: Apache-2.0
/// A tensor of a file: name, element type, shape and bytes, and the checks that reading and writing share.
#pragma once

#include <algorithm>
#include <functional>
#include <limits>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "moe/core/dtype.hpp"
#include "moe/core/error.hpp"

namespace moe {

/// What a safetensors file says of one tensor. `bytes` are row-major and borrowed.
struct tensor_view {
  std::string_view dtype;  ///< as the format spells it, "BF16"; views into static storage
  std::vector<dim> shape;
  std::span<const std::byte> bytes;
};
using tensor_map = std::map<std::string, tensor_view, std::less<>>;
using metadata_map = std::map<std::string, std::string, std::less<>>;

/// How the format spells an element type. Packed ternary weights are plain bytes to it.
constexpr std::string_view safetensors_dtype(element e) noexcept {
  switch (e) {
    case element::f32:
      return "F32";
    case element::bf16:
      return "BF16";
    case element::f16:
      return "F16";
    case element::i8:
      return "I8";
    case element::i32:
      return "I32";
    case element::i64:
      return "I64";
    case element::ternary:
    case element::i4:
      return "U8";
  }
  return "";
}

/// A contiguous matrix as a tensor to write; one row is a vector, of shape [cols].
template <class T>
tensor_view as_tensor(matrix_view<T> m) {
  if (m.ld != m.cols && m.rows > 1)
    throw shape_error("as_tensor: matrix has row stride " + std::to_string(m.ld) + ", expected " + std::to_string(m.cols) +
                      " (cols)");
  const std::span<T> elements(m.data, static_cast<std::size_t>(m.rows * m.cols));
  return {safetensors_dtype(dtype<std::remove_const_t<T>>::id),
          m.rows == 1 ? std::vector<dim>{m.cols} : std::vector<dim>{m.rows, m.cols}, std::as_bytes(elements)};
}

namespace detail {

inline constexpr std::size_t most_header_bytes = 100'000'000;  ///< as the reference implementation
inline constexpr std::size_t most_dimensions = 64;

/// An element type of the format: its size, and the unit that a change of byte order reverses.
struct file_dtype {
  std::string_view name;
  std::size_t bits, unit;
};
/// In the order of the reference implementation, which stores the last of these first: widest first, so that every
/// tensor is aligned.
inline constexpr file_dtype file_dtypes[] = {
    {"BOOL", 8, 1},    {"F4", 4, 1},      {"F6_E2M3", 6, 1}, {"F6_E3M2", 6, 1},     {"U8", 8, 1},          {"I8", 8, 1},
    {"F8_E5M2", 8, 1}, {"F8_E4M3", 8, 1}, {"F8_E8M0", 8, 1}, {"F8_E4M3FNUZ", 8, 1}, {"F8_E5M2FNUZ", 8, 1}, {"I16", 16, 2},
    {"U16", 16, 2},    {"F16", 16, 2},    {"BF16", 16, 2},   {"I32", 32, 4},        {"U32", 32, 4},        {"F32", 32, 4},
    {"C64", 64, 4},    {"F64", 64, 8},    {"I64", 64, 8},    {"U64", 64, 8},
};

/// Null for a name that the format does not know.
constexpr const file_dtype* find_dtype(std::string_view name) noexcept {
  for (const file_dtype& d : file_dtypes)
    if (d.name == name) return &d;
  return nullptr;
}

/// A name from a file, fit for a message: in quotes, printable, cut after 80 bytes.
inline std::string in_quotes(std::string_view name) {
  std::string out = "\"";
  for (const char c : name.substr(0, 80)) out += static_cast<unsigned char>(c) < 0x20 || c == 0x7f ? '?' : c;
  return out + (name.size() > 80 ? "...\"" : "\"");
}

inline std::string shape_text(const std::vector<dim>& shape) {
  std::string out = "[";
  for (const dim n : shape) out += (out.size() > 1 ? ", " : "") + std::to_string(n);
  return out + ']';
}

/// Bytes of a tensor; calls fail(what), which throws, for a shape that has no such number.
template <class F>
std::size_t byte_count(const file_dtype& type, const std::vector<dim>& shape, F&& fail) {
  constexpr std::size_t most = std::numeric_limits<std::size_t>::max();
  std::size_t n = 1;
  for (const dim extent : shape) {
    if (extent < 0) fail("has a negative size in its shape " + shape_text(shape));
    const auto e = static_cast<std::size_t>(extent);
    if (e != 0 && n > most / e) fail("has the shape " + shape_text(shape) + ", whose product overflows");
    n *= e;
  }
  if (n > most / type.bits) fail("has the shape " + shape_text(shape) + ", whose size in bits overflows");
  if (n * type.bits % 8 != 0) fail("has the shape " + shape_text(shape) + ", which ends inside a byte");
  return n * type.bits / 8;
}

/// Turns little-endian elements into big-endian ones and back.
inline void reverse_units(std::span<std::byte> bytes, std::size_t unit) noexcept {
  for (std::size_t i = 0; i + unit <= bytes.size(); i += unit) std::reverse(&bytes[i], &bytes[i] + unit);
}

/// Bytes that follow a first byte of UTF-8, or -1 where it cannot be a first one.
constexpr int utf8_more(unsigned lead) noexcept {
  if (lead < 0x80) return 0;
  if (lead < 0xc2) return -1;
  return lead < 0xe0 ? 1 : lead < 0xf0 ? 2 : lead < 0xf5 ? 3 : -1;
}

/// Where `s` stops being UTF-8 (RFC 3629: no overlong forms, no surrogates, nothing above U+10FFFF), or its size.
inline std::size_t utf8_end(std::string_view s) noexcept {
  const auto byte = [&](std::size_t i) { return static_cast<unsigned>(static_cast<unsigned char>(s[i])); };
  for (std::size_t i = 0; i < s.size();) {
    const unsigned lead = byte(i);
    const int more = utf8_more(lead);
    if (more < 0 || static_cast<std::size_t>(more) >= s.size() - i) return i;
    const std::size_t next = i + 1 + static_cast<std::size_t>(more);
    for (std::size_t j = i + 1; j < next; ++j) {
      const unsigned least = j > i + 1 ? 0x80 : lead == 0xe0 ? 0xa0 : lead == 0xf0 ? 0x90 : 0x80;
      const unsigned most = j > i + 1 ? 0xbf : lead == 0xed ? 0x9f : lead == 0xf4 ? 0x8f : 0xbf;
      if (byte(j) < least || byte(j) > most) return i;
    }
    i = next;
  }
  return s.size();
}

}  // namespace detail
}  // namespace moe
