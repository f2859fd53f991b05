// SPDX-License-Identifier: Apache-2.0
#include <doctest/doctest.h>

#include "moe/backend/scalar.hpp"
#include "moe/gate/cosine.hpp"
#include "moe/gate/linear.hpp"
#include "moe/gate/noisy.hpp"
#include "support/reference.hpp"
#include "support/testing.hpp"

namespace {

using moe::dim;
using reference::matrix;
using reference::vec;
using backend = moe::scalar<moe::serial>;

/// A gate alone, with flat weights and gradients. Scratch is as large as the gate says.
template <class G>
struct gating {
  G gate;
  moe::shape s;
  std::vector<moe::slot> list;
  moe::buffer params, grads, memory, scratch_memory;
  moe::arena params_mem, grads_mem, mem, scratch;
  typename G::weights w;
  moe::detail::weights_grad<G> dw;
  typename G::context ctx{};
  std::vector<float> x;
  std::vector<float> dx, scores;
  bool training;

  gating(G g, dim T, dim d, dim E, std::uint64_t seed, bool trains = true)
      : gate(g),
        s{.tokens = T, .d = d, .experts = E},
        list(catalogue()),
        params(bytes()),
        grads(bytes()),
        memory(context_bytes()),
        scratch_memory(scratch_bytes()),
        params_mem(params.bytes()),
        grads_mem(grads.bytes()),
        mem(memory.bytes()),
        scratch(scratch_memory.bytes()),
        w(moe::detail::make_weights(gate, s, params_mem)),
        dw(moe::detail::make_gradients(gate, s, grads_mem)),
        dx(at(T * d)),
        scores(at(T * E)),
        training(trains) {
    moe::detail::check_shape(gate, s);
    moe::detail::check_weights(gate, w, s);
    if (training) ctx = moe::detail::make_context(gate, s, mem);
    x = testing::normals(T * d, seed);
    testing::randomise(list, params.as<float>(), seed + 1);
  }
  moe::call<backend> on() {
    static const backend b{};
    return {b, scratch, s, training, moe::rng(5)};
  }
  moe::matrix_view<const float> x_view() const { return {x.data(), s.tokens, s.d}; }
  gating& forward() {
    gate.forward(on(), w, x_view(), {scores.data(), s.tokens, s.experts}, ctx);
    return *this;
  }
  gating& backward(const std::vector<float>& dscores) {
    gate.backward(on(), w, x_view(), ctx, {dscores.data(), s.tokens, s.experts}, {dx.data(), s.tokens, s.d}, dw);
    return *this;
  }
  /// A tensor in double, and its gradient.
  matrix value(const std::string& name) const { return reference::tensor(list, params.as<float>(), name); }
  vec gradient(const std::string& name) const { return reference::tensor(list, grads.as<float>(), name).values; }
  matrix x_values() const {
    matrix m(s.tokens, s.d);
    for (std::size_t i = 0; i < x.size(); ++i) m.values[i] = static_cast<float>(x[i]);
    return m;
  }

  static std::size_t at(dim i) { return static_cast<std::size_t>(i); }

 private:
  std::vector<moe::slot> catalogue() const {
    std::vector<moe::slot> all;
    moe::arena names(all);
    (void)moe::detail::make_weights(gate, s, names);
    return all;
  }
  std::size_t bytes() const {
    moe::arena count;
    (void)moe::detail::make_weights(gate, s, count);
    return moe::padded(count);
  }
  std::size_t context_bytes() const {
    moe::arena count;
    (void)moe::detail::make_context(gate, s, count);
    return moe::padded(count);
  }
  std::size_t scratch_bytes() const {
    moe::arena count;
    moe::detail::count_scratch(gate, count, s);
    moe::detail::count_backward_scratch(gate, count, s);
    return moe::padded(count);
  }
};

double error(const vec& got, const vec& want) {
  const std::vector<float> v(got.begin(), got.end());
  return reference::error(v, want);
}

/// Scores, and the gradients of x and of the named tensors for the loss <g, scores>, against a reference: of_scores(x,
/// tensors).
template <class G, class Scores>
void expect_reference(gating<G>& m, const std::vector<std::string>& names, Scores of_scores) {
  const auto g = testing::normals(m.s.tokens * m.s.experts, 88);
  m.forward().backward(g);
  matrix x = m.x_values();
  std::vector<matrix> w;
  for (const std::string& name : names) w.push_back(m.value(name));
  CHECK(reference::error(m.scores, of_scores(x, w).values) < 2e-6);
  const matrix coefficient(m.s.tokens, m.s.experts, g);
  const auto loss = [&] { return reference::inner(of_scores(x, w), coefficient); };
  CHECK(reference::error(m.dx, reference::gradient(x.values, loss)) < 1e-5);
  for (std::size_t i = 0; i < names.size(); ++i) {
    CAPTURE(names[i]);
    CHECK(error(m.gradient(names[i]), reference::gradient(w[i].values, loss)) < 1e-5);
  }
  // Once more: gradients add.
  const auto dx = m.dx;
  m.backward(g);
  for (std::size_t i = 0; i < dx.size(); ++i) CHECK(m.dx[i] == doctest::Approx(2 * dx[i]).epsilon(1e-4));
}
const auto linear = [](const matrix& x, const std::vector<matrix>& w) {
  return reference::linear_gate(w[0], w.size() > 1 ? w[1].values : vec{})(x);
};

struct given_noise {
  const float* values;
  float operator()(const moe::rng&, std::uint64_t counter) const noexcept { return values[counter]; }
};

}  // namespace

TEST_SUITE("gate/linear") {
  static_assert(moe::TrainableGate<moe::linear_gate, backend>);
  static_assert(moe::TrainableGate<moe::biased_linear_gate, backend>);

  TEST_CASE("scores and gradients without and with a bias") {
    gating<moe::linear_gate> plain({}, 9, 13, 5, 1);
    expect_reference(plain, {"w"}, linear);
    gating<moe::biased_linear_gate> biased({}, 70, 6, 4, 2);
    expect_reference(biased, {"w", "bias"}, linear);
  }
  TEST_CASE("frozen parts are not computed, and no token is no work") {
    gating<moe::biased_linear_gate> m({}, 4, 3, 2, 5);
    m.dw = {};
    m.forward();
    m.gate.backward(m.on(), m.w, m.x_view(), m.ctx, {m.scores.data(), 4, 2}, {}, m.dw);
    for (const float v : m.grads.as<float>()) CHECK(v == 0);
    gating<moe::biased_linear_gate> none({}, 0, 3, 2, 6);
    none.forward().backward({});
    for (const double v : none.gradient("bias")) CHECK(v == 0);
  }
  TEST_CASE("weights of another shape are refused") {
    const moe::shape s{.tokens = 1, .d = 3, .experts = 2};
    std::vector<float> v(8);
    CHECK_THROWS_WITH_AS(moe::linear_gate{}.check({{v.data(), 3, 2}, {}}, s),
                         "linear_gate: w is 3 x 2, expected 2 x 3 (E x d)", moe::shape_error);
    CHECK_THROWS_WITH_AS(moe::biased_linear_gate{}.check({{v.data(), 2, 3}, {v.data(), 1, 2}}, s),
                         "linear_gate: bias is 1 x 2, expected 2 x 1 (E x 1)", moe::shape_error);
  }
  TEST_CASE("only the bias starts at zero") {
    gating<moe::biased_linear_gate> m({}, 1, 3, 2, 1);
    REQUIRE(m.list.size() == 2);
    CHECK(m.list[0].start == moe::initial::fan_in);
    CHECK(m.list[1].name == "bias");
    CHECK(m.list[1].start == moe::initial::zeros);
  }
}

TEST_SUITE("gate/noisy") {
  static_assert(moe::TrainableGate<moe::noisy<>, backend>);
  static_assert(moe::TrainableGate<moe::noisy<moe::cosine_gate>, backend>);

  TEST_CASE("given noise is scaled by softplus(x w^T) + 0.01, and the gradient passes through the scale") {
    const auto noise = testing::normals(11 * 4, 7);
    gating m(moe::noisy<moe::linear_gate, given_noise>{.noise = {noise.data()}}, 11, 6, 4, 8);
    expect_reference(m, {"w", "noise.w"}, [&](const matrix& x, const std::vector<matrix>& w) {
      matrix scores = reference::linear_gate(w[0])(x);
      const matrix spread = reference::linear_gate(w[1])(x);
      for (std::size_t i = 0; i < scores.values.size(); ++i)
        scores.values[i] += noise[i] * (std::log(1 + std::exp(spread.values[i])) + 0.01);
      return scores;
    });
  }
  TEST_CASE("the noise is number t E + e of the call's generator") {
    gating<moe::noisy<>> noisy({}, 5, 6, 4, 9);
    gating<moe::linear_gate> plain({}, 5, 6, 4, 9);
    std::copy_n(noisy.w.inner.w.data, 24, plain.w.w.data);
    std::fill_n(noisy.w.w.data, 24, 0.f);  // as it starts: deviation log 2 + 0.01
    noisy.forward();
    plain.forward();
    for (std::size_t i = 0; i < 20; ++i)
      CHECK(noisy.scores[i] == doctest::Approx(plain.scores[i] + moe::rng(5).normal(i) * (std::log(2.f) + 0.01f)));
  }
  TEST_CASE("noise acts while training alone") {
    gating<moe::noisy<>> training({}, 5, 6, 4, 10), inference({}, 5, 6, 4, 10, false);
    gating<moe::linear_gate> plain({}, 5, 6, 4, 10);
    std::copy_n(inference.w.inner.w.data, 24, plain.w.w.data);
    CHECK(inference.forward().scores == plain.forward().scores);
    CHECK(training.forward().scores != plain.scores);
  }
  TEST_CASE("a score that is not eligible stays so, and a wide spread is a number") {
    gating<moe::noisy<>> m({}, 1, 2, 2, 11);
    m.x = {-std::numeric_limits<float>::infinity(), 0};
    std::copy_n(std::vector<float>{1, 0, 0, 0}.data(), 4, m.w.inner.w.data);
    std::fill_n(m.w.w.data, 4, 0.f);
    m.forward();
    CHECK_FALSE(m.scores[0] > -std::numeric_limits<float>::infinity());
    gating<moe::noisy<>> wide({}, 1, 1, 2, 12);
    wide.x = {1000};
    std::copy_n(std::vector<float>{1, -1}.data(), 2, wide.w.w.data);
    wide.forward().backward({1, 1});
    for (const float v : wide.scores) CHECK(std::isfinite(v));
    for (const float v : wide.dx) CHECK(std::isfinite(v));
  }
}

TEST_SUITE("gate/cosine") {
  static_assert(moe::TrainableGate<moe::cosine_gate, backend>);

  const auto cosine = [](const matrix& x, const std::vector<matrix>& w) {
    const matrix u = reference::linear_gate(w[0])(x);
    const double scale = std::min(std::exp(w[2](0, 0)), 100.0);
    const auto length = [](const matrix& m, dim r) {
      double square = 0;
      for (dim j = 0; j < m.cols; ++j) square += m(r, j) * m(r, j);
      return std::max(std::sqrt(square), 1e-12);
    };
    matrix scores(x.rows, w[1].rows);
    for (dim t = 0; t < x.rows; ++t)
      for (dim e = 0; e < w[1].rows; ++e) {
        for (dim j = 0; j < u.cols; ++j) scores(t, e) += u(t, j) * w[1](e, j);
        scores(t, e) *= scale / (length(u, t) * length(w[1], e));
      }
    return scores;
  };
  const std::vector<std::string> tensors{"project", "directions", "log_scale"};

  TEST_CASE("scores and all gradients") {
    gating m(moe::cosine_gate{.width = 7}, 21, 5, 4, 13);
    expect_reference(m, tensors, cosine);
  }
  TEST_CASE("the scale is capped at 100, and carries no gradient beyond") {
    gating m(moe::cosine_gate{.width = 7}, 9, 5, 4, 14);
    m.w.log_scale(0, 0) = 6;
    expect_reference(m, tensors, cosine);
    CHECK(m.gradient("log_scale")[0] == 0);
    for (const float v : m.scores) CHECK(std::abs(v) <= 100.001f);
    m.w.log_scale(0, 0) = std::numeric_limits<float>::quiet_NaN();
    for (const float v : m.forward().scores) CHECK(std::isnan(v));  // the cap hides nothing
  }
  TEST_CASE("the length of a token or of a direction does not matter; that of a zero token is floored") {
    gating m(moe::cosine_gate{.width = 7}, 2, 5, 4, 15);
    for (std::size_t j = 0; j < 5; ++j) m.x[5 + j] = 8 * m.x[j];
    m.forward();
    for (std::size_t e = 0; e < 4; ++e) CHECK(m.scores[4 + e] == m.scores[e]);
    std::fill(m.x.begin(), m.x.end(), 0.f);
    m.forward().backward(std::vector<float>(8, 1));
    for (const float v : m.scores) CHECK(v == 0);
    for (const float v : m.dx) CHECK(std::isfinite(v));
  }
  TEST_CASE("an inference context gives the bits of a training one") {
    gating training(moe::cosine_gate{.width = 7}, 6, 5, 4, 16), inference(moe::cosine_gate{.width = 7}, 6, 5, 4, 16, false);
    CHECK(training.forward().scores == inference.forward().scores);
  }
  TEST_CASE("a width below one and weights of another shape are refused") {
    CHECK_THROWS_WITH_AS(moe::cosine_gate{.width = 0}.check({}), "cosine_gate: width is 0, expected at least 1",
                         moe::shape_error);
    CHECK_THROWS_WITH_AS(moe::cosine_gate{.width = 2}.check({}, {.tokens = 1, .d = 3, .experts = 2}),
                         "cosine_gate: project is 0 x 0, expected 2 x 3 (p x d)", moe::shape_error);
  }
}
