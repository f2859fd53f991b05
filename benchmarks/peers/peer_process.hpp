// SPDX-License-Identifier: Apache-2.0
/// A listed peer at work in a process of its own, and the folder in which it is handed a case. benchmarks/peers/peer.py has the
/// protocol and the other side.
#pragma once

#include <fstream>
#include <memory>
#include <optional>
#include <string>

#include "moe/core/view.hpp"
#include "peers/peer_list.hpp"
#include "support/process.hpp"

namespace bench {

/// A temporary folder; it goes with everything in it.
class exchange_folder {
 public:
  exchange_folder();
  ~exchange_folder();
  exchange_folder(const exchange_folder&) = delete;
  exchange_folder& operator=(const exchange_folder&) = delete;

  std::string file(const std::string& name) const { return path_ + "/" + name; }
  const std::string& path() const { return path_; }
  /// Writing to it throws where the disk is full.
  std::ofstream open(const char* name) const;
  template <class T>
  static void put(std::ofstream& to, const T* data, moe::dim n) {
    to.write(reinterpret_cast<const char*>(data), static_cast<std::streamsize>(sizeof(T)) * n);
  }
  void write_rows(const char* name, moe::matrix_view<const float> m) const;
  /// y.f32; false where it is too short.
  bool read_result(moe::matrix_view<float> y) const;
  /// What a process printed last, on its way out.
  std::string last_line(const std::string& log) const;

 private:
  std::string path_;
};

/// Where a peer cannot go on it has a failure, and every further question is answered with nothing.
class peer_process {
 public:
  peer_process(listed_peer p, std::shared_ptr<const exchange_folder> folder);

  const std::string& failure() const { return failure_; }
  const std::string& version() const { return version_; }
  /// Starts it, when what it reads is there; returns the bytes that it says it holds.
  double start();
  void take_batches(std::size_t count, moe::dim tokens, int threads);
  void run(std::size_t i, moe::matrix_view<float> y);
  /// Seconds of so many calls.
  double go(std::size_t first, std::size_t calls);

 private:
  std::string ask(const std::string& line);
  std::string log() const { return listed_.name + ".log"; }

  listed_peer listed_;
  std::shared_ptr<const exchange_folder> folder_;
  std::optional<process> process_;
  std::string failure_, version_;
};

}  // namespace bench
