// SPDX-License-Identifier: Apache-2.0
/// Compares a layer on a CUDA device with the same layer on the scalar backend.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <vector>

#include "moe/backend/cuda.cuh"
#include "support/device_layers.hpp"
#include "support/testing.hpp"

namespace compared {

using moe::dim;

inline int failures = 0;

inline void expect_close(const char* layer, const char* what, std::span<const float> got, std::span<const float> wanted) {
  double worst = 0, scale = 0;
  for (std::size_t i = 0; i < got.size(); ++i) {
    const double difference = std::abs(double{got[i]} - double{wanted[i]});
    if (!(difference <= worst)) worst = difference;  // NaN counts
    scale = std::max(scale, std::abs(double{wanted[i]}));
  }
  const bool close = worst <= 1e-4 * scale;
  failures += !close;
  std::printf("%-8s %-10s %s (largest difference %.2g of %.2g)\n", layer, what, close ? "ok" : "WRONG", worst, scale);
}

/// The integers of a plan in device memory.
inline testing::assignments download(const moe::cuda<>& gpu, const moe::routing_plan& p) {
  testing::assignments a;
  const auto bring = [&](std::span<moe::idx> from, std::vector<moe::idx>& to) {
    to.resize(from.size());
    gpu.download(moe::on_device(from), std::span(to));
  };
  bring(p.offsets, a.offsets);
  bring(p.token, a.token);
  bring(p.token_offsets, a.token_offsets);
  bring(p.position, a.position);
  gpu.sync();
  a.token.resize(static_cast<std::size_t>(a.offsets.back()));
  a.position.resize(static_cast<std::size_t>(a.token_offsets.back()));
  return a;
}

template <template <class> class L, class... Parts>
void compare(const char* name, moe::shape s, const Parts&... parts) {
  const dim T = s.tokens;
  testing::model<L<moe::scalar<>>> host(L<moe::scalar<>>(s, parts...), T, s.d, 7);
  host.forward();
  host.backward();

  const moe::cuda<> gpu;
  const L<moe::cuda<>> net(s, parts..., gpu);
  moe::device_buffer params(net.weight_bytes()), grads(net.weight_bytes());
  moe::device_buffer rows(4 * static_cast<std::size_t>(4 * (T + 64) * s.d));
  moe::device_buffer work(net.context_bytes(T) + net.scratch_bytes(T));
  moe::device_arena p(params.bytes()), g(grads.bytes()), r(rows.bytes()), mem(work.bytes());
  const auto w = net.make_weights(p);
  auto dw = net.make_gradients(g);
  const auto x = r.matrix<float>("x", T, s.d), y = r.matrix<float>("y", T, s.d);
  const auto dy = r.matrix<float>("dy", T, s.d), dx = r.matrix<float>("dx", T, s.d);
  auto ctx = net.make_context(T, mem);

  gpu.upload(host.weights(), params.as<float>());
  gpu.upload(host.x, moe::flat(x));
  gpu.upload(host.dy, moe::flat(dy));
  net.forward(w, x, y, ctx, mem);
  net.backward(w, x, ctx, dy, dx, dw, mem);
  std::vector<float> y_host(host.y.size());
  gpu.download(moe::flat(y), std::span(y_host));
  gpu.sync();

  std::vector<float> dx_host(host.dx.size()), grads_host(host.gradients().size());
  gpu.download(moe::flat(dx), std::span(dx_host));
  gpu.download(grads.as<float>(), std::span(grads_host));
  gpu.sync();
  const bool same_plan = download(gpu, ctx.plan) == testing::assignments_of(host.ctx);
  failures += !same_plan;
  std::printf("%-8s %-10s %s\n", name, "plan", same_plan ? "ok" : "WRONG");
  expect_close(name, "y", y_host, host.y);
  expect_close(name, "dx", dx_host, host.dx);
  expect_close(name, "gradients", grads_host, host.gradients());
}

inline bool no_device() {
  int devices = 0;
  if (cudaGetDeviceCount(&devices) == cudaSuccess && devices > 0) return false;
  std::puts("skipped: no CUDA device");
  return true;
}

}  // namespace compared
