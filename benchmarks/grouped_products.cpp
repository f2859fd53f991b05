// SPDX-License-Identifier: Apache-2.0
// The products of feed-forward experts over rows of a plan, forward and backward. The roof is one thread's: the operations,
// or the weights read once from memory, whichever takes longer. Run with OMP_NUM_THREADS=1.
#include <benchmark/benchmark.h>

#include <algorithm>
#include <vector>

#include "moe/backend/cpu.hpp"
#include "moe/expert/activation.hpp"
#include "support/shapes.hpp"

namespace {

using moe::dim;
using moe::gathered;
using moe::idx;
using moe::matrix_view;

// Eight experts of f x d with the same number of rows each, in memory that together is no cache's.
struct experts {
  static constexpr dim E = 8;
  dim d, f, rows;
  moe::buffer x{bytes(E * rows * d)}, a{bytes(E * rows * f)}, up{bytes(E * f * d)}, gate{bytes(E * f * d)}, scratch{1 << 12};
  std::vector<idx> offsets, token;
  moe::arena mem{scratch.bytes()};
  moe::cpu<> backend{};

  explicit experts(const benchmark::State& state) : d(state.range(0)), f(state.range(1)), rows(state.range(2)) {
    for (dim e = 0; e <= E; ++e) offsets.push_back(static_cast<idx>(e * rows));
    for (dim r = 0; r < E * rows; ++r) token.push_back(static_cast<idx>(r * 5 % (E * rows)));
    for (const moe::buffer* b : {&x, &a, &up, &gate})
      for (float& v : b->as<float>()) v = 0.5f;
  }
  moe::call<moe::cpu<>> on() { return {backend, mem, {E * rows, d, f, E}}; }
  moe::bank_rows bank() const { return {.offsets = offsets, .token = token}; }
  gathered<float> inputs() const { return bank().gather(matrix_view<const float>{x.as<float>().data(), E * rows, d}); }
  matrix_view<float> hidden() const { return {a.as<float>().data(), E * rows, f}; }
  static moe::matrix_stack<float> stack(const moe::buffer& b, dim n, dim k) {
    return moe::stack(matrix_view<float>{b.as<float>().data(), E * n, k}, n);
  }
  void report(benchmark::State& state, int products) const {
    const double flops = 2. * products * static_cast<double>(E * rows * d * f),
                 weights = 4. * products * static_cast<double>(E * d * f);
    const double runs = static_cast<double>(state.iterations());
    state.counters["flop/s"] = benchmark::Counter(flops * runs, benchmark::Counter::kIsRate);
    state.counters["roof"] = benchmark::Counter(std::max(flops / support::roof_flops, weights / support::roof_bytes) * runs,
                                                benchmark::Counter::kIsRate);
  }

 private:
  static std::size_t bytes(dim n) { return static_cast<std::size_t>(n) * sizeof(float); }
};

void up(benchmark::State& state) {
  experts e(state);
  for (auto _ : state)
    grouped_up(e.on(), e.bank(), e.inputs(), moe::glu<moe::silu>{}, e.stack(e.gate, e.f, e.d), {}, e.stack(e.up, e.f, e.d),
               {}, {}, e.hidden());
  e.report(state, 2);
}
void down(benchmark::State& state) {
  experts e(state);
  const matrix_view<float> y(e.x.as<float>().data(), experts::E * e.rows, e.d);
  for (auto _ : state) grouped_gemm_nt(e.on(), e.bank(), gathered<float>{e.hidden()}, e.stack(e.up, e.d, e.f), {}, y);
  e.report(state, 1);
}
void input_gradient(benchmark::State& state) {
  experts e(state);
  const matrix_view<float> dx(e.x.as<float>().data(), experts::E * e.rows, e.d);
  for (auto _ : state) grouped_gemm_nn(e.on(), e.bank(), gathered<float>{e.hidden()}, e.stack(e.up, e.f, e.d), dx);
  e.report(state, 1);
}
void weight_gradient(benchmark::State& state) {
  experts e(state);
  for (auto _ : state) grouped_gemm_tn(e.on(), e.bank(), gathered<float>{e.hidden()}, e.inputs(), e.stack(e.up, e.f, e.d));
  e.report(state, 1);
}

void shapes(benchmark::internal::Benchmark* b) {
  b->ArgNames({"d", "f", "rows"})->Unit(benchmark::kMillisecond);
  for (const dim rows : {1, 8, 64, 512}) b->Args({2048, 1024, rows});
  b->Args({128, 256, 64});
}
BENCHMARK(up)->Apply(shapes);
BENCHMARK(down)->Apply(shapes);
BENCHMARK(input_gradient)->Apply(shapes);
BENCHMARK(weight_gradient)->Apply(shapes);

}  // namespace
