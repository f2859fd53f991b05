// SPDX-License-Identifier: Apache-2.0
/// The four concepts a layer is made of, and Backend. How to write a policy: docs/policies.md.
///
/// A policy holds configuration only. It names its types and offers three kinds of member: `make_*` carve memory,
/// `forward` computes, `backward` differentiates. Members that run kernels are templates on the backend, return void and
/// are noexcept, so that checking a concept never instantiates a body. Every weights, context and scratch type that is
/// empty is carved by the library itself: a policy without weights says `using weights = nothing;` and is done.
///
/// Optional members, used where present:
///   check(shape)                          throws shape_error for sizes or a configuration that cannot work
///   check(const weights&, shape)          throws shape_error for weights that do not fit
///   make_scratch([backend,] shape[, rows], arena&) what forward takes from on.scratch; with the backend where each of its
///                                                  threads takes a part
///   make_backward_scratch(shape[, rows], arena&)   what backward takes from on.scratch
///   replaces_gradients                    true: backward follows on.gradients; else the layer clears dw where that says
///                                         replace, and backward adds
///
/// Steps on the host that go on without a join (docs/policies.md, Joins), where both sides offer them:
///   Gate    forward(on, w, x, scores, ctx, then)   calls then(first, n) once for each run of tokens whose scores are final
///   Router  forward(on, w, scores, plan, ctx, fill) calls fill(then) for scores; make_choices(shape, arena&) is its scratch
///   Expert  forward(on, w, x, rows, ys, ctx, then) calls then(result_part) once for each part that is final in all rows ys
///   Combine forward_part(on, w, x, plan, ys, t, column, y, n)   n columns of token t to y; takes no scratch, keeps nothing
/// `then` is called from any thread. What it is called for is disjoint and is everything in the end, without rows too.
#pragma once

#include <concepts>
#include <span>
#include <type_traits>

#include "moe/core/arena.hpp"
#include "moe/core/call.hpp"
#include "moe/core/error.hpp"
#include "moe/core/plan.hpp"
#include "moe/core/tensors.hpp"
#include "moe/core/then.hpp"
#include "moe/core/view.hpp"

namespace moe {

/// Weights or context of a policy that has none.
struct nothing {};

/// Where the work runs. `space` says which memory it reads; `arch` is the tag kernels are overloaded on (docs/backends.md).
template <class B>
concept Backend = std::copyable<B> && requires {
  typename B::space;
  typename B::arch;
};

/// Rows that a backend's products take together: an expert with a multiple of it wastes none. 16, the rows of an AMX tile, on
/// the host (vector levels have a block for every number of rows, so nothing is filled up there), unless the backend states
/// its own `row_tile`.
template <class B = void>
inline constexpr dim row_tile = 16;
template <class B>
  requires requires { B::row_tile; }
inline constexpr dim row_tile<B> = B::row_tile;

namespace detail {

template <class P>
concept carves_weights = std::is_empty_v<typename P::weights> || requires(const P p, shape s, arena& mem) {
  { p.make_weights(s, mem) } noexcept -> std::same_as<typename P::weights>;
};
template <class P>
concept carves_context = std::is_empty_v<typename P::context> || requires(const P p, shape s, arena& mem) {
  { p.make_context(s, mem) } noexcept -> std::same_as<typename P::context>;
};
template <class P>
concept carves_row_context = std::is_empty_v<typename P::context> || requires(const P p, shape s, dim rows, arena& mem) {
  { p.make_context(s, rows, mem) } noexcept -> std::same_as<typename P::context>;
};

struct not_trainable {};
template <class P>
struct input_grad_of { using type = not_trainable; };
template <class P>
  requires requires { typename P::input_grad; }
struct input_grad_of<P> { using type = typename P::input_grad; };
template <class P>
struct weights_grad_of { using type = typename P::weights; };
template <class P>
  requires requires { typename P::weights_grad; }
struct weights_grad_of<P> { using type = typename P::weights_grad; };
template <class P>
using input_grad = typename input_grad_of<P>::type;
template <class P>
using weights_grad = typename weights_grad_of<P>::type;

}  // namespace detail

/// scores[T,E] = gate(x), overwritten.
template <class G, class B>
concept Gate = Backend<B> && detail::carves_weights<G> && detail::carves_context<G> &&
               requires(const G g, const call<B> on, const typename G::weights w, typename G::context ctx,
                        const typename G::input x, matrix_view<float> scores) {
                 { g.forward(on, w, x, scores, ctx) } noexcept -> std::same_as<void>;
               };

/// dscores -> dx (+=), dw (+=)
template <class G, class B>
concept TrainableGate =
    Gate<G, B> && requires(const G g, const call<B> on, const typename G::weights w, const typename G::context ctx,
                           const typename G::input x, matrix_view<const float> dscores, detail::input_grad<G> dx,
                           detail::weights_grad<G> dw) {
      { g.backward(on, w, x, ctx, dscores, dx, dw) } noexcept -> std::same_as<void>;
    };

/// plan = router(scores); at most max_rows(s) assignments.
template <class R, class B>
concept Router = Backend<B> && detail::carves_weights<R> && detail::carves_context<R> &&
                 requires(const R r, const call<B> on, const typename R::weights w, matrix_view<const float> scores,
                          typename R::plan plan, typename R::context ctx, shape s) {
                   { r.max_rows(s) } noexcept -> std::same_as<dim>;
                   { r.forward(on, w, scores, plan, ctx) } noexcept -> std::same_as<void>;
                 };

/// dweight[A] -> dscores[T,E] (=), dw (+=)
template <class R, class B>
concept TrainableRouter =
    Router<R, B> && requires(const R r, const call<B> on, const typename R::weights w, const typename R::plan plan,
                             const typename R::context ctx, std::span<const float> dweight, matrix_view<float> dscores,
                             detail::weights_grad<R> dw) {
      { r.backward(on, w, plan, ctx, dweight, dscores, dw) } noexcept -> std::same_as<void>;
    };

/// A router that can weigh the assignments of a given plan anew: what replaying a recorded plan needs.
template <class R, class B>
concept ReplayableRouter =
    Router<R, B> && requires(const R r, const call<B> on, const typename R::weights w, matrix_view<const float> scores,
                             typename R::plan plan, typename R::context ctx) {
      { r.weigh(on, w, scores, plan, ctx) } noexcept -> std::same_as<void>;
    };

/// ys[A] = a bank of experts over rows grouped by expert.
template <class X, class B>
concept Expert = Backend<B> && detail::carves_weights<X> && detail::carves_row_context<X> &&
                 requires(const X x, const call<B> on, const typename X::weights w, const typename X::input in,
                          const bank_rows rows, typename X::output ys, typename X::context ctx, shape s, dim max_rows,
                          arena& mem) {
                   { x.make_output(s, max_rows, mem) } noexcept -> std::same_as<typename X::output>;
                   { x.forward(on, w, in, rows, ys, ctx) } noexcept -> std::same_as<void>;
                 };

namespace detail {

/// An expert that differentiates from the token gradient itself: dys[r] = weight[r] * dy[token[r]], never stored. It adds
/// its own share to dweight.
template <class X, class B>
concept backward_from_tokens =
    requires(const X x, const call<B> on, const typename X::weights w, const typename X::input in, const bank_rows rows,
             const typename X::context ctx, gathered<float> dys, input_grad<X> dx, weights_grad<X> dw,
             std::span<float> dweight) {
      { x.backward(on, w, in, rows, ctx, dys, dx, dw, dweight) } noexcept -> std::same_as<void>;
    };
/// An expert that differentiates from stored rows, as simple policies do.
template <class X, class B>
concept backward_from_rows =
    requires(const X x, const call<B> on, const typename X::weights w, const typename X::input in, const bank_rows rows,
             const typename X::context ctx, typename X::output dys, input_grad<X> dx, weights_grad<X> dw,
             std::span<float> dweight) {
      { x.backward(on, w, in, rows, ctx, dys, dx, dw, dweight) } noexcept -> std::same_as<void>;
    };

}  // namespace detail

/// dys -> dx (+=), dw (+=), dweight (+=). `dys` is `output` or, to save the rows, `gathered<float>`.
template <class X, class B>
concept TrainableExpert = Expert<X, B> && (detail::backward_from_tokens<X, B> || detail::backward_from_rows<X, B>);

namespace detail {

/// An expert that reads the plan's weights itself, and so has a share in dweight whatever the combine does with them.
template <class X>
inline constexpr bool weighs_input = false;
template <class X>
  requires requires { { X::weighs_input } -> std::convertible_to<bool>; }
inline constexpr bool weighs_input<X> = X::weighs_input;

}  // namespace detail

/// y[T,d] = combine(plan, ys), for one kind of input, plan and rows.
template <class C, class In, class Plan, class Rows, class B>
concept Combine = Backend<B> && detail::carves_weights<C> && detail::carves_context<C> &&
                  requires(const C c, const call<B> on, const typename C::weights w, const In x, const Plan plan, Rows ys,
                           matrix_view<float> y, typename C::context ctx) {
                    { c.forward(on, w, x, plan, ys, y, ctx) } noexcept -> std::same_as<void>;
                  };

namespace detail {

/// A weighted sum of rows keeps none of them: its backward names the token gradient that rows gather from.
template <class C>
inline constexpr bool weighted_rows = false;
template <class C>
  requires requires { { C::weighted_rows } -> std::convertible_to<bool>; }
inline constexpr bool weighted_rows<C> = C::weighted_rows;
template <class C, class Rows>
using row_gradient = std::conditional_t<weighted_rows<C>, gathered<float>, Rows>;

}  // namespace detail

/// dy -> dys (=), dx (+=), dw (+=), dweight (+=). With `weighted_rows`, ys is empty and dys is a `gathered<float>` to set.
template <class C, class In, class InGrad, class Plan, class Rows, class B>
concept TrainableCombine =
    Combine<C, In, Plan, Rows, B> &&
    requires(const C c, const call<B> on, const typename C::weights w, const In x, const Plan plan, const Rows ys,
             const typename C::context ctx, matrix_view<const float> dy, detail::row_gradient<C, Rows> dys, InGrad dx,
             detail::weights_grad<C> dw, std::span<float> dweight) {
      { c.backward(on, w, x, plan, ys, ctx, dy, dys, dx, dw, dweight) } noexcept -> std::same_as<void>;
    };

namespace detail {

// Joins that a layer on the host is spared.
template <class B>
concept on_host = Backend<B> && std::same_as<typename B::space, host>;
template <class G, class R, class B>
concept routes_by_part =
    on_host<B> && requires(const G g, const R r, const call<B> on, const typename G::weights gw,
                           const typename R::weights rw, typename G::context gctx, typename R::context rctx,
                           const typename G::input x, matrix_view<float> scores, typename R::plan plan, const then_tokens then,
                           const fill_scores fill) {
      { g.forward(on, gw, x, scores, gctx, then) } noexcept -> std::same_as<void>;
      { r.forward(on, rw, scores, plan, rctx, fill) } noexcept -> std::same_as<void>;
    };
template <class C, class In, class B>
concept combines_by_part =
    on_host<B> && requires(const C c, const call<B> on, const typename C::weights w, const In x, const routing_plan plan,
                           matrix_view<float> ys, dim t, float* y) {
      { c.forward_part(on, w, x, plan, ys, t, t, y, t) } noexcept -> std::same_as<void>;
    };
template <class X, class B>
concept computes_by_part =
    on_host<B> && std::same_as<typename X::output, matrix_view<float>> &&
    requires(const X x, const call<B> on, const typename X::weights w, const typename X::input in, const bank_rows rows,
             typename X::output ys, typename X::context ctx, const then_part then) {
      { x.forward(on, w, in, rows, ys, ctx, then) } noexcept -> std::same_as<void>;
    };

}  // namespace detail

/// Rows that a weighted sum can add: a matrix, or a type that adds row r without having stored it.
template <class Rows, class Arch>
concept RowSource = requires(const Rows ys, dim r) { { ys.row(r) } -> std::convertible_to<const float*>; } ||
                    requires(const Rows ys, Arch arch, dim r, float w, float* y, dim n) { ys.add_row(arch, r, w, y, n); };

/// y += w * row r
template <class Arch, RowSource<Arch> Rows>
MOE_HD void add_one_row(Arch arch, const Rows& ys, dim r, float w, float* y, dim n) noexcept {
  if constexpr (requires { ys.add_row(arch, r, w, y, n); }) ys.add_row(arch, r, w, y, n);
  else axpy(arch, w, ys.row(r), y, n);
}

namespace detail {

// What the layer and sets of experts carve on behalf of a policy.
template <class P>
typename P::weights make_weights(const P& p, shape s, arena& mem) noexcept {
  if constexpr (requires { p.make_weights(s, mem); }) return p.make_weights(s, mem);
  else return {};
}
template <class P>
weights_grad<P> make_gradients(const P& p, shape s, arena& mem) noexcept {
  if constexpr (requires { p.make_gradients(s, mem); }) return p.make_gradients(s, mem);
  else if constexpr (std::same_as<typename P::weights, weights_grad<P>>) return make_weights(p, s, mem);
  else return {};
}
template <class P>
typename P::context make_context(const P& p, shape s, arena& mem) noexcept {
  if constexpr (requires { p.make_context(s, mem); }) return p.make_context(s, mem);
  else return {};
}
template <class P>
typename P::context make_context(const P& p, shape s, dim rows, arena& mem) noexcept {
  if constexpr (requires { p.make_context(s, rows, mem); }) return p.make_context(s, rows, mem);
  else return {};
}
template <class P, class... Rows>
void count_scratch(const P& p, arena& mem, shape s, Rows... rows) noexcept {
  scratch_frame frame(mem);
  if constexpr (requires { p.make_scratch(s, rows..., mem); }) (void)p.make_scratch(s, rows..., mem);
}
template <class B, class P, class... Rows>
void count_scratch_on(const B& backend, const P& p, arena& mem, shape s, Rows... rows) noexcept {
  scratch_frame frame(mem);
  if constexpr (requires { p.make_scratch(backend, s, rows..., mem); }) (void)p.make_scratch(backend, s, rows..., mem);
  else count_scratch(p, mem, s, rows...);
}
template <class P, class... Rows>
void count_backward_scratch(const P& p, arena& mem, shape s, Rows... rows) noexcept {
  scratch_frame frame(mem);
  if constexpr (requires { p.make_backward_scratch(s, rows..., mem); }) (void)p.make_backward_scratch(s, rows..., mem);
}
template <class B, class P, class... Rows>
void count_backward_scratch_on(const B& backend, const P& p, arena& mem, shape s, Rows... rows) noexcept {
  scratch_frame frame(mem);
  if constexpr (requires { p.make_backward_scratch(backend, s, rows..., mem); })
    (void)p.make_backward_scratch(backend, s, rows..., mem);
  else count_backward_scratch(p, mem, s, rows...);
}
template <class P>
void check_shape(const P& p, shape s) {
  check_countable(s);
  if constexpr (requires { p.check(s); }) p.check(s);
}
template <class P>
void check_weights(const P& p, const typename P::weights& w, shape s) {
  if constexpr (requires { p.check(w, s); }) p.check(w, s);
}

template <class P>
inline constexpr bool replaces_gradients = false;
template <class P>
  requires requires {
    { P::replaces_gradients } -> std::convertible_to<bool>;
  }
inline constexpr bool replaces_gradients<P> = P::replaces_gradients;

/// All tensors there are become 0.
template <class B, class V>
void clear(const call<B>& on, const V& views) noexcept {
  for_each_tensor(views, [&](matrix_view<float> m) {
    if (m) fill(on, m, 0.f);
  });
}
/// The call for the backward of P: where gradients are to be replaced and P cannot, they are cleared here and P adds.
template <class P, class B>
call<B> to_differentiate(const call<B>& on, const weights_grad<P>& dw) noexcept {
  call<B> own = on;
  if (replaces_gradients<P> || on.gradients == gradient_mode::add) return own;
  clear(on, dw);
  own.gradients = gradient_mode::add;
  return own;
}

/// Backward of an expert below a sum of rows. One that wants stored rows gets them: its output is computed again,
/// dweight[r] += <dy, ys_r>, and dys_r = weight_r dy. Below a sum without weights <dy, ys_r> is nobody's gradient.
template <class X, class B>
void expert_backward(const call<B>& caller, const X& x, const typename X::weights& w, const typename X::input& in,
                     const bank_rows& rows, const typename X::context& ctx, gathered<float> dys, input_grad<X>& dx,
                     weights_grad<X>& dw, std::span<float> dweight) noexcept {
  const call<B> on = to_differentiate<X>(caller, dw);
  const std::span<float> share = dys.weight ? dweight : std::span<float>{};
  if constexpr (backward_from_tokens<X, B>) {
    x.backward(on, w, in, rows, ctx, dys, dx, dw, weighs_input<X> ? dweight : share);
  } else {
    scratch_frame frame(on.scratch);
    const dim max_rows = rows.room(on.sizes);
    auto ys = x.make_output(on.sizes, max_rows, on.scratch);
    auto again = ctx;
    if (!share.empty()) x.forward(on, w, in, rows, ys, again);
    auto stored = x.make_output(on.sizes, max_rows, on.scratch);
    split_row_gradient(on, rows, dys, ys, stored, share);
    x.backward(on, w, in, rows, ctx, stored, dx, dw, dweight);
  }
}
template <class B, class X>
void count_expert_backward(const B& backend, const X& x, shape s, dim max_rows, arena& mem) noexcept {
  scratch_frame frame(mem);
  if constexpr (requires { x.count_backward(backend, s, max_rows, mem); }) return x.count_backward(backend, s, max_rows, mem);
  if constexpr (!backward_from_tokens<X, B>) {
    (void)x.make_output(s, max_rows, mem);
    count_scratch_on(backend, x, mem, s, max_rows);
    (void)x.make_output(s, max_rows, mem);
  }
  count_backward_scratch_on(backend, x, mem, s, max_rows);
}

/// What the combine hands on, its row gradient, lives as long as the experts' own scratch: it stays taken.
template <class B, class C>
void count_combine_backward(const B& backend, const C& c, shape s, arena& mem) noexcept {
  if constexpr (requires { c.count_backward(backend, s, mem); }) c.count_backward(backend, s, mem);
  else if constexpr (requires { c.make_backward_scratch(s, mem); }) (void)c.make_backward_scratch(s, mem);
}

/// What an expert reads of the gate's input, and where its gradient goes: the input itself, or its member x.
template <class X, class In>
constexpr decltype(auto) expert_input(In& in) noexcept {
  if constexpr (std::same_as<std::remove_const_t<In>, X>) return (in);
  else return (in.x);
}
template <class X, class In>
concept reads_input_of = std::same_as<In, X> || requires(In in) { { in.x } -> std::convertible_to<X>; };

}  // namespace detail
}  // namespace moe
