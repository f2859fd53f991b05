// SPDX-License-Identifier: Apache-2.0
#include "peers/process_peer.hpp"

#include "peers/peer_process.hpp"

namespace bench {
namespace {

/// What the processes read: case.json, the weights of one layer, the batches.
class case_folder : public exchange_folder {
 public:
  case_folder(const model_shape& s, std::string_view type, double rotate) {
    open("case.json") << "{\"case\": \"layer\", \"type\": \"" << type << "\", \"d\": " << s.d << ", \"f\": " << s.f
                      << ", \"E\": " << s.experts << ", \"k\": " << s.k
                      << ", \"rotate\": " << static_cast<long long>(rotate) << "}\n";
  }

  /// The first layer that comes stays.
  void write(const layer_source& w) {
    if (has_weights_) return;
    write_rows("gate.f32", w.gate);
    write_rows("up.f32", w.up);
    write_rows("down.f32", w.down);
    has_weights_ = true;
  }
  void write(std::span<const batch> batches) const {
    std::ofstream x = open("x.f32"), expert = open("expert.i32"), weight = open("weight.f32");
    for (const batch& b : batches) {
      put(x, b.x.data, b.x.rows * b.x.cols);
      put(expert, b.expert.data(), static_cast<dim>(b.expert.size()));
      put(weight, b.weight.data(), static_cast<dim>(b.weight.size()));
    }
  }

 private:
  bool has_weights_ = false;
};

class process_peer final : public contestant {
 public:
  process_peer(const listed_peer& p, std::shared_ptr<case_folder> folder)
      : contestant(p.name), folder_(std::move(folder)), peer_(p, folder_) {}

  bool wants_layers(double) const override { return layers() == 0; }
  std::string failure() const override { return peer_.failure(); }
  std::string version() const override { return peer_.version(); }
  bool keeps_time() const override { return true; }

  void prepare(std::span<const batch> batches, int threads) override {
    if (!failure().empty()) return;
    folder_->write(batches);
    peer_.take_batches(batches.size(), batches[0].x.rows, threads);
  }
  void run(std::size_t i, matrix_view<float> y) override { peer_.run(i, y); }
  double seconds_of(std::size_t i, matrix_view<float>) override { return peer_.go(i, 1); }
  void repeat(benchmark::State& state, std::size_t first, std::size_t, matrix_view<float>) override {
    const auto calls = static_cast<std::size_t>(state.max_iterations);
    const double each = peer_.go(first, calls) / static_cast<double>(calls);
    for (auto _ : state) state.SetIterationTime(each);
  }

 private:
  double add(const std::shared_ptr<const layer_source>& w) override {
    if (!failure().empty()) return 0;
    folder_->write(*w);
    return peer_.start();
  }

  std::shared_ptr<case_folder> folder_;
  peer_process peer_;
};

}  // namespace

std::vector<std::unique_ptr<contestant>> process_peers(const std::vector<listed_peer>& listed, const model_shape& s,
                                                       std::string_view type, double rotate) {
  std::vector<std::unique_ptr<contestant>> peers;
  if (listed.empty()) return peers;
  const auto folder = std::make_shared<case_folder>(s, type, rotate);
  for (const listed_peer& p : listed) peers.push_back(std::make_unique<process_peer>(p, folder));
  return peers;
}

}  // namespace bench
