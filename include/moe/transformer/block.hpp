// SPDX-License-Identifier: Apache-2.0
/// A block of a transformer: attention, then a layer, each behind a norm and beside a path that skips it.
#pragma once

#include "moe/attention/self_attention_cache.hpp"
#include "moe/layer.hpp"

namespace moe {

/// h = x + attention(norm(x)),  y = h + layer(norm(h)), for tokens x[T,d] in packed sequences.
///
///   const moe::transformer_block block(attention, experts);    // a self_attention; a layer, a dense or a sum
///
/// Has the public functions of a layer, with the input of attention: x, its sequences and the angles of make_table.
/// weights  of both parts, and the weights of both norms      saves  h, both normed inputs, what the parts save
/// errors   shape_error, before anything is written
/// Pre-norm: Xiong et al. 2020, arXiv:2002.04745; RMSNorm with epsilon 1e-6: Zhang and Sennrich 2019, arXiv:1910.07467
template <class Attention, class Layer>
class transformer_block {
  static_assert(std::same_as<typename Attention::backend_type, typename Layer::backend_type>,
                "moe::transformer_block: attention and layer run on different backends [docs/backends.md]");
  static_assert(std::same_as<typename Layer::input, matrix_view<const float>>,
                "moe::transformer_block: argument 2 does not read rows of float alone [docs/policies.md]");
  using on_type = call<typename Attention::backend_type>;

 public:
  using attention_type = Attention;
  using layer_type = Layer;
  using backend_type = typename Attention::backend_type;
  using arena_type = arena;
  using input = typename Attention::input;
  using input_grad = matrix_view<float>;
  template <class T>
  using cache = typename Attention::template cache<T>;
  struct weights {
    rms_norm::weights attention_norm;
    typename Attention::weights attention;
    rms_norm::weights layer_norm;
    typename Layer::weights layer;
  };
  struct gradients {
    rms_norm::weights attention_norm;
    typename Attention::gradients attention;
    rms_norm::weights layer_norm;
    typename Layer::gradients layer;
  };
  /// What forward computes on its way; backward reads it again.
  struct context {
    matrix_view<float> attention_in, h, layer_in;  ///< [T,d]
    rms_norm::context attention_norm, layer_norm;
    typename Attention::context attention;
    typename Layer::context layer;
  };

  transformer_block(Attention attention, Layer layer) : attention_(std::move(attention)), layer_(std::move(layer)) {
    expect(layer_.sizes().d, attention_.d(), "transformer_block: the layer", "columns", "d");
  }
  const Attention& attention() const noexcept { return attention_; }
  const Layer& layer() const noexcept { return layer_; }
  const backend_type& backend() const noexcept { return attention_.backend(); }
  const shape& sizes() const noexcept { return layer_.sizes(); }
  dim d() const noexcept { return attention_.d(); }

  std::size_t weight_bytes() const {
    return counted([&](arena& mem) { (void)carve<weights>(mem, make_part_weights); });
  }
  std::size_t gradient_bytes() const {
    return counted([&](arena& mem) { (void)carve<gradients>(mem, make_part_gradients); });
  }
  std::size_t context_bytes(dim T) const {
    return counted([&](arena& mem) { (void)carve_context(T, mem); });
  }
  /// For forward and backward of T tokens in at most `sequences` sequences; with the context that inference takes.
  std::size_t scratch_bytes(dim T, dim sequences = 1) const {
    const std::size_t forward = counted([&](arena& mem) { (void)carve_inference(T, mem); });
    const std::size_t backward = counted([&](arena& mem) { (void)carve_slopes(T, mem); });
    const std::size_t norm = counted([&](arena& mem) { (void)norm_.make_backward_scratch(T, d(), mem); });
    const auto most = [](std::size_t a, std::size_t b) { return a > b ? a : b; };
    return most(forward, backward) + most(norm, most(attention_.scratch_bytes(T, sequences), layer_.scratch_bytes(T)));
  }
  /// For T tokens that come to a cache.
  template <class T>
  std::size_t scratch_bytes(dim tokens, const cache<T>& past) const {
    const std::size_t attention = attention_.scratch_bytes(tokens, past), layer = layer_.scratch_bytes(tokens);
    return counted([&](arena& mem) { (void)carve_inference(tokens, mem); }) + (attention > layer ? attention : layer);
  }
  /// Every weight by name, in the order of the flat buffer; and every gradient.
  std::vector<slot> catalogue() const {
    std::vector<slot> list;
    arena count(list);
    (void)carve<weights>(count, make_part_weights);
    return list;
  }
  std::vector<slot> gradient_catalogue() const {
    std::vector<slot> list;
    arena count(list);
    (void)carve<gradients>(count, make_part_gradients);
    return list;
  }

  weights make_weights(arena& mem) const {
    return carve<weights>(
        detail::opened(mem, weight_bytes(), "transformer_block::make_weights: the arena", "weight_bytes()"),
        make_part_weights);
  }
  gradients make_gradients(arena& mem) const {
    return carve<gradients>(
        detail::opened(mem, gradient_bytes(), "transformer_block::make_gradients: the arena", "gradient_bytes()"),
        make_part_gradients);
  }
  context make_context(dim T, arena& mem) const {
    return carve_context(
        T, detail::opened(mem, context_bytes(T), "transformer_block::make_context: the arena", "context_bytes(T)"));
  }
  /// Of attention, for so many sequences of at most `capacity` tokens, none of which has come.
  template <class T>
  cache<T> make_cache(dim sequences, dim capacity, arena& mem) const {
    return attention_.template make_cache<T>(sequences, capacity, mem);
  }
  template <class T>
  std::size_t cache_bytes(dim sequences, dim capacity) const noexcept {
    return attention_.template cache_bytes<T>(sequences, capacity);
  }
  /// Angles of so many positions, for all blocks alike.
  auto make_table(dim positions, arena& mem) const noexcept { return attention_.make_table(positions, mem); }

  /// y[T,d], overwritten; not x. Takes scratch_bytes from `mem`, and gives them back.
  void forward(const weights& w, const input& in, matrix_view<float> y, context& ctx, arena& mem) const {
    check_forward(w, in, y, ctx, mem);
    const on_type on = call_of(in, mem);
    norm_.forward(on, w.attention_norm, in.x, ctx.attention_in, ctx.attention_norm);
    attention_.forward(w.attention, with(in, ctx.attention_in), ctx.h, ctx.attention, mem);
    add(on, in.x, ctx.h);
    norm_.forward(on, w.layer_norm, ctx.h, ctx.layer_in, ctx.layer_norm);
    layer_.forward(w.layer, ctx.layer_in, y, ctx.layer, mem);
    add(on, ctx.h, y);
  }
  /// The same where no backward follows.
  void forward(const weights& w, const input& in, matrix_view<float> y, arena& mem) const {
    check_call(w, in, y, "transformer_block::forward: y", scratch_bytes(in.x.rows, in.sequences.count()), mem);
    infer(w, in, y, mem,
          [&](const input& normed, matrix_view<float> h) { attention_.forward(w.attention, normed, h, mem); });
  }
  /// The same for tokens that follow those in a cache, which they join: a prefill, or one token a sequence.
  template <class T>
  void forward(const weights& w, const input& in, matrix_view<float> y, cache<T>& past, arena& mem) const {
    check_call(w, in, y, "transformer_block::forward: y", scratch_bytes(in.x.rows, past), mem);
    infer(w, in, y, mem,
          [&](const input& normed, matrix_view<float> h) { attention_.forward(w.attention, normed, h, past, mem); });
  }
  /// dy -> dx (+=), dw (+=, or = with gradient_mode::replace). ctx as forward left it, with the same w and in. An empty dx
  /// is not computed.
  void backward(const weights& w, const input& in, const context& ctx, matrix_view<const float> dy, matrix_view<float> dx,
                gradients& dw, arena& mem, gradient_mode mode = gradient_mode::add) const {
    check_backward(w, in, ctx, dy, dx, dw, mem);
    scratch_frame frame(mem);
    mem.align();
    const slopes s = carve_slopes(in.x.rows, mem);
    const on_type on = call_of(in, mem);
    if (mode == gradient_mode::replace) {
      detail::clear(on, dw.attention_norm);
      detail::clear(on, dw.layer_norm);
    }
    fill(on, s.dh, 0.f);
    fill(on, s.dnormed, 0.f);
    layer_.backward(w.layer, ctx.layer_in, ctx.layer, dy, s.dnormed, dw.layer, mem, mode);
    add(on, dy, s.dh);
    norm_.backward(on, w.layer_norm, ctx.h, ctx.layer_norm, s.dnormed, s.dh, dw.layer_norm);
    fill(on, s.dnormed, 0.f);
    attention_.backward(w.attention, with(in, ctx.attention_in), ctx.attention, s.dh, s.dnormed, dw.attention, mem, mode);
    if (dx) add(on, s.dh, dx);
    norm_.backward(on, w.attention_norm, in.x, ctx.attention_norm, s.dnormed, dx, dw.attention_norm);
  }

  /// What forward and backward check before they write anything.
  void check_forward(const weights& w, const input& in, matrix_view<float> y, const context& ctx, arena& mem) const {
    check_call(w, in, y, "transformer_block::forward: y", scratch_bytes(in.x.rows, in.sequences.count()), mem);
    check_context(in, ctx);
    attention_.check_forward(w.attention, in, y, ctx.attention, mem);
    layer_.check_forward(w.layer, in.x, y, ctx.layer, mem);
  }
  void check_backward(const weights& w, const input& in, const context& ctx, matrix_view<const float> dy,
                      matrix_view<float> dx, const gradients& dw, arena& mem) const {
    check_call(w, in, dy, "transformer_block::backward: dy", scratch_bytes(in.x.rows, in.sequences.count()), mem);
    check_context(in, ctx);
    if (dx) expect(dx, in.x.rows, d(), "transformer_block::backward: dx", "T x d");
    attention_.check_backward(w.attention, in, ctx.attention, dy, dx, mem);
    layer_.check_backward(w.layer, in.x, ctx.layer, dy, dx, dw.layer, mem);
  }

 private:
  static constexpr auto make_part_weights = [](const auto& part, arena& mem) { return part.make_weights(mem); };
  static constexpr auto make_part_gradients = [](const auto& part, arena& mem) { return part.make_gradients(mem); };
  struct inference {
    matrix_view<float> normed, h;
    rms_norm::context norm;
    typename Layer::context layer;
  };
  struct slopes {
    matrix_view<float> dh, dnormed;
  };

  template <class Carve>
  static std::size_t counted(Carve carve) {
    arena count;
    carve(count);
    return padded(count);
  }
  static input with(input in, matrix_view<const float> x) noexcept {
    in.x = x;
    return in;
  }
  on_type call_of(const input& in, arena& mem) const noexcept { return {backend(), mem, {.tokens = in.x.rows, .d = d()}}; }

  template <class Attend>
  void infer(const weights& w, const input& in, matrix_view<float> y, arena& mem, Attend attend) const {
    scratch_frame frame(mem);
    mem.align();
    inference c = carve_inference(in.x.rows, mem);
    const on_type on = call_of(in, mem);
    norm_.forward(on, w.attention_norm, in.x, c.normed, c.norm);
    attend(with(in, c.normed), c.h);
    add(on, in.x, c.h);
    norm_.forward(on, w.layer_norm, c.h, c.normed, c.norm);
    layer_.forward(w.layer, c.normed, y, c.layer, mem);
    add(on, c.h, y);
  }

  template <class Views, class Make>
  Views carve(arena& mem, Make make) const {
    const auto scoped = [&mem](const char* name, auto carve_part) {
      arena::scope in(mem, name);
      return carve_part();
    };
    return {scoped("attention_norm", [&] { return norm_.make_weights(d(), mem); }),
            scoped("attention", [&] { return make(attention_, mem); }),
            scoped("layer_norm", [&] { return norm_.make_weights(d(), mem); }),
            scoped("layer", [&] { return make(layer_, mem); })};
  }
  context carve_context(dim T, arena& mem) const {
    context c;
    c.attention_in = mem.matrix<float>("attention_in", T, d());
    c.h = mem.matrix<float>("h", T, d());
    c.layer_in = mem.matrix<float>("layer_in", T, d());
    c.attention_norm = norm_.make_context(T, mem);
    c.layer_norm = norm_.make_context(T, mem);
    c.attention = attention_.make_context(T, mem);
    c.layer = layer_.make_context(T, mem);
    return c;
  }
  inference carve_inference(dim T, arena& mem) const {
    inference c;
    c.normed = mem.matrix<float>("normed", T, d());
    c.h = mem.matrix<float>("h", T, d());
    c.layer = layer_.make_inference_context(T, mem);
    return c;
  }
  slopes carve_slopes(dim T, arena& mem) const noexcept {
    return {mem.matrix<float>("dh", T, d()), mem.matrix<float>("dnormed", T, d())};
  }

  template <class View>
  void check_call(const weights& w, const input& in, const View& y, const char* what, std::size_t scratch,
                  arena& mem) const {
    expect(in.x, in.x.rows, d(), "transformer_block: x", "T x d");
    expect(matrix_view<const float>(y), in.x.rows, d(), what, "T x d");
    norm_.check(w.attention_norm, d(), "transformer_block: attention_norm");
    norm_.check(w.layer_norm, d(), "transformer_block: layer_norm");
    in.sequences.check(in.x.rows, "transformer_block: sequences");
    scratch_frame frame(mem);
    (void)detail::opened(mem, scratch, "transformer_block: the arena", "scratch_bytes");
  }
  void check_context(const input& in, const context& ctx) const {
    expect(ctx.h, in.x.rows, d(), "transformer_block: ctx.h", "T x d");
    if (!ctx.h.data) throw shape_error("transformer_block: ctx has no memory");
  }

  rms_norm norm_{};
  Attention attention_;
  Layer layer_;
};

}  // namespace moe
