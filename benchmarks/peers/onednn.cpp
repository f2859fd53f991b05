// SPDX-License-Identifier: Apache-2.0
// A loop of oneDNN products over the experts, with weights packed ahead: gather, gate and up in one product, activation, down,
// scatter, each shared between the threads. It is handed the plan, so it does not run the router.
#include <cmath>
#include <cstring>
#include <dnnl.hpp>
#include <map>
#include <xsimd/xsimd.hpp>

#include "peers/peers.hpp"

namespace bench {
namespace {

using dnnl::memory;

struct half {  // bf16
  std::uint16_t bits;
};
half rounded(float v) {
  std::uint32_t u;
  std::memcpy(&u, &v, sizeof u);
  return {static_cast<std::uint16_t>((u + 0x7fffu + (u >> 16 & 1u)) >> 16)};
}
void convert(const float* from, float* to, dim n) { std::memcpy(to, from, static_cast<std::size_t>(n) * sizeof(float)); }
void convert(const float* from, half* to, dim n) {
  for (dim i = 0; i < n; ++i) to[i] = rounded(from[i]);
}

// z[2f] -> a[f] = silu(gate) * up, in place over the gate.
void activate(float* z, dim f) {
  using lane = xsimd::batch<float>;
  constexpr dim width = static_cast<dim>(lane::size);
  dim j = 0;
  for (; j + width <= f; j += width) {
    const lane g = lane::load_unaligned(z + j), u = lane::load_unaligned(z + f + j);
    (g / (lane(1) + xsimd::exp(-g)) * u).store_unaligned(z + j);
  }
  for (; j < f; ++j) z[j] = z[j] / (1 + std::exp(-z[j])) * z[f + j];
}

// Products x W^T for weights W[N,K] of one shape in the layout that oneDNN likes, one primitive for every number of rows.
class products {
 public:
  products(const dnnl::engine& engine, memory::data_type type, dim N, dim K)
      : engine_(engine), type_(type), N_(N), K_(K), packed_(make(64, {{K, N}, type, memory::format_tag::any}).weights_desc()) {}

  memory pack(float* w) const {
    const memory plain({{K_, N_}, memory::data_type::f32, memory::format_tag::ba}, engine_, w);
    memory packed(packed_, engine_);
    dnnl::stream stream(engine_);
    dnnl::reorder(plain, packed).execute(stream, const_cast<memory&>(plain), packed);
    stream.wait();
    return packed;
  }
  void forget() { by_rows_.clear(); }
  void run(dnnl::stream& stream, const memory& w, void* x, float* y, dim rows) {
    auto at = by_rows_.find(rows);
    if (at == by_rows_.end()) at = by_rows_.emplace(rows, make(rows, packed_)).first;
    at->second.execute(stream, {{DNNL_ARG_SRC, memory({{rows, K_}, type_, memory::format_tag::ab}, engine_, x)},
                                {DNNL_ARG_WEIGHTS, w},
                                {DNNL_ARG_DST, memory({{rows, N_}, memory::data_type::f32, memory::format_tag::ab}, engine_, y)}});
  }

 private:
  dnnl::matmul::primitive_desc make(dim rows, const memory::desc& weights) const {
    const memory::desc x({rows, K_}, type_, memory::format_tag::ab), y({rows, N_}, memory::data_type::f32, memory::format_tag::ab);
#if DNNL_VERSION_MAJOR < 3
    return {dnnl::matmul::desc(x, weights, y), engine_};
#else
    return {engine_, x, weights, y};
#endif
  }

  dnnl::engine engine_;
  memory::data_type type_;
  dim N_, K_;
  memory::desc packed_;
  std::map<dim, dnnl::matmul> by_rows_;
};

template <class T>
class onednn_loop final : public contestant {
 public:
  explicit onednn_loop(const model_shape& s)
      : contestant("onednn"), s_(s), stream_(engine_), up_(engine_, type, 2 * s.f, s.d), down_(engine_, type, s.d, s.f) {}

  std::string version() const override {
    const dnnl::version_t& v = *dnnl::version();
    return std::to_string(v.major) + "." + std::to_string(v.minor) + "." + std::to_string(v.patch);
  }
  void prepare(std::span<const batch> batches, int) override {
    batches_ = batches;
    up_.forget();
    down_.forget();
    const auto rows = static_cast<std::size_t>(batches[0].x.rows);  // of one expert, at most
    x_.resize(rows * static_cast<std::size_t>(s_.d));
    z_.resize(rows * static_cast<std::size_t>(2 * s_.f));
    a_.resize(rows * static_cast<std::size_t>(s_.f));
    ys_.resize(rows * static_cast<std::size_t>(s_.d));
    for (std::size_t i = 0; i < batches.size(); ++i) group(batches[i], [&](dim e, dim n) { multiply(batches[i], e, n); });
  }

  void run(std::size_t i, matrix_view<float> y) override {
    const batch& b = batches_[i];
    std::memset(y.data, 0, static_cast<std::size_t>(y.rows * y.cols) * sizeof(float));
    group(b, [&](dim e, dim n) {
#pragma omp parallel for
      for (dim r = 0; r < n; ++r) convert(b.x.row(token(r)), x_.data() + r * s_.d, s_.d);
      multiply(b, e, n);
#pragma omp parallel for
      for (dim r = 0; r < n; ++r) {
        const float weight = b.weight[static_cast<std::size_t>(rows_[static_cast<std::size_t>(r)])], *from = ys_.data() + r * s_.d;
        float* to = y.row(token(r));
        for (dim j = 0; j < s_.d; ++j) to[j] += weight * from[j];
      }
    });
  }

 private:
  static constexpr memory::data_type type = std::is_same_v<T, half> ? memory::data_type::bf16 : memory::data_type::f32;
  struct expert {
    memory up, down;
  };

  double add(const std::shared_ptr<const layer_source>& w) override {
    const dim d = s_.d, f = s_.f;
    std::vector<float> both(static_cast<std::size_t>(2 * f * d));
    std::vector<expert>& experts = layers_.emplace_back();
    for (dim e = 0; e < s_.experts; ++e) {
      std::memcpy(both.data(), w->gate.row(e * f), static_cast<std::size_t>(f * d) * sizeof(float));
      std::memcpy(both.data() + f * d, w->up.row(e * f), static_cast<std::size_t>(f * d) * sizeof(float));
      experts.push_back({up_.pack(both.data()), down_.pack(w->down.row(e * d))});
    }
    return static_cast<double>(3 * s_.experts * d * f) * sizeof(T);
  }

  // Calls f(e, rows) for every expert that has rows; `rows_` are their places among the choices meanwhile.
  template <class F>
  void group(const batch& b, F f) {
    for (dim e = 0; e < s_.experts; ++e) {
      rows_.clear();
      for (std::size_t c = 0; c < b.expert.size(); ++c)
        if (b.expert[c] == e) rows_.push_back(static_cast<dim>(c));
      if (!rows_.empty()) f(e, static_cast<dim>(rows_.size()));
    }
  }
  dim token(dim r) const { return rows_[static_cast<std::size_t>(r)] / s_.k; }

  void multiply(const batch& b, dim e, dim n) {
    const expert& w = layers_[static_cast<std::size_t>(b.layer % layers())][static_cast<std::size_t>(e)];
    up_.run(stream_, w.up, x_.data(), z_.data(), n);
    stream_.wait();
#pragma omp parallel for
    for (dim r = 0; r < n; ++r) {
      float* z = z_.data() + r * 2 * s_.f;
      activate(z, s_.f);
      convert(z, a_.data() + r * s_.f, s_.f);
    }
    down_.run(stream_, w.down, a_.data(), ys_.data(), n);
    stream_.wait();
  }

  model_shape s_;
  dnnl::engine engine_{dnnl::engine::kind::cpu, 0};
  dnnl::stream stream_;
  products up_, down_;
  std::vector<std::vector<expert>> layers_;
  std::span<const batch> batches_;
  std::vector<dim> rows_;
  std::vector<T> x_, a_;
  std::vector<float> z_, ys_;
};

}  // namespace

std::unique_ptr<contestant> make_onednn_loop(const model_shape& s, std::string_view type) {
  if (type == "f32") return std::make_unique<onednn_loop<float>>(s);
  if (type == "bf16") return std::make_unique<onednn_loop<half>>(s);
  return nullptr;
}

}  // namespace bench
