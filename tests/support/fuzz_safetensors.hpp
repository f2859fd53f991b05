// SPDX-License-Identifier: Apache-2.0
/// What must hold of any bytes given to the safetensors reader; the fuzz target and the replay of its corpus share it.
#pragma once

#include <algorithm>
#include <cstring>
#include <span>
#include <sstream>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "moe/io/checkpoint.hpp"
#include "moe/io/safetensors_writer.hpp"

namespace testing {

/// The file that the writer makes of some content.
inline std::string written(const moe::tensor_map& tensors, const moe::metadata_map& metadata = {}) {
  std::ostringstream out;
  moe::write_safetensors(out, tensors, metadata, "memory");
  return out.str();
}

inline bool same(const moe::tensor_map& a, const moe::tensor_map& b) {
  return std::equal(a.begin(), a.end(), b.begin(), b.end(), [](const auto& l, const auto& r) {
    return l.first == r.first && l.second.dtype == r.second.dtype && l.second.shape == r.second.shape &&
           std::ranges::equal(l.second.bytes, r.second.bytes);
  });
}

/// True if the reader takes these bytes; it may refuse them with nothing but a format_error that names its source.
inline bool is_safetensors(std::span<const std::byte> bytes) {
  try {
    moe::parse_safetensors(bytes, "fuzz");
    return true;
  } catch (const moe::format_error& e) {
    if (!std::string_view(e.what()).starts_with("fuzz: ")) throw std::logic_error("an error that does not name its source");
    return false;
  }
}

/// What the reader takes has tensors that fill its data, that can be read as matrices, and that come back unchanged when
/// they are written and read again; an exception where that does not hold. False for what the reader refuses.
inline bool try_safetensors(std::span<const std::byte> bytes) {
  if (!is_safetensors(bytes)) return false;
  const auto expect = [](bool holds, const char* what) {
    if (!holds) throw std::logic_error(what);
  };
  std::vector<std::byte> copy(bytes.begin(), bytes.end());
  const moe::checkpoint file(copy, "fuzz");
  std::size_t held = 8 + moe::detail::header_text(copy, "fuzz").size();
  for (const auto& [name, t] : file.tensors()) {
    held += t.bytes.size();
    const auto [rows, cols] = moe::detail::as_matrix(t.shape);
    if (t.dtype != "F32" && t.dtype != "BF16" && t.dtype != "F16" && t.dtype != "I8") continue;
    std::vector<float> values(static_cast<std::size_t>(rows * cols));
    if (!values.empty()) file.read_into(moe::matrix_view<float>(values.data(), rows, cols), name);
  }
  expect(held == copy.size(), "the tensors do not fill the data");
  const std::string again = written(file.tensors(), file.metadata());
  std::vector<std::byte> second(again.size());
  std::memcpy(second.data(), again.data(), again.size());
  const moe::checkpoint reread(second, "written again");
  expect(same(file.tensors(), reread.tensors()), "the tensors changed when written and read again");
  expect(file.metadata() == reread.metadata(), "the metadata changed when written and read again");
  expect(written(reread.tensors(), reread.metadata()) == again, "a second writing differs from the first");
  return true;
}

}  // namespace testing
