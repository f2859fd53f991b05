// SPDX-License-Identifier: Apache-2.0
// The parts of the main demonstration: reading its corpus, and the layers around its blocks.
#include <doctest/doctest.h>

#include <cmath>
#include <string>
#include <vector>

#include "../../examples/language_model/model.hpp"
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
using block = moe::layer<moe::linear_gate, moe::top_k<2>, moe::ffn_expert, moe::weighted_sum, moe::scalar<>>;
using model = demo::language_model<block>;

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

  TEST_CASE("a sampler visits every byte of every language once in an epoch and spreads over the languages") {
    demo::text t;
    for (const std::size_t size : {500u, 300u, 400u}) demo::append_language(t, std::string(size, 'x'));
    const demo::sampler at(t);
    REQUIRE(at.size() == 1200);
    std::vector<int> visits(t.bytes.size());
    std::vector<int> early(3);
    for (std::size_t i = 0; i < at.size(); ++i) {
      ++visits[at(i)];
      if (i < 120) ++early[t.language_of(at(i))];
    }
    for (std::size_t p = 0; p < visits.size(); ++p) CHECK(visits[p] == (t.bytes[p] == 'x'));
    CHECK(early[0] >= 48);
    CHECK(early[1] >= 28);
    CHECK(early[2] >= 38);
  }

  TEST_CASE("the embedding adds a row for each of the last bytes and one for each count") {
    auto last = numbers(256 * 3, 1), earlier = numbers(256 * 3, 2), bag = numbers(256 * 3, 3);
    std::vector<float> y(6), counts(2 * 256);
    const std::vector<moe::idx> position = {256, 290};
    const demo::window_embedding embedding{2};
    demo::window_embedding::weights w{matrix(last, 256), matrix(earlier, 256), matrix(bag, 256)};
    demo::window_embedding::context ctx{matrix(counts, 2)};
    moe::arena none;
    const moe::scalar<> backend;
    const moe::call<moe::scalar<>> on{backend, none, {}};
    embedding.forward(on, w, {bytes, position}, matrix(y, 2), ctx);
    for (std::size_t t = 0; t < 2; ++t)
      for (dim j = 0; j < 3; ++j) {
        const auto at = static_cast<std::size_t>(position[t]);
        double wanted = double{w.last(bytes[at - 1], j)} + double{w.earlier(bytes[at - 2], j)};
        for (std::size_t i = 1; i <= 256; ++i) wanted += double{w.bag(bytes[at - i], j)} / 64;
        CHECK(std::fabs(double{y[t * 3 + static_cast<std::size_t>(j)]} - wanted) < 1e-5);
      }
  }
  TEST_CASE("the embedding is linear in its weights, and backward is the transpose of forward") {
    constexpr dim d = 3, T = 3;
    auto last = numbers(256 * d, 1), earlier = numbers(512 * d, 2), bag = numbers(256 * d, 3), dy = numbers(T * d, 4);
    std::vector<float> y(T * d), counts(T * 256), dlast(last.size()), dearlier(earlier.size()), dbag(bag.size());
    const std::vector<moe::idx> position = {270, 256, 299};
    const demo::windows in{bytes, position};
    const demo::window_embedding embedding{3};
    demo::window_embedding::weights w{matrix(last, 256), matrix(earlier, 512), matrix(bag, 256)};
    demo::window_embedding::weights dw{matrix(dlast, 256), matrix(dearlier, 512), matrix(dbag, 256)};
    demo::window_embedding::context ctx{matrix(counts, T)};
    moe::arena none;
    const moe::scalar<> backend;
    const moe::call<moe::scalar<>> on{backend, none, {}};
    embedding.forward(on, w, in, matrix(y, T), ctx);
    embedding.backward(on, in, ctx, matrix(dy, T), dw);
    embedding.backward(on, in, ctx, matrix(dy, T), dw);  // adds
    const double by_weights = dot(dlast, last) + dot(dearlier, earlier) + dot(dbag, bag);
    CHECK(by_weights == doctest::Approx(2 * dot(dy, y)).epsilon(1e-4));
  }

  TEST_CASE("cross-entropy is in bits per byte and its gradient, in nats, matches finite differences") {
    constexpr dim T = 2;
    auto logits = numbers(T * 256, 5);
    std::vector<float> bits(T);
    const std::vector<moe::idx> position = {274, 299};
    const demo::windows in{bytes, position};
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

  TEST_CASE("gradients of the whole model match finite differences") {
    const model net(2, 3, block({.tokens = 8, .d = 8, .f = 6, .experts = 2}));  // k = E: no probe changes the plan
    const std::vector<moe::idx> position = {256, 271, 272, 280, 299};
    const demo::windows in{bytes, position};
    moe::buffer params(net.weight_bytes()), grads(net.weight_bytes()), work(net.work_bytes(5));
    moe::arena p(params.bytes()), g(grads.bytes());
    const model::weights w = net.make_weights(p);
    model::gradients dw = net.make_gradients(g);
    const std::span<float> v = params.as<float>(), dv = grads.as<float>();
    for (const moe::slot& s : net.catalogue())
      for (std::size_t i = s.offset / 4; i < (s.offset + s.bytes) / 4; ++i) v[i] = 0.5f * moe::rng(6).normal(i) + (s.start == moe::initial::ones);

    const auto loss = [&] {
      moe::arena mem(work.bytes());
      auto ctx = net.make_context(in, mem);
      return net.forward(w, ctx, mem) * std::log(2.0);
    };
    moe::arena mem(work.bytes());
    auto ctx = net.make_context(in, mem);
    net.forward(w, ctx, mem);
    net.backward(w, ctx, dw, mem);

    int probed = 0;
    double worst = 0, scale = 0;
    for (const moe::slot& s : net.catalogue())
      for (std::size_t n = 0; n < 12; ++n) {
        const std::size_t i = s.offset / 4 + moe::rng(7)(n) % (s.bytes / 4);
        const float was = v[i];
        v[i] = was + 0.01f;
        const double up = loss();
        v[i] = was - 0.01f;
        const double numeric = (up - loss()) / double{0.02f};
        v[i] = was;
        worst = std::max(worst, std::fabs(numeric - double{dv[i]}));
        scale = std::max(scale, std::fabs(numeric));
        ++probed;
      }
    CHECK(probed >= 100);
    CHECK(scale > 0.05);
    CHECK(worst < 1e-3);
  }
}
