// SPDX-License-Identifier: Apache-2.0
#include <doctest/doctest.h>

#include <limits>
#include <vector>

#include "support/device_layers.hpp"
#include "support/emulated_device.hpp"
#include "support/testing.hpp"

namespace {

using moe::dim;
using moe::idx;
using testing::as_device;
using testing::emulated_device;
using testing::same_bits;
namespace layers = testing::layers;

/// A layer on the emulated device with what a host model has: the same weights, x and dy.
template <class L>
struct emulated {
  L net;
  moe::buffer params, grads, memory;
  moe::device_arena params_mem, grads_mem, work;
  typename L::weights w;
  typename L::gradients dw;
  typename L::context ctx;
  std::vector<float> y, dx;

  template <class Model>
  emulated(const L& layer, Model& m)
      : net(layer), params(net.weight_bytes()), grads(net.weight_bytes()),
        memory(net.context_bytes(m.tokens) + net.scratch_bytes(m.tokens)), params_mem(as_device(params.bytes())),
        grads_mem(as_device(grads.bytes())), work(as_device(memory.bytes())), w(net.make_weights(params_mem)),
        dw(net.make_gradients(grads_mem)), ctx(net.make_context(m.tokens, work)), y(m.y.size()), dx(m.dx.size()) {
    for (std::size_t i = 0; i < m.weights().size(); ++i) params.template as<float>()[i] = m.weights()[i];
    net.forward(w, as_device(m.x_view()), as_device(moe::matrix_view<float>(y.data(), m.tokens, m.d)), ctx, work);
    net.backward(w, as_device(m.x_view()), ctx, as_device(m.dy_view()),
                 as_device(moe::matrix_view<float>(dx.data(), m.tokens, m.d)), dw, work);
    const std::vector<float> added(grads.template as<float>().begin(), grads.template as<float>().end());
    testing::spoil(net.gradient_catalogue(), grads.template as<float>());
    net.backward(w, as_device(m.x_view()), ctx, as_device(m.dy_view()), typename L::input_grad(), dw, work,
                 moe::gradient_mode::replace);
    CHECK(same_bits(grads.template as<float>(), added));
  }
};

double worst_difference(std::span<const float> a, std::span<const float> b) {
  double worst = 0, scale = 1e-30;
  for (std::size_t i = 0; i < a.size(); ++i) {
    worst = std::max(worst, std::abs(double{a[i]} - double{b[i]}));
    scale = std::max(scale, std::abs(double{b[i]}));
  }
  return worst / scale;
}

template <template <class> class L, class... Parts>
void compare(moe::shape s, dim T, const Parts&... parts) {
  testing::model<L<moe::scalar<>>> host(L<moe::scalar<>>(s, parts...), T, s.d, 11);
  host.forward();
  host.backward();
  emulated<L<emulated_device>> device(L<emulated_device>(s, parts...), host);
  CHECK(testing::assignments_of(device.ctx) == testing::assignments_of(host.ctx));
  CHECK(worst_difference(device.y, host.y) < 1e-5);
  CHECK(worst_difference(device.dx, host.dx) < 1e-5);
  CHECK(worst_difference(device.grads.template as<float>(), host.gradients()) < 1e-5);

  emulated<L<emulated_device>> again(L<emulated_device>(s, parts..., emulated_device{true}), host);
  CHECK(same_bits(again.y, device.y));
  CHECK(same_bits(again.dx, device.dx));
  CHECK(same_bits(again.grads.template as<float>(), device.grads.template as<float>()));
}

template <class T, class B>
using packed_layer = moe::layer<moe::linear_gate, moe::top_k<2>, moe::packed_ffn_expert<T>, moe::weighted_sum, B>;

/// y of a layer with weights that were packed on the host.
template <class T, class B>
std::vector<float> infer_packed(moe::shape s) {
  using net_type = packed_layer<T, B>;
  using space = moe::edge<typename B::space>;
  const auto carve = [](const moe::buffer& b) {
    return typename space::arena(typename space::template view<std::span<std::byte>>(b.bytes()));
  };
  testing::model<layers::ffn<moe::scalar<>>> from(layers::ffn<moe::scalar<>>(s), s.tokens, s.d, 11);
  const net_type net(s);
  const moe::buffer params(net.weight_bytes()), work(net.inference_context_bytes(s.tokens) + net.scratch_bytes(s.tokens));
  moe::arena host(params.bytes());
  const packed_layer<T, moe::scalar<>> on_host(s);
  auto packed = on_host.make_weights(host);
  std::copy_n(from.w.gate.w.data, s.experts * s.d, packed.gate.w.data);
  on_host.experts().pack(from.w.experts, s, packed.experts);
  auto p = carve(params), mem = carve(work);
  auto ctx = net.make_inference_context(s.tokens, mem);
  std::vector<float> y(static_cast<std::size_t>(s.tokens * s.d));
  net.forward(net.make_weights(p), space::close(from.x_view()),
              space::close(moe::matrix_view<float>(y.data(), s.tokens, s.d)), ctx, mem);
  return y;
}

/// y, dq, dk and dv of attention over the best blocks, one after the other.
template <class B>
std::vector<float> attend(dim T, dim N, dim d, dim block) {
  using head = moe::moba<2, B>;
  using space = moe::edge<typename B::space>;
  const auto q = testing::normals(T * d, 1), k = testing::normals(N * d, 2), v = testing::normals(N * d, 3),
             dy = testing::normals(T * d, 4);
  const head net({.tokens = T, .d = d, .experts = (N + block - 1) / block}, moe::block_mean_gate{block},
                 moe::kv_block_expert{block});
  const moe::buffer work(net.context_bytes(T) + net.scratch_bytes(T));
  typename space::arena mem(typename space::template view<std::span<std::byte>>(work.bytes()));
  auto ctx = net.make_context(T, mem);
  std::vector<float> out(static_cast<std::size_t>((2 * T + 2 * N) * d));
  const auto part = [&](dim row, dim rows) { return moe::matrix_view<float>(out.data() + row * d, rows, d); };
  const auto view = [&](const std::vector<float>& m) {
    return moe::matrix_view<const float>(m.data(), static_cast<dim>(m.size()) / d, d);
  };
  const typename head::input in{moe::attention_input{view(q), view(k), view(v)}};
  const typename head::input_grad din{moe::attention_gradient{part(T, T), part(2 * T, N), part(2 * T + N, N)}};
  typename head::weights w;
  typename head::gradients dw;
  net.forward(w, in, space::close(part(0, T)), ctx, mem);
  net.backward(w, in, ctx, space::close(view(dy)), din, dw, mem);
  return out;
}

/// The plan of top-k on the device and on the host.
template <int K>
void compare_plans(dim T, dim E, const std::vector<float>& scores) {
  const auto plan_of = [&](auto on, moe::buffer& memory) {
    moe::arena mem(memory.bytes());
    moe::routing_plan p = moe::make_plan({.tokens = T, .d = 1, .f = 1, .experts = E}, T * K, mem);
    moe::top_k_rows<K>(on, moe::matrix_view<const float>(scores.data(), T, E), p);
    moe::group_by_expert(on, p);
    moe::check(p);
    return testing::assignments(p);
  };
  moe::buffer a(1 << 20), b(1 << 20);
  CHECK(plan_of(testing::on<emulated_device>(), a) == plan_of(testing::on<moe::scalar<>>(), b));
}

}  // namespace

TEST_SUITE("backend/cuda/primitives") {
  TEST_CASE("A feed-forward layer computes what the scalar backend computes, in any order of threads") {
    compare<layers::ffn>({.tokens = 90, .d = 20, .f = 70, .experts = 5}, 90);
    compare<layers::ffn>({.tokens = 300, .d = 33, .f = 17, .experts = 2}, 300);
    compare<layers::ffn>({.tokens = 4, .d = 8, .f = 8, .experts = 4}, 1);
    compare<layers::ffn>({.tokens = 4, .d = 8, .f = 8, .experts = 4}, 0);
  }
  TEST_CASE("So do layers of the other policies") {
    const moe::shape s{.tokens = 60, .d = 12, .f = 10, .experts = 6};
    compare<layers::mixed>({.tokens = 80, .d = 12, .f = 24, .experts = 7}, 80, layers::mixed_banks);
    compare<layers::balanced>(s, 60);
    compare<layers::nucleus>(s, 60, moe::top_p<3>{.p = 0.5f});
    compare<layers::chosen>(s, 60);
    compare<layers::pressed>(s, 60);
  }

  TEST_CASE_TEMPLATE("So do packed experts of integers", T, std::int8_t, moe::ternary) {
    for (const moe::shape s : {moe::shape{.tokens = 60, .d = 70, .f = 50, .experts = 4}, {.tokens = 9, .d = 5, .f = 33, .experts = 2}})
      CHECK(worst_difference(infer_packed<T, emulated_device>(s), infer_packed<T, moe::scalar<>>(s)) < 1e-5);
  }

  TEST_CASE("So does attention over blocks") {
    CHECK(worst_difference(attend<emulated_device>(20, 33, 8, 5), attend<moe::scalar<>>(20, 33, 8, 5)) < 1e-5);
  }

  TEST_CASE("Plans are equal to the host's with ties, masked experts and NaN") {
    const float inf = std::numeric_limits<float>::infinity(), nan = std::numeric_limits<float>::quiet_NaN();
    compare_plans<2>(3, 4, {1, 1, 1, 1, -inf, 5, nan, -inf, nan, nan, nan, nan});
    compare_plans<3>(2, 5, {5, 5, 6, 5, 6, -inf, 0, inf, 0, inf});
    for (std::uint64_t seed = 0; seed < 10; ++seed) {
      std::vector<float> scores = testing::integers(70 * 9, seed, 3);
      for (std::size_t i = seed; i < scores.size(); i += 3) scores[i] = -inf;
      compare_plans<4>(70, 9, scores);
    }
  }
  TEST_CASE("Products of whole numbers are equal bit for bit") {
    const dim m = 70, n = 67, k = 35;
    const auto a = testing::integers(m * k, 1, 9), b = testing::integers(n * k, 2, 9);
    const auto start = testing::integers(m * n, 3, 9);
    const auto product = [&](auto on, auto f) {
      std::vector<float> c = start;
      f(on, moe::matrix_view<float>(c.data(), m, n));
      return c;
    };
    const auto compare_products = [&](auto f) {
      CHECK(same_bits(product(testing::on<emulated_device>(), f), product(testing::on<moe::scalar<>>(), f)));
    };
    const moe::matrix_view<const float> a_mk(a.data(), m, k), a_km(a.data(), k, m);
    const moe::matrix_view<const float> b_nk(b.data(), n, k), b_kn(b.data(), k, n), bias(b.data(), n, 1);
    compare_products([&](const auto& on, auto c) { gemm_nt(on, a_mk, b_nk, c); });
    compare_products([&](const auto& on, auto c) { gemm_nt(on, a_mk, b_nk, bias, c); });
    compare_products([&](const auto& on, auto c) { gemm_nn(on, a_mk, b_kn, c); });
    compare_products([&](const auto& on, auto c) { gemm_tn(on, a_km, b_kn, c); });
  }
}

TEST_SUITE("backend/cuda/edge") {
  TEST_CASE("Memory of the host does not pass for a device's, nor the other way round") {
    using device_layer = layers::ffn<emulated_device>;
    using host_layer = layers::ffn<moe::scalar<>>;
    using host_view = moe::matrix_view<const float>;
    CHECK_FALSE(std::is_convertible_v<host_view, device_layer::input>);
    CHECK_FALSE(std::is_convertible_v<moe::on_device<host_view>, host_layer::input>);
    CHECK_FALSE(std::is_convertible_v<moe::arena&, device_layer::arena_type&>);
    CHECK_FALSE(std::is_convertible_v<moe::device_arena&, host_layer::arena_type&>);
    CHECK(std::is_convertible_v<moe::on_device<moe::matrix_view<float>>, device_layer::input>);
    CHECK_FALSE(std::is_convertible_v<moe::on_device<host_view>, moe::on_device<moe::matrix_view<float>>>);
  }
}
