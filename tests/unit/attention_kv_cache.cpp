// SPDX-License-Identifier: Apache-2.0
#include <doctest/doctest.h>

#include <limits>

#include "moe/attention/decode.hpp"
#include "moe/attention/kv_cache.hpp"
#include "moe/attention/select_blocks.hpp"
#include "moe/backend/host_decode.hpp"
#include "moe/backend/scalar.hpp"
#include "moe/recipe/moba.hpp"
#include "support/executors.hpp"
#include "support/testing.hpp"

namespace {

using moe::bf16, moe::dim, moe::f16, moe::idx, moe::matrix_view;
using testing::normals;
using backend = moe::scalar<>;

moe::call<backend> on() { return testing::on<backend>(); }
matrix_view<float> matrix(std::vector<float>& v, dim rows) { return {v.data(), rows, static_cast<dim>(v.size()) / rows}; }

template <class T>
struct filled {
  moe::kv_cache_shape sizes;
  moe::buffer memory;
  moe::kv_cache<T> cache;

  explicit filled(const moe::kv_cache_shape& s) : sizes(s) {
    moe::arena count;
    (void)moe::kv_cache<T>::make(s, count);
    memory = moe::buffer(moe::padded(count));
    moe::arena mem(memory.bytes());
    cache = moe::kv_cache<T>::make(s, mem);
  }
};
const moe::attention_heads heads{.heads = 4, .kv_heads = 2, .d = 5, .dv = 3};

}  // namespace

TEST_SUITE("attention/kv_cache") {
  TEST_CASE_TEMPLATE("rows come back as they were appended, up to the rounding of their type", T, float, bf16, f16,
                     std::int8_t) {
    filled<T> f({heads, 2, 8, 0});
    std::vector<float> k = normals(7 * 10, 1), v = normals(7 * 6, 2);
    const std::vector<idx> offsets{0, 4, 7};
    f.cache.append(on(), {offsets, {}}, matrix(k, 7), matrix(v, 7));
    CHECK(f.cache.length(0) == 4);
    CHECK(f.cache.length(1) == 3);
    const float error = std::same_as<T, float>  ? 0.f
                        : std::same_as<T, bf16> ? 0x1p-8f
                        : std::same_as<T, f16>  ? 0x1p-11f
                                                : 0.51f / 127;
    for (dim s = 0; s < 2; ++s)
      for (dim a = 0; a < 2; ++a) {
        std::vector<float> rows(15), values(9);
        f.cache.read_keys(s, a, 0, matrix(rows, 3));
        f.cache.read_values(s, a, 0, matrix(values, 3));
        for (dim t = 0; t < 3; ++t) {
          float largest = 0;
          const float* from = k.data() + (s * 4 + t) * 10 + a * 5;
          for (dim j = 0; j < 5; ++j) largest = std::max(largest, std::fabs(from[j]));
          for (dim j = 0; j < 5; ++j) {
            const float size = std::same_as<T, std::int8_t> ? largest : std::fabs(from[j]);
            CHECK(std::fabs(rows[static_cast<std::size_t>(t * 5 + j)] - from[j]) <= error * size);
          }
          CHECK(values[static_cast<std::size_t>(t * 3)] ==
                doctest::Approx(v[static_cast<std::size_t>((s * 4 + t) * 6 + a * 3)]).epsilon(0.05));
        }
      }
  }
  TEST_CASE("one token a sequence, many to one, and pieces make the same cache") {
    filled<bf16> whole({heads, 2, 8, 3}), steps({heads, 2, 8, 3});
    std::vector<float> k = normals(12 * 10, 1), v = normals(12 * 6, 2);
    const std::vector<idx> offsets{0, 6, 12};
    whole.cache.append(on(), {offsets, {}}, matrix(k, 12), matrix(v, 12));
    steps.cache.append_to(on(), 1, matrix(k, 12).slice(6, 4), matrix(v, 12).slice(6, 4));
    steps.cache.append_to(on(), 0, matrix(k, 12).slice(0, 4), matrix(v, 12).slice(0, 4));
    for (dim t = 4; t < 6; ++t) {
      std::vector<float> one(k.begin() + t * 10, k.begin() + t * 10 + 10), value(v.begin() + t * 6, v.begin() + t * 6 + 6);
      one.insert(one.end(), k.begin() + (6 + t) * 10, k.begin() + (7 + t) * 10);
      value.insert(value.end(), v.begin() + (6 + t) * 6, v.begin() + (7 + t) * 6);
      steps.cache.append_each(on(), matrix(one, 2), matrix(value, 2));
    }
    const auto same = [](const auto& a, const auto& b) {
      return std::equal(a.data, a.data + a.rows * a.cols, b.data, b.data + b.rows * b.cols);
    };
    CHECK(same(whole.cache.k, steps.cache.k));
    CHECK(same(whole.cache.v, steps.cache.v));
    for (dim s = 0; s < 2; ++s)
      for (dim a = 0; a < 2; ++a) {
        for (dim b = 0; b < 2; ++b)
          for (dim j = 0; j < 5; ++j) CHECK(whole.cache.centroids_of(s, a)(b, j) == steps.cache.centroids_of(s, a)(b, j));
      }
  }
  TEST_CASE_TEMPLATE("keys of a block lie side by side, a line after the other, and what is not there yet is zero", T, float,
                     bf16, f16, std::int8_t) {
    constexpr dim n = std::same_as<T, std::int8_t> ? 4 : std::same_as<T, bf16> ? 2 : 1;
    const moe::attention_heads wide{.heads = 1, .kv_heads = 1, .d = 8, .dv = 8};
    filled<T> f({wide, 1, 40, 0});
    for (std::byte& b : f.memory.bytes()) b = std::byte{0x55};
    f.cache.lengths[0] = 0;
    std::vector<float> k(19 * 8), v(19 * 8);
    for (std::size_t i = 0; i < k.size(); ++i) {
      k[i] = i % 8 == 0 ? 127.f : static_cast<float>(i % 101);  // of bytes the scale is 1
      v[i] = i % 8 == 0 ? 127.f : static_cast<float>(i % 89);
    }
    f.cache.append_to(on(), 0, matrix(k, 19).slice(0, 5), matrix(v, 19).slice(0, 5));
    f.cache.append_to(on(), 0, matrix(k, 19).slice(5, 14), matrix(v, 19).slice(5, 14));
    for (dim t = 0; t < 32; ++t)
      for (dim j = 0; j < 32; ++j) {
        const dim block = t / 16 * 16 * 32, line = j / n * 16 * n;
        const bool there = t < 19 && j < 8;
        const T* values = f.cache.v.data;
        const T value = std::same_as<T, std::int8_t> ? values[t / 4 * 4 * 32 + j * 4 + t % 4] : values[t * 32 + j];
        CHECK(static_cast<float>(f.cache.k.data[block + line + t % 16 * n + j % n]) ==
              (there ? k[static_cast<std::size_t>(t * 8 + j)] : 0.f));
        CHECK(static_cast<float>(value) == (there ? v[static_cast<std::size_t>(t * 8 + j)] : 0.f));
      }
    std::vector<float> rows(3 * 8), halves(3 * 8);
    f.cache.read_keys(0, 0, 15, matrix(rows, 3));
    f.cache.read_values(0, 0, 15, matrix(halves, 3));
    CHECK(std::equal(rows.begin(), rows.end(), k.begin() + 15 * 8));
    CHECK(std::equal(halves.begin(), halves.end(), v.begin() + 15 * 8));
  }
  TEST_CASE("centroids are means of full blocks and sums of the open one") {
    filled<float> f({heads, 1, 8, 3});
    std::vector<float> k = testing::integers(8 * 10, 1, 8), v(8 * 6);
    f.cache.append_to(on(), 0, matrix(k, 8).slice(0, 5), matrix(v, 8).slice(0, 5));
    const auto sum = [&](dim a, dim first, dim last, dim j) {
      float total = 0;
      for (dim t = first; t < last; ++t) total += k[static_cast<std::size_t>(t * 10 + a * 5 + j)];
      return total;
    };
    std::vector<float> open(5);
    f.cache.centroid(0, 1, 1, open.data());
    for (dim j = 0; j < 5; ++j) {
      CHECK(f.cache.centroids_of(0, 1)(0, j) == sum(1, 0, 3, j) / 3);
      CHECK(f.cache.centroids_of(0, 1)(1, j) == sum(1, 3, 5, j));
      CHECK(open[static_cast<std::size_t>(j)] == sum(1, 3, 5, j) / 2);
    }
    f.cache.truncate(0, 2);  // the first block opens again
    f.cache.append_to(on(), 0, matrix(k, 8).slice(2, 6), matrix(v, 8).slice(2, 6));
    for (dim j = 0; j < 5; ++j) {
      CHECK(f.cache.centroids_of(0, 1)(0, j) == sum(1, 0, 3, j) / 3);
      CHECK(f.cache.centroids_of(0, 1)(2, j) == sum(1, 6, 8, j));
    }
    f.cache.reset(0);
    CHECK(f.cache.length(0) == 0);
  }
  TEST_CASE("a row that is not finite has a scale of NaN, and a row of zeros stays zero") {
    filled<std::int8_t> f({heads, 1, 4, 0});
    std::vector<float> k(3 * 10), v(3 * 6, 1.f);
    k[3] = std::numeric_limits<float>::infinity();
    k[11] = std::numeric_limits<float>::quiet_NaN();
    f.cache.append_to(on(), 0, matrix(k, 3), matrix(v, 3));
    CHECK(std::isnan(f.cache.key_scales(0, 0)[0]));
    CHECK(std::isnan(f.cache.key_scales(0, 0)[1]));
    CHECK(f.cache.key_scales(0, 0)[2] == 0);
    CHECK(f.cache.key_scales(0, 1)[0] == 0);
    CHECK(f.cache.value_scales(0, 0)[2] == 1.f / 127);
  }
  TEST_CASE("memory is what the header says") {
    const moe::attention_heads h{.heads = 4, .kv_heads = 2, .d = 64, .dv = 32};
    constexpr std::size_t S = 2, N = 128, rows = S * 2 * N, lengths = S * sizeof(idx);
    const auto bytes = [&](auto element, dim block) {
      moe::arena count;
      (void)moe::kv_cache<decltype(element)>::make({h, S, N, block}, count);
      return count.used();
    };
    CHECK(bytes(bf16{}, 0) == rows * (64 + 32) * 2 + lengths);
    CHECK(bytes(std::int8_t{}, 0) == rows * (64 + 32) + 8 * rows + lengths);
    moe::arena count;
    (void)moe::kv_cache<float>::make({h, S, N - 15, 0}, count);
    CHECK(count.used() == rows * (64 + 32) * 4 + lengths);  // whole blocks of 16 tokens
    CHECK(bytes(float{}, 16) == rows * (64 + 32) * 4 + 4 * (S * 2 * 64 * (N / 16)) + lengths);
  }
  TEST_CASE("what does not fit is refused before anything is written") {
    filled<float> f({heads, 2, 4, 0});
    std::vector<float> k = normals(6 * 10, 1), v(6 * 6);
    const std::vector<idx> offsets{0, 1, 6};
    CHECK_THROWS_WITH_AS(f.cache.append(on(), {offsets, {}}, matrix(k, 6), matrix(v, 6)),
                         "kv_cache: sequence 1 holds 0 tokens and 5 come, expected at most 4 (N)", moe::shape_error);
    CHECK(f.cache.length(0) == 0);
    CHECK(f.cache.k(0, 0) == 0);
    CHECK_THROWS_WITH_AS(f.cache.append_to(on(), 2, matrix(k, 6), matrix(v, 6)),
                         "kv_cache::append_to: s is 2, expected below 2 (S)", moe::shape_error);
    CHECK_THROWS_WITH_AS(f.cache.append_each(on(), matrix(k, 6), matrix(v, 6)),
                         "kv_cache::append_each: k has 6 rows, expected 2 (S)", moe::shape_error);
    CHECK_THROWS_WITH_AS(f.cache.append_to(on(), 0, matrix(v, 6), matrix(v, 6)),
                         "kv_cache: k is 6 x 6, expected 6 x 10 (T x h_kv*d)", moe::shape_error);
    CHECK_THROWS_WITH_AS(f.cache.truncate(0, 1), "kv_cache::truncate: n is 1, expected at most 0 (the length of sequence 0)",
                         moe::shape_error);
    CHECK_THROWS_AS((moe::kv_cache_shape{heads, 0, 4, 0}.check()), moe::shape_error);
    CHECK_THROWS_AS((moe::kv_cache_shape{heads, 1, 0, 0}.check()), moe::shape_error);
    CHECK_THROWS_AS((moe::kv_cache_shape{heads, 1, 1, -1}.check()), moe::shape_error);
    CHECK_NOTHROW((moe::kv_cache_shape{heads, 1, 1, 0}.check()));
  }
}

TEST_SUITE("attention/select_blocks") {
  TEST_CASE("the own block is always taken and counted, the lower of equal ones wins, fewer leave -1") {
    const moe::attention_heads two{.heads = 2, .kv_heads = 1, .d = 1, .dv = 1};
    filled<float> f({two, 1, 12, 2});
    std::vector<float> k{1, 1, 5, 5, 1, 1, 5, 5, -9, -9, 0}, v(11), q{1, -1};  // block means 1 5 1 5 -9, own block 0
    f.cache.append_to(on(), 0, matrix(k, 11), matrix(v, 11));
    const auto chosen = [&](dim columns) {
      std::vector<idx> b(static_cast<std::size_t>(2 * columns));
      moe::select_blocks(on(), f.cache, matrix(q, 1), matrix_view<idx>{b.data(), 2, columns});
      return b;
    };
    CHECK(chosen(1) == std::vector<idx>{5, 5});
    CHECK(chosen(2) == std::vector<idx>{1, 5, 4, 5});
    CHECK(chosen(4) == std::vector<idx>{0, 1, 3, 5, 0, 2, 4, 5});
    CHECK(chosen(7) == std::vector<idx>{0, 1, 2, 3, 4, 5, -1, 0, 1, 2, 3, 4, 5, -1});
    f.cache.truncate(0, 3);
    CHECK(chosen(3) == std::vector<idx>{0, 1, -1, 0, 1, -1});
    f.cache.reset(0);
    CHECK(chosen(2) == std::vector<idx>{-1, -1, -1, -1});
  }
  TEST_CASE("token by token, decoding gives the rows of the layer of blocks over the whole text") {
    constexpr dim N = 23, d = 5, block = 4, n = 6;
    const moe::attention_heads one{.heads = 1, .kv_heads = 1, .d = d, .dv = d};
    std::vector<float> k = normals(N * d, 1), v = normals(N * d, 2), q = normals(N * d, 3), y(N * d);
    const moe::moba<3, backend> layer({.tokens = N, .d = d, .experts = n}, moe::block_mean_gate{block},
                                      moe::kv_block_expert{block});
    moe::buffer work(layer.inference_context_bytes(N) + layer.scratch_bytes(N));
    moe::arena mem(work.bytes());
    auto ctx = layer.make_inference_context(N, mem);
    const moe::attention_input x{matrix(q, N), matrix(k, N), matrix(v, N)};
    layer.forward({}, x, matrix(y, N), ctx, mem);

    filled<float> f({one, 1, N, block});
    for (dim t = 0; t < N; ++t) {
      f.cache.append_to(on(), 0, matrix(k, N).slice(t, 1), matrix(v, N).slice(t, 1));
      std::vector<float> o(d);
      std::vector<idx> chosen(3);
      const matrix_view<idx> blocks{chosen.data(), 1, 3};
      moe::select_blocks(on(), f.cache, matrix(q, N).slice(t, 1), blocks);
      moe::decode(on(), f.cache, matrix(q, N).slice(t, 1), matrix(o, 1), {}, {.blocks = blocks});
      for (dim j = 0; j < d; ++j)
        CHECK(std::fabs(o[static_cast<std::size_t>(j)] - y[static_cast<std::size_t>(t * d + j)]) < 1e-6);
    }
  }
  TEST_CASE("a cache without blocks and tables that do not fit are refused") {
    filled<float> f({heads, 1, 4, 0}), g({heads, 1, 4, 2});
    std::vector<float> q(20);
    std::vector<idx> b(8);
    CHECK_THROWS_WITH_AS(moe::select_blocks(on(), f.cache, matrix(q, 1), matrix_view<idx>{b.data(), 4, 2}),
                         "select_blocks: the cache was made without blocks (block = 0)", moe::shape_error);
    CHECK_THROWS_AS(moe::select_blocks(on(), g.cache, matrix(q, 1), matrix_view<idx>{b.data(), 2, 2}), moe::shape_error);
    CHECK_THROWS_AS(moe::select_blocks(on(), g.cache, matrix(q, 1), matrix_view<idx>{b.data(), 4, 0}), moe::shape_error);
  }
}

TEST_SUITE("backend/host_decode") {
  TEST_CASE("every unit is taken once, a thread's own range in order and first, whoever comes and whoever does not") {
    for (const dim units : {1, 7, 1000})
      for (const dim threads : {1, 2, 7, 200})
        for (const dim present : {dim{1}, threads}) {
          moe::detail::unit_ranges ranges(units, threads);
          std::vector<int> taken(static_cast<std::size_t>(units));
          for (dim thread = 0; thread < present; ++thread) {
            dim before = -1, end = -1;
            ranges.take(thread, [&](dim n, dim last) {
              CHECK(n < last);
              CHECK(last <= units);
              if (last == end) CHECK(n == before + 1);
              else if (end < 0 && threads <= units && threads <= 64) CHECK(n == units * thread / threads);
              before = n;
              end = last;
              ++taken[static_cast<std::size_t>(n)];
            });
          }
          CHECK(taken == std::vector<int>(static_cast<std::size_t>(units), 1));
        }
  }
  TEST_CASE("a step takes one join, and a sequence without keys gets zeros and -inf") {
    filled<float> f({heads, 2, 1100});
    std::vector<float> k = normals(1100 * 10, 1), v = normals(1100 * 6, 2), q = normals(2 * 20, 3);
    f.cache.append_to(on(), 1, matrix(k, 1100), matrix(v, 1100));
    dim joins = 0;
    const moe::scalar<testing::counting> host(testing::counting{&joins});
    moe::arena count;
    moe::make_decode_scratch(f.sizes, 0, count);
    moe::buffer memory(moe::padded(count));
    moe::arena scratch(memory.bytes());
    std::vector<float> o(2 * 12, 7.f), lse(2 * 4, 7.f);
    moe::decode(moe::call<moe::scalar<testing::counting>>{host, scratch, {}}, f.cache, matrix(q, 2), matrix(o, 2),
                matrix(lse, 2));
    CHECK(joins == 1);
    for (std::size_t i = 0; i < 12; ++i) CHECK(o[i] == 0);
    for (std::size_t i = 0; i < 4; ++i) CHECK(lse[i] == -std::numeric_limits<float>::infinity());
    for (std::size_t i = 12; i < 24; ++i) CHECK(std::fabs(o[i]) < 1);
    for (std::size_t i = 4; i < 8; ++i) CHECK(lse[i] > 6);
  }
  TEST_CASE("scratch is that of the queries and of most units of a step: chunks of 512 keys, or k blocks for each head") {
    const moe::kv_cache_shape s{{.heads = 12, .kv_heads = 2, .d = 40, .dv = 72}, 3, 1100, 32};
    const auto bytes = [](auto carve) {
      moe::arena count;
      carve(count);
      return static_cast<dim>(count.peak());
    };
    constexpr dim group = 6, padded_group = 8, d = 64, dv = 96, queries = 3 * 12, key_heads = 3 * 2, lost = 9 * 64 * 4;
    for (const dim k : {0, 4}) {
      const dim units = k > 0 ? queries * k : key_heads * (3 + 1);
      const dim wanted = 4 * units * (3 + group + padded_group * (dv + 2)) + queries * (4 * d + 4 * d) + 4 * (2 * key_heads + 1);
      const dim got = bytes([&](moe::arena& mem) { moe::make_decode_scratch(s, k, mem); });
      CHECK(got >= wanted);
      CHECK(got <= wanted + lost);  // between tensors, each of which begins at a multiple of 64 elements
    }
    const dim chosen = bytes([&](moe::arena& mem) { (void)moe::make_select_blocks_scratch(s, mem); });
    CHECK(chosen >= 4 * queries * (40 + 35));
    CHECK(chosen <= 4 * queries * (40 + 35) + 2 * 64 * 4);
  }
}
