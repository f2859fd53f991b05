// SPDX-License-Identifier: Apache-2.0
/// Rows of results, as a table and as JSON.
#pragma once

#include <cstdio>
#include <string>
#include <vector>

#include "support/limits.hpp"
#include "support/shapes.hpp"

namespace bench {

struct peer_result {
  std::string name, version;
  double tokens_per_s;
};

struct absent_peer {
  std::string name, reason;
};

struct row {
  model_shape shape;
  weight_type type;
  dim tokens;
  int threads;
  double skew;
  bool backward;
  double tokens_per_s, flops_per_s, weight_bytes_per_s, roof_tokens_per_s;
  bool memory_bound, quiet;
  std::vector<peer_result> peers;
  const char* name = "layer";  ///< its case
  std::vector<absent_peer> left_out{};

  double share() const { return tokens_per_s / roof_tokens_per_s; }
};

/// Prints the limits, a heading, every row as it comes, and in the end the versions of the peers and why some were left out.
class table {
 public:
  explicit table(std::vector<std::string> peers) : peers_(std::move(peers)) {}
  void limits(const machine_limits& l) const;
  void heading() const;
  void add(const row& r) const;
  void footer(const std::vector<row>& rows) const;

 private:
  std::vector<std::string> peers_;
};

/// One array of objects; the first holds the limits of the most threads, and those of fewer in `with_fewer_threads`, and
/// the `versions` of the peers. `limits` ascends by threads.
void write_json(std::FILE* to, const std::vector<machine_limits>& limits, const std::vector<row>& rows);

}  // namespace bench
