// SPDX-License-Identifier: Apache-2.0
#include "peers/peer_process.hpp"

#include <algorithm>
#include <filesystem>
#include <string_view>

namespace bench {
namespace {

namespace fs = std::filesystem;

std::string new_folder() {
  for (int i = 0;; ++i) {
    const fs::path folder = fs::temp_directory_path() / ("moe-benchmark-" + std::to_string(i));
    if (fs::create_directory(folder)) return folder.string();
  }
}

}  // namespace

exchange_folder::exchange_folder() : path_(new_folder()) {}
exchange_folder::~exchange_folder() {
  std::error_code ignored;
  fs::remove_all(path_, ignored);
}
std::ofstream exchange_folder::open(const char* name) const {
  std::ofstream to(file(name), std::ios::binary);
  to.exceptions(std::ios::badbit | std::ios::failbit);
  return to;
}
void exchange_folder::write_rows(const char* name, moe::matrix_view<const float> m) const {
  std::ofstream to = open(name);
  put(to, m.data, m.rows * m.cols);
}
bool exchange_folder::read_result(moe::matrix_view<float> y) const {
  std::ifstream from(file("y.f32"), std::ios::binary);
  from.read(reinterpret_cast<char*>(y.data), static_cast<std::streamsize>(sizeof(float)) * y.rows * y.cols);
  return static_cast<bool>(from);
}
std::string exchange_folder::last_line(const std::string& log) const {
  std::ifstream from(file(log));
  std::string last;
  for (std::string line; std::getline(from, line);)
    if (line.find_first_not_of(" \t") != line.npos) last = line;
  return last;
}

peer_process::peer_process(listed_peer p, std::shared_ptr<const exchange_folder> folder)
    : listed_(std::move(p)), folder_(std::move(folder)) {
  if (listed_.command.empty()) failure_ = listed_.lack;
}

double peer_process::start() {
  if (!failure_.empty()) return 0;
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
void peer_process::take_batches(std::size_t count, moe::dim tokens, int threads) {
  ask("batches " + std::to_string(count) + " " + std::to_string(tokens) + " " + std::to_string(threads));
}
void peer_process::run(std::size_t i, moe::matrix_view<float> y) {
  ask("run " + std::to_string(i));
  if (failure_.empty() && !folder_->read_result(y)) failure_ = "its result is too short";
}
double peer_process::go(std::size_t first, std::size_t calls) {
  const std::string answer = ask("go " + std::to_string(first) + " " + std::to_string(calls));
  return failure_.empty() ? std::max(std::stod(answer), 1e-9) : 1;
}

std::string peer_process::ask(const std::string& line) {
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

}  // namespace bench
