// SPDX-License-Identifier: Apache-2.0
// The forward pass of whole layers beside a loop of Eigen products over the experts, both in one process, in turn.
//
//   bench_layer_forward [shape [tokens]]     all shapes and batches, or one: bench_layer_forward S2 32
//
// Small batches rotate over layers and inputs, so that weights come from memory as they do in a model. A `!` marks a row
// during which other programs had the processor; `loop` says how the Eigen loop compares with what it is known to do.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <string_view>
#include <vector>

#include "moe/backend/cpu.hpp"
#include "moe/combine/weighted_sum.hpp"
#include "moe/expert/ffn.hpp"
#include "moe/gate/linear.hpp"
#include "moe/layer.hpp"
#include "moe/router/top_k.hpp"
#include "support/eigen_loop.hpp"
#include "support/measure.hpp"
#include "support/shapes.hpp"

namespace {

using moe::dim;

#if defined(_OPENMP)
constexpr int max_threads = 2;
void use_threads(int n) { omp_set_num_threads(n); }
#else
constexpr int max_threads = 1;
void use_threads(int) {}
#endif
constexpr int rounds = 5, tries = 20;
constexpr std::size_t resident = std::size_t{600} << 20;  // weights that small batches rotate over

// Numbers of mean 0: a block of random ones, over and over.
void fill(std::span<float> to, float deviation, std::uint64_t seed) {
  constexpr std::size_t block = 1 << 16;
  const moe::rng random(seed);
  for (std::size_t i = 0; i < to.size(); ++i) to[i] = i < block ? deviation * random.normal(i) : to[i - block];
}

/// A shape with its layers and its inputs. Skewed inputs share a direction, so that some experts are liked by all.
template <int K>
class contest {
  using layer = moe::layer<moe::linear_gate, moe::top_k<K>, moe::ffn_expert, moe::weighted_sum, moe::cpu<>>;

 public:
  explicit contest(const support::model_shape& s)
      : shape_(s), net_({.d = s.d, .f = s.f, .experts = s.experts}), loop_(s.experts, K) {
    const std::size_t bytes = net_.weight_bytes(), layers = (resident + bytes - 1) / bytes;
    for (std::size_t i = 0; i < layers; ++i) {
      params_.emplace_back(bytes);
      fill(params_.back().template as<float>(), 1 / std::sqrt(static_cast<float>(s.d)), i);
      moe::arena mem(params_.back().bytes());
      weights_.push_back(net_.make_weights(mem));
    }
  }

  void run(dim only) {
    for (const bool skewed : {false, true})
      for (std::size_t i = 0; i < support::batches.size(); ++i)
        if (const dim T = support::batches[i]; only == 0 || only == T)
          for (int threads = max_threads; threads >= 1; --threads) row(T, skewed, threads, shape_.known_loop[i]);
  }

 private:
  void row(dim T, bool skewed, int threads, double known) {
    use_threads(threads);
    const dim inputs = T <= 128 ? 64 : 1;
    const std::size_t layers = T <= 128 ? weights_.size() : 1;
    moe::buffer tokens(static_cast<std::size_t>(inputs * T * shape_.d) * sizeof(float)),
        result(tokens.size() / static_cast<std::size_t>(inputs));
    moe::buffer work(net_.inference_context_bytes(T) + net_.scratch_bytes(T));
    moe::arena mem(work.bytes());
    auto ctx = net_.make_inference_context(T, mem);
    const auto x = tokens.as<float>();
    for (std::size_t i = 0; i < x.size(); ++i) x[i] = moe::rng(7).normal(i);
    if (skewed)
      for (std::size_t i = 0; i < x.size(); ++i) x[i] += moe::rng(9).normal(i % static_cast<std::size_t>(shape_.d));
    const auto input = [&](int call) {
      return moe::matrix_view<const float>{x.data() + call % inputs * T * shape_.d, T, shape_.d};
    };
    const auto weights = [&](int call) -> auto& { return weights_[static_cast<std::size_t>(call) % layers]; };
    const moe::matrix_view<float> y(result.as<float>().data(), T, shape_.d);

    double active = 0;
    dim calls = 0;
    const auto by_hand = [&](int call) {
      const auto& w = weights(call);
      loop_.forward(w.gate.w, w.experts.gate, w.experts.up, w.experts.down, input(call), y);
      active += static_cast<double>(loop_.active());
      ++calls;
    };
    const auto ours = [&](int call) { net_.forward(weights(call), input(call), y, ctx, mem); };
    agree(by_hand, ours, result.as<float>());
    const auto t = support::interleaved(threads, rounds, tries, ours, by_hand);
    const double T_ = static_cast<double>(T),
                 roof = support::roof(shape_, T, K, active / static_cast<double>(calls), threads);
    std::printf("%-3s %-6s %5td %8d %9.0f %9.0f %6.2f %5.0f%%", shape_.name, skewed ? "skewed" : "even", T, threads,
                T_ / t.a, T_ / t.b, t.b / t.a, 100 * T_ / t.a / roof);
    if (!skewed && threads == max_threads) std::printf("  loop %+4.0f%%", 100 * (T_ / t.b / known - 1));
    std::printf("%s\n", t.quiet ? "" : "  !");
    std::fflush(stdout);
  }

  template <class F, class G>
  static void agree(F f, G g, std::span<const float> y) {
    f(0);
    const std::vector<float> wanted(y.begin(), y.end());
    g(0);
    double error = 0, size = 0;
    for (std::size_t i = 0; i < y.size(); ++i) {
      error += (y[i] - wanted[i]) * (y[i] - wanted[i]);
      size += wanted[i] * wanted[i];
    }
    if (error > 1e-8 * size) std::printf("the two disagree: %g of %g\n", std::sqrt(error), std::sqrt(size));
  }

  support::model_shape shape_;
  layer net_;
  support::eigen_loop loop_;
  std::vector<moe::buffer> params_;
  std::vector<typename layer::weights> weights_;
};

template <int K>
void run(const support::model_shape& s, int argc, char** argv) {
  if (argc < 2 || std::string_view(argv[1]) == s.name) contest<K>(s).run(argc > 2 ? std::atol(argv[2]) : 0);
}

}  // namespace

int main(int argc, char** argv) {
  std::printf("shape routing   T  threads  tokens/s  by hand  ratio   roof\n");
  run<2>(support::s1, argc, argv);
  run<8>(support::s2, argc, argv);
  run<8>(support::s3, argc, argv);
  run<1>(support::s4, argc, argv);
}
