// SPDX-License-Identifier: Apache-2.0
// The products of the CPU backend against Eigen's in double precision, and Eigen's matrices in and out by views.
#include <doctest/doctest.h>

#include <Eigen/Core>

#include <algorithm>
#include <type_traits>
#include <vector>

#include "moe/backend/cpu.hpp"
#include "moe/moe.hpp"
#include "support/layer_runs.hpp"
#include "support/testing.hpp"

namespace {

using moe::dim;
using moe::idx;
using backend = moe::host_backend<moe::arch::native, moe::serial>;

using matrix = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
using exact = Eigen::MatrixXd;

/// A row-major matrix of Eigen, or a block of one, as a view.
template <class Derived>
auto view(Eigen::DenseBase<Derived>& m) {
  auto& d = m.derived();
  return moe::matrix_view(d.data(), d.rows(), d.cols(), d.outerStride());
}
/// A view as an Eigen matrix; `T` is const where the view is.
template <class T>
auto map(moe::matrix_view<T> v) {
  using of = std::conditional_t<std::is_const_v<T>, const matrix, matrix>;
  return Eigen::Map<of, Eigen::Unaligned, Eigen::OuterStride<>>(v.data, v.rows, v.cols, Eigen::OuterStride<>(v.ld));
}

/// An m x n block inside of a larger matrix of random values.
struct block {
  block(dim m, dim n, std::uint64_t seed) : whole(m + 2, n + 5), before(), rows(m), cols(n) {
    const auto values = testing::normals(whole.size(), seed);
    std::copy(values.begin(), values.end(), whole.data());
    before = whole;
  }
  moe::matrix_view<float> v() { return moe::matrix_view<float>(whole.data() + whole.cols() + 3, rows, cols, whole.cols()); }
  moe::matrix_view<const float> c() { return v(); }
  exact start() const { return before.block(1, 3, rows, cols).cast<double>(); }

  matrix whole, before;
  dim rows, cols;
};

/// The block holds what is wanted, up to rounding, and nothing around it has changed.
void expect(block& got, const exact& want) {
  CHECK((map(got.c()).cast<double>() - want).cwiseAbs().maxCoeff() < 1e-5 * want.cwiseAbs().maxCoeff());
  matrix outside = got.whole;
  outside.block(1, 3, got.rows, got.cols) = got.before.block(1, 3, got.rows, got.cols);
  CHECK(outside == got.before);
}

struct sizes {
  dim m, n, k;
};
/// Odd, and each at times below, at or above a panel and a register block.
constexpr sizes products[] = {{1, 1, 1},    {1, 17, 64},  {3, 5, 7},     {8, 16, 32},   {13, 65, 31},
                              {72, 64, 33}, {73, 129, 9}, {5, 300, 257}, {131, 67, 70}, {257, 31, 513},
                              {2, 9, 1041}, {9, 21, 1041}};

/// Rows of three experts, the middle one without any; row r reads token (5 r + 2) mod tokens.
struct plan {
  explicit plan(dim rows) : offsets{0, static_cast<idx>(rows / 3), static_cast<idx>(rows / 3), static_cast<idx>(rows)} {
    for (idx r = 0; r < static_cast<idx>(rows); ++r) token.push_back((5 * r + 2) % static_cast<idx>(tokens));
  }
  moe::bank_rows rows() const { return {.offsets = offsets, .token = token}; }
  /// The rows of x that expert e reads.
  exact gathered(moe::matrix_view<const float> x, dim e) const {
    const idx first = offsets[static_cast<std::size_t>(e)], last = offsets[static_cast<std::size_t>(e) + 1];
    exact m(last - first, x.cols);
    for (idx r = first; r < last; ++r) m.row(r - first) = map(x).row(token[static_cast<std::size_t>(r)]).cast<double>();
    return m;
  }

  static constexpr dim tokens = 19, experts = 3;
  std::vector<idx> offsets, token;
};

}  // namespace

TEST_SUITE("backend/cpu") {
  TEST_CASE("products agree with Eigen's in double precision and stay within their block") {
    for (const sizes& of : products) {
      const dim m = of.m, n = of.n, k = of.k;
      CAPTURE(m);
      CAPTURE(n);
      CAPTURE(k);
      const auto on = testing::on<backend>();
      block a(m, k, 1), at(k, m, 2), b(k, n, 3), bt(n, k, 4);
      block nt(m, n, 5), nn(m, n, 6), tn(m, n, 7);
      gemm_nt(on, a.c(), bt.c(), nt.v());
      gemm_nn(on, a.c(), b.c(), nn.v());
      gemm_tn(on, at.c(), b.c(), tn.v());
      expect(nt, nt.start() + a.start() * bt.start().transpose());
      expect(nn, nn.start() + a.start() * b.start());
      expect(tn, tn.start() + at.start().transpose() * b.start());
    }
  }
  TEST_CASE("grouped products agree with Eigen's, expert by expert") {
    for (const sizes& of : products) {
      const dim rows = of.m, n = of.n, k = of.k;
      CAPTURE(rows);
      CAPTURE(n);
      CAPTURE(k);
      const auto on = testing::on<backend>();
      const plan p(rows);
      block x(plan::tokens, k, 1), g(plan::tokens, n, 2);
      block bt(plan::experts * n, k, 3), b(plan::experts * k, n, 4);
      block nt(rows, n, 5), nn(rows, n, 6), tn(plan::experts * k, n, 7);
      const auto xs = p.rows().gather(x.c()), gs = p.rows().gather(g.c());
      grouped_gemm_nt(on, p.rows(), xs, moe::stack(bt.c(), n), nt.v());
      grouped_gemm_nn(on, p.rows(), xs, moe::stack(b.c(), k), nn.v());
      grouped_gemm_tn(on, p.rows(), xs, gs, moe::stack(tn.v(), k));

      exact want_nt = nt.start(), want_nn = nn.start(), want_tn = tn.start();
      for (dim e = 0; e < plan::experts; ++e) {
        const exact xe = p.gathered(x.c(), e), ge = p.gathered(g.c(), e);
        const idx first = p.offsets[static_cast<std::size_t>(e)];
        want_nt.middleRows(first, xe.rows()) += xe * bt.start().middleRows(e * n, n).transpose();
        want_nn.middleRows(first, xe.rows()) += xe * b.start().middleRows(e * k, k);
        want_tn.middleRows(e * k, k) += xe.transpose() * ge;
      }
      expect(nt, want_nt);
      expect(nn, want_nn);
      expect(tn, want_tn);
    }
  }
  TEST_CASE("a layer reads and writes Eigen's matrices where they lie, and Eigen its weights") {
    constexpr moe::shape s{.tokens = 21, .d = 10, .f = 24, .experts = 4};
    using layer = testing::ffn_layer<2, backend>;
    testing::model<layer> m(layer(s), s.tokens, s.d, 8);
    m.forward();

    matrix tokens = matrix::Constant(s.tokens, s.d + 3, -7), outputs = tokens;
    auto x = tokens.middleCols(2, s.d);
    auto y = outputs.middleCols(1, s.d);
    x = map(m.x_view());
    const matrix read = tokens;
    m.net.forward(m.w, moe::matrix_view<const float>(view(x)), view(y), m.ctx, m.work);
    CHECK(y == map(m.y_view()));
    CHECK(tokens == read);
    CHECK((outputs.leftCols(1).array() == -7).all());
    CHECK((outputs.rightCols(2).array() == -7).all());

    map(m.w.experts.down).setZero();
    m.net.forward(m.w, moe::matrix_view<const float>(view(x)), view(y), m.ctx, m.work);
    CHECK(y.isZero(0));
  }
}
