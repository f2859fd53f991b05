// SPDX-License-Identifier: Apache-2.0
#include <doctest/doctest.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <string>
#include <vector>

#include "moe/moe.hpp"
#include "moe/transformer/block.hpp"
#include "support/testing.hpp"

namespace {

using moe::dim;
using moe::idx;
using backend = moe::scalar<>;

struct gated : moe::attention_features {
  using rotary = moe::rotary<>;
  using output_gate = moe::output_gate<moe::headwise>;
  static constexpr bool normalises_heads = true;
};
struct blocks_of_keys : gated {
  using selection = moe::block_attention;
  using key_convolution = moe::key_convolution<3>;
};
struct rounded : gated {
  using element = moe::bf16;
};
using routed = moe::layer<moe::linear_gate, moe::top_k<2>, moe::ffn_expert, moe::weighted_sum, backend>;
using dense = moe::dense<moe::ffn_expert, backend>;
using with_shared = moe::sum<routed, dense>;

constexpr dim d = 8, tokens = 11;
constexpr moe::attention_heads heads{.heads = 4, .kv_heads = 2, .d = 4, .dv = 4};
constexpr moe::shape shape{.d = d, .f = 6, .experts = 3};
constexpr std::array<idx, 4> offsets{0, 4, 5, 11};

template <class C, class... Parts>
moe::self_attention<C, backend> attention(const Parts&... parts) {
  return moe::self_attention<C, backend>(d, heads, parts...);
}

/// A block over sequences that are packed as above, with the input of a plain layer: what the gradient check reads.
template <class Block>
struct packed : Block {
  using input = moe::matrix_view<const float>;
  moe::buffer memory{1 << 14};
  moe::arena angles{memory.bytes()};
  typename Block::input rest{{}, {offsets, {}}, Block::make_table(tokens, angles)};

  explicit packed(const Block& block) : Block(block) {}
  packed(const packed& other) : Block(other) {}

  typename Block::input with(const input& x) const {
    auto in = rest;
    in.x = x;
    return in;
  }
  std::size_t scratch_bytes(dim T) const { return Block::scratch_bytes(T, 3); }
  using Block::make_context;
  typename Block::context make_inference_context(dim T, moe::arena& mem) const { return make_context(T, mem); }
  void forward(const typename Block::weights& w, const input& x, moe::matrix_view<float> y, typename Block::context& ctx,
               moe::arena& mem) const {
    Block::forward(w, with(x), y, ctx, mem);
  }
  void backward(const typename Block::weights& w, const input& x, const typename Block::context& ctx,
                moe::matrix_view<const float> dy, moe::matrix_view<float> dx, typename Block::gradients& dw, moe::arena& mem,
                moe::gradient_mode mode = moe::gradient_mode::add) const {
    Block::backward(w, with(x), ctx, dy, dx, dw, mem, mode);
  }
};

template <class Attention, class Layer>
void check_gradients(const Attention& attention, const Layer& layer, std::uint64_t seed) {
  const packed net{moe::transformer_block(attention, layer)};
  const auto g = testing::gradcheck(net, tokens, d, seed);
  INFO("worst in " << g.where << ", skipped " << g.skipped << " of " << g.probed);
  CHECK(g.worst < 1e-2);
  CHECK(g.skipped * 4 < g.probed);
  CHECK(g.probed > tokens * d);
}

template <class C>
using block_of = moe::transformer_block<moe::self_attention<C, backend>, routed>;
template <class C>
block_of<C> make_block() { return {attention<C>(), routed(shape)}; }
using block = block_of<gated>;
using packed_block = packed<block>;
block a_block() { return make_block<gated>(); }

template <class F>
std::string message_of(F f) {
  try {
    f();
  } catch (const moe::shape_error& e) {
    return e.what();
  }
  return "no error";
}

}  // namespace

TEST_SUITE("transformer/block") {
  TEST_CASE("gradients match finite differences over packed sequences") {
    check_gradients(attention<gated>(), routed(shape), 1);
    check_gradients(attention<gated>(), with_shared(routed(shape), dense({.d = d, .f = 5})), 2);
    check_gradients(attention<blocks_of_keys>(moe::block_attention{.block = 2, .k = 2}), dense({.d = d, .f = 5}), 3);
  }

  TEST_CASE_TEMPLATE("a block is its parts, one after the other", C, gated, rounded) {
    testing::model<packed<block_of<C>>> m(packed(make_block<C>()), tokens, d, 4);
    m.forward();
    m.backward();

    // The same by hand: h = x + attention(n1), n1 = norm(x); y = h + layer(n2), n2 = norm(h).
    const auto on = testing::on<backend>({.tokens = tokens, .d = d});
    const auto part = m.net.attention();
    const auto in = m.net.with(m.x_view());
    moe::buffer memory(1 << 20), grads(m.net.gradient_bytes());
    moe::arena mem(memory.bytes()), grads_mem(grads.bytes());
    const auto rows = [&] { return mem.matrix<float>("rows", tokens, d); };
    const auto n1 = rows(), h = rows(), n2 = rows(), y = rows(), dn2 = rows(), dh = rows(), dn1 = rows(), dx = rows();
    const moe::rms_norm norm;
    auto r1 = norm.make_context(tokens, mem), r2 = norm.make_context(tokens, mem);
    auto actx = part.make_context(tokens, mem);
    auto lctx = m.net.layer().make_context(tokens, mem);
    auto dw = m.net.make_gradients(grads_mem);
    using input = typename block_of<C>::input;
    const auto plus = [&](moe::matrix_view<const float> a, moe::matrix_view<float> b) {
      for (dim t = 0; t < tokens; ++t)
        for (dim j = 0; j < d; ++j) b(t, j) += a(t, j);
    };

    norm.forward(on, m.w.attention_norm, m.x_view(), n1, r1);
    part.forward(m.w.attention, input{n1, in.sequences, in.angles}, h, actx, mem);
    plus(m.x_view(), h);
    norm.forward(on, m.w.layer_norm, h, n2, r2);
    m.net.layer().forward(m.w.layer, n2, y, lctx, mem);
    plus(h, y);
    CHECK(std::memcmp(y.data, m.y.data(), sizeof(float) * m.y.size()) == 0);

    m.net.layer().backward(m.w.layer, n2, lctx, m.dy_view(), dn2, dw.layer, mem);
    plus(m.dy_view(), dh);
    norm.backward(on, m.w.layer_norm, h, r2, dn2, dh, dw.layer_norm);
    part.backward(m.w.attention, input{n1, in.sequences, in.angles}, actx, dh, dn1, dw.attention, mem);
    plus(dh, dx);
    norm.backward(on, m.w.attention_norm, m.x_view(), r1, dn1, dx, dw.attention_norm);
    CHECK(std::memcmp(dx.data, m.dx.data(), sizeof(float) * m.dx.size()) == 0);
    CHECK(std::memcmp(grads.bytes().data(), m.grads.bytes().data(), grads.size()) == 0);
  }

  TEST_CASE("without a context the rows are the same, bit for bit") {
    testing::model<packed_block> m(packed_block(a_block()), tokens, d, 5);
    m.forward();
    std::vector<float> y(m.y.size());
    moe::buffer memory(m.net.scratch_bytes(tokens));
    moe::arena mem(memory.bytes());
    static_cast<const block&>(m.net).forward(m.w, m.net.with(m.x_view()), {y.data(), tokens, d}, mem);
    CHECK(y == m.y);
    CHECK(mem.used() == 0);
  }

  TEST_CASE_TEMPLATE("tokens that come to a cache, many at once and one by one, give the rows of the whole sequence", C, gated,
                     rounded) {
    constexpr dim prompt = 6;
    testing::model<packed<block_of<C>>> m(packed(make_block<C>()), tokens, d, 8);
    using element = typename C::element;
    m.net.rest.sequences = {};
    m.forward();
    const auto& net = static_cast<const block_of<C>&>(m.net);
    const auto in = m.net.with(m.x_view());
    moe::buffer memory(net.template cache_bytes<element>(1, tokens));
    moe::arena cache_mem(memory.bytes());
    auto past = net.template make_cache<element>(1, tokens, cache_mem);
    moe::buffer scratch(net.scratch_bytes(prompt, past));
    moe::arena mem(scratch.bytes());
    std::vector<float> y(m.y.size());
    const moe::matrix_view<float> rows(y.data(), tokens, d);
    net.forward(m.w, {in.x.slice(0, prompt), {}, in.angles}, rows.slice(0, prompt), past, mem);
    for (dim t = prompt; t < tokens; ++t) net.forward(m.w, {in.x.slice(t, 1), {}, in.angles}, rows.slice(t, 1), past, mem);
    CHECK(past.tokens.length(0) == tokens);
    for (std::size_t i = 0; i < y.size(); ++i) CHECK(y[i] == doctest::Approx(double{m.y[i]}).epsilon(1e-4));
  }

  TEST_CASE("backward adds to its gradients, and leaves out dx where nobody wants it") {
    testing::model<packed_block> m(packed_block(a_block()), tokens, d, 6);
    m.forward();
    m.backward();
    const std::vector<float> dx = m.dx, dw(m.gradients().begin(), m.gradients().end());
    m.backward();
    for (std::size_t i = 0; i < dx.size(); ++i) CHECK(m.dx[i] == doctest::Approx(2 * double{dx[i]}).epsilon(1e-5));
    m.din = {};
    m.backward();
    for (std::size_t i = 0; i < dw.size(); ++i)
      CHECK(m.gradients()[i] == doctest::Approx(3 * double{dw[i]}).epsilon(1e-4));
    CHECK(std::any_of(dw.begin(), dw.end(), [](float g) { return g != 0; }));
  }

  TEST_CASE("a tensor is known by its part: a checkpoint holds them all") {
    std::vector<std::string> names;
    for (const moe::slot& s : a_block().catalogue()) names.push_back(s.name);
    const std::vector<std::string> wanted{
        "attention_norm.weight", "attention.q",      "attention.k",          "attention.v",
        "attention.o",           "attention.output_gate", "attention.q_norm.weight", "attention.k_norm.weight",
        "layer_norm.weight",     "layer.gate.w",     "layer.experts.up",     "layer.experts.gate",
        "layer.experts.down"};
    CHECK(names == wanted);
    CHECK(a_block().gradient_catalogue().size() == names.size());
  }

  TEST_CASE("what does not fit is refused by name, before anything is written") {
    CHECK(message_of([] { block(attention<gated>(), routed({.d = d + 1, .f = 6, .experts = 3})); }) ==
          "transformer_block: the layer has 9 columns, expected 8 (d)");
    testing::model<packed_block> m(packed_block(a_block()), tokens, d, 7);
    const auto& net = static_cast<const block&>(m.net);
    const auto in = m.net.with(m.x_view());
    const auto untouched = m.y;
    const auto run = [&](auto change) {
      auto input = in;
      auto w = m.w;
      auto y = m.y_view();
      change(input, w, y);
      return message_of([&] { net.forward(w, input, y, m.ctx, m.work); });
    };
    CHECK(run([](auto& i, auto&, auto&) { i.x = i.x.columns(0, d - 1); }) ==
          "transformer_block: x is 11 x 7, expected 11 x 8 (T x d)");
    CHECK(run([](auto&, auto&, auto& y) { y = y.slice(0, 3); }) ==
          "transformer_block::forward: y is 3 x 8, expected 11 x 8 (T x d)");
    CHECK(run([](auto& i, auto&, auto&) { i.sequences.offsets = std::span(offsets).first(3); }) ==
          "transformer_block: sequences: offsets end at 5, expected to ascend from 0 to 11 (T)");
    CHECK(run([](auto&, auto& w, auto&) { w.layer_norm.weight = w.layer_norm.weight.first(3); }) ==
          "transformer_block: layer_norm has 3 elements, expected 8 (d)");
    CHECK(run([](auto&, auto& w, auto&) { w.attention.k = w.attention.k.slice(0, 1); })
              .starts_with("self_attention: k is 1 x 8"));
    CHECK(run([](auto&, auto& w, auto&) { w.layer.gate.w = w.layer.gate.w.slice(0, 1); }) != "no error");
    const auto fewer = in.x.slice(0, 5);
    CHECK(message_of([&] { net.forward(m.w, {fewer, {}, in.angles}, m.y_view().slice(0, 5), m.ctx, m.work); }) ==
          "transformer_block: ctx.h is 11 x 8, expected 5 x 8 (T x d)");
    moe::buffer small(64);
    moe::arena none(small.bytes());
    CHECK(message_of([&] { net.forward(m.w, in, m.y_view(), m.ctx, none); }).starts_with("transformer_block: the arena"));
    CHECK(m.y == untouched);
    CHECK(message_of([&] { net.backward(m.w, in, m.ctx, m.dy_view(), m.din.slice(0, 2), m.dw, m.work); }) ==
          "transformer_block::backward: dx is 2 x 8, expected 11 x 8 (T x d)");
  }
}
