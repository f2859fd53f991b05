// SPDX-License-Identifier: Apache-2.0
/// A program that answers lines, and stands still between them.
#pragma once

#include <stdexcept>
#include <string>
#include <vector>

namespace bench {

struct process_error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

/// Starts a program whose standard input and output are ours, and whose errors go to a file. From the end of an answer to
/// the next line it is stopped, so that whatever threads it has take no time from others; it ends with this object.
class process {
 public:
  /// Throws process_error where it cannot be started, as on every system that is not POSIX.
  process(const std::vector<std::string>& command, const std::string& errors);
  ~process();
  process(const process&) = delete;
  process& operator=(const process&) = delete;

  /// Sends the line, where it is not empty, and returns the line that comes back, both without their ends. Throws
  /// process_error where nothing comes because the program ended or because `patience` seconds have passed.
  std::string ask(const std::string& line, double patience = 900);

 private:
  std::string receive(double patience);

  int pid_ = -1, to_ = -1, from_ = -1;
  std::string received_;
};

}  // namespace bench
