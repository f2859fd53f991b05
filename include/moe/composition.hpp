// SPDX-License-Identifier: Apache-2.0
/// What a layer asks of its parts before it exists: whether they fit, and what stands in for a layer whose parts do not.
#pragma once

#include "moe/concepts.hpp"
#include "moe/core/error.hpp"

namespace moe {

/// How a layer's public functions see memory of a space: on the host as it is; elsewhere wrapped, so that memory of the
/// wrong space does not compile (backend/cuda.cuh).
template <class Space>
struct edge;
template <>
struct edge<host> {
  using arena = moe::arena;
  template <class V>
  using view = V;
  static moe::arena& open(moe::arena& mem) noexcept { return mem; }
  template <class V>
  static V& open(V& v) noexcept { return v; }
  template <class V>
  static V close(V v) noexcept { return v; }
};

namespace detail {

// One question a line, asked only where those before it are answered by yes, so that a wrong part yields one message.
template <class G, class R, class X, class C, class B>
struct composition {
  static constexpr bool backend = Backend<B>;
  static constexpr bool gate = !backend || Gate<G, B>;
  static constexpr bool router = !(backend && gate) || Router<R, B>;
  static constexpr bool banks = [] {
    if constexpr (requires { X::banks_read_the_same; }) return X::banks_read_the_same;
    else return true;
  }();
  static constexpr bool expert = !(backend && gate && router && banks) || Expert<X, B>;
  static constexpr bool parts = backend && gate && router && banks && expert;
  static constexpr bool input = [] {
    if constexpr (parts) return reads_input_of<typename X::input, typename G::input>;
    else return true;
  }();
  static constexpr bool combine = [] {
    if constexpr (parts && input) return Combine<C, typename X::input, typename R::plan, typename X::output, B>;
    else return true;
  }();
  static constexpr bool ok = parts && input && combine;
  static constexpr bool replayable = ReplayableRouter<R, B>;
  static constexpr bool trainable = [] {
    if constexpr (ok)
      return TrainableGate<G, B> && TrainableRouter<R, B> && TrainableExpert<X, B> &&
             (!weighted_rows<C> || backward_from_tokens<X, B> || backward_from_rows<X, B>) &&
             (weighted_rows<C> || backward_from_rows<X, B>) &&
             TrainableCombine<C, typename X::input, input_grad<X>, typename R::plan, typename X::output, B>;
    else return false;
  }();

  // In a function, so that Clang goes on with the class: one that is invalid causes errors of its own wherever it is used.
  static void complain() noexcept {
    static_assert(backend, "moe::layer: argument 5 is not a Backend; static_assert(moe::Backend<B>) says why [docs/backends.md]");
    static_assert(gate, "moe::layer: argument 1 is not a Gate on this backend; static_assert(moe::Gate<G, B>) says why [docs/policies.md]");
    static_assert(router, "moe::layer: argument 2 is not a Router on this backend; static_assert(moe::Router<R, B>) says why [docs/policies.md]");
    static_assert(banks, "moe::layer: argument 3 is a set of experts that read different inputs [docs/policies.md]");
    static_assert(expert, "moe::layer: argument 3 is not an Expert on this backend; static_assert(moe::Expert<X, B>) says why [docs/policies.md]");
    static_assert(input, "moe::layer: arguments 1 and 3, gate and expert, read different inputs [docs/policies.md]");
    static_assert(combine, "moe::layer: argument 4 cannot combine this router's plan with this expert's output [docs/policies.md]");
  }
};

/// `mem`, padded, with `needed` bytes left.
inline arena& opened(arena& mem, std::size_t needed, const char* what, const char* sizer) {
  mem.align();
  expect_bytes(mem.left(), needed, what, sizer);
  return mem;
}

template <class G, class R, class X, class C, class B>
class layer_impl;

// Stands in for a layer that cannot exist: accepts what a program does with one, so that the assertion is the only error.
struct ill_composed {
  struct any {
    any() = default;
    template <class First, class... Rest>
    any(First&&, Rest&&...) noexcept {}
  };
  struct tensors {  // of the library's own policies
    matrix_view<float> w, bias, up, gate, gate_up, down, gamma, beta, v;
  };
  struct weights {
    tensors gate, router, experts, combine;
  };
  using gradients = weights;
  using input = matrix_view<const float>;
  using input_grad = matrix_view<float>;
  using arena_type = moe::arena;
  struct context {
    shape sizes;
    bool training = false;
    moe::rng random{};
    routing_plan plan;
    tensors gate, router, experts, combine, rows;
  };
  template <class... A>
  explicit ill_composed(A&&...) noexcept {}
  const shape& sizes() const noexcept { return sizes_; }
  any backend() const noexcept { return {}; }
  any gate() const noexcept { return {}; }
  any router() const noexcept { return {}; }
  any experts() const noexcept { return {}; }
  any combine() const noexcept { return {}; }
  weights make_weights(any) const noexcept { return {}; }
  gradients make_gradients(any) const noexcept { return {}; }
  context make_context(dim, any) const noexcept { return {}; }
  context make_inference_context(dim, any) const noexcept { return {}; }
  void forward(any, any, any, any, any) const noexcept {}
  void replay(any, any, any, any, any, any) const noexcept {}
  void backward(any, any, any, any, any, any, any, any = {}) const noexcept {}
  void check_forward(any, any, any, any, any) const noexcept {}
  void check_backward(any, any, any, any, any, any, any) const noexcept {}
  std::size_t weight_bytes() const noexcept { return 0; }
  std::size_t gradient_bytes() const noexcept { return 0; }
  std::size_t context_bytes(dim) const noexcept { return 0; }
  std::size_t inference_context_bytes(dim) const noexcept { return 0; }
  template <class = float>
  std::size_t scratch_bytes(dim) const noexcept { return 0; }
  std::vector<slot> catalogue() const { return {}; }
  std::vector<slot> gradient_catalogue() const { return {}; }

 private:
  shape sizes_;
};

template <class G, class R, class X, class C, class B>
using layer_base = std::conditional_t<composition<G, R, X, C, B>::ok, layer_impl<G, R, X, C, B>, ill_composed>;

/// The part of type P among the constructor's arguments, or a default one.
template <class P>
P pick() { return P{}; }
template <class P, class First, class... Rest>
P pick(const First& first, const Rest&... rest) {
  if constexpr (std::same_as<P, First>) return first;
  else return pick<P>(rest...);
}

}  // namespace detail
}  // namespace moe
