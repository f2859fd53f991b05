// SPDX-License-Identifier: Apache-2.0
/// A path beside the plan: experts that every token passes through, and their sum with a routed layer.
#pragma once

#include "moe/layer.hpp"

namespace moe {

/// y = X(x) for every token, or y = sigmoid(<g, x>) X(x) when `Gated`: one expert outside any plan.
/// Has the public functions of a layer.
///
/// weights  of X, and gate[1,d] when gated      saves  what X saves
/// Qwen1.5-MoE gates its shared expert, DeepSeek-MoE does not.
template <class X, class B, bool Gated = false>
class basic_dense {
  static_assert(Expert<X, B>, "moe::dense: argument 1 is not an Expert on this backend; static_assert(moe::Expert<X, B>) says why [docs/policies.md]");
  using space = edge<typename B::space>;
  template <class V>
  using at_edge = typename space::template view<V>;
  static constexpr bool plain = detail::on_host<B> && std::same_as<typename X::input, matrix_view<const float>>;

 public:
  using backend_type = B;
  using arena_type = typename space::arena;
  using input = at_edge<typename X::input>;
  using input_grad = at_edge<detail::input_grad<X>>;
  struct weight_views {
    matrix_view<float> gate;  ///< [1,d] when gated
    typename X::weights expert;
  };
  struct gradient_views {
    matrix_view<float> gate;
    detail::weights_grad<X> expert;
    shape sizes{};  ///< of the layer that made them; all zero where no layer did
  };
  using weights = at_edge<weight_views>;
  using gradients = at_edge<gradient_views>;
  struct context {
    shape sizes;
    bool training = false;
    moe::rng random{};
    typename X::context expert{};
  };

  explicit basic_dense(shape s, X expert = {}, B backend = {}) : sizes_(s), expert_(expert), backend_(backend) {
    sizes_.experts = 1;
    if (s.d <= 0) throw shape_error("moe::dense: d is " + std::to_string(s.d) + ", expected at least 1");
    if (s.tokens < 0) throw shape_error("moe::dense: tokens is " + std::to_string(s.tokens) + ", expected at least 0");
    if (s.f < 0) throw shape_error("moe::dense: f is " + std::to_string(s.f) + ", expected at least 0");
    detail::check_shape(expert_, sizes_);
  }
  const shape& sizes() const noexcept { return sizes_; }
  const B& backend() const noexcept { return backend_; }

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
    (void)detail::make_context(expert_, at(T), T, count);
    return padded(count);
  }
  std::size_t inference_context_bytes(dim) const noexcept { return 0; }
  /// scratch_bytes<bf16>(T) where forward reads or writes views of bf16.
  template <class Border = float>
  std::size_t scratch_bytes(dim T) const {
    moe::arena count;
    {
      scratch_frame frame(count);
      for (int borders = 0; std::same_as<Border, bf16> && borders < 2; ++borders)
        (void)detail::make_widened(T, sizes_.d, count);
      (void)count.vector<idx>("offsets", 2);
      (void)expert_.make_output(at(T), T, count);
      detail::count_scratch_on(backend_, expert_, count, at(T), T);
    }
    if constexpr (TrainableExpert<X, B>) {
      (void)count.vector<idx>("offsets", 2);
      (void)make_gate_scratch(T, count);
      detail::count_expert_backward(backend_, expert_, at(T), T, count);
    }
    return padded(count);
  }
  std::vector<slot> catalogue() const {
    std::vector<slot> list;
    moe::arena count(list);
    (void)carve_weights(count);
    return list;
  }
  std::vector<slot> gradient_catalogue() const {
    std::vector<slot> list;
    moe::arena count(list);
    (void)carve_gradients(count);
    return list;
  }
  weights make_weights(arena_type& mem) const {
    auto& m = detail::opened(space::open(mem), weight_bytes(), "moe::dense::make_weights: the arena", "weight_bytes()");
    return space::close(carve_weights(m));
  }
  gradients make_gradients(arena_type& mem) const {
    moe::arena& m = detail::opened(space::open(mem), gradient_bytes(), "moe::dense::make_gradients: the arena", "gradient_bytes()");
    return space::close(carve_gradients(m));
  }
  context make_context(dim T, arena_type& mem) const {
    moe::arena& m = detail::opened(space::open(mem), context_bytes(T), "moe::dense::make_context: the arena", "context_bytes(T)");
    return {at(T), true, moe::rng(), detail::make_context(expert_, at(T), T, m)};
  }
  context make_inference_context(dim T, arena_type&) const { return {at(T), false, moe::rng(), {}}; }

  /// y[T,d] overwritten; on the host each of x and y may be of bf16, as in a layer.
  template <class In = input, class Out = at_edge<matrix_view<float>>>
    requires(detail::passes_for_input<In, input, plain> &&
             detail::passes_for_output<Out, at_edge<matrix_view<float>>, plain>)
  void forward(const weights& w, const In& x, const Out& y, context& ctx, arena_type& mem) const {
    check_forward(w, x, y, ctx, mem);
    moe::arena& m = space::open(mem);
    scratch_frame frame(m);
    m.align();
    const call<B> on{backend_, m, ctx.sizes, ctx.training, ctx.random};
    const input in = detail::as_floats<input>(on, x);
    detail::with_floats<at_edge<matrix_view<float>>>(on, y, [&](const auto& out) {
      run(on, space::open(w), space::open(in), space::open(out), ctx);
    });
  }
  /// dy -> dx (+=), dw (+=, or = with gradient_mode::replace)
  void backward(const weights& w, const input& x, const context& ctx, const at_edge<matrix_view<const float>>& dy,
                const input_grad& dx, gradients& dw, arena_type& mem, gradient_mode mode = gradient_mode::add) const {
    static_assert(TrainableExpert<X, B>, "moe::dense: this expert has no backward [docs/policies.md]");
    if constexpr (TrainableExpert<X, B>) {
      check_backward(w, x, ctx, dy, dx, dw, mem);
      moe::arena& m = space::open(mem);
      scratch_frame frame(m);
      m.align();
      const call<B> on{backend_, m, ctx.sizes, ctx.training, ctx.random, mode};
      const auto& v = space::open(w);
      auto& g = space::open(dw);
      auto in_grad = space::open(dx);
      bank_rows rows = dense_rows(on);
      const auto s = make_gate_scratch(on.sizes.tokens, m);
      gathered<float> dys{space::open(dy)};
      if constexpr (Gated) {
        for_each_token(on, on.sizes.tokens, open_gate<typename B::arch>{v.gate, space::open(x), s});
        dys.weight = s.row(0);
      }
      const std::span<float> dweight = Gated ? std::span<float>{s.row(1), static_cast<std::size_t>(s.cols)} : std::span<float>{};
      detail::expert_backward(on, expert_, v.expert, space::open(x), rows, ctx.expert, dys, in_grad, g.expert, dweight);
      if constexpr (Gated) {
        for_each_token(on, on.sizes.tokens, close_gate<typename B::arch>{v.gate, s, in_grad});
        if (mode == gradient_mode::replace) detail::clear(on, g.gate);
        if (g.gate) sum_rows(on, rows, gathered<float>{space::open(x), nullptr, s.row(1)}, g.gate);
      }
    }
  }

  /// What forward and backward check before they write anything; `sum` asks both its parts first.
  template <class In = input, class Out = at_edge<matrix_view<float>>>
    requires(detail::passes_for_input<In, input, plain> &&
             detail::passes_for_output<Out, at_edge<matrix_view<float>>, plain>)
  void check_forward(const weights& w, const In& x, const Out& y, const context& ctx, arena_type& mem) const {
    check_call(w, detail::at_border<input>(x), detail::at_border<at_edge<matrix_view<float>>>(y), ctx, mem, "moe::dense: y");
  }
  void check_backward(const weights& w, const input& x, const context& ctx, const at_edge<matrix_view<const float>>& dy,
                      const input_grad& dx, const gradients& dw, arena_type& mem) const {
    check_call(w, x, dy, ctx, mem, "moe::dense: dy");
    if (!ctx.training) throw shape_error("moe::dense::backward: ctx is an inference context, expected one of make_context");
    const shape& made = space::open(dw).sizes;
    if (made.d != 0 && (made.d != sizes_.d || made.f != sizes_.f))
      throw shape_error("moe::dense::backward: dw was made by a layer of another shape");
    const auto& grad = space::open(dx);
    if (grad || grad.rows != 0) expect(grad, ctx.sizes.tokens, sizes_.d, "moe::dense: dx", "T x d");
  }

  // What kernels are made of is public: nvcc wants to name it.
  template <class Arch>
  MOE_HD static float open(matrix_view<const float> gate, const float* x) noexcept {
    if constexpr (Gated) return 1.f / (1.f + std::exp(-dot(Arch{}, gate.row(0), x, gate.cols)));
    else return 1.f;
  }
  template <class Arch>
  struct take {
    typename X::output ys;
    matrix_view<const float> gate, x;
    matrix_view<float> y;
    MOE_HD void operator()(dim t) const noexcept {
      for (dim j = 0; j < y.cols; ++j) y(t, j) = 0;
      add_one_row(Arch{}, ys, t, open<Arch>(gate, x.row(t)), y.row(t), y.cols);
    }
  };
  template <class Arch>
  struct open_gate {
    matrix_view<const float> gate, x;
    matrix_view<float> s;
    MOE_HD void operator()(dim t) const noexcept {
      s(0, t) = open<Arch>(gate, x.row(t));
      s(1, t) = 0;
    }
  };
  /// From the gate's gradient to its logit's: dz = ds s (1 - s); dx += dz g.
  template <class Arch>
  struct close_gate {
    matrix_view<const float> gate;
    matrix_view<float> s, dx;
    MOE_HD void operator()(dim t) const noexcept {
      s(1, t) *= s(0, t) * (1.f - s(0, t));
      if (dx) axpy(Arch{}, s(1, t), gate.row(0), dx.row(t), dx.cols);
    }
  };

 private:
  shape at(dim T) const {
    if (T < 0) throw shape_error("moe::dense: T is " + std::to_string(T) + ", expected at least 0");
    if (sizes_.tokens > 0 && T > sizes_.tokens)
      throw shape_error("moe::dense: T is " + std::to_string(T) + ", expected at most " + std::to_string(sizes_.tokens) + " (tokens)");
    shape s = sizes_;
    s.tokens = T;
    detail::check_countable(s);
    return s;
  }
  matrix_view<float> make_gate(moe::arena& mem) const noexcept {
    return Gated ? mem.matrix<float>("gate.w", 1, sizes_.d) : matrix_view<float>{};
  }
  weight_views carve_weights(moe::arena& mem) const noexcept {
    weight_views w;
    w.gate = make_gate(mem);
    moe::arena::scope in(mem, "experts");
    w.expert = detail::make_weights(expert_, sizes_, mem);
    return w;
  }
  gradient_views carve_gradients(moe::arena& mem) const noexcept {
    gradient_views w;
    w.sizes = sizes_;
    w.gate = make_gate(mem);
    moe::arena::scope in(mem, "experts");
    w.expert = detail::make_gradients(expert_, sizes_, mem);
    return w;
  }
  /// [2,T]: the open gate of each token; its gradient.
  static matrix_view<float> make_gate_scratch(dim T, moe::arena& mem) noexcept {
    return Gated ? mem.matrix<float>("gates", 2, T) : matrix_view<float>{};
  }
  void run(const call<B>& on, const weight_views& w, const typename X::input& x, matrix_view<float> y, context& ctx) const {
    constexpr bool stores = std::same_as<typename X::output, matrix_view<float>>;
    const bank_rows rows = dense_rows(on);
    auto ys = expert_.make_output(on.sizes, on.sizes.tokens, on.scratch);
    if constexpr (!Gated && stores) ys = y;
    expert_.forward(on, w.expert, x, rows, ys, ctx.expert);
    if constexpr (Gated || !stores) for_each_token(on, on.sizes.tokens, take<typename B::arch>{ys, w.gate, x, y});
  }
  template <class In, class View>
  void check_call(const weights& w, const In& x, const View& y, const context& ctx, arena_type& mem,
                  const char* name) const {
    const auto& v = space::open(w);
    if (ctx.sizes.d != sizes_.d || ctx.sizes.f != sizes_.f)
      throw shape_error("moe::dense: ctx was made by a layer of another shape");
    expect(space::open(x), ctx.sizes.tokens, sizes_.d, "moe::dense: x", "T x d");
    expect(space::open(y), ctx.sizes.tokens, sizes_.d, name, "T x d");
    if constexpr (Gated) expect(v.gate, 1, sizes_.d, "moe::dense: gate", "1 x d");
    detail::check_weights(expert_, v.expert, sizes_);
    scratch_frame frame(space::open(mem));
    using border = detail::border_of<In, View>;
    moe::arena& m = detail::opened(space::open(mem), scratch_bytes<border>(ctx.sizes.tokens), "moe::dense: the arena",
                                   detail::scratch_sizer<border>());
    if (m.counts())
      throw shape_error("moe::dense: the arena counts, expected one with memory");
  }

  shape sizes_;
  [[no_unique_address]] X expert_;
  [[no_unique_address]] B backend_;
};

template <class X, class B>
using dense = basic_dense<X, B, false>;
/// With a sigmoid gate of one logit a token.
template <class X, class B>
using gated_dense = basic_dense<X, B, true>;

/// y = L(x) + D(x): a routed layer and its shared expert. Has the public functions of a layer.
template <class L, class D>
class sum {
  static constexpr bool plain = std::same_as<typename L::input, matrix_view<const float>>;

 public:
  using arena_type = typename L::arena_type;
  using input = typename L::input;
  using input_grad = typename L::input_grad;
  struct weights {
    typename L::weights routed;
    typename D::weights shared;
  };
  struct gradients {
    typename L::gradients routed;
    typename D::gradients shared;
  };
  struct context {
    typename L::context routed;
    typename D::context shared;
  };

  using backend_type = typename D::backend_type;

  sum(L routed, D shared) : routed_(std::move(routed)), shared_(std::move(shared)) {
    expect(shared_.sizes().d, routed_.sizes().d, "moe::sum: the shared layer", "columns", "d");
  }
  const L& routed() const noexcept { return routed_; }
  const D& shared() const noexcept { return shared_; }
  const shape& sizes() const noexcept { return routed_.sizes(); }
  const backend_type& backend() const noexcept { return shared_.backend(); }

  std::size_t weight_bytes() const noexcept { return routed_.weight_bytes() + shared_.weight_bytes(); }
  std::size_t gradient_bytes() const noexcept { return routed_.gradient_bytes() + shared_.gradient_bytes(); }
  std::size_t context_bytes(dim T) const { return routed_.context_bytes(T) + shared_.context_bytes(T); }
  std::size_t inference_context_bytes(dim T) const {
    return routed_.inference_context_bytes(T) + shared_.inference_context_bytes(T);
  }
  /// scratch_bytes<bf16>(T) where forward reads or writes views of bf16.
  template <class Border = float>
  std::size_t scratch_bytes(dim T) const {
    moe::arena count;
    for (int borders = 0; std::same_as<Border, bf16> && borders < 2; ++borders)
      (void)detail::make_widened(T, sizes().d, count);
    (void)make_scratch(T, count);
    const std::size_t a = routed_.scratch_bytes(T), b = shared_.scratch_bytes(T);
    return padded(count) + (a > b ? a : b);
  }
  std::vector<slot> catalogue() const {
    std::vector<slot> list;
    moe::arena count(list);
    (void)make_weights(count);
    return list;
  }
  std::vector<slot> gradient_catalogue() const {
    std::vector<slot> list;
    moe::arena count(list);
    (void)make_gradients(count);
    return list;
  }
  weights make_weights(arena_type& mem) const {
    return {scoped("routed", mem, [&] { return routed_.make_weights(mem); }),
            scoped("shared", mem, [&] { return shared_.make_weights(mem); })};
  }
  gradients make_gradients(arena_type& mem) const {
    return {scoped("routed", mem, [&] { return routed_.make_gradients(mem); }),
            scoped("shared", mem, [&] { return shared_.make_gradients(mem); })};
  }
  context make_context(dim T, arena_type& mem) const { return {routed_.make_context(T, mem), shared_.make_context(T, mem)}; }
  context make_inference_context(dim T, arena_type& mem) const {
    return {routed_.make_inference_context(T, mem), shared_.make_inference_context(T, mem)};
  }

  template <class In = input, class Out = matrix_view<float>>
    requires(detail::passes_for_input<In, input, plain> && detail::passes_for_output<Out, matrix_view<float>, plain>)
  void forward(const weights& w, const In& x, const Out& y, context& ctx, arena_type& mem) const {
    check_forward(w, x, y, ctx, mem);
    scratch_frame frame(mem);
    mem.align();
    const call<backend_type> on{backend(), mem, sizes()};
    const input in = detail::as_floats<input>(on, x);
    detail::with_floats<matrix_view<float>>(on, y, [&](const matrix_view<float>& out) {
      routed_.forward(w.routed, in, out, ctx.routed, mem);
      add_shared(w, in, out, ctx, mem);
    });
  }
  /// Forward with the routed part along a recorded plan.
  template <class Plan>
  void replay(const weights& w, const input& x, const Plan& recorded, const matrix_view<float>& y, context& ctx,
              arena_type& mem) const {
    check_forward(w, x, y, ctx, mem);
    routed_.replay(w.routed, x, recorded, y, ctx.routed, mem);
    add_shared(w, x, y, ctx, mem);
  }
  void backward(const weights& w, const input& x, const context& ctx, const matrix_view<const float>& dy,
                const input_grad& dx, gradients& dw, arena_type& mem, gradient_mode mode = gradient_mode::add) const {
    check_backward(w, x, ctx, dy, dx, dw, mem);
    routed_.backward(w.routed, x, ctx.routed, dy, dx, dw.routed, mem, mode);
    shared_.backward(w.shared, x, ctx.shared, dy, dx, dw.shared, mem, mode);
  }
  /// What forward and backward check before they write anything.
  template <class In = input, class Out = matrix_view<float>>
    requires(detail::passes_for_input<In, input, plain> && detail::passes_for_output<Out, matrix_view<float>, plain>)
  void check_forward(const weights& w, const In& x, const Out& y, const context& ctx, arena_type& mem) const {
    routed_.check_forward(w.routed, x, y, ctx.routed, mem);
    shared_.check_forward(w.shared, x, y, ctx.shared, mem);
    scratch_frame frame(mem);
    using border = detail::border_of<In, Out>;
    (void)detail::opened(mem, scratch_bytes<border>(y.rows), "moe::sum::forward: the arena", detail::scratch_sizer<border>());
  }
  void check_backward(const weights& w, const input& x, const context& ctx, const matrix_view<const float>& dy,
                      const input_grad& dx, const gradients& dw, arena_type& mem) const {
    routed_.check_backward(w.routed, x, ctx.routed, dy, dx, dw.routed, mem);
    shared_.check_backward(w.shared, x, ctx.shared, dy, dx, dw.shared, mem);
  }

 private:
  matrix_view<float> make_scratch(dim T, arena& mem) const noexcept { return mem.matrix<float>("ys", T, sizes().d); }
  void add_shared(const weights& w, const input& x, const matrix_view<float>& y, context& ctx, arena_type& mem) const {
    scratch_frame frame(mem);
    mem.align();
    const auto ys = make_scratch(y.rows, mem);
    shared_.forward(w.shared, x, ys, ctx.shared, mem);
    add(call<backend_type>{shared_.backend(), mem, sizes()}, ys, y);
  }
  template <class F>
  static auto scoped(const char* name, arena_type& mem, F carve) {
    arena::scope in(mem, name);
    return carve();
  }

  L routed_;
  D shared_;
};

}  // namespace moe
