// SPDX-License-Identifier: Apache-2.0
// What attention and a block of a transformer keep and take: the bytes that docs/numerics.md#of-attention says, and none for
// a pair of tokens. Tiles of threads are asked of attend and attend_backward, whose own tests know what is in them.
#include <doctest/doctest.h>

#include <algorithm>

#include "moe/attention/self_attention_cache.hpp"
#include "moe/moe.hpp"
#include "moe/transformer/block.hpp"

namespace {

using moe::dim;
using backend = moe::scalar<moe::serial>;

struct bare : moe::attention_features {};
struct fused : moe::attention_features {
  using rotary = moe::rotary<>;
  using output_gate = moe::output_gate<moe::elementwise>;
  template <class Gate>
  using projection = moe::grouped_projection<Gate>;
};
struct everything : moe::attention_features {
  using selection = moe::block_attention;
  using key_convolution = moe::key_convolution<5>;
  using output_gate = moe::output_gate<moe::head_shared>;
  using value_gate = moe::output_gate<moe::headwise>;
  using key_gate = moe::output_gate<moe::elementwise>;
  using query_gate = moe::output_gate<moe::elementwise>;
  using layer_gate = moe::output_gate<moe::headwise>;
  static constexpr bool normalises_heads = true;
};

/// A layer in the letters of the formula; 0 for what it does not have.
struct letters {
  dim d, h, h_kv, d_k, dv;
  dim c1 = 0, c2 = 0, c3 = 0, c4 = 0, c5 = 0;
  bool grouped = false, norms = false;
  dim W = 0, B = 0, k = 0;

  dim q() const { return h * d_k; }
  dim u() const { return h_kv * d_k; }
  dim v() const { return h_kv * dv; }
  dim o() const { return h * dv; }
  moe::attention_problem problem() const { return {{h, h_kv, d_k, dv}}; }
};

std::size_t up(std::size_t n, std::size_t grain) { return (n + grain - 1) / grain * grain; }
/// Whole contexts, scratch, and where the tiles of threads start.
std::size_t whole(std::size_t bytes) { return up(bytes, 512); }
/// Tensors of elements of 4 bytes, one after the other.
struct tensors {
  std::size_t bytes = 0;
  template <class... Rest>
  tensors& add(dim rows, Rest... cols) {
    ((bytes += cols > 0 ? up(static_cast<std::size_t>(4 * rows * cols), 256) : 0), ...);
    return *this;
  }
};

tensors context_of(const letters& l, dim T, bool training) {
  tensors t;
  t.add(T, l.q() + (l.grouped ? l.c1 : 0), l.u(), l.v(), l.o());
  if (training) t.add(T, l.h);
  if (l.c1 > 0 && !l.grouped) t.add(T, l.c1);
  if (l.c1 > 0 && training) t.add(T, l.o());
  if (l.c2 > 0) t.add(T, l.v(), l.c2);
  if (l.c3 > 0) t.add(T, l.u(), l.c3);
  if (l.c4 > 0) t.add(T, l.q(), l.c4);
  if (l.c5 > 0) t.add(T, l.d, l.c5);
  if (l.norms) t.add(T, l.q(), l.u());
  if (l.norms && training) t.add(T, l.h, l.h_kv);
  if (l.W > 0) t.add(T, l.u());
  if (l.B > 0 && training) t.add(T, l.h * (l.k - 1));
  return t;
}

template <class Selection>
std::size_t attend_bytes(const letters& l, dim T, dim keys, const Selection& selection) {
  moe::arena count;
  count_attend(backend{}, l.problem(), {T, keys}, selection, count);
  return count.peak();
}
/// The sums of attend_backward, P h_kv T (d_k + dv), which come before its tiles.
tensors backward_sums(const letters& l, dim T) {
  const dim parts = std::min((16 + l.h_kv - 1) / l.h_kv, std::max<dim>(1, T / 512));
  const auto lanes = attention_kernels_of(moe::arch::scalar{}).columns;
  const auto padded = [&](dim n) { return (n + lanes - 1) / lanes * lanes; };
  return tensors{}.add(parts * l.h_kv * T, padded(l.d_k), padded(l.dv));
}
template <class Selection>
std::size_t backward_tiles(const letters& l, dim T, const Selection& selection) {
  moe::arena count;
  count_attend_backward(backend{}, l.problem(), {T, T}, selection, count);
  return count.peak() - whole(backward_sums(l, T).bytes);
}

std::size_t scratch_of(const letters& l, dim T, dim S) {
  const moe::key_blocks blocks{l.B, l.k};
  const auto means = [&](tensors& t) { t.add(T, l.dv, std::max({l.d, l.d_k, l.dv})); };
  const tensors kept = context_of(l, T, false);

  tensors forward = kept;
  means(forward);
  if (l.B > 0) forward.add(T / l.B + S, l.u());
  std::size_t most =
      whole(forward.bytes) + (l.B > 0 ? attend_bytes(l, T, T, blocks) : attend_bytes(l, T, T, moe::every_key{}));
  tensors slopes = kept;
  slopes.add(T, l.o(), l.h, l.q() + (l.grouped ? l.c1 : 0), l.u(), l.v(), l.grouped ? 0 : l.c1, l.c2, l.c3, l.c4, l.c5);
  if (l.c5 > 0) slopes.add(T, l.d);
  if (l.W > 0) slopes.add(T, l.u());
  most = std::max(most, whole(slopes.bytes + backward_sums(l, T).bytes) +
                            (l.B > 0 ? backward_tiles(l, T, blocks) : backward_tiles(l, T, moe::every_key{})));
  means(slopes);
  slopes.add(1, l.d_k);
  const dim groups = std::max<dim>(1, (T + 63) / 64);
  most = std::max(most, tensors{slopes}.add(groups, l.d_k).bytes);
  if (l.W > 0) most = std::max(most, slopes.add(T, l.u()).add(1, l.W * l.u()).add(groups, l.W * l.u()).bytes);
  return whole(most);
}

std::size_t step_scratch_of(const letters& l, dim T, dim S, dim N) {
  const moe::kv_cache_shape shape{l.problem().heads, S, N, l.B};
  tensors t = context_of(l, T, false);
  t.add(T, l.q()).add(S * l.h, l.k).add(T, l.dv, std::max({l.d, l.d_k, l.dv}));
  moe::arena decode;
  if (l.B > 0) (void)make_select_blocks_scratch(shape, decode);
  moe::make_decode_scratch(shape, l.k, decode);
  const std::size_t most = t.bytes + decode.peak();
  t.add(N, l.u(), l.v());
  if (l.B > 0) t.add(N / l.B + 1, l.u());
  const std::size_t piece =
      l.B > 0 ? attend_bytes(l, T, N, moe::key_blocks{l.B, l.k}) : attend_bytes(l, T, N, moe::every_key{});
  return whole(std::max(most, whole(t.bytes) + piece));
}

/// test(letters, layer) for layers with few features and many, narrow and wide.
template <class F>
void for_each_layer(F test) {
  const auto run = [&]<class C>(C, const letters& l, auto... parts) {
    test(l, moe::self_attention<C, backend>(l.d, l.problem().heads, parts...));
  };
  run(bare{}, {.d = 12, .h = 4, .h_kv = 2, .d_k = 8, .dv = 6});
  run(bare{}, {.d = 200, .h = 3, .h_kv = 1, .d_k = 33, .dv = 70});
  run(fused{}, {.d = 24, .h = 8, .h_kv = 4, .d_k = 16, .dv = 10, .c1 = 80, .grouped = true});
  const letters all{.d = 40,
                    .h = 6,
                    .h_kv = 3,
                    .d_k = 16,
                    .dv = 9,
                    .c1 = 54,
                    .c2 = 3,
                    .c3 = 48,
                    .c4 = 96,
                    .c5 = 1,
                    .norms = true,
                    .W = 5,
                    .B = 4,
                    .k = 3};
  run(everything{}, all, moe::block_attention{.block = 4, .k = 3});
  letters dense = all;
  dense.B = dense.k = 0;
  run(everything{}, dense, moe::block_attention{.block = 4, .k = 3, .dense = true});
}

}  // namespace

TEST_SUITE("attention/memory") {
  TEST_CASE("a context is rows of its tokens, as many and as wide as the formula says") {
    for_each_layer([](const letters& l, const auto& layer) {
      for (const dim T : {0, 1, 7, 64, 100, 1000}) CHECK(layer.context_bytes(T) == whole(context_of(l, T, true).bytes));
    });
  }
  TEST_CASE("scratch is the context of inference and what forward or backward take beside it") {
    for_each_layer([](const letters& l, const auto& layer) {
      CAPTURE(l.d);
      for (const dim T : {1, 7, 64, 100, 1000, 20000})
        for (const dim S : {1, 5}) CHECK(layer.scratch_bytes(T, S) == scratch_of(l, T, S));
    });
  }
  TEST_CASE("tokens that come to a cache take their rows and those of the cache") {
    for_each_layer([](const letters& l, const auto& layer) {
      for (const dim N : {40, 3000})
        for (const dim T : {2, 30}) {
          constexpr dim S = 2;
          const moe::buffer memory(layer.template cache_bytes<float>(S, N));
          moe::arena mem(memory.bytes());
          const auto cache = layer.template make_cache<float>(S, N, mem);
          CAPTURE(l.d);
          CHECK(layer.scratch_bytes(T, cache) == step_scratch_of(l, T, S, N));
        }
    });
  }
  TEST_CASE("twice the tokens add the same bytes again: no term has the tokens twice") {
    for_each_layer([](const letters& l, const auto& layer) {
      CAPTURE(l.d);
      constexpr dim N = 1 << 16;
      const auto grown = [](auto bytes) {
        const std::size_t once = bytes(2 * N) - bytes(N);
        CHECK(bytes(4 * N) - bytes(2 * N) == 2 * once);
        return once / N;
      };
      CHECK(grown([&](dim T) { return layer.context_bytes(T); }) == context_of(l, N, true).bytes / N);
      const std::size_t scratch = grown([&](dim T) { return layer.scratch_bytes(T); });
      CHECK(scratch >= context_of(l, N, false).bytes / N);
      CHECK(scratch < 3 * context_of(l, N, true).bytes / N + 2 * 16 * 4 * static_cast<std::size_t>(l.d_k + l.dv + 2 * 8));
    });
  }
  TEST_CASE("a block of a transformer keeps three rows and two numbers a token beside what its parts keep") {
    const moe::layer<moe::linear_gate, moe::top_k<2>, moe::ffn_expert, moe::weighted_sum, backend> experts(
        {.d = 40, .f = 24, .experts = 5});
    const moe::self_attention<everything, backend> attention(40, {.heads = 6, .kv_heads = 3, .d = 16, .dv = 9},
                                                             moe::block_attention{.block = 4, .k = 3});
    const moe::transformer_block block(attention, experts);
    for (const dim T : {1, 7, 64, 100, 1000}) {
      CHECK(block.context_bytes(T) ==
            whole(tensors{}.add(T, 40, 40, 40, 1, 1).bytes) + attention.context_bytes(T) + experts.context_bytes(T));
      const std::size_t norm = whole(tensors{}.add(1, 40).add((T + 63) / 64, 40).bytes);
      CHECK(block.scratch_bytes(T, 3) == whole(tensors{}.add(T, 40, 40).bytes) + experts.inference_context_bytes(T) +
                                             std::max({norm, attention.scratch_bytes(T, 3), experts.scratch_bytes(T)}));
    }
    constexpr dim N = 1 << 14;
    CHECK(block.context_bytes(4 * N) - block.context_bytes(2 * N) ==
          2 * (block.context_bytes(2 * N) - block.context_bytes(N)));
    CHECK(block.scratch_bytes(4 * N) - block.scratch_bytes(2 * N) ==
          2 * (block.scratch_bytes(2 * N) - block.scratch_bytes(N)));
  }
}
