// SPDX-License-Identifier: Apache-2.0
// Decoding from a cache at every level, against softmax in double over the rows that the cache holds.
#include <doctest/doctest.h>

#include <limits>

#include "moe/attention/decode.hpp"
#include "moe/attention/select_blocks.hpp"
#include "moe/backend/cpu.hpp"
#include "support/executors.hpp"
#include "support/levels.hpp"
#include "support/testing.hpp"

namespace {

using moe::bf16, moe::dim, moe::f16, moe::idx, moe::matrix_view;
using testing::normals;
using backend = moe::cpu<>;

moe::call<backend> on() { return testing::on<backend>(); }
matrix_view<float> matrix(std::vector<float>& v, dim rows) { return {v.data(), rows, static_cast<dim>(v.size()) / rows}; }
std::size_t at(dim i) { return static_cast<std::size_t>(i); }

/// A cache whose sequences have the given lengths, and a query for each.
template <class T>
struct trial {
  moe::kv_cache_shape sizes;
  moe::buffer memory;
  moe::kv_cache<T> cache;
  std::vector<float> q, o, lse;

  trial(const moe::attention_heads& h, const std::vector<idx>& lengths, dim block = 0, float scale = 1)
      : sizes{h, static_cast<dim>(lengths.size()), *std::max_element(lengths.begin(), lengths.end()) + 1, block} {
    moe::arena count;
    (void)moe::kv_cache<T>::make(sizes, count);
    memory = moe::buffer(moe::padded(count));
    moe::arena mem(memory.bytes());
    cache = moe::kv_cache<T>::make(sizes, mem);
    for (dim s = 0; s < sizes.sequences; ++s) {
      const dim n = lengths[at(s)];
      std::vector<float> k = normals(n * h.key_cols(), 2 * at(s) + 1), v = normals(n * h.value_cols(), 2 * at(s) + 2);
      cache.append_to(on(), s, matrix_view<float>{k.data(), n, h.key_cols()},
                      matrix_view<float>{v.data(), n, h.value_cols()});
    }
    q = normals(sizes.sequences * h.query_cols(), 99, scale);
    o.assign(at(sizes.sequences * h.output_cols()), -7.f);
    lse.assign(at(sizes.sequences * h.heads), -7.f);
  }
  template <class B>
  void run(const moe::call<B>& c, moe::decode_options options = {}) {
    moe::decode(c, cache, matrix(q, sizes.sequences), matrix(o, sizes.sequences), matrix(lse, sizes.sequences), options);
  }
  /// The largest error of o over the largest value, and of lse; `seen(s, head, key)` says who sees what.
  template <class Seen>
  std::pair<double, double> errors(Seen seen) const {
    const moe::attention_heads& h = sizes.heads;
    double worst = 0, worst_lse = 0;
    for (dim s = 0; s < sizes.sequences; ++s)
      for (dim a = 0; a < h.heads; ++a) {
        const dim n = cache.length(s);
        std::vector<float> k(at(n * h.d)), v(at(n * h.dv));
        cache.read_keys(s, h.key_head(a), 0, {k.data(), n, h.d});
        cache.read_values(s, h.key_head(a), 0, {v.data(), n, h.dv});
        std::vector<double> score(at(n)), out(at(h.dv));
        double largest = -std::numeric_limits<double>::infinity(), sum = 0;
        for (dim t = 0; t < n; ++t) {
          for (dim j = 0; j < h.d; ++j) score[at(t)] += double{q[at((s * h.heads + a) * h.d + j)]} * k[at(t * h.d + j)];
          score[at(t)] /= std::sqrt(static_cast<double>(h.d));
          if (seen(s, a, t)) largest = std::max(largest, score[at(t)]);
        }
        for (dim t = 0; t < n; ++t) {
          if (!seen(s, a, t)) continue;
          const double w = std::exp(score[at(t)] - largest);
          sum += w;
          for (dim j = 0; j < h.dv; ++j) out[at(j)] += w * v[at(t * h.dv + j)];
        }
        for (dim j = 0; j < h.dv; ++j) {
          const double wanted = sum > 0 ? out[at(j)] / sum : 0, e = std::fabs(wanted - o[at((s * h.heads + a) * h.dv + j)]);
          if (!(e <= worst)) worst = e;
        }
        const float got = lse[at(s * h.heads + a)];
        if (sum == 0) {
          CHECK(got == -std::numeric_limits<float>::infinity());
        } else if (const double e = std::fabs(largest + std::log(sum) - got); !(e <= worst_lse)) {
          worst_lse = e;
        }
      }
    return {worst, worst_lse};
  }
};
const auto everything = [](dim, dim, dim) { return true; };
/// Values are near one. Floats add up with 2^-24 each; of bytes, queries and weights have 16 bits (see decode).
template <class T>
constexpr double bound = std::same_as<T, std::int8_t> ? 1e-4 : 2e-6;

}  // namespace

TEST_SUITE("attention/decode") {
  TEST_CASE_TEMPLATE("a step equals softmax in double at every level, whatever the sizes", T, float, bf16, f16,
                     std::int8_t) {
    struct {
      moe::attention_heads h;
      std::vector<idx> lengths;
    } const cases[] = {{{8, 2, 128, 128}, {700, 64}},   {{4, 4, 64, 64}, {513}},         {{5, 1, 32, 96}, {1, 2, 67, 0}},
                       {{6, 3, 80, 40}, {130, 1025}},   {{16, 2, 256, 64}, {66, 3}},     {{3, 1, 5, 3}, {9, 130}},
                       {{2, 2, 33, 31}, {63, 65, 512}}, {{12, 1, 64, 160}, {1030, 0, 5}}};
    testing::at_every_level([&] {
      for (const auto& c : cases) {
        CAPTURE(c.h.d);
        CAPTURE(c.h.heads);
        trial<T> t(c.h, c.lengths);
        t.run(on());
        const auto [o, lse] = t.errors(everything);
        CHECK(o < bound<T>);
        CHECK(lse < bound<T>);
      }
    });
  }
  TEST_CASE_TEMPLATE("sharp and flat scores keep their precision over many steps", T, float, bf16, f16, std::int8_t) {
    testing::at_every_level([&] {
      for (const float scale : {0.f, 30.f}) {
        trial<T> t({4, 1, 64, 64}, {1500}, 0, scale);
        t.run(on());
        const auto [o, lse] = t.errors(everything);
        CHECK(o < (scale > 1 ? 50 : 1) * bound<T>);  // scores are as large as 100, so their rounding is
        CHECK(lse < (scale > 1 ? 100 : 5) * bound<T>);
      }
    });
  }
  TEST_CASE_TEMPLATE("a window shows the last keys only", T, bf16, std::int8_t) {
    testing::at_every_level([&] {
      for (const dim window : {1, 15, 63, 501, 9999}) {
        trial<T> t({4, 2, 64, 32}, {1103, 40});
        t.run(on(), {.window = window});
        const auto [o, lse] = t.errors([&](dim s, dim, dim key) { return key >= t.cache.length(s) - window; });
        CHECK(o < bound<T>);
        CHECK(lse < bound<T>);
      }
    });
  }
  TEST_CASE_TEMPLATE("selected blocks are all that a head sees, and every block is everything", T, float, std::int8_t) {
    testing::at_every_level([&] {
      for (const dim block : {16, 7, 100})
        for (const dim k : {1, 3, 50}) {
          trial<T> t({6, 2, 64, 32}, {300, 17, 0}, block);
          std::vector<idx> chosen(at(3 * 6 * k));
          const matrix_view<idx> blocks{chosen.data(), 18, k};
          moe::select_blocks(on(), t.cache, matrix(t.q, 3), blocks);
          t.run(on(), {.blocks = blocks});
          const auto [o, lse] = t.errors([&](dim s, dim a, dim key) {
            const idx* row = blocks.row(s * 6 + a);
            return std::find(row, row + k, static_cast<idx>(key / block)) != row + k;
          });
          CHECK(o < bound<T>);
          CHECK(lse < bound<T>);
          if (k < 50) continue;
          const auto [all, all_lse] = t.errors(everything);
          CHECK(all < bound<T>);
          CHECK(all_lse < bound<T>);
        }
    });
  }
  TEST_CASE_TEMPLATE("bits do not depend on who runs the units", T, float, bf16, f16, std::int8_t) {
    testing::at_every_level([&] {
      trial<T> t({8, 2, 64, 64}, {1700, 600}, 64);
      std::vector<idx> chosen(16 * 4);
      const matrix_view<idx> blocks{chosen.data(), 16, 4};
      moe::select_blocks(on(), t.cache, matrix(t.q, 2), blocks);
      for (const bool some : {false, true}) {
        moe::decode_options options;
        if (some) options.blocks = blocks;
        t.run(on(), options);
        const std::vector<float> o = t.o, lse = t.lse;
        for (const std::uint64_t seed : {std::uint64_t{1}, std::uint64_t{2}}) {
          const moe::cpu<moe::arch::native, testing::shuffling> other(testing::shuffling{seed});
          moe::buffer memory(std::size_t{1} << 22);
          moe::arena scratch(memory.bytes());
          t.run(moe::call<std::remove_cvref_t<decltype(other)>>{other, scratch, {}}, options);
          CHECK(t.o == o);
          CHECK(t.lse == lse);
        }
      }
    });
  }
  TEST_CASE("halves go in and out, and lse may be empty") {
    trial<bf16> t({4, 2, 64, 32}, {100});
    std::vector<bf16> q, o(4 * 32);
    for (float& v : t.q) {
      q.push_back(bf16(v));
      v = static_cast<float>(q.back());
    }
    moe::decode(on(), t.cache, matrix_view<const bf16>{q.data(), 1, 4 * 64}, matrix_view<bf16>{o.data(), 1, 4 * 32});
    t.run(on());
    for (std::size_t i = 0; i < o.size(); ++i) CHECK(o[i] == bf16(t.o[i]));
  }
  TEST_CASE_TEMPLATE("what is not finite stays in the heads that see it", T, float, bf16, f16, std::int8_t) {
    testing::at_every_level([&] {
      trial<T> t({4, 2, 64, 64}, {70, 73});
      std::vector<float> k(128), v(128, 1.f);
      k[64] = std::numeric_limits<float>::quiet_NaN();  // key head 1 of the first sequence
      t.cache.append_to(on(), 0, matrix(k, 1), matrix(v, 1));
      t.run(on());
      for (std::size_t i = 0; i < t.o.size(); ++i) CHECK(std::isnan(t.o[i]) == (i / 64 == 2 || i / 64 == 3));
      t.cache.truncate(0, 70);
      k[64] = 0;
      v[0] = std::numeric_limits<float>::quiet_NaN();  // value of key head 0
      t.cache.append_to(on(), 0, matrix(k, 1), matrix(v, 1));
      t.run(on());
      CHECK(std::isnan(t.o[0]));
      CHECK(!std::isnan(t.o[2 * 64]));
      CHECK(!std::isnan(t.lse[0]));
      for (dim more = 0; more < 3; ++more) {  // a window that begins right behind it, in the same block of keys
        std::vector<float> one(128, 1.f);
        t.cache.append_to(on(), 0, matrix(one, 1), matrix(one, 1));
        t.run(on(), {.window = more + 1});
        CHECK(!std::isnan(t.o[0]));
      }
      v[0] = 1;
      t.cache.truncate(0, 70);  // what was forgotten may lie in the block of the last key
      t.run(on());
      for (std::size_t i = 0; i < 4 * 64; ++i) CHECK(!std::isnan(t.o[i]));
    });
  }
  TEST_CASE("sizes, blocks and scratch that do not fit are refused before anything is written") {
    trial<float> t({4, 2, 8, 8}, {5}, 2);
    std::vector<float> wrong(30);
    std::vector<idx> chosen{0, 1, 2, 0, 0, 0, 3, 0};
    const auto q = matrix(t.q, 1), o = matrix(t.o, 1);
    CHECK_THROWS_WITH_AS(moe::decode(on(), t.cache, matrix(wrong, 1), o), "decode: q is 1 x 30, expected 1 x 32 (S x h*d)",
                         moe::shape_error);
    CHECK_THROWS_WITH_AS(moe::decode(on(), t.cache, q, o, {}, {.window = -1}), "decode: window is -1, expected at least 0",
                         moe::shape_error);
    CHECK_THROWS_WITH_AS(moe::decode(on(), t.cache, q, o, {}, {.blocks = {chosen.data(), 4, 2}}),
                         "decode: blocks(3, 0) is 3, expected below 3 (of its sequence)", moe::shape_error);
    CHECK_THROWS_AS(moe::decode(on(), t.cache, q, o, {}, {.window = 1, .blocks = {chosen.data(), 4, 1}}), moe::shape_error);
    trial<float> without({4, 2, 8, 8}, {5});
    CHECK_THROWS_AS(moe::decode(on(), without.cache, q, o, {}, {.blocks = {chosen.data(), 4, 1}}), moe::shape_error);
    moe::arena count;
    moe::make_decode_scratch(t.sizes, 0, count);
    moe::buffer memory(count.peak());
    const backend b{};
    moe::arena least(memory.bytes()), less(memory.bytes().first(memory.size() - 64));
    CHECK_NOTHROW(moe::decode(moe::call<backend>{b, least, {}}, t.cache, q, o));
    t.o.assign(t.o.size(), -7.f);
    CHECK_THROWS_AS(moe::decode(moe::call<backend>{b, less, {}}, t.cache, q, o), moe::shape_error);
    CHECK(t.o[0] == -7);
  }
}
