// SPDX-License-Identifier: Apache-2.0
/// CUDA. Include from .cu files, compiled as C++20 for sm_80 or newer.
#pragma once

#include "moe/backend/cuda/memory.cuh"
#include "moe/backend/cuda/primitives.hpp"

namespace moe {

namespace detail {

inline constexpr int threads_of_for_each = 256;

template <class F>
__global__ void __launch_bounds__(threads_of_for_each) for_each_kernel(dim n, F f) {
  const dim step = dim{gridDim.x} * threads_of_for_each;
  for (dim i = dim{blockIdx.x} * threads_of_for_each + threadIdx.x; i < n; i += step) f(i);
}
template <class P>
__global__ void __launch_bounds__(P::threads) block_kernel(P p) {
  __shared__ typename P::shared all;
  typename P::local own;
  const int thread = static_cast<int>(threadIdx.x);
  const dim steps = p.begin(blockIdx.x, thread, own);
  for (dim i = 0; i < steps; ++i) {
    p.load(i, thread, all, own);
    __syncthreads();
    p.use(i, thread, all, own);
    __syncthreads();
  }
  p.end(thread, own);
}

}  // namespace detail

/// A CUDA device by a stream of its own or the user's. Work is queued and no call waits, so a result is there after
/// `sync()`, which throws what went wrong on the way. Copies share stream and errors.
template <class Level = arch::cuda>
class cuda {
 public:
  using space = device;
  using arch = Level;
  static constexpr dim row_tile = detail::tile_side;

  /// Without a device, `sync()` says so.
  cuda() : stream_(std::make_shared<device_stream>()) {}
  explicit cuda(cudaStream_t stream) : stream_(std::make_shared<device_stream>(stream)) {}

  cudaStream_t stream() const noexcept { return stream_->get(); }
  void sync() const { stream_->sync(); }

  /// to = from; the host's memory may be used again after sync().
  template <class T>
  void upload(std::span<const std::type_identity_t<T>> from, on_device<std::span<T>> to) const {
    expect(static_cast<dim>(from.size()), static_cast<dim>(to.view.size()), "moe::cuda::upload: from", "elements", "to");
    move(to.view.data(), from.data(), from.size_bytes(), cudaMemcpyHostToDevice);
  }
  template <class T>
  void download(on_device<std::span<T>> from, std::span<std::remove_const_t<T>> to) const {
    expect(static_cast<dim>(to.size()), static_cast<dim>(from.view.size()), "moe::cuda::download: to", "elements", "from");
    move(to.data(), from.view.data(), to.size_bytes(), cudaMemcpyDeviceToHost);
  }

  template <class F>
  void for_each(dim n, const F& f) const noexcept {
    constexpr dim threads = detail::threads_of_for_each, most = 1 << 30;
    const dim blocks = (n + threads - 1) / threads;
    if (blocks <= 0) return;
    detail::for_each_kernel<<<static_cast<unsigned>(blocks < most ? blocks : most), threads, 0, stream()>>>(n, f);
    stream_->note(cudaGetLastError());
  }
  template <class P>
  void run(dim blocks, const P& p) const noexcept {
    if (blocks <= 0) return;
    if (blocks > most_blocks) return stream_->note(cudaErrorInvalidConfiguration);
    detail::block_kernel<<<static_cast<unsigned>(blocks), P::threads, 0, stream()>>>(p);
    stream_->note(cudaGetLastError());
  }

 private:
  static constexpr dim most_blocks = 0x7fffffff;
  void move(void* to, const void* from, std::size_t bytes, cudaMemcpyKind kind) const noexcept {
    if (bytes > 0) stream_->note(cudaMemcpyAsync(to, from, bytes, kind, stream()));
  }

  std::shared_ptr<device_stream> stream_;
};

}  // namespace moe
