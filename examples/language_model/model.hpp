// SPDX-License-Identifier: Apache-2.0
/// The language model: bytes in, the next byte out.
///
///   h = sum of tables over the last bytes          window_embedding.hpp
///   h = h + block_l(norm_l(h))   for each l        Block: a moe::layer
///   logits = head norm(h)
///
/// Every byte is predicted from the `window` bytes before it alone, so tokens are independent of each other.
#pragma once

#include <vector>

#include "cross_entropy.hpp"
#include "moe/layer.hpp"
#include "moe/norm/rms_norm.hpp"
#include "window_embedding.hpp"

namespace demo {

template <class Block>
class language_model {
  using backend = typename Block::backend_type;
  using on_type = moe::call<backend>;

 public:
  static constexpr moe::dim symbols = 256;

  /// Weights and gradients alike; `part` is Block::weights or Block::gradients.
  template <class Part>
  struct parameters {
    window_embedding::weights embedding;
    std::vector<moe::rms_norm::weights> norms;  ///< [blocks+1]
    std::vector<Part> blocks;
    moe::matrix_view<float> head;  ///< [256,d]
  };
  using weights = parameters<typename Block::weights>;
  using gradients = parameters<typename Block::gradients>;

  struct context {
    windows in;
    window_embedding::context embedding;
    std::vector<moe::matrix_view<float>> h, normed;  ///< [blocks+1] of [T,d]
    std::vector<moe::rms_norm::context> norms;
    std::vector<typename Block::context> blocks;
    moe::matrix_view<float> logits;  ///< [T,256]; backward turns them into their gradient
    std::span<float> bits;           ///< [T] loss of each token
  };

  language_model(moe::dim blocks, moe::dim window, const Block& block)
      : count_(static_cast<std::size_t>(blocks)), embedding_{window}, block_(block) {}

  const Block& block() const noexcept { return block_; }
  const window_embedding& embedding() const noexcept { return embedding_; }

  weights make_weights(moe::arena& mem) const {
    return carve<typename Block::weights>(mem, [&] { return block_.make_weights(mem); });
  }
  gradients make_gradients(moe::arena& mem) const {
    return carve<typename Block::gradients>(mem, [&] { return block_.make_gradients(mem); });
  }
  context make_context(const windows& in, moe::arena& mem) const {
    const moe::dim T = in.tokens(), d = width();
    context c;
    c.in = in;
    c.embedding = embedding_.make_context(T, mem);
    for (std::size_t l = 0; l <= count_; ++l) {
      c.h.push_back(mem.matrix<float>("h", T, d));
      c.normed.push_back(mem.matrix<float>("normed", T, d));
      c.norms.push_back(norm_.make_context(T, mem));
      if (l < count_) c.blocks.push_back(block_.make_context(T, mem));
    }
    c.logits = mem.matrix<float>("logits", T, symbols);
    c.bits = mem.vector<float>("bits", T);
    return c;
  }

  /// Sizes of the flat buffer of weights, and of the memory for a context of T tokens with what forward and backward take.
  std::size_t weight_bytes() const { return bytes_of([&](moe::arena& mem) { (void)make_weights(mem); }); }
  std::size_t work_bytes(moe::dim T) const {
    const std::vector<moe::idx> none(static_cast<std::size_t>(T));
    return bytes_of([&](moe::arena& mem) {
             (void)make_context({{}, none}, mem);
             (void)mem.matrix<float>("dh", T, width()), (void)mem.matrix<float>("dn", T, width());
             (void)norm_.make_backward_scratch(T, width(), mem);
           }) +
           block_.scratch_bytes(T);
  }
  std::vector<moe::slot> catalogue() const {
    std::vector<moe::slot> list;
    moe::arena count(list);
    (void)make_weights(count);
    return list;
  }

  /// Fills ctx; returns the mean loss in bits per byte.
  double forward(const weights& w, context& ctx, moe::arena& mem) const {
    const on_type on = call(ctx, mem);
    embedding_.forward(on, w.embedding, ctx.in, ctx.h[0], ctx.embedding);
    for (std::size_t l = 0; l < count_; ++l) {
      norm_.forward(on, w.norms[l], ctx.h[l], ctx.normed[l], ctx.norms[l]);
      block_.forward(w.blocks[l], ctx.normed[l], ctx.h[l + 1], ctx.blocks[l], mem);
      add(on, ctx.h[l], ctx.h[l + 1]);
    }
    norm_.forward(on, w.norms[count_], ctx.h[count_], ctx.normed[count_], ctx.norms[count_]);
    fill(on, ctx.logits, 0.f);
    gemm_nt(on, ctx.normed[count_], w.head, ctx.logits);
    return cross_entropy(on, ctx.logits, ctx.in, ctx.bits);
  }

  /// dw += the gradient of the mean loss, in nats.
  void backward(const weights& w, context& ctx, gradients& dw, moe::arena& mem) const {
    moe::scratch_frame frame(mem);
    const on_type on = call(ctx, mem);
    const auto dh = mem.matrix<float>("dh", ctx.in.tokens(), width()), dn = mem.matrix<float>("dn", ctx.in.tokens(), width());
    cross_entropy_backward(on, ctx.logits, ctx.in);
    fill(on, dh, 0.f);
    fill(on, dn, 0.f);
    gemm_nn(on, ctx.logits, w.head, dn);
    gemm_tn(on, ctx.logits, ctx.normed[count_], dw.head);
    norm_.backward(on, w.norms[count_], ctx.h[count_], ctx.norms[count_], dn, dh, dw.norms[count_]);
    for (std::size_t l = count_; l-- > 0;) {
      fill(on, dn, 0.f);
      block_.backward(w.blocks[l], ctx.normed[l], ctx.blocks[l], dh, dn, dw.blocks[l], mem);
      norm_.backward(on, w.norms[l], ctx.h[l], ctx.norms[l], dn, dh, dw.norms[l]);
    }
    embedding_.backward(on, ctx.in, ctx.embedding, dh, dw.embedding);
  }

 private:
  moe::dim width() const noexcept { return block_.sizes().d; }
  on_type call(const context& ctx, moe::arena& mem) const noexcept {
    moe::shape s = block_.sizes();
    s.tokens = ctx.in.tokens();
    return {block_.backend(), mem, s};
  }
  template <class Part, class CarveBlock>
  parameters<Part> carve(moe::arena& mem, CarveBlock carve_block) const {
    parameters<Part> p;
    {
      moe::arena::scope in(mem, "embedding");
      p.embedding = embedding_.make_weights(width(), mem);
    }
    for (std::size_t l = 0; l <= count_; ++l) {
      moe::arena::scope in(mem, (l < count_ ? "blocks." + std::to_string(l) : std::string("final")).c_str());
      p.norms.push_back(norm_.make_weights(width(), mem));
      if (l < count_) p.blocks.push_back(carve_block());
    }
    p.head = mem.matrix<float>("head", symbols, width());
    return p;
  }
  template <class Carve>
  static std::size_t bytes_of(Carve carve) {
    moe::arena count;
    carve(count);
    count.align();
    return count.peak();
  }
  static void add(const on_type& on, moe::matrix_view<const float> x, moe::matrix_view<float> y) noexcept {
    for_each_token(on, y.rows, [&](moe::dim t) { axpy(typename backend::arch{}, 1.f, x.row(t), y.row(t), y.cols); });
  }

  std::size_t count_;
  window_embedding embedding_;
  moe::rms_norm norm_{};
  Block block_;
};

}  // namespace demo
