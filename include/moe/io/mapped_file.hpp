// SPDX-License-Identifier: Apache-2.0
/// A file as memory, and a file put in the place of another: what the io headers ask of the system.
#pragma once

#include <cstdio>
#include <string>
#include <utility>

#include "moe/core/arena.hpp"
#include "moe/core/error.hpp"

#if defined(__unix__) || defined(__APPLE__)
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#else
#include <fstream>
#endif

namespace moe {

/// The bytes of a file. They may be written to: what is written is private to this object (copy on write) and the file
/// never changes. On POSIX systems nothing is read until it is touched, and the file must not be cut short meanwhile;
/// elsewhere the file is read whole. Throws format_error naming the file where it cannot be read.
class mapped_file {
 public:
  mapped_file() = default;
  explicit mapped_file(const std::string& path);
  mapped_file(mapped_file&& other) noexcept { swap(other); }
  mapped_file& operator=(mapped_file&& other) noexcept {
    swap(other);
    return *this;
  }
  mapped_file(const mapped_file&) = delete;
  mapped_file& operator=(const mapped_file&) = delete;
  ~mapped_file();

  std::span<std::byte> bytes() const noexcept;

 private:
  void swap(mapped_file& other) noexcept { std::swap(memory_, other.memory_); }

#if defined(__unix__) || defined(__APPLE__)
  std::span<std::byte> memory_;
#else
  buffer memory_;
#endif
};

#if defined(__unix__) || defined(__APPLE__)

namespace detail {

// Without a reservation a file may be larger than the memory: only pages that are written to need any.
#if defined(MAP_NORESERVE)
inline constexpr int map_private = MAP_PRIVATE | MAP_NORESERVE;
#else
inline constexpr int map_private = MAP_PRIVATE;
#endif

/// Closes on leaving; a mapping outlives its descriptor.
struct descriptor {
  int id;
  explicit descriptor(int fd) noexcept : id(fd) {}
  descriptor(const descriptor&) = delete;
  descriptor& operator=(const descriptor&) = delete;
  ~descriptor() {
    if (id >= 0) ::close(id);
  }
};

}  // namespace detail

inline mapped_file::mapped_file(const std::string& path) {
  const detail::descriptor file(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
  struct stat about{};
  if (file.id < 0 || ::fstat(file.id, &about) != 0) throw format_error(path + ": cannot be opened");
  if (!S_ISREG(about.st_mode)) throw format_error(path + ": is not a regular file");
  const auto size = static_cast<std::size_t>(about.st_size);
  if (size == 0) return;  // an empty mapping is an error to the system
  void* const first = ::mmap(nullptr, size, PROT_READ | PROT_WRITE, detail::map_private, file.id, 0);
  if (first == MAP_FAILED) throw format_error(path + ": cannot be mapped");
  memory_ = {static_cast<std::byte*>(first), size};
}

inline mapped_file::~mapped_file() {
  if (!memory_.empty()) ::munmap(memory_.data(), memory_.size());
}

inline std::span<std::byte> mapped_file::bytes() const noexcept { return memory_; }

/// Moves the file `from` to `to`, whose old file goes; at no moment is there neither.
inline void replace_file(const std::string& from, const std::string& to) {
  if (std::rename(from.c_str(), to.c_str()) != 0) throw format_error(to + ": cannot be replaced");
}

#else

inline mapped_file::mapped_file(const std::string& path) {
  std::ifstream file(path, std::ios::binary | std::ios::ate);
  if (!file) throw format_error(path + ": cannot be opened");
  memory_ = buffer(static_cast<std::size_t>(file.tellg()));
  file.seekg(0).read(memory_.as<char>().data(), static_cast<std::streamsize>(memory_.size()));
  if (!file) throw format_error(path + ": cannot be read");
}

inline mapped_file::~mapped_file() = default;

inline std::span<std::byte> mapped_file::bytes() const noexcept { return memory_.bytes(); }

inline void replace_file(const std::string& from, const std::string& to) {
  std::remove(to.c_str());  // the standard does not promise that rename replaces
  if (std::rename(from.c_str(), to.c_str()) != 0) throw format_error(to + ": cannot be replaced");
}

#endif

}  // namespace moe
