// SPDX-License-Identifier: Apache-2.0
// A policy of your own is a struct with the members of one concept: no base class, no registration, no macro.
#include <cstdio>
#include <moe/moe.hpp>

/// scores[t,e] = -|x_t - center_e|^2: every expert serves the tokens near its center. Trainable.
struct distance_gate {
  using input = moe::matrix_view<const float>;
  using input_grad = moe::matrix_view<float>;
  struct weights { moe::matrix_view<float> center; };  // [E,d]
  using weights_grad = weights;
  using context = moe::nothing;

  weights make_weights(moe::shape s, moe::arena& mem) const noexcept { return {mem.matrix<float>("center", s.experts, s.d)}; }

  template <class B>
  void forward(const moe::call<B>& on, const weights& w, const input& x, moe::matrix_view<float> scores,
               context&) const noexcept {
    for_each_token(on, x.rows, [&](moe::dim t) {
      for (moe::dim e = 0; e < w.center.rows; ++e) {
        float sum = 0;
        for (moe::dim j = 0; j < x.cols; ++j) sum += (x(t, j) - w.center(e, j)) * (x(t, j) - w.center(e, j));
        scores(t, e) = -sum;
      }
    });
  }
  template <class B>
  void backward(const moe::call<B>& on, const weights& w, const input& x, const context&,
                moe::matrix_view<const float> dscores, input_grad dx, weights_grad& dw) const noexcept {
    for_each_token(on, x.rows, [&](moe::dim t) {  // one writer per token
      for (moe::dim e = 0; e < w.center.rows; ++e)
        for (moe::dim j = 0; j < x.cols; ++j) dx(t, j) -= 2 * dscores(t, e) * (x(t, j) - w.center(e, j));
    });
    for_each_token(on, w.center.rows, [&](moe::dim e) {  // one writer per center
      for (moe::dim t = 0; t < x.rows; ++t)
        for (moe::dim j = 0; j < x.cols; ++j) dw.center(e, j) += 2 * dscores(t, e) * (x(t, j) - w.center(e, j));
    });
  }
};

using backend = moe::scalar<>;
static_assert(moe::TrainableGate<distance_gate, backend>);  // names what is missing, if something is
using layer = moe::layer<distance_gate, moe::top_k<1>, moe::ffn_expert, moe::weighted_sum, backend>;

int main() {
  const moe::dim T = 6, d = 2;
  const layer net({.tokens = T, .d = d, .f = 4, .experts = 3});
  moe::buffer params(net.weight_bytes()), work(net.inference_context_bytes(T) + net.scratch_bytes(T));
  moe::arena p(params.bytes()), mem(work.bytes());
  const layer::weights w = net.make_weights(p);
  const float centers[] = {0, 0, 5, 5, -5, 5};
  for (int i = 0; i < 6; ++i) w.gate.center(i / 2, i % 2) = centers[i];

  float x[] = {0.1f, 0.2f, 4.8f, 5.3f, -5.f, 4.f, -0.3f, 0.1f, 6.f, 6.f, 0.f, -1.f}, y[T * d];
  layer::context ctx = net.make_inference_context(T, mem);
  net.forward(w, {x, T, d}, {y, T, d}, ctx, mem);
  for (int e = 0; e < 3; ++e) {
    std::printf("center (%g, %g) serves", w.gate.center(e, 0), w.gate.center(e, 1));
    for (int r = ctx.plan.offsets[e]; r < ctx.plan.offsets[e + 1]; ++r)
      std::printf("  (%g, %g)", x[2 * ctx.plan.token[r]], x[2 * ctx.plan.token[r] + 1]);
    std::printf("\n");
  }
}
