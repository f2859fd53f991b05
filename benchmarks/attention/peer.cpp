// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "attention/attention.hpp"
#include "peers/peer_process.hpp"

namespace bench {
namespace {

/// What the processes read: case.json, one cache; later the queries.
class case_folder : public exchange_folder {
 public:
  case_folder(const attention_case& c, const attention_source& from) {
    const attention_shape& s = c.shape;
    open("case.json") << "{\"case\": \"attention\", \"type\": \"" << c.type.name << "\", \"h\": " << s.h << ", \"hkv\": " << s.h_kv
                      << ", \"d\": " << s.d << ", \"n\": " << s.n
                      << ", \"rotate\": " << static_cast<long long>(c.form.decode ? c.rotate : 0) << "}\n";
    write_rows("key.f32", from.k);
    write_rows("value.f32", from.v);
  }
};

class attention_peer final : public attention_contestant {
 public:
  attention_peer(const listed_peer& p, const attention_case& c, const std::shared_ptr<const case_folder>& folder,
                 std::shared_ptr<const attention_source> source)
      : attention_contestant(p.name), queries_(c.queries()), folder_(folder), source_(std::move(source)), peer_(p, folder) {
    const double bytes = peer_.start();
    if (c.form.decode && bytes > 0) caches_ = static_cast<std::size_t>(std::max(1., bytes / c.cache_bytes()));
  }
  std::string failure() const override { return peer_.failure(); }
  std::string version() const override { return peer_.version(); }
  void prepare(int threads) override {
    if (!failure().empty()) return;
    std::ofstream to = folder_->open("x.f32");  // the same query for every cache
    for (std::size_t i = 0; i < caches_; ++i) exchange_folder::put(to, source_->q.data, queries_ * source_->q.cols);
    to.close();
    peer_.take_batches(caches_, queries_, threads);
  }
  bool run(matrix_view<float> o) override {
    peer_.run(0, o);
    return true;
  }
  double seconds_of(std::size_t first, std::size_t calls) override { return peer_.go(first, calls); }

 private:
  dim queries_;
  std::size_t caches_ = 1;
  std::shared_ptr<const case_folder> folder_;
  std::shared_ptr<const attention_source> source_;
  peer_process peer_;
};

}  // namespace

std::vector<std::unique_ptr<attention_contestant>> attention_peers(const std::vector<listed_peer>& listed, const attention_case& c,
                                                                   std::shared_ptr<const attention_source> source) {
  std::vector<std::unique_ptr<attention_contestant>> peers;
  if (listed.empty() || c.blocks() || c.form.backward || c.form.gate != attention_gate::none) return peers;
  const auto folder = std::make_shared<const case_folder>(c, *source);
  for (const listed_peer& p : listed) peers.push_back(std::make_unique<attention_peer>(p, c, folder, source));
  return peers;
}

}  // namespace bench
