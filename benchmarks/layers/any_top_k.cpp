// SPDX-License-Identifier: Apache-2.0
#include "layers/any_top_k.hpp"

#include <array>
#include <utility>

namespace bench {
namespace {

using on_cpu = moe::call<any_top_k::backend>;
using route = void (*)(const on_cpu&, matrix_view<const float> scores, moe::routing_plan&, moe::score_context&,
                       const moe::fill_scores&);

template <int K>
void route_to(const on_cpu& on, matrix_view<const float> scores, moe::routing_plan& p, moe::score_context& ctx,
              const moe::fill_scores& fill) {
  moe::top_k<K>{}.forward(on, {}, scores, p, ctx, fill);
}
template <int... I>
constexpr std::array<route, sizeof...(I)> routes_of(std::integer_sequence<int, I...>) {
  return {route_to<I + 1>...};
}
constexpr auto routes = routes_of(std::make_integer_sequence<int, most_choices>());

}  // namespace

void any_top_k::check(moe::shape s) const {
  if (k < 1 || k > most_choices)
    throw moe::shape_error("any_top_k: k is " + std::to_string(k) + ", expected 1 to " + std::to_string(most_choices));
  moe::detail::expect_choices(k, s, "any_top_k");
}
moe::detail::choice_scratch any_top_k::make_choices(moe::shape s, moe::arena& mem) const noexcept {
  return {{}, mem.vector<float>("weights", s.tokens * k)};  // as top_k<k> takes it: scores are its keys
}
void any_top_k::forward(const on_cpu& on, const weights& w, matrix_view<const float> scores, plan& p,
                        context& ctx) const noexcept {
  forward(on, w, scores, p, ctx, [&](const moe::then_tokens& then) { then(0, scores.rows); });
}
void any_top_k::forward(const on_cpu& on, const weights&, matrix_view<const float> scores, plan& p, context& ctx,
                        const moe::fill_scores& fill) const noexcept {
  routes[static_cast<std::size_t>(k - 1)](on, scores, p, ctx, fill);
}
void any_top_k::backward(const on_cpu& on, const weights& w, const plan& p, const context& ctx,
                         std::span<const float> dweight, matrix_view<float> dscores, weights& dw) const noexcept {
  moe::top_k<1>{}.backward(on, w, p, ctx, dweight, dscores, dw);  // the plan says how many there are
}

}  // namespace bench
