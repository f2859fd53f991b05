// SPDX-License-Identifier: Apache-2.0
// Every expert and combine of the library inside a layer, against formulas in double: forward, and backward by central
// differences of the double forward over x and over every weight. Formulas: papers of the headers, and the table of
// expert forms that the model families share.
#include <doctest/doctest.h>

#include <map>

#include "moe/moe.hpp"
#include "support/reference.hpp"
#include "support/storing_expert.hpp"
#include "support/testing.hpp"

namespace {

using moe::dim;
using reference::matrix;
using reference::vec;
using backend = moe::scalar<>;
template <class X, class C = moe::weighted_sum, int K = 2>
using layer_of = moe::layer<moe::linear_gate, moe::top_k<K>, X, C, backend>;

// float32: sums of up to some hundred products of values near one, three in a row; relative to the largest result of the
// tensor, or to 0.1 where that is smaller.
constexpr double tolerance = 2e-5;

using tensors = std::map<std::string, matrix>;
using forward_rule = std::function<matrix(const tensors& w, const matrix& x)>;

double off(std::span<const float> got, const vec& want) {
  REQUIRE(got.size() == want.size());
  double worst = 0, largest = 0.1;
  for (std::size_t i = 0; i < want.size(); ++i) {
    const double e = std::abs(got[i] - want[i]);
    if (!(e <= worst)) worst = e;
    largest = std::max(largest, std::abs(want[i]));
  }
  return worst / largest;
}

template <class Model>
void compare(Model& m, const forward_rule& rule) {
  m.forward();
  m.backward();
  const auto list = m.net.catalogue();
  tensors w;
  for (const moe::slot& s : list) w[s.name] = reference::tensor(list, m.weights(), s.name);
  matrix x(m.tokens, m.d, m.x);
  const matrix dy(m.tokens, m.d, m.dy);
  CHECK(off(m.y, rule(w, x).values) < tolerance);
  const auto loss = [&] { return reference::inner(rule(w, x), dy); };
  CHECK(off(m.dx, reference::gradient(x.values, loss)) < tolerance);
  for (const moe::slot& s : list) {
    CAPTURE(s.name);
    CHECK(off(m.gradients().subspan(s.offset / 4, s.bytes / 4), reference::gradient(w.at(s.name).values, loss)) < tolerance);
  }
}
template <class L>
void compare(const L& net, dim T, dim d, std::uint64_t seed, const forward_rule& rule) {
  testing::model<L> m(net, T, d, seed);
  compare(m, rule);
}

// What a layer does with its rows: token t's expert e weighs w; `expert` is handed all three.
using weighed_rule = std::function<vec(const tensors& w, dim e, const vec& x, double weight)>;
forward_rule routed(dim k, weighed_rule expert, double residual = 0, const char* gate = "gate.w") {
  return [=](const tensors& w, const matrix& x) {
    const matrix scores = reference::linear_gate(w.at(gate))(x);
    matrix y(x.rows, x.cols);
    for (dim t = 0; t < x.rows; ++t) {
      for (const auto& c : reference::softmax_of_best(scores.row(t), k)) {
        const vec row = expert(w, c.expert, x.row(t), c.weight);
        for (dim j = 0; j < x.cols; ++j) y(t, j) += row[static_cast<std::size_t>(j)];
      }
      for (dim j = 0; j < x.cols; ++j) y(t, j) += residual * x(t, j);
    }
    return y;
  };
}
using plain_rule = std::function<vec(const tensors& w, dim e, const vec& x)>;
vec times(double s, vec v) {
  for (double& a : v) a *= s;
  return v;
}
weighed_rule weigh_rows(plain_rule expert) {
  return [=](const tensors& w, dim e, const vec& x, double weight) { return times(weight, expert(w, e, x)); };
}

// Activations and forms. A plain form ignores g.
using form_rule = std::function<double(double g, double u)>;
double sigmoid(double z) { return 1 / (1 + std::exp(-z)); }
double relu(double z) { return std::max(z, 0.); }
double relu_squared(double z) { return relu(z) * relu(z); }
double silu(double z) { return z * sigmoid(z); }
double gelu(double z) { return z / 2 * (1 + std::erf(z / std::sqrt(2.))); }
double gelu_tanh(double z) { return z / 2 * (1 + std::tanh(std::sqrt(2 / std::acos(-1.)) * (z + 0.044715 * z * z * z))); }
double identity(double z) { return z; }
form_rule plain(double (*act)(double)) {
  return [act](double, double u) { return act(u); };
}
form_rule glu(double (*act)(double)) {
  return [act](double g, double u) { return act(g) * u; };
}
form_rule clamp(form_rule form, double limit) {
  return [=](double g, double u) { return form(std::min(g, limit), std::clamp(u, -limit, limit)); };
}
double shifted(double g, double u) { return (u + 1) * g * sigmoid(1.702 * g); }

// A feed-forward expert whose tensors carry `prefix`. What the catalogue does not have, the expert does not have.
enum class order { separate, chunked, interleaved };
plain_rule feed_forward(form_rule form, order lies, const std::string& prefix = "experts.") {
  return [=](const tensors& w, dim e, const vec& x) {
    const matrix& down = w.at(prefix + "down");
    const dim f = down.cols, d = static_cast<dim>(x.size());
    const auto product = [&](const std::string& name, dim row) {
      const matrix& m = w.at(prefix + name);
      double z = w.count(prefix + name + "_bias") ? w.at(prefix + name + "_bias")(row, 0) : 0;
      for (dim c = 0; c < m.cols; ++c) z += m(row, c) * x[static_cast<std::size_t>(c)];
      return z;
    };
    vec a(static_cast<std::size_t>(f)), y(x.size());
    for (dim i = 0; i < f; ++i) {
      double g = 0, u = 0;
      if (lies == order::separate) {
        u = product("up", e * f + i);
        if (w.count(prefix + "gate")) g = product("gate", e * f + i);
      } else {
        g = product("gate_up", e * 2 * f + (lies == order::chunked ? i : 2 * i));
        u = product("gate_up", e * 2 * f + (lies == order::chunked ? f + i : 2 * i + 1));
      }
      a[static_cast<std::size_t>(i)] = form(g, u);
    }
    for (dim j = 0; j < d; ++j) {
      double& to = y[static_cast<std::size_t>(j)];
      to = w.count(prefix + "down_bias") ? w.at(prefix + "down_bias")(e * d + j, 0) : 0;
      for (dim i = 0; i < f; ++i) to += down(e * d + j, i) * a[static_cast<std::size_t>(i)];
    }
    return y;
  };
}
template <class X>
void check_form(const X& expert, const form_rule& form, order lies = order::separate, std::uint64_t seed = 1) {
  compare(layer_of<X>({.d = 5, .f = 7, .experts = 3}, expert), 9, 5, seed, routed(2, weigh_rows(feed_forward(form, lies))));
}

// v and the mix of `constant_expert`: (a0, a1) = softmax(mix_e x), y = a0 x + a1 v_e.
plain_rule constant(const std::string& prefix) {
  return [=](const tensors& w, dim e, const vec& x) {
    const double z0 = reference::multiply(w.at(prefix + "mix"), 2 * e, 1, x)[0];
    const double z1 = reference::multiply(w.at(prefix + "mix"), 2 * e + 1, 1, x)[0];
    vec y(x.size());
    for (std::size_t j = 0; j < y.size(); ++j)
      y[j] = sigmoid(z0 - z1) * x[j] + sigmoid(z1 - z0) * w.at(prefix + "v")(e, static_cast<dim>(j));
    return y;
  };
}
plain_rule film(const std::string& prefix) {
  return [=](const tensors& w, dim e, const vec& x) {
    vec y(x.size());
    for (std::size_t j = 0; j < y.size(); ++j)
      y[j] = w.at(prefix + "gamma")(e, static_cast<dim>(j)) * x[j] + w.at(prefix + "beta")(e, static_cast<dim>(j));
    return y;
  };
}
plain_rule stored(const std::string& prefix) {
  return [=](const tensors& w, dim e, const vec& x) {
    vec y(x.size());
    for (std::size_t j = 0; j < y.size(); ++j) y[j] = w.at(prefix + "v")(e, static_cast<dim>(j)) * x[j];
    return y;
  };
}
vec copied(const tensors&, dim, const vec& x) { return x; }
vec nothing(const tensors&, dim, const vec& x) { return vec(x.size()); }
weighed_rule weigh_input(plain_rule expert) {
  return [=](const tensors& w, dim e, const vec& x, double weight) { return expert(w, e, times(weight, x)); };
}
weighed_rule no_weight(plain_rule expert) {
  return [=](const tensors& w, dim e, const vec& x, double) { return expert(w, e, x); };
}
// The banks of a set: `counts` experts each.
weighed_rule banks(std::vector<std::pair<dim, weighed_rule>> list) {
  return [=](const tensors& w, dim e, const vec& x, double weight) {
    for (const auto& [count, rule] : list) {
      if (e < count) return rule(w, e, x, weight);
      e -= count;
    }
    throw std::logic_error("no such expert");
  };
}
forward_rule plus(forward_rule a, forward_rule b) {
  return [=](const tensors& w, const matrix& x) {
    matrix y = a(w, x);
    const matrix z = b(w, x);
    for (std::size_t i = 0; i < y.values.size(); ++i) y.values[i] += z.values[i];
    return y;
  };
}
// Every token through expert 0 of `expert`; with the name of a gate, times sigmoid(<gate, x>).
forward_rule dense(plain_rule expert, const std::string& gate = "") {
  return [=](const tensors& w, const matrix& x) {
    matrix y(x.rows, x.cols);
    for (dim t = 0; t < x.rows; ++t) {
      const double open = gate.empty() ? 1 : sigmoid(reference::multiply(w.at(gate), 0, 1, x.row(t))[0]);
      const vec row = times(open, expert(w, 0, x.row(t)));
      std::copy(row.begin(), row.end(), y.values.begin() + t * x.cols);
    }
    return y;
  };
}

using testing::storing_expert;
static_assert(moe::TrainableExpert<storing_expert, backend>);

}  // namespace

TEST_SUITE("expert/ffn") {
  using moe::basic_ffn_expert, moe::chunked, moe::clamped, moe::ffn_expert, moe::gpt_oss_expert, moe::interleaved, moe::separate,
      moe::shifted_glu, moe::weighted_sum;

  TEST_CASE("plain forms agree with their formulas, forward and backward") {
    check_form(basic_ffn_expert<moe::plain<moe::relu>>{}, plain(::relu));
    check_form(basic_ffn_expert<moe::plain<moe::relu_squared>, separate, true>{}, plain(::relu_squared));
    check_form(basic_ffn_expert<moe::plain<moe::gelu>, separate, true>{}, plain(::gelu));
    check_form(basic_ffn_expert<moe::plain<moe::gelu_tanh>>{}, plain(::gelu_tanh));
    check_form(basic_ffn_expert<moe::plain<moe::silu>>{}, plain(::silu));
    check_form(basic_ffn_expert<moe::plain<moe::identity>, separate, true>{}, plain(::identity));
  }
  TEST_CASE("gated forms agree with their formulas in every layout, with biases and without") {
    check_form(basic_ffn_expert<moe::glu<moe::relu>, separate, true>{}, glu(::relu));
    check_form(basic_ffn_expert<moe::glu<moe::relu_squared>, chunked>{}, glu(::relu_squared), order::chunked);
    check_form(basic_ffn_expert<moe::glu<moe::gelu>, interleaved>{}, glu(::gelu), order::interleaved);
    check_form(basic_ffn_expert<moe::glu<moe::gelu_tanh>, chunked, true>{}, glu(::gelu_tanh), order::chunked);
    check_form(basic_ffn_expert<moe::glu<moe::identity>, interleaved, true>{}, glu(::identity), order::interleaved);
    check_form(ffn_expert{}, glu(::silu));
  }
  TEST_CASE("a layer of a plain form has nothing to interleave: its layout changes nothing") {
    check_form(basic_ffn_expert<moe::plain<moe::gelu>, interleaved, true>{}, plain(::gelu));
  }
  TEST_CASE("clamped forms clamp before the product and stop the gradient beyond the limit") {
    check_form(basic_ffn_expert<clamped<moe::glu<moe::silu>>, chunked>{{.form = {}, .limit = 0.3f}}, clamp(glu(::silu), double{0.3f}),
               order::chunked);
    check_form(basic_ffn_expert<shifted_glu>{}, shifted);
    check_form(gpt_oss_expert{{.form = {}, .limit = 0.4f}}, clamp(shifted, double{0.4f}), order::interleaved);
  }
  TEST_CASE("the gpt-oss expert clamps at 7 with alpha 1.702, gates on even rows, ups on odd rows") {
    testing::model<layer_of<gpt_oss_expert>> m(layer_of<gpt_oss_expert>({.d = 5, .f = 7, .experts = 3}), 9, 5, 3);
    for (float& v : m.x) v *= 8;
    compare(m, routed(2, weigh_rows(feed_forward(clamp(shifted, 7), order::interleaved))));
    int beyond = 0;
    for (dim r = 0; r < m.ctx.plan.rows(); ++r)
      for (dim j = 0; j < 14; ++j) beyond += std::fabs(m.ctx.experts.z(r, j)) > 7;
    CHECK(beyond > 20);
  }
  TEST_CASE("odd shapes: one expert, one token, k = E, widths of one, more experts than rows") {
    const auto rule = [](dim k) { return routed(k, weigh_rows(feed_forward(glu(::silu), order::chunked))); };
    using expert = basic_ffn_expert<moe::glu<moe::silu>, chunked, true>;
    compare(layer_of<expert, weighted_sum, 1>({.d = 3, .f = 5, .experts = 1}), 6, 3, 11, rule(1));
    compare(layer_of<expert>({.d = 4, .f = 9, .experts = 4}), 1, 4, 12, rule(2));
    compare(layer_of<expert, weighted_sum, 3>({.d = 5, .f = 3, .experts = 3}), 8, 5, 13, rule(3));
    compare(layer_of<expert>({.d = 1, .f = 1, .experts = 2}), 5, 1, 14, rule(2));
    compare(layer_of<expert>({.d = 17, .f = 2, .experts = 9}), 2, 17, 15, rule(2));
    compare(layer_of<expert>({.d = 2, .f = 33, .experts = 3}), 5, 2, 16, rule(2));
  }
  TEST_CASE("all tokens on two experts: the others get no gradient at all") {
    using expert = basic_ffn_expert<moe::glu<moe::gelu>, interleaved, true>;
    testing::model<layer_of<expert>> m(layer_of<expert>({.d = 5, .f = 6, .experts = 4}), 70, 5, 17);
    for (dim t = 0; t < 70; ++t) m.x[static_cast<std::size_t>(t * 5)] = 1;
    m.w.gate.w(1, 0) = 20;
    m.w.gate.w(3, 0) = 20;
    compare(m, routed(2, weigh_rows(feed_forward(glu(::gelu), order::interleaved))));
    CHECK(m.ctx.plan.offsets[1] == 0);
    CHECK(m.ctx.plan.offsets[2] == m.ctx.plan.offsets[3]);
    for (dim i = 0; i < 12; ++i)
      for (dim j = 0; j < 5; ++j) {
        CHECK(m.dw.experts.gate_up(i, j) == 0);
        CHECK(m.dw.experts.gate_up(2 * 12 + i, j) == 0);
      }
  }
}

TEST_SUITE("expert/layout") {
  // The same weights in three layouts: y and all gradients are equal bit for bit.
  TEST_CASE("re-arranged weights are the same function bit for bit") {
    using moe::basic_ffn_expert, moe::chunked, moe::interleaved, moe::separate;
    const dim T = 21, d = 9, f = 11, E = 3;
    const moe::shape sizes{.d = d, .f = f, .experts = E};
    testing::model<layer_of<basic_ffn_expert<moe::glu<moe::silu>, separate, true>>> a(layer_of<basic_ffn_expert<moe::glu<moe::silu>, separate, true>>(sizes), T, d, 5);
    testing::model<layer_of<basic_ffn_expert<moe::glu<moe::silu>, chunked, true>>> b(layer_of<basic_ffn_expert<moe::glu<moe::silu>, chunked, true>>(sizes), T, d, 5);
    testing::model<layer_of<basic_ffn_expert<moe::glu<moe::silu>, interleaved, true>>> c(layer_of<basic_ffn_expert<moe::glu<moe::silu>, interleaved, true>>(sizes), T, d, 5);
    // f(both, gate, up) for a row of gate_up in each layout.
    const auto each_row = [&](auto fused, auto gate, auto up, bool even, auto f2) {
      for (dim e = 0; e < E; ++e)
        for (dim i = 0; i < f; ++i)
          for (dim j = 0; j < fused.cols; ++j) {
            f2(fused(e * 2 * f + (even ? 2 * i : i), j), gate(e * f + i, j));
            f2(fused(e * 2 * f + (even ? 2 * i + 1 : f + i), j), up(e * f + i, j));
          }
    };
    const auto assign = [](float& to, float from) { to = from; };
    const auto same = [](const auto& from, const auto& to) {
      for (dim r = 0; r < from.rows; ++r)
        for (dim j = 0; j < from.cols; ++j) to(r, j) = from(r, j);
    };
    const auto take = [&](auto& m, bool even) {
      each_row(m.w.experts.gate_up, a.w.experts.gate, a.w.experts.up, even, assign);
      each_row(m.w.experts.gate_up_bias, a.w.experts.gate_bias, a.w.experts.up_bias, even, assign);
      same(a.w.gate.w, m.w.gate.w);
      same(a.w.experts.down, m.w.experts.down);
      same(a.w.experts.down_bias, m.w.experts.down_bias);
    };
    take(b, false);
    take(c, true);
    a.forward();
    b.forward();
    c.forward();
    CHECK(a.y == b.y);
    CHECK(a.y == c.y);
    a.backward();
    b.backward();
    c.backward();
    CHECK(a.dx == b.dx);
    CHECK(a.dx == c.dx);
    int different = 0;
    const auto count = [&](float x, float y) { different += x != y; };
    each_row(b.dw.experts.gate_up, a.dw.experts.gate, a.dw.experts.up, false, count);
    each_row(c.dw.experts.gate_up, a.dw.experts.gate, a.dw.experts.up, true, count);
    each_row(b.dw.experts.gate_up_bias, a.dw.experts.gate_bias, a.dw.experts.up_bias, false, count);
    each_row(c.dw.experts.gate_up_bias, a.dw.experts.gate_bias, a.dw.experts.up_bias, true, count);
    CHECK(different == 0);
  }
}

TEST_SUITE("expert/trivial") {
  TEST_CASE("constant experts mix x and v by a softmax, forward and backward") {
    compare(layer_of<moe::constant_expert>({.d = 5, .experts = 4}), 9, 5, 21, routed(2, weigh_rows(constant("experts."))));
    compare(layer_of<moe::constant_expert, moe::residual<>, 1>({.d = 1, .experts = 1}), 3, 1, 22,
            routed(1, weigh_rows(constant("experts.")), 1));
  }
  TEST_CASE("copy and zero experts have their formulas, forward and backward") {
    compare(layer_of<moe::copy_expert>({.d = 4, .experts = 3}), 7, 4, 23, routed(2, weigh_rows(copied)));
    compare(layer_of<moe::zero_expert>({.d = 4, .experts = 3}), 7, 4, 24, routed(2, weigh_rows(nothing)));
  }
}

TEST_SUITE("expert/set") {
  TEST_CASE("a set of every kind of expert agrees with the formulas of its banks") {
    using plus_one = moe::basic_ffn_expert<moe::glu<moe::gelu_tanh>, moe::interleaved, true>;
    using set = moe::expert_set<moe::ffn_expert, storing_expert, moe::film_expert, plus_one, moe::constant_expert, moe::copy_expert,
                                moe::zero_expert>;
    const set experts{{.count = 2, .f = 3}, {.count = 1}, {.count = 1}, {.count = 1, .f = 8}, {.count = 2}, {.count = 1}, {.count = 1}};
    compare(layer_of<set, moe::weighted_sum, 3>({.d = 5, .experts = 9}, experts), 17, 5, 31,
            routed(3, banks({{2, weigh_rows(feed_forward(glu(::silu), order::separate, "experts.0."))},
                             {1, weigh_rows(stored("experts.1."))},
                             {1, weigh_rows(film("experts.2."))},
                             {1, weigh_rows(feed_forward(glu(::gelu_tanh), order::interleaved, "experts.3."))},
                             {2, weigh_rows(constant("experts.4."))},
                             {1, weigh_rows(copied)},
                             {1, weigh_rows(nothing)}})));
  }
  TEST_CASE("a set within a set is one expert after another") {
    using inside = moe::expert_set<moe::copy_expert, moe::basic_ffn_expert<moe::plain<moe::relu>>, storing_expert>;
    using set = moe::expert_set<moe::ffn_expert, inside, moe::constant_expert>;
    const set experts{{.count = 1, .f = 3}, {.count = 4, .f = 6, .expert = inside{{.count = 1}, {.count = 2}, {.count = 1}}}, {.count = 1}};
    compare(layer_of<set>({.d = 4, .experts = 6}, experts), 14, 4, 32,
            routed(2, banks({{1, weigh_rows(feed_forward(glu(::silu), order::separate, "experts.0."))},
                             {1, weigh_rows(copied)},
                             {2, weigh_rows(feed_forward(plain(::relu), order::separate, "experts.1.1."))},
                             {1, weigh_rows(stored("experts.1.2."))},
                             {1, weigh_rows(constant("experts.2."))}})));
  }
}

TEST_SUITE("expert/weigh_input") {
  template <class X>
  using llama = layer_of<moe::weigh_input<X>, moe::unweighted_sum>;

  TEST_CASE("the weight is applied to the input, whatever the expert stores") {
    compare(llama<moe::ffn_expert>({.d = 5, .f = 7, .experts = 3}), 9, 5, 41,
            routed(2, weigh_input(feed_forward(glu(::silu), order::separate))));
    compare(llama<moe::gpt_oss_expert>({.d = 5, .f = 6, .experts = 3}), 9, 5, 42,
            routed(2, weigh_input(feed_forward(clamp(shifted, 7), order::interleaved))));
    compare(llama<moe::film_expert>({.d = 5, .experts = 3}), 9, 5, 43, routed(2, weigh_input(film("experts."))));
    compare(llama<moe::constant_expert>({.d = 5, .experts = 3}), 9, 5, 44, routed(2, weigh_input(constant("experts."))));
    compare(llama<moe::copy_expert>({.d = 5, .experts = 3}), 9, 5, 45, routed(2, weigh_input(copied)));
    compare(llama<storing_expert>({.d = 5, .experts = 3}), 9, 5, 46, routed(2, weigh_input(stored("experts."))));
  }
  TEST_CASE("a weight on the input and on the output are two factors, and both reach the router") {
    compare(layer_of<moe::weigh_input<moe::ffn_expert>>({.d = 5, .f = 7, .experts = 3}), 9, 5, 47,
            routed(2, [ffn = feed_forward(glu(::silu), order::separate)](const tensors& w, dim e, const vec& x, double weight) {
              return times(weight, ffn(w, e, times(weight, x)));
            }));
    compare(layer_of<moe::weigh_input<storing_expert>>({.d = 5, .experts = 3}), 9, 5, 48,
            routed(2, [](const tensors& w, dim e, const vec& x, double weight) {
              return times(weight, stored("experts.")(w, e, times(weight, x)));
            }));
  }
  TEST_CASE("banks that weigh their input stand beside banks that do not, and around whole sets") {
    using set = moe::expert_set<moe::weigh_input<moe::copy_expert>, moe::weigh_input<storing_expert>, moe::ffn_expert, moe::copy_expert,
                                moe::weigh_input<moe::constant_expert>, storing_expert, moe::weigh_input<moe::ffn_expert>>;
    const set experts{{.count = 1}, {.count = 1}, {.count = 1, .f = 6}, {.count = 1}, {.count = 2}, {.count = 1}, {.count = 1, .f = 9}};
    compare(layer_of<set, moe::unweighted_sum, 3>({.d = 5, .experts = 8}, experts), 15, 5, 49,
            routed(3, banks({{1, weigh_input(copied)},
                             {1, weigh_input(stored("experts.1."))},
                             {1, no_weight(feed_forward(glu(::silu), order::separate, "experts.2."))},
                             {1, no_weight(copied)},
                             {2, weigh_input(constant("experts.4."))},
                             {1, no_weight(stored("experts.5."))},
                             {1, weigh_input(feed_forward(glu(::silu), order::separate, "experts.6."))}})));
    using inside = moe::expert_set<moe::ffn_expert, storing_expert, moe::copy_expert>;
    compare(llama<inside>({.d = 5, .experts = 4}, moe::weigh_input<inside>{{{.count = 2, .f = 3}, {.count = 1}, {.count = 1}}}), 12, 5, 50,
            routed(2, banks({{2, weigh_input(feed_forward(glu(::silu), order::separate, "experts.0."))},
                             {1, weigh_input(stored("experts.1."))},
                             {1, weigh_input(copied)}})));
  }
}

TEST_SUITE("combine/weighted_sum") {
  TEST_CASE("a sum without weights gives the router no gradient from experts that do not read them") {
    compare(layer_of<moe::ffn_expert, moe::unweighted_sum>({.d = 5, .f = 7, .experts = 3}), 9, 5, 61,
            routed(2, no_weight(feed_forward(glu(::silu), order::separate))));
    compare(layer_of<storing_expert, moe::unweighted_sum>({.d = 5, .experts = 3}), 9, 5, 62, routed(2, no_weight(stored("experts."))));
  }
}

TEST_SUITE("combine/residual") {
  TEST_CASE("x is added once a token, whatever is inside") {
    compare(layer_of<moe::ffn_expert, moe::residual<>>({.d = 5, .f = 7, .experts = 3}), 9, 5, 63,
            routed(2, weigh_rows(feed_forward(glu(::silu), order::separate)), 1));
    compare(layer_of<storing_expert, moe::residual<moe::unweighted_sum>>({.d = 5, .experts = 3}), 9, 5, 64,
            routed(2, no_weight(stored("experts.")), 1));
  }
}

TEST_SUITE("combine/mix_before_trunk") {
  // The trunk of what `mixed` gives, its tensors under combine.
  forward_rule trunk(forward_rule mixed, plain_rule expert, double residual = 0) {
    return [=](const tensors& w, const matrix& x) {
      const matrix y = dense(expert)(w, mixed(w, x));
      matrix sum = y;
      for (std::size_t i = 0; i < sum.values.size(); ++i) sum.values[i] += residual * x.values[i];
      return sum;
    };
  }
  TEST_CASE("rows are mixed, then pass the trunk, for trunks that store rows, weigh none or are sets") {
    using moe::film_expert, moe::mix_before_trunk;
    const auto mixed = routed(2, weigh_rows(film("experts.")));
    using ffn = moe::basic_ffn_expert<moe::plain<moe::gelu>, moe::separate, true>;
    compare(layer_of<film_expert, mix_before_trunk<ffn>>({.d = 5, .experts = 3}, mix_before_trunk<ffn>{.trunk = {}, .f = 7}), 9, 5, 65,
            trunk(mixed, feed_forward(plain(::gelu), order::separate, "combine.")));
    compare(layer_of<film_expert, moe::residual<mix_before_trunk<storing_expert>>>({.d = 5, .experts = 3}), 9, 5, 66,
            trunk(mixed, stored("combine."), 1));
    compare(layer_of<storing_expert, mix_before_trunk<moe::weigh_input<storing_expert>>>({.d = 5, .experts = 3}), 9, 5, 67,
            trunk(routed(2, weigh_rows(stored("experts."))), stored("combine.")));
  }
}

TEST_SUITE("sum") {
  TEST_CASE("shared experts, plain and gated, add themselves to the routed ones") {
    using routed_layer = layer_of<moe::ffn_expert>;
    const routed_layer net({.d = 5, .f = 7, .experts = 3});
    const auto of_routed = routed(2, weigh_rows(feed_forward(glu(::silu), order::separate, "routed.experts.")), 0, "routed.gate.w");
    const auto shared = feed_forward(glu(::silu), order::separate, "shared.experts.");
    compare(moe::sum(net, moe::dense<moe::ffn_expert, backend>({.d = 5, .f = 4})), 9, 5, 71, plus(of_routed, dense(shared)));
    compare(moe::sum(net, moe::gated_dense<moe::ffn_expert, backend>({.d = 5, .f = 11})), 9, 5, 72,
            plus(of_routed, dense(shared, "shared.gate.w")));
    compare(moe::sum(moe::sum(net, moe::dense<storing_expert, backend>({.d = 5})), moe::gated_dense<moe::copy_expert, backend>({.d = 5})),
            9, 5, 73,
            plus(plus(routed(2, weigh_rows(feed_forward(glu(::silu), order::separate, "routed.routed.experts.")), 0, "routed.routed.gate.w"),
                      dense(stored("routed.shared.experts."))),
                 dense(copied, "shared.gate.w")));
  }
  TEST_CASE("a dense layer runs any expert, gated or not") {
    const auto check = [](const auto& net, const plain_rule& rule, bool gated) {
      compare(net, 7, 5, 74, dense(rule, gated ? "gate.w" : ""));
    };
    using oss = moe::gpt_oss_expert;
    check(moe::dense<oss, backend>({.d = 5, .f = 6}), feed_forward(clamp(shifted, 7), order::interleaved), false);
    check(moe::gated_dense<oss, backend>({.d = 5, .f = 6}), feed_forward(clamp(shifted, 7), order::interleaved), true);
    check(moe::dense<moe::constant_expert, backend>({.d = 5}), constant("experts."), false);
    check(moe::gated_dense<moe::constant_expert, backend>({.d = 5}), constant("experts."), true);
    check(moe::gated_dense<storing_expert, backend>({.d = 5}), stored("experts."), true);
    check(moe::dense<moe::film_expert, backend>({.d = 5}), film("experts."), false);
    check(moe::gated_dense<moe::weigh_input<moe::ffn_expert>, backend>({.d = 5, .f = 6}), feed_forward(glu(::silu), order::separate), true);
    using mixed = moe::expert_set<moe::copy_expert, moe::ffn_expert>;
    check(moe::gated_dense<mixed, backend>({.d = 5}, mixed{{.count = 0}, {.count = 1, .f = 3}}),
          feed_forward(glu(::silu), order::separate, "experts.1."), true);
  }
}
