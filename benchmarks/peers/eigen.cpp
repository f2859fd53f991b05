// SPDX-License-Identifier: Apache-2.0
#include "peers/peers.hpp"
#include "support/eigen_loop.hpp"

namespace bench {
namespace {

class eigen_contestant final : public contestant {
 public:
  explicit eigen_contestant(const model_shape& s) : contestant("eigen"), loop_(s.experts, static_cast<int>(s.k)) {}

  std::string version() const override {
    return std::to_string(EIGEN_WORLD_VERSION) + "." + std::to_string(EIGEN_MAJOR_VERSION) + "." +
           std::to_string(EIGEN_MINOR_VERSION);
  }
  void prepare(std::span<const batch> batches, int) override { batches_ = batches; }
  void run(std::size_t i, matrix_view<float> y) override {
    const batch& b = batches_[i];
    const layer_source& w = *sources_[static_cast<std::size_t>(b.layer % layers())];
    loop_.forward(b.router, b.bias, w.gate, w.up, w.down, b.x, y);
  }

 private:
  double add(const std::shared_ptr<const layer_source>& w) override {
    sources_.push_back(w);
    return 4. * static_cast<double>(3 * w->up.rows * w->up.cols);
  }

  eigen_loop loop_;
  std::vector<std::shared_ptr<const layer_source>> sources_;
  std::span<const batch> batches_;
};

}  // namespace

std::unique_ptr<contestant> make_eigen_loop(const model_shape& s) { return std::make_unique<eigen_contestant>(s); }

}  // namespace bench
