// SPDX-License-Identifier: Apache-2.0
// A layer of attention whose queries, keys and values are rounded to bf16.
#include <doctest/doctest.h>

#include "moe/backend/cpu.hpp"
#include "moe/moe.hpp"
#include "support/attention_trial.hpp"
#include "support/emulated_tiles.hpp"
#include "support/levels.hpp"

#if defined(MOE_X86)

namespace moe::arch {

/// The level with tiles, its tile instructions in plain C++.
struct layer_tiles_by_hand : native {};
inline attention_kernels attention_kernels_of(layer_tiles_by_hand) noexcept {
  return detail::attention_on_tiles<moe::detail::build_level, testing::emulated_tiles>();
}

}  // namespace moe::arch

#endif

namespace {

using moe::bf16, moe::dim, moe::idx;

struct bare : moe::attention_features {};
struct bare_blocks : bare {
  using selection = moe::block_attention;
};
struct published : moe::attention_features {
  using rotary = moe::rotary<>;
  using output_gate = moe::output_gate<moe::elementwise>;
  template <class Gate>
  using projection = moe::grouped_projection<Gate>;
  static constexpr bool normalises_heads = true, biased = true;
};
struct turned : moe::attention_features {
  using rotary = moe::rotary<>;
};
struct convolved : turned {
  using key_convolution = moe::key_convolution<3>;
};
struct every_gate : moe::attention_features {
  using rotary = moe::rotary<>;
  using output_gate = moe::output_gate<moe::headwise>;
  using query_gate = moe::output_gate<moe::elementwise>;
  using key_gate = moe::output_gate<moe::elementwise>;
  using value_gate = moe::output_gate<moe::headwise>;
  using layer_gate = moe::output_gate<moe::elementwise>;
};
struct everything : every_gate {
  using key_convolution = moe::key_convolution<3>;
  static constexpr bool normalises_heads = true;
};
struct sum_gate : moe::attention_features {
  using output_gate = moe::output_gate<moe::elementwise, moe::silu, moe::additive>;
};
/// The same, rounded.
template <class C>
struct halves : C {
  using element = bf16;
};

constexpr dim d = 24, T = 200;
constexpr moe::attention_heads heads{.heads = 4, .kv_heads = 2, .d = 32, .dv = 40};
const std::vector<idx> offsets{0, 63, 63, T};

#if defined(MOE_X86)
bool has_512() { return moe::includes(testing::highest_level(), moe::cpu_level::avx512); }
#endif

double size(const std::vector<double>& v) {
  double squares = 0;
  for (const double x : v) squares += x * x;
  return std::sqrt(squares);
}
/// |a - b| / |b|
template <class A, class B>
double distance(const A& a, const B& b) {
  std::vector<double> off(b.size()), all(b.size());
  for (std::size_t i = 0; i < b.size(); ++i) {
    all[i] = static_cast<double>(b[i]);
    off[i] = static_cast<double>(a[i]) - all[i];
  }
  return size(off) / size(all);
}

/// A layer and all that it gives.
template <class C, class B = moe::cpu<>>
struct trial {
  using layer = moe::self_attention<C, B>;
  layer net;
  moe::buffer params, grads, work, angles;
  typename layer::weights w;
  typename layer::gradients dw;
  typename layer::context ctx;
  std::vector<float> x = testing::normals(T * d, 7), y = std::vector<float>(T * d), dy = testing::normals(T * d, 8),
                     dx = std::vector<float>(T * d);

  template <class... Parts>
  explicit trial(const Parts&... parts)
      : net(d, heads, parts...),
        params(net.weight_bytes()),
        grads(net.weight_bytes()),
        work(net.context_bytes(T) + net.scratch_bytes(T, 3)),
        angles(1 << 16) {
    moe::arena p(params.bytes()), g(grads.bytes()), a(angles.bytes()), mem(work.bytes());
    w = net.make_weights(p);
    for (const moe::slot& s : net.catalogue()) {  // products of about the size of x
      const auto random = testing::normals(s.rows * s.cols, 3 + s.offset);
      for (std::size_t i = 0; i < random.size(); ++i)
        params.template as<float>()[s.offset / sizeof(float) + i] = random[i] * 0.25f;
    }
    dw = net.make_gradients(g);
    ctx = net.make_context(T, mem);
    const typename layer::input in{{x.data(), T, d}, {offsets, {}}, net.make_table(T, a)};
    net.forward(w, in, {y.data(), T, d}, ctx, mem);
    net.backward(w, in, ctx, {dy.data(), T, d}, {dx.data(), T, d}, dw, mem);
  }
  std::span<const float> gradients() const { return grads.template as<float>(); }
};

std::vector<bf16> numbers(moe::matrix_view<bf16> m) { return {m.data, m.data + m.rows * m.cols}; }
/// a^T b of rows, or a b with weights.
template <class A, class B>
std::vector<double> product(dim rows, dim inner, dim cols, A a, B b) {
  std::vector<double> r;
  for (dim i = 0; i < rows; ++i)
    for (dim j = 0; j < cols; ++j) {
      double sum = 0;
      for (dim l = 0; l < inner; ++l) sum += static_cast<double>(a(i, l)) * static_cast<double>(b(l, j));
      r.push_back(sum);
    }
  return r;
}
double largest_row(moe::matrix_view<const float> m) {
  double largest = 0;
  for (dim i = 0; i < m.rows; ++i) {
    double sum = 0;
    for (dim j = 0; j < m.cols; ++j) sum += std::fabs(static_cast<double>(m(i, j)));
    largest = std::max(largest, sum);
  }
  return largest;
}

/// Forward, and the gradients of all weights and of x, against attention by definition at the halves that the layer read.
template <class C, class B>
void check_by_definition(const trial<C, B>& t, moe::attention_mask mask, dim block, bool tiles) {
  reference::attention_shape s;
  s.h = heads.heads, s.h_kv = heads.kv_heads, s.d = heads.d, s.dv = heads.dv, s.m = s.n = T;
  s.query_offsets = s.key_offsets = offsets;
  const std::vector<bf16> q = numbers(t.ctx.q_half), k = numbers(t.ctx.k_half), v = numbers(t.ctx.v_half);
  const moe::matrix_view<const float> x(t.x.data(), T, d), dy(t.dy.data(), T, d);
  const std::vector<double> dout_exact = product(T, d, heads.output_cols(), dy, [&](dim l, dim j) { return t.w.o(l, j); });
  const std::vector<float> dout(dout_exact.begin(), dout_exact.end());
  auto seen = reference::dense_matrix(s, mask.causal, mask.window);
  if (block > 0) {
    const auto chosen = reference::block_matrix(s, block, 3, q, k);
    REQUIRE(chosen.gap > 1e-5);
    seen = chosen.seen;
  }
  const auto wanted = reference::attention(s, 1 / std::sqrt(static_cast<double>(heads.d)), seen, q, k, v, dout);
  const auto rows = [](const std::vector<double>& m) {
    return [&m, cols = static_cast<dim>(m.size()) / T](dim i, dim j) { return m[static_cast<std::size_t>(i * cols + j)]; };
  };
  const auto turned = [](auto m) { return [m](dim i, dim j) { return m(j, i); }; };

  double largest_value = 0;
  for (const bf16 value : v)
    largest_value = std::max(largest_value, std::fabs(static_cast<double>(static_cast<float>(value))));
  const auto y = product(T, heads.output_cols(), d, rows(wanted.o), turned(t.w.o));
  const double term = !tiles ? 0x1p-18 : block > 0 ? 0x1p-8 : 0x1p-9;
  CHECK(reference::worst_difference(t.y, y) < term * largest_value * largest_row(t.w.o));

  const double bound = tiles ? 0x1p-8 : 1e-5;
  CHECK(distance(t.y, y) < bound);
  const auto check = [&](const char* what, moe::matrix_view<const float> got, const std::vector<double>& exact) {
    CAPTURE(what);
    CHECK(distance(std::vector<float>(got.data, got.data + got.rows * got.cols), exact) < bound);
  };
  check("q", t.dw.q, product(heads.query_cols(), T, d, turned(rows(wanted.dq)), x));
  check("k", t.dw.k, product(heads.key_cols(), T, d, turned(rows(wanted.dk)), x));
  check("v", t.dw.v, product(heads.value_cols(), T, d, turned(rows(wanted.dv)), x));
  check("o", t.dw.o, product(d, T, heads.output_cols(), turned(dy), rows(wanted.o)));
  auto dx = product(T, heads.query_cols(), d, rows(wanted.dq), t.w.q);
  const auto of_keys = product(T, heads.key_cols(), d, rows(wanted.dk), t.w.k),
             of_values = product(T, heads.value_cols(), d, rows(wanted.dv), t.w.v);
  for (std::size_t i = 0; i < dx.size(); ++i) dx[i] += of_keys[i] + of_values[i];
  CHECK(distance(t.dx, dx) < bound);
}
template <class B>
void check_selections(bool tiles) {
  check_by_definition(trial<halves<bare>, B>(), {}, 0, tiles);
  check_by_definition(trial<halves<bare>, B>(moe::attention_mask{.window = 37}), {.window = 37}, 0, tiles);
  check_by_definition(trial<halves<bare>, B>(moe::attention_mask{.causal = false}), {.causal = false}, 0, tiles);
  check_by_definition(trial<halves<bare_blocks>, B>(moe::block_attention{.block = 32, .k = 3}), {}, 32, tiles);
  check_by_definition(trial<halves<bare_blocks>, B>(moe::block_attention{.block = 8, .k = 3}), {}, 8, tiles);
}

/// y, dx and the gradients of every weight beside those of floats; rounding has to show.
template <class C>
void check_beside_floats() {
  const trial<C> floats;
  const trial<halves<C>> rounded;
  const double off = distance(rounded.y, floats.y);
  CHECK(off < 0x1p-6);
  CHECK(off > 0x1p-14);
  CHECK(distance(rounded.dx, floats.dx) < 0x1p-6);
  for (const moe::slot& s : floats.net.catalogue()) {
    CAPTURE(s.name);
    const std::size_t first = s.offset / sizeof(float), n = static_cast<std::size_t>(s.rows * s.cols);
    CHECK(distance(rounded.gradients().subspan(first, n), floats.gradients().subspan(first, n)) < 0x1p-5);
  }
}

/// Gradients of queries and keys beside those of values, where each query sees itself alone and they are 0.
template <class C>
void check_no_gradient() {
  const trial<halves<C>> t(moe::attention_mask{.window = 1});
  const auto size_of = [](moe::matrix_view<float> m) { return size({m.data, m.data + m.rows * m.cols}); };
  CHECK(size_of(t.dw.q) < 1e-5 * size_of(t.dw.v));
  CHECK(size_of(t.dw.k) < 1e-5 * size_of(t.dw.v));
}

template <class C>
std::size_t context_bytes() {
  return moe::self_attention<C, moe::cpu<>>(d, heads).context_bytes(1024);
}
template <class C>
std::size_t scratch_bytes() {
  return moe::self_attention<C, moe::cpu<>>(d, heads).scratch_bytes(1024);
}

}  // namespace

TEST_SUITE("attention/self_attention_halves") {
  TEST_CASE("forward and all gradients equal the formulas at the rounded queries, keys and values, at every level") {
    testing::at_every_level([] { check_selections<moe::cpu<>>(testing::halves_in_use()); });
  }
#if defined(MOE_X86)
  TEST_CASE("the same on tiles in plain C++" * doctest::skip(!has_512())) {
    testing::emulated_tiles::faults = 0;
    check_selections<moe::cpu<moe::arch::layer_tiles_by_hand, moe::serial>>(true);
    CHECK(testing::emulated_tiles::faults == 0);
  }
#endif
  TEST_CASE("what is rounded is what attention over floats reads, behind gates, norm, rotation and convolution") {
    const trial<everything> floats;
    const trial<halves<everything>> rounded;
    const auto same = [](moe::matrix_view<bf16> got, moe::matrix_view<float> from) {
      dim wrong = 0;
      for (dim t = 0; t < got.rows; ++t)
        for (dim j = 0; j < got.cols; ++j) wrong += got(t, j) != bf16(from(t, j));
      CHECK(wrong == 0);
      CHECK(got.cols == from.cols);
    };
    same(rounded.ctx.q_half, floats.ctx.q);
    same(rounded.ctx.k_half, floats.ctx.k);
    same(rounded.ctx.v_half, floats.ctx.v);
  }
  TEST_CASE("results and gradients are those of floats but for rounding, for every feature, at every level") {
    testing::at_every_level([] {
      check_beside_floats<published>();
      check_beside_floats<convolved>();
      check_beside_floats<every_gate>();
      check_beside_floats<everything>();
      check_beside_floats<sum_gate>();
    });
  }
  TEST_CASE("terms of a query that sees one key cancel as their gradients are rounded, behind gates as well") {
    testing::at_every_level([] {
      check_no_gradient<bare>();
      check_no_gradient<every_gate>();
      check_no_gradient<sum_gate>();
    });
  }
  TEST_CASE("a context keeps halves, and of floats only what backward reads") {
    const auto floats = [](dim cols) { return static_cast<std::size_t>(1024 * cols) * sizeof(float); };
    const dim q = heads.query_cols(), k = heads.key_cols(), v = heads.value_cols();
    CHECK(context_bytes<bare>() - context_bytes<halves<bare>>() == floats(q + k + v) / 2);
    CHECK(context_bytes<turned>() - context_bytes<halves<turned>>() == floats(q + k + v) / 2);
    // Projected keys are kept for the convolution.
    CHECK(context_bytes<convolved>() - context_bytes<halves<convolved>>() == floats(q + k + v) / 2);
    // Queries and keys are kept as projected for the norm, the former with the logits among them.
    CHECK(context_bytes<published>() - context_bytes<halves<published>>() == floats(q + k + v) / 2);
    // Behind each gate what was projected.
    CHECK(context_bytes<every_gate>() - context_bytes<halves<every_gate>>() == floats(q + k + v) / 2);
    CHECK(scratch_bytes<halves<bare>>() < scratch_bytes<bare>());
  }
}
