// SPDX-License-Identifier: Apache-2.0
/// Files that a test writes.
#pragma once

#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>

namespace testing {

/// A path of its own in the system's folder for temporary files; what lies there is removed at the end.
class temporary_file {
 public:
  explicit temporary_file(const std::string& name)
      : path_((std::filesystem::temp_directory_path() / ("moe_test_" + std::to_string(unique()) + '_' + name)).string()) {}
  temporary_file(const temporary_file&) = delete;
  temporary_file& operator=(const temporary_file&) = delete;
  ~temporary_file() {
    std::error_code ignored;
    std::filesystem::remove(path_, ignored);
  }
  const std::string& path() const noexcept { return path_; }

 private:
  /// Differs between programs that run at once: where the stack lies and what the clock says.
  static std::uintmax_t unique() {
    static const int here = 0;
    return static_cast<std::uintmax_t>(std::filesystem::file_time_type::clock::now().time_since_epoch().count()) ^
           reinterpret_cast<std::uintptr_t>(&here);
  }
  std::string path_;
};

inline std::string content(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), {}};
}
inline void write(const std::string& path, const std::string& bytes) {
  std::ofstream(path, std::ios::binary).write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
}

/// What an error of this type says, or that none came.
template <class Error>
std::string message(auto&& call) {
  try {
    call();
  } catch (const Error& e) {
    return e.what();
  }
  return "no such error";
}

}  // namespace testing
