// SPDX-License-Identifier: Apache-2.0
/// What must hold of any bytes given to the safetensors reader; the fuzz target and the replay of its corpus share it.
#pragma once

#include <numeric>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "moe/io/checkpoint.hpp"
#include "moe/io/safetensors_writer.hpp"

namespace moe::testing {

/// The file that the writer makes of some content.
inline std::string written(const tensor_map& tensors, const metadata_map& metadata = {}) {
  std::ostringstream out;
  write_safetensors(out, tensors, metadata, "memory");
  return out.str();
}

inline bool same(const tensor_map& a, const tensor_map& b) {
  return std::equal(a.begin(), a.end(), b.begin(), b.end(), [](const auto& l, const auto& r) {
    return l.first == r.first && l.second.dtype == r.second.dtype && l.second.shape == r.second.shape &&
           std::ranges::equal(l.second.bytes, r.second.bytes);
  });
}

/// Either a format_error that names the source, or a file whose tensors fill its data, can be read as matrices, and come
/// back unchanged when they are written and read again; std::logic_error where that does not hold. True if it was a file.
inline bool try_safetensors(std::span<const std::byte> bytes) {
  const auto expect = [](bool holds, const char* what) {
    if (!holds) throw std::logic_error(what);
  };
  std::vector<std::byte> copy(bytes.begin(), bytes.end());
  try {
    const checkpoint file(copy, "fuzz");
    std::size_t held = 0;
    for (const auto& [name, t] : file.tensors()) {
      held += t.bytes.size();
      const auto [rows, cols] = detail::as_matrix(t.shape);
      if (t.dtype != "F32" && t.dtype != "BF16" && t.dtype != "F16" && t.dtype != "I8") continue;
      std::vector<float> values(static_cast<std::size_t>(rows * cols));
      if (!values.empty()) file.read_into(matrix_view<float>(values.data(), rows, cols), name);
    }
    expect(held <= copy.size(), "the tensors are larger than the file");
    const std::string again = written(file.tensors(), file.metadata());
    std::vector<std::byte> second(again.size());
    std::memcpy(second.data(), again.data(), again.size());
    const checkpoint reread(second, "fuzz, written again");
    expect(same(file.tensors(), reread.tensors()), "the tensors changed when written and read again");
    expect(file.metadata() == reread.metadata(), "the metadata changed when written and read again");
    expect(written(reread.tensors(), reread.metadata()) == again, "a second writing differs from the first");
    return true;
  } catch (const format_error& e) {
    expect(std::string_view(e.what()).substr(0, 5) == "fuzz:", "an error that does not begin with its source");
    return false;
  }
}

}  // namespace moe::testing
