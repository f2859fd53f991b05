// SPDX-License-Identifier: Apache-2.0
/// A whole layer in double precision, written from the formulas of the field and not from the library's kernels. A test
/// plugs in its own gate, routing rule, expert or combine; gradients come from double finite differences, for the default
/// layer also from formulas.
#pragma once

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <span>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "moe/core/arena.hpp"

namespace reference {

using moe::dim;
using vec = std::vector<double>;

/// Row-major, owning.
struct matrix {
  dim rows = 0, cols = 0;
  vec values;

  matrix() = default;
  matrix(dim r, dim c) : rows(r), cols(c), values(static_cast<std::size_t>(r * c)) {}
  matrix(dim r, dim c, std::span<const float> v) : rows(r), cols(c), values(v.begin(), v.end()) {
    if (static_cast<dim>(values.size()) != r * c) throw std::invalid_argument("reference::matrix: not r x c values");
  }
  double& operator()(dim r, dim c) { return values[static_cast<std::size_t>(r * cols + c)]; }
  double operator()(dim r, dim c) const { return values[static_cast<std::size_t>(r * cols + c)]; }
  vec row(dim r) const { return {values.begin() + r * cols, values.begin() + (r + 1) * cols}; }
};

/// The tensor `name` of a flat float32 buffer.
inline matrix tensor(const std::vector<moe::slot>& catalogue, std::span<const float> flat, const std::string& name) {
  for (const moe::slot& s : catalogue)
    if (s.name == name) return {s.rows, s.cols, flat.subspan(s.offset / sizeof(float), s.bytes / sizeof(float))};
  throw std::invalid_argument("reference::tensor: no tensor is called " + name);
}

/// Largest difference over the largest wanted value: the error of sums whose terms are of that size.
inline double error(std::span<const float> got, const vec& want) {
  if (got.size() != want.size()) return std::numeric_limits<double>::infinity();
  double worst = 0, largest = 0;
  for (std::size_t i = 0; i < want.size(); ++i) {
    const double e = std::abs(got[i] - want[i]);
    if (!(e <= worst)) worst = e;  // a NaN stays
    largest = std::max(largest, std::abs(want[i]));
  }
  return largest > 0 ? worst / largest : worst;
}

/// d loss / d values by central differences; the error is about 1e-9 of values near one.
template <class Loss>
vec gradient(vec& values, Loss loss) {
  constexpr double h = 1e-5;
  vec g(values.size());
  for (std::size_t i = 0; i < values.size(); ++i) {
    const double kept = values[i];
    values[i] = kept + h;
    const double up = loss();
    values[i] = kept - h;
    g[i] = (up - loss()) / (2 * h);
    values[i] = kept;
  }
  return g;
}
inline double inner(const matrix& a, const matrix& b) {
  double s = 0;
  for (std::size_t i = 0; i < a.values.size(); ++i) s += a.values[i] * b.values[i];
  return s;
}

struct choice {
  dim expert;
  double weight;
};
using choices = std::vector<choice>;  ///< of one token, in the order of its choices

using gate_rule = std::function<matrix(const matrix& x)>;                       ///< scores[T,E]
using router_rule = std::function<std::vector<choices>(const matrix& scores)>;  ///< of every token
using expert_rule = std::function<vec(dim e, const vec& x)>;                    ///< expert e of one token
using combine_rule = std::function<vec(const vec& x, const choices& c, const std::vector<vec>& ys)>;  ///< ys[j] of c[j]

/// scores = x w^T (+ bias)
inline gate_rule linear_gate(matrix w, vec bias = {}) {
  return [w = std::move(w), bias = std::move(bias)](const matrix& x) {
    matrix scores(x.rows, w.rows);
    for (dim t = 0; t < x.rows; ++t)
      for (dim e = 0; e < w.rows; ++e) {
        double s = bias.empty() ? 0 : bias[static_cast<std::size_t>(e)];
        for (dim c = 0; c < x.cols; ++c) s += x(t, c) * w(e, c);
        scores(t, e) = s;
      }
    return scores;
  };
}

/// A rule for each token by itself.
inline router_rule each_token(std::function<choices(const vec& scores)> rule) {
  return [rule = std::move(rule)](const matrix& scores) {
    std::vector<choices> all;
    for (dim t = 0; t < scores.rows; ++t) all.push_back(rule(scores.row(t)));
    return all;
  };
}
/// The k experts with the largest keys, ties to the lower index, -inf and NaN left out.
inline std::vector<dim> best(const vec& keys, dim k) {
  std::vector<dim> order;
  for (std::size_t e = 0; e < keys.size(); ++e)
    if (keys[e] > -std::numeric_limits<double>::infinity()) order.push_back(static_cast<dim>(e));
  std::sort(order.begin(), order.end(), [&](dim a, dim b) {
    const double x = keys[static_cast<std::size_t>(a)], y = keys[static_cast<std::size_t>(b)];
    return x != y ? x > y : a < b;
  });
  if (static_cast<dim>(order.size()) > k) order.resize(static_cast<std::size_t>(k));
  return order;
}
/// Softmax over the scores of the k best.
inline choices softmax_of_best(const vec& scores, dim k) {
  choices c;
  double sum = 0;
  const std::vector<dim> chosen = best(scores, k);
  for (const dim e : chosen) {
    const double z = scores[static_cast<std::size_t>(e)], largest = scores[static_cast<std::size_t>(chosen[0])];
    c.push_back({e, std::exp(z - largest)});
    sum += c.back().weight;
  }
  for (choice& j : c) j.weight /= sum;
  return c;
}
inline router_rule top_k(dim k) {
  return each_token([k](const vec& scores) { return softmax_of_best(scores, k); });
}
/// The k best, each with weight 1.
inline router_rule select_only(dim k) {
  return each_token([k](const vec& scores) {
    choices c;
    for (const dim e : best(scores, k)) c.push_back({e, 1});
    return c;
  });
}

/// sum of weight_j ys_j
inline vec weighted_sum(const vec& x, const choices& c, const std::vector<vec>& ys) {
  vec y(ys.empty() ? x.size() : ys[0].size());
  for (std::size_t j = 0; j < c.size(); ++j)
    for (std::size_t i = 0; i < y.size(); ++i) y[i] += c[j].weight * ys[j][i];
  return y;
}

/// An activation and its derivative.
struct activation {
  double (*value)(double);
  double (*slope)(double);
};
inline double sigmoid(double z) { return 1 / (1 + std::exp(-z)); }
inline const activation silu{[](double z) { return z * sigmoid(z); },
                             [](double z) { return sigmoid(z) + z * sigmoid(z) * (1 - sigmoid(z)); }};

/// m[rows of block e] v, for E matrices stacked by rows.
inline vec multiply(const matrix& m, dim e, dim rows, const vec& v) {
  vec out(static_cast<std::size_t>(rows));
  for (dim r = 0; r < rows; ++r)
    for (dim c = 0; c < m.cols; ++c) out[static_cast<std::size_t>(r)] += m(e * rows + r, c) * v[static_cast<std::size_t>(c)];
  return out;
}
/// down_e (act(gate_e x) * (up_e x)), or down_e act(up_e x) where there is no gate: up, gate [E*f,d], down [E*d,f].
inline expert_rule feed_forward(matrix up, matrix gate, matrix down, activation act = silu) {
  return [=](dim e, const vec& x) {
    const dim f = down.cols;
    vec a = multiply(up, e, f, x);
    if (gate.rows > 0) {
      const vec g = multiply(gate, e, f, x);
      for (std::size_t i = 0; i < a.size(); ++i) a[i] *= act.value(g[i]);
    } else {
      for (double& v : a) v = act.value(v);
    }
    return multiply(down, e, static_cast<dim>(x.size()), a);
  };
}

struct layer {
  gate_rule gate;
  router_rule router;
  expert_rule expert;
  combine_rule combine = weighted_sum;

  matrix forward(const matrix& x) const {
    const std::vector<choices> plan = router(gate(x));
    matrix y;
    for (dim t = 0; t < x.rows; ++t) {
      const choices& c = plan[static_cast<std::size_t>(t)];
      std::vector<vec> ys;
      for (const choice& j : c) ys.push_back(expert(j.expert, x.row(t)));
      const vec out = combine(x.row(t), c, ys);
      if (t == 0) y = matrix(x.rows, static_cast<dim>(out.size()));
      std::copy(out.begin(), out.end(), y.values.begin() + t * y.cols);
    }
    return y;
  }
};

/// Linear gate, softmax over the k best, gated feed-forward experts, weighted sum: forward as above, backward by formula.
/// At a kink the activation's given slope counts.
struct ffn_layer {
  dim k;
  matrix gate_w, up, gate, down;  ///< [E,d] [E*f,d] [E*f,d] [E*d,f]
  activation act = silu;
  bool weighs = true;  ///< false: every choice weighs 1, and the gate has no gradient

  /// Takes its weights from a layer of the library with the same parts.
  ffn_layer(dim k_, const std::vector<moe::slot>& catalogue, std::span<const float> flat)
      : k(k_),
        gate_w(tensor(catalogue, flat, "gate.w")),
        up(tensor(catalogue, flat, "experts.up")),
        gate(tensor(catalogue, flat, "experts.gate")),
        down(tensor(catalogue, flat, "experts.down")) {}

  matrix forward(const matrix& x) const {
    return layer{linear_gate(gate_w), router(), feed_forward(up, gate, down, act)}.forward(x);
  }

  struct gradients {
    matrix x, gate_w, up, gate, down;
  };
  gradients backward(const matrix& x, const matrix& dy) const {
    gradients g{
        {x.rows, x.cols}, {gate_w.rows, gate_w.cols}, {up.rows, up.cols}, {gate.rows, gate.cols}, {down.rows, down.cols}};
    const std::vector<choices> plan = router()(linear_gate(gate_w)(x));
    for (dim t = 0; t < x.rows; ++t) {
      const choices& c = plan[static_cast<std::size_t>(t)];
      vec dweight;
      for (const choice& j : c) dweight.push_back(expert_backward(g, x, dy, t, j));
      if (!weighs) continue;
      double mean = 0;  // of the softmax: ds_j = w_j (dw_j - sum w_i dw_i)
      for (std::size_t j = 0; j < c.size(); ++j) mean += c[j].weight * dweight[j];
      for (std::size_t j = 0; j < c.size(); ++j) {
        const double ds = c[j].weight * (dweight[j] - mean);
        for (dim i = 0; i < x.cols; ++i) {
          g.x(t, i) += ds * gate_w(c[j].expert, i);
          g.gate_w(c[j].expert, i) += ds * x(t, i);
        }
      }
    }
    return g;
  }

 private:
  router_rule router() const { return weighs ? top_k(k) : select_only(k); }

  /// Adds what token t's choice j brings to dx and the expert's weights; returns <dy_t, ys_j>.
  double expert_backward(gradients& g, const matrix& x, const matrix& dy, dim t, choice j) const {
    const dim f = down.cols, d = x.cols, e = j.expert;
    const vec u = multiply(up, e, f, x.row(t)), z = multiply(gate, e, f, x.row(t));
    double dweight = 0;
    for (dim h = 0; h < f; ++h) {
      const auto at = static_cast<std::size_t>(h);
      const double a = act.value(z[at]) * u[at];
      double da = 0;
      for (dim i = 0; i < d; ++i) {
        da += j.weight * dy(t, i) * down(e * d + i, h);
        dweight += dy(t, i) * down(e * d + i, h) * a;
        g.down(e * d + i, h) += j.weight * dy(t, i) * a;
      }
      const double du = da * act.value(z[at]), dz = da * u[at] * act.slope(z[at]);
      for (dim i = 0; i < d; ++i) {
        g.up(e * f + h, i) += du * x(t, i);
        g.gate(e * f + h, i) += dz * x(t, i);
        g.x(t, i) += du * up(e * f + h, i) + dz * gate(e * f + h, i);
      }
    }
    return dweight;
  }
};

}  // namespace reference
