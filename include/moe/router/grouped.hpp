// SPDX-License-Identifier: Apache-2.0
/// Experts in groups, of which a token uses a few: group-limited routing.
#pragma once

#include "moe/router/select.hpp"

namespace moe {

/// Group scores: of the eligible keys of a group, in expert order, from their largest and second largest. A group without
/// eligible experts has none.

/// The largest key (DeepSeek-V2).
struct largest_key {
  MOE_HD float operator()(float first, float) const noexcept { return first; }
};
/// The sum of the two largest keys, or the only one (DeepSeek-V3).
struct two_largest_keys {
  MOE_HD float operator()(float first, float second) const noexcept { return eligible(second) ? first + second : first; }
};

/// What the keys outside the kept groups become: never selected, or 0, where they may fill up a token whose other keys are
/// negative (the Hugging Face port of DeepSeek-V3).
enum class group_mask : std::uint8_t { never, zero };

/// The E experts form `groups` groups of neighbours. For each token the `kept` groups with the largest score, ties to the
/// lower group, stay; the keys of all others are masked. Scores and masks act on the router's keys, its selection bias
/// included. The starting values are template arguments, so that a model family is a type.
///
/// R selects by key (router/select.hpp).
/// errors   shape_error when the groups are not of equal size or too many, or when the kept ones hold fewer than k experts
/// DeepSeek-AI 2024, arXiv:2405.04434 (largest) and arXiv:2412.19437 (two largest)
template <class R, class GroupScore = two_largest_keys, int Groups = 1, int Kept = 1>
struct grouped {
  static constexpr bool selects_by_key = true;
  static constexpr dim most_groups = 64;
  using plan = typename R::plan;
  using weights = typename R::weights;
  using weights_grad = detail::weights_grad<R>;
  using context = typename R::context;

  R inner{};
  dim groups = Groups, kept = Kept;
  group_mask mask = group_mask::never;

  void check(shape s) const {
    detail::check_shape(inner, s);
    const auto say = [](const char* what, dim came, const std::string& wanted) {
      throw shape_error(std::string("grouped: ") + what + " is " + std::to_string(came) + ", expected " + wanted);
    };
    if (groups < 1 || groups > most_groups || s.experts % groups != 0)
      say("groups", groups, "1 to " + std::to_string(most_groups) + ", a divisor of " + std::to_string(s.experts) + " (E)");
    if (kept < 1 || kept > groups) say("kept", kept, "1 to " + std::to_string(groups) + " (groups)");
    const dim k = inner.choices(s), held = kept * (s.experts / groups);
    if (mask == group_mask::never && k > held && k < s.experts)
      say("k", k, "at most " + std::to_string(held) + " (experts of the kept groups)");
  }
  void check(const weights& w, shape s) const { detail::check_weights(inner, w, s); }
  dim max_rows(shape s) const noexcept { return inner.max_rows(s); }
  dim choices(shape s) const noexcept { return inner.choices(s); }
  weights make_weights(shape s, arena& mem) const noexcept { return detail::make_weights(inner, s, mem); }
  weights_grad make_gradients(shape s, arena& mem) const noexcept { return detail::make_gradients(inner, s, mem); }
  context make_context(shape s, arena& mem) const noexcept { return detail::make_context(inner, s, mem); }
  key_scratch make_scratch(shape s, arena& mem) const noexcept { return detail::make_keys(inner, s, mem); }
  auto make_choices(shape s, arena& mem) const noexcept { return detail::make_choice_scratch(*this, s, mem); }

  template <class B>
    requires detail::selects_by_key<R>
  void forward(const call<B>& on, const weights& w, matrix_view<const float> scores, plan& p, context& ctx) const noexcept {
    select(on, w, scores, p);
    weigh(on, w, scores, p, ctx);
  }
  template <class B>
    requires detail::routes_by_key<R>
  void forward(const call<B>& on, const weights& w, matrix_view<const float> scores, plan& p, context& ctx,
               const fill_scores& fill) const noexcept {
    detail::route_by_key(on, *this, w, scores, p, ctx, fill);
  }
  template <class B>
  void select(const call<B>& on, const weights& w, matrix_view<const float> scores, plan& p) const noexcept {
    detail::select_by_key(on, *this, w, scores, p);
  }
  template <class B>
  void rank(const call<B>& on, const weights& w, matrix_view<const float> scores, matrix_view<float> keys) const noexcept {
    inner.rank(on, w, scores, keys);
    for_each_token(on, keys.rows, mask_groups{keys, groups, kept, mask == group_mask::zero ? 0.f : not_eligible});
  }
  template <class B>
  void assign(const call<B>& on, const weights& w, matrix_view<const float> keys, plan& p) const noexcept {
    inner.assign(on, w, keys, p);
  }
  template <class B>
  void weigh(const call<B>& on, const weights& w, matrix_view<const float> scores, plan& p, context& ctx) const noexcept {
    inner.weigh(on, w, scores, p, ctx);
  }
  template <class B>
  void backward(const call<B>& on, const weights& w, const plan& p, const context& ctx, std::span<const float> dweight,
                matrix_view<float> dscores, weights_grad& dw) const noexcept {
    inner.backward(on, w, p, ctx, dweight, dscores, dw);
  }

  // What kernels are made of is public: nvcc wants to name it.
  struct mask_groups {
    matrix_view<float> keys;
    dim groups, kept;
    float masked;

    MOE_HD void operator()(dim t) const noexcept {
      const dim size = keys.cols / groups;
      float score[most_groups];
      for (dim g = 0; g < groups; ++g) score[g] = score_of(keys.row(t) + g * size, size);
      for (dim g = 0; g < groups; ++g) {
        dim better = 0;
        for (dim h = 0; h < groups; ++h) better += score[h] > score[g] || (score[h] == score[g] && h < g);
        if (better < kept) continue;
        for (dim e = g * size; e < (g + 1) * size; ++e)
          if (eligible(keys(t, e))) keys(t, e) = masked;
      }
    }
    MOE_HD static float score_of(const float* key, dim n) noexcept {
      float first = not_eligible, second = not_eligible;
      for (dim e = 0; e < n; ++e)
        if (key[e] > first) {
          second = first;
          first = key[e];
        } else if (key[e] > second) {
          second = key[e];
        }
      return GroupScore{}(first, second);
    }
  };
};

}  // namespace moe
