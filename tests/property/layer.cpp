// SPDX-License-Identifier: Apache-2.0
// What holds for a layer whatever its numbers, on the scalar backend. The tiles of a batch follow from its shape and plan,
// each element has one writer and one order of additions: so bits are equal for any executor and run to run. Another order
// of the tokens, or another cut of the batch, puts a row elsewhere in its tile, where the compiler may have fused other
// multiplications and additions: then y and dx agree to rounding, and gradients of weights sum in another order besides.
// With whole numbers whose sums stay below 2^24 nothing rounds, and the bits of all of them are equal.
#include <doctest/doctest.h>

#include <array>
#include <cmath>
#include <numeric>

#include "moe/moe.hpp"
#include "support/layer_runs.hpp"
#include "support/reference.hpp"
#include "support/testing.hpp"

namespace {

using moe::dim;
using moe::idx;

using testing::make_whole;
using testing::results;
using testing::run;
using testing::run_whole;

template <int K>
using ffn = testing::ffn_layer<K, moe::scalar<moe::serial>>;
using exact = testing::exact_layer<moe::scalar<moe::serial>>;

/// A pseudo-random choice of shape, odd ones as likely as even ones.
moe::shape some_shape(std::uint64_t seed, dim k) {
  const moe::rng random(seed);
  const auto up_to = [&](std::uint64_t counter, int n) {
    return static_cast<dim>(random(counter) % static_cast<std::uint64_t>(n));
  };
  return {.tokens = up_to(0, 90), .d = 1 + up_to(1, 40), .f = 1 + up_to(2, 90), .experts = k + up_to(3, 12)};
}

std::vector<dim> some_order(dim n, std::uint64_t seed) {
  const moe::rng random(seed);
  std::vector<dim> order(static_cast<std::size_t>(n));
  std::iota(order.begin(), order.end(), 0);
  for (std::size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[random(i) % i]);
  return order;
}
/// Row i of the result is row order[i] of v.
std::vector<float> rows_in(const std::vector<dim>& order, std::span<const float> v, dim cols) {
  std::vector<float> out;
  for (const dim r : order) out.insert(out.end(), v.begin() + r * cols, v.begin() + (r + 1) * cols);
  return out;
}
/// Tolerance 0 means the same bits.
void expect_near(const std::vector<float>& got, const std::vector<float>& want, double tolerance) {
  if (tolerance > 0)
    CHECK(reference::error(got, {want.begin(), want.end()}) < tolerance);
  else
    CHECK(got == want);
}
/// `blocks` blocks of equal length, in a new order.
void reorder(moe::matrix_view<float> m, const std::vector<dim>& order) {
  const dim rows = m.rows / static_cast<dim>(order.size());
  const auto moved = rows_in(order, {m.data, static_cast<std::size_t>(m.rows * m.cols)}, rows * m.cols);
  std::copy(moved.begin(), moved.end(), m.data);
}

}  // namespace

TEST_SUITE("layer") {
  TEST_CASE("every plan keeps its invariants, over random shapes") {
    const auto check_plan = [](auto layer_of, std::uint64_t seed, dim k) {
      const moe::shape s = some_shape(seed, k);
      CAPTURE(seed);
      testing::model m(layer_of(s), s.tokens, s.d, seed);
      m.forward();
      CHECK(moe::fault(m.ctx.plan) == nullptr);
      CHECK(m.ctx.plan.rows() == s.tokens * k);
    };
    for (std::uint64_t seed = 0; seed < 20; ++seed) {
      check_plan([](moe::shape s) { return ffn<1>(s); }, seed, 1);
      check_plan([](moe::shape s) { return ffn<2>(s); }, seed, 2);
    }
  }
  TEST_CASE("a permutation of tokens permutes y and dx and leaves the gradients of weights") {
    const auto permutes = [](auto& plain, auto& permuted, std::uint64_t seed, double tolerance) {
      CAPTURE(seed);
      const auto order = some_order(plain.tokens, seed);
      const auto x = rows_in(order, plain.x, plain.d), dy = rows_in(order, plain.dy, plain.d);
      std::copy(x.begin(), x.end(), permuted.x.begin());
      std::copy(dy.begin(), dy.end(), permuted.dy.begin());
      const results a = run(plain), b = run(permuted);
      expect_near(b.y, rows_in(order, a.y, plain.d), tolerance);
      expect_near(b.dx, rows_in(order, a.dx, plain.d), tolerance);
      expect_near(b.dw, a.dw, tolerance);
    };
    for (std::uint64_t seed = 0; seed < 8; ++seed) {
      const moe::shape s = some_shape(seed, 2);
      testing::model<ffn<2>> real(ffn<2>(s), s.tokens, s.d, seed), real_too(ffn<2>(s), s.tokens, s.d, seed);
      permutes(real, real_too, seed, 1e-5);
      testing::model<exact> whole(exact(s), s.tokens, s.d, seed), whole_too(exact(s), s.tokens, s.d, seed);
      make_whole(whole, seed);
      make_whole(whole_too, seed);
      permutes(whole, whole_too, seed, 0);
    }
  }
  TEST_CASE("renaming the experts changes no bit of y and renames their gradients") {
    const moe::shape s{.tokens = 40, .d = 13, .f = 21, .experts = 6};
    testing::model<ffn<2>> plain(ffn<2>(s), s.tokens, s.d, 1), renamed(ffn<2>(s), s.tokens, s.d, 1);
    const auto order = some_order(s.experts, 5);
    for (const auto m : {renamed.w.gate.w, renamed.w.experts.up, renamed.w.experts.gate, renamed.w.experts.down})
      reorder(m, order);
    const results a = run(plain), b = run(renamed);
    CHECK(b.y == a.y);
    expect_near(b.dx, a.dx, 1e-6);  // the gate's share sums over experts, in their order
    for (const auto m : {plain.dw.gate.w, plain.dw.experts.up, plain.dw.experts.gate, plain.dw.experts.down})
      reorder(m, order);
    CHECK(b.dw == std::vector<float>(plain.gradients().begin(), plain.gradients().end()));
  }
  TEST_CASE("two equal experts equal one") {
    for (std::uint64_t seed = 0; seed < 5; ++seed) {
      moe::shape s = some_shape(seed + 100, 2);
      s.experts = 1;
      testing::model<ffn<1>> one(ffn<1>(s), s.tokens, s.d, seed);
      s.experts = 2;
      testing::model<ffn<2>> two(ffn<2>(s), s.tokens, s.d, seed);
      const auto twice = [](moe::matrix_view<float> from, moe::matrix_view<float> to) {
        for (dim r = 0; r < to.rows; ++r) std::copy_n(from.row(r % from.rows), to.cols, to.row(r));
      };
      twice(one.w.experts.up, two.w.experts.up);
      twice(one.w.experts.gate, two.w.experts.gate);
      twice(one.w.experts.down, two.w.experts.down);
      const results a = run(one), b = run(two);
      expect_near(b.y, a.y, 1e-6);  // the two weights add to 1 but for one rounding
      expect_near(b.dx, a.dx, 1e-5);
    }
  }
  TEST_CASE("an expert that no token chooses changes nothing") {
    const moe::shape s{.tokens = 30, .d = 9, .f = 11, .experts = 4};
    testing::model<ffn<2>> m(ffn<2>(s), s.tokens, s.d, 3);
    for (dim t = 0; t < s.tokens; ++t) m.x[static_cast<std::size_t>(t * s.d)] = 1;
    for (dim c = 0; c < s.d; ++c) m.w.gate.w(2, c) = c == 0 ? -1e4f : 0.f;  // expert 2 scores -10000
    const results a = run(m);
    for (dim r = 2 * s.f; r < 3 * s.f; ++r)
      for (dim c = 0; c < s.d; ++c) m.w.experts.up(r, c) = 1e6f;
    std::fill(m.dx.begin(), m.dx.end(), 0.f);
    std::fill(m.gradients().begin(), m.gradients().end(), 0.f);
    CHECK(run(m) == a);
  }
  TEST_CASE("doubling dy doubles every gradient, bit for bit") {
    const moe::shape s{.tokens = 37, .d = 11, .f = 19, .experts = 5};
    testing::model<ffn<2>> m(ffn<2>(s), s.tokens, s.d, 4);
    results once = run(ffn<2>(s), s.tokens, 4);
    for (float& v : m.dy) v *= 2;
    for (auto* v : {&once.dx, &once.dw})
      for (float& g : *v) g *= 2;
    CHECK(run(m) == once);
  }

  TEST_CASE("all executors give equal bits, forward and backward, run to run") {
    for (const moe::shape s : {moe::shape{.tokens = 70, .d = 33, .f = 70, .experts = 5},
                               moe::shape{.tokens = 300, .d = 9, .f = 130, .experts = 3},
                               moe::shape{.tokens = 3, .d = 130, .f = 5, .experts = 8}}) {
      CAPTURE(s.tokens);
      testing::expect_same_bits_from_every_executor<moe::arch::scalar>(
          [&]<class B>(const B& backend) { return run(testing::ffn_layer<2, B>(s, backend), s.tokens, 1); });
    }
  }
  TEST_CASE("with whole numbers all executors give the exact result") {
    const moe::shape s{.tokens = 90, .d = 17, .f = 23, .experts = 5};
    testing::expect_same_bits_from_every_executor<moe::arch::scalar>(
        [&](const auto& backend) { return run_whole(backend, s, 7); });
  }
  TEST_CASE("with whole numbers y equals the double-precision reference bit for bit, and so do the gradients") {
    const moe::shape s{.tokens = 60, .d = 13, .f = 9, .experts = 5};
    testing::model<exact> m(exact(s), s.tokens, s.d, 8);
    make_whole(m, 8);
    const results got = run(m);
    const auto list = m.net.catalogue();
    reference::ffn_layer want(2, list, m.weights());
    want.act = {[](double z) { return z > 0 ? z : 0; }, [](double z) { return z > 0 ? 1. : 0.; }};
    want.weighs = false;
    const reference::matrix x(s.tokens, s.d, m.x), dy(s.tokens, s.d, m.dy);
    const auto g = want.backward(x, dy);
    CHECK(reference::error(got.y, want.forward(x).values) == 0);
    CHECK(reference::error(got.dx, g.x.values) == 0);
    const auto off = [&](const moe::slot& slot, const reference::matrix& wanted) {
      return reference::error(m.gradients().subspan(slot.offset / 4, slot.bytes / 4), wanted.values);
    };
    CHECK(off(list[0], g.gate_w) == 0);
    CHECK(off(list[1], g.up) == 0);
    CHECK(off(list[2], g.gate) == 0);
    CHECK(off(list[3], g.down) == 0);
  }

  TEST_CASE("a batch is the sum of its parts: exactly with whole numbers, to rounding otherwise") {
    const moe::shape s{.tokens = 150, .d = 15, .f = 20, .experts = 4};
    const auto in_parts = [&]<class L>(testing::model<L>& whole, dim cut, double tolerance) {
      CAPTURE(cut);
      std::fill(whole.dx.begin(), whole.dx.end(), 0.f);
      std::fill(whole.gradients().begin(), whole.gradients().end(), 0.f);
      const results all = run(whole);
      results parts{{}, {}, std::vector<float>(all.dw.size())};
      for (const auto& [first, n] : {std::pair{dim{0}, cut}, std::pair{cut, s.tokens - cut}}) {
        testing::model<L> part(whole.net, n, s.d, 0);
        std::copy(whole.weights().begin(), whole.weights().end(), part.weights().begin());
        std::copy_n(whole.x.begin() + first * s.d, n * s.d, part.x.begin());
        std::copy_n(whole.dy.begin() + first * s.d, n * s.d, part.dy.begin());
        const results r = run(part);
        parts.y.insert(parts.y.end(), r.y.begin(), r.y.end());
        parts.dx.insert(parts.dx.end(), r.dx.begin(), r.dx.end());
        for (std::size_t i = 0; i < r.dw.size(); ++i) parts.dw[i] += r.dw[i];
      }
      expect_near(parts.y, all.y, tolerance);
      expect_near(parts.dx, all.dx, tolerance);
      expect_near(parts.dw, all.dw, tolerance);
    };
    testing::model<exact> whole(exact(s), s.tokens, s.d, 6);
    make_whole(whole, 6);
    testing::model<ffn<2>> real(ffn<2>(s), s.tokens, s.d, 6);
    for (const dim cut : {dim{1}, dim{64}, dim{75}, dim{149}}) {
      in_parts(whole, cut, 0);
      in_parts(real, cut, 1e-5);
    }
  }
}
