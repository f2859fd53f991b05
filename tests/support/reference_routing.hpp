// SPDX-License-Identifier: Apache-2.0
/// Routing in double precision, written from the published formulas of each family and not from the library's rules.
/// z: logits of one token; b: selection bias; k: experts of a token; rho: scale.
#pragma once

#include <numeric>

#include "reference.hpp"

namespace reference {

inline bool eligible(double z) { return z > -std::numeric_limits<double>::infinity(); }

/// exp(z) / sum; experts with -inf or NaN have probability 0.
inline vec softmax(const vec& z) {
  double largest = -std::numeric_limits<double>::infinity(), sum = 0;
  for (const double v : z) largest = v > largest ? v : largest;
  vec p;
  for (const double v : z) p.push_back(eligible(v) ? std::exp(v - largest) : 0.0);
  for (const double v : p) sum += v;
  for (double& v : p) v /= sum;
  return p;
}
inline vec map(const vec& z, double (*f)(double)) {
  vec s;
  for (const double v : z) s.push_back(f(v));
  return s;
}
inline double sqrt_softplus(double z) { return std::sqrt(std::log(1 + std::exp(z))); }

inline vec plus(vec a, const vec& b) {
  for (std::size_t i = 0; i < a.size(); ++i) a[i] += b[i];
  return a;
}
/// The scores s of the chosen experts, as weights.
inline choices gather(const vec& s, const std::vector<dim>& chosen) {
  choices c;
  for (const dim e : chosen) c.push_back({e, s[static_cast<std::size_t>(e)]});
  return c;
}
inline double total(const choices& c) {
  double sum = 0;
  for (const choice& j : c) sum += j.weight;
  return sum;
}
inline choices times(choices c, double factor) {
  for (choice& j : c) j.weight *= factor;
  return c;
}

inline choices mixtral(const vec& z, dim k) {
  const vec s = softmax(z);
  const choices c = gather(s, best(s, k));
  return times(c, 1 / total(c));
}
inline choices olmoe(const vec& z, dim k) {
  const vec s = softmax(z);
  return gather(s, best(s, k));
}
inline choices dbrx(const vec& z, dim k, double p) {
  choices c = olmoe(z, k);
  double sum = 0;
  for (const choice& j : c) sum += std::pow(j.weight, p);
  return times(c, 1 / std::pow(sum, 1 / p));
}
inline choices granite(const vec& z, dim k) {
  const std::vector<dim> chosen = best(z, k);
  vec kept;
  for (const dim e : chosen) kept.push_back(z[static_cast<std::size_t>(e)]);
  const vec w = softmax(kept);
  choices c;
  for (std::size_t j = 0; j < chosen.size(); ++j) c.push_back({chosen[j], w[j]});
  return c;
}
inline choices llama4(const vec& z, dim k) {
  choices c = gather(z, best(z, k));
  for (choice& j : c) j.weight = sigmoid(j.weight);
  return c;
}

enum class group_score { largest, two_largest };
/// The keys with all but the `kept` best groups masked.
inline vec group_limited(vec keys, dim groups, dim kept, group_score score, double masked) {
  const dim size = static_cast<dim>(keys.size()) / groups;
  vec G;
  for (dim g = 0; g < groups; ++g) {
    vec group(keys.begin() + g * size, keys.begin() + (g + 1) * size);
    std::sort(group.begin(), group.end(), std::greater<>());
    G.push_back(score == group_score::largest ? group[0] : group[0] + group[1]);
  }
  std::vector<bool> stays(keys.size());
  for (const dim g : best(G, kept))
    for (dim e = g * size; e < (g + 1) * size; ++e) stays[static_cast<std::size_t>(e)] = true;
  for (std::size_t e = 0; e < keys.size(); ++e)
    if (!stays[e]) keys[e] = masked;
  return keys;
}
inline constexpr double never = -std::numeric_limits<double>::infinity();

inline choices deepseek_v2(const vec& z, dim k, dim groups, dim kept, double rho) {
  const vec s = softmax(z);
  return times(gather(s, best(group_limited(s, groups, kept, group_score::largest, never), k)), rho);
}
inline choices deepseek_v3(const vec& z, const vec& b, dim k, dim groups, dim kept, double rho, double masked = never) {
  const vec s = map(z, sigmoid), q = plus(s, b);
  const vec key = groups > 1 ? group_limited(q, groups, kept, group_score::two_largest, masked) : q;
  const choices c = gather(s, best(key, k));
  return times(c, rho / (total(c) + 1e-20));
}
inline choices deepseek_v4(const vec& z, const vec& b, dim k, double rho) {
  const vec s = map(z, sqrt_softplus);
  const choices c = gather(s, best(plus(s, b), k));
  return times(c, rho / (total(c) + 1e-20));
}
inline choices ernie45(const vec& z, const vec& b, dim k) {
  const vec s = softmax(z);
  const choices c = gather(s, best(plus(s, b), k));
  return times(c, 1 / std::max(total(c), 1e-12));
}
inline choices minimax_m2(const vec& z, const vec& b, dim k) {
  const vec s = map(z, sigmoid);
  const choices c = gather(s, best(plus(s, b), k));
  return times(c, 1 / total(c));
}
inline choices lfm2_moe(const vec& z, const vec& b, dim k) {
  const vec s = map(z, sigmoid);
  const choices c = gather(s, best(plus(s, b), k));
  return times(c, 1 / (total(c) + 1e-6));
}
inline choices longcat(const vec& z, const vec& b, dim k, double rho) {
  const vec s = softmax(z);
  return times(gather(s, best(plus(s, b), k)), rho);
}
/// Keeps a token while fewer than `room` tokens before it went to its expert.
inline std::vector<choices> switch_transformer(const matrix& z, dim room) {
  std::vector<dim> taken(static_cast<std::size_t>(z.cols));
  std::vector<choices> all;
  for (dim t = 0; t < z.rows; ++t) {
    const choices c = olmoe(z.row(t), 1);
    all.push_back(!c.empty() && taken[static_cast<std::size_t>(c[0].expert)]++ < room ? c : choices{});
  }
  return all;
}

/// Most probable first, each while the sum before it is below p, at most `most`.
inline choices top_p(const vec& z, double p, dim most) {
  const vec s = softmax(z);
  choices c;
  double before = 0;
  for (const dim e : best(s, most)) {
    if (!c.empty() && before >= p) break;
    c.push_back({e, s[static_cast<std::size_t>(e)]});
    before += c.back().weight;
  }
  return c;
}
inline choices threshold(const vec& s, double tau) {
  choices c;
  for (const dim e : best(s, static_cast<dim>(s.size())))
    if (s[static_cast<std::size_t>(e)] >= tau) c.push_back({e, s[static_cast<std::size_t>(e)]});
  return c;
}
/// Every expert takes its `room` most probable tokens; a token's choices in the order of experts.
inline std::vector<choices> expert_choice(const matrix& z, dim room) {
  std::vector<vec> p;
  for (dim t = 0; t < z.rows; ++t) p.push_back(softmax(z.row(t)));
  std::vector<choices> all(static_cast<std::size_t>(z.rows));
  for (dim e = 0; e < z.cols; ++e) {
    vec column;
    for (dim t = 0; t < z.rows; ++t)
      column.push_back(eligible(z(t, e)) ? p[static_cast<std::size_t>(t)][static_cast<std::size_t>(e)] : never);
    for (const dim t : best(column, room))
      all[static_cast<std::size_t>(t)].push_back({e, column[static_cast<std::size_t>(t)]});
  }
  return all;
}

/// Routing of every token by a rule for one.
template <class Rule>
std::vector<choices> route(const matrix& z, Rule rule) {
  std::vector<choices> all;
  for (dim t = 0; t < z.rows; ++t) all.push_back(rule(z.row(t)));
  return all;
}
/// The loss sum of g[t,e] weight[t,e].
inline double loss(const std::vector<choices>& all, const matrix& g) {
  double sum = 0;
  for (std::size_t t = 0; t < all.size(); ++t)
    for (const choice& j : all[t]) sum += g(static_cast<dim>(t), j.expert) * j.weight;
  return sum;
}

}  // namespace reference
