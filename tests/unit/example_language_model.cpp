// SPDX-License-Identifier: Apache-2.0
// The parts of the main demonstration: reading its corpus, and the layers around its blocks.
#include <doctest/doctest.h>

#include <cmath>
#include <string>
#include <vector>

#include "../../examples/language_model/attention_sink.hpp"
#include "../../examples/language_model/generate.hpp"
#include "../../examples/language_model/roff.hpp"
#include "../../examples/language_model/text.hpp"
#include "moe/backend/host_ffn.hpp"
#include "moe/backend/scalar.hpp"
#include "moe/combine/weighted_sum.hpp"
#include "moe/expert/ffn.hpp"
#include "moe/gate/linear.hpp"
#include "moe/router/top_k.hpp"

namespace {

using moe::dim;
using layer = moe::layer<moe::linear_gate, moe::top_k<2>, moe::ffn_expert, moe::weighted_sum, moe::scalar<>>;
struct gated : moe::attention_features {
  using rotary = moe::rotary<>;
  using output_gate = moe::output_gate<moe::headwise>;
  static constexpr bool normalises_heads = true;
};
struct gated_blocks : gated {
  using selection = moe::block_attention;
};
template <class Features>
using block = moe::transformer_block<moe::self_attention<Features, moe::scalar<>>, layer>;
template <class Features>
block<Features> make_block() {  // k = E: no probe changes the plan
  return {moe::self_attention<Features, moe::scalar<>>(8, {.heads = 2, .kv_heads = 1, .d = 4, .dv = 4},
                                                       moe::block_attention{.block = 4, .k = 2}),
          layer({.tokens = 64, .d = 8, .f = 6, .experts = 2})};
}

std::string prose(const std::vector<std::string>& lines) {
  demo::roff_text out;
  for (const auto& l : lines) out.line(l);
  out.end_paragraph();
  return out.text();
}

std::vector<float> numbers(std::size_t n, std::uint64_t seed) {
  std::vector<float> v(n);
  for (std::size_t i = 0; i < n; ++i) v[i] = moe::rng(seed).normal(i);
  return v;
}
moe::matrix_view<float> matrix(std::vector<float>& v, dim rows) {
  return {v.data(), rows, static_cast<dim>(v.size()) / rows};
}

/// d f / d v[i] by central differences, in double.
template <class F>
double slope(std::vector<double> v, std::size_t i, F f) {
  constexpr double h = 1e-5;
  v[i] += h;
  const double up = f(v);
  v[i] -= 2 * h;
  return (up - f(v)) / (2 * h);
}

/// A text of small bytes; positions from 256 on have enough before them.
const std::vector<std::uint8_t> bytes = [] {
  std::vector<std::uint8_t> v(300);
  for (std::size_t i = 0; i < v.size(); ++i) v[i] = static_cast<std::uint8_t>(moe::rng(9)(i) % 10);
  return v;
}();
double dot(const std::vector<float>& a, const std::vector<float>& b) {
  double sum = 0;
  for (std::size_t i = 0; i < a.size(); ++i) sum += double{a[i]} * double{b[i]};
  return sum;
}

}  // namespace

TEST_SUITE("examples/language_model") {
  TEST_CASE("prose of a manual page keeps running text and drops markup, headings, code and short tags") {
    const std::string text = prose({".TH LS 1", ".SH NOM", "ls \\- Afficher", ".PP", "Les param\\(`etres \\fBobligatoires\\fP pour les",
                                    ".B options", "de forme longue le sont aussi\\ ; \\-\\-all.", ".nf", "int main(void) { return 0; } // a line of code",
                                    ".fi", ".TP", "\\-a", "court", ".SH TRADUCTION", "La traduction de cette page a été créée par des personnes de bonne volonté."});
    CHECK(text == "Les paramètres obligatoires pour les options de forme longue le sont aussi ; --all.\n");
  }
  TEST_CASE("a hidden span and a dropped section end with the page") {
    const std::string line = "Une phrase assez longue pour compter comme un paragraphe de texte courant.";
    CHECK(prose({".TH A 1", ".SH COPYRIGHT", line, ".TH B 1", line}) == line + "\n");
    CHECK(prose({".Dd today", line, ".TH B 1", line}) == line + "\n");
  }

  TEST_CASE("a sampler visits every sequence of every language once in an epoch and spreads over the languages") {
    demo::text t;
    for (const std::size_t size : {5003u, 3000u, 4009u}) demo::append_language(t, std::string(size, 'x'));
    const demo::sampler at(t, 10);
    REQUIRE(at.size() == 1200);
    std::vector<int> visits(t.bytes.size());
    std::vector<int> early(3);
    for (std::size_t i = 0; i < at.size(); ++i) {
      for (std::size_t j = 0; j < 10; ++j) ++visits[at(i) + j];
      if (i < 120) ++early[t.language_of(at(i))];
    }
    std::size_t read = 0;
    for (std::size_t p = 0; p < visits.size(); ++p) {
      CHECK(visits[p] <= (t.bytes[p] == 'x'));
      read += static_cast<std::size_t>(visits[p]);
    }
    CHECK(read == 12000);
    CHECK(early[0] >= 48);
    CHECK(early[1] >= 28);
    CHECK(early[2] >= 38);
  }
  TEST_CASE("batches cover a text in sequences, the last ones shorter") {
    const demo::recipe r{.steps = 1, .length = 4, .sequences = 2, .validation = 2};
    const auto batches = demo::all_of(70, 81, r);
    REQUIRE(batches.size() == 2);
    CHECK(batches[0].offsets == std::vector<moe::idx>{0, 4, 8});
    CHECK(batches[1].offsets == std::vector<moe::idx>{0, 3});
    CHECK(batches[1].position == std::vector<moe::idx>{78, 79, 80});
  }

  TEST_CASE("the embedding adds a row for each of the last bytes and one for each run of them") {
    auto last = numbers(256 * 3, 1), earlier = numbers(256 * 3, 2), runs = numbers(2 * 16 * 3, 3);
    std::vector<float> y(6);
    const std::vector<moe::idx> position = {256, 290};
    const demo::window_embedding embedding{2, 3, 16};
    demo::window_embedding::weights w{matrix(last, 256), matrix(earlier, 256), matrix(runs, 32)};
    moe::arena none;
    const moe::scalar<> backend;
    const moe::call<moe::scalar<>> on{backend, none, {}};
    const demo::windows in{bytes, position, {}};
    embedding.forward(on, w, in, matrix(y, 2));
    CHECK(embedding.hash(in, 0, 2) != embedding.hash(in, 1, 2));
    for (std::size_t t = 0; t < 2; ++t)
      for (dim j = 0; j < 3; ++j) {
        const auto at = static_cast<std::size_t>(position[t]);
        const auto run = [&](dim n) { return double{w.runs((n - 2) * 16 + embedding.hash(in, static_cast<dim>(t), n), j)}; };
        const double wanted = double{w.last(bytes[at - 1], j)} + double{w.earlier(bytes[at - 2], j)} +
                              run(2) + run(3);
        CHECK(std::fabs(double{y[t * 3 + static_cast<std::size_t>(j)]} - wanted) < 1e-5);
      }
  }
  TEST_CASE("the embedding is linear in its weights, and backward is the transpose of forward") {
    constexpr dim d = 3, T = 3;
    auto last = numbers(256 * d, 1), earlier = numbers(512 * d, 2), runs = numbers(16 * d, 3), dy = numbers(T * d, 4);
    std::vector<float> y(T * d), dlast(last.size()), dearlier(earlier.size()), druns(runs.size());
    const std::vector<moe::idx> position = {270, 256, 299};
    const demo::windows in{bytes, position, {}};
    const demo::window_embedding embedding{3, 3, 8};
    demo::window_embedding::weights w{matrix(last, 256), matrix(earlier, 512), matrix(runs, 16)};
    demo::window_embedding::weights dw{matrix(dlast, 256), matrix(dearlier, 512), matrix(druns, 16)};
    moe::arena none;
    const moe::scalar<> backend;
    const moe::call<moe::scalar<>> on{backend, none, {}};
    embedding.forward(on, w, in, matrix(y, T));
    embedding.backward(on, in, matrix(dy, T), dw);
    embedding.backward(on, in, matrix(dy, T), dw);  // adds
    const double by_weights = dot(dlast, last) + dot(dearlier, earlier) + dot(druns, runs);
    CHECK(by_weights == doctest::Approx(2 * dot(dy, y)).epsilon(1e-4));
  }

  TEST_CASE("cross-entropy is in bits per byte and its gradient, in nats, matches finite differences") {
    constexpr dim T = 2;
    auto logits = numbers(T * 256, 5);
    std::vector<float> bits(T);
    const std::vector<moe::idx> position = {274, 299};
    const demo::windows in{bytes, position, {}};
    const auto f = [&](const std::vector<double>& v) {
      double nats = 0;
      for (std::size_t t = 0; t < T; ++t) {
        double sum = 0;
        for (std::size_t j = 0; j < 256; ++j) sum += std::exp(v[t * 256 + j]);
        nats += std::log(sum) - v[t * 256 + in.target(static_cast<dim>(t))];
      }
      return nats / T;
    };
    moe::arena none;
    const moe::scalar<> backend;
    const moe::call<moe::scalar<>> on{backend, none, {}};
    const std::vector<double> v(logits.begin(), logits.end());
    CHECK(demo::cross_entropy(on, matrix(logits, T), in, bits) == doctest::Approx(f(v) / std::log(2.0)).epsilon(1e-5));
    auto dlogits = logits;
    demo::cross_entropy_backward(on, matrix(dlogits, T), in);
    for (std::size_t i = 0; i < v.size(); ++i) CHECK(std::fabs(double{dlogits[i]} - slope(v, i, f)) < 1e-6);
  }

  TEST_CASE_TEMPLATE("gradients of the whole model match finite differences", Features, gated, gated_blocks) {
    using model = demo::language_model<block<Features>>;
    demo::language_model_instance<block<Features>> m(model(2, {3, 3, 8}, make_block<Features>()), 16);
    const model& net = m.net;
    demo::batch b;
    for (const std::size_t length : {9u, 5u}) b.add(256 + b.position.size(), length);
    moe::buffer grads(net.weight_bytes()), work(net.work_bytes(14, 2));
    moe::arena g(grads.bytes());
    typename model::gradients dw = net.make_gradients(g);
    const std::span<float> v = m.params.template as<float>(), dv = grads.as<float>();
    for (const moe::slot& s : net.catalogue())
      for (std::size_t i = s.offset / 4; i < (s.offset + s.bytes) / 4; ++i)
        v[i] = 0.4f * moe::rng(6).normal(i) + (s.start == moe::initial::ones);

    const auto run = [&](bool backward) {
      moe::arena mem(work.bytes());
      auto ctx = m.make_context(b.of(bytes), mem);
      const double loss = net.forward(m.w, ctx, mem) * std::log(2.0);
      if (backward) net.backward(m.w, ctx, dw, mem);
      return loss;
    };
    run(true);
    int probed = 0;
    double worst = 0, scale = 0;
    for (const moe::slot& s : net.catalogue())
      for (std::size_t n = 0; n < 6; ++n) {
        const std::size_t i = s.offset / 4 + moe::rng(7)(n) % (s.bytes / 4);
        const float was = v[i];
        v[i] = was + 0.004f;
        const double up = run(false);
        v[i] = was - 0.004f;
        const double numeric = (up - run(false)) / double{0.008f};
        v[i] = was;
        worst = std::max(worst, std::fabs(numeric - double{dv[i]}));
        scale = std::max(scale, std::fabs(numeric));
        ++probed;
      }
    CHECK(probed >= 100);
    CHECK(scale > 0.05);
    CHECK(worst < 1e-3);
  }

  TEST_CASE_TEMPLATE("a reader of caches says what the whole sequence says, also after it has begun again", Features, gated,
                     gated_blocks) {
    using model = demo::language_model<block<Features>>;
    constexpr std::size_t length = 16;
    demo::language_model_instance<block<Features>> m(model(2, {3, 3, 8}, make_block<Features>()), length);
    m.initialise(1);
    for (std::size_t i = 0; i < m.params.size() / 4; ++i) m.params.template as<float>()[i] += 0.1f * moe::rng(2).normal(i);
    const std::string all(bytes.begin(), bytes.end());
    const auto expect_logits = [&](std::span<const float> got, std::size_t first, std::size_t last) {
      demo::batch b;
      b.add(first, last - first + 1);
      moe::buffer work(m.net.work_bytes(static_cast<dim>(last - first + 1), 1));
      moe::arena mem(work.bytes());
      auto ctx = m.make_context(b.of(bytes), mem);
      m.net.forward(m.w, ctx, mem);
      for (dim j = 0; j < 256; ++j)
        CHECK(got[static_cast<std::size_t>(j)] ==
              doctest::Approx(double{ctx.logits(static_cast<dim>(last - first), j)}).epsilon(1e-3));
    };
    std::size_t read = 20, first = read - length / 2 + 1;
    demo::reader<block<Features>> at(m, std::string_view(all).substr(0, read));
    expect_logits(at.logits(), first, read);
    while (read < 40) {
      if (read - first + 1 == length) first = read + 1 - length / 2 + 1;
      at.append(all[read++]);
      expect_logits(at.logits(), first, read);
    }
  }

  TEST_CASE("where all keys are alike every token has the same weight, and no sink is found") {
    using model = demo::language_model<block<gated>>;
    demo::text t;
    demo::append_language(t, std::string(400, 'x'));
    demo::language_model_instance<block<gated>> m(model(1, {3, 3, 8}, make_block<gated>()), 8);
    m.initialise(1);
    for (float& w : m.w.blocks[0].attention.q_norm.weight) w = 0;
    const demo::recipe r{.steps = 1, .length = 8, .sequences = 4, .validation = 4};
    const demo::attention_sink sink = demo::measure_sink(m, t, r);
    CHECK(sink.uniform == doctest::Approx((1 + 1. / 2 + 1. / 3 + 1. / 4 + 1. / 5 + 1. / 6 + 1. / 7 + 1. / 8) / 8));
    CHECK(sink.first_token == doctest::Approx(sink.uniform).epsilon(1e-5));
    CHECK(sink.largest > 0);
    CHECK(sink.gate > 0);
    CHECK(sink.gate < 1);
    moe::matrix_view<float> gate = m.w.blocks[0].attention.output_gate;
    std::fill_n(gate.data, gate.rows * gate.cols, 0.f);
    CHECK(demo::measure_sink(m, t, r).gate == doctest::Approx(0.5));
  }
}
