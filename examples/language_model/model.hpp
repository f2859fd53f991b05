// SPDX-License-Identifier: Apache-2.0
/// The language model: bytes in, the next byte out.
///
///   h = sum of tables over the last bytes          window_embedding.hpp
///   h = block_l(h)   for each l                    Block: a moe::transformer_block
///   logits = head norm(h)
///
/// Every byte is predicted from the bytes before it in its sequence, the first of them from the few before the sequence too.
#pragma once

#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "cross_entropy.hpp"
#include "moe/transformer/block.hpp"
#include "window_embedding.hpp"

namespace demo {

template <class Block>
class language_model {
  using backend = typename Block::backend_type;
  using on_type = moe::call<backend>;

 public:
  static constexpr moe::dim symbols = 256;
  using table = typename Block::attention_type::table;
  using cache = typename Block::template cache<float>;

  /// Weights and gradients alike; `part` is Block::weights or Block::gradients.
  template <class Part>
  struct parameters {
    window_embedding::weights embedding;
    std::vector<Part> blocks;
    moe::rms_norm::weights norm;
    moe::matrix_view<float> head;  ///< [256,d]
  };
  using weights = parameters<typename Block::weights>;
  using gradients = parameters<typename Block::gradients>;

  struct context {
    windows in;
    table angles;
    std::vector<moe::matrix_view<float>> h;  ///< [blocks+1] of [T,d]: the residual stream
    std::vector<typename Block::context> blocks;
    moe::matrix_view<float> normed;
    moe::rms_norm::context norm;
    moe::matrix_view<float> logits;  ///< [T,256]; backward turns them into their gradient
    std::span<float> bits;           ///< [T] loss of each token
  };

  language_model(moe::dim blocks, const window_embedding& embedding, const Block& block)
      : count_(static_cast<std::size_t>(blocks)), embedding_(embedding), block_(block) {}

  const Block& block() const noexcept { return block_; }
  const window_embedding& embedding() const noexcept { return embedding_; }

  weights make_weights(moe::arena& mem) const {
    return carve<typename Block::weights>(mem, [&] { return block_.make_weights(mem); });
  }
  gradients make_gradients(moe::arena& mem) const {
    return carve<typename Block::gradients>(mem, [&] { return block_.make_gradients(mem); });
  }
  context make_context(const windows& in, const table& angles, moe::arena& mem) const {
    const moe::dim T = in.tokens(), d = block_.d();
    context c;
    c.in = in;
    c.angles = angles;
    for (std::size_t l = 0; l <= count_; ++l) {
      c.h.push_back(mem.matrix<float>("h", T, d));
      if (l < count_) c.blocks.push_back(block_.make_context(T, mem));
    }
    c.normed = mem.matrix<float>("normed", T, d);
    c.norm = norm_.make_context(T, mem);
    c.logits = mem.matrix<float>("logits", T, symbols);
    c.bits = mem.vector<float>("bits", T);
    return c;
  }

  /// Sizes of the flat buffer of weights, and of the memory for a context of T tokens with what forward and backward take.
  std::size_t weight_bytes() const { return bytes_of([&](moe::arena& mem) { (void)make_weights(mem); }); }
  std::size_t work_bytes(moe::dim T, moe::dim sequences) const {
    const std::vector<moe::idx> none(static_cast<std::size_t>(T));
    return bytes_of([&](moe::arena& mem) {
             (void)make_context({{}, none, {}}, {}, mem);
             (void)make_slopes(T, mem);
             (void)norm_.make_backward_scratch(T, block_.d(), mem);
           }) +
           block_.scratch_bytes(T, sequences);
  }
  std::vector<moe::slot> catalogue() const {
    std::vector<moe::slot> list;
    moe::arena count(list);
    (void)make_weights(count);
    return list;
  }

  /// Fills ctx; returns the mean loss in bits per byte.
  double forward(const weights& w, context& ctx, moe::arena& mem) const {
    const on_type on = call(ctx.in.tokens(), mem);
    embedding_.forward(on, w.embedding, ctx.in, ctx.h[0]);
    for (std::size_t l = 0; l < count_; ++l) block_.forward(w.blocks[l], input(ctx, l), ctx.h[l + 1], ctx.blocks[l], mem);
    norm_.forward(on, w.norm, ctx.h[count_], ctx.normed, ctx.norm);
    gemm_nt(on, ctx.normed, w.head, moe::matrix_view<const float>{}, ctx.logits);
    return cross_entropy(on, ctx.logits, ctx.in, ctx.bits);
  }

  /// The logits of the next byte, after tokens that follow those in the caches, one of which each block has.
  void forward(const weights& w, const windows& in, const table& angles, std::span<cache> past, std::span<float> logits,
               moe::arena& mem) const {
    moe::scratch_frame frame(mem);
    auto [h, next] = make_slopes(in.tokens(), mem);
    const on_type on = call(in.tokens(), mem);
    embedding_.forward(on, w.embedding, in, h);
    for (std::size_t l = 0; l < count_; ++l) {
      block_.forward(w.blocks[l], {h, {in.offsets, {}}, angles}, next, past[l], mem);
      std::swap(h, next);
    }
    const auto last = h.slice(in.tokens() - 1, 1), normed = next.slice(0, 1);
    moe::rms_norm::context none;
    norm_.forward(on, w.norm, last, normed, none);
    gemm_nt(on, normed, w.head, moe::matrix_view<const float>{}, moe::matrix_view<float>{logits.data(), 1, symbols});
  }
  std::vector<cache> make_caches(moe::dim capacity, moe::arena& mem) const {
    std::vector<cache> out;
    for (std::size_t l = 0; l < count_; ++l) out.push_back(block_.template make_cache<float>(1, capacity, mem));
    return out;
  }
  std::size_t cache_bytes(moe::dim capacity) const {
    return count_ * block_.template cache_bytes<float>(1, capacity);
  }
  /// For the memory of T tokens that come to caches.
  std::size_t work_bytes(moe::dim T, const cache& past) const {
    return bytes_of([&](moe::arena& mem) { (void)make_slopes(T, mem); }) + block_.scratch_bytes(T, past);
  }

  /// dw = the gradient of the mean loss, in nats.
  void backward(const weights& w, context& ctx, gradients& dw, moe::arena& mem) const {
    moe::scratch_frame frame(mem);
    const on_type on = call(ctx.in.tokens(), mem);
    auto [dh, below] = make_slopes(ctx.in.tokens(), mem);
    cross_entropy_backward(on, ctx.logits, ctx.in);
    moe::for_each_tensor(std::tie(dw.embedding, dw.norm, dw.head), [&](auto m) { fill(on, m, 0.f); });
    fill(on, dh, 0.f);
    fill(on, below, 0.f);
    gemm_nn(on, ctx.logits, w.head, below);
    gemm_tn(on, ctx.logits, ctx.normed, dw.head);
    norm_.backward(on, w.norm, ctx.h[count_], ctx.norm, below, dh, dw.norm);
    for (std::size_t l = count_; l-- > 0;) {
      fill(on, below, 0.f);
      block_.backward(w.blocks[l], input(ctx, l), ctx.blocks[l], dh, below, dw.blocks[l], mem, moe::gradient_mode::replace);
      std::swap(dh, below);
    }
    embedding_.backward(on, ctx.in, dh, dw.embedding);
  }

 private:
  struct slopes {
    moe::matrix_view<float> dh, below;
  };
  slopes make_slopes(moe::dim T, moe::arena& mem) const noexcept {
    return {mem.matrix<float>("dh", T, block_.d()), mem.matrix<float>("below", T, block_.d())};
  }
  typename Block::input input(const context& c, std::size_t l) const noexcept {
    return {c.h[l], {c.in.offsets, {}}, c.angles};
  }
  on_type call(moe::dim tokens, moe::arena& mem) const noexcept {
    moe::shape s = block_.sizes();
    s.tokens = tokens;
    return {block_.backend(), mem, s};
  }
  template <class Part, class CarveBlock>
  parameters<Part> carve(moe::arena& mem, CarveBlock carve_block) const {
    parameters<Part> p;
    {
      moe::arena::scope in(mem, "embedding");
      p.embedding = embedding_.make_weights(block_.d(), mem);
    }
    for (std::size_t l = 0; l < count_; ++l) {
      moe::arena::scope in(mem, ("blocks." + std::to_string(l)).c_str());
      p.blocks.push_back(carve_block());
    }
    {
      moe::arena::scope in(mem, "norm");
      p.norm = norm_.make_weights(block_.d(), mem);
    }
    p.head = mem.matrix<float>("head", symbols, block_.d());
    return p;
  }
  template <class Carve>
  static std::size_t bytes_of(Carve carve) {
    moe::arena count;
    carve(count);
    return padded(count);
  }

  std::size_t count_;
  window_embedding embedding_;
  moe::rms_norm norm_{};
  Block block_;
};

}  // namespace demo
