// SPDX-License-Identifier: Apache-2.0
/// An expert as a user may write it first, with rows of its own everywhere.
#pragma once

#include "moe/concepts.hpp"

namespace testing {

/// y = v_e x, elementwise, written the simple way: it stores its rows, differentiates from stored rows, and its forward
/// takes more scratch than its backward.
struct storing_expert {
  using input = moe::matrix_view<const float>;
  using input_grad = moe::matrix_view<float>;
  using output = moe::matrix_view<float>;
  struct weights {
    moe::matrix_view<float> v;
  };
  using weights_grad = weights;
  using context = moe::nothing;

  weights make_weights(moe::shape s, moe::arena& mem) const noexcept { return {mem.matrix<float>("v", s.experts, s.d)}; }
  output make_output(moe::shape s, moe::dim rows, moe::arena& mem) const noexcept {
    return mem.matrix<float>("ys", rows, s.d);
  }
  output make_scratch(moe::shape s, moe::dim rows, moe::arena& mem) const noexcept {
    return mem.matrix<float>("copy", rows, 3 * s.d);
  }
  output make_backward_scratch(moe::shape s, moe::dim rows, moe::arena& mem) const noexcept {
    return mem.matrix<float>("own", rows, s.d);
  }

  template <class B>
  void forward(const moe::call<B>& on, const weights& w, input x, moe::bank_rows rows, output ys, context&) const noexcept {
    moe::scratch_frame frame(on.scratch);
    const output copy = make_scratch(on.sizes, ys.rows, on.scratch).columns(2 * on.sizes.d, on.sizes.d);
    const auto from = rows.gather(x);
    map_rows(on, rows, copy, [&](moe::dim, moe::dim r, moe::dim j) { return from.row(r)[j]; });
    map_rows(on, rows, ys, [&](moe::dim e, moe::dim r, moe::dim j) { return w.v(e, j) * copy(r, j); });
  }
  template <class B>
  void backward(const moe::call<B>& on, const weights& w, input x, moe::bank_rows rows, const context&, output dys,
                input_grad dx, weights_grad& dw, std::span<float>) const noexcept {
    moe::scratch_frame frame(on.scratch);
    const output own = make_backward_scratch(on.sizes, dys.rows, on.scratch);
    const auto from = rows.gather(x);
    map_rows(on, rows, own, [&](moe::dim, moe::dim r, moe::dim j) { return dys(r, j) * from.row(r)[j]; });
    if (dw.v) sum_rows(on, rows, own, dw.v);
    map_rows(on, rows, own, [&](moe::dim e, moe::dim r, moe::dim j) { return dys(r, j) * w.v(e, j); });
    if (dx) scatter_add_rows(on, rows, moe::gathered<float>{own}, dx);
  }
};

}  // namespace testing
