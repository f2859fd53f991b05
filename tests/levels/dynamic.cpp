// SPDX-License-Identifier: Apache-2.0
// The kernels that are chosen at run time, at every level that this machine has.
#include <doctest/doctest.h>

#include <cmath>
#include <cstdlib>
#include <vector>

#include "moe/backend/cpu.hpp"
#include "moe/static_layer.hpp"
#include "support/layer_runs.hpp"
#include "support/levels.hpp"
#include "support/testing.hpp"

namespace {

using moe::cpu_level;
using moe::dim;
using moe::gathered;
using moe::idx;
using moe::matrix_view;
using moe::arch::dynamic;
using moe::arch::scalar;

using testing::at_every_level;

struct products {
  std::vector<float> nt, packed, nn, tn;
  friend bool operator==(const products&, const products&) = default;
};
/// Each with gaps between rows and rows read through tokens.
template <class Arch>
products multiply(Arch arch, dim m, dim n, dim k, bool whole) {
  const auto numbers = [&](dim count, std::uint64_t seed) {
    return whole ? testing::integers(count, seed, 3) : testing::normals(count, seed);
  };
  const dim most = std::max({m, n, k}) + 3;
  const auto left = numbers(most * most, 1), right = numbers(most * most, 2);
  std::vector<idx> token;
  for (dim r = 0; r < most; ++r) token.push_back(static_cast<idx>(r * 7 % most));
  const auto view = [&](const std::vector<float>& v, dim rows, dim cols) {
    return matrix_view<const float>{v.data(), rows, cols, most};
  };
  products p;
  for (std::vector<float>* v : {&p.nt, &p.packed, &p.nn, &p.tn}) *v = numbers(m * (n + 2), 3);
  const auto c = [&](std::vector<float>& v) { return matrix_view<float>{v.data(), m, n, n + 2}; };
  gemm_nt(arch, gathered<float>{view(left, most, k), token.data()}, view(right, n, k), c(p.nt));
  gemm_nt_packed(arch, gathered<float>{view(left, most, k), token.data()}, view(right, n, k), c(p.packed));
  gemm_nn(arch, gathered<float>{view(left, most, k), token.data()}, view(right, k, n), c(p.nn));
  gemm_tn(arch, gathered<float>{view(left, most, m), token.data()}, gathered<float>{view(right, k, n)}, k, c(p.tn));
  return p;
}
double distance(const std::vector<float>& a, const std::vector<float>& b) {
  double worst = 0;
  for (std::size_t i = 0; i < a.size(); ++i) worst = std::max(worst, std::abs(double{a[i]} - b[i]) / (1 + std::abs(b[i])));
  return worst;
}

}  // namespace

TEST_SUITE("backend/cpu/dynamic") {
  TEST_CASE("products agree with the scalar level at every level, for odd sizes, gaps between rows and gathered rows") {
    at_every_level([] {
      for (const dim m : {1, 2, 3, 5, 6, 7, 13, 40})
        for (const dim n : {1, 3, 4, 7, 8, 15, 16, 17, 31, 64, 67})
          for (const dim k : {1, 3, 7, 8, 9, 15, 16, 17, 33, 130}) {
            const products got = multiply(dynamic{}, m, n, k, false), want = multiply(scalar{}, m, n, k, false);
            const double worst = std::max({distance(got.nt, want.nt), distance(got.packed, want.packed),
                                           distance(got.nn, want.nn), distance(got.tn, want.tn)});
            if (worst < 1e-4) continue;
            CAPTURE(m);
            CAPTURE(n);
            CAPTURE(k);
            CHECK(worst < 1e-4);
          }
      CHECK(distance({1.f}, {2.f}) > 0.1);
    });
  }
  TEST_CASE("with whole numbers every level gives the same bits on every path") {
    at_every_level([] {
      for (const dim m : {1, 7, 40})
        for (const dim n : {3, 16, 67})
          for (const dim k : {1, 15, 33, 1061}) {
            const products got = multiply(dynamic{}, m, n, k, true);
            CHECK(got == multiply(scalar{}, m, n, k, true));
            CHECK(got.nt == got.packed);
          }
    });
  }
  TEST_CASE("axpy and dot agree with double for every tail length and write nothing beyond it") {
    at_every_level([] {
      for (dim n = 0; n < 150; ++n) {
        const auto x = testing::normals(n + 1, 1), y = testing::normals(n + 1, 2);
        auto z = y;
        axpy(dynamic{}, 1.5f, x.data(), z.data(), n);
        double sum = 0, worst = 0;
        for (std::size_t j = 0; j < static_cast<std::size_t>(n); ++j) {
          sum += double{x[j]} * y[j];
          worst = std::max(worst, std::abs(z[j] - (1.5 * double{x[j]} + y[j])));
        }
        CHECK(z.back() == y.back());
        CHECK(worst < 1e-6);
        CHECK(std::abs(dot(dynamic{}, x.data(), y.data(), n) - sum) < 1e-5);
      }
    });
  }
  TEST_CASE("infinities and NaN reach the elements of their row and column alone, at every level") {
    at_every_level([] {
      const dim m = 40, n = 19, k = 37;
      auto a = testing::normals(m * k, 1), b = testing::normals(n * k, 2);
      a[5 * k + 36] = NAN;
      b[3 * k + 36] = HUGE_VALF;
      std::vector<float> few(static_cast<std::size_t>(m * n)), many = few;
      const gathered<float> rows{{a.data(), m, k}};
      const matrix_view<const float> w{b.data(), n, k};
      gemm_nt(dynamic{}, rows, w, {few.data(), m, n});
      gemm_nt_packed(dynamic{}, rows, w, {many.data(), m, n});
      bool right = true;
      for (dim i = 0; i < m; ++i)
        for (dim j = 0; j < n; ++j)
          for (const float v : {few[static_cast<std::size_t>(i * n + j)], many[static_cast<std::size_t>(i * n + j)]})
            right = right && (i == 5 ? std::isnan(v) : j == 3 ? std::isinf(v) : std::isfinite(v));
      CHECK(right);
      // The same numbers as products of gradients: rows of a by columns of b, columns of a by columns of b.
      const gathered<float> columns{{b.data(), n, k}};
      std::vector<float> nn(static_cast<std::size_t>(m * n)), tn(static_cast<std::size_t>(k * k));
      const auto turned = testing::normals(k * n, 3);
      auto c = turned;
      c[36 * n + 3] = HUGE_VALF;
      gemm_nn(dynamic{}, rows, {c.data(), k, n}, {nn.data(), m, n});
      a[5 * k + 36] = -HUGE_VALF;
      gemm_tn(dynamic{}, rows, columns, n, {tn.data(), k, k});
      right = true;
      for (dim i = 0; i < m; ++i)
        for (dim j = 0; j < n; ++j) {
          const float v = nn[static_cast<std::size_t>(i * n + j)];
          right = right && (i == 5   ? std::isnan(v)
                            : j == 3 ? std::isinf(v) && (v > 0) == (a[static_cast<std::size_t>(i * k + 36)] > 0)
                                     : std::isfinite(v));
        }
      CHECK(right);
      right = true;
      for (dim i = 0; i < k; ++i)
        for (dim j = 0; j < k; ++j) {
          double wanted = 0;
          for (dim r = 0; r < n; ++r)
            wanted += double{a[static_cast<std::size_t>(r * k + i)]} * double{b[static_cast<std::size_t>(r * k + j)]};
          const float v = tn[static_cast<std::size_t>(i * k + j)];
          right = right && (std::isnan(wanted)   ? std::isnan(v)
                            : std::isinf(wanted) ? double{v} == wanted
                                                 : std::isfinite(v));
        }
      CHECK(right);
    });
  }
  TEST_CASE("a layer agrees with the scalar backend forward and backward, with few rows an expert and with many") {
    using reference = testing::ffn_layer<2, moe::scalar<>>;
    using layer = testing::ffn_layer<2, moe::cpu<dynamic>>;
    at_every_level([] {
      for (const dim T : {5, 150}) {
        const moe::shape s{.d = 37, .f = 83, .experts = 4};
        testing::model<layer> got(layer(s), T, s.d, 1);
        testing::model<reference> want(reference(s), T, s.d, 1);
        got.forward();
        got.backward();
        want.forward();
        want.backward();
        CHECK(distance(got.y, want.y) < 1e-4);
        const std::vector<float> g(got.gradients().begin(), got.gradients().end()),
            h(want.gradients().begin(), want.gradients().end());
        CHECK(distance(g, h) < 1e-4);
      }
    });
  }
  TEST_CASE("every form activates and differentiates as on plain floats, at every level and for every tail length") {
    const auto check = [](const auto& form) {
      for (dim n = 1; n < 70; ++n) {
        const auto gate = testing::normals(n, 1), up = testing::normals(n, 2), da = testing::normals(n, 3);
        const auto run = [&](auto arch) {
          const std::size_t size = static_cast<std::size_t>(n) + 1;  // one more, which stays as it was
          const std::vector<float> fives(size, 5);
          std::vector<std::vector<float>> r{fives, da, fives, fives};
          moe::activate(arch, form, gate.data(), up.data(), r[0].data(), n);
          const float share =
              moe::activate_backward(arch, form, 0.5f, gate.data(), up.data(), r[1].data(), r[2].data(), r[3].data(), n);
          r.push_back({share / static_cast<float>(n)});
          return r;
        };
        const auto got = run(dynamic{}), want = run(scalar{});
        for (std::size_t i = 0; i < got.size(); ++i) CHECK(distance(got[i], want[i]) < 2e-6);
      }
    };
    at_every_level([&] {
      check(moe::plain<moe::relu>{});
      check(moe::plain<moe::gelu>{});
      check(moe::glu<moe::silu>{});
      check(moe::glu<moe::gelu_tanh>{});
      check(moe::gpt_oss_glu{});
      check(moe::clamped<moe::glu<moe::silu>>{{}, 1.f});
    });
  }
#if defined(__unix__)
  TEST_CASE("MOE_CPU_LEVEL says what runs, and the report says so") {
    testing::highest_level();
    const moe::cpu_level_report now = moe::report_cpu_level();
    if (const char* wanted = std::getenv("MOE_CPU_LEVEL"))
      CHECK(name(now.level) == wanted);
    else
      CHECK(now.level == now.machine);
  }
  TEST_CASE("a backend cannot be made, nor a static layer loaded, where MOE_CPU_LEVEL asks for what there is not") {
    const char* before = std::getenv("MOE_CPU_LEVEL");
    const std::string kept = before ? before : "";
    setenv("MOE_CPU_LEVEL", "fastest", 1);
    CHECK_THROWS_AS(moe::cpu<dynamic>{}, moe::level_error);
    static moe::static_layer<2, 2, 2, 1> fixed;
    CHECK_THROWS_AS(fixed.load({}, {}), moe::level_error);
    setenv("MOE_CPU_LEVEL", "scalar", 1);
    CHECK_NOTHROW(moe::cpu<dynamic>{});
    before ? setenv("MOE_CPU_LEVEL", kept.c_str(), 1) : unsetenv("MOE_CPU_LEVEL");
  }
#endif
}
