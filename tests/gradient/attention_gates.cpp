// SPDX-License-Identifier: Apache-2.0
// The gates of a layer of attention, each alone and all together, against the formulas in double: the layer itself computes
// in float32 only, so gradients are compared with differences of the reference.
#include <doctest/doctest.h>

#include <string>

#include "moe/attention/self_attention.hpp"
#include "moe/moe.hpp"
#include "support/self_attention_reference.hpp"
#include "support/testing.hpp"

namespace {

using moe::dim, moe::idx;

/// Biases before the gates, rotation behind them.
struct plain : moe::attention_features {
  using rotary = moe::rotary<moe::interleaved_pairs>;
  static constexpr bool biased = true;
};
struct on_values : plain {
  using value_gate = moe::output_gate<moe::elementwise>;
};
struct on_keys : plain {
  using key_gate = moe::output_gate<moe::headwise>;
};
struct on_queries : plain {
  using query_gate = moe::output_gate<moe::headwise, moe::sigmoid, moe::additive>;
};
struct on_output : plain {
  using output_gate = moe::output_gate<moe::head_shared>;
};
struct on_layer : plain {
  using layer_gate = moe::output_gate<moe::headwise>;
};
struct everywhere : plain {
  using output_gate = moe::output_gate<moe::elementwise>;
  using query_gate = moe::output_gate<moe::elementwise, moe::silu>;
  using key_gate = moe::output_gate<moe::elementwise>;
  using value_gate = moe::output_gate<moe::head_shared>;
  using layer_gate = moe::output_gate<moe::elementwise, moe::ns_sigmoid>;
  static constexpr bool normalises_heads = true;
};
struct convolved : everywhere {
  using key_convolution = moe::key_convolution<5>;
};
struct over_blocks : everywhere {
  using selection = moe::block_attention;
};
/// Logits as they are: of queries a product, of the output a sum.
struct without_activation : plain {
  using query_gate = moe::output_gate<moe::elementwise, moe::identity>;
  using output_gate = moe::output_gate<moe::headwise, moe::identity, moe::additive>;
};

constexpr dim d = 12, T = 9;
constexpr moe::attention_heads heads{.heads = 4, .kv_heads = 2, .d = 8, .dv = 6};
constexpr idx offsets[] = {0, 2, 2, T};

std::vector<float> normals(std::size_t n, std::uint64_t seed, float scale) {
  std::vector<float> x(n);
  const moe::rng random(seed, 0);
  for (std::size_t i = 0; i < n; ++i) x[i] = scale * random.normal(i);
  return x;
}

template <class Activation>
double (*formula_of(Activation))(double) {
  if constexpr (std::is_same_v<Activation, moe::sigmoid>)
    return reference::sigmoid;
  else if constexpr (std::is_same_v<Activation, moe::ns_sigmoid>)
    return reference::ns_sigmoid;
  else if constexpr (std::is_same_v<Activation, moe::identity>)
    return [](double z) { return z; };
  else
    return reference::silu;
}
template <class Gate>
reference::self_attention::gate formula(Gate, moe::matrix_view<float>, std::size_t, std::size_t) {
  return {};
}
/// Of n heads of this width, with logits from w.
template <class Granularity, class Activation, class Form>
reference::self_attention::gate formula(moe::output_gate<Granularity, Activation, Form> gate, moe::matrix_view<float> w,
                                        std::size_t n, std::size_t width) {
  constexpr bool headwise = std::is_same_v<Granularity, moe::headwise>, shared = Granularity::shared;
  const std::size_t own = headwise ? 1 : width;
  const auto logit = [=](std::size_t a, std::size_t j) {
    return reference::self_attention::row{w.row(static_cast<dim>(a * own + j))};
  };
  const auto what = headwise ? reference::gates::head
                    : shared ? reference::gates::channel_of_all
                             : reference::gates::channel;
  return reference::gated_by(logit, what, n, d, formula_of(gate.activation), !Form::scales);
}

template <class C>
struct trial {
  using layer = moe::self_attention<C, moe::scalar<>>;
  static constexpr moe::block_attention blocks{.block = 2, .k = 2};
  layer net{d, heads, blocks};
  moe::buffer params{net.weight_bytes()}, grads{net.weight_bytes()}, work{net.context_bytes(T) + net.scratch_bytes(T, 3)},
      angles{1 << 12};
  moe::arena mem{work.bytes()};
  typename layer::weights w;
  std::vector<float> x = normals(T * d, 7, 1), y = std::vector<float>(T * d), dy = normals(T * d, 8, 1),
                     dx = std::vector<float>(T * d);
  mutable std::vector<std::size_t> seen;  ///< of all queries, as the formulas were last asked: where a loss is smooth

  trial() {
    moe::arena p(params.bytes()), g(grads.bytes()), a(angles.bytes());
    w = net.make_weights(p);
    const std::vector<float> random = normals(params.as<float>().size(), 3, 0.4f);
    std::copy(random.begin(), random.end(), params.template as<float>().begin());
    auto dw = net.make_gradients(g);
    auto ctx = net.make_context(T, mem);
    const typename layer::input in{{x.data(), T, d}, {offsets, {}}, net.make_table(T, a)};
    net.forward(w, in, {y.data(), T, d}, ctx, mem);
    net.backward(w, in, ctx, {dy.data(), T, d}, {dx.data(), T, d}, dw, mem);
  }

  reference::numbers by_formulas() const {
    const auto rows = [](moe::matrix_view<float> m, moe::matrix_view<float> bias, std::size_t width) {
      return [=](std::size_t a, std::size_t j) {
        const auto r = static_cast<dim>(a * width + j);
        return reference::self_attention::row{m.row(r), double{bias(r, 0)}};
      };
    };
    reference::self_attention r{};
    r.d = d, r.h = 4, r.h_kv = 2, r.width = 8, r.dv = 6, r.starts = {0, 2, 2, T};
    r.query = rows(w.q, w.q_bias, 8);
    r.key = rows(w.k, w.k_bias, 8);
    r.value = rows(w.v, w.v_bias, 6);
    r.output_gate = formula(typename C::output_gate{}, w.output_gate, 4, 6);
    r.query_gate = formula(typename C::query_gate{}, w.query_gate, 4, 8);
    r.key_gate = formula(typename C::key_gate{}, w.key_gate, 2, 8);
    r.value_gate = formula(typename C::value_gate{}, w.value_gate, 2, 6);
    r.layer_gate = formula(typename C::layer_gate{}, w.layer_gate, 1, d);
    r.turn = [](const reference::numbers& v, std::size_t p) { return reference::turned_interleaved(v, p); };
    if constexpr (C::normalises_heads)
      r.norm = [this](reference::numbers v, bool query) {
        return reference::normalised(v, query ? w.q_norm.weight.data() : w.k_norm.weight.data());
      };
    if constexpr (moe::detail::convolves<C>) {
      r.taps = C::key_convolution::length;
      r.convolution = [this](std::size_t l, std::size_t c) {
        return double{w.convolution.w(static_cast<dim>(l), static_cast<dim>(c))};
      };
    }
    const auto visible = C::selection::blocks ? reference::best_blocks(blocks.block, blocks.k) : reference::all_until;
    seen.clear();
    r.visible = [this, visible](const auto& keys, const auto& q, std::size_t t) {
      const std::vector<std::size_t> now = visible(keys, q, t);
      seen.insert(seen.end(), now.begin(), now.end());
      return now;
    };
    r.output = w.o.data;
    return r.run(x.data());
  }
  double loss() const {
    const reference::numbers out = by_formulas();
    double sum = 0;
    for (std::size_t i = 0; i < out.size(); ++i) sum += out[i] * double{dy[i]};
    return sum;
  }
};

/// Of results, relative to 1; of gradients, relative to the root mean square of those of their tensor.
struct errors {
  double results = 0, gradients = 0;
  int probed = 0, skipped = 0;  ///< where another block is chosen there is no slope
  std::string where;
};
template <class C>
errors worst() {
  trial<C> t;
  errors e;
  const reference::numbers y = t.by_formulas();
  for (std::size_t i = 0; i < y.size(); ++i) e.results = std::max(e.results, std::fabs(double{t.y[i]} - y[i]));
  const auto probe = [&](const std::string& name, std::span<float> values, std::span<const float> got) {
    double squares = 0;
    for (const float g : got) squares += double{g} * double{g};
    const double rms = std::sqrt(squares / static_cast<double>(got.size()));
    CHECK(rms > 1e-3);
    for (std::size_t i = 0; i < values.size(); i += 1 + values.size() / 41) {
      const float kept = values[i];
      values[i] = kept + 0x1p-10f;  // curvature costs 2^-20 / 6
      double step = values[i], difference = t.loss();
      const std::vector<std::size_t> above = t.seen;
      values[i] = kept - 0x1p-10f;
      step -= values[i];
      difference -= t.loss();
      values[i] = kept;
      ++e.probed;
      if (t.seen != above) {
        ++e.skipped;
        continue;
      }
      const double error = std::fabs(difference / step - double{got[i]}) / rms;
      if (!(error > e.gradients)) continue;
      e.gradients = error;
      e.where = name;
    }
  };
  probe("x", t.x, t.dx);
  for (const moe::slot& s : t.net.catalogue()) {
    const std::size_t first = s.offset / sizeof(float), n = static_cast<std::size_t>(s.rows * s.cols);
    probe(s.name, t.params.template as<float>().subspan(first, n), t.grads.template as<float>().subspan(first, n));
  }
  return e;
}

/// How many columns of m[rows, cols] are independent, up to the rounding of floats.
dim rank(std::vector<std::vector<double>> m) {
  dim found = 0;
  for (std::size_t c = 0; c < m[0].size(); ++c) {
    const auto first = m.begin() + found;
    const auto pivot =
        std::max_element(first, m.end(), [c](const auto& a, const auto& b) { return std::fabs(a[c]) < std::fabs(b[c]); });
    if (pivot == m.end() || std::fabs((*pivot)[c]) < 1e-4) continue;
    std::iter_swap(first, pivot);
    for (auto row = first + 1; row != m.end(); ++row) {
      const double factor = (*row)[c] / (*first)[c];
      for (std::size_t j = c; j < first->size(); ++j) (*row)[j] -= factor * (*first)[j];
    }
    ++found;
  }
  return found;
}
template <class G>
struct output_gated : moe::attention_features {
  using output_gate = moe::output_gate<G>;
};
/// Ranks of what one head gives for the second token of each of many pairs, and of that beside what its values are made of:
/// keys are zero, so that it is the mean of the pair. `constant` takes the logits' weights away.
template <class G>
std::pair<dim, dim> ranks(bool constant) {
  constexpr dim model = 6, dv = 2, pairs = 60, tokens = 2 * pairs;
  const moe::self_attention<output_gated<G>, moe::scalar<>> net(model, {.heads = 1, .kv_heads = 1, .d = 4, .dv = dv});
  moe::buffer params(net.weight_bytes()), work(net.scratch_bytes(tokens, pairs));
  moe::arena p(params.bytes()), mem(work.bytes());
  const auto w = net.make_weights(p);
  const std::vector<float> random = normals(params.as<float>().size(), 3, 0.7f);
  std::copy(random.begin(), random.end(), params.as<float>().begin());
  std::fill_n(w.k.data, w.k.rows * w.k.cols, 0.f);
  if (constant) std::fill_n(w.output_gate.data, w.output_gate.rows * w.output_gate.cols, 0.f);
  std::vector<idx> each;
  for (dim t = 0; t <= tokens; t += 2) each.push_back(static_cast<idx>(t));
  std::vector<float> x = normals(tokens * model, 7, 1), y(x.size());
  net.forward(w, {{x.data(), tokens, model}, {each, {}}, {}}, {y.data(), tokens, model}, mem);
  std::vector<std::vector<double>> outputs, beside;
  for (std::size_t t = 1; t < tokens; t += 2) {
    std::vector<double> both;
    for (std::size_t j = 0; j < model; ++j) both.push_back((double{x[(t - 1) * model + j]} + double{x[t * model + j]}) / 2);
    both.insert(both.end(), y.data() + t * model, y.data() + (t + 1) * model);
    outputs.emplace_back(both.begin() + model, both.end());
    beside.push_back(both);
  }
  return {rank(outputs), rank(beside)};
}

}  // namespace

TEST_SUITE("attention/gates") {
  TEST_CASE_TEMPLATE(
      "with a constant gate a head is a linear map of rank dv of its values' tokens; with one of the token it "
      "is no such map",
      G, moe::elementwise, moe::headwise, moe::head_shared) {
    // Outputs lie in the dv columns of the output projection, but only those of a constant gate follow from the tokens'
    // mean, whose rank is the model's width.
    CHECK(ranks<G>(true) == std::pair<dim, dim>(2, 6));
    CHECK(ranks<G>(false) == std::pair<dim, dim>(2, 6 + 2));
  }
  TEST_CASE_TEMPLATE("a gate at any position, and all of them, give the formulas in double and their gradients", C, plain,
                     on_output, on_values, on_keys, on_queries, on_layer, everywhere, convolved, over_blocks,
                     without_activation) {
    const errors e = worst<C>();
    INFO("worst gradient in " << e.where);
    CHECK(e.results < 1e-5);
    CHECK(e.gradients < 1e-4);
    CHECK(e.skipped * 10 < e.probed);
  }
}
