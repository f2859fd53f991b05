// SPDX-License-Identifier: Apache-2.0
/// Forward and backward of layers in TFLOP/s, beside cuBLAS on one product of the same rows without routing: the limit.
#include <cublas_v2.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "moe/backend/cuda.cuh"
#include "moe/moe.hpp"

namespace {

using moe::dim;

void require(bool good, const char* what) {
  if (good) return;
  std::fprintf(stderr, "%s failed\n", what);
  std::exit(1);
}

struct model_shape {
  const char* name;
  dim d, f, experts;
  double flops(dim tokens, int k) const { return 2. * static_cast<double>(3 * d * f * tokens * k + experts * d * tokens); }
};

/// v[i] = mean[i % cols] + deviation * noise; the mean is of every row, so that some experts are liked by all tokens.
struct random_element {
  float* v;
  dim cols;
  moe::rng noise;
  float deviation, common;
  __device__ void operator()(dim i) const noexcept {
    const auto at = static_cast<std::uint64_t>(i);
    v[i] = deviation * noise.normal(at) + common * moe::rng(9).normal(at % static_cast<std::uint64_t>(cols));
  }
};
void randomise(const moe::cuda<>& gpu, moe::on_device<std::span<float>> v, dim cols, std::uint64_t seed, float deviation,
               float common = 0) {
  gpu.for_each(static_cast<dim>(v.view.size()), random_element{v.view.data(), cols, moe::rng(seed), deviation, common});
}

/// Median seconds of a call.
template <class F>
double seconds(const moe::cuda<>& gpu, F f) {
  cudaEvent_t from, to;
  require(cudaEventCreate(&from) == cudaSuccess && cudaEventCreate(&to) == cudaSuccess, "cudaEventCreate");
  f();
  gpu.sync();
  std::vector<float> runs(9);
  for (float& ms : runs) {
    cudaEventRecord(from, gpu.stream());
    f();
    cudaEventRecord(to, gpu.stream());
    gpu.sync();
    require(cudaEventElapsedTime(&ms, from, to) == cudaSuccess, "cudaEventElapsedTime");
  }
  cudaEventDestroy(from);
  cudaEventDestroy(to);
  std::sort(runs.begin(), runs.end());
  return runs[runs.size() / 2] / 1e3;
}

/// TFLOP/s of rows x d times d x f.
double limit(const moe::cuda<>& gpu, cublasHandle_t blas, dim rows, dim d, dim f) {
  const moe::device_buffer a(static_cast<std::size_t>(rows * d) * 4), b(static_cast<std::size_t>(f * d) * 4),
      c(static_cast<std::size_t>(rows * f) * 4);
  const float one = 1, zero = 0;
  const int m = static_cast<int>(f), n = static_cast<int>(rows), k = static_cast<int>(d);
  const float *left = b.as<float>().view.data(), *right = a.as<float>().view.data();
  float* out = c.as<float>().view.data();
  const double s = seconds(gpu, [&] {
    const auto status = cublasSgemm(blas, CUBLAS_OP_T, CUBLAS_OP_N, m, n, k, &one, left, k, right, k, &zero, out, m);
    require(status == CUBLAS_STATUS_SUCCESS, "cublasSgemm");
  });
  return 2. * static_cast<double>(rows * d * f) / s / 1e12;
}

template <int K>
void measure(const moe::cuda<>& gpu, cublasHandle_t blas, const model_shape& s) {
  using layer = moe::layer<moe::linear_gate, moe::top_k<K>, moe::ffn_expert, moe::weighted_sum, moe::cuda<>>;
  const layer net({.d = s.d, .f = s.f, .experts = s.experts}, gpu);
  const moe::device_buffer params(net.weight_bytes()), grads(net.weight_bytes());
  moe::device_arena p(params.bytes()), g(grads.bytes());
  const auto w = net.make_weights(p);
  auto dw = net.make_gradients(g);
  randomise(gpu, params.as<float>(), s.d, 1, 0.03f);
  for (const dim T : {dim{32}, dim{2048}}) {
    const moe::device_buffer rows(4 * (4 * static_cast<std::size_t>(T * s.d) + 256));
    const moe::device_buffer work(net.context_bytes(T) + net.scratch_bytes(T));
    moe::device_arena r(rows.bytes()), mem(work.bytes());
    const auto x = r.template matrix<float>("x", T, s.d), y = r.template matrix<float>("y", T, s.d);
    const auto dy = r.template matrix<float>("dy", T, s.d), dx = r.template matrix<float>("dx", T, s.d);
    auto ctx = net.make_context(T, mem);
    randomise(gpu, moe::flat(dy), s.d, 3, 1);
    const double ceiling = limit(gpu, blas, T * K, s.d, s.f);
    for (const bool skewed : {false, true}) {
      randomise(gpu, moe::flat(x), s.d, 2, 1, skewed ? 1.f : 0.f);
      const double forward = seconds(gpu, [&] { net.forward(w, x, y, ctx, mem); });
      const double backward = seconds(gpu, [&] { net.backward(w, x, ctx, dy, dx, dw, mem); });
      const double work_forward = s.flops(T, K) / 1e12;
      std::printf("%-4s %5td  %-7s %9.2f %9.2f %9.2f\n", s.name, T, skewed ? "skewed" : "even", work_forward / forward,
                  2 * work_forward / backward, ceiling);
      std::fflush(stdout);
    }
  }
}

}  // namespace

int main() {
  cudaDeviceProp device;
  if (cudaGetDeviceProperties(&device, 0) != cudaSuccess) {
    std::puts("skipped: no CUDA device");
    return 77;
  }
  const moe::cuda<> gpu;
  cublasHandle_t blas;
  require(cublasCreate(&blas) == CUBLAS_STATUS_SUCCESS, "cublasCreate");
  require(cublasSetStream(blas, gpu.stream()) == CUBLAS_STATUS_SUCCESS, "cublasSetStream");
  std::printf("%s, float32, TFLOP/s\n", device.name);
  std::printf("%-4s %5s  %-7s %9s %9s %9s\n", "", "T", "routing", "forward", "backward", "cuBLAS");
  measure<2>(gpu, blas, {"S1", 1024, 3584, 8});
  measure<8>(gpu, blas, {"S2", 2048, 768, 128});
  measure<8>(gpu, blas, {"S3", 2048, 1024, 64});
  measure<1>(gpu, blas, {"S4", 1024, 512, 96});
  cublasDestroy(blas);
}
