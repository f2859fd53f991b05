// SPDX-License-Identifier: Apache-2.0
/// Rows of results, as a table and as JSON.
#pragma once

#include <cstdio>
#include <map>
#include <set>
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

void print_limits(const machine_limits& l);

/// Prints a heading and every row as it comes.
class table {
 public:
  explicit table(std::vector<std::string> peers) : peers_(std::move(peers)) {}
  void heading() const;
  void add(const row& r) const;

 private:
  std::vector<std::string> peers_;
};

std::string json_of(const row& r);

/// What became of the peers of all rows.
class peer_record {
 public:
  void add(const std::vector<peer_result>& peers, const std::vector<absent_peer>& left_out);
  /// A line for each version, and for each reason.
  void print() const;
  const std::map<std::string, std::string>& versions() const { return versions_; }

 private:
  std::map<std::string, std::string> versions_;
  std::set<std::string> left_out_;
};

/// One array of objects; the first holds the limits of the most threads, and those of fewer in `with_fewer_threads`, and
/// the `versions` of the peers. `limits` ascends by threads; `rows` are json_of rows.
void write_json(std::FILE* to, const std::vector<machine_limits>& limits, const peer_record& peers,
                const std::vector<std::string>& rows);

}  // namespace bench
