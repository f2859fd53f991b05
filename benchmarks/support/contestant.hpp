// SPDX-License-Identifier: Apache-2.0
/// What the table compares: the library at one type of weights, and its peers.
#pragma once

#include <benchmark/benchmark.h>

#include <memory>
#include <span>
#include <string>
#include <vector>

#include "moe/core/view.hpp"
#include "support/measure.hpp"
#include "support/shapes.hpp"

namespace bench {

using moe::idx;
using moe::matrix_view;

/// Weights of one layer in float32: router[E,d], gate[E*f,d], up[E*f,d], down[E*d,f].
struct layer_source {
  matrix_view<float> router, gate, up, down;
};

/// Gradients of a layer: those of its tokens, x[T,d], and of its weights, as above, with bias[E,1].
struct layer_gradients {
  matrix_view<float> x, router, bias, gate, up, down;
};

/// The tokens of one call, the layer they go to, and the plan that its router comes to: the k best experts of each token,
/// best first, and their weights. `bias` is added to the scores.
struct batch {
  int layer;
  matrix_view<const float> x, router;  ///< [T,d], [E,d]
  std::span<const float> bias;         ///< [E]
  std::vector<idx> expert;             ///< [T*k]
  std::vector<float> weight;           ///< [T*k]
};

/// One implementation of the layer. It is given layers until it has enough of them, and then batches of one size after
/// another; a batch of layer i runs on its own layer i % layers().
class contestant {
 public:
  explicit contestant(std::string name) : name_(std::move(name)) {}
  contestant(const contestant&) = delete;
  contestant& operator=(const contestant&) = delete;
  virtual ~contestant() = default;

  const std::string& name() const { return name_; }
  int layers() const { return layers_; }
  /// Bytes of the weights of all layers so far.
  double bytes() const { return bytes_; }
  /// Whether it wants another layer: until `rotate` bytes of others lie between two uses of one.
  virtual bool wants_layers(double rotate) const { return layers_ == 0 || bytes_ * (layers_ - 1) / layers_ < rotate; }
  /// Why it cannot compete, or can no longer; empty where it can.
  virtual std::string failure() const { return {}; }
  virtual std::string version() const { return {}; }

  /// Takes a copy of a layer in a form of its own, or keeps the source itself.
  void take(const std::shared_ptr<const layer_source>& w) {
    bytes_ += add(w);
    ++layers_;
  }
  /// Overwrites the layer that was taken last with what it rounded its weights to, where it did.
  virtual void read_back(layer_source&) const {}
  /// Sizes what calls of `batches[i]` need; all have the same number of tokens. May be called again.
  virtual void prepare(std::span<const batch> batches, int threads) = 0;
  /// y[T,d] = batch i of those prepared.
  virtual void run(std::size_t i, matrix_view<float> y) = 0;
  /// Where it trains, of x in the last call, and of the weights in all calls since `prepare`. dy is x.
  virtual layer_gradients gradients() const { return {}; }
  /// What a call takes.
  virtual double seconds_of(std::size_t i, matrix_view<float> y) {
    const double start = seconds();
    run(i, y);
    return seconds() - start;
  }

  /// Google Benchmark's loop over calls from number `first` on. A peer in a process of its own overrides it: there the clock
  /// is that of the other process (`SetIterationTime`), since a round trip takes as long as a small layer.
  virtual bool keeps_time() const { return false; }
  virtual void repeat(benchmark::State& state, std::size_t first, std::size_t batches, matrix_view<float> y) {
    for (auto _ : state) run(first++ % batches, y);
  }

 protected:
  virtual double add(const std::shared_ptr<const layer_source>& w) = 0;  ///< returns the bytes that were added

 private:
  std::string name_;
  int layers_ = 0;
  double bytes_ = 0;
};

}  // namespace bench
