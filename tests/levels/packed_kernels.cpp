// SPDX-License-Identifier: Apache-2.0
// Every level's products with packed weights against the numbers that go in, and the tile kernels on emulated tiles.
#include <doctest/doctest.h>

#include <limits>
#include <string_view>

#include "moe/backend/cpu.hpp"
#include "support/emulated_tiles.hpp"
#include "support/levels.hpp"
#include "support/testing.hpp"

namespace {

using moe::dim;
using int4_32 = moe::int4_groups<32>;
using int4_128 = moe::int4_groups<128, moe::bf16>;

std::size_t at(dim i) { return static_cast<std::size_t>(i); }

/// A product of `rows` rows with `panels` panels, prepared and multiplied by `kernels`; whole[r][j] is the exact result.
template <class T>
struct trial {
  dim rows, panels, k;
  std::vector<float> x, w;
  moe::buffer memory;
  moe::packed_matrix<T> packed;

  trial(dim m, dim n, dim depth, std::vector<float> left, std::vector<float> right)
      : rows(m), panels(n), k(depth), x(std::move(left)), w(std::move(right)) {
    moe::arena count;
    (void)moe::packed_matrix<T>::make("w", "scale", panels, k, count);
    memory = moe::buffer(moe::padded(count));
    moe::arena mem(memory.bytes());
    packed = moe::packed_matrix<T>::make("w", "scale", panels, k, mem);
    for (dim i = 0; i < panels; ++i) packed.pack(i, moe::matrix_view<const float>{w.data() + i * 32 * k, 32, k});
  }
  std::vector<float> product(const moe::packed_kernels& kernels) const {
    const dim padded = moe::detail::round_up(k, moe::packing<T>::depth), columns = panels * 32;
    moe::prepared_rows a;
    a.lines = kernels.lines(padded);
    kernels.lay_out(a, rows);
    a.factor_count = kernels.factor_count(padded);
    moe::buffer lines(at(rows * a.lines * 64)), line(at(a.lines * 64)), scratch(at(kernels.scratch_per_k * padded) + 64),
        sums(at(rows * (columns + 16)) * 4);
    std::vector<float> factors(at(rows * a.factor_count) + 1);
    a.data = lines.bytes().data();
    a.factors = factors.data();
    for (dim r = 0; r < rows; ++r) {
      kernels.prepare(x.data() + r * k, k, line.bytes().data(), a.factor(r), kernels.sums_of_32);
      a.take(r, line.bytes().data(), 0, a.lines);
    }
    const moe::matrix_view<float> c{sums.as<float>().data(), rows, columns, columns + 16};
    for (float& v : sums.as<float>()) v = -77;
    kernels.multiply(a, {reinterpret_cast<const std::byte*>(packed.panel(0)), packed.panel_bytes(k), panels,
                         packed.panel_scale(0), scratch.bytes().data(), c});
    std::vector<float> y;
    for (dim r = 0; r < rows; ++r) {
      y.insert(y.end(), c.row(r), c.row(r) + columns);
      for (dim j = columns; j < columns + 16; ++j) CHECK(c.row(r)[j] == -77);  // nothing beyond the panels is written
    }
    return y;
  }
  /// From the weights as packed, in double.
  std::vector<double> expected() const {
    std::vector<double> y;
    for (dim r = 0; r < rows; ++r)
      for (dim j = 0; j < panels * 32; ++j) {
        double sum = 0;
        for (dim i = 0; i < k; ++i) sum += double{x[at(r * k + i)]} * packed.weight(j / 32, j % 32, i);
        y.push_back(sum);
      }
    return y;
  }
};

/// f(name, kernels) for every rung that this machine can run, tiles emulated where it has none.
template <class T, class F>
void on_every_rung(F f) {
  f("scalar", kernels_of(moe::arch::scalar{}, moe::arch::weights_of<T>{}));
#if defined(MOE_X86)
  const moe::cpu_level machine = testing::highest_level();
  if (includes(machine, moe::cpu_level::avx2)) f("avx2", kernels_of(moe::arch::avx2{}, moe::arch::weights_of<T>{}));
  if (includes(machine, moe::cpu_level::avx512)) f("avx512", kernels_of(moe::arch::avx512{}, moe::arch::weights_of<T>{}));
  if (includes(machine, moe::cpu_level::avx512_bf16))
    f("avx512_bf16", kernels_of(moe::arch::avx512_bf16{}, moe::arch::weights_of<T>{}));
  if (includes(machine, moe::cpu_level::avx512_vnni)) {
    f("avx512_vnni", kernels_of(moe::arch::avx512_vnni{}, moe::arch::weights_of<T>{}));
    if constexpr (requires { kernels_of(moe::arch::amx{}, moe::arch::weights_of<T>{}, testing::emulated_tiles{}); })
      f("amx, emulated", kernels_of(moe::arch::amx{}, moe::arch::weights_of<T>{}, testing::emulated_tiles{}));
  }
  if (includes(machine, moe::cpu_level::amx)) f("amx", kernels_of(moe::arch::amx{}, moe::arch::weights_of<T>{}));
#elif defined(__aarch64__)
  f("neon", kernels_of(moe::arch::neon{}, moe::arch::weights_of<T>{}));
#endif
}

/// Whole numbers whose packed form is exact: the largest of a row, or of a group of weights, is the one that gives a scale
/// of 1.
template <class T>
std::vector<float> exact_weights(dim n, dim k, std::uint64_t seed) {
  std::vector<float> w = testing::integers(n * k, seed, moe::packing<T>::scaled ? 7 : 8);
  for (dim r = 0; r < n; ++r) {
    if constexpr (std::same_as<T, std::int8_t>)
      w[at(r * k + r % k)] = r % 2 ? 127.f : -127.f;
    else if constexpr (moe::packing<T>::scaled)
      for (dim i = 0; i < k; i += 32) w[at(r * k + i)] = -8;
  }
  return w;
}

/// Whether a rung may multiply so many rows with four-bit weights that were rounded to bytes.
template <class T>
bool widened(dim rows, std::string_view rung) {
  if (!moe::packing<T>::scaled || std::same_as<T, std::int8_t> || std::same_as<T, moe::ternary>) return false;
  return rung.starts_with("amx") ? rows > 12 : rung.starts_with("avx512_") && rows >= 40;
}

struct sizes {
  dim rows, panels, k;
};
constexpr sizes tails[] = {{1, 1, 1},   {1, 3, 200}, {2, 2, 64},   {3, 1, 31},   {5, 2, 100},  {8, 2, 257},  {12, 1, 128},
                           {13, 3, 65}, {16, 2, 96}, {17, 1, 600}, {31, 3, 130}, {33, 8, 515}, {70, 5, 300}, {130, 2, 1100}};

}  // namespace

TEST_SUITE("backend/cpu/packed") {
  TEST_CASE_TEMPLATE("whole numbers give equal bits on every rung", T, float, moe::bf16, moe::f16, std::int8_t, int4_32,
                     int4_128, moe::int4_groups<32, moe::bf16>, moe::int4_groups<128, moe::f16>) {
    for (const sizes s : tails) {
      std::vector<float> x = testing::integers(s.rows * s.k, 3, 8);
      if constexpr (moe::packing<T>::scaled)
        for (dim r = 0; r < s.rows; ++r) x[at(r * s.k)] = r % 2 ? 127.f : -127.f;
      const trial<T> t(s.rows, s.panels, s.k, x, exact_weights<T>(s.panels * 32, s.k, 4));
      const std::vector<double> expected = t.expected();
      for (dim i = 0; i < s.k; ++i) REQUIRE(t.packed.weight(0, 5, i) == t.w[at(5 * s.k + i)]);
      on_every_rung<T>([&](const char* rung, const moe::packed_kernels& kernels) {
        CAPTURE(rung);
        CAPTURE(s.rows);
        CAPTURE(s.k);
        if (widened<T>(s.rows, rung)) return;
        const std::vector<float> y = t.product(kernels);
        for (std::size_t i = 0; i < y.size(); ++i) REQUIRE(y[i] == expected[i]);
      });
    }
#if defined(MOE_X86)
    CHECK(testing::emulated_tiles::faults == 0);
#endif
  }
  TEST_CASE_TEMPLATE("products of bytes are sums of codes, rounded once, times two scales, in equal bits on every rung", T,
                     std::int8_t, moe::ternary) {
    const auto check = [](const trial<T>& t) {
      std::vector<float> expected;
      for (dim r = 0; r < t.rows; ++r) {
        float largest = 0;
        for (dim i = 0; i < t.k; ++i) largest = std::max(largest, std::fabs(t.x[at(r * t.k + i)]));
        const float beta = largest + moe::packing<T>::margin, per = 127 / beta;
        for (dim j = 0; j < t.panels * 32; ++j) {
          std::int64_t sum = 0;
          for (dim i = 0; i < t.k; ++i)
            sum += std::lrint(t.x[at(r * t.k + i)] * per) * moe::packing<T>::code(t.packed.panel(j / 32), j % 32, i);
          expected.push_back(beta / 127 * t.packed.panel_scale(j / 32)[j % 32] * static_cast<float>(sum));
        }
      }
      on_every_rung<T>([&](const char* rung, const moe::packed_kernels& kernels) {
        CAPTURE(rung);
        CAPTURE(t.rows);
        CAPTURE(t.k);
        const std::vector<float> y = t.product(kernels);
        for (std::size_t i = 0; i < y.size(); ++i) REQUIRE(y[i] == expected[i]);
      });
    };
    for (const sizes s : tails)
      check({s.rows, s.panels, s.k, testing::normals(s.rows * s.k, 3), testing::normals(s.panels * 32 * s.k, 4)});
    constexpr dim most = 1 << 16;
    for (const float w : {1.f, -1.f}) {  // the largest sums that there may be
      check({2, 1, most, std::vector<float>(2 * most, 3.f), std::vector<float>(32 * most, w)});
      check({13, 1, 4096, std::vector<float>(13 * 4096, -3.f), std::vector<float>(32 * 4096, w)});
    }
    // Small sums of large bytes: nothing is lost to the 128 that is on top of every weight.
    std::vector<float> x(13 * most, 2.f);
    for (dim r = 0; r < 13; ++r) x[at(r * most + r)] = 1.f;
    std::vector<float> w(32 * most);
    for (dim i = 0; i < 32 * most; ++i) w[at(i)] = i % 2 ? 1.f : -1.f;
    check({13, 1, most, std::move(x), std::move(w)});
#if defined(MOE_X86)
    CHECK(testing::emulated_tiles::faults == 0);
#endif
  }
  TEST_CASE("the longest sums of four-bit weights stay within 32 bits on every rung, widened to bytes or not") {
    constexpr dim most = 1 << 16;
    for (const float w : {1.f, -1.f})
      for (const dim rows : {1, 13, 40}) {  // as they are; widened for tiles; widened for vectors, too
        const trial<int4_32> t(rows, 1, most, std::vector<float>(at(rows * most), 3.f), std::vector<float>(32 * most, w));
        on_every_rung<int4_32>([&](const char* rung, const moe::packed_kernels& kernels) {
          CAPTURE(rung);
          CAPTURE(rows);
          for (const float v : t.product(kernels)) REQUIRE(v == doctest::Approx(3.0 * w * most).epsilon(1e-5));
        });
      }
#if defined(MOE_X86)
    CHECK(testing::emulated_tiles::faults == 0);
#endif
  }
  TEST_CASE_TEMPLATE("products stay within the error of their operands on every rung", T, float, moe::bf16, moe::f16,
                     std::int8_t, int4_32, int4_128, moe::ternary) {
    for (const sizes s : tails) {
      const trial<T> t(s.rows, s.panels, s.k, testing::normals(s.rows * s.k, 5), testing::normals(s.panels * 32 * s.k, 6));
      const std::vector<double> expected = t.expected();
      on_every_rung<T>([&](const char* rung, const moe::packed_kernels& kernels) {
        CAPTURE(rung);
        CAPTURE(s.rows);
        CAPTURE(s.k);
        const std::vector<float> y = t.product(kernels);
        // A sum of k products of size 1, each off by what rounding its operands costs: halves 2^-9; bytes half a step of
        // max/127 (max of a row up to 4.5 here), in x and, for widened weights, in w; else by the additions alone.
        const double root = std::sqrt(static_cast<double>(s.k));
        const double each = kernels.activations == moe::operand::i8     ? 2 * 4.5 / 254
                            : kernels.activations == moe::operand::bf16 ? 1. / 512
                                                                        : 1e-6;
        for (std::size_t i = 0; i < y.size(); ++i) REQUIRE(std::fabs(y[i] - expected[i]) < 5 * each * root);
      });
    }
  }
  TEST_CASE_TEMPLATE("a row's result is the same bits alone and among others on every rung", T, float, moe::bf16, moe::f16,
                     std::int8_t, int4_32, int4_128, moe::ternary) {
    const trial<T> all(39, 2, 300, testing::normals(39 * 300, 5), testing::normals(64 * 300, 6));
    on_every_rung<T>([&](const char* rung, const moe::packed_kernels& kernels) {
      CAPTURE(rung);
      if (widened<T>(39, rung)) return;
      const std::vector<float> y = all.product(kernels);
      for (const dim r : {0, 7, 8, 11, 12, 15, 16, 31, 32, 38}) {
        const trial<T> one(1, 2, 300, {all.x.begin() + r * 300, all.x.begin() + (r + 1) * 300}, all.w);
        const std::vector<float> alone = one.product(kernels);
        CHECK(std::equal(alone.begin(), alone.end(), y.begin() + r * 64));
      }
    });
  }
  TEST_CASE_TEMPLATE("a row that is not finite gives no finite result, and no other row does", T, float, moe::bf16, moe::f16,
                     std::int8_t, int4_32, int4_128, moe::ternary) {
    for (const float odd : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
      std::vector<float> x = testing::normals(20 * 70, 5);
      x[at(3 * 70 + 69)] = odd;
      const trial<T> t(20, 1, 70, x, testing::normals(32 * 70, 6));
      on_every_rung<T>([&](const char* rung, const moe::packed_kernels& kernels) {
        CAPTURE(rung);
        const std::vector<float> y = t.product(kernels);
        for (dim r = 0; r < 20; ++r)
          for (dim j = 0; j < 32; ++j) {
            REQUIRE(std::isfinite(y[at(r * 32 + j)]) == (r != 3));
            if (moe::packing<T>::scaled) REQUIRE(std::isnan(y[at(r * 32 + j)]) == (r == 3));
          }
      });
    }
  }
  TEST_CASE_TEMPLATE("an infinity among floats or halves gives the infinity, of the sign, that its product is", T, float,
                     moe::bf16, moe::f16) {
    constexpr float infinite = std::numeric_limits<float>::infinity();
    for (const dim rows : {1, 3, 20, 40}) {
      std::vector<float> x = testing::normals(rows * 70, 5), w = testing::normals(32 * 70, 6);
      x[at(rows / 2 * 70 + 69)] = -infinite;
      w[at(5 * 70 + 13)] = infinite;
      const trial<T> t(rows, 1, 70, x, w);
      on_every_rung<T>([&](const char* rung, const moe::packed_kernels& kernels) {
        CAPTURE(rung);
        CAPTURE(rows);
        const std::vector<float> y = t.product(kernels), wanted = [&] {
          const std::vector<double> exact = t.expected();
          return std::vector<float>(exact.begin(), exact.end());
        }();
        for (dim r = 0; r < rows; ++r)
          for (dim j = 0; j < 32; ++j) {
            const std::size_t i = at(r * 32 + j);
            if (std::isnan(wanted[i]))
              REQUIRE(std::isnan(y[i]));
            else if (r == rows / 2 || j == 5)
              REQUIRE(y[i] == wanted[i]);
            else
              REQUIRE(std::isfinite(y[i]));
          }
      });
    }
  }
  TEST_CASE("ternary weights with one that is not finite give nothing but NaN") {
    std::vector<float> w = testing::normals(32 * 200, 6);
    w[at(5 * 200 + 137)] = std::numeric_limits<float>::infinity();
    for (const dim rows : {1, 20}) {
      const trial<moe::ternary> t(rows, 1, 200, testing::normals(rows * 200, 5), w);
      on_every_rung<moe::ternary>([&](const char* rung, const moe::packed_kernels& kernels) {
        CAPTURE(rung);
        for (const float v : t.product(kernels)) REQUIRE(std::isnan(v));
      });
    }
  }
  TEST_CASE_TEMPLATE("a weight that is not finite, or too large for its scale, gives no finite result, and no other weight does",
                     T, float, moe::bf16, moe::f16, std::int8_t, int4_32, int4_128) {
    constexpr bool half_scale = std::same_as<T, int4_32>;
    for (const float odd : {std::numeric_limits<float>::quiet_NaN(), -std::numeric_limits<float>::infinity(), 6e5f}) {
      const bool finite = odd == 6e5f && !std::same_as<T, moe::f16> && !half_scale;
      std::vector<float> w = testing::normals(32 * 200, 6);
      w[at(5 * 200 + 137)] = odd;
      for (const dim rows : {1, 3, 20, 100}) {
        const trial<T> t(rows, 1, 200, testing::normals(rows * 200, 5), w);
        on_every_rung<T>([&](const char* rung, const moe::packed_kernels& kernels) {
          CAPTURE(rung);
          CAPTURE(odd);
          CAPTURE(rows);
          const std::vector<float> y = t.product(kernels);
          for (dim r = 0; r < rows; ++r)
            for (dim j = 0; j < 32; ++j) REQUIRE(std::isfinite(y[at(r * 32 + j)]) == (finite || j != 5));
        });
      }
    }
  }
  TEST_CASE_TEMPLATE("rows of zeros, or of numbers too small for a scale, give nothing", T, float, moe::bf16, std::int8_t,
                     int4_32, int4_128, moe::ternary) {
    for (const float tiny : {0.f, 1e-38f, 1e-44f}) {
      const std::vector<float> small(20 * 70, tiny), weights(32 * 70, tiny);
      for (const bool swapped : {false, true}) {
        const trial<T> t(20, 1, 70, swapped ? testing::normals(20 * 70, 5) : small,
                         swapped ? weights : testing::normals(32 * 70, 6));
        on_every_rung<T>([&](const char* rung, const moe::packed_kernels& kernels) {
          CAPTURE(rung);
          CAPTURE(tiny);
          for (const float v : t.product(kernels)) REQUIRE(std::fabs(v) <= 1e-34f);
        });
      }
    }
  }
  TEST_CASE("packed weights keep what their type promises") {
    const std::vector<float> w = testing::normals(32 * 300, 9);
    const auto worst = [&](auto type, auto bound) {
      using T = decltype(type);
      const trial<T> t(1, 1, 300, testing::normals(300, 1), w);
      for (dim r = 0; r < 32; ++r)
        for (dim k = 0; k < 300; ++k) REQUIRE(std::fabs(t.packed.weight(0, r, k) - w[at(r * 300 + k)]) <= bound(r, k));
    };
    const auto row_largest = [&](dim r, dim first, dim n) {
      float m = 0;
      for (dim k = first; k < std::min<dim>(first + n, 300); ++k) m = std::max(m, std::fabs(w[at(r * 300 + k)]));
      return m;
    };
    worst(float{}, [](dim, dim) { return 0.f; });
    worst(moe::bf16{}, [&](dim r, dim k) { return std::fabs(w[at(r * 300 + k)]) / 256; });
    worst(moe::f16{}, [&](dim r, dim k) { return std::fabs(w[at(r * 300 + k)]) / 2048 + 1e-7f; });
    worst(std::int8_t{}, [&](dim r, dim) { return row_largest(r, 0, 300) / 254 * 1.001f; });
    // 15 steps of max / 8 from the extreme: half a step within them, one next to its opposite; and the scale's own rounding.
    const auto step = [&](dim r, dim k, dim group, float slack) {
      const dim first = k / group * group;
      const float largest = row_largest(r, first, group), v = w[at(r * 300 + k)];
      bool extreme_is_positive = false;
      for (dim i = first; i < std::min<dim>(first + group, 300); ++i) extreme_is_positive |= w[at(r * 300 + i)] == largest;
      const bool next_to_opposite = (v > 0) != extreme_is_positive && std::fabs(v) > largest * 7.4f / 8;
      return largest / (next_to_opposite ? 8 : 16) * slack;
    };
    worst(int4_32{}, [&](dim r, dim k) { return step(r, k, 32, 1.01f); });
    worst(int4_128{}, [&](dim r, dim k) { return step(r, k, 128, 1.04f); });
    // Half a step up to the scale, and what is beyond it.
    const float scale = moe::packing<moe::ternary>::scale_of(moe::matrix_view<const float>{w.data(), 32, 300});
    worst(moe::ternary{}, [&](dim r, dim k) { return std::max(scale / 2, std::fabs(w[at(r * 300 + k)]) - scale) * 1.001f; });
  }
}
