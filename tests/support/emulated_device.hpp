// SPDX-License-Identifier: Apache-2.0
/// A device whose kernels run on the host, thread after thread between barriers: what the CUDA backend computes without a
/// GPU.
#pragma once

#include <cstring>
#include <vector>

#include "moe/backend/cuda/primitives.hpp"

namespace testing {

/// `backwards` starts the threads and blocks in the opposite order, which may change nothing: no thread may read what
/// another writes before the next barrier, and no block what another writes at all.
struct emulated_device {
  using space = moe::device;
  using arch = moe::arch::cuda;
  bool backwards = false;

  template <class F>
  void for_each(moe::dim n, const F& f) const noexcept {
    for (moe::dim i = 0; i < n; ++i) f(backwards ? n - 1 - i : i);
  }
  template <class P>
  void run(moe::dim blocks, const P& p) const noexcept {
    for (moe::dim b = 0; b < blocks; ++b) run_block(backwards ? blocks - 1 - b : b, p);
  }

 private:
  template <class P>
  void run_block(moe::dim block, const P& p) const noexcept {
    std::vector<typename P::shared> all(1);
    std::vector<typename P::local> own(P::threads);
    std::memset(static_cast<void*>(all.data()), 0xff, sizeof(typename P::shared));  // NaN, -1: shared memory is not cleared
    moe::dim steps = 0;
    const auto each = [&](auto f) {
      for (int i = 0; i < P::threads; ++i) f(backwards ? P::threads - 1 - i : i);
    };
    const auto own_of = [&](int i) -> auto& { return own[static_cast<std::size_t>(i)]; };
    each([&](int i) { steps = p.begin(block, i, own_of(i)); });
    for (moe::dim s = 0; s < steps; ++s) {
      each([&](int i) { p.load(s, i, all[0], own_of(i)); });
      each([&](int i) { p.use(s, i, all[0], own_of(i)); });
    }
    each([&](int i) { p.end(i, own_of(i)); });
  }
};

/// A span or matrix of the host that stands for memory of the emulated device.
template <class V>
moe::on_device<V> as_device(V v) {
  return moe::on_device<V>(v);
}

}  // namespace testing
