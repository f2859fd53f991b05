// SPDX-License-Identifier: Apache-2.0
/// Formulas of experts and combines in double, and the comparison of a layer with them: forward, and backward by central
/// differences of the double forward over x and over every weight.
#pragma once

#include <doctest/doctest.h>

#include <map>

#include "support/reference.hpp"
#include "support/testing.hpp"

namespace golden {

using moe::dim;
using reference::matrix;
using reference::vec;

// float32: sums of up to some hundred products of values near one, three in a row; relative to the largest result of the
// tensor, or to 0.1 where that is smaller.
inline constexpr double tolerance = 2e-5;

using tensors = std::map<std::string, matrix>;
using forward_rule = std::function<matrix(const tensors& w, const matrix& x)>;

inline double off(std::span<const float> got, const vec& want) {
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
inline forward_rule routed(dim k, weighed_rule expert, double residual = 0, const char* gate = "gate.w") {
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
inline vec times(double s, vec v) {
  for (double& a : v) a *= s;
  return v;
}
inline weighed_rule weigh_rows(plain_rule expert) {
  return [=](const tensors& w, dim e, const vec& x, double weight) { return times(weight, expert(w, e, x)); };
}

// Activations and forms. A plain form ignores g.
using form_rule = std::function<double(double g, double u)>;
inline double sigmoid(double z) { return 1 / (1 + std::exp(-z)); }
inline double relu(double z) { return std::max(z, 0.); }
inline double relu_squared(double z) { return relu(z) * relu(z); }
inline double silu(double z) { return z * sigmoid(z); }
inline double gelu(double z) { return z / 2 * (1 + std::erf(z / std::sqrt(2.))); }
inline double gelu_tanh(double z) {
  return z / 2 * (1 + std::tanh(std::sqrt(2 / std::acos(-1.)) * (z + 0.044715 * z * z * z)));
}
inline double identity(double z) { return z; }
inline form_rule plain(double (*act)(double)) {
  return [act](double, double u) { return act(u); };
}
inline form_rule glu(double (*act)(double)) {
  return [act](double g, double u) { return act(g) * u; };
}
inline form_rule clamp(form_rule form, double limit) {
  return [=](double g, double u) { return form(std::min(g, limit), std::clamp(u, -limit, limit)); };
}
inline double shifted(double g, double u) { return (u + 1) * g * sigmoid(1.702 * g); }

// A feed-forward expert whose tensors carry `prefix`. What the catalogue does not have, the expert does not have.
enum class order { separate, chunked, interleaved };
inline plain_rule feed_forward(form_rule form, order lies, const std::string& prefix = "experts.") {
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
// v and the mix of `constant_expert`: (a0, a1) = softmax(mix_e x), y = a0 x + a1 v_e.
inline plain_rule constant(const std::string& prefix) {
  return [=](const tensors& w, dim e, const vec& x) {
    const double z0 = reference::multiply(w.at(prefix + "mix"), 2 * e, 1, x)[0];
    const double z1 = reference::multiply(w.at(prefix + "mix"), 2 * e + 1, 1, x)[0];
    vec y(x.size());
    for (std::size_t j = 0; j < y.size(); ++j)
      y[j] = sigmoid(z0 - z1) * x[j] + sigmoid(z1 - z0) * w.at(prefix + "v")(e, static_cast<dim>(j));
    return y;
  };
}
inline plain_rule film(const std::string& prefix) {
  return [=](const tensors& w, dim e, const vec& x) {
    vec y(x.size());
    for (std::size_t j = 0; j < y.size(); ++j)
      y[j] = w.at(prefix + "gamma")(e, static_cast<dim>(j)) * x[j] + w.at(prefix + "beta")(e, static_cast<dim>(j));
    return y;
  };
}
inline plain_rule stored(const std::string& prefix) {
  return [=](const tensors& w, dim e, const vec& x) {
    vec y(x.size());
    for (std::size_t j = 0; j < y.size(); ++j) y[j] = w.at(prefix + "v")(e, static_cast<dim>(j)) * x[j];
    return y;
  };
}
inline vec copied(const tensors&, dim, const vec& x) { return x; }
inline vec nothing(const tensors&, dim, const vec& x) { return vec(x.size()); }
inline weighed_rule weigh_input(plain_rule expert) {
  return [=](const tensors& w, dim e, const vec& x, double weight) { return expert(w, e, times(weight, x)); };
}
inline weighed_rule no_weight(plain_rule expert) {
  return [=](const tensors& w, dim e, const vec& x, double) { return expert(w, e, x); };
}
// The banks of a set: `counts` experts each.
inline weighed_rule banks(std::vector<std::pair<dim, weighed_rule>> list) {
  return [=](const tensors& w, dim e, const vec& x, double weight) {
    for (const auto& [count, rule] : list) {
      if (e < count) return rule(w, e, x, weight);
      e -= count;
    }
    throw std::logic_error("no such expert");
  };
}
inline forward_rule plus(forward_rule a, forward_rule b) {
  return [=](const tensors& w, const matrix& x) {
    matrix y = a(w, x);
    const matrix z = b(w, x);
    for (std::size_t i = 0; i < y.values.size(); ++i) y.values[i] += z.values[i];
    return y;
  };
}
// Every token through expert 0 of `expert`; with the name of a gate, times sigmoid(<gate, x>).
inline forward_rule dense(plain_rule expert, const std::string& gate = "") {
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

}  // namespace golden
