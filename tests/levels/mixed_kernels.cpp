// SPDX-License-Identifier: Apache-2.0
// Every level's products with bf16 weights, one tile at a time, and those of AMX on emulated tiles.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <utility>
#include <vector>

#include "support/levels.hpp"
#include "support/mixed.hpp"

namespace {

using moe::bf16;
using moe::dim;
using moe::gathered;
using moe::idx;
using moe::matrix_view;

enum class product { nt, packed, nn, tn };
constexpr product every_product[] = {product::nt, product::packed, product::nn, product::tn};

/// Rows in memory with gaps between them, the left ones read through tokens; c has a gap of 2.
struct trial {
  product what;
  dim m, n, k, left_cols = what == product::tn ? m : k, left_rows = what == product::tn ? k : m,
               right_cols = what == product::nt || what == product::packed ? k : n,
               right_rows = what == product::nt || what == product::packed ? n : k;
  std::vector<float> left, right, start;
  std::vector<bf16> weights{};
  std::vector<idx> token{};

  trial(product p, dim rows, dim cols, dim depth, bool whole) : what(p), m(rows), n(cols), k(depth) {
    const auto numbers = [&](dim count, std::uint64_t seed) {
      return whole ? testing::integers(count, seed, 3) : testing::normals(count, seed);
    };
    left = numbers((left_rows + 2) * (left_cols + 3), 1);
    right = numbers(right_rows * (right_cols + 1), 2);
    start = numbers(m * (n + 2), 3);
    for (float& v : right) {
      weights.push_back(bf16(v));
      if (what != product::tn) v = static_cast<float>(weights.back());
    }
    for (dim r = 0; r < left_rows; ++r) token.push_back(static_cast<idx>((r * 5 + 2) % (left_rows + 2)));
  }
  gathered<float> a() const { return {{left.data(), left_rows + 2, left_cols, left_cols + 3}, token.data()}; }
  matrix_view<const float> b() const { return {right.data(), right_rows, right_cols, right_cols + 1}; }
  matrix_view<const bf16> w() const { return {weights.data(), right_rows, right_cols, right_cols + 1}; }

  std::vector<float> run(const moe::arch::mixed_kernels& kernels) const {
    std::vector<float> result = start;
    const matrix_view<float> c{result.data(), m, n, n + 2};
    add(kernels, k, c);
    return result;
  }
  /// c += the product, a gradient over `depth` rows; rows are rounded where the level does not take them as they are.
  void add(const moe::arch::mixed_kernels& kernels, dim depth, matrix_view<float> c) const {
    if (what == product::nt) return kernels.gemm_nt(a(), w(), c);
    if (!kernels.halves.round) {
      if (what == product::packed)
        kernels.gemm_nt_packed(a(), w(), c);
      else if (what == product::nn)
        kernels.gemm_nn(a(), w(), c);
      else
        kernels.gemm_tn(a(), gathered<float>{b()}, depth, c);
      return;
    }
    std::vector<bf16> memory[2];
    const auto rounded = [&](gathered<float> from, dim rows, int i) {
      const dim gap = 5;
      memory[i].assign(static_cast<std::size_t>(rows * (from.cols() + gap)), bf16(NAN));
      const matrix_view<bf16> to{memory[i].data(), rows, from.cols(), from.cols() + gap};
      for (dim r = 0; r < rows; ++r) kernels.halves.round(from.row(r), to.row(r), to.cols);
      return matrix_view<const bf16>(to);
    };
    const moe::arch::half_kernels& halves = kernels.halves;
    const auto left = rounded(a(), what == product::tn ? depth : m, 0);
    if (what == product::tn) {
      const moe::buffer room(static_cast<std::size_t>(halves.gradient_room(m, n)));
      const auto right = rounded(gathered<float>{b()}, depth, 1);
      std::vector<float> twin(static_cast<std::size_t>(m * n));  // of the same rows: the same gradient
      const matrix_view<float> second{twin.data(), m, n};
      for (dim r = 0; r < m; ++r) std::copy_n(c.row(r), n, second.row(r));
      const moe::buffer fresh(static_cast<std::size_t>(2 * m * n) * sizeof(float));  // whole lines where n has them
      const matrix_view<float> zeros{fresh.as<float>().data(), m, n}, garbage{zeros.data + m * n, m, n};
      std::fill_n(garbage.data, m * n, NAN);
      halves.gemm_tn(left, right, zeros, {}, {}, true, room.bytes().data());
      halves.gemm_tn(left, right, garbage, {}, {}, false, room.bytes().data());
      CHECK(testing::same_bits({zeros.data, fresh.size() / 8}, {garbage.data, fresh.size() / 8}));
      halves.gemm_tn(left, right, c, left, second, true, room.bytes().data());
      for (dim r = 0; r < m; ++r)
        CHECK(std::memcmp(second.row(r), c.row(r), static_cast<std::size_t>(n) * sizeof(float)) == 0);
      return;
    }
    // Sums start from nothing or are added to, in rows with room for whole panels; results also go to rows of whole lines or
    // with gaps.
    const moe::buffer room(static_cast<std::size_t>(halves.product_room(n)));
    const dim stride = (n + 31) / 32 * 32 + 3;
    const std::vector<float> old(c.data, c.data + (m - 1) * c.ld + n);
    const matrix_view<const float> before{old.data(), m, n, c.ld};
    const auto multiply = [&](std::vector<float> sums, bool more, matrix_view<float> out) {
      const matrix_view<float> to{sums.data(), m, n, stride};
      for (dim r = 0; more && r < m; ++r) std::copy_n(before.row(r), n, to.row(r));
      if (what == product::packed)
        halves.gemm_nt(left, w(), to, more, out, w(), room.bytes().data());
      else
        halves.gemm_nn(left, w(), to, more, out, room.bytes().data());
      return sums;
    };
    const std::vector<float> none(static_cast<std::size_t>(m * stride), NAN);
    const moe::buffer past(static_cast<std::size_t>(m * (stride - 3)) * sizeof(float));
    const matrix_view<float> lines{past.as<float>().data(), m, n, stride - 3};
    const std::vector<float> alone = multiply(none, false, lines), again = multiply(none, false, {}),
                             added = multiply(none, true, c);
    for (dim r = 0; r < m; ++r) {
      const float *sums = alone.data() + r * stride, *sums_again = again.data() + r * stride;
      REQUIRE(std::memcmp(sums, sums_again, static_cast<std::size_t>(n) * sizeof(float)) == 0);
      REQUIRE(std::memcmp(sums, lines.row(r), static_cast<std::size_t>(n) * sizeof(float)) == 0);
      for (dim j = 0; j < n; ++j) {
        const auto at = static_cast<std::size_t>(r * stride + j);
        REQUIRE_FALSE(std::abs(alone[at] + before(r, j) - added[at]) > 1e-3);
      }
    }
  }
  /// What element (i, j) of c should be, and the sum of its |terms|.
  std::pair<double, double> wanted(dim i, dim j) const {
    const bool along = what == product::nt || what == product::packed;
    double sum = start[static_cast<std::size_t>(i * (n + 2) + j)], size = std::abs(sum);
    for (dim p = 0; j < n && p < k; ++p) {
      const double term =
          double{what == product::tn ? a().row(p)[i] : a().row(i)[p]} * double{along ? b()(j, p) : b()(p, j)};
      sum += term;
      size += std::abs(term);
    }
    return {sum, size};
  }
  /// Largest |c - wanted| of an element over the sum of its |terms|; infinite where the gap between rows was written to.
  double error(const std::vector<float>& got) const {
    double worst = 0;
    for (dim i = 0; i < m; ++i)
      for (dim j = 0; j < n + 2; ++j) {
        const auto at = static_cast<std::size_t>(i * (n + 2) + j);
        const auto [sum, size] = wanted(i, j);
        if (j >= n && got[at] != start[at]) return HUGE_VAL;
        if (sum != got[at]) worst = std::max(worst, std::abs(sum - got[at]) / size);
      }
    return worst;
  }
};

/// f(name, kernels, rounds) for every rung that this machine can run, tiles emulated where it has none. `rounds`: floats are
/// rounded to bf16.
template <class F>
void on_every_rung(F f) {
  f("scalar", mixed_kernels_of(moe::arch::scalar{}), false);
#if defined(MOE_X86)
  const moe::cpu_level machine = testing::highest_level();
  if (includes(machine, moe::cpu_level::avx2)) f("avx2", mixed_kernels_of(moe::arch::avx2{}), false);
  if (includes(machine, moe::cpu_level::avx512)) {
    f("avx512", mixed_kernels_of(moe::arch::avx512{}), false);
    f("amx, emulated", mixed_kernels_of(moe::arch::amx{}, testing::emulated_tiles{}), true);
  }
  if (includes(machine, moe::cpu_level::avx512_bf16)) f("avx512_bf16", mixed_kernels_of(moe::arch::avx512_bf16{}), true);
  if (includes(machine, moe::cpu_level::amx)) f("amx", mixed_kernels_of(moe::arch::amx{}), true);
#elif defined(__aarch64__)
  f("neon", mixed_kernels_of(moe::arch::neon{}), false);
#endif
}

// Below, at and above vectors, tiles, panels and the cuts of the depth.
constexpr dim heights[] = {1, 5, 16, 17, 33, 72}, widths[] = {1, 4, 15, 16, 31, 33, 64, 67},
              depths[] = {1, 2, 31, 32, 33, 130, 257, 530};

}  // namespace

TEST_SUITE("backend/cpu/mixed") {
  TEST_CASE("whole numbers give exact sums on every rung, for odd sizes, gaps between rows and gathered rows") {
    on_every_rung([](const char* rung, const moe::arch::mixed_kernels& kernels, bool) {
      CAPTURE(rung);
      for (const product p : every_product)
        for (const dim m : heights)
          for (const dim n : widths)
            for (const dim k : depths) {
              if (k > 200 && m * n > 600) continue;
              const trial t(p, m, n, k, true);
              CAPTURE(static_cast<int>(p));
              CAPTURE(m);
              CAPTURE(n);
              CAPTURE(k);
              REQUIRE(t.error(t.run(kernels)) == 0);
            }
    });
#if defined(MOE_X86)
    CHECK(testing::emulated_tiles::faults == 0);
#endif
  }
  TEST_CASE("tiles taller than a tile of a layer give exact sums") {
    on_every_rung([](const char* rung, const moe::arch::mixed_kernels& kernels, bool) {
      CAPTURE(rung);
      for (const product p : {product::packed, product::nn, product::tn}) {
        const trial tall(p, 347, 35, 37, true), wide(p, 20, 530, 9, true);
        CHECK(tall.error(tall.run(kernels)) == 0);
        CHECK(wide.error(wide.run(kernels)) == 0);
      }
    });
  }
  TEST_CASE("products stay within the error of their operands on every rung") {
    on_every_rung([](const char* rung, const moe::arch::mixed_kernels& kernels, bool rounds) {
      CAPTURE(rung);
      bool coarse = false;
      for (const product p : every_product)
        for (const dim k : {1, 33, 130, 530}) {
          const trial t(p, 37, 35, k, false);
          const double error = t.error(t.run(kernels));
          // Weights are exact. A float rounded to bf16 is off by 2^-8 of itself at most, so each term by that, and by twice
          // as much in a gradient, where both operands are rounded; else the additions alone err.
          const bool halves = rounds && p != product::nt;
          CAPTURE(static_cast<int>(p));
          CAPTURE(k);
          CHECK(error < (!halves ? 1e-6 : p == product::tn ? 2.01 / 256 : 1. / 256));
          coarse = coarse || error > 1e-3;
        }
      CHECK(coarse == rounds);
    });
  }
  TEST_CASE("an element does not depend on the other rows and columns, on any rung") {
    on_every_rung([](const char* rung, const moe::arch::mixed_kernels& kernels, bool) {
      CAPTURE(rung);
      for (const product p : every_product) {
        const trial t(p, 40, 70, 300, false);
        const std::vector<float> all = t.run(kernels);
        for (const dim i : {0, 17, 39}) {
          trial one = t;
          one.m = 1;
          one.start.assign(t.start.begin() + i * 72, t.start.begin() + (i + 1) * 72);
          if (p == product::tn)
            one.left.erase(one.left.begin(), one.left.begin() + i);
          else
            one.token = {t.token[static_cast<std::size_t>(i)]};
          const std::vector<float> alone = one.run(kernels);
          CAPTURE(static_cast<int>(p));
          CHECK(std::equal(alone.begin(), alone.end(), all.begin() + i * 72));
        }
      }
    });
  }
  TEST_CASE(
      "NaN and infinity reach the elements of their row or column alone, with the sign of the product, on every rung") {
    constexpr float infinite = std::numeric_limits<float>::infinity();
    for (const float odd :
         {std::numeric_limits<float>::quiet_NaN(), infinite, -infinite, __builtin_bit_cast(float, 0x7fffffffu)})
      on_every_rung([odd](const char* rung, const moe::arch::mixed_kernels& kernels, bool) {
        CAPTURE(rung);
        CAPTURE(odd);
        for (const product p : every_product)
          for (const bool left : {true, false}) {
            CAPTURE(static_cast<int>(p));
            CAPTURE(left);
            trial t(p, 40, 19, 37, false);
            if (left) {  // the last term of row 5
              float* row = t.left.data() + t.token[p == product::tn ? 36 : 5] * (t.left_cols + 3);
              row[p == product::tn ? 5 : 36] = odd;
            } else {  // a term in the middle of column 7
              const bool along = p == product::nt || p == product::packed;
              const auto at = static_cast<std::size_t>(along ? 7 * (t.right_cols + 1) + 20 : 20 * (t.right_cols + 1) + 7);
              t.right[at] = odd;
              t.weights[at] = bf16(odd);
            }
            const std::vector<float> y = t.run(kernels);
            for (dim i = 0; i < 40; ++i)
              for (dim j = 0; j < 19; ++j) {
                const double wanted = t.wanted(i, j).first;
                const float got = y[static_cast<std::size_t>(i * 21 + j)];
                REQUIRE(std::isfinite(wanted) == (left ? i != 5 : j != 7));
                if (std::isnan(wanted))
                  REQUIRE(std::isnan(got));
                else if (std::isinf(wanted))
                  REQUIRE(double{got} == wanted);
                else
                  REQUIRE(std::isfinite(got));
              }
          }
      });
  }
  TEST_CASE("nothing is added over no rows") {
    on_every_rung([](const char* rung, const moe::arch::mixed_kernels& kernels, bool) {
      CAPTURE(rung);
      const trial t(product::tn, 33, 17, 1, false);
      std::vector<float> result = t.start;
      t.add(kernels, 0, {result.data(), 33, 17, 19});
      CHECK(result == t.start);
    });
  }
}
