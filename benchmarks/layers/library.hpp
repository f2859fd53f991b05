// SPDX-License-Identifier: Apache-2.0
/// The library's layers as contestants. A new type of weights is one file beside this one that says how an expert gets its
/// weights, and a line in layers.cpp.
#pragma once

#include <cmath>

#include "layers/any_top_k.hpp"
#include "layers/layers.hpp"
#include "moe/backend/cpu.hpp"
#include "moe/combine/weighted_sum.hpp"
#include "moe/expert/ffn.hpp"
#include "moe/gate/linear.hpp"
#include "moe/layer.hpp"

namespace bench {

/// `Weights` is what an expert needs of a layer: constructed from a layer_source, its shape and the policy; `views` are the
/// expert's weights, `bytes` their size, `read_back` writes them in float32.
template <class Expert, class Weights>
class library_layer : public contestant {
 protected:
  using net = moe::layer<moe::biased_linear_gate, any_top_k, Expert, moe::weighted_sum, any_top_k::backend>;

 public:
  explicit library_layer(const model_shape& s)
      : contestant("moe"), net_({.d = s.d, .f = s.f, .experts = s.experts}, any_top_k{static_cast<int>(s.k)}) {}

  void prepare(std::span<const batch> batches, int) override {
    const dim T = batches[0].x.rows;
    work_ = moe::buffer(net_.inference_context_bytes(T) + net_.scratch_bytes(T));
    mem_ = moe::arena(work_.bytes());
    context_ = net_.make_inference_context(T, mem_);
    bind(batches);
  }
  void read_back(layer_source& to) const override { layers_.back().read_back(to, net_.sizes()); }
  void run(std::size_t i, matrix_view<float> y) override { net_.forward(weights_[i], batches_[i].x, y, context_, mem_); }

 protected:
  void bind(std::span<const batch> batches) {
    batches_ = batches;
    weights_.clear();
    for (const batch& b : batches) {
      typename net::weights w{};
      w.gate.w = mutable_view(b.router.data, b.router.rows, b.router.cols);
      w.gate.bias = mutable_view(b.bias.data(), b.router.rows, 1);
      w.experts = layers_[static_cast<std::size_t>(b.layer % this->layers())].views;
      weights_.push_back(w);
    }
  }

  net net_;
  moe::buffer work_;
  moe::arena mem_;
  typename net::context context_{};
  std::span<const batch> batches_;
  std::vector<typename net::weights> weights_;  ///< of each batch

 private:
  double add(const std::shared_ptr<const layer_source>& w) override {
    layers_.emplace_back(w, net_.sizes(), net_.experts());
    return layers_.back().bytes;
  }
  // The gate's weights are views of the kind that training writes to; forward only reads them.
  static matrix_view<float> mutable_view(const float* p, dim rows, dim cols) { return {const_cast<float*>(p), rows, cols}; }

  std::vector<Weights> layers_;
};

/// A training step: forward, then the gradients of everything. y is the result of forward; gradients are those of the call.
template <class Expert, class Weights>
class library_training : public library_layer<Expert, Weights> {
  using base = library_layer<Expert, Weights>;
  using typename base::net;

 public:
  using base::base;

  void prepare(std::span<const batch> batches, int) override {
    const dim T = batches[0].x.rows, d = batches[0].x.cols;
    this->work_ = moe::buffer(this->net_.context_bytes(T) + this->net_.scratch_bytes(T));
    this->mem_ = moe::arena(this->work_.bytes());
    this->context_ = this->net_.make_context(T, this->mem_);
    gradients_ = moe::buffer(this->net_.gradient_bytes());
    moe::arena mem(gradients_.bytes());
    dw_ = this->net_.make_gradients(mem);
    dx_ = moe::buffer(static_cast<std::size_t>(T * d) * sizeof(float));
    this->bind(batches);
  }
  void run(std::size_t i, matrix_view<float> y) override {
    const auto x = this->batches_[i].x;
    const matrix_view<float> dx(dx_.template as<float>().data(), x.rows, x.cols);
    this->net_.forward(this->weights_[i], x, y, this->context_, this->mem_);
    this->net_.backward(this->weights_[i], x, this->context_, x, dx, dw_, this->mem_, moe::gradient_mode::replace);
  }
  layer_gradients gradients() const override {
    const batch& b = this->batches_[0];
    const auto& experts = dw_.experts;
    return {{dx_.template as<float>().data(), b.x.rows, b.x.cols},
            dw_.gate.w,
            dw_.gate.bias,
            experts.gate,
            experts.up,
            experts.down};
  }

 private:
  moe::buffer gradients_, dx_;
  typename net::gradients dw_{};
};

}  // namespace bench
