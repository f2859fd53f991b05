// SPDX-License-Identifier: Apache-2.0
/// A layer: Gate, Router, Expert and Combine over a Backend, composed by the compiler, forward and backward.
#pragma once

#include <limits>

#include "moe/border.hpp"
#include "moe/composition.hpp"

namespace moe {

/// y = combine(experts(x)) by the plan of router(gate(x)).
///
/// Constructed from a shape and, in any order, those parts that have a configuration:
/// `layer<...> net({.d = 64, .f = 256, .experts = 8}, my_experts, pool)`.
/// Errors of composition are one message here; for the reason behind it, assert the concept it names.
template <class G, class R, class X, class C, class B>
class layer : public detail::layer_base<G, R, X, C, B> {
 public:
  template <class... Parts>
  explicit layer(shape s, const Parts&... given) : detail::layer_base<G, R, X, C, B>(s, given...) {
    detail::composition<G, R, X, C, B>::complain();
  }
};

namespace detail {

template <class G, class R, class X, class C, class B>
class layer_impl {
  using parts = composition<G, R, X, C, B>;
  using space = edge<typename B::space>;
  template <class V>
  using at_edge = typename space::template view<V>;
  static constexpr bool keeps_rows = !weighted_rows<C>;
  static constexpr bool routes_at_once = routes_by_part<G, R, B>;
  static constexpr bool combines_at_once = computes_by_part<X, B> && combines_by_part<C, typename X::input, B>;
  static constexpr bool plain = on_host<B> && std::same_as<typename G::input, matrix_view<const float>>;
  template <class P>
  static constexpr bool is_part = std::same_as<P, G> || std::same_as<P, R> || std::same_as<P, X> || std::same_as<P, C> ||
                                  std::same_as<P, B>;

 public:
  using gate_type = G;
  using router_type = R;
  using expert_type = X;
  using combine_type = C;
  using backend_type = B;
  using arena_type = typename space::arena;

  struct weight_views {
    typename G::weights gate;
    typename R::weights router;
    typename X::weights experts;
    typename C::weights combine;
  };
  struct gradient_views {
    weights_grad<G> gate;
    weights_grad<R> router;
    weights_grad<X> experts;
    weights_grad<C> combine;
    shape sizes{};  ///< of the layer that made them; all zero where no layer did
  };
  using weights = at_edge<weight_views>;
  using gradients = at_edge<gradient_views>;
  using input = at_edge<typename G::input>;
  using input_grad = at_edge<detail::input_grad<G>>;

  /// What forward keeps for backward, and the plan. Made for exactly T tokens.
  struct context {
    shape sizes;                      ///< with tokens = T
    bool training = false;            ///< made by make_context: forward keeps what backward reads
    moe::rng random{};                ///< noise, jitter and dropout of this call draw from it
    typename R::plan plan;
    typename G::context gate{};
    typename R::context router{};
    typename X::context experts{};
    typename C::context combine{};
    typename X::output rows{};        ///< expert rows, where the combine needs them in backward
  };

  template <class... Parts>
  explicit layer_impl(shape s, const Parts&... given)
      : sizes_(s), backend_(pick<B>(given...)), gate_(pick<G>(given...)), router_(pick<R>(given...)),
        experts_(pick<X>(given...)), combine_(pick<C>(given...)) {
    static_assert((is_part<Parts> && ...),
                  "moe::layer: a constructor argument is none of this layer's five parts [docs/policies.md]");
    if (s.d <= 0) throw shape_error("moe::layer: d is " + std::to_string(s.d) + ", expected at least 1");
    if (s.experts <= 0) throw shape_error("moe::layer: experts is " + std::to_string(s.experts) + ", expected at least 1");
    if (s.tokens < 0) throw shape_error("moe::layer: tokens is " + std::to_string(s.tokens) + ", expected at least 0");
    if (s.f < 0) throw shape_error("moe::layer: f is " + std::to_string(s.f) + ", expected at least 0");
    check_shape(gate_, s);
    check_shape(router_, s);
    check_shape(experts_, s);
    check_shape(combine_, s);
  }

  const shape& sizes() const noexcept { return sizes_; }
  const B& backend() const noexcept { return backend_; }
  const G& gate() const noexcept { return gate_; }
  const R& router() const noexcept { return router_; }
  const X& experts() const noexcept { return experts_; }
  const C& combine() const noexcept { return combine_; }

  /// Bytes of the flat parameter buffer; of one for gradients, which are float32 whatever the weights are; of a context for T
  /// tokens; of the scratch of one call, forward or backward.
  std::size_t weight_bytes() const noexcept {
    moe::arena count;
    (void)carve_weights(count);
    return padded(count);
  }
  std::size_t gradient_bytes() const noexcept {
    moe::arena count;
    (void)carve_gradients(count);
    return padded(count);
  }
  std::size_t context_bytes(dim T) const {
    moe::arena count;
    (void)carve_context(T, true, count);
    return padded(count);
  }
  std::size_t inference_context_bytes(dim T) const {
    moe::arena count;
    (void)carve_context(T, false, count);
    return padded(count);
  }
  /// scratch_bytes<bf16>(T) where forward reads or writes views of bf16.
  template <class Border = float>
  std::size_t scratch_bytes(dim T) const {
    moe::arena count;
    const shape s = at(T);
    count_forward<Border>(s, count);
    if constexpr (parts::trainable) count_backward(s, count);
    return padded(count);
  }
  /// Every weight by name, in the order of the flat buffer: what a checkpoint or an initialiser needs.
  std::vector<slot> catalogue() const {
    std::vector<slot> list;
    moe::arena count(list);
    (void)carve_weights(count);
    return list;
  }

  /// Every gradient by the name of its weight, float32: the layout of masters and moments too.
  std::vector<slot> gradient_catalogue() const {
    std::vector<slot> list;
    moe::arena count(list);
    (void)carve_gradients(count);
    return list;
  }

  weights make_weights(arena_type& mem) const {
    auto& m = opened(mem, weight_bytes(), "moe::layer::make_weights: the arena", "weight_bytes()");
    return space::close(carve_weights(m));
  }
  gradients make_gradients(arena_type& mem) const {
    auto& m = opened(mem, gradient_bytes(), "moe::layer::make_gradients: the arena", "gradient_bytes()");
    return space::close(carve_gradients(m));
  }
  /// A context for T tokens. The inference one keeps the plan alone.
  context make_context(dim T, arena_type& mem) const {
    return carve_context(T, true, opened(mem, context_bytes(T), "moe::layer::make_context: the arena", "context_bytes(T)"));
  }
  context make_inference_context(dim T, arena_type& mem) const {
    return carve_context(T, false, opened(mem, inference_context_bytes(T), "moe::layer::make_inference_context: the arena",
                                          "inference_context_bytes(T)"));
  }

  /// y[T,d] = layer(x), overwritten. Scratch is taken from `mem` and given back. Where x is a matrix on the host, each of x
  /// and y may be of bf16: y is what it would be in float, rounded once (docs/backends.md, Activations in bf16).
  template <class In = input, class Out = at_edge<matrix_view<float>>>
  void forward(const weights& w, const In& x, const Out& y, context& ctx, arena_type& mem) const {
    constexpr bool reads = passes_for_input<In, input, plain>, writes = passes_for_output<Out, at_edge<matrix_view<float>>, plain>;
    static_assert(reads, "moe::layer::forward: x is not what the gate reads, in memory of the backend [docs/backends.md]");
    static_assert(writes, "moe::layer::forward: y is not rows of float, in memory of the backend [docs/backends.md]");
    if constexpr (reads && writes) {
      check_forward(w, x, y, ctx, mem);
      const auto& v = space::open(w);
      const auto out = at_border<at_edge<matrix_view<float>>>(y);
      run(ctx, mem, x, [&](const call<B>& on, const typename G::input& in, matrix_view<float> scores) {
        route(on, v, in, scores, ctx);
        run_experts(on, v, in, space::open(out), ctx);
      });
    }
  }

  /// Forward along a recorded plan: its assignments, weighed anew by the router from today's scores. The context can be
  /// handed to `backward` as after forward. Host plans only.
  void replay(const weights& w, const input& x, const typename R::plan& recorded, const at_edge<matrix_view<float>>& y,
              context& ctx, arena_type& mem) const {
    static_assert(std::is_same_v<typename B::space, host>, "moe::layer: plans are replayed on the host only [docs/backends.md]");
    static_assert(parts::replayable, "moe::layer: this router cannot weigh a given plan, so it cannot replay one [docs/policies.md]");
    static constexpr call_names names{"moe::layer::replay: x", "moe::layer::replay: y", "moe::layer::replay: ctx",
                                      "moe::layer::replay: the arena"};
    check_call(w, x, y, ctx, mem, names);
    check_recorded(recorded, ctx);
    if constexpr (parts::replayable) {
      const auto& v = space::open(w);
      copy_plan(recorded, ctx.plan);
      run(ctx, mem, x, [&](const call<B>& on, const typename G::input& in, matrix_view<float> scores) {
        gate_.forward(on, v.gate, in, scores, ctx.gate);
        router_.weigh(on, v.router, scores, ctx.plan, ctx.router);
        run_experts(on, v, in, space::open(y), ctx);
      });
    }
  }

  /// dy -> dx (+=), dw (+=, or = with gradient_mode::replace). `ctx` as forward left it, with the same w and x.
  void backward(const weights& w, const input& x, const context& ctx, const at_edge<matrix_view<const float>>& dy,
                const input_grad& dx, gradients& dw, arena_type& mem, gradient_mode mode = gradient_mode::add) const {
    static_assert(parts::trainable, "moe::layer: this layer cannot train: one of its parts has no backward [docs/policies.md]");
    if constexpr (parts::trainable) {
      check_backward(w, x, ctx, dy, dx, dw, mem);
      run_backward(space::open(w), space::open(x), ctx, space::open(dy), space::open(dx), space::open(dw), space::open(mem),
                   mode);
    }
  }

  /// What forward and backward check before they write anything; `sum` asks both its parts first.
  template <class In = input, class Out = at_edge<matrix_view<float>>>
    requires(passes_for_input<In, input, plain> && passes_for_output<Out, at_edge<matrix_view<float>>, plain>)
  void check_forward(const weights& w, const In& x, const Out& y, const context& ctx, arena_type& mem) const {
    static constexpr call_names names{"moe::layer::forward: x", "moe::layer::forward: y", "moe::layer::forward: ctx",
                                      "moe::layer::forward: the arena"};
    check_call(w, at_border<input>(x), at_border<at_edge<matrix_view<float>>>(y), ctx, mem, names);
  }
  void check_backward(const weights& w, const input& x, const context& ctx, const at_edge<matrix_view<const float>>& dy,
                      const input_grad& dx, const gradients& dw, arena_type& mem) const {
    static constexpr call_names names{"moe::layer::backward: x", "moe::layer::backward: dy", "moe::layer::backward: ctx",
                                      "moe::layer::backward: the arena"};
    check_call(w, x, dy, ctx, mem, names);
    check_gradients(space::open(dx), space::open(dw), ctx);
  }

 private:
  static moe::arena& opened(arena_type& mem, std::size_t needed, const char* what, const char* sizer) {
    return detail::opened(space::open(mem), needed, what, sizer);
  }
  shape at(dim T) const {
    if (T < 0) throw shape_error("moe::layer: T is " + std::to_string(T) + ", expected at least 0");
    if (sizes_.tokens > 0 && T > sizes_.tokens)
      throw shape_error("moe::layer: T is " + std::to_string(T) + ", expected at most " + std::to_string(sizes_.tokens) + " (tokens)");
    shape s = sizes_;
    s.tokens = T;
    check_countable(s);
    const dim rows = router_.max_rows(s), most = std::numeric_limits<idx>::max();
    if (rows > most)
      throw shape_error("moe::layer: T is " + std::to_string(T) + ", which may give " + std::to_string(rows) +
                        " assignments, expected at most " + std::to_string(most));
    return s;
  }

  weight_views carve_weights(moe::arena& mem) const noexcept {
    return {scoped("gate", mem, [&] { return detail::make_weights(gate_, sizes_, mem); }),
            scoped("router", mem, [&] { return detail::make_weights(router_, sizes_, mem); }),
            scoped("experts", mem, [&] { return detail::make_weights(experts_, sizes_, mem); }),
            scoped("combine", mem, [&] { return detail::make_weights(combine_, sizes_, mem); })};
  }
  gradient_views carve_gradients(moe::arena& mem) const noexcept {
    return {scoped("gate", mem, [&] { return detail::make_gradients(gate_, sizes_, mem); }),
            scoped("router", mem, [&] { return detail::make_gradients(router_, sizes_, mem); }),
            scoped("experts", mem, [&] { return detail::make_gradients(experts_, sizes_, mem); }),
            scoped("combine", mem, [&] { return detail::make_gradients(combine_, sizes_, mem); }), sizes_};
  }
  template <class F>
  static auto scoped(const char* name, moe::arena& mem, F carve) noexcept {
    moe::arena::scope in(mem, name);
    return carve();
  }
  context carve_context(dim T, bool training, moe::arena& mem) const {
    const shape s = at(T);
    const dim rows = router_.max_rows(s);
    context c{.sizes = s, .training = training, .plan = carve_plan(s, rows, mem)};
    if (training) {
      c.gate = detail::make_context(gate_, s, mem);
      c.router = detail::make_context(router_, s, mem);
      c.experts = detail::make_context(experts_, s, rows, mem);
      c.combine = detail::make_context(combine_, s, mem);
      if constexpr (keeps_rows) c.rows = experts_.make_output(s, rows, mem);
    }
    return c;
  }
  typename R::plan carve_plan(shape s, dim rows, moe::arena& mem) const noexcept {
    if constexpr (requires { router_.make_plan(s, mem); }) return router_.make_plan(s, mem);
    else return make_plan(s, rows, mem);
  }

  template <class Border>
  void count_forward(shape s, moe::arena& mem) const noexcept {
    constexpr bool widens = std::same_as<Border, bf16>;
    scratch_frame frame(mem);
    const dim rows = router_.max_rows(s);
    if constexpr (widens) (void)make_widened(s.tokens, s.d, mem);
    (void)mem.matrix<float>("scores", s.tokens, s.experts);
    {
      scratch_frame inner(mem);
      if constexpr (routes_at_once) (void)router_.make_choices(s, mem);
      count_scratch_on(backend_, gate_, mem, s);
    }
    count_scratch_on(backend_, router_, mem, s);
    (void)experts_.make_output(s, rows, mem);
    count_scratch_on(backend_, experts_, mem, s, rows);
    if constexpr (widens && !combines_at_once) (void)make_widened(s.tokens, s.d, mem);
    count_scratch_on(backend_, combine_, mem, s);
  }
  void count_backward(shape s, moe::arena& mem) const noexcept {
    scratch_frame frame(mem);
    const dim rows = router_.max_rows(s);
    (void)mem.vector<float>("dweight", rows);
    {
      scratch_frame inner(mem);
      count_combine_backward(backend_, combine_, s, mem);
      if constexpr (keeps_rows) {
        (void)experts_.make_output(s, rows, mem);
        count_backward_scratch_on(backend_, experts_, mem, s, rows);
      } else {
        count_expert_backward(backend_, experts_, s, rows, mem);
      }
    }
    (void)mem.matrix<float>("dscores", s.tokens, s.experts);
    count_backward_scratch(router_, mem, s);
    count_backward_scratch(gate_, mem, s);
  }

  struct call_names { const char *x, *y, *ctx, *arena; };
  template <class In, class View>
  void check_call(const weights& w, const In& x, const View& y, const context& ctx, arena_type& mem,
                  const call_names& names) const {
    const shape& s = ctx.sizes;
    if (!same_sizes(s)) throw shape_error(std::string(names.ctx) + " was made by a layer of another shape");
    if constexpr (requires { ctx.plan.token_offsets.data(); })
      if (ctx.plan.token_offsets.data() == nullptr) throw shape_error(std::string(names.ctx) + " has no memory");
    check_input_like(space::open(x), s, names.x);
    const auto& out = space::open(y);
    constexpr bool as_wide_as_x = std::same_as<typename X::input, matrix_view<const float>>;
    expect(out, s.tokens, as_wide_as_x ? s.d : out.cols, names.y, "T x d");
    const auto& v = space::open(w);
    check_weights(gate_, v.gate, s);
    check_weights(router_, v.router, s);
    check_weights(experts_, v.experts, s);
    check_weights(combine_, v.combine, s);
    scratch_frame frame(space::open(mem));
    using border = border_of<In, View>;
    if (opened(mem, scratch_bytes<border>(s.tokens), names.arena, scratch_sizer<border>()).counts())
      throw shape_error(std::string(names.arena) + " has no memory, it only counts");
  }
  void check_gradients(const detail::input_grad<G>& dx, const gradient_views& dw, const context& ctx) const {
    if (!ctx.training) throw shape_error("moe::layer::backward: ctx is an inference context, expected one of make_context");
    if (dw.sizes.experts != 0 && !same_sizes(dw.sizes))
      throw shape_error("moe::layer::backward: dw was made by a layer of another shape");
    check_input_like(dx, ctx.sizes, "moe::layer::backward: dx", true);
  }
  bool same_sizes(const shape& s) const noexcept {
    return s.d == sizes_.d && s.experts == sizes_.experts && s.f == sizes_.f;
  }
  template <class In>
  static void check_input_like(const In& in, const shape& s, const char* what, bool may_be_frozen = false) {
    if constexpr (requires { in.check(s, what); }) {
      in.check(s, what);
    } else if constexpr (requires { in.rows; in.cols; in.ld; }) {
      if (!may_be_frozen || in.data != nullptr || in.rows != 0) expect(in, s.tokens, s.d, what, "T x d");
    } else if constexpr (requires { in.x; }) {
      check_input_like(in.x, s, what, may_be_frozen);
    }
  }
  void check_recorded(const typename R::plan& p, const context& ctx) const {
    check(p);
    expect(p.tokens(), ctx.sizes.tokens, "moe::layer::replay: the plan", "tokens", "T");
    expect(p.experts(), ctx.sizes.experts, "moe::layer::replay: the plan", "experts", "E");
    const dim wanted = p.token_offsets.back(), room = router_.max_rows(ctx.sizes);
    if (wanted > room)
      throw shape_error("moe::layer::replay: the plan has " + std::to_string(wanted) + " assignments, expected at most " +
                        std::to_string(room) + " (max_rows)");
  }

  /// f(on, x, scores) with room for scores, and tokens of bf16 widened.
  template <class In, class F>
  void run(context& ctx, arena_type& memory, const In& x, F f) const {
    moe::arena& mem = space::open(memory);
    scratch_frame frame(mem);
    mem.align();
    const call<B> on{backend_, mem, ctx.sizes, ctx.training, ctx.random};
    const input in = as_floats<input>(on, x);
    f(on, space::open(in), mem.matrix<float>("scores", ctx.sizes.tokens, ctx.sizes.experts));
  }
  void route(const call<B>& on, const weight_views& w, const typename G::input& x, matrix_view<float> scores,
             context& ctx) const {
    if constexpr (routes_at_once) {
      const auto fill = [&](const then_tokens& then) { gate_.forward(on, w.gate, x, scores, ctx.gate, then); };
      router_.forward(on, w.router, scores, ctx.plan, ctx.router, fill_scores(fill));
    } else {
      gate_.forward(on, w.gate, x, scores, ctx.gate);
      router_.forward(on, w.router, scores, ctx.plan, ctx.router);
    }
  }
  template <class Y>
  void run_experts(const call<B>& on, const weight_views& w, const typename G::input& x, matrix_view<Y> y,
                   context& ctx) const {
    const auto& in = expert_input<typename X::input>(x);
    const bool kept = keeps_rows && ctx.training;
    typename X::output ys = kept ? ctx.rows : experts_.make_output(on.sizes, router_.max_rows(on.sizes), on.scratch);
    if constexpr (combines_at_once) {
      const auto combine = [&](const result_part& p) {
        for (dim t = p.token; t < p.token + p.tokens; ++t)
          put(y.row(t) + p.column, p.columns, [&](dim first, float* to, dim n) {
            combine_.forward_part(on, w.combine, in, ctx.plan, ys, t, p.column + first, to, n);
          });
      };
      experts_.forward(on, w.experts, in, ctx.plan.all(), ys, ctx.experts, then_part(combine));
    } else {
      experts_.forward(on, w.experts, in, ctx.plan.all(), ys, ctx.experts);
      if (kept) ctx.rows = ys;
      with_floats<matrix_view<float>>(on, y, [&](const matrix_view<float>& out) {
        combine_.forward(on, w.combine, in, ctx.plan, ys, out, ctx.combine);
      });
    }
  }
  void run_backward(const weight_views& w, const typename G::input& x, const context& ctx, matrix_view<const float> dy,
                    detail::input_grad<G> dx, gradient_views& dw, moe::arena& mem, gradient_mode mode) const {
    scratch_frame frame(mem);
    mem.align();
    const call<B> on{backend_, mem, ctx.sizes, ctx.training, ctx.random, mode};
    const dim rows = router_.max_rows(ctx.sizes);
    const std::span<float> dweight = mem.vector<float>("dweight", rows);
    fill(on, matrix_view<float>{dweight.data(), 1, rows}, 0.f);
    {
      scratch_frame inner(mem);
      const auto& in = expert_input<typename X::input>(x);
      auto& din = expert_input<detail::input_grad<X>>(dx);
      row_gradient<C, typename X::output> dys{};
      if constexpr (keeps_rows) dys = experts_.make_output(on.sizes, rows, mem);
      combine_.backward(to_differentiate<C>(on, dw.combine), w.combine, in, ctx.plan, ctx.rows, ctx.combine, dy, dys, din,
                        dw.combine, dweight);
      if constexpr (keeps_rows)
        experts_.backward(to_differentiate<X>(on, dw.experts), w.experts, in, ctx.plan.all(), ctx.experts, dys, din,
                          dw.experts, dweight);
      else
        expert_backward(on, experts_, w.experts, in, ctx.plan.all(), ctx.experts, dys, din, dw.experts, dweight);
    }
    const auto dscores = mem.matrix<float>("dscores", ctx.sizes.tokens, ctx.sizes.experts);
    router_.backward(to_differentiate<R>(on, dw.router), w.router, ctx.plan, ctx.router, dweight, dscores, dw.router);
    gate_.backward(to_differentiate<G>(on, dw.gate), w.gate, x, ctx.gate, dscores, dx, dw.gate);
  }
  static void copy_plan(const typename R::plan& from, typename R::plan& to) noexcept {
    const auto copy = [](auto a, auto b, dim n) {
      for (dim i = 0; i < n; ++i) b[static_cast<std::size_t>(i)] = a[static_cast<std::size_t>(i)];
    };
    copy(from.offsets, to.offsets, from.experts() + 1);
    copy(from.token, to.token, from.rows());
    copy(from.token_offsets, to.token_offsets, from.tokens() + 1);
    copy(from.position, to.position, from.token_offsets.back());
  }

  shape sizes_;
  [[no_unique_address]] B backend_;
  [[no_unique_address]] G gate_;
  [[no_unique_address]] R router_;
  [[no_unique_address]] X experts_;
  [[no_unique_address]] C combine_;
};

}  // namespace detail
}  // namespace moe
