// SPDX-License-Identifier: Apache-2.0
/// Element types: how many bits, what products add up in, packed or not. Conversions are explicit.
#pragma once

#include <bit>
#include <cstdint>

#include "moe/core/config.hpp"
#include "moe/core/types.hpp"

namespace moe {

/// The upper half of a float: 8 exponent bits, 7 fraction bits. Rounds to nearest even; NaN stays NaN.
struct bf16 {
  std::uint16_t bits = 0;

  bf16() = default;
  MOE_HD explicit constexpr bf16(float v) noexcept : bits(round(__builtin_bit_cast(std::uint32_t, v))) {}
  MOE_HD explicit constexpr operator float() const noexcept { return __builtin_bit_cast(float, std::uint32_t{bits} << 16); }
  friend constexpr bool operator==(bf16, bf16) = default;  // compares bits

 private:
  MOE_HD static constexpr std::uint16_t round(std::uint32_t u) noexcept {
    if ((u & 0x7fffffffu) > 0x7f800000u) return static_cast<std::uint16_t>((u >> 16) | 0x40u);
    return static_cast<std::uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
  }
};

/// IEEE 754 binary16. Rounds to nearest even, overflows to infinity; NaN stays NaN.
struct f16 {
  std::uint16_t bits = 0;

  f16() = default;
  MOE_HD explicit constexpr f16(float v) noexcept : bits(round(__builtin_bit_cast(std::uint32_t, v))) {}
  MOE_HD explicit constexpr operator float() const noexcept {
    const std::uint32_t sign = (bits & 0x8000u) << 16, exponent = (bits >> 10) & 0x1fu, fraction = bits & 0x3ffu;
    if (exponent == 0x1fu) return __builtin_bit_cast(float, sign | 0x7f800000u | (fraction << 13));
    if (exponent != 0) return __builtin_bit_cast(float, sign | ((exponent + 112u) << 23) | (fraction << 13));
    const float magnitude = static_cast<float>(fraction) * 0x1p-24f;  // zero and subnormal, exact
    return sign != 0 ? -magnitude : magnitude;
  }
  friend constexpr bool operator==(f16, f16) = default;  // compares bits

 private:
  MOE_HD static constexpr std::uint16_t round(std::uint32_t u) noexcept {
    const std::uint32_t sign = (u >> 16) & 0x8000u, magnitude = u & 0x7fffffffu;
    const auto with_sign = [&](std::uint32_t half) { return static_cast<std::uint16_t>(sign | half); };
    if (magnitude > 0x7f800000u) return with_sign(0x7e00u);
    if (magnitude >= 0x477ff000u) return with_sign(0x7c00u);  // 65520 and above round to infinity
    if (magnitude < 0x33000000u) return with_sign(0);          // below half of the smallest subnormal
    const std::uint32_t exponent = magnitude >> 23;
    const std::uint32_t fraction = (magnitude & 0x7fffffu) | 0x800000u;
    const std::uint32_t shift = exponent < 113u ? 126u - exponent : 13u;
    std::uint32_t half = exponent < 113u ? fraction >> shift : ((exponent - 112u) << 10) + ((fraction & 0x7fffffu) >> 13);
    const std::uint32_t rest = fraction & ((1u << shift) - 1u), tie = 1u << (shift - 1u);
    if (rest > tie || (rest == tie && (half & 1u))) ++half;  // a carry runs into the exponent, as it should
    return with_sign(half);
  }
};

/// Four weights of {-1, 0, 1} in a byte, two bits each, lowest first: code = weight + 1.
struct ternary {
  std::uint8_t bits = 0;
};

/// Two weights of -8 .. 7 in a byte, four bits each, lower first: code = weight + 8.
struct int4 {
  std::uint8_t bits = 0;
};

/// Names an element type at run time: in a catalogue, in a checkpoint.
enum class element : std::uint8_t { f32, bf16, f16, i8, i32, i64, ternary, i4 };

/// What a product over elements of type T needs to know.
template <class T>
struct dtype;
template <>
struct dtype<float> { static constexpr element id = element::f32; static constexpr int bits = 32; static constexpr bool packed = false; using accumulator = float; };
template <>
struct dtype<bf16> { static constexpr element id = element::bf16; static constexpr int bits = 16; static constexpr bool packed = false; using accumulator = float; };
template <>
struct dtype<f16> { static constexpr element id = element::f16; static constexpr int bits = 16; static constexpr bool packed = false; using accumulator = float; };
template <>
struct dtype<std::int8_t> { static constexpr element id = element::i8; static constexpr int bits = 8; static constexpr bool packed = false; using accumulator = std::int32_t; };
template <>
struct dtype<std::int32_t> { static constexpr element id = element::i32; static constexpr int bits = 32; static constexpr bool packed = false; using accumulator = std::int32_t; };
template <>
struct dtype<std::int64_t> { static constexpr element id = element::i64; static constexpr int bits = 64; static constexpr bool packed = false; using accumulator = std::int64_t; };
template <>
struct dtype<ternary> { static constexpr element id = element::ternary; static constexpr int bits = 2; static constexpr bool packed = true; using accumulator = std::int32_t; };
template <>
struct dtype<int4> { static constexpr element id = element::i4; static constexpr int bits = 4; static constexpr bool packed = true; using accumulator = std::int32_t; };

/// Name of an element type, as error messages and catalogues print it.
constexpr const char* name(element e) noexcept {
  switch (e) {
    case element::f32: return "f32";
    case element::bf16: return "bf16";
    case element::f16: return "f16";
    case element::i8: return "i8";
    case element::i32: return "i32";
    case element::i64: return "i64";
    case element::ternary: return "ternary";
    case element::i4: return "i4";
  }
  return "?";
}

}  // namespace moe
