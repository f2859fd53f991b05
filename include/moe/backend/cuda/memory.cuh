// SPDX-License-Identifier: Apache-2.0
/// Memory of a CUDA device, its stream, and copies between it and the host.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <memory>

#include "moe/backend/cuda/edge.hpp"

namespace moe {

namespace detail {

inline std::string cuda_message(const char* what, cudaError_t e) {
  return std::string("moe::cuda: ") + what + ": " + cudaGetErrorName(e) + ", " + cudaGetErrorString(e);
}

}  // namespace detail

/// Owns zeroed bytes of the current device.
/// errors   device_error where there is no device or not enough memory
class device_buffer {
 public:
  device_buffer() = default;
  explicit device_buffer(std::size_t bytes) : size_(bytes) {
    if (bytes == 0) return;
    cudaError_t e = cudaMalloc(&block_, bytes);
    if (e == cudaSuccess) e = cudaMemset(block_, 0, bytes);
    if (e == cudaSuccess) e = cudaStreamSynchronize(cudaStreamLegacy);
    if (e == cudaSuccess) return;
    cudaFree(block_);
    throw device_error(detail::cuda_message(("device_buffer of " + std::to_string(bytes) + " bytes").c_str(), e));
  }
  device_buffer(device_buffer&& other) noexcept
      : block_(std::exchange(other.block_, nullptr)), size_(std::exchange(other.size_, 0)) {}
  device_buffer& operator=(device_buffer&& other) noexcept {
    std::swap(block_, other.block_);
    std::swap(size_, other.size_);
    return *this;
  }
  device_buffer(const device_buffer&) = delete;
  device_buffer& operator=(const device_buffer&) = delete;
  ~device_buffer() { cudaFree(block_); }

  std::size_t size() const noexcept { return size_; }
  device_bytes bytes() const noexcept { return device_bytes({static_cast<std::byte*>(block_), size_}); }
  /// The bytes as elements: the flat view that weights are copied to.
  template <class T>
  on_device<std::span<T>> as() const noexcept {
    return on_device<std::span<T>>({static_cast<T*>(block_), size_ / sizeof(T)});
  }

 private:
  void* block_ = nullptr;
  std::size_t size_ = 0;
};

/// A stream and the first error on it. Shared by the copies of a backend.
class device_stream {
 public:
  device_stream() noexcept {
    note(cudaStreamCreate(&stream_));
    owned_ = first_ == cudaSuccess;
  }
  explicit device_stream(cudaStream_t stream) noexcept : stream_(stream) {}
  device_stream(const device_stream&) = delete;
  device_stream& operator=(const device_stream&) = delete;
  ~device_stream() {
    if (owned_) cudaStreamDestroy(stream_);
  }

  cudaStream_t get() const noexcept { return stream_; }
  void note(cudaError_t e) noexcept {
    cudaError_t none = cudaSuccess;
    if (e != cudaSuccess) first_.compare_exchange_strong(none, e);
  }
  /// Waits for all work. Throws device_error with the first error since the last call.
  void sync() {
    note(cudaStreamSynchronize(stream_));
    const cudaError_t e = first_.exchange(cudaSuccess);
    if (e != cudaSuccess) throw device_error(detail::cuda_message("sync", e));
  }

 private:
  cudaStream_t stream_ = nullptr;
  bool owned_ = false;
  std::atomic<cudaError_t> first_ = cudaSuccess;
};

}  // namespace moe
