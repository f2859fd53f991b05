// SPDX-License-Identifier: Apache-2.0
// expect: moe: this policy has no device path [docs/backends.md]
// lines: <= 15
#include "moe/backend/cuda/primitives.hpp"

struct accelerator {
  using space = moe::device;
  using arch = moe::arch::cuda;
  template <class F>
  void for_each(moe::dim, const F&) const noexcept {}
};

void scale(const moe::call<accelerator>& on, moe::matrix_view<float> y) {
  for_each_token(on, y.rows, [=](moe::dim t) { y(t, 0) *= 2; });
}
