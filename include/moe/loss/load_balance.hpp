// SPDX-License-Identifier: Apache-2.0
/// A loss that is least where the load is even.
#pragma once

#include "moe/loss/sum_tokens.hpp"
#include "moe/loss/with_loss.hpp"
#include "moe/router/cut.hpp"

namespace moe {

/// Whose load is counted: adds 1 to counts[e] for every choice e of token t.

/// The k largest probabilities, whatever bias, groups or noise the router's own selection has (Hugging Face).
struct most_probable {
  MOE_HD static void count(const detail::plan_pointers&, matrix_view<const float> scores, dim k, dim t,
                           float* counts) noexcept {
    const float* z = scores.row(t);
    const auto cut = detail::best_of(static_cast<idx>(scores.cols), k, [&](idx e) { return z[e]; });
    for (idx e = 0; e < scores.cols; ++e)
      if (cut.keeps(z[e], e)) counts[e] += 1;
  }
};
/// The most probable expert alone (Switch).
struct first_choice {
  MOE_HD static void count(const detail::plan_pointers& p, matrix_view<const float> scores, dim, dim t,
                           float* counts) noexcept {
    most_probable::count(p, scores, 1, t, counts);
  }
};
/// What the router chose, dropped choices included.
struct router_choice {
  MOE_HD static void count(const detail::plan_pointers& p, matrix_view<const float>, dim, dim t, float* counts) noexcept {
    for (idx i = p.token_offsets[t]; i < p.token_offsets[t + 1]; ++i) counts[p.expert_of(i)] += 1;
  }
};

/// loss = coefficient E / G sum over groups g and experts e of f_ge P_ge
///
/// f_ge: choices of e over the tokens of group g; P_ge: the mean of softmax(scores). f is constant for the gradient. A
/// group is `group` tokens, a sequence for example; 0: the whole batch. Tokens without an eligible expert (padding, all
/// scores -inf) do not count. At balance the value is coefficient times the choices of a token: k, or 1 for Switch.
///
/// saves    sums[G,2E+1], pull[G,E] and one value
/// Fedus et al. 2021, Switch, arXiv:2101.03961; with k choices as the published Mixtral code has it
template <class Counted>
struct basic_load_balance {
  float coefficient = 1e-2f;
  dim group = 0;

  struct context : loss_value {
    matrix_view<float> sums;  ///< [G, 2E+1] choices of each expert, probability of each expert, tokens
    matrix_view<float> pull;  ///< [G, E] dloss / dp of a token of g
  };

  void check(shape) const {
    if (group < 0) throw shape_error("load_balance: group is " + std::to_string(group) + ", expected at least 0");
  }
  context make_context(shape s, arena& mem) const noexcept {
    const dim G = detail::token_groups(s.tokens, group).count();
    return {{mem.matrix<float>("loss", 1, 1).data},
            mem.matrix<float>("sums", G, 2 * s.experts + 1),
            mem.matrix<float>("pull", G, s.experts)};
  }
  matrix_view<float> make_scratch(shape s, arena& mem) const noexcept {
    return detail::make_partial_sums({s.tokens, group}, 2 * s.experts + 1, mem);
  }

  template <class B>
  void measure(const call<B>& on, const routed_tokens& r, context& ctx) const noexcept {
    const detail::plan_pointers plan(r.plan);
    detail::sum_tokens(on, {r.scores.rows, group}, observe{plan, r.scores, r.choices}, ctx.sums);
    for_each_token(on, 1, finish{coefficient, ctx.sums, ctx.pull, ctx.memory});
  }
  template <class B>
  void add_gradient(const call<B>& on, matrix_view<const float> scores, const context& ctx,
                    matrix_view<float> dscores) const noexcept {
    for_each_token(on, scores.rows, differentiate{{scores.rows, group}, scores, ctx.pull, dscores});
  }

  // What kernels are made of is public: nvcc wants to name it.
  struct observe {
    detail::plan_pointers plan;
    matrix_view<const float> scores;
    dim choices;
    MOE_HD void operator()(dim t, float* sums) const noexcept {
      const float* z = scores.row(t);
      const dim E = scores.cols;
      const row_statistics row = detail::statistics(z, static_cast<idx>(E));
      if (!eligible(row.largest)) return;
      Counted::count(plan, scores, choices, t, sums);
      for (dim e = 0; e < E; ++e)
        if (eligible(z[e])) sums[E + e] += softmax_score{}(z[e], row);
      sums[2 * E] += 1;
    }
  };
  struct finish {
    float coefficient;
    matrix_view<const float> sums;
    matrix_view<float> pull;
    float* value;
    MOE_HD void operator()(dim) const noexcept {
      const dim E = pull.cols;
      double total = 0;
      for (dim g = 0; g < sums.rows; ++g) {
        const double tokens = sums(g, 2 * E), pairs = static_cast<double>(sums.rows) * tokens * tokens;
        const double scale = tokens > 0 ? double{coefficient} * static_cast<double>(E) / pairs : 0;
        for (dim e = 0; e < E; ++e) {
          pull(g, e) = static_cast<float>(scale * sums(g, e));
          total += scale * sums(g, e) * sums(g, E + e);
        }
      }
      *value = static_cast<float>(total);
    }
  };
  struct differentiate {
    detail::token_groups groups;
    matrix_view<const float> scores, pull;
    matrix_view<float> dscores;
    MOE_HD void operator()(dim t) const noexcept {
      const float *z = scores.row(t), *pulls = pull.row(t / groups.size);
      const row_statistics row = detail::statistics(z, static_cast<idx>(scores.cols));
      float mean = 0;
      for (dim e = 0; e < scores.cols; ++e)
        if (eligible(z[e])) mean += softmax_score{}(z[e], row) * pulls[e];
      for (dim e = 0; e < scores.cols; ++e)
        if (eligible(z[e])) dscores(t, e) += softmax_score{}(z[e], row) * (pulls[e] - mean);
    }
  };
};

/// The Hugging Face form: the k most probable experts; k at balance.
using load_balance = basic_load_balance<most_probable>;
/// The same with the router's own selection.
using load_balance_selected = basic_load_balance<router_choice>;
/// The Switch form: first choices; 1 at balance. Its E^2 mean over groups and experts is this same formula.
using switch_load_balance = basic_load_balance<first_choice>;

/// One loss over several layers, as if their tokens were one batch: between forward and backward, makes each layer's context
/// (`ctx.router.loss`) give the gradient of the joint loss, and returns its value. The layers' own values stay readable.
///
///   load_balance::context* const layers[] = {&first.router.loss, &second.router.loss};
///   const float loss = join(load_balance{.coefficient = 0.01f}, layers);
///
/// errors   shape_error when a context has no memory, more than one group, or another number of experts
template <class Counted>
float join(const basic_load_balance<Counted>& loss, std::span<typename basic_load_balance<Counted>::context* const> layers) {
  double tokens = 0, total = 0;
  const dim E = layers.empty() ? 0 : layers[0]->pull.cols;
  for (const auto* layer : layers) {
    expect(matrix_view<const float>(layer->pull), 1, E, "join: a layer's context", "1 x E");
    tokens += layer->sums(0, 2 * E);
  }
  const double scale = tokens > 0 ? double{loss.coefficient} * static_cast<double>(E) / (tokens * tokens) : 0;
  for (dim e = 0; e < E; ++e) {
    double chosen = 0, probability = 0;
    for (const auto* layer : layers) {
      chosen += layer->sums(0, e);
      probability += layer->sums(0, E + e);
    }
    for (const auto* layer : layers) layer->pull(0, e) = static_cast<float>(scale * chosen);
    total += scale * chosen * probability;
  }
  return static_cast<float>(total);
}

}  // namespace moe
