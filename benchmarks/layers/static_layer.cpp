// SPDX-License-Identifier: Apache-2.0
#include "moe/static_layer.hpp"

#include <algorithm>
#include <memory>

#include "layers/layers.hpp"
#include "moe/core/rng.hpp"
#include "support/measure.hpp"

namespace bench {
namespace {

constexpr int d = 32, f = 64, E = 4;
using net = moe::static_layer<d, f, E, 1>;
constexpr dim expert_floats = 3 * d * f, calls = 1 << 14;

void fill(std::span<float> to, std::uint64_t stream) {
  const moe::rng random(1, stream);
  for (std::size_t i = 0; i < to.size(); ++i) to[i] = random.normal(i) / 4;
}
/// One input for each expert.
std::vector<float> inputs(const net& layer) {
  std::vector<float> x(E * d), one(d);
  std::uint64_t stream = 10;
  for (int e = 0; e < E;) {
    fill(one, ++stream);
    net::context c;
    float y[d];
    layer.forward(one.data(), y, c);
    if (c.expert[0] == e) std::copy(one.begin(), one.end(), x.begin() + d * e++);
  }
  return x;
}
/// Seconds of one call of f, called with 0, 1, .. E - 1 in turn.
template <class F>
double time_of(F f) {
  const double start = seconds();
  for (dim i = 0; i < calls; ++i) f(i % E);
  return (seconds() - start) / static_cast<double>(calls);
}
/// Reads the weights of an expert, and does nothing else.
void read(const float* p) {
  moe::arch::at_level_in_use<moe::detail::build_level>([p](auto level) {
    using V = typename decltype(level)::type;
    V sum[8];
    MOE_UNROLL
    for (int i = 0; i < 8; ++i) sum[i] = V(0);
    for (dim j = 0; j < expert_floats; j += 8 * V::width) {
      MOE_UNROLL
      for (int i = 0; i < 8; ++i) sum[i] = sum[i] + V::load(p + j + i * V::width);
    }
    MOE_UNROLL
    for (int i = 1; i < 8; ++i) sum[0] = sum[0] + sum[i];
    float total[V::width];
    sum[0].store(total);
    keep(total);
  });
}

}  // namespace

row measure_static_layer(int rounds) {
  const auto layer = std::make_unique<net>();
  fill(layer->w.router, 1);
  fill(layer->w.in, 2);
  fill(layer->w.down, 3);
  const std::vector<float> x = inputs(*layer);
  turn_record turns(2 * rounds);
  double roof = 1;
  while (!turns.complete())
    turns.take(1, false, [&] {
      // in and down lie together
      roof = std::min(roof, time_of([&](dim i) { read(layer->w.in.data() + i * expert_floats); }));
      float y[d];
      return time_of([&](dim i) {
        layer->forward(&x[static_cast<std::size_t>(i * d)], y);
        keep(y);
      });
    });
  const double time = turns.time();
  row r{};
  r.name = "static";
  r.shape = {"d32,f64,E4,k1", d, f, E, 1, {}};
  r.type = weight_types[0];
  r.tokens = r.threads = 1;
  r.tokens_per_s = 1 / time;
  r.flops_per_s = r.shape.flops(1) / time;
  r.weight_bytes_per_s = 4 * static_cast<double>(expert_floats + E * d) / time;
  r.roof_tokens_per_s = 1 / roof;
  r.memory_bound = true;
  r.quiet = turns.quiet();
  return r;
}

}  // namespace bench
