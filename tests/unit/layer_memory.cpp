// SPDX-License-Identifier: Apache-2.0
// What a layer keeps: the bytes of a context are those of the plan and of the pre-activations, nothing of width d.
// Sheet of record: Guo et al. 2025 (SonicMoE), arXiv:2512.14080: X and the pre-activations, 4 A 2f bytes in float32.
#include <doctest/doctest.h>

#include "moe/core/recorded_plan.hpp"
#include "moe/moe.hpp"
#include "support/testing.hpp"

namespace {

using moe::dim;

template <int K, class Expert = moe::ffn_expert>
using layer = moe::layer<moe::linear_gate, moe::top_k<K>, Expert, moe::weighted_sum, moe::scalar<>>;

std::size_t round_up(dim bytes, dim grain) { return static_cast<std::size_t>((bytes + grain - 1) / grain * grain); }
/// Tensors of four-byte elements start at multiples of 64 elements.
std::size_t pad(dim bytes) { return round_up(bytes, 256); }
/// Whole contexts, parameters and scratch end at a multiple of 64 of the widest elements.
std::size_t whole(std::size_t bytes) { return round_up(static_cast<dim>(bytes), 512); }

/// offsets[E+1] token[A] weight[A] token_offsets[T+1] position[A], where A = T k is the most there can be; the last tensor
/// of a context is not padded to the next.
std::size_t plan_bytes(dim T, dim E, dim A) {
  return pad(4 * (E + 1)) + pad(4 * A) + pad(4 * A) + pad(4 * (T + 1)) + pad(4 * A);
}
std::size_t context_bytes(dim T, dim f, dim E, dim k) {
  const dim A = T * k;
  return whole(plan_bytes(T, E, A) + pad(4 * A * 2 * f));  // z: gate and up, float32
}

/// The same expert as one writes it who gathers, multiplies and scatters: it keeps the rows it read and those it gave.
struct gathering_expert : moe::ffn_expert {
  struct context : moe::ffn_expert::context {
    moe::matrix_view<float> xs, ys;  ///< [A,d]
  };
  context make_context(moe::shape s, dim rows, moe::arena& mem) const noexcept {
    const auto z = moe::ffn_expert::make_context(s, rows, mem);
    return {z, mem.matrix<float>("xs", rows, s.d), mem.matrix<float>("ys", rows, s.d)};
  }
  template <class B>
  void forward(const moe::call<B>& on, const weights& w, const input& x, const moe::bank_rows& rows, output ys,
               context& ctx) const noexcept {
    moe::ffn_expert::forward(on, w, x, rows, ys, ctx);
    const auto from = rows.gather(x);
    map_rows(on, rows, ctx.xs, [&](dim, dim r, dim j) { return from.row(r)[j]; });
    map_rows(on, rows, ctx.ys, [&](dim, dim r, dim j) { return ys(r, j); });
  }
};

}  // namespace

TEST_SUITE("layer") {
  TEST_CASE("context_bytes is the plan and 4 A 2f bytes of pre-activations, whatever d") {
    for (const dim T : {0, 1, 5, 64, 77, 1000})
      for (const dim f : {1, 24, 100})
        for (const dim d : {1, 8, 333}) {
          CAPTURE(T);
          CAPTURE(f);
          CAPTURE(d);
          CHECK(layer<1>({.d = d, .f = f, .experts = 5}).context_bytes(T) == context_bytes(T, f, 5, 1));
          CHECK(layer<3>({.d = d, .f = f, .experts = 67}).context_bytes(T) == context_bytes(T, f, 67, 3));
        }
  }
  TEST_CASE("a form without a gate keeps half the pre-activations") {
    const dim T = 640, f = 32, E = 4;
    const layer<2, moe::basic_ffn_expert<moe::plain<moe::relu>>> plain({.d = 16, .f = f, .experts = E});
    CHECK(plain.context_bytes(T) == whole(plan_bytes(T, E, 2 * T) + pad(4 * 2 * T * f)));
  }
  TEST_CASE("the context grows by 8 f bytes an assignment, and by the plan's 12") {
    const dim f = 48, k = 2, more = 64 * 64;  // so that nothing is lost to padding
    const layer<2> net({.d = 96, .f = f, .experts = 8});
    const std::size_t grown = net.context_bytes(2 * more) - net.context_bytes(more);
    CHECK(grown == static_cast<std::size_t>(more * k * (8 * f + 12) + more * 4));
  }
  TEST_CASE_TEMPLATE("x and the context are twice the published 2 T d + 4 T k f bytes, which are for bf16, and the plan", X,
                     moe::ffn_expert, moe::bf16_ffn_expert) {
    const dim T = 640, d = 128, f = 96, E = 8;
    const auto kept = [&](const auto& net, dim k) {  // with x, less the plan
      return static_cast<dim>(net.context_bytes(T) - plan_bytes(T, E, T * k)) + T * d * dim{sizeof(float)};
    };
    CHECK(kept(layer<4, X>({.d = d, .f = f, .experts = E}), 4) == 2 * (2 * T * d + 4 * T * 4 * f));
    // Finer experts, more of them a token: the same.
    CHECK(kept(layer<8, X>({.d = d, .f = f / 2, .experts = E}), 8) == 2 * (2 * T * d + 4 * T * 4 * f));
  }
  TEST_CASE(
      "an expert that keeps the rows it gathers and gives adds twice the published 4 T k d bytes, which are for bf16") {
    // Of fine-grained experts a layer keeps, x among it, less than a fifth of what the gathering one does.
    constexpr int k = 8;
    const dim T = 640, d = 1536, f = 256, E = 16;
    const moe::shape s{.d = d, .f = f, .experts = E};
    const auto ours = static_cast<dim>(layer<k>(s).context_bytes(T)),
               theirs = static_cast<dim>(layer<k, gathering_expert>(s).context_bytes(T));
    CHECK(theirs - ours == 2 * 4 * T * k * d);
    const double share = static_cast<double>(ours + 4 * T * d) / static_cast<double>(theirs + 4 * T * d);
    CHECK(share ==
          doctest::Approx((2. * d + 4 * k * f) / (2 * d + 4 * k * f + 4 * k * d)).epsilon(0.01));  // the plan is ours
    CHECK(share < 0.2);
    testing::model<layer<2, gathering_expert>> m(layer<2, gathering_expert>({.d = 20, .f = 6, .experts = 3}), 9, 20, 1);
    testing::model<layer<2>> n(layer<2>({.d = 20, .f = 6, .experts = 3}), 9, 20, 1);
    m.forward();
    n.forward();
    CHECK(m.y == n.y);
  }
  TEST_CASE("the flops of an expert over the bytes it reads and writes are the published intensity") {
    const dim d = 256, f = 64, E = 8;
    const layer<2, moe::bf16_ffn_expert> net({.d = d, .f = f, .experts = E});
    dim weights = 0;
    for (const moe::slot& s : net.catalogue())
      if (s.type == moe::element::bf16) weights += static_cast<dim>(s.bytes) / E;
    for (const dim T : {64, 1024}) {
      const double rho = 2. / E, G = double{d} / f;
      const dim rows = T * 2 / E, element = sizeof(moe::bf16), x = rows * d * element, a = rows * f * element;
      const double flops = 6. * static_cast<double>(rows * d * f),
                   bytes = static_cast<double>(weights + x + 2 * a + x);  // x, a there and back, y
      CHECK(flops / bytes == doctest::Approx(3 / ((2 + 2 * G) / d + 3 / (static_cast<double>(T) * rho))));
    }
  }
  TEST_CASE("an inference context is the plan alone") {
    for (const dim T : {0, 1, 100})
      CHECK(layer<2>({.d = 7, .f = 9, .experts = 6}).inference_context_bytes(T) == whole(plan_bytes(T, 6, 2 * T)));
  }
  TEST_CASE("weight_bytes is the tensors of the catalogue, each at a multiple of 64 elements") {
    const layer<2> net({.d = 7, .f = 9, .experts = 5});
    const auto list = net.catalogue();
    REQUIRE(list.size() == 4);
    CHECK(list[0].name == "gate.w");
    CHECK(list[1].name == "experts.up");
    CHECK(list[2].name == "experts.gate");
    CHECK(list[3].name == "experts.down");
    std::size_t end = 0;
    for (const moe::slot& s : list) {
      CHECK(s.offset == pad(static_cast<dim>(end)));
      CHECK(s.bytes == static_cast<std::size_t>(4 * s.rows * s.cols));
      end = s.offset + s.bytes;
    }
    CHECK(net.weight_bytes() == whole(end));
  }
  TEST_CASE("make_context takes exactly context_bytes from an arena, and sizes fit wherever it stands") {
    const layer<2> net({.d = 7, .f = 9, .experts = 5});
    const std::size_t bytes = net.context_bytes(13);
    const moe::buffer memory(64 + bytes + 512);
    moe::arena mem(memory.bytes());
    (void)mem.matrix<float>("something odd", 1, 3);
    (void)net.make_context(13, mem);
    CHECK(mem.used() <= 512 + bytes);

    const moe::buffer tight(bytes);
    moe::arena exact(tight.bytes());
    (void)net.make_context(13, exact);
    CHECK(exact.used() <= bytes);
  }
  TEST_CASE("forward, replay and backward give back the scratch they took, and take at most scratch_bytes") {
    testing::model<layer<2>> m(layer<2>({.tokens = 33, .d = 20, .f = 70, .experts = 5}), 33, 20, 1);
    const std::size_t used = m.work.used(), peak = m.work.peak(), scratch = m.net.scratch_bytes(33);
    m.forward();
    CHECK(m.work.used() == used);
    m.backward();
    CHECK(m.work.used() == used);
    const auto recorded = moe::record(m.ctx.plan);
    m.net.replay(m.w, m.in, recorded.plan(), m.y_view(), m.ctx, m.work);
    CHECK(m.work.used() == used);
    CHECK(m.work.peak() > peak);
    CHECK(m.work.peak() <= m.net.context_bytes(33) + scratch);
  }
  TEST_CASE("in flat buffers gradients lie where their weights lie") {
    const layer<2> net({.d = 7, .f = 9, .experts = 5});
    const moe::buffer params(net.weight_bytes()), grads(net.weight_bytes());
    moe::arena p(params.bytes()), g(grads.bytes());
    const auto w = net.make_weights(p);
    const auto dw = net.make_gradients(g);
    const auto offset = [](const moe::buffer& b, const float* at) {
      return reinterpret_cast<const std::byte*>(at) - b.bytes().data();
    };
    CHECK(offset(params, w.gate.w.data) == offset(grads, dw.gate.w.data));
    CHECK(offset(params, w.experts.up.data) == offset(grads, dw.experts.up.data));
    CHECK(offset(params, w.experts.gate.data) == offset(grads, dw.experts.gate.data));
    CHECK(offset(params, w.experts.down.data) == offset(grads, dw.experts.down.data));
  }
}
