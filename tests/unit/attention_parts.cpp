// SPDX-License-Identifier: Apache-2.0
// The small parts of attention: heads, rotation, normalisation, key convolution.
#include <doctest/doctest.h>

#include "moe/attention/key_convolution.hpp"
#include "moe/attention/rotary.hpp"
#include "moe/backend/scalar.hpp"
#include "moe/norm/rms_norm.hpp"
#include "support/executors.hpp"
#include "support/reference.hpp"
#include "support/testing.hpp"

namespace {

using moe::bf16, moe::dim, moe::idx, moe::matrix_view, moe::packed_sequences;
using testing::normals;
using backend = moe::scalar<>;

matrix_view<float> matrix(std::vector<float>& v, dim rows) { return {v.data(), rows, static_cast<dim>(v.size()) / rows}; }
moe::call<backend> on() { return testing::on<backend>(); }

std::vector<float> widened(const std::vector<bf16>& v) {
  std::vector<float> w;
  for (const bf16 x : v) w.push_back(static_cast<float>(x));
  return w;
}
std::vector<bf16> rounded(const std::vector<float>& v) {
  std::vector<bf16> r;
  for (const float x : v) r.push_back(bf16(x));
  return r;
}
reference::vec doubles(const std::vector<float>& v) { return {v.begin(), v.end()}; }
double inner(const reference::vec& a, const std::vector<float>& b) {
  double sum = 0;
  for (std::size_t i = 0; i < a.size(); ++i) sum += a[i] * b[i];
  return sum;
}

/// Where token t of packed sequences stands, by counting.
dim place(const std::vector<idx>& offsets, dim t) {
  dim n = 0;
  for (dim i = 0; i < t; ++i) {
    ++n;
    for (const idx o : offsets) n = o == i + 1 ? 0 : n;
  }
  return n;
}

// Rotation as a product of complex numbers.
reference::vec rotate(reference::vec x, dim T, dim heads, dim d, dim R, double base, bool half,
                      const std::vector<idx>& offsets, dim shift) {
  for (dim t = 0; t < T; ++t)
    for (dim a = 0; a < heads; ++a)
      for (dim i = 0; i < R / 2; ++i) {
        const double angle = static_cast<double>(place(offsets, t) + shift) *
                             std::pow(base, -2.0 * static_cast<double>(i) / static_cast<double>(R));
        const dim row = (t * heads + a) * d;
        double& p = x[static_cast<std::size_t>(row + (half ? i : 2 * i))];
        double& q = x[static_cast<std::size_t>(row + (half ? i + R / 2 : 2 * i + 1))];
        const double turned = p * std::cos(angle) - q * std::sin(angle);
        q = p * std::sin(angle) + q * std::cos(angle);
        p = turned;
      }
  return x;
}

reference::vec normalise(const reference::vec& x, const reference::vec& weight, double epsilon) {
  const std::size_t d = weight.size();
  reference::vec y(x.size());
  for (std::size_t r = 0; r < x.size() / d; ++r) {
    double square = 0;
    for (std::size_t j = 0; j < d; ++j) square += x[r * d + j] * x[r * d + j];
    for (std::size_t j = 0; j < d; ++j)
      y[r * d + j] = weight[j] * x[r * d + j] / std::sqrt(square / static_cast<double>(d) + epsilon);
  }
  return y;
}

/// k[T,c], w[W,c]
reference::vec convolve(const reference::vec& k, const reference::vec& w, dim W, dim T, const std::vector<idx>& offsets) {
  const dim c = static_cast<dim>(w.size()) / W;
  reference::vec to = k;
  for (dim t = 0; t < T; ++t)
    for (dim j = 0; j < c; ++j) {
      double z = 0;
      for (dim l = 0; l < W && l <= place(offsets, t); ++l)
        z += w[static_cast<std::size_t>(l * c + j)] * k[static_cast<std::size_t>((t - l) * c + j)];
      to[static_cast<std::size_t>(t * c + j)] += z / (1 + std::exp(-z));
    }
  return to;
}

}  // namespace

TEST_SUITE("attention/heads") {
  TEST_CASE("sizes that cannot be heads are refused with their name") {
    const auto refused = [](moe::attention_heads h, const char* why) {
      CHECK_THROWS_WITH_AS(h.check(), why, moe::shape_error);
    };
    refused({6, 4, 8, 8}, "attention_heads: heads is 6, expected a multiple of 4 (kv_heads)");
    refused({0, 1, 8, 8}, "attention_heads: heads is 0, expected at least 1");
    refused({4, -1, 8, 8}, "attention_heads: kv_heads is -1, expected at least 1");
    refused({4, 2, 0, 8}, "attention_heads: d is 0, expected at least 1");
    refused({4, 2, 8, 0}, "attention_heads: dv is 0, expected at least 1");
    CHECK_NOTHROW(moe::attention_heads{6, 3, 1, 7}.check());
    CHECK(moe::attention_heads{6, 3, 1, 7}.key_head(3) == 1);
  }
  TEST_CASE("a stack shows each head of token-major rows") {
    std::vector<float> x(2 * 6);
    for (std::size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(i);
    const auto heads = moe::split_heads(matrix(x, 2), 3);
    CHECK(heads[2](1, 1) == 11);
    CHECK(heads[1].cols == 2);
    const moe::grouped_heads<float> groups{{x.data(), 2, 1, 6}, 2, 1, 3};  // groups of two, a column after each
    CHECK(groups[1](0, 0) == 1);
    CHECK(groups[2](0, 0) == 3);
    CHECK(groups[3](1, 0) == 10);
  }
  TEST_CASE("positions restart at each sequence and go on where a sequence does") {
    const std::vector<idx> offsets{0, 2, 2, 5}, past{7, 9, 3};
    const packed_sequences fresh{offsets, {}}, goes_on{offsets, past};
    const dim expected[] = {0, 1, 0, 1, 2}, later[] = {7, 8, 3, 4, 5}, owner[] = {0, 0, 2, 2, 2};
    for (dim t = 0; t < 5; ++t) {
      CHECK(fresh.position(t) == expected[t]);
      CHECK(goes_on.position(t) == later[t]);
      CHECK(fresh.sequence(t) == owner[t]);
    }
    CHECK(packed_sequences{}.position(4) == 4);
    CHECK(packed_sequences{}.last(0, 6) == 6);
    CHECK(packed_sequences{{}, {past.data(), 1}}.position(4) == 11);
  }
  TEST_CASE("offsets that do not ascend from 0 to T are refused") {
    const auto refused = [](std::vector<idx> offsets, const char* why) {
      CHECK_THROWS_WITH_AS((packed_sequences{offsets, {}}.check(5, "x")), why, moe::shape_error);
    };
    refused({1, 5}, "x: offsets start at 1, expected to ascend from 0 to 5 (T)");
    refused({0, 3, 2, 5}, "x: offsets fall from 3 to 2, expected to ascend from 0 to 5 (T)");
    refused({0, 4}, "x: offsets end at 4, expected to ascend from 0 to 5 (T)");
    refused({0}, "x: offsets hold one number, expected to ascend from 0 to 5 (T)");
    const std::vector<idx> past{1, 2}, offsets{0, 5};
    CHECK_THROWS_WITH_AS((packed_sequences{offsets, past}.check(5, "x")), "x: past has 2 lengths, expected 1 (S)",
                         moe::shape_error);
    CHECK_NOTHROW(packed_sequences{offsets, {}}.check(5, "x"));
  }
}

TEST_SUITE("attention/rotary") {
  TEST_CASE_TEMPLATE("every pair of channels turns by the angle of its position", Pairs, moe::half_split_pairs,
                     moe::interleaved_pairs) {
    constexpr dim T = 7, heads = 3, d = 10;
    const std::vector<idx> offsets{0, 3, 3, 7}, past{100, 100, 100};
    for (const dim width : {0, 6})
      for (const bool later : {false, true}) {
        const moe::rotary<Pairs> rope{.base = 50, .width = width};
        moe::buffer memory(1 << 16);
        moe::arena mem(memory.bytes());
        const auto table = rope.make_table(104, d, mem);
        const packed_sequences s{offsets, later ? std::span<const idx>(past) : std::span<const idx>()};
        std::vector<float> x = normals(T * heads * d, 1);
        const auto expected = rotate(doubles(x), T, heads, d, width ? width : d, 50,
                                     std::is_same_v<Pairs, moe::half_split_pairs>, offsets, later ? 100 : 0);
        const std::vector<float> before = x;
        rope.check(d);
        rope.check(table, s, T);
        rope.forward(on(), table, moe::split_heads(matrix(x, T), heads), heads, s);
        CHECK(reference::error(x, expected) < 1e-6);
        CHECK(x != before);
        rope.backward(on(), table, moe::split_heads(matrix(x, T), heads), heads, s);
        CHECK(reference::error(x, doubles(before)) < 1e-6);
      }
  }
  TEST_CASE("a product of two turned rows depends on their distance alone") {
    const moe::rotary<> rope{};
    moe::buffer memory(1 << 20);
    moe::arena mem(memory.bytes());
    const auto table = rope.make_table(2000, 16, mem);
    const std::vector<float> q = normals(16, 3), k = normals(16, 4);
    const auto product = [&](dim i, dim j) {
      std::vector<float> a = q, b = k;
      moe::rotary<>::turn(table, i, 1.f, a.data());
      moe::rotary<>::turn(table, j, 1.f, b.data());
      return inner(doubles(a), b);
    };
    CHECK(product(1990, 1983) == doctest::Approx(product(7, 0)).epsilon(1e-4));
    CHECK(std::fabs(product(8, 0) - product(7, 0)) > 1e-2);
  }
  TEST_CASE("angles are exact far out, and halves turn like floats") {
    const moe::rotary<> rope{};
    moe::buffer memory(std::size_t{1} << 26);
    moe::arena mem(memory.bytes());
    const auto table = rope.make_table(100000, 8, mem);
    CHECK(table.cosine(99999, 1) == static_cast<float>(std::cos(99999 * std::pow(10000.0, -0.25))));
    std::vector<bf16> x = rounded(normals(8, 5));
    std::vector<float> y = widened(x);
    moe::rotary<>::turn(table, 4711, 1.f, x.data());
    moe::rotary<>::turn(table, 4711, 1.f, y.data());
    CHECK(x == rounded(y));
  }
  TEST_CASE("widths, bases and tables that do not fit are refused") {
    CHECK_THROWS_WITH_AS(moe::rotary<>{.width = 12}.check(8), "rotary: width is 12, expected at most 8 (d)",
                         moe::shape_error);
    CHECK_THROWS_WITH_AS(moe::rotary<>{}.check(7), "rotary: width is 7, expected an even number", moe::shape_error);
    CHECK_THROWS_AS(moe::rotary<>{.base = 0}.check(8), moe::shape_error);
    CHECK_THROWS_AS(moe::rotary<>{.width = -2}.check(8), moe::shape_error);
    moe::buffer memory(4096);
    moe::arena mem(memory.bytes());
    const auto table = moe::rotary<>{}.make_table(8, 4, mem);
    const std::vector<idx> past{6};
    CHECK_NOTHROW(moe::rotary<>{}.check(table, {{}, past}, 2));
    CHECK_THROWS_WITH_AS(moe::rotary<>{}.check(table, {{}, past}, 3),
                         "rotary: sequence 0 has 9 positions, expected at most 8 (of the table)", moe::shape_error);
  }
}

TEST_SUITE("norm/rms_norm") {
  TEST_CASE("rows are divided by their root mean square and gradients are those of the formula") {
    for (const dim d : {1, 5, 24}) {
      constexpr dim T = 130;  // more than two blocks of the sum over tokens
      std::vector<float> x = normals(T * d, 2), weight = normals(d, 3), dy = normals(T * d, 4);
      std::vector<float> y(x.size()), dx(x.size(), 1.f), dweight(weight.size(), 1.f), inverse(T);
      const moe::rms_norm norm{};
      moe::rms_norm::weights w{weight}, dw{dweight};
      moe::rms_norm::context ctx{matrix(inverse, T)};
      norm.forward(on(), w, matrix(x, T), matrix(y, T), ctx);
      norm.backward(on(), w, matrix(x, T), ctx, matrix(dy, T), matrix(dx, T), dw);

      reference::vec vx = doubles(x), vw = doubles(weight);
      const auto loss = [&] { return inner(normalise(vx, vw, 1e-6), dy); };
      CHECK(reference::error(y, normalise(vx, vw, 1e-6)) < 1e-5);
      auto gx = reference::gradient(vx, loss), gw = reference::gradient(vw, loss);
      for (double& g : gx) g += 1;  // it adds
      for (double& g : gw) g += 1;
      CHECK(reference::error(dx, gx) < 1e-4);
      CHECK(reference::error(dweight, gw) < 1e-4);
    }
  }
  TEST_CASE("heads share one weight, and their gradients are turned in place") {
    constexpr dim T = 5, heads = 3, d = 4;
    std::vector<float> x = normals(T * heads * d, 2), weight = normals(d, 3), dy = normals(T * heads * d, 4);
    std::vector<float> y(x.size()), dx = dy, dweight(weight.size()), inverse(T * heads);
    const moe::rms_norm norm{.epsilon = 0.1f};
    moe::rms_norm::weights w{weight}, dw{dweight};
    moe::rms_norm::context ctx{matrix(inverse, T)};
    norm.forward(on(), w, moe::split_heads(matrix(x, T), heads), heads, moe::split_heads(matrix(y, T), heads), ctx);
    norm.backward_in_place(on(), w, moe::split_heads(matrix(x, T), heads), heads, ctx,
                           moe::split_heads(matrix(dx, T), heads), dw);
    reference::vec vx = doubles(x), vw = doubles(weight);
    const double epsilon = 0.1f;
    const auto loss = [&] { return inner(normalise(vx, vw, epsilon), dy); };
    CHECK(reference::error(y, normalise(vx, vw, epsilon)) < 1e-6);
    CHECK(reference::error(dx, reference::gradient(vx, loss)) < 1e-4);
    CHECK(reference::error(dweight, reference::gradient(vw, loss)) < 1e-4);
  }
  TEST_CASE("inference keeps nothing, works in place and on halves; a frozen weight has no gradient") {
    constexpr dim T = 3, d = 6;
    std::vector<bf16> x = rounded(normals(T * d, 2));
    std::vector<float> weight = normals(d, 3), y(T * d), wide = widened(x), inverse(T), dx(T * d);
    moe::rms_norm::weights w{weight}, frozen{};
    moe::rms_norm::context none{}, ctx{matrix(inverse, T)};
    const matrix_view<bf16> view{x.data(), T, d};
    moe::rms_norm{}.forward(on(), w, matrix(wide, T), matrix(y, T), ctx);
    moe::rms_norm{}.forward(on(), w, view, view, none);
    CHECK(x == rounded(y));
    moe::rms_norm{}.backward(on(), w, matrix(wide, T), ctx, matrix(y, T), matrix(dx, T), frozen);
    CHECK(inner(doubles(dx), dx) > 0);
  }
  TEST_CASE("the weight's gradient has equal bits for any executor") {
    constexpr dim T = 300, d = 40;
    std::vector<float> x = normals(T * d, 2), weight = normals(d, 3), dy = normals(T * d, 4);
    const auto run = [&](const auto& ex) {
      const moe::host_backend<moe::arch::scalar, std::remove_cvref_t<decltype(ex)>> b(ex);
      moe::buffer memory(1 << 16);
      moe::arena scratch(memory.bytes());
      const moe::call<std::remove_cvref_t<decltype(b)>> c{b, scratch, {}};
      std::vector<float> y(x.size()), dx(x.size()), dweight(weight.size()), inverse(T);
      moe::rms_norm::weights w{weight}, dw{dweight};
      moe::rms_norm::context ctx{matrix(inverse, T)};
      moe::rms_norm{}.forward(c, w, matrix(x, T), matrix(y, T), ctx);
      moe::rms_norm{}.backward(c, w, matrix(x, T), ctx, matrix(dy, T), matrix(dx, T), dw);
      dx.insert(dx.end(), dweight.begin(), dweight.end());
      return dx;
    };
    CHECK(run(moe::serial{}) == run(testing::shuffling{3}));
  }
  TEST_CASE("scratch of backward is what backward takes, and a wrong weight is refused") {
    moe::arena count;
    (void)moe::rms_norm{}.make_backward_scratch(300, 40, count);
    std::vector<float> x(300 * 40, 1.f), weight(40, 1.f), dweight(40), inverse(300, 1.f);
    moe::buffer memory(moe::padded(count));
    moe::arena scratch(memory.bytes());
    const backend b{};
    moe::rms_norm::weights w{weight}, dw{dweight};
    moe::rms_norm::context ctx{matrix(inverse, 300)};
    moe::rms_norm{}.backward(moe::call<backend>{b, scratch, {}}, w, matrix(x, 300), ctx, matrix(x, 300), {}, dw);
    CHECK(scratch.peak() <= count.peak());
    CHECK(dweight[39] == 300);
    CHECK_THROWS_WITH_AS(moe::rms_norm{}.check(w, 41), "rms_norm: weight has 40 elements, expected 41 (d)",
                         moe::shape_error);
  }
}

TEST_SUITE("attention/key_convolution") {
  TEST_CASE_TEMPLATE("keys and gradients are those of the formula, and nothing passes from sequence to sequence", W,
                     std::integral_constant<int, 3>, std::integral_constant<int, 5>) {
    constexpr dim T = 9, c = 6;
    const std::vector<idx> offsets{0, 2, 9};
    const packed_sequences s{offsets, {}};
    std::vector<float> k = normals(T * c, 1), weight = normals(W::value * c, 2), dto = normals(T * c, 3);
    std::vector<float> to(k.size()), dk(k.size(), 1.f), dweight(weight.size(), 1.f);
    const moe::key_convolution<W::value> conv{};
    const typename moe::key_convolution<W::value>::weights w{matrix(weight, W::value)};
    auto dw = w;
    dw.w = matrix(dweight, W::value);
    conv.check(w, c);
    conv.forward(on(), w, matrix(k, T), s, matrix(to, T));
    conv.backward(on(), w, matrix(k, T), s, matrix(dto, T), matrix(dk, T), dw);

    reference::vec vk = doubles(k), vw = doubles(weight);
    const auto loss = [&] { return inner(convolve(vk, vw, W::value, T, offsets), dto); };
    CHECK(reference::error(to, convolve(vk, vw, W::value, T, offsets)) < 1e-6);
    auto gk = reference::gradient(vk, loss), gw = reference::gradient(vw, loss);
    for (double& g : gk) g += 1;  // it adds
    for (double& g : gw) g += 1;
    CHECK(reference::error(dk, gk) < 1e-4);
    CHECK(reference::error(dweight, gw) < 1e-4);
  }
  TEST_CASE_TEMPLATE("without weights keys stay as they are, and a key reaches itself and the next W - 1", W,
                     std::integral_constant<int, 3>, std::integral_constant<int, 5>) {
    constexpr dim T = 9, at = 2;
    using convolution = moe::key_convolution<W::value>;
    std::vector<float> k(T), weight(W::value), to(T, -1.f), dk(T), dweight(W::value);
    k[at] = 1;
    typename convolution::weights w{matrix(weight, W::value)}, dw{matrix(dweight, W::value)};
    convolution{}.forward(on(), w, matrix(k, T), {}, matrix(to, T));
    CHECK(to == k);
    for (std::size_t l = 0; l < weight.size(); ++l) weight[l] = static_cast<float>(l + 1);
    convolution{}.forward(on(), w, matrix(k, T), {}, matrix(to, T));
    for (dim t = 0; t < T; ++t) {
      const double z = t >= at && t < at + W::value ? static_cast<double>(t - at + 1) : 0;
      CHECK(to[static_cast<std::size_t>(t)] == doctest::Approx((t == at ? 1 : 0) + z / (1 + std::exp(-z))));
    }
    // Backward from token 7 alone: to itself and the W - 1 keys before, which are zeros, where the slope of silu is 1/2.
    std::fill(k.begin(), k.end(), 0.f);
    std::vector<float> dto(T);
    dto[7] = 1;
    convolution{}.backward(on(), w, matrix(k, T), {}, matrix(dto, T), matrix(dk, T), dw);
    for (dim t = 0; t < T; ++t) {
      const dim l = 7 - t;
      CHECK(dk[static_cast<std::size_t>(t)] ==
            (l == 0 ? 1.f : 0.f) + (l >= 0 && l < W::value ? static_cast<float>(l + 1) / 2 : 0.f));
    }
  }
  TEST_CASE_TEMPLATE("pieces and single steps give the same bits as whole sequences", T, float, bf16) {
    constexpr dim n = 11, c = 4, S = 2;  // two sequences of 11 and 7
    const moe::key_convolution<5> conv{};
    std::vector<float> weight = normals(5 * c, 2);
    const moe::key_convolution<5>::weights w{matrix(weight, 5)};
    std::vector<T> k;
    for (const float v : normals((n + 7) * c, 1)) k.push_back(T(v));
    std::vector<float> whole(k.size()), pieces(k.size());
    const std::vector<idx> offsets{0, n, n + 7};
    conv.forward(on(), w, matrix_view<const T>{k.data(), n + 7, c}, {offsets, {}}, matrix(whole, n + 7));

    moe::buffer memory(4096);
    moe::arena mem(memory.bytes());
    const auto past = conv.template make_tail<T>(S, c, mem);
    dim done[] = {0, 0};
    const dim lengths[] = {n, 7}, steps[][2] = {{1, 0}, {2, 3}, {1, 1}, {6, 1}, {0, 1}, {1, 1}};
    for (const auto& step : steps) {
      std::vector<T> in;
      std::vector<idx> piece{0};
      for (std::size_t s = 0; s < S; ++s) {
        const dim first = (s ? n : 0) + done[s];
        in.insert(in.end(), k.begin() + first * c, k.begin() + (first + step[s]) * c);
        piece.push_back(static_cast<idx>(piece.back() + step[s]));
      }
      std::vector<float> out(in.size());
      conv.forward(on(), w, matrix_view<T>{in.data(), piece.back(), c}, {piece, {}}, matrix(out, piece.back()), past);
      for (std::size_t s = 0; s < S; ++s) {
        std::copy(out.begin() + piece[s] * c, out.begin() + piece[s + 1] * c, pieces.begin() + ((s ? n : 0) + done[s]) * c);
        done[s] += step[s];
      }
    }
    REQUIRE(done[0] == lengths[0]);
    REQUIRE(done[1] == lengths[1]);
    CHECK(pieces == whole);

    conv.reset(past, 0);
    for (dim i = 0; i < 4; ++i) CHECK(static_cast<float>(past.k(i, 0)) == 0);
    CHECK(static_cast<float>(past.k(7, 0)) == static_cast<float>(k[static_cast<std::size_t>((n + 6) * c)]));
  }
  TEST_CASE("scratch of backward is what backward takes, and wrong weights are refused") {
    constexpr dim T = 100, c = 8;
    moe::arena count;
    (void)moe::key_convolution<3>{}.make_backward_scratch(T, c, count);
    moe::buffer memory(moe::padded(count));
    moe::arena scratch(memory.bytes());
    std::vector<float> k = normals(T * c, 1), dk(T * c), weight(3 * c), dweight(3 * c);
    moe::key_convolution<3>::weights w{matrix(weight, 3)}, dw{matrix(dweight, 3)};
    const backend b{};
    moe::key_convolution<3>{}.backward(moe::call<backend>{b, scratch, {}}, w, matrix(k, T), {}, matrix(k, T), matrix(dk, T),
                                       dw);
    CHECK(scratch.peak() <= count.peak());
    CHECK(dk == k);  // w = 0: the slope of silu meets no weight
    CHECK(dweight[0] > 0);
    CHECK_THROWS_WITH_AS(moe::key_convolution<3>{}.check(w, 9), "key_convolution: w is 3 x 8, expected 3 x 9 (W x h_kv*d)",
                         moe::shape_error);
  }
}
