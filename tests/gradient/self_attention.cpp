// SPDX-License-Identifier: Apache-2.0
#include "moe/attention/self_attention.hpp"

#include <doctest/doctest.h>

#include "moe/moe.hpp"
#include "support/self_attention_reference.hpp"
#include "support/testing.hpp"

namespace {

using moe::dim, moe::idx;
using backend = moe::scalar<>;

struct bare : moe::attention_features {};
/// As the published models have it: logits in the projection of queries, heads normalised, half-split rotation.
template <class Granularity>
struct published : moe::attention_features {
  using rotary = moe::rotary<>;
  using output_gate = moe::output_gate<Granularity>;
  template <class Gate>
  using projection = moe::grouped_projection<Gate>;
  static constexpr bool normalises_heads = true, biased = true;
};
struct convolved_blocks : published<moe::headwise> {
  using selection = moe::block_attention;
  using key_convolution = moe::key_convolution<3>;
};
struct every_gate : moe::attention_features {
  using rotary = moe::rotary<moe::interleaved_pairs>;
  using output_gate = moe::output_gate<moe::elementwise>;
  using query_gate = moe::output_gate<moe::elementwise, moe::silu>;
  using key_gate = moe::output_gate<moe::elementwise>;  // the norm of heads would cancel one that is headwise
  using value_gate = moe::output_gate<moe::head_shared>;
  using layer_gate = moe::output_gate<moe::elementwise, moe::ns_sigmoid>;
  static constexpr bool normalises_heads = true;
};
struct sum_gate : moe::attention_features {
  using output_gate = moe::output_gate<moe::elementwise, moe::silu, moe::additive>;
};

constexpr dim d = 12, T = 23;
constexpr moe::attention_heads heads{.heads = 4, .kv_heads = 2, .d = 8, .dv = 6};
constexpr idx offsets[] = {0, 9, 9, 23};

std::vector<float> normals(dim n, std::uint64_t seed, float scale = 1) {
  std::vector<float> x(static_cast<std::size_t>(n));
  const moe::rng random(seed, 0);
  for (std::size_t i = 0; i < x.size(); ++i) x[i] = scale * random.normal(i);
  return x;
}

/// A layer with weights, inputs and everything it runs with.
template <class C>
struct trial {
  using layer = moe::self_attention<C, backend>;
  layer net;
  moe::buffer params, grads, work, angles;
  typename layer::weights w;
  typename layer::gradients dw;
  typename layer::context ctx;
  std::vector<float> x = normals(T * d, 7), y = std::vector<float>(T * d), dy = normals(T * d, 8), dx = std::vector<float>(T * d);
  typename layer::input in;
  moe::arena mem;

  template <class... Parts>
  explicit trial(const Parts&... parts)
      : net(d, heads, parts...), params(net.weight_bytes()), grads(net.weight_bytes()),
        work(net.context_bytes(T) + net.scratch_bytes(T, 3)), angles(1 << 16), mem(work.bytes()) {
    moe::arena p(params.bytes()), g(grads.bytes()), a(angles.bytes());
    const std::vector<float> random = normals(static_cast<dim>(params.template as<float>().size()), 3, 0.4f);
    std::copy(random.begin(), random.end(), params.template as<float>().begin());
    w = net.make_weights(p);
    dw = net.make_gradients(g);
    ctx = net.make_context(T, mem);
    in = {{x.data(), T, d}, {offsets, {}}, net.make_table(T, a)};
  }
  double forward() {
    net.forward(w, in, {y.data(), T, d}, ctx, mem);
    double sum = 0;
    for (std::size_t i = 0; i < y.size(); ++i) sum += double{y[i]} * double{dy[i]};
    return sum;
  }
  void backward() { net.backward(w, in, ctx, {dy.data(), T, d}, {dx.data(), T, d}, dw, mem); }
};

/// The largest difference between gradients and central differences, relative to the difference or the root mean square of
/// the tensor's gradients, whichever is larger. Gradients that replace NaN have to be the same.
template <class C>
double worst_gradient(trial<C>& t) {
  t.forward();
  t.backward();
  const std::vector<float> added(t.grads.template as<float>().begin(), t.grads.template as<float>().end());
  testing::spoil(t.net.catalogue(), t.grads.template as<float>());
  t.net.backward(t.w, t.in, t.ctx, {t.dy.data(), T, d}, {}, t.dw, t.mem, moe::gradient_mode::replace);
  CHECK(testing::same_bits(t.grads.template as<float>(), added));
  double worst = 0;
  const auto probe = [&](float& v, float gradient, double rms) {
    constexpr float step = 4e-3f;
    const float kept = v;
    v = kept + step;
    const double above = t.forward();
    v = kept - step;
    const double below = t.forward();
    v = kept;
    const double difference = (above - below) / (2 * double{step});
    worst = std::max(worst, std::fabs(difference - double{gradient}) / std::max(std::fabs(difference), rms));
  };
  const auto rms_of = [](std::span<const float> gradient) {
    double squares = 0;
    for (const float g : gradient) squares += double{g} * double{g};
    return std::sqrt(squares / static_cast<double>(gradient.size()));
  };
  const double rms_of_x = rms_of(t.dx);
  for (std::size_t i = 0; i < t.x.size(); i += 5) probe(t.x[i], t.dx[i], rms_of_x);
  const auto values = t.params.template as<float>(), gradients = t.grads.template as<float>();
  for (const moe::slot& s : t.net.catalogue()) {
    const std::size_t first = s.offset / sizeof(float), n = static_cast<std::size_t>(s.rows * s.cols);
    const double rms = rms_of(gradients.subspan(first, n));
    for (std::size_t i = 0; i < n; i += 1 + n / 23) probe(values[first + i], gradients[first + i], rms);
  }
  return worst;
}

double distance(const std::vector<float>& y, const std::vector<double>& wanted) {
  double worst = 0;
  for (std::size_t i = 0; i < y.size(); ++i) worst = std::max(worst, std::fabs(double{y[i]} - wanted[i]));
  return worst;
}
/// The layer `published` by its formulas; `naive` splits the fused columns into all queries, then all logits.
template <class C>
std::vector<double> by_formulas(const trial<C>& t, bool naive = false) {
  using gate = typename C::output_gate;
  const auto row = [](moe::matrix_view<float> w, moe::matrix_view<float> bias, std::size_t r) {
    return reference::self_attention::row{w.row(static_cast<dim>(r)), double{bias(static_cast<dim>(r), 0)}};
  };
  const std::size_t own = static_cast<std::size_t>(gate::head_cols(heads.dv)), group = 2, width = 8, dv = 6;
  const std::size_t group_cols = group * (width + own);
  reference::self_attention r{};
  r.d = d, r.h = 4, r.h_kv = 2, r.width = width, r.dv = dv, r.starts = {0, 9, 9, 23};
  r.query = [=, &t](std::size_t a, std::size_t j) {
    return row(t.w.q, t.w.q_bias, naive ? a * width + j : a / group * group_cols + a % group * width + j);
  };
  const auto logit = [=, &t](std::size_t a, std::size_t j) {
    return row(t.w.q, t.w.q_bias, naive ? 4 * width + a * own + j : a / group * group_cols + group * width + a % group * own + j);
  };
  r.key = [=, &t](std::size_t g, std::size_t j) { return row(t.w.k, t.w.k_bias, g * width + j); };
  r.value = [=, &t](std::size_t g, std::size_t j) { return row(t.w.v, t.w.v_bias, g * dv + j); };
  r.output_gate =
      reference::gated_by(logit, own == 1 ? reference::gates::head : reference::gates::channel, 4, d, reference::sigmoid);
  r.turn = [](reference::numbers v, std::size_t p) { return reference::turned_half_split(v, p); };
  r.norm = [&t](reference::numbers v, bool query) {
    return reference::normalised(v, query ? t.w.q_norm.weight.data() : t.w.k_norm.weight.data());
  };
  r.visible = reference::all_until;
  r.output = t.w.o.data;
  if constexpr (C::selection::blocks) {
    r.taps = 3;
    r.convolution = [&t](std::size_t l, std::size_t c) { return double{t.w.convolution.w(static_cast<dim>(l), static_cast<dim>(c))}; };
    r.visible = reference::best_blocks(4, 2);
  }
  return r.run(t.x.data());
}

}  // namespace

TEST_SUITE("attention/self_attention") {
  TEST_CASE_TEMPLATE("gated attention in the published layout equals the paper's formulas in double", G, moe::headwise,
                     moe::elementwise) {
    trial<published<G>> t;
    t.forward();
    CHECK(distance(t.y, by_formulas(t)) < 2e-5);
  }
  TEST_CASE("splitting fused columns into all queries, then all logits, is something else") {
    trial<published<moe::elementwise>> t;
    t.forward();
    CHECK(distance(t.y, by_formulas(t, true)) > 0.1);
  }
  TEST_CASE("blocks of convolved keys equal the formulas in double") {
    trial<convolved_blocks> t(moe::block_attention{.block = 4, .k = 2});
    t.forward();
    CHECK(distance(t.y, by_formulas(t)) < 2e-5);
  }
  TEST_CASE("gradients of every weight and of x match finite differences, for every feature") {
    // Differences of float32 results are rounded by up to 1e-2; attention_gates.cpp is stricter.
    const auto check = [](auto t) { CHECK(worst_gradient(t) < 2e-2); };
    SUBCASE("bare") { check(trial<bare>()); }
    SUBCASE("a window") { check(trial<bare>(moe::attention_mask{.window = 5})); }
    SUBCASE("published, headwise") { check(trial<published<moe::headwise>>()); }
    SUBCASE("published, elementwise") { check(trial<published<moe::elementwise>>()); }
    SUBCASE("gates everywhere") { check(trial<every_gate>()); }
    SUBCASE("an additive gate") { check(trial<sum_gate>()); }
    SUBCASE("blocks") { check(trial<convolved_blocks>(moe::block_attention{.block = 4, .k = 2})); }
    SUBCASE("blocks made dense") { check(trial<convolved_blocks>(moe::block_attention{.block = 4, .k = 2, .dense = true})); }
  }
  TEST_CASE("a layer of blocks made dense, or of as many blocks as there are, equals dense attention") {
    struct dense : published<moe::headwise> {
      using key_convolution = moe::key_convolution<3>;
    };
    trial<dense> plain;
    trial<convolved_blocks> made_dense(moe::block_attention{.block = 4, .k = 2, .dense = true}),
        of_all(moe::block_attention{.block = 4, .k = 9});
    plain.forward();
    made_dense.forward();
    of_all.forward();
    CHECK(made_dense.y == plain.y);
    for (std::size_t i = 0; i < plain.y.size(); ++i) CHECK(of_all.y[i] == doctest::Approx(plain.y[i]).epsilon(1e-4));
  }
  TEST_CASE("a gate's logits at +40 leave attention as it is, at -40 give nothing back and no gradient") {
    trial<published<moe::headwise>> t;
    const auto set = [&](float logit) {  // logits are columns behind each group's queries; their weights are zero here
      for (dim g = 0; g < 2; ++g)
        for (dim a = 0; a < 2; ++a) {
          const dim r = g * 18 + 16 + a;
          std::fill_n(t.w.q.row(r), d, 0.f);
          t.w.q_bias(r, 0) = logit;
        }
    };
    set(40);
    t.forward();
    const std::vector<float> open = t.y;
    reference::numbers ungated = by_formulas(t);  // sigmoid(40) is 1 in double up to 4e-18
    CHECK(distance(open, ungated) < 2e-5);
    set(-40);
    t.forward();
    t.backward();
    for (const float v : t.y) CHECK(std::fabs(v) < 1e-15f);
    for (const float v : t.dx) CHECK(std::fabs(v) < 1e-14f);
    set(0);
    t.forward();
    for (std::size_t i = 0; i < open.size(); ++i) CHECK(t.y[i] == doctest::Approx(open[i] / 2));
  }
  TEST_CASE("inference needs no context and gives the same bits") {
    trial<every_gate> t;
    t.forward();
    std::vector<float> y(t.y.size());
    moe::buffer scratch(t.net.scratch_bytes(T, 3));
    moe::arena mem(scratch.bytes());
    t.net.forward(t.w, t.in, {y.data(), T, d}, mem);
    CHECK(y == t.y);
    CHECK(mem.used() == 0);
  }
  TEST_CASE("a gradient that nobody wants is left out, the others are the same") {
    trial<published<moe::headwise>> whole, part;
    whole.forward();
    whole.backward();
    part.forward();
    part.dw.q = {};
    part.dw.k_bias = {};
    part.net.backward(part.w, part.in, part.ctx, {part.dy.data(), T, d}, {}, part.dw, part.mem);
    for (dim i = 0; i < d; ++i)
      for (dim j = 0; j < 24; ++j) CHECK(part.dw.o(i, j) == whole.dw.o(i, j));
    for (const float v : part.dx) CHECK(v == 0);
  }
  TEST_CASE("bad arguments are named before anything is written") {
    using layer = moe::self_attention<bare, backend>;
    CHECK_THROWS_WITH_AS(layer(0, heads), "self_attention: d is 0, expected at least 1", moe::shape_error);
    CHECK_THROWS_WITH_AS(layer(d, {.heads = 5, .kv_heads = 2, .d = 8, .dv = 8}),
                         "self_attention: heads is 5, expected a multiple of 2 (kv_heads)", moe::shape_error);
    CHECK_THROWS_WITH_AS((moe::self_attention<convolved_blocks, backend>(d, heads, moe::block_attention{.block = 0})),
                         "self_attention: block is 0, expected at least 1", moe::shape_error);
    CHECK_THROWS_WITH_AS((moe::self_attention<convolved_blocks, backend>(d, heads, moe::attention_mask{.causal = false})),
                         "self_attention: mask is not plain causal, expected it to be for blocks of keys", moe::shape_error);
    trial<bare> t;
    t.y.assign(t.y.size(), 5.f);
    const auto throws = [&](auto in, auto w, std::vector<float>& y, const char* what) {
      CHECK_THROWS_WITH_AS(t.net.forward(w, in, {y.data(), T, d}, t.ctx, t.mem), what, moe::shape_error);
      for (const float v : y) CHECK(v == 5.f);
    };
    auto in = t.in;
    in.x = {t.x.data(), T - 1, d};
    throws(in, t.w, t.y, "self_attention: x is 22 x 12, expected 23 x 12 (T x d)");
    auto w = t.w;
    w.k = t.w.q;
    throws(t.in, w, t.y, "self_attention: k is 32 x 12, expected 16 x 12 (h_kv*d_k x d)");
    constexpr idx wrong[] = {0, 9, 20};
    in = t.in;
    in.sequences = {wrong, {}};
    throws(in, t.w, t.y, "self_attention: query_sequences: offsets end at 20, expected to ascend from 0 to 23 (T)");
    trial<published<moe::headwise>> turned;
    auto short_table = turned.in;
    short_table.angles.cosine.rows = 5;
    CHECK_THROWS_AS(turned.net.forward(turned.w, short_table, {turned.y.data(), T, d}, turned.ctx, turned.mem), moe::shape_error);
  }
}
