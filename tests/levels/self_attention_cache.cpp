// SPDX-License-Identifier: Apache-2.0
#include "moe/attention/self_attention_cache.hpp"

#include <doctest/doctest.h>

#include "moe/backend/cpu.hpp"
#include "moe/moe.hpp"
#include "support/levels.hpp"
#include "support/testing.hpp"

namespace {

using moe::dim, moe::idx;

struct bare : moe::attention_features {};
struct published : moe::attention_features {
  using rotary = moe::rotary<>;
  using output_gate = moe::output_gate<moe::elementwise>;
  template <class Gate>
  using projection = moe::grouped_projection<Gate>;
};
struct convolved : published {
  using key_convolution = moe::key_convolution<3>;
  static constexpr bool normalises_heads = true, biased = true;
};
struct blocks : convolved {
  using selection = moe::block_attention;
};
struct gated_values : moe::attention_features {
  using query_gate = moe::output_gate<moe::headwise>;
  using value_gate = moe::output_gate<moe::elementwise>;
  using layer_gate = moe::output_gate<moe::headwise>;
};
/// The same over queries, keys and values that are rounded to bf16.
template <class C>
struct halves : C {
  using element = moe::bf16;
};

/// One kind of gate before attention and one behind it; the logits of G1 are fused, or of a matrix of their own.
struct headwise_output : published {
  using output_gate = moe::output_gate<moe::headwise>;
  using key_gate = moe::output_gate<moe::headwise>;
};
struct shared_output : moe::attention_features {
  using rotary = moe::rotary<moe::interleaved_pairs>;
  using output_gate = moe::output_gate<moe::head_shared>;
  using key_gate = moe::output_gate<moe::elementwise>;
};
struct shared_fused : shared_output {
  template <class Gate>
  using projection = moe::grouped_projection<Gate>;
};
struct added_output : moe::attention_features {
  using output_gate = moe::output_gate<moe::elementwise, moe::silu, moe::additive>;
  using query_gate = moe::output_gate<moe::head_shared, moe::ns_sigmoid>;
};
struct every_gate : convolved {
  using output_gate = moe::output_gate<moe::head_shared>;
  using value_gate = moe::output_gate<moe::head_shared>;
  using key_gate = moe::output_gate<moe::elementwise>;
  using query_gate = moe::output_gate<moe::elementwise, moe::silu>;
  using layer_gate = moe::output_gate<moe::elementwise, moe::ns_sigmoid>;
};
struct every_gate_of_blocks : every_gate {
  using selection = moe::block_attention;
};

constexpr dim d = 12, N = 37, S = 2;
constexpr moe::attention_heads heads{.heads = 4, .kv_heads = 2, .d = 8, .dv = 6};
constexpr idx offsets[] = {0, N, 2 * N};

std::vector<float> normals(std::size_t n, std::uint64_t seed, float scale) {
  std::vector<float> x(n);
  const moe::rng random(seed, 0);
  for (std::size_t i = 0; i < n; ++i) x[i] = scale * random.normal(i);
  return x;
}

/// Two sequences of N tokens, whole and in pieces that follow each other in a cache of elements T.
template <class C, class T>
struct trial {
  using layer = moe::self_attention<C, moe::cpu<>>;
  layer net;
  std::vector<float> values, x, whole = std::vector<float>(S * N * d);
  moe::buffer params, angles, memory, work;
  moe::arena mem;
  typename layer::weights w;
  typename layer::table table;
  typename layer::template cache<T> cache;

  template <class... Parts>
  explicit trial(const Parts&... parts)
      : net(d, heads, parts...),
        params(net.weight_bytes()),
        angles(1 << 16),
        memory(net.template cache_bytes<T>(S, N)),
        work(scratch(net)),
        mem(work.bytes()) {
    const auto all = params.template as<float>();
    const std::vector<float> random = normals(all.size(), 3, 0.4f);
    std::copy(random.begin(), random.end(), all.begin());
    moe::arena p(params.bytes()), a(angles.bytes()), c(memory.bytes());
    w = net.make_weights(p);
    table = net.make_table(N, a);
    cache = net.template make_cache<T>(S, N, c);
    begin(5);
  }
  /// Other tokens; none of them has come.
  void begin(std::uint64_t seed) {
    x = normals(S * N * d, seed, 1);
    for (dim s = 0; s < S; ++s) cache.reset(s);
    net.forward(w, {{x.data(), S * N, d}, {offsets, {}}, table}, {whole.data(), S * N, d}, mem);
  }
  static std::size_t scratch(const layer& net) {
    moe::buffer bytes(net.template cache_bytes<T>(S, N));
    moe::arena c(bytes.bytes());
    const auto cache = net.template make_cache<T>(S, N, c);
    return std::max(net.scratch_bytes(S * N, S), net.scratch_bytes(S * N, cache));
  }
  /// The next n[s] tokens of each sequence; returns how far the results are from those of the whole.
  double next(dim from, dim n0, dim n1) {
    std::vector<float> in(x.begin() + from * d, x.begin() + (from + n0) * d), y(static_cast<std::size_t>((n0 + n1) * d));
    in.insert(in.end(), x.begin() + (N + from) * d, x.begin() + (N + from + n1) * d);
    const idx own[] = {0, static_cast<idx>(n0), static_cast<idx>(n0 + n1)};
    net.forward(w, {{in.data(), n0 + n1, d}, {own, {}}, table}, {y.data(), n0 + n1, d}, cache, mem);
    double worst = 0;
    const auto compare = [&](dim at, dim n, dim to) {
      for (dim i = 0; i < n * d; ++i)
        worst = std::max(worst, std::fabs(double{y[static_cast<std::size_t>(at * d + i)]} -
                                          double{whole[static_cast<std::size_t>(to * d + i)]}));
    };
    compare(0, n0, from);
    compare(n0, n1, N + from);
    return worst;
  }
  double in_pieces() {
    double worst = next(0, 7, 7);
    worst = std::max(worst, next(7, 3, 3));
    for (dim t = 10; t < N - 4; ++t) worst = std::max(worst, next(t, 1, 1));
    return std::max(worst, next(N - 4, 4, 4));
  }
  double in_pieces_of(dim n) {
    double worst = 0;
    for (dim t = 0; t < N; t += n) worst = std::max(worst, next(t, std::min(n, N - t), std::min(n, N - t)));
    return worst;
  }
};

/// The largest error of prefills in pieces, and of decoding, over several texts.
template <class T>
double worst_of_blocks() {
  trial<blocks, T> t(moe::block_attention{.block = 4, .k = 2});
  double worst = 0;
  for (std::uint64_t seed = 0; seed < 12; ++seed)
    for (const dim n : {1, 6, 13}) {
      t.begin(seed);
      worst = std::max(worst, t.in_pieces_of(n));
    }
  return worst;
}

}  // namespace

TEST_SUITE("attention/self_attention_cache") {
  TEST_CASE("a prefill in pieces and steps of decoding give what the whole gives, at every level") {
    testing::at_every_level([] {
      CHECK(trial<bare, float>().in_pieces() < 2e-5);
      CHECK(trial<bare, float>(moe::attention_mask{.window = 5}).in_pieces() < 2e-5);
      CHECK(trial<published, float>().in_pieces() < 2e-5);
      CHECK(trial<convolved, float>().in_pieces() < 2e-5);
      CHECK(trial<gated_values, float>().in_pieces() < 2e-5);
      CHECK(trial<blocks, float>(moe::block_attention{.block = 4, .k = 3}).in_pieces() < 2e-5);
      CHECK(trial<blocks, float>(moe::block_attention{.block = 4, .k = 3, .dense = true}).in_pieces() < 2e-5);
    });
  }
  TEST_CASE("with rounded queries, keys and values a cache of floats or halves gives what the whole gives, at every level") {
    // Tiles round the weights of values in a piece, decoding does not; a number next to the middle of two halves is rounded
    // the other way where products of other shapes give other last bits.
    testing::at_every_level([] {
      CHECK(trial<halves<bare>, moe::bf16>().in_pieces() < 0.01);
      CHECK(trial<halves<bare>, moe::bf16>(moe::attention_mask{.window = 5}).in_pieces() < 0.01);
      CHECK(trial<halves<published>, moe::bf16>().in_pieces() < 0.01);
      CHECK(trial<halves<published>, float>().in_pieces() < 0.01);
      CHECK(trial<halves<published>, moe::f16>().in_pieces() < 0.01);
      CHECK(trial<halves<convolved>, moe::bf16>().in_pieces() < 0.01);
      CHECK(trial<halves<gated_values>, moe::bf16>().in_pieces() < 0.01);
      CHECK(trial<halves<blocks>, moe::bf16>(moe::block_attention{.block = 4, .k = 3}).in_pieces() < 0.01);
      CHECK(trial<halves<convolved>, std::int8_t>().in_pieces() < 0.05);
    });
  }
  TEST_CASE("so they do with a gate at any position, of any kind") {
    testing::at_every_level([] {
      CHECK(trial<headwise_output, float>().in_pieces() < 2e-5);
      CHECK(trial<shared_output, float>().in_pieces() < 2e-5);
      CHECK(trial<shared_fused, float>().in_pieces() < 2e-5);
      CHECK(trial<added_output, float>().in_pieces() < 2e-5);
      CHECK(trial<every_gate, float>().in_pieces() < 2e-5);
      CHECK(trial<every_gate_of_blocks, float>(moe::block_attention{.block = 4, .k = 3}).in_pieces() < 2e-5);
    });
  }
  TEST_CASE_TEMPLATE("a gate adds nothing to the cache", T, float, moe::bf16, moe::f16, std::int8_t) {
    const auto bytes = []<class C>(C) { return moe::self_attention<C, moe::cpu<>>(d, heads).template cache_bytes<T>(S, N); };
    CHECK(bytes(published{}) == bytes(bare{}));
    CHECK(bytes(headwise_output{}) == bytes(bare{}));
    CHECK(bytes(shared_output{}) == bytes(bare{}));
    CHECK(bytes(gated_values{}) == bytes(bare{}));
    CHECK(bytes(every_gate{}) == bytes(convolved{}));
    CHECK(bytes(every_gate_of_blocks{}) == bytes(blocks{}));
  }
  TEST_CASE("smaller elements cost their rounding and no more") {
    // Keys and values are off by 2^-9, 2^-12 and 1/254 of the largest of a row; results here are about as large as values.
    CHECK(trial<convolved, moe::bf16>().in_pieces() < 0.02);
    CHECK(trial<convolved, moe::f16>().in_pieces() < 0.003);
    CHECK(trial<convolved, std::int8_t>().in_pieces() < 0.05);
  }
  TEST_CASE("smaller elements do not change which blocks are chosen, in a piece of a prefill no more than in decoding") {
    // Rounded keys have other means, and another block is off by tenths.
    CHECK(worst_of_blocks<float>() < 2e-5);
    CHECK(worst_of_blocks<moe::bf16>() < 0.05);
    CHECK(worst_of_blocks<moe::f16>() < 0.005);
    CHECK(worst_of_blocks<std::int8_t>() < 0.1);
  }
  TEST_CASE("a sequence that is reset begins anew, its convolution as well") {
    trial<convolved, float> t;
    t.next(0, 9, 9);
    t.cache.reset(0);
    t.cache.reset(1);
    CHECK(t.next(0, 9, 9) < 2e-5);
    t.cache.truncate(0, 9);
    CHECK_THROWS_WITH_AS(t.cache.truncate(0, 8),
                         "self_attention::cache::truncate: n is 8, expected 0 or 9 (the length of sequence 0): the "
                         "convolution keeps its last keys only",
                         moe::shape_error);
    CHECK_THROWS_AS(t.cache.truncate(0, 10), moe::shape_error);
    CHECK_THROWS_AS(t.cache.reset(S), moe::shape_error);
    CHECK(t.next(9, 3, 3) < 2e-5);
  }
  TEST_CASE("without a convolution tokens are forgotten one by one") {
    trial<published, float> t;
    t.next(0, 9, 9);
    t.cache.truncate(0, 4);
    t.cache.truncate(1, 4);
    CHECK(t.next(4, 5, 5) < 2e-5);
  }
  TEST_CASE("a sequence may rest while another goes on") {
    trial<convolved, float> t;
    CHECK(t.next(0, 5, 5) < 2e-5);
    std::vector<float> y(d);
    const idx own[] = {0, 0, 1};
    t.net.forward(t.w, {{t.x.data() + (N + 5) * d, 1, d}, {own, {}}, t.table}, {y.data(), 1, d}, t.cache, t.mem);
    for (std::size_t j = 0; j < d; ++j) CHECK(y[j] == doctest::Approx(t.whole[(N + 5) * d + j]).epsilon(1e-4));
    CHECK(t.cache.tokens.length(0) == 5);
    CHECK(t.cache.tokens.length(1) == 6);
  }
  TEST_CASE("a cache that would be too full is refused before anything is written") {
    trial<bare, float> t;
    t.next(0, N - 1, N - 1);
    std::vector<float> y(4 * d, 5.f);
    const idx own[] = {0, 2, 4};
    CHECK_THROWS_WITH_AS(
        t.net.forward(t.w, {{t.x.data(), 4, d}, {own, {}}, t.table}, {y.data(), 4, d}, t.cache, t.mem),
        "self_attention::forward: sequence 0 of the cache holds 36 tokens and 2 come, expected at most 37 (capacity)",
        moe::shape_error);
    for (const float v : y) CHECK(v == 5.f);
    CHECK(t.cache.tokens.length(0) == N - 1);
    const idx one[] = {0, 1};
    CHECK_THROWS_WITH_AS(t.net.forward(t.w, {{t.x.data(), 1, d}, {one, {}}, t.table}, {y.data(), 1, d}, t.cache, t.mem),
                         "self_attention::forward: in has 1 sequences, expected 2 (S of the cache)", moe::shape_error);
  }
  TEST_CASE("a mask that lets a token see later ones has no cache, neither one of its own nor another layer's") {
    trial<bare, float> t;
    const moe::self_attention<bare, moe::cpu<>> both_ways(d, heads, moe::attention_mask{.causal = false});
    moe::arena c(t.memory.bytes());
    CHECK_THROWS_WITH_AS(both_ways.make_cache<float>(S, N, c),
                         "self_attention::make_cache: mask.causal is false, expected true for a layer with a cache",
                         moe::shape_error);
    std::vector<float> y(2 * d, 5.f);
    const idx own[] = {0, 1, 2};
    CHECK_THROWS_WITH_AS(both_ways.forward(t.w, {{t.x.data(), 2, d}, {own, {}}, t.table}, {y.data(), 2, d}, t.cache, t.mem),
                         "self_attention::forward: mask.causal is false, expected true for a layer with a cache",
                         moe::shape_error);
    for (const float v : y) CHECK(v == 5.f);
    CHECK(t.cache.tokens.length(0) == 0);
  }
}
