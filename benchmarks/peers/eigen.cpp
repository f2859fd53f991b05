// SPDX-License-Identifier: Apache-2.0
#include "moe/core/arena.hpp"
#include "peers/peers.hpp"
#include "support/eigen_training.hpp"

namespace bench {
namespace {

// Either keeps the source itself, since its weights are float32 in the order of memory.
class eigen_contestant : public contestant {
 public:
  explicit eigen_contestant(const model_shape& s) : contestant("eigen"), shape_(s) {}

  std::string version() const override {
    return std::to_string(EIGEN_WORLD_VERSION) + "." + std::to_string(EIGEN_MAJOR_VERSION) + "." +
           std::to_string(EIGEN_MINOR_VERSION);
  }

 protected:
  const layer_source& weights(const batch& b) const { return *sources_[static_cast<std::size_t>(b.layer % layers())]; }

  model_shape shape_;

 private:
  double add(const std::shared_ptr<const layer_source>& w) override {
    sources_.push_back(w);
    return 4. * static_cast<double>(3 * w->up.rows * w->up.cols);
  }

  std::vector<std::shared_ptr<const layer_source>> sources_;
};

class forward final : public eigen_contestant {
 public:
  explicit forward(const model_shape& s) : eigen_contestant(s), loop_(s.experts, static_cast<int>(s.k)) {}

  void prepare(std::span<const batch> batches, int) override { batches_ = batches; }
  void run(std::size_t i, matrix_view<float> y) override {
    const batch& b = batches_[i];
    const layer_source& w = weights(b);
    loop_.forward(b.router, b.bias, w.gate, w.up, w.down, b.x, y);
  }

 private:
  eigen_loop loop_;
  std::span<const batch> batches_;
};

class training final : public eigen_contestant {
 public:
  explicit training(const model_shape& s) : eigen_contestant(s), loop_(s.experts, static_cast<int>(s.k)) {}

  void prepare(std::span<const batch> batches, int) override {
    batches_ = batches;
    moe::arena count;
    (void)carve(count);
    memory_ = moe::buffer(count.used());
    moe::arena mem(memory_.bytes());
    gradients_ = carve(mem);
  }
  void run(std::size_t i, matrix_view<float> y) override {
    const batch& b = batches_[i];
    loop_.step(weights(b), b.bias, b.x, b.x, y, gradients_);
  }
  layer_gradients gradients() const override { return gradients_; }

 private:
  layer_gradients carve(moe::arena& mem) const {
    const dim d = shape_.d, f = shape_.f, E = shape_.experts;
    layer_gradients to;
    to.x = mem.matrix<float>("x", batches_[0].x.rows, d);
    to.router = mem.matrix<float>("router", E, d);
    to.bias = mem.matrix<float>("bias", E, 1);
    to.gate = mem.matrix<float>("gate", E * f, d);
    to.up = mem.matrix<float>("up", E * f, d);
    to.down = mem.matrix<float>("down", E * d, f);
    return to;
  }

  eigen_training loop_;
  std::span<const batch> batches_;
  moe::buffer memory_;
  layer_gradients gradients_;
};

}  // namespace

std::unique_ptr<contestant> make_eigen_loop(const model_shape& s, bool backward) {
  if (backward) return std::make_unique<training>(s);
  return std::make_unique<forward>(s);
}

}  // namespace bench
