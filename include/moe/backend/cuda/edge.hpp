// SPDX-License-Identifier: Apache-2.0
/// How a layer's public functions see device memory: every view wears its space, so that host memory does not pass for it.
#pragma once

#include "moe/backend/cuda/device.hpp"
#include "moe/layer.hpp"

namespace moe {

/// A view of device memory. Views of the library come with it; only who knows that a pointer is one of a device wraps it.
template <class V>
struct on_device {
  V view{};

  on_device() = default;
  explicit on_device(V v) noexcept : view(v) {}
  template <class U>
    requires std::convertible_to<U, V> && (!std::same_as<U, V>)
  on_device(const on_device<U>& v) noexcept : view(v.view) {}
};

/// A matrix without gaps between its rows as one span: what is copied from and to the host.
template <class T>
on_device<std::span<T>> flat(const on_device<matrix_view<T>>& m) noexcept {
  MOE_ASSERT(m.view.ld == m.view.cols);
  return on_device<std::span<T>>({m.view.data, static_cast<std::size_t>(m.view.rows * m.view.cols)});
}

/// Bytes of a device, what a device_arena carves.
using device_bytes = on_device<std::span<std::byte>>;

/// The arena of a layer on a device.
class device_arena {
 public:
  device_arena() = default;
  explicit device_arena(device_bytes memory) noexcept : mem_(memory.view) {}

  template <class T>
  on_device<matrix_view<T>> matrix(const char* name, dim rows, dim cols) noexcept {
    return on_device<matrix_view<T>>(mem_.matrix<T>(name, rows, cols));
  }
  std::size_t used() const noexcept { return mem_.used(); }
  std::size_t left() const noexcept { return mem_.left(); }
  std::size_t mark() const noexcept { return mem_.mark(); }
  void rewind(std::size_t m) noexcept { mem_.rewind(m); }

 private:
  friend struct edge<device>;
  moe::arena mem_;
};

template <>
struct edge<device> {
  using arena = device_arena;
  template <class V>
  using view = on_device<V>;
  static moe::arena& open(device_arena& mem) noexcept { return mem.mem_; }
  template <class V>
  static V& open(on_device<V>& v) noexcept { return v.view; }
  template <class V>
  static const V& open(const on_device<V>& v) noexcept { return v.view; }
  template <class V>
  static on_device<V> close(V v) noexcept { return on_device<V>(v); }
};

}  // namespace moe
