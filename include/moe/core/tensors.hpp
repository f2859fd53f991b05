// SPDX-License-Identifier: Apache-2.0
/// Every tensor of a struct of views: what the library reaches gradients through, whatever a policy calls them.
#pragma once

#include <span>
#include <type_traits>
#include <utility>

#include "moe/core/view.hpp"

namespace moe {
namespace detail {

struct any_member {
  template <class T>
  operator T() const noexcept;
};
/// How many members an aggregate has: as many as it can be initialised with.
template <class V, class... Found>
constexpr int members() noexcept {
  if constexpr (requires { V{Found{}..., any_member{}}; })
    return members<V, Found..., any_member>();
  else
    return sizeof...(Found);
}

}  // namespace detail

/// f(matrix) for every matrix of float in `views`: one itself, a span as one row, or an aggregate or a tuple of such, at any
/// depth. Where there is a views.each(f), it is called instead: aggregates of more than eight members offer one.
template <class V, class F>
void for_each_tensor(const V& views, const F& f) {
  const auto each = [&f](const auto&... m) { (for_each_tensor(m, f), ...); };
  if constexpr (std::is_same_v<V, matrix_view<float>>) {
    f(views);
  } else if constexpr (std::is_same_v<V, std::span<float>>) {
    f(matrix_view<float>(views.data(), 1, static_cast<dim>(views.size())));
  } else if constexpr (requires { views.each(each); }) {
    views.each(each);
  } else if constexpr (requires { std::tuple_size<V>::value; }) {
    [&]<std::size_t... I>(std::index_sequence<I...>) {
      each(get<I>(views)...);
    }(std::make_index_sequence<std::tuple_size<V>::value>{});
  } else if constexpr (std::is_class_v<V> && !std::is_empty_v<V>) {
    static_assert(std::is_aggregate_v<V>,
                  "moe: gradients are neither a struct of views nor have each(f) [docs/policies.md]");
    constexpr int n = detail::members<V>();
    static_assert(n <= 8, "moe: gradients of more than eight views have no each(f) [docs/policies.md]");
    // clang-format off
    if constexpr (n == 1) { const auto& [a] = views; each(a); }
    if constexpr (n == 2) { const auto& [a, b] = views; each(a, b); }
    if constexpr (n == 3) { const auto& [a, b, c] = views; each(a, b, c); }
    if constexpr (n == 4) { const auto& [a, b, c, d] = views; each(a, b, c, d); }
    if constexpr (n == 5) { const auto& [a, b, c, d, e] = views; each(a, b, c, d, e); }
    if constexpr (n == 6) { const auto& [a, b, c, d, e, g] = views; each(a, b, c, d, e, g); }
    if constexpr (n == 7) { const auto& [a, b, c, d, e, g, h] = views; each(a, b, c, d, e, g, h); }
    if constexpr (n == 8) { const auto& [a, b, c, d, e, g, h, i] = views; each(a, b, c, d, e, g, h, i); }
    // clang-format on
  }
}

}  // namespace moe
