// SPDX-License-Identifier: Apache-2.0
// Every kernel of the CPU backend, one tile at a time: against sums in double, against the scalar level, and whatever the
// rest of the tile is.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "moe/backend/cpu.hpp"
#include "support/testing.hpp"

namespace {

using moe::dim;
using moe::gathered;
using moe::idx;
using moe::matrix_view;
using moe::arch::native;
using moe::arch::scalar;

// Below, at and above the widths of vectors, register blocks and panels; the last two reach beyond a cut of the depth.
constexpr dim heights[] = {1, 2, 3, 5, 6, 7, 13, 49, 72}, widths[] = {1, 3, 4, 5, 15, 16, 17, 31, 64, 67},
              depths[] = {1, 2, 7, 8, 9, 15, 16, 17, 33, 127, 130, 1024, 1061};

/// Two operands in memory with gaps between rows, one read through tokens, and a result that is not empty at first.
struct operands {
  dim m, n, k;
  std::vector<float> left, right, start;
  std::vector<idx> token;

  /// left is [rows, across] with a gap of 3, right [rows, across] with a gap of 1, c [m, n] with a gap of 2
  operands(dim m_, dim n_, dim k_, dim left_rows, dim left_across, dim right_rows, dim right_across, bool whole)
      : m(m_),
        n(n_),
        k(k_),
        left(numbers((left_rows + 2) * (left_across + 3), 1, whole)),
        right(numbers(right_rows * (right_across + 1), 2, whole)),
        start(numbers(m * (n + 2), 3, whole)),
        token(static_cast<std::size_t>(left_rows)),
        across(left_across),
        rows(left_rows),
        side(right_across),
        other(right_rows) {
    for (std::size_t r = 0; r < token.size(); ++r)
      token[r] = static_cast<idx>((r * 5 + 2) % static_cast<std::size_t>(left_rows + 2));
  }
  gathered<float> a() const { return {{left.data(), rows + 2, across, across + 3}, token.data()}; }
  matrix_view<const float> b() const { return {right.data(), other, side, side + 1}; }
  matrix_view<float> c(std::vector<float>& memory) const { return {memory.data(), m, n, n + 2}; }

 private:
  dim across, rows, side, other;
  static std::vector<float> numbers(dim count, std::uint64_t seed, bool whole) {
    return whole ? testing::integers(count, seed, 3) : testing::normals(count, seed);
  }
};

enum class product { nt, packed, nn, tn };
constexpr product every_product[] = {product::nt, product::packed, product::nn, product::tn};
operands make(product p, dim m, dim n, dim k, bool whole) {
  if (p == product::nt || p == product::packed) return {m, n, k, m, k, n, k, whole};
  if (p == product::nn) return {m, n, k, m, k, k, n, whole};
  return {m, n, k, k, m, k, n, whole};
}
template <class Arch>
std::vector<float> run(Arch arch, product p, const operands& o) {
  std::vector<float> result = o.start;
  if (p == product::nt)
    gemm_nt(arch, o.a(), o.b(), o.c(result));
  else if (p == product::packed)
    gemm_nt_packed(arch, o.a(), o.b(), o.c(result));
  else if (p == product::nn)
    gemm_nn(arch, o.a(), o.b(), o.c(result));
  else
    gemm_tn(arch, o.a(), gathered<float>{o.b()}, o.k, o.c(result));
  return result;
}
/// Largest |c - wanted| over the largest sum of |terms|; infinite where the gap between rows was written to.
double error(product p, const operands& o, const std::vector<float>& got) {
  double worst = 0, scale = 1;
  for (dim i = 0; i < o.m; ++i)
    for (dim j = 0; j < o.n + 2; ++j) {
      const std::size_t at = static_cast<std::size_t>(i * (o.n + 2) + j);
      double sum = o.start[at], size = std::abs(sum);
      for (dim k = 0; j < o.n && k < o.k; ++k) {
        const double term = double{p == product::tn ? o.a().row(k)[i] : o.a().row(i)[k]} *
                            double{p == product::nt || p == product::packed ? o.b()(j, k) : o.b()(k, j)};
        sum += term;
        size += std::abs(term);
      }
      if (j >= o.n && got[at] != o.start[at]) return HUGE_VAL;
      worst = std::max(worst, std::abs(sum - got[at]));
      scale = std::max(scale, size);
    }
  return worst / scale;
}

template <class Arch>
void check_products(Arch arch) {
  for (const product p : every_product)
    for (const dim m : heights)
      for (const dim n : widths)
        for (const dim k : depths) {
          if (k > 200 && (m > 13 || n > 17)) continue;
          const operands o = make(p, m, n, k, false);
          const double e = error(p, o, run(arch, p, o));
          if (e < 1e-6) continue;
          CAPTURE(static_cast<int>(p));
          CAPTURE(m);
          CAPTURE(n);
          CAPTURE(k);
          CHECK(e < 1e-6);
        }
  CHECK(true);
}

/// A rule with two outputs and a sum over the row, as the backward of an activation has.
template <class Arch>
std::vector<float> activate(Arch arch, const std::vector<float>& z, const std::vector<float>& da) {
  std::vector<float> out(2 * z.size() + 1);
  for_each_lane(arch, static_cast<dim>(z.size()), [&](dim j, auto lane) {
    const auto v = lane.load(z.data() + j), d = lane.load(da.data() + j);
    lane.store(out.data() + j, moe::silu{}(v));
    lane.store(out.data() + z.size() + j, d * moe::gelu{}.slope(v));
    out.back() += lane.sum(d * moe::gelu_tanh{}(v));
  });
  return out;
}

}  // namespace

TEST_SUITE("backend/cpu/kernels") {
  TEST_CASE("products agree with sums in double, for odd sizes, gaps between rows and gathered rows") {
    check_products(native{});
    check_products(scalar{});
  }
  TEST_CASE("with whole numbers all products are exact, and so equal to those of the scalar level bit for bit") {
    for (const product p : every_product)
      for (const dim m : {1, 7, 13})
        for (const dim n : {3, 16, 67})
          for (const dim k : {1, 15, 33, 1061}) {
            const operands o = make(p, m, n, k, true);
            const auto got = run(native{}, p, o);
            CHECK(got == run(scalar{}, p, o));
            CHECK(error(p, o, got) == 0);
          }
  }
  TEST_CASE("an element of a product does not depend on the other rows and columns, nor on its own place") {
    for (const product p : every_product)
      for (const dim k : {9, 64, 1061}) {
        const operands o = make(p, 72, 67, k, false);
        const auto all = run(native{}, p, o);
        bool same = true;
        for (const dim i : {0, 5, 50, 71})
          for (const dim j : {0, 1, 16, 63, 66}) {
            float alone = o.start[static_cast<std::size_t>(i * 69 + j)];
            const matrix_view<float> c(&alone, 1, 1);
            auto a = o.a();
            auto b = o.b();
            if (p == product::tn)
              a.source = a.source.columns(i, 1);
            else
              a = a.from(i);
            b = p == product::nt || p == product::packed ? b.slice(j, 1) : b.columns(j, 1);
            if (p == product::nt)
              gemm_nt(native{}, a, b, c);
            else if (p == product::packed)
              gemm_nt_packed(native{}, a, b, c);
            else if (p == product::nn)
              gemm_nn(native{}, a, b, c);
            else
              gemm_tn(native{}, a, gathered<float>{b}, k, c);
            same = same && alone == all[static_cast<std::size_t>(i * 69 + j)];
          }
        CHECK(same);
      }
  }
  TEST_CASE("infinities reach the elements of their row and column alone") {
    operands o = make(product::nt, 7, 9, 37, false);
    o.right[3 * 38 + 36] = HUGE_VALF;  // b(3, 36), in the part of the row shorter than a vector
    const auto got = run(native{}, product::nt, o);
    for (dim i = 0; i < 7; ++i)
      for (dim j = 0; j < 9; ++j) CHECK(std::isinf(got[static_cast<std::size_t>(i * 11 + j)]) == (j == 3));
  }
  TEST_CASE("axpy and dot agree with double for every tail length") {
    for (dim n = 0; n < 150; ++n) {
      const auto x = testing::normals(n + 1, 1), y = testing::normals(n + 1, 2);
      auto z = y;
      axpy(native{}, 1.5f, x.data(), z.data(), n);
      double sum = 0, worst = 0;
      for (std::size_t j = 0; j < static_cast<std::size_t>(n); ++j) {
        sum += double{x[j]} * y[j];
        worst = std::max(worst, std::abs(z[j] - (1.5 * double{x[j]} + y[j])));
      }
      CHECK(z.back() == y.back());
      CHECK(worst < 1e-6);
      CHECK(std::abs(dot(native{}, x.data(), y.data(), n) - sum) < 1e-5);
    }
  }
  TEST_CASE(
      "an elementwise rule agrees with the scalar level for every tail length, and gives each element the same value "
      "wherever it stands") {
    const auto z = testing::normals(70, 3, 2), da = testing::normals(70, 4);
    const auto whole = activate(native{}, z, da);
    for (std::size_t n = 1; n < 70; ++n) {
      const std::vector<float> some(z.end() - static_cast<std::ptrdiff_t>(n), z.end()),
          d(da.end() - static_cast<std::ptrdiff_t>(n), da.end());
      const auto got = activate(native{}, some, d), want = activate(scalar{}, some, d);
      bool close = true;
      for (std::size_t j = 0; j < got.size(); ++j)
        close = close && std::abs(got[j] - want[j]) < 1e-5f * (1 + std::abs(want[j]));
      CHECK(close);
      CHECK(std::equal(got.begin(), got.begin() + static_cast<std::ptrdiff_t>(n),
                       whole.begin() + static_cast<std::ptrdiff_t>(70 - n)));
    }
  }
  TEST_CASE("the level is the widest that the compiler's flags allow") {
    const auto width = [] {
      dim w = 0;
      for_each_lane(native{}, 64, [&](dim j, auto) { w = w == 0 && j > 0 ? j : w; });
      return w;
    }();
#if defined(__AVX512F__)
    CHECK(width == 16);
#elif defined(__AVX__)
    CHECK(width == 8);
#elif defined(__SSE2__) || defined(__aarch64__)
    CHECK(width == 4);
#else
    CHECK(width >= 1);
#endif
    static_assert(std::is_base_of_v<scalar, native>, "what a level lacks falls back");
  }
}
