// SPDX-License-Identifier: Apache-2.0
// Sets, decorators, combines and shared experts inside a layer, forward and backward.
#include <doctest/doctest.h>

#include "moe/moe.hpp"
#include "support/expert_rules.hpp"
#include "support/storing_expert.hpp"

namespace {

using namespace golden;
using backend = moe::scalar<>;
template <class X, class C = moe::weighted_sum, int K = 2>
using layer_of = moe::layer<moe::linear_gate, moe::top_k<K>, X, C, backend>;

using testing::storing_expert;
static_assert(moe::TrainableExpert<storing_expert, backend>);

}  // namespace

TEST_SUITE("expert/set") {
  TEST_CASE("a set of every kind of expert agrees with the formulas of its banks") {
    using plus_one = moe::basic_ffn_expert<moe::glu<moe::gelu_tanh>, moe::interleaved, true>;
    using set = moe::expert_set<moe::ffn_expert, storing_expert, moe::film_expert, plus_one, moe::constant_expert,
                                moe::copy_expert, moe::zero_expert>;
    const set experts{{.count = 2, .f = 3}, {.count = 1}, {.count = 1}, {.count = 1, .f = 8},
                      {.count = 2},         {.count = 1}, {.count = 1}};
    compare(layer_of<set, moe::weighted_sum, 3>({.d = 5, .experts = 9}, experts), 17, 5, 31,
            routed(3, banks({{2, weigh_rows(feed_forward(glu(golden::silu), order::separate, "experts.0."))},
                             {1, weigh_rows(stored("experts.1."))},
                             {1, weigh_rows(film("experts.2."))},
                             {1, weigh_rows(feed_forward(glu(golden::gelu_tanh), order::interleaved, "experts.3."))},
                             {2, weigh_rows(constant("experts.4."))},
                             {1, weigh_rows(copied)},
                             {1, weigh_rows(nothing)}})));
  }
  TEST_CASE("a set within a set is one expert after another") {
    using inside = moe::expert_set<moe::copy_expert, moe::basic_ffn_expert<moe::plain<moe::relu>>, storing_expert>;
    using set = moe::expert_set<moe::ffn_expert, inside, moe::constant_expert>;
    const set experts{{.count = 1, .f = 3},
                      {.count = 4, .f = 6, .expert = inside{{.count = 1}, {.count = 2}, {.count = 1}}},
                      {.count = 1}};
    compare(layer_of<set>({.d = 4, .experts = 6}, experts), 14, 4, 32,
            routed(2, banks({{1, weigh_rows(feed_forward(glu(golden::silu), order::separate, "experts.0."))},
                             {1, weigh_rows(copied)},
                             {2, weigh_rows(feed_forward(plain(golden::relu), order::separate, "experts.1.1."))},
                             {1, weigh_rows(stored("experts.1.2."))},
                             {1, weigh_rows(constant("experts.2."))}})));
  }
}

TEST_SUITE("expert/weigh_input") {
  template <class X>
  using llama = layer_of<moe::weigh_input<X>, moe::unweighted_sum>;

  TEST_CASE("the weight is applied to the input, whatever the expert stores") {
    compare(llama<moe::ffn_expert>({.d = 5, .f = 7, .experts = 3}), 9, 5, 41,
            routed(2, weigh_input(feed_forward(glu(golden::silu), order::separate))));
    compare(llama<moe::gpt_oss_expert>({.d = 5, .f = 6, .experts = 3}), 9, 5, 42,
            routed(2, weigh_input(feed_forward(clamp(shifted, 7), order::interleaved))));
    compare(llama<moe::film_expert>({.d = 5, .experts = 3}), 9, 5, 43, routed(2, weigh_input(film("experts."))));
    compare(llama<moe::constant_expert>({.d = 5, .experts = 3}), 9, 5, 44, routed(2, weigh_input(constant("experts."))));
    compare(llama<moe::copy_expert>({.d = 5, .experts = 3}), 9, 5, 45, routed(2, weigh_input(copied)));
    compare(llama<storing_expert>({.d = 5, .experts = 3}), 9, 5, 46, routed(2, weigh_input(stored("experts."))));
  }
  TEST_CASE("a weight on the input and on the output are two factors, and both reach the router") {
    compare(layer_of<moe::weigh_input<moe::ffn_expert>>({.d = 5, .f = 7, .experts = 3}), 9, 5, 47,
            routed(2, [ffn = feed_forward(glu(golden::silu), order::separate)](const tensors& w, dim e, const vec& x,
                                                                               double weight) {
              return times(weight, ffn(w, e, times(weight, x)));
            }));
    compare(layer_of<moe::weigh_input<storing_expert>>({.d = 5, .experts = 3}), 9, 5, 48,
            routed(2, [](const tensors& w, dim e, const vec& x, double weight) {
              return times(weight, stored("experts.")(w, e, times(weight, x)));
            }));
  }
  TEST_CASE("banks that weigh their input stand beside banks that do not, and around whole sets") {
    using set = moe::expert_set<moe::weigh_input<moe::copy_expert>, moe::weigh_input<storing_expert>, moe::ffn_expert,
                                moe::copy_expert, moe::weigh_input<moe::constant_expert>, storing_expert,
                                moe::weigh_input<moe::ffn_expert>>;
    const set experts{{.count = 1}, {.count = 1}, {.count = 1, .f = 6}, {.count = 1},
                      {.count = 2}, {.count = 1}, {.count = 1, .f = 9}};
    compare(layer_of<set, moe::unweighted_sum, 3>({.d = 5, .experts = 8}, experts), 15, 5, 49,
            routed(3, banks({{1, weigh_input(copied)},
                             {1, weigh_input(stored("experts.1."))},
                             {1, no_weight(feed_forward(glu(golden::silu), order::separate, "experts.2."))},
                             {1, no_weight(copied)},
                             {2, weigh_input(constant("experts.4."))},
                             {1, no_weight(stored("experts.5."))},
                             {1, weigh_input(feed_forward(glu(golden::silu), order::separate, "experts.6."))}})));
    using inside = moe::expert_set<moe::ffn_expert, storing_expert, moe::copy_expert>;
    compare(
        llama<inside>({.d = 5, .experts = 4}, moe::weigh_input<inside>{{{.count = 2, .f = 3}, {.count = 1}, {.count = 1}}}),
        12, 5, 50,
        routed(2, banks({{2, weigh_input(feed_forward(glu(golden::silu), order::separate, "experts.0."))},
                         {1, weigh_input(stored("experts.1."))},
                         {1, weigh_input(copied)}})));
  }
}

TEST_SUITE("combine/weighted_sum") {
  TEST_CASE("a sum without weights gives the router no gradient from experts that do not read them") {
    compare(layer_of<moe::ffn_expert, moe::unweighted_sum>({.d = 5, .f = 7, .experts = 3}), 9, 5, 61,
            routed(2, no_weight(feed_forward(glu(golden::silu), order::separate))));
    compare(layer_of<storing_expert, moe::unweighted_sum>({.d = 5, .experts = 3}), 9, 5, 62,
            routed(2, no_weight(stored("experts."))));
  }
}

TEST_SUITE("combine/residual") {
  TEST_CASE("x is added once a token, whatever is inside") {
    compare(layer_of<moe::ffn_expert, moe::residual<>>({.d = 5, .f = 7, .experts = 3}), 9, 5, 63,
            routed(2, weigh_rows(feed_forward(glu(golden::silu), order::separate)), 1));
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
    compare(layer_of<film_expert, mix_before_trunk<ffn>>({.d = 5, .experts = 3}, mix_before_trunk<ffn>{.trunk = {}, .f = 7}),
            9, 5, 65, trunk(mixed, feed_forward(plain(golden::gelu), order::separate, "combine.")));
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
    const auto of_routed =
        routed(2, weigh_rows(feed_forward(glu(golden::silu), order::separate, "routed.experts.")), 0, "routed.gate.w");
    const auto shared = feed_forward(glu(golden::silu), order::separate, "shared.experts.");
    compare(moe::sum(net, moe::dense<moe::ffn_expert, backend>({.d = 5, .f = 4})), 9, 5, 71, plus(of_routed, dense(shared)));
    compare(moe::sum(net, moe::gated_dense<moe::ffn_expert, backend>({.d = 5, .f = 11})), 9, 5, 72,
            plus(of_routed, dense(shared, "shared.gate.w")));
    compare(moe::sum(moe::sum(net, moe::dense<storing_expert, backend>({.d = 5})),
                     moe::gated_dense<moe::copy_expert, backend>({.d = 5})),
            9, 5, 73,
            plus(plus(routed(2, weigh_rows(feed_forward(glu(golden::silu), order::separate, "routed.routed.experts.")), 0,
                             "routed.routed.gate.w"),
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
    check(moe::gated_dense<moe::weigh_input<moe::ffn_expert>, backend>({.d = 5, .f = 6}),
          feed_forward(glu(golden::silu), order::separate), true);
    using mixed = moe::expert_set<moe::copy_expert, moe::ffn_expert>;
    check(moe::gated_dense<mixed, backend>({.d = 5}, mixed{{.count = 0}, {.count = 1, .f = 3}}),
          feed_forward(glu(golden::silu), order::separate, "experts.1."), true);
  }
}
