// SPDX-License-Identifier: Apache-2.0
/// A layer of attention: projections, gates, norm, rotation and convolution around attend, forward and backward.
#pragma once

#include "moe/attention/decode.hpp"
#include "moe/attention/features.hpp"
#include "moe/attention/layer_tensors.hpp"
#include "moe/attention/problem.hpp"
#include "moe/attention/select_blocks.hpp"
#include "moe/backend/host_attention_backward.hpp"
#include "moe/backend/host_gemm.hpp"
#include "moe/backend/host_moba.hpp"
#include "moe/composition.hpp"

namespace moe {

/// y = attention of the tokens x[T,d] over themselves, sequence by sequence, with the features `C`.
///
///   const moe::self_attention<gated, moe::cpu<>> layer(d, {.heads = 8, .kv_heads = 2, .d = 64, .dv = 64});
///
/// Constructed from the model's width, the heads and, in any order, those parts that have a configuration: the rotary, the
/// gates' activations, attention_mask, block_attention, the backend. Memory is the caller's, as of a layer.
/// saves    what backward reads: O(T), no scores; layer_tensors.hpp says the bytes, docs/numerics.md ("Of attention") their sum
/// errors   shape_error, before anything is written
template <class C, class B>
class self_attention {
  using conv = typename C::key_convolution;
  using projection = detail::projection_of<C>;
  using out_gate = typename C::output_gate;
  static constexpr bool gated = detail::is_gate<out_gate>, convolves = detail::convolves<C>, rounds = detail::rounds<C>;
  static_assert(!rounds || std::same_as<typename C::element, bf16>,
                "moe::self_attention: element is neither float nor bf16 [docs/attention.md]");
  static constexpr bool gates_queries = detail::is_gate<typename C::query_gate>, gates_keys = detail::is_gate<typename C::key_gate>,
                        gates_values = detail::is_gate<typename C::value_gate>, gates_layer = detail::is_gate<typename C::layer_gate>;

 public:
  using backend_type = B;
  using weights = attention_weights<C>;
  using gradients = attention_weights<C>;
  using table = typename C::rotary::table;

  /// Tokens and how they follow each other; `angles` of make_table.
  struct input {
    matrix_view<const float> x;  ///< [T,d]
    packed_sequences sequences{};
    table angles{};
  };
  using context = attention_context;

  template <class... Parts>
  explicit self_attention(dim d, attention_heads heads, const Parts&... given)
      : d_(d), heads_(heads), mask_(detail::pick<attention_mask>(given...)), backend_(detail::pick<B>(given...)),
        rotary_(detail::pick<typename C::rotary>(given...)), selection_(detail::pick<typename C::selection>(given...)),
        gate_(detail::pick<out_gate>(given...)), query_gate_(detail::pick<typename C::query_gate>(given...)),
        key_gate_(detail::pick<typename C::key_gate>(given...)), value_gate_(detail::pick<typename C::value_gate>(given...)),
        layer_gate_(detail::pick<typename C::layer_gate>(given...)) {
    if (d <= 0) throw shape_error("self_attention: d is " + std::to_string(d) + ", expected at least 1");
    heads_.check("self_attention");
    problem({}).check({0, 0}, "self_attention");
    rotary_.check(heads_.d);
    selection_.check(mask_);
  }

  dim d() const noexcept { return d_; }
  const attention_heads& heads() const noexcept { return heads_; }
  const B& backend() const noexcept { return backend_; }

  std::size_t weight_bytes() const noexcept {
    return counted([&](arena& mem) { (void)carve_weights(mem); });
  }
  std::size_t context_bytes(dim T) const noexcept {
    return counted([&](arena& mem) { (void)carve_context(T, true, mem); });
  }
  /// For forward and backward of T tokens in at most `sequences` sequences; with the context that inference takes.
  std::size_t scratch_bytes(dim T, dim sequences = 1) const noexcept {
    return counted([&](arena& mem) {
      (void)carve_context(T, false, mem);
      count_project(T, mem);
      count_forward(T, sequences, mem);
      count_backward(T, mem);
    });
  }
  std::vector<slot> catalogue() const {
    std::vector<slot> list;
    arena count(list);
    (void)carve_weights(count);
    return list;
  }
  weights make_weights(arena& mem) const {
    return carve_weights(detail::opened(mem, weight_bytes(), "self_attention::make_weights: the arena", "weight_bytes()"));
  }
  gradients make_gradients(arena& mem) const {
    return carve_weights(detail::opened(mem, weight_bytes(), "self_attention::make_gradients: the arena", "weight_bytes()"));
  }
  context make_context(dim T, arena& mem) const {
    return carve_context(T, true, detail::opened(mem, context_bytes(T), "self_attention::make_context: the arena", "context_bytes(T)"));
  }
  /// Angles of so many positions, for all layers alike.
  table make_table(dim positions, arena& mem) const noexcept { return rotary_.make_table(positions, heads_.d, mem); }

  /// y[T,d], overwritten. Takes scratch_bytes from `mem`, and gives them back.
  void forward(const weights& w, const input& in, matrix_view<float> y, context& ctx, arena& mem) const {
    check_forward(w, in, y, ctx, mem);
    scratch_frame frame(mem);
    mem.align();
    run_forward(call<B>{backend_, mem, {.tokens = ctx.tokens, .d = d_}}, w, in, y, ctx);
  }
  /// The same where no backward follows.
  void forward(const weights& w, const input& in, matrix_view<float> y, arena& mem) const {
    scratch_frame frame(mem);
    context ctx = carve_context(in.x.rows, false, detail::opened(mem, scratch_bytes(in.x.rows, in.sequences.count()),
                                                                 "self_attention::forward: the arena", "scratch_bytes(T)"));
    check_call(w, in, y, ctx, mem, "self_attention::forward: y", false);
    mem.align();
    run_forward(call<B>{backend_, mem, {.tokens = ctx.tokens, .d = d_}}, w, in, y, ctx);
  }
  /// Tokens of each sequence so far: keys and values as elements of T, as attention reads them; with a convolution, its last
  /// keys. Tokens are forgotten through the cache, so that both forget them.
  template <class T>
  struct cache {
    kv_cache<T> tokens;
    typename detail::key_tail<conv>::type tail;

    /// Forgets sequence s.
    void reset(dim s) { truncate(s, 0); }
    /// Forgets what sequence s has beyond its first n tokens.
    /// errors   shape_error, with a convolution also for 0 < n < length: the keys that it would read next are gone
    void truncate(dim s, dim n);
  };
  /// For so many sequences of at most `capacity` tokens, none of which has come.
  /// errors   make_cache and forward: shape_error for a mask that is not causal, since later tokens have not come yet
  template <class T>
  std::size_t cache_bytes(dim sequences, dim capacity) const noexcept {
    return counted([&](arena& mem) { (void)carve_cache<T>(sequences, capacity, mem); });
  }
  template <class T>
  cache<T> make_cache(dim sequences, dim capacity, arena& mem) const {
    check_causal("self_attention::make_cache: ");
    cache_shape(sequences, capacity).check();
    return carve_cache<T>(sequences, capacity,
                          detail::opened(mem, cache_bytes<T>(sequences, capacity), "self_attention::make_cache: the arena",
                                         "cache_bytes(S, capacity)"));
  }
  /// For T tokens that come to a cache.
  template <class T>
  std::size_t scratch_bytes(dim tokens, const cache<T>& past) const noexcept;
  /// The tokens of each sequence follow those in its cache, which they join. One token a sequence is a step of decoding:
  /// every byte of the cache is read once. in.sequences has a sequence, perhaps an empty one, for each of the cache's.
  /// errors   shape_error, also for a cache that would be too full, before anything is written
  template <class T>
  void forward(const weights& w, input in, matrix_view<float> y, cache<T>& past, arena& mem) const;

  /// dy -> dx (+=), dw (+=, or = with gradient_mode::replace). ctx as forward left it, with the same w and in. An empty view
  /// is a gradient nobody wants.
  void backward(const weights& w, const input& in, const context& ctx, matrix_view<const float> dy, matrix_view<float> dx,
                gradients& dw, arena& mem, gradient_mode mode = gradient_mode::add) const {
    check_backward(w, in, ctx, dy, dx, mem);
    scratch_frame frame(mem);
    mem.align();
    const call<B> on{backend_, mem, {.tokens = ctx.tokens, .d = d_}};
    if (mode == gradient_mode::replace) detail::clear(on, dw);
    run_backward(on, w, in, ctx, dy, dx, dw);
  }

  /// What forward and backward check before they write anything; a block asks all its parts first.
  void check_forward(const weights& w, const input& in, matrix_view<float> y, const context& ctx, arena& mem) const {
    check_call(w, in, y, ctx, mem, "self_attention::forward: y");
  }
  void check_backward(const weights& w, const input& in, const context& ctx, matrix_view<const float> dy, matrix_view<float> dx,
                      arena& mem) const {
    check_call(w, in, dy, ctx, mem, "self_attention::backward: dy");
    if (!ctx.training) throw shape_error("self_attention::backward: ctx is of inference, expected one of make_context");
    if (dx) expect(dx, ctx.tokens, d_, "self_attention::backward: dx", "T x d");
  }

 private:
  template <class F>
  static std::size_t counted(F carve) noexcept {
    arena count;
    carve(count);
    return padded(count);
  }
  attention_problem problem(const packed_sequences& s) const noexcept { return {heads_, mask_, s, s}; }
  weights carve_weights(arena& mem) const noexcept { return detail::carve_attention_weights<C>(heads_, d_, conv{}, mem); }

  kv_cache_shape cache_shape(dim sequences, dim capacity) const noexcept {
    if constexpr (C::selection::blocks)
      if (!selection_.dense) return {heads_, sequences, capacity, selection_.block};
    return {heads_, sequences, capacity};
  }
  template <class T>
  cache<T> carve_cache(dim sequences, dim capacity, arena& mem) const noexcept {
    cache<T> c{kv_cache<T>::make(cache_shape(sequences, capacity), mem), {}};
    if constexpr (convolves) {
      c.tail = conv{}.template make_tail<float>(sequences, heads_.key_cols(), mem);
      for (dim s = 0; s < sequences && c.tail.k; ++s) conv{}.reset(c.tail, s);
    }
    return c;
  }
  /// For the keys and values of a cache of T as rows; bytes become floats, and everything bf16 where attention reads that.
  template <class T>
  using row_of = std::conditional_t<rounds, bf16, std::conditional_t<kv_cache<T>::scaled, float, T>>;
  template <class T, class Row = row_of<T>>
  std::pair<matrix_view<Row>, matrix_view<Row>> carve_rows(dim tokens, arena& mem) const noexcept {
    const auto k = mem.matrix<Row>("k", tokens, heads_.key_cols());
    return {k, mem.matrix<Row>("v", tokens, heads_.value_cols())};
  }
  auto key_rows(const context& c) const noexcept {
    if constexpr (rounds) return c.k_half;
    else return convolves ? c.k : rotated_keys(c);
  }
  auto value_rows(const context& c) const noexcept {
    if constexpr (rounds) return c.v_half;
    else return gates_values ? c.v : c.v_raw;
  }
  template <class T>
  void decode_tokens(const call<B>& on, const context& c, cache<T>& past) const;
  template <class T>
  void extend_tokens(const call<B>& on, const input& in, const context& c, cache<T>& past) const noexcept;

  context carve_context(dim T, bool training, arena& mem) const noexcept {
    return detail::carve_attention_context<C>(heads_, d_, T, training, selection_.blocks_read(), mem);
  }

  // What attention reads, and the gradients of it, wherever the features put them.
  auto queries(const context& c) const noexcept {
    if constexpr (rounds) return split_heads(c.q_half, heads_.heads);
    else return rotated_queries(c);
  }
  auto keys(const context& c) const noexcept { return split_heads(key_rows(c), heads_.kv_heads); }
  auto values(const context& c) const noexcept { return split_heads(value_rows(c), heads_.kv_heads); }
  auto rotated_queries(const context& c) const noexcept {
    if constexpr (C::normalises_heads) return split_heads(c.q, heads_.heads);
    else return gated_queries(c);
  }
  auto gated_queries(const context& c) const noexcept {
    if constexpr (gates_queries) return split_heads(c.q_gated, heads_.heads);
    else return projection::queries(c.fused, heads_);
  }
  matrix_view<float> gated_keys(const context& c) const noexcept { return gates_keys ? c.k_gated : c.k_raw; }
  matrix_view<float> rotated_keys(const context& c) const noexcept { return C::normalises_heads ? c.k_normed : gated_keys(c); }
  auto logits(const matrix_view<float>& fused, const matrix_view<float>& alone) const noexcept {
    return projection::logits(detail::fuses_logits<C> ? fused : alone, heads_);
  }

  void run_forward(const call<B>& on, const weights& w, const input& in, matrix_view<float> y, context& c) const noexcept {
    project(on, w, in, c);
    {
      scratch_frame frame(on.scratch);
      const attention_problem p = problem(in.sequences);
      const auto means = [&](const key_blocks& blocks) noexcept { prepare_key_blocks(on, p, keys(c), blocks); };
      attend_tokens(on, p, c, bind_gate(on, c), 0, queries(c), keys(c), values(c), means);
    }
    project_back(on, w, c, y);
  }
  /// o of the tokens from `first` on, gated, into their rows; means(blocks) fills in the blocks' centroids.
  template <class Gates, class Q, class K, class V, class Means>
  void attend_tokens(const call<B>& on, const attention_problem& p, const context& c, const Gates& gates, dim first,
                     const Q& q, const K& k, const V& v, [[maybe_unused]] Means means) const noexcept {
    const auto finish = [&](dim t, dim a, float* o, float lse) noexcept {
      const auto bytes = static_cast<std::size_t>(heads_.dv) * sizeof(float);
      t += first;
      if (c.lse) c.lse(t, a) = lse;
      if constexpr (gated) {
        if (c.o) std::memcpy(c.o.row(t) + a * heads_.dv, o, bytes);
        gate_.apply(typename B::arch{}, gates[a].row(t), o, heads_.dv);
      }
      std::memcpy(c.gated.row(t) + a * heads_.dv, o, bytes);
    };
    const auto blocks = [&] { return carve_blocks(c, p.sequences(), k[0].rows, on.scratch); };
    select(blocks, [&](const auto& selection) {
      if constexpr (requires { selection.centroids; }) means(selection);
      attend(on, p, q, k, v, selection, finish);
    });
  }
  void project_back(const call<B>& on, const weights& w, const context& c, matrix_view<float> y) const noexcept {
    gemm_nt(on, c.gated, w.o, matrix_view<const float>{}, gates_layer ? c.y : y);
    if constexpr (gates_layer) layer_gate_.forward(on, split_heads(c.layer_logits, 1), 1, split_heads(c.y, 1), split_heads(y, 1));
  }
  /// Logits as the gate's epilogue wants them; their mean, if they have one, stays in the scratch.
  auto bind_gate(const call<B>& on, const context& c) const noexcept {
    if constexpr (gated)
      return gate_.bind(on, logits(c.fused, c.logits), heads_.heads, gate_.make_scratch(c.tokens, heads_.dv, on.scratch));
    else
      return matrix_stack<const float>{};
  }
  /// f(selection) of the blocks, `make()`, or of all keys.
  template <class Make, class F>
  void select([[maybe_unused]] Make make, F f) const noexcept {
    if constexpr (C::selection::blocks)
      if (!selection_.dense) return f(make());
    f(every_key{});
  }
  /// Blocks as forward chose them; backward reads no more of them.
  key_blocks chosen_blocks(const context& c) const noexcept {
    key_blocks blocks;
    if constexpr (C::selection::blocks) {
      blocks.block = selection_.block;
      blocks.k = selection_.k;
    }
    blocks.chosen = c.chosen;
    return blocks;
  }
  /// The same with memory to choose from so many keys.
  key_blocks carve_blocks(const context& c, dim sequences, dim keys, arena& mem) const noexcept {
    const key_blocks wanted = chosen_blocks(c);
    key_blocks blocks = carve_key_blocks(heads_, sequences, keys, wanted.block, wanted.k, mem);
    blocks.chosen = c.chosen;
    return blocks;
  }
  /// Queries, keys and values as attention reads them; `tail` of a cache, if keys are convolved.
  template <class... Tail>
  void project(const call<B>& on, const weights& w, const input& in, const context& kept,
               const Tail&... tail) const noexcept {
    scratch_frame frame(on.scratch);
    context c = kept;
    detail::carve_rows_on_the_way<C>(heads_, false, c, on.scratch);
    const auto times = [&](matrix_view<float> m, matrix_view<float> bias, matrix_view<float> to) {
      if (to) gemm_nt(on, in.x, m, matrix_view<const float>(bias), to);
    };
    times(w.q, w.q_bias, c.fused);
    times(w.k, w.k_bias, c.k_raw);
    times(w.v, w.v_bias, c.v_raw);
    times(w.output_gate, {}, c.logits);
    times(w.query_gate, {}, c.query_logits);
    times(w.key_gate, {}, c.key_logits);
    times(w.value_gate, {}, c.value_logits);
    times(w.layer_gate, {}, c.layer_logits);
    const dim h = heads_.heads, h_kv = heads_.kv_heads;
    if constexpr (gates_queries)
      query_gate_.forward(on, split_heads(c.query_logits, h), h, projection::queries(c.fused, heads_), gated_queries(c));
    if constexpr (gates_keys)
      key_gate_.forward(on, split_heads(c.key_logits, h_kv), h_kv, split_heads(c.k_raw, h_kv), split_heads(c.k_gated, h_kv));
    if constexpr (gates_values)
      value_gate_.forward(on, split_heads(c.value_logits, h_kv), h_kv, split_heads(c.v_raw, h_kv), values(c));
    if constexpr (C::normalises_heads) {
      rms_norm{}.forward(on, w.q_norm, gated_queries(c), h, rotated_queries(c), c.q_norm);
      rms_norm{}.forward(on, w.k_norm, split_heads(gated_keys(c), h_kv), h_kv, split_heads(c.k_normed, h_kv), c.k_norm);
    }
    rotary_.forward(on, in.angles, rotated_queries(c), h, in.sequences);
    rotary_.forward(on, in.angles, split_heads(rotated_keys(c), h_kv), h_kv, in.sequences);
    if constexpr (convolves)
      conv{}.forward(on, w.convolution, matrix_view<const float>(rotated_keys(c)), in.sequences, key_rows(c), tail...);
    if constexpr (rounds) {
      round_heads(on, rotated_queries(c), queries(c), h);
      if constexpr (!convolves) round_heads(on, split_heads(rotated_keys(c), h_kv), keys(c), h_kv);
      if constexpr (!gates_values) round_heads(on, split_heads(c.v_raw, h_kv), values(c), h_kv);
    }
  }

  void run_backward(const call<B>& on, const weights& w, const input& in, const context& c, matrix_view<const float> dy,
                    matrix_view<float> dx, gradients& dw) const noexcept {
    const detail::attention_slopes s = detail::carve_attention_slopes<C>(heads_, d_, c.tokens, on.scratch);
    if constexpr (gates_layer) {
      layer_gate_.backward(on, split_heads(c.layer_logits, 1), 1, split_heads(c.y, 1), split_heads(dy, 1), split_heads(s.dy, 1),
                           split_heads(s.dlayer, 1));
      dy = s.dy;
    }
    if (dw.o) gemm_tn(on, dy, c.gated, dw.o);
    fill(on, s.dgated, 0.f);
    gemm_nn(on, dy, w.o, s.dgated);
    attention_backward(on, in, c, s);
    projections_backward(on, w, in, c, s, dw);
    const auto times = [&](matrix_view<float> grad, matrix_view<float> m, matrix_view<float> dm, matrix_view<float> dbias) {
      if (!grad) return;
      const idx offsets[] = {0, static_cast<idx>(c.tokens)};
      if (dm) gemm_tn(on, grad, in.x, dm);
      if (dbias) sum_rows(on, bank_rows{.offsets = offsets}, gathered<float>{grad}, matrix_stack<float>{dbias, 0});
      if (dx) gemm_nn(on, grad, m, dx);
    };
    times(s.dfused, w.q, dw.q, dw.q_bias);
    times(convolves ? s.dk_raw : s.dk, w.k, dw.k, dw.k_bias);
    times(s.dv, w.v, dw.v, dw.v_bias);
    times(s.dlogits, w.output_gate, dw.output_gate, {});
    times(s.dquery, w.query_gate, dw.query_gate, {});
    times(s.dkey, w.key_gate, dw.key_gate, {});
    times(s.dvalue, w.value_gate, dw.value_gate, {});
    times(s.dlayer, w.layer_gate, dw.layer_gate, {});
  }
  /// Through the gate and attention, to the gradients of its queries, keys and values. Where the gate scales, delta comes
  /// from the gated tensors, unless attention rounds what comes back from the gate.
  void attention_backward(const call<B>& on, const input& in, const context& c, const detail::attention_slopes& s) const noexcept {
    const dim h = heads_.heads;
    const attention_problem p = problem(in.sequences);
    const bool rounded = rounds_gradients(on.backend, queries(c), keys(c), values(c));
    const auto delta = [&](matrix_view<float> o) {
      attention_delta(on, heads_, split_heads(s.dgated, h), split_heads(o, h), s.delta, rounded);
    };
    if (!gated || !rounded) delta(c.gated);
    if constexpr (gated) {
      gate_.backward(on, logits(c.fused, c.logits), h, split_heads(c.o, h), split_heads(s.dgated, h), split_heads(s.dgated, h),
                     logits(s.dfused, s.dlogits));
      if (!out_gate::scales || rounded) delta(c.o);
    }
    select([&] { return chosen_blocks(c); }, [&](const auto& selection) {
      attend_backward(on, p, queries(c), keys(c), values(c), selection, split_heads(s.dgated, h), c.lse, s.delta,
                      projection::queries(s.dfused, heads_), split_heads(s.dk, heads_.kv_heads), split_heads(s.dv, heads_.kv_heads));
    });
  }
  /// From there to what the projections gave, in place.
  void projections_backward(const call<B>& on, const weights& w, const input& in, const context& c, const detail::attention_slopes& s,
                            gradients& dw) const noexcept {
    const dim h = heads_.heads, h_kv = heads_.kv_heads;
    const auto dq = projection::queries(s.dfused, heads_);
    matrix_view<float> dk = s.dk;
    if constexpr (convolves) {
      fill(on, s.dk_raw, 0.f);
      conv{}.backward(on, w.convolution, matrix_view<const float>(rotated_keys(c)), in.sequences, s.dk, s.dk_raw, dw.convolution);
      dk = s.dk_raw;
    }
    const auto dks = split_heads(dk, h_kv), dvs = split_heads(s.dv, h_kv);
    rotary_.backward(on, in.angles, dq, h, in.sequences);
    rotary_.backward(on, in.angles, dks, h_kv, in.sequences);
    if constexpr (C::normalises_heads) {
      rms_norm{}.backward_in_place(on, w.q_norm, gated_queries(c), h, c.q_norm, dq, dw.q_norm);
      rms_norm{}.backward_in_place(on, w.k_norm, split_heads(gated_keys(c), h_kv), h_kv, c.k_norm, dks, dw.k_norm);
    }
    if constexpr (gates_queries)
      query_gate_.backward(on, split_heads(c.query_logits, h), h, projection::queries(c.fused, heads_), dq, dq,
                           split_heads(s.dquery, h));
    if constexpr (gates_keys)
      key_gate_.backward(on, split_heads(c.key_logits, h_kv), h_kv, split_heads(c.k_raw, h_kv), dks, dks, split_heads(s.dkey, h_kv));
    if constexpr (gates_values)
      value_gate_.backward(on, split_heads(c.value_logits, h_kv), h_kv, split_heads(c.v_raw, h_kv), dvs, dvs,
                           split_heads(s.dvalue, h_kv));
  }

  void count_project(dim T, arena& mem) const noexcept {
    scratch_frame frame(mem);
    context c;
    c.tokens = T;
    detail::carve_rows_on_the_way<C>(heads_, false, c, mem);
    count_means(T, mem);
  }
  /// The most that T tokens in so many sequences take. One sequence is cut into the most parts in backward.
  void count_forward(dim T, dim sequences, arena& mem) const noexcept {
    scratch_frame frame(mem);
    count_means(T, mem);
    select([&] { return carve_blocks({}, sequences, T, mem); }, [&](const auto& selection) {
      if constexpr (requires { selection.centroids; }) {
        scratch_frame of_means(mem);
        (void)count_prepare_key_blocks(backend_, heads_, mem);
      }
      count_attend(backend_, problem({}), {T, T}, selection, mem);
    });
  }
  void count_backward(dim T, arena& mem) const noexcept {
    (void)detail::carve_attention_slopes<C>(heads_, d_, T, mem);
    select([&] { return chosen_blocks({}); }, [&](const auto& selection) {
      scratch_frame frame(mem);
      count_attend_backward(backend_, problem({}), {T, T}, selection, mem);
    });
    scratch_frame frame(mem);
    count_means(T, mem);
    (void)rms_norm{}.make_backward_scratch(T, heads_.d, mem);
    if constexpr (convolves) (void)conv{}.make_backward_scratch(T, heads_.key_cols(), mem);
  }
  /// Of logits that heads share, in the output gate and in the others, one after the other.
  void count_means(dim T, arena& mem) const noexcept {
    const dim widest = heads_.d > heads_.dv ? heads_.d : heads_.dv;
    (void)mem.matrix<float>("mean", T, heads_.dv);
    (void)mem.matrix<float>("mean", T, widest > d_ ? widest : d_);
  }

  void check_causal(const char* what) const {
    if (!mask_.causal) throw shape_error(std::string(what) + "mask.causal is false, expected true for a layer with a cache");
  }
  template <class View>
  void check_call(const weights& w, const input& in, const View& y, const context& c, arena& mem, const char* what,
                  bool with_scratch = true) const {
    expect(in.x, c.tokens, d_, "self_attention: x", "T x d");
    expect(matrix_view<const float>(y), c.tokens, d_, what, "T x d");
    detail::check_attention_weights<C>(w, heads_, d_);
    problem(in.sequences).check({c.tokens, c.tokens}, "self_attention");
    if (!in.sequences.past.empty())
      throw shape_error("self_attention: sequences.past is given, expected none: a cache knows what is past");
    rotary_.check(in.angles, in.sequences, c.tokens);
    if (c.gated.cols != heads_.output_cols() || !c.gated.data)
      throw shape_error("self_attention: ctx was made by a layer of another shape or has no memory");
    scratch_frame frame(mem);
    if (with_scratch)
      (void)detail::opened(mem, scratch_bytes(c.tokens, in.sequences.count()), "self_attention: the arena", "scratch_bytes(T, S)");
  }

  dim d_;
  attention_heads heads_;
  attention_mask mask_;
  [[no_unique_address]] B backend_;
  [[no_unique_address]] typename C::rotary rotary_;
  [[no_unique_address]] typename C::selection selection_;
  [[no_unique_address]] out_gate gate_;
  typename C::query_gate query_gate_;
  typename C::key_gate key_gate_;
  typename C::value_gate value_gate_;
  typename C::layer_gate layer_gate_;
};

}  // namespace moe
