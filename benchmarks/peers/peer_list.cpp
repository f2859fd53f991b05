// SPDX-License-Identifier: Apache-2.0
#include "peers/peer_list.hpp"

#include <fstream>
#include <stdexcept>

namespace bench {
namespace {

std::vector<std::string> split(const std::string& line) {
  std::vector<std::string> words{""};
  for (const char c : line)
    if (c == '\t') words.emplace_back();
    else words.back().push_back(c);
  return words;
}

}  // namespace

std::vector<listed_peer> read_peer_list(const std::string& file, const std::string& of_case) {
  std::vector<listed_peer> peers;
  if (file.empty()) return peers;
  std::ifstream from(file);
  if (!from) throw std::runtime_error("--peer-list: cannot read " + file);
  for (std::string line; std::getline(from, line);) {
    const std::vector<std::string> words = split(line);
    if (words.size() < 4 || (words[0] != "run" && words[0] != "lack"))
      throw std::runtime_error("--peer-list: " + file + " has the line \"" + line + "\"");
    if (words[1] != of_case) continue;
    if (words[0] == "run") peers.push_back({words[2], {words.begin() + 3, words.end()}, {}});
    else peers.push_back({words[2], {}, words[3]});
  }
  return peers;
}

}  // namespace bench
