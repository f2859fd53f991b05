// SPDX-License-Identifier: Apache-2.0
/// Peers in processes of their own, as benchmarks/peers/install.py found or installed them.
#pragma once

#include <string>
#include <vector>

namespace bench {

struct listed_peer {
  std::string name;
  std::vector<std::string> command;  ///< empty where there is none
  std::string lack;                  ///< then the reason
};

/// Those of one case (`layer`, `attention`). A file has a line for each, with tabs between
///   run CASE NAME COMMAND ARGUMENT...      the protocol of benchmarks/peers/peer.py; the folder is added
///   lack CASE NAME REASON
/// No file at all: none. Throws std::runtime_error, which names the file, where it cannot be read or a line is another one.
std::vector<listed_peer> read_peer_list(const std::string& file, const std::string& of_case);

}  // namespace bench
