// SPDX-License-Identifier: Apache-2.0
// What sizes say is what calls take. Compositions of every decorator and kind of expert, of random counts and widths, run in
// arenas of exactly the stated bytes: a policy that takes more than it counted asserts, or is seen in the arena's peak.
#include <doctest/doctest.h>

#include "moe/moe.hpp"
#include "support/storing_expert.hpp"
#include "support/testing.hpp"

namespace {

using moe::dim;
using moe::weigh_input;
using testing::storing_expert;
using backend = moe::scalar<>;
template <class X, class C>
using layer_of = moe::layer<moe::linear_gate, moe::top_k<2>, X, C, backend>;

/// Numbers of a composition: a pure function of the seed.
class dice {
 public:
  explicit dice(std::uint64_t seed) : random_(seed) {}
  dim operator()(dim most) { return static_cast<dim>(random_(next_++) % static_cast<std::uint64_t>(most + 1)); }

 private:
  moe::rng random_;
  std::uint64_t next_ = 0;
};

/// Runs a layer with every arena as small as its size function says. Returns the bytes of scratch that were not used.
template <class L>
std::size_t run_exactly(const L& net, dim T, dim d, bool training) {
  const std::size_t scratch = net.scratch_bytes(T);
  const moe::buffer params(net.weight_bytes()), grads(net.weight_bytes()), work(scratch),
      kept(training ? net.context_bytes(T) : net.inference_context_bytes(T));
  moe::arena p(params.bytes()), g(grads.bytes()), mem(work.bytes()), saved(kept.bytes());
  const auto w = net.make_weights(p);
  auto dw = net.make_gradients(g);
  auto ctx = training ? net.make_context(T, saved) : net.make_inference_context(T, saved);
  testing::randomise(net.catalogue(), params.template as<float>(), 1);
  const auto x = testing::normals(T * d, 2), dy = testing::normals(T * d, 3);
  std::vector<float> y(x.size()), dx(x.size());
  net.forward(w, moe::matrix_view<const float>{x.data(), T, d}, moe::matrix_view<float>{y.data(), T, d}, ctx, mem);
  if (training)
    net.backward(w, moe::matrix_view<const float>{x.data(), T, d}, ctx, moe::matrix_view<const float>{dy.data(), T, d},
                 moe::matrix_view<float>{dx.data(), T, d}, dw, mem);
  CHECK(p.peak() <= params.size());
  CHECK(g.peak() <= grads.size());
  CHECK(saved.peak() <= kept.size());
  CHECK(mem.peak() <= scratch);
  CHECK(mem.used() == 0);
  for (const float v : y) CHECK(std::isfinite(v));
  return scratch - mem.peak();
}
template <class L>
void run_everywhere(const L& net, dim d) {
  for (const dim T : {0, 1, 2, 7, 65}) {
    CAPTURE(T);
    run_exactly(net, T, d, true);
    run_exactly(net, T, d, false);
  }
}

using wide_ffn = moe::basic_ffn_expert<moe::glu<moe::gelu>, moe::interleaved, true>;
using inner_set = moe::expert_set<storing_expert, moe::copy_expert, wide_ffn, moe::constant_expert>;
using outer_set = moe::expert_set<moe::ffn_expert, weigh_input<storing_expert>, moe::constant_expert, weigh_input<inner_set>,
                                  moe::film_expert, inner_set, weigh_input<moe::film_expert>>;
using trunk = weigh_input<storing_expert>;
using mix = moe::residual<moe::mix_before_trunk<trunk>>;

/// Counts of banks: all random, or two experts of one bank alone, so that no other bank's size hides its own.
struct counts {
  dice& roll;
  int only = -1;
  int next = 0;
  dim total = 0;
  dim operator()() {
    const dim n = only < 0 ? roll(2) : next == only ? 2 : 0;
    ++next;
    total += n;
    return n;
  }
};

/// f(dice, d, E, experts): every bank of the outer set alone, those that are sets also with every bank of theirs alone, and
/// random ones.
template <class F>
void for_each_composition(F f) {
  for (int only = -1; only < 7; ++only)
    for (int inside = -1; inside < (only < 0 || only == 3 || only == 5 ? 4 : 0); ++inside) {
      CAPTURE(only);
      CAPTURE(inside);
      dice roll(static_cast<std::uint64_t>(100 + 10 * only + inside));
      counts n{.roll = roll, .only = only};
      const dim own[] = {n(), n(), n(), n(), n(), n(), n()};
      const auto set_of = [&](bool wanted) {
        counts m{.roll = roll, .only = inside};
        const dim c[] = {m(), m(), m(), m()}, bare = wanted && m.total == 0;
        return std::pair(inner_set{{.count = wanted * c[0] + bare},
                                   {.count = wanted * c[1]},
                                   {.count = wanted * c[2], .f = 1 + roll(40)},
                                   {.count = wanted * c[3]}},
                         wanted * m.total + bare);
      };
      const auto one = set_of(own[3] > 0), other = set_of(own[5] > 0);
      const dim total = own[0] + own[1] + own[2] + own[4] + own[6] + one.second + other.second;
      const dim more = total < 2 ? 2 - total : 0;  // two choices need two experts
      const dim d = 1 + roll(40);
      f(roll, d, total + more,
        outer_set{{.count = own[0], .f = 1 + roll(30)},
                  {.count = own[1]},
                  {.count = own[2]},
                  {.count = one.second, .expert = {one.first}},
                  {.count = own[4]},
                  {.count = other.second, .expert = other.first},
                  {.count = own[6] + more}});
    }
}

}  // namespace

TEST_SUITE("layer") {
  TEST_CASE("a feed-forward layer takes all of its scratch but the last padding") {
    for (const dim T : {1, 7, 64}) {
      const layer_of<moe::ffn_expert, moe::weighted_sum> net({.d = 5, .f = 9, .experts = 3});
      CHECK(run_exactly(net, T, 5, true) < 512);
    }
  }
  TEST_CASE("sets in sets of decorated experts take no more memory than they say, each bank alone and all together") {
    for_each_composition([](dice& roll, dim d, dim count, const outer_set& experts) {
      const layer_of<outer_set, moe::unweighted_sum> net({.d = d, .experts = count}, experts);
      const dim n = roll(3);  // which bank the shared expert is
      const inner_set beside{{.count = n == 0}, {.count = n == 1}, {.count = n == 2, .f = 1 + roll(40)}, {.count = n == 3}};
      run_everywhere(net, d);
      run_everywhere(moe::sum(moe::sum(net, moe::gated_dense<weigh_input<storing_expert>, backend>({.d = d})),
                              moe::gated_dense<weigh_input<inner_set>, backend>({.d = d}, {beside})),
                     d);
    });
  }
  TEST_CASE("experts mixed before a trunk take no more memory than they say") {
    for_each_composition([](dice&, dim d, dim count, const outer_set& experts) {
      run_everywhere(layer_of<outer_set, mix>({.d = d, .experts = count}, experts), d);
    });
  }
}
