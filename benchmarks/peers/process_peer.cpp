// SPDX-License-Identifier: Apache-2.0
#include "peers/process_peer.hpp"

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <optional>

#include "support/process.hpp"

namespace bench {
namespace {

namespace fs = std::filesystem;

std::string new_folder() {
  for (int i = 0;; ++i) {
    const fs::path folder = fs::temp_directory_path() / ("moe-benchmark-" + std::to_string(i));
    if (fs::create_directory(folder)) return folder.string();
  }
}

/// What the processes read: case.json, the weights of one layer, the batches.
class case_folder {
 public:
  case_folder(const model_shape& s, std::string_view type, double rotate) : path_(new_folder()) {
    open("case.json") << "{\"case\": \"layer\", \"type\": \"" << type << "\", \"d\": " << s.d << ", \"f\": " << s.f
                      << ", \"E\": " << s.experts << ", \"k\": " << s.k
                      << ", \"rotate\": " << static_cast<long long>(rotate) << "}\n";
  }
  ~case_folder() {
    std::error_code ignored;
    fs::remove_all(path_, ignored);
  }
  case_folder(const case_folder&) = delete;
  case_folder& operator=(const case_folder&) = delete;

  std::string file(const std::string& name) const { return path_ + "/" + name; }
  const std::string& path() const { return path_; }

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
      put(x, b.x.data, static_cast<std::size_t>(b.x.rows * b.x.cols));
      put(expert, b.expert.data(), b.expert.size());
      put(weight, b.weight.data(), b.weight.size());
    }
  }
  bool read_result(matrix_view<float> y) const {
    std::ifstream from(file("y.f32"), std::ios::binary);
    from.read(reinterpret_cast<char*>(y.data), static_cast<std::streamsize>(sizeof(float)) * y.rows * y.cols);
    return static_cast<bool>(from);
  }
  /// What a process printed last, on its way out.
  std::string last_line(const std::string& log) const {
    std::ifstream from(file(log));
    std::string last;
    for (std::string line; std::getline(from, line);)
      if (line.find_first_not_of(" \t") != line.npos) last = line;
    return last;
  }

 private:
  std::ofstream open(const char* name) const {
    std::ofstream to(file(name), std::ios::binary);
    to.exceptions(std::ios::badbit | std::ios::failbit);  // a full disk
    return to;
  }
  template <class T>
  static void put(std::ofstream& to, const T* data, std::size_t n) {
    to.write(reinterpret_cast<const char*>(data), static_cast<std::streamsize>(n * sizeof(T)));
  }
  void write_rows(const char* name, matrix_view<const float> m) const {
    std::ofstream to = open(name);
    put(to, m.data, static_cast<std::size_t>(m.rows * m.cols));
  }

  std::string path_;
  bool has_weights_ = false;
};

class process_peer final : public contestant {
 public:
  process_peer(const listed_peer& p, std::shared_ptr<case_folder> folder)
      : contestant(p.name), listed_(p), folder_(std::move(folder)) {
    if (p.command.empty()) failure_ = p.lack;
  }

  bool wants_layers(double) const override { return layers() == 0; }
  std::string failure() const override { return failure_; }
  std::string version() const override { return version_; }
  bool keeps_time() const override { return true; }

  void prepare(std::span<const batch> batches, int threads) override {
    if (!failure_.empty()) return;
    folder_->write(batches);
    const std::string count = std::to_string(batches.size()), tokens = std::to_string(batches[0].x.rows);
    ask("batches " + count + " " + tokens + " " + std::to_string(threads));
  }
  void run(std::size_t i, matrix_view<float> y) override {
    ask("run " + std::to_string(i));
    if (failure_.empty() && !folder_->read_result(y)) failure_ = "its result is too short";
  }
  double seconds_of(std::size_t i, matrix_view<float>) override { return go(i, 1); }
  void repeat(benchmark::State& state, std::size_t first, std::size_t, matrix_view<float>) override {
    const auto calls = static_cast<std::size_t>(state.max_iterations);
    const double each = go(first, calls) / static_cast<double>(calls);
    for (auto _ : state) state.SetIterationTime(each);
  }

 private:
  double add(const std::shared_ptr<const layer_source>& w) override {
    if (!failure_.empty()) return 0;
    folder_->write(*w);
    std::vector<std::string> command = listed_.command;
    command.push_back(folder_->path());
    try {
      process_.emplace(command, folder_->file(log()));
    } catch (const process_error& e) {
      failure_ = e.what();
      return 0;
    }
    const std::string answer = ask("");
    const std::size_t space = answer.find(' ', std::min<std::size_t>(6, answer.size()));
    if (!failure_.empty() || answer.rfind("ready ", 0) != 0 || space == answer.npos) {
      if (failure_.empty()) failure_ = "answered \"" + answer + "\"";
      return 0;
    }
    version_ = answer.substr(space + 1);
    return std::stod(answer.substr(6, space - 6));
  }

  double go(std::size_t first, std::size_t calls) {
    const std::string answer = ask("go " + std::to_string(first) + " " + std::to_string(calls));
    return failure_.empty() ? std::max(std::stod(answer), 1e-9) : 1;
  }

  // Empty, and a failure, where it ended or refused.
  std::string ask(const std::string& line) {
    constexpr std::string_view refused = "refused ";
    if (!failure_.empty()) return {};
    try {
      std::string answer = process_->ask(line);
      if (answer.rfind(refused, 0) != 0) return answer;
      failure_ = answer.substr(refused.size());
    } catch (const process_error& e) {
      const std::string last = folder_->last_line(log());
      failure_ = last.empty() ? e.what() : last;
    }
    return {};
  }
  std::string log() const { return name() + ".log"; }

  listed_peer listed_;
  std::shared_ptr<case_folder> folder_;
  std::optional<process> process_;
  std::string failure_, version_;
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
