// SPDX-License-Identifier: Apache-2.0
/// The k best experts of each token, with the load of every expert brought to whole tiles.
#pragma once

#include "moe/router/cut.hpp"
#include "moe/router/select.hpp"

namespace moe {

/// Which multiple of the tile an expert's rows are brought to.
enum class rounding : std::uint8_t {
  nearest,  ///< a load halfway between two goes to the even one
  up,       ///< only adds tokens
  down,     ///< only drops them
};

/// Each token chooses its K best experts; then every expert e, chosen f_e times, takes c_e tokens, a multiple of the tile M:
/// f_e rounded, at most the tokens eligible for it rounded down. Products over its rows then fill their tiles. Where c_e is
/// less than f_e, the choices with the smallest share of their token's scores are dropped; where it is more, the tokens with
/// the largest key that did not choose e are added. Ties to the lower token. So a token has any number of experts, and no
/// expert gains or loses a tile or more.
///
/// weight   of a chosen expert scale raw / divisor over the token's K choices, dropped ones counted; of an added one
///          scale raw. The default is a softmax over the chosen experts, and over all of them for an added one
/// plan     a token's choices, best first, dropped ones as position = -1 - e; then what was added, by expert
/// saves    the scores, 4 T E bytes, where the rule needs them
/// errors   shape_error when K is more than the layer's experts, or the tile less than 1
///
/// Which tokens are taken is a constant for the gradient. The choice looks at the whole batch, so it is for training:
/// evaluate with `top_k`. A tile of 1 is that router; for another backend's tile say `.tile = row_tile<backend>`.
/// Guo et al. 2025, SonicMoE, arXiv:2512.14080
template <int K, class Rule = score_rule<softmax_score, sum_norm>>
struct token_rounding {
  static_assert(K > 0, "moe::token_rounding: K must be at least 1");
  static_assert(Rule::over != reduction::kept, "moe::token_rounding: the rule must score an expert that was not chosen");
  static constexpr bool selects_by_key = true;
  using plan = routing_plan;
  using weights = nothing;
  using context = score_context;

  dim tile = row_tile<>;
  rounding to = rounding::nearest;
  [[no_unique_address]] Rule rule{};

  void check(shape s) const {
    detail::expect_choices(K, s, "token_rounding");
    if (tile < 1) throw shape_error("token_rounding: tile is " + std::to_string(tile) + ", expected at least 1");
  }
  /// Choices, dropped ones included.
  dim max_rows(shape s) const noexcept {
    const dim most = to == rounding::up ? tile - 1 : to == rounding::nearest ? tile / 2 : 0;
    const dim added = s.experts * (most < s.tokens ? most : s.tokens), all = s.tokens * s.experts;
    return s.tokens * K + added < all ? s.tokens * K + added : all;
  }
  dim choices(shape s) const noexcept { return s.experts; }
  context make_context(shape s, arena& mem) const noexcept { return make_score_context<Rule>(s, mem); }
  key_scratch make_scratch(shape s, arena& mem) const noexcept {
    const key_scratch room{mem.matrix<float>("keys", s.tokens, s.experts)};
    scratch_frame for_assign(mem);
    (void)make_tables(s, mem);
    return room;
  }

  template <class B>
  void forward(const call<B>& on, const weights& w, matrix_view<const float> scores, plan& p, context& ctx) const noexcept {
    select(on, w, scores, p);
    weigh(on, w, scores, p, ctx);
  }
  template <class B>
  void select(const call<B>& on, const weights& w, matrix_view<const float> scores, plan& p) const noexcept {
    detail::select_by_key(on, *this, w, scores, p);
  }
  template <class B>
  void rank(const call<B>& on, const weights&, matrix_view<const float> scores, matrix_view<float> keys) const noexcept {
    for_each_token(on, scores.rows, detail::rank_token<Rule>{rule, scores, keys});
  }
  template <class B>
  void assign(const call<B>& on, const weights&, matrix_view<const float> keys, plan& p) const noexcept {
    scratch_frame frame(on.scratch);
    const tables s = make_tables(on.sizes, on.scratch);
    top_k_rows<K>(on, keys, p);
    for_each_token(on, keys.rows, note_choices{rule, keys, p.token_offsets.data(), p.position.data(), s.chosen, s.shares});
    for_each_token(on, keys.cols, round_expert{keys, s.shares, tile, to, s.candidates, s.cuts});
    list_choices(on, p, rounded{keys, s.chosen, s.shares, s.cuts});
    group_by_expert(on, p);
  }
  template <class B>
  void weigh(const call<B>& on, const weights&, matrix_view<const float> scores, plan& p, context& ctx) const noexcept {
    moe::weigh(on, rule, scores, p, ctx, K);
  }
  template <class B>
  void backward(const call<B>& on, const weights&, const plan& p, const context& ctx, std::span<const float> dweight,
                matrix_view<float> dscores, weights&) const noexcept {
    weigh_backward(on, rule, p, ctx, dweight, dscores, K);
  }

  // What kernels are made of is public: nvcc wants to name it.

  /// A token's choices, put aside, and the share of each: its key over the divisor, not eligible where not chosen.
  struct note_choices {
    Rule rule;
    matrix_view<const float> keys;
    const idx *token_offsets, *position;
    matrix_view<idx> chosen;
    matrix_view<float> shares;

    MOE_HD void operator()(dim t) const noexcept {
      const idx* choice = position + token_offsets[t];
      const idx n = token_offsets[t + 1] - token_offsets[t];
      float sum = 0;
      for (idx j = 0; j < n; ++j) sum += rule.term(keys(t, choice[j]));
      const float divisor = rule.divisor(sum);
      for (dim e = 0; e < keys.cols; ++e) shares(t, e) = not_eligible;
      for (idx j = 0; j < K; ++j) {
        chosen(t, j) = j < n ? choice[j] : -1;
        if (j < n) shares(t, choice[j]) = share(keys(t, choice[j]), divisor);
      }
    }
    /// The key itself where the sum is 0, infinite, or negative by a selection bias.
    MOE_HD static float share(float key, float divisor) noexcept {
      return divisor > 0 && eligible(key / divisor) ? key / divisor : key;
    }
  };
  /// The cut that leaves expert e with whole tiles, and whether it is through those to add or through those that chose it.
  struct round_expert {
    matrix_view<const float> keys, shares;
    dim tile;
    rounding to;
    matrix_view<float> candidates;
    matrix_view<idx> cuts;

    MOE_HD void operator()(dim e) const noexcept {
      dim load = 0, able = 0;
      for (dim t = 0; t < keys.rows; ++t) {
        load += eligible(shares(t, e));
        able += eligible(keys(t, e));
      }
      const dim rows = target(load, able);
      const bool adds = rows > load;
      float* of = candidates.row(e);
      for (dim t = 0; t < keys.rows; ++t)
        of[t] = !adds ? shares(t, e) : eligible(shares(t, e)) ? not_eligible : keys(t, e);
      const auto candidate = [of](idx t) { return of[t]; };
      detail::best_of(static_cast<idx>(keys.rows), adds ? rows - load : rows, candidate).store(cuts.row(e));
      cuts(e, 2) = adds;
    }
    MOE_HD dim target(dim load, dim able) const noexcept {
      const dim whole = load / tile, rest = load % tile;
      const bool above = to == rounding::up        ? rest > 0
                         : to == rounding::nearest ? 2 * rest > tile || (2 * rest == tile && whole % 2 == 1)
                                                   : false;
      const dim rounded = whole + above, most = able / tile;
      return (rounded < most ? rounded : most) * tile;
    }
  };
  struct rounded {
    matrix_view<const float> keys;
    matrix_view<const idx> chosen;
    matrix_view<const float> shares;
    matrix_view<const idx> cuts;

    MOE_HD idx count(dim t) const noexcept {
      idx n = 0;
      for (idx j = 0; j < K; ++j) n += chosen(t, j) >= 0;
      for (dim e = 0; e < keys.cols; ++e) n += adds(e, t);
      return n;
    }
    MOE_HD void operator()(dim t, idx* list) const noexcept {
      for (idx j = 0; j < K; ++j)
        if (const idx e = chosen(t, j); e >= 0) *list++ = drops(e, t) ? -1 - e : e;
      for (idx e = 0; e < keys.cols; ++e)
        if (adds(e, t)) *list++ = e;
    }

   private:
    MOE_HD bool keeps(dim e, dim t, float key) const noexcept {
      return detail::cut::load(cuts.row(e)).keeps(key, static_cast<idx>(t));
    }
    MOE_HD bool adds(dim e, dim t) const noexcept {
      return cuts(e, 2) && !eligible(shares(t, e)) && keeps(e, t, keys(t, e));
    }
    MOE_HD bool drops(dim e, dim t) const noexcept { return !cuts(e, 2) && !keeps(e, t, shares(t, e)); }
  };

 private:
  struct tables {
    matrix_view<idx> chosen;         ///< [T,K]  expert or -1
    matrix_view<float> shares;       ///< [T,E]
    matrix_view<float> candidates;   ///< [E,T]  of one expert side by side, as ranking reads them many times
    matrix_view<idx> cuts;           ///< [E,3]
  };
  static tables make_tables(shape s, arena& mem) noexcept {
    return {mem.matrix<idx>("chosen", s.tokens, K), mem.matrix<float>("shares", s.tokens, s.experts),
            mem.matrix<float>("candidates", s.experts, s.tokens), mem.matrix<idx>("cuts", s.experts, 3)};
  }
};

}  // namespace moe
