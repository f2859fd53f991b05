// SPDX-License-Identifier: Apache-2.0
#include <doctest/doctest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <span>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "moe/core/dtype.hpp"
#include "moe/core/error.hpp"
#include "moe/core/rng.hpp"
#include "moe/core/tensors.hpp"
#include "moe/core/view.hpp"

using namespace moe;

namespace {

template <class... T>
constexpr bool fit_device_code = ((std::is_trivially_copyable_v<T> && std::is_standard_layout_v<T>)&&...);
static_assert(fit_device_code<matrix_view<float>, matrix_view<const bf16>, matrix_stack<float>, gathered<float>, shape, bf16,
                              f16, ternary>);
static_assert(std::is_convertible_v<matrix_view<float>, matrix_view<const float>>);
static_assert(!std::is_convertible_v<matrix_view<const float>, matrix_view<float>>);
static_assert(std::is_convertible_v<matrix_stack<float>, matrix_stack<const float>>);
static_assert(!std::is_convertible_v<matrix_stack<const float>, matrix_stack<float>>);
static_assert(!std::is_convertible_v<float, bf16> && !std::is_convertible_v<bf16, float>);
static_assert(!std::is_convertible_v<float, f16> && !std::is_convertible_v<f16, float>);

std::string message(auto call) {
  try {
    call();
  } catch (const shape_error& e) {
    return e.what();
  }
  return "no shape_error";
}

/// A binary floating-point format as IEEE 754 describes it, worked out in double.
struct format {
  int exponent_bits, fraction_bits;

  int bias() const { return (1 << (exponent_bits - 1)) - 1; }
  int top() const { return (1 << exponent_bits) - 1; }

  double decode(std::uint32_t code) const {
    const int fraction = static_cast<int>(code) & ((1 << fraction_bits) - 1);
    const int exponent = static_cast<int>(code >> fraction_bits) & top();
    const double sign = code >> (exponent_bits + fraction_bits) ? -1 : 1;
    if (exponent == top()) return fraction ? std::numeric_limits<double>::quiet_NaN() : sign * HUGE_VAL;
    if (exponent == 0) return sign * std::ldexp(fraction, 1 - bias() - fraction_bits);
    return sign * std::ldexp(fraction + (1 << fraction_bits), exponent - bias() - fraction_bits);
  }
  /// To nearest, ties to even: as many units of the last place as std::nearbyint says.
  double round(double v) const {
    if (!std::isfinite(v) || v == 0) return v;
    const int exponent = std::max(std::ilogb(v), 1 - bias());
    const double rounded = std::ldexp(std::nearbyint(std::ldexp(v, fraction_bits - exponent)), exponent - fraction_bits);
    const double largest = std::ldexp(2 - std::ldexp(1, -fraction_bits), bias());
    return std::abs(rounded) > largest ? std::copysign(HUGE_VAL, v) : rounded;
  }
};

bool same(double a, double b) {
  return (std::isnan(a) && std::isnan(b)) || (a == b && std::signbit(a) == std::signbit(b));
}

template <class T>
T from_bits(std::uint32_t code) {
  T v;
  v.bits = static_cast<std::uint16_t>(code);
  return v;
}

template <class T>
double rounded(float v) {
  return double{static_cast<float>(T(v))};
}

/// Codes whose value is not what the format says, and codes that do not survive float and back.
template <class T>
void check_all_codes(format f) {
  int wrong_value = 0, wrong_code = 0, nans = 0;
  for (std::uint32_t code = 0; code < 65536; ++code) {
    const auto value = static_cast<float>(from_bits<T>(code));
    const auto back = T(value);
    wrong_value += !same(value, f.decode(code));
    if (std::isnan(value)) {
      ++nans;
      wrong_code += !std::isnan(static_cast<float>(back)) || (back.bits ^ code) >> 15 != 0;
    } else {
      wrong_code += back != from_bits<T>(code);
    }
  }
  CHECK(wrong_value == 0);
  CHECK(wrong_code == 0);
  CHECK(nans == 2 * ((1 << f.fraction_bits) - 1));
}

/// The middle between every two neighbours, and the floats just below and above it.
template <class T>
void check_all_ties(format f) {
  int wrong = 0;
  const auto last = static_cast<std::uint32_t>(f.top()) << f.fraction_bits;
  for (std::uint32_t code = 0; code < last; ++code) {
    const double above = code + 1 < last ? f.decode(code + 1) : std::ldexp(1, f.bias() + 1);
    const double middle = (f.decode(code) + above) / 2;
    const auto tie = static_cast<float>(middle);
    if (double{tie} != middle) continue;  // below the smallest subnormal of float
    for (const float v : {std::nextafter(tie, 0.f), tie, std::nextafter(tie, HUGE_VALF)}) {
      wrong += !same(rounded<T>(v), f.round(v));
      wrong += !same(rounded<T>(-v), f.round(-v));
    }
  }
  CHECK(wrong == 0);
}

template <class T>
void check_random_floats(format f) {
  int wrong = 0;
  const rng random(17);
  for (std::uint64_t i = 0; i < 200000; ++i) {
    const auto v = std::bit_cast<float>(static_cast<std::uint32_t>(random(i)));
    wrong += !same(rounded<T>(v), f.round(v));
  }
  CHECK(wrong == 0);
}

template <class T>
void check_type(element id, int bits, bool packed, const char* printed) {
  CHECK(dtype<T>::id == id);
  CHECK(dtype<T>::bits == bits);
  CHECK(dtype<T>::packed == packed);
  CHECK(std::string(name(dtype<T>::id)) == printed);
}

constexpr format bf16_format{8, 7}, f16_format{5, 10};

/// What for_each_tensor meets.
struct pair_of_views {
  matrix_view<float> a, b;
};
struct counted_views {
  std::span<float> first;
  pair_of_views rest;
  template <class F>
  void each(const F& f) const {
    f(first, rest);
  }
};
struct all_views {
  [[no_unique_address]] std::tuple<> empty;
  std::tuple<pair_of_views, std::span<float>> tuple;
  matrix_view<float> alone;
  counted_views counted;
  dim number = 0;
};

}  // namespace

TEST_SUITE("core/view") {
  TEST_CASE("a view reaches elements, rows, slices and columns through its row stride") {
    std::vector<int> v(20);
    for (int i = 0; i < 20; ++i) v[static_cast<std::size_t>(i)] = i;
    const matrix_view<int> m(v.data(), 4, 3, 5);
    CHECK(m(2, 1) == 11);
    CHECK(m.row(3)[2] == 17);
    const auto rows = m.slice(1, 2);
    CHECK(rows.rows == 2);
    CHECK(rows(1, 2) == 12);
    const auto part = m.columns(1, 2).slice(2, 2);
    CHECK(part.rows == 2);
    CHECK(part.cols == 2);
    CHECK(part.ld == 5);
    CHECK(part(1, 1) == 17);
    part(0, 0) = -1;
    CHECK(v[11] == -1);
  }
  TEST_CASE("without a stride the rows are adjacent") {
    std::vector<float> v(6);
    const matrix_view<float> m(v.data(), 2, 3);
    CHECK(m.ld == 3);
    CHECK(&m(1, 0) == &v[3]);
  }
  TEST_CASE("an empty view is false") {
    float v = 0;
    CHECK_FALSE(matrix_view<float>());
    CHECK(matrix_view<float>(&v, 1, 1));
  }
  TEST_CASE("a stack of matrices is its rows, cut") {
    std::vector<float> v(6 * 4);
    const matrix_view<float> m(v.data(), 6, 3, 4);
    const matrix_stack<const float> s = stack(m, 2);
    CHECK(s[0].data == m.row(0));
    CHECK(s[2].data == m.row(4));
    CHECK(s[2].rows == 2);
    CHECK(s[2].cols == 3);
    CHECK(s[2].ld == 4);
  }
  TEST_CASE("gathered rows are read in the order of the plan, weighed, and renumbered from any row") {
    std::vector<float> v{0, 1, 10, 11, 20, 21};
    const matrix_view<const float> m(v.data(), 3, 2);
    const idx token[] = {2, 0, 1, 2};
    const float weight[] = {.5f, 1.f, 2.f, 4.f};
    const gathered<float> g{m, token, weight};
    CHECK(g.cols() == 2);
    CHECK(g.row(0)[1] == 21);
    CHECK(g.row(1)[0] == 0);
    CHECK(g.scale(3) == 4.f);
    const auto rest = g.from(2);
    CHECK(rest.row(0)[0] == 10);
    CHECK(rest.row(1)[0] == 20);
    CHECK(rest.scale(0) == 2.f);
  }
  TEST_CASE("gathered without tokens and weights is the source itself") {
    std::vector<float> v{0, 1, 10, 11, 20, 21};
    const gathered<float> g{matrix_view<const float>(v.data(), 3, 2)};
    CHECK(g.row(1)[0] == 10);
    CHECK(g.scale(1) == 1.f);
    const auto rest = g.from(1);
    CHECK(rest.row(1)[0] == 20);
    CHECK(rest.source.rows == 2);
    CHECK(rest.scale(1) == 1.f);
  }
}

TEST_SUITE("core/dtype") {
  TEST_CASE("every code of bf16 and f16 has its value and survives float and back; NaN stays NaN with its sign") {
    SUBCASE("bf16") { check_all_codes<bf16>(bf16_format); }
    SUBCASE("f16") { check_all_codes<f16>(f16_format); }
  }
  TEST_CASE("rounding is to nearest, ties to even, at the middle of all neighbours and beside it") {
    SUBCASE("bf16") { check_all_ties<bf16>(bf16_format); }
    SUBCASE("f16") { check_all_ties<f16>(f16_format); }
  }
  TEST_CASE("rounding any float agrees with a reference in double") {
    SUBCASE("bf16") { check_random_floats<bf16>(bf16_format); }
    SUBCASE("f16") { check_random_floats<f16>(f16_format); }
  }
  TEST_CASE("known codes, worked out by hand") {
    CHECK(f16(1.f).bits == 0x3c00);
    CHECK(f16(-2.f).bits == 0xc000);
    CHECK(f16(65504.f).bits == 0x7bff);
    CHECK(f16(65519.99f).bits == 0x7bff);
    CHECK(f16(65520.f).bits == 0x7c00);
    CHECK(f16(0x1p-24f).bits == 0x0001);
    CHECK(f16(0x1p-25f).bits == 0x0000);
    CHECK(f16(0x1.8p-25f).bits == 0x0001);
    CHECK(f16(-0.f).bits == 0x8000);
    CHECK(f16(0x1.ffep-15f).bits == 0x0400);  // a carry out of the subnormals
    CHECK(bf16(1.f).bits == 0x3f80);
    CHECK(bf16(0x1.01p0f).bits == 0x3f80);  // tie: down to even
    CHECK(bf16(0x1.03p0f).bits == 0x3f82);  // tie: up to even
    CHECK(bf16(std::numeric_limits<float>::max()).bits == 0x7f80);
    CHECK(bf16(-HUGE_VALF).bits == 0xff80);
    CHECK(bf16(0x1p-149f).bits == 0x0000);
    CHECK(bf16(std::bit_cast<float>(0xff800001u)).bits == 0xffc0);  // NaN by a bit that is cut off
    CHECK(f16(std::bit_cast<float>(0xff800001u)).bits == 0xfe00);
  }
  TEST_CASE("conversions are constant expressions and equality compares bits") {
    static_assert(static_cast<float>(bf16(1.5f)) == 1.5f);
    static_assert(static_cast<float>(f16(0x1p-24f)) == 0x1p-24f);
    CHECK(bf16(0.f) != bf16(-0.f));
    CHECK(f16(std::nanf("")) == f16(std::nanf("")));
  }
  TEST_CASE("every element type states its name, bits and packing") {
    check_type<float>(element::f32, 32, false, "f32");
    check_type<bf16>(element::bf16, 16, false, "bf16");
    check_type<f16>(element::f16, 16, false, "f16");
    check_type<std::int8_t>(element::i8, 8, false, "i8");
    check_type<std::int32_t>(element::i32, 32, false, "i32");
    check_type<std::int64_t>(element::i64, 64, false, "i64");
    check_type<ternary>(element::ternary, 2, true, "ternary");
  }
  TEST_CASE("products of floating-point types add up in float, of integer types in integers") {
    CHECK(std::is_same_v<dtype<float>::accumulator, float>);
    CHECK(std::is_same_v<dtype<bf16>::accumulator, float>);
    CHECK(std::is_same_v<dtype<f16>::accumulator, float>);
    CHECK(std::is_same_v<dtype<std::int8_t>::accumulator, std::int32_t>);
    CHECK(std::is_same_v<dtype<ternary>::accumulator, std::int32_t>);
  }
  TEST_CASE("four ternary weights share a byte") {
    CHECK(sizeof(ternary) * 8 == 4 * dtype<ternary>::bits);
  }
}

TEST_SUITE("core/tensors") {
  TEST_CASE("every matrix and span of float is met once, in order, whatever holds them") {
    float v[7] = {};
    const auto one = [&](int i) { return matrix_view<float>(v + i, 1, 1); };
    const all_views views{{}, {{one(0), one(1)}, {v + 2, 1}}, one(3), {{v + 4, 1}, {one(5), one(6)}}};
    float next = 1;
    for_each_tensor(views, [&](matrix_view<float> m) {
      CHECK(m.rows * m.cols == 1);
      *m.data = next++;
    });
    for (int i = 0; i < 7; ++i) CHECK(v[i] == 1 + i);
  }
}

TEST_SUITE("core/error") {
  TEST_CASE("a number that does not fit is named with what was wanted") {
    CHECK_NOTHROW(expect(16, 16, "linear_gate: x", "columns", "d"));
    CHECK(message([] { expect(8, 16, "linear_gate: x", "columns", "d"); }) ==
          "linear_gate: x has 8 columns, expected 16 (d)");
  }
  TEST_CASE("a matrix that does not fit is named with both shapes") {
    float v[32] = {};
    using view = matrix_view<float>;
    const auto said = [](view m) { return message([m] { expect(m, 4, 8, "ffn_expert: up", "E*f x d"); }); };
    CHECK_NOTHROW(expect(view(v, 4, 8), 4, 8, "up", "f x d"));
    CHECK_NOTHROW(expect(view(), 0, 0, "up", "f x d"));
    CHECK(said({v, 2, 8}) == "ffn_expert: up is 2 x 8, expected 4 x 8 (E*f x d)");
    CHECK(said({v, 8, 4}) == "ffn_expert: up is 8 x 4, expected 4 x 8 (E*f x d)");
    CHECK(said({nullptr, 4, 8}) == "ffn_expert: up has no memory, expected 4 x 8 (E*f x d)");
    CHECK(said({v, 4, 8, 7}) == "ffn_expert: up is 4 x 8 with row stride 7, expected 4 x 8 (E*f x d)");
  }
  TEST_CASE("memory that does not suffice is named with its sizer") {
    CHECK_NOTHROW(expect_bytes(64, 64, "scratch", "scratch_bytes(T)"));
    CHECK(message([] { expect_bytes(64, 65, "moe::layer::forward: scratch", "scratch_bytes(T)"); }) ==
          "moe::layer::forward: scratch has 64 bytes left, needs 65 (scratch_bytes(T))");
  }
}
