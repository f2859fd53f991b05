// SPDX-License-Identifier: Apache-2.0
/// What tests of policies and layers share: a call to run a policy with, a layer with its memory, the gradient check.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "moe/layer.hpp"

namespace testing {

using moe::dim;
using moe::idx;

/// A call of backend B with scratch of its own, which lasts as long as the program: `forward(testing::on<B>(s), ...)`.
template <class B>
moe::call<B> on(moe::shape sizes = {}) {
  static const B backend{};
  static const moe::buffer memory(std::size_t{1} << 26);
  static moe::arena scratch(memory.bytes());
  return {backend, scratch, sizes};
}

/// n numbers of mean 0 and the given deviation, a pure function of the seed.
inline std::vector<float> normals(dim n, std::uint64_t seed, float deviation = 1) {
  const moe::rng random(seed);
  std::vector<float> v(static_cast<std::size_t>(n));
  for (std::size_t i = 0; i < v.size(); ++i) v[i] = deviation * random.normal(i);
  return v;
}
/// n whole numbers of -bound .. bound.
inline std::vector<float> integers(dim n, std::uint64_t seed, int bound) {
  const moe::rng random(seed);
  const auto span = static_cast<std::uint64_t>(2 * bound + 1);
  std::vector<float> v(static_cast<std::size_t>(n));
  for (std::size_t i = 0; i < v.size(); ++i) v[i] = static_cast<float>(static_cast<int>(random(i) % span) - bound);
  return v;
}

/// Fills the float32 tensors of a catalogue with random values of their usual size: fan_in as it says, biases near 0,
/// scales near 1, none of them exactly there.
inline void randomise(const std::vector<moe::slot>& catalogue, std::span<float> flat, std::uint64_t seed) {
  const moe::rng random(seed);
  for (const moe::slot& s : catalogue) {
    if (s.type != moe::element::f32) continue;
    const float mean = s.start == moe::initial::ones ? 1.f : 0.f;
    const float deviation = s.start == moe::initial::fan_in ? 1 / std::sqrt(static_cast<float>(s.cols)) : 0.1f;
    for (std::size_t i = s.offset / sizeof(float); i < (s.offset + s.bytes) / sizeof(float); ++i)
      flat[i] = mean + deviation * random.normal(i);
  }
}

/// A layer with everything it needs for T tokens: random weights, x and dy; zeroed gradients, y and dx.
/// The gate's input is made from x[T,d]; a test whose gate reads more sets `in`.
template <class L>
struct model {
  L net;
  dim tokens, d;
  moe::buffer params, grads, memory;
  moe::arena params_mem, grads_mem, work;
  typename L::weights w;
  typename L::gradients dw;
  typename L::context ctx;
  std::vector<float> x, y, dy, dx;
  typename L::input in{x_view()};
  typename L::input_grad din{moe::matrix_view<float>(dx.data(), tokens, d)};

  /// `training` chooses make_context or make_inference_context.
  model(const L& layer, dim T, dim width, std::uint64_t seed, bool training = true)
      : net(layer),
        tokens(T),
        d(width),
        params(net.weight_bytes()),
        grads(net.gradient_bytes()),
        memory(net.context_bytes(T) + net.scratch_bytes(T)),
        params_mem(params.bytes()),
        grads_mem(grads.bytes()),
        work(memory.bytes()),
        w(net.make_weights(params_mem)),
        dw(net.make_gradients(grads_mem)),
        ctx(training ? net.make_context(T, work) : net.make_inference_context(T, work)),
        x(normals(T * d, seed)),
        y(x.size()),
        dy(normals(T * d, seed + 1)),
        dx(x.size()) {
    randomise(net.catalogue(), weights(), seed + 2);
  }
  model(const model&) = delete;
  model& operator=(const model&) = delete;

  std::span<float> weights() const noexcept { return params.template as<float>(); }   ///< flat
  std::span<float> gradients() const noexcept { return grads.template as<float>(); }  ///< flat
  moe::matrix_view<const float> x_view() const noexcept { return {x.data(), tokens, d}; }
  moe::matrix_view<float> y_view() noexcept { return {y.data(), tokens, d}; }
  moe::matrix_view<const float> dy_view() const noexcept { return {dy.data(), tokens, d}; }

  void forward() { net.forward(w, in, y_view(), ctx, work); }
  /// Adds to dx and to the flat gradients, or replaces them.
  void backward() { net.backward(w, in, ctx, dy_view(), din, dw, work); }
  void backward(moe::gradient_mode mode) { net.backward(w, in, ctx, dy_view(), din, dw, work, mode); }
};

/// The arrays of a plan that say who goes where; weights are not compared.
struct assignments {
  std::vector<idx> offsets, token, token_offsets, position;

  assignments() = default;
  explicit assignments(const moe::routing_plan& p)
      : offsets(p.offsets.begin(), p.offsets.end()),
        token(p.token.begin(), p.token.begin() + p.rows()),
        token_offsets(p.token_offsets.begin(), p.token_offsets.end()),
        position(p.position.begin(), p.position.begin() + p.token_offsets.back()) {}
  friend bool operator==(const assignments&, const assignments&) = default;
};

/// Those of a layer's context, of the routed part of a sum's or of the layer of a block's; none where nothing is routed.
template <class Context>
assignments assignments_of(const Context& ctx) {
  if constexpr (requires { ctx.plan.token_offsets; })
    return assignments(ctx.plan);
  else if constexpr (requires { ctx.routed; })
    return assignments_of(ctx.routed);
  else if constexpr (requires { ctx.layer; })
    return assignments_of(ctx.layer);
  else
    return {};
}

/// Makes every gradient of a catalogue NaN; what lies between them stays.
inline void spoil(const std::vector<moe::slot>& catalogue, std::span<float> flat) {
  for (const moe::slot& s : catalogue)
    std::fill_n(flat.data() + s.offset / sizeof(float), s.bytes / sizeof(float), std::numeric_limits<float>::quiet_NaN());
}
inline bool same_bits(std::span<const float> a, std::span<const float> b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size_bytes()) == 0);
}
/// Whether gradients that replace NaN are those that were added to zeros, bit for bit: after one forward and one backward.
template <class L>
bool replaces_gradients(model<L>& m) {
  const std::vector<float> wanted(m.gradients().begin(), m.gradients().end());
  spoil(m.net.gradient_catalogue(), m.gradients());
  const std::vector<float> dx = m.dx;
  m.backward(moe::gradient_mode::replace);
  m.dx = dx;
  return same_bits(m.gradients(), wanted);
}

struct gradient_report {
  double worst = 0;   ///< largest error of a probe
  std::string where;  ///< its tensor and element: "experts.down(3, 7)"
  dim skipped = 0;    ///< probes that change the plan, where there is no derivative
  dim probed = 0;     ///< all probes, the skipped ones included
};

struct no_auxiliary_loss {
  template <class Context>
  double operator()(const Context&) const noexcept {
    return 0;
  }
};

/// Compares backward, which has to write the same gradients whether it adds to zeros or replaces NaN, with central
/// differences of the loss <dy, y> + auxiliary(ctx), over every x and every float32 weight.
///
/// The loss is the difference of two runs, taken element by element in double: what a probe does not touch is equal bit
/// for bit and cancels, so only the touched elements bring their float32 rounding.
/// Step: h = 2^-7 max(1/4, |v|), since curvature costs h^2/6 ~ 1e-5 and rounding 2^-24/h ~ 1e-5 of values near one. A step
/// whose error is above 1e-3 is tried again at h/4 and h/16, and the best of the three counts: a kink (relu, a clamp) or a
/// change of the plan inside the wider step spoils it, rounding spoils the narrower, and a wrong gradient is wrong at all.
/// Error: |numeric - got| / max(|numeric|, rms of the tensor's gradient, 0.02), because rounding in a sum is relative to
/// the sum's largest terms, not to what is left after they cancel; 0.02 is where rounding alone reaches 1e-3.
template <class L, class Auxiliary = no_auxiliary_loss>
gradient_report gradcheck(const L& layer, dim T, dim d, std::uint64_t seed, Auxiliary auxiliary = {}) {
  model<L> m(layer, T, d, seed);
  m.forward();
  m.backward();
  const assignments plan = assignments_of(m.ctx);
  gradient_report report;
  if (!replaces_gradients(m)) return {.worst = HUGE_VAL, .where = "gradients that are replaced"};

  std::vector<float> ahead(m.y.size());
  // The slope at v over one step; false where the plan changed.
  const auto slope = [&](float& v, float h, double& numeric) {
    const float kept = v;
    v = kept + h;
    const double up = v;
    m.forward();
    bool same = assignments_of(m.ctx) == plan;
    double loss = auxiliary(m.ctx);
    ahead = m.y;
    v = kept - h;
    const double step = up - v;
    m.forward();
    v = kept;
    same = same && assignments_of(m.ctx) == plan;
    loss -= auxiliary(m.ctx);
    for (std::size_t i = 0; i < ahead.size(); ++i) loss += (double{ahead[i]} - double{m.y[i]}) * m.dy[i];
    numeric = loss / step;
    return same;
  };
  const auto probe = [&](float& v, float got, double rms) {
    double best = -1;
    for (float h = std::max(0.25f, std::abs(v)) / 128, narrowest = h / 16; h >= narrowest; h /= 4) {
      double numeric = 0;
      if (!slope(v, h, numeric)) continue;
      const double error = std::abs(numeric - got) / std::max({std::abs(numeric), rms, 0.02});
      if (best < 0 || !(error > best)) best = error;
      if (best < 1e-3) break;
    }
    return best;
  };
  const auto probe_all = [&](const std::string& name, std::span<float> values, std::span<const float> got, dim cols) {
    double squares = 0;
    for (const float g : got) squares += double{g} * g;
    const double rms = std::sqrt(squares / static_cast<double>(std::max<std::size_t>(got.size(), 1)));
    for (std::size_t i = 0; i < values.size(); ++i) {
      const double error = probe(values[i], got[i], rms);
      ++report.probed;
      report.skipped += error < 0;
      if (error <= report.worst) continue;
      report.worst = error;
      const dim at = static_cast<dim>(i);
      report.where = name + '(' + std::to_string(at / cols) + ", " + std::to_string(at % cols) + ')';
    }
  };

  probe_all("x", m.x, m.dx, d);
  for (const moe::slot& s : layer.catalogue()) {
    if (s.type != moe::element::f32) continue;
    const std::size_t first = s.offset / sizeof(float), n = s.bytes / sizeof(float);
    probe_all(s.name, m.weights().subspan(first, n), m.gradients().subspan(first, n), s.cols);
  }
  return report;
}

}  // namespace testing
