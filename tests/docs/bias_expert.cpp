// SPDX-License-Identifier: Apache-2.0
#include <doctest/doctest.h>

#include "moe/moe.hpp"
#include "support/testing.hpp"

namespace {

// [policy]
/// ys = v_e, whatever the token: one learned vector per expert.
///
/// weights  v[E,d]      saves  nothing      adds to  dv
struct bias_expert {
  using input = moe::matrix_view<const float>;
  using input_grad = moe::matrix_view<float>;
  using output = moe::matrix_view<float>;
  struct weights { moe::matrix_view<float> v; };
  using weights_grad = weights;
  using context = moe::nothing;

  weights make_weights(moe::shape s, moe::arena& mem) const noexcept { return {mem.matrix<float>("v", s.experts, s.d)}; }
  output make_output(moe::shape s, moe::dim rows, moe::arena& mem) const noexcept { return mem.matrix<float>("ys", rows, s.d); }

  template <class B>
  void forward(const moe::call<B>& on, const weights& w, input, moe::bank_rows rows, output ys, context&) const noexcept {
    map_rows(on, rows, ys, [v = w.v](moe::dim e, moe::dim, moe::dim j) { return v(e, j); });
  }
  template <class B>
  void backward(const moe::call<B>& on, const weights&, input, moe::bank_rows rows, const context&, output dys, input_grad,
                weights_grad& dw, std::span<float>) const noexcept {
    if (dw.v) sum_rows(on, rows, dys, dw.v);  // dv[e] += sum of dys over e's rows
  }
};
// [/policy]

// [assert]
using backend = moe::scalar<>;
static_assert(moe::TrainableExpert<bias_expert, backend>);  // names the missing expression, if one is missing
// [/assert]

}  // namespace

// [test]
TEST_SUITE("expert/bias") {
  TEST_CASE("every row of expert e is v_e") {
    std::vector<float> v{1, 2, 3, 4}, y(3 * 2);
    const moe::idx token[] = {0, 1, 1}, offsets[] = {0, 1, 3};  // expert 0 takes row 0, expert 1 rows 1 and 2
    moe::nothing context;
    bias_expert{}.forward(testing::on<backend>(), {{v.data(), 2, 2}}, {}, {.offsets = offsets, .token = token},
                          {y.data(), 3, 2}, context);
    CHECK(y == std::vector<float>{1, 2, 3, 4, 3, 4});
  }
  TEST_CASE("gradients match finite differences beside feed-forward experts") {
    using mixed = moe::expert_set<moe::ffn_expert, bias_expert>;
    const moe::layer<moe::linear_gate, moe::top_k<2>, mixed, moe::weighted_sum, backend> net(
        {.tokens = 16, .d = 8, .experts = 4}, mixed{{.count = 3, .f = 12}, {.count = 1}});
    const auto g = testing::gradcheck(net, 16, 8, /*seed*/ 7);
    INFO("worst in " << g.where << ", skipped " << g.skipped);
    CHECK(g.worst < 1e-2);
    CHECK(g.skipped * 4 < g.probed);
  }
}
// [/test]
