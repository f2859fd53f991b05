// SPDX-License-Identifier: Apache-2.0
/// The safetensors format, written.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstdio>
#include <fstream>
#include <ostream>

#include "moe/io/mapped_file.hpp"
#include "moe/io/tensor.hpp"

namespace moe {

namespace detail {

/// A string of JSON, escaped as the reference implementation escapes: what must be, and nothing else.
inline void append_json(std::string& out, std::string_view s) {
  constexpr std::string_view values = "\"\\\b\f\n\r\t", names = "\"\\bfnrt", digits = "0123456789abcdef";
  out += '"';
  for (const char c : s) {
    if (const std::size_t which = values.find(c); which != values.npos)
      (out += '\\') += names[which];
    else if (const auto byte = static_cast<unsigned char>(c); byte < 0x20)
      ((out += "\\u00") += digits[byte >> 4]) += digits[byte & 15];
    else
      out += c;
  }
  out += '"';
}

inline void append_list(std::string& out, std::span<const dim> numbers) {
  out += '[';
  for (const dim& n : numbers) (out += &n == numbers.data() ? "" : ",") += std::to_string(n);
  out += ']';
}

/// Throws format_error unless the tensor may be written under this name.
inline void expect_writable(std::string_view name, const tensor_view& t, const std::string& target) {
  const auto fail = [&](const std::string& what) {
    throw format_error(target + ": tensor " + in_quotes(name) + ' ' + what);
  };
  if (name == "__metadata__") fail("has the name of the metadata");
  if (name.find('\0') != name.npos) fail("has NUL in its name");
  if (utf8_end(name) != name.size()) fail("has a name that is not UTF-8");
  if (t.shape.size() > most_dimensions) fail("has more than " + std::to_string(most_dimensions) + " dimensions");
  const file_dtype* const type = find_dtype(t.dtype);
  if (type == nullptr) fail("has the unknown dtype " + in_quotes(t.dtype));
  if (const std::size_t wanted = byte_count(*type, t.shape, fail); t.bytes.size() != wanted)
    fail("has " + std::to_string(t.bytes.size()) + " bytes, but " + std::string(type->name) + ' ' + shape_text(t.shape) +
         " has " + std::to_string(wanted));
}

/// Widest element type first, then by name.
inline std::vector<const tensor_map::value_type*> file_order(const tensor_map& tensors) {
  std::vector<const tensor_map::value_type*> order;
  for (const auto& t : tensors) order.push_back(&t);
  std::sort(order.begin(), order.end(), [](const auto* a, const auto* b) {
    const file_dtype *left = find_dtype(a->second.dtype), *right = find_dtype(b->second.dtype);
    return left != right ? left > right : a->first < b->first;
  });
  return order;
}

/// Length, JSON, and spaces up to a multiple of 8.
inline std::string header_of(std::span<const tensor_map::value_type* const> order, const metadata_map& metadata) {
  std::string json = "{";
  if (!metadata.empty()) {
    json += "\"__metadata__\":{";
    for (const auto& [key, value] : metadata) {
      append_json(json, key);
      append_json(json += ':', value);
      json += ',';
    }
    json.back() = '}';
    json += ',';
  }
  dim offset = 0;
  for (const auto* t : order) {
    append_json(json, t->first);
    ((json += ":{\"dtype\":\"") += t->second.dtype) += "\",\"shape\":";
    append_list(json, t->second.shape);
    const dim offsets[] = {offset, offset + static_cast<dim>(t->second.bytes.size())};
    append_list(json += ",\"data_offsets\":", offsets);
    json += "},";
    offset = offsets[1];
  }
  if (json.size() > 1) json.pop_back();
  json += '}';
  json.resize((json.size() + 7) / 8 * 8, ' ');
  std::string length;
  for (std::uint64_t n = json.size(), i = 0; i < 8; ++i, n >>= 8) length += static_cast<char>(static_cast<unsigned char>(n));
  return length + json;
}

inline void write_data(std::ostream& out, const tensor_view& t) {
  const auto put = [&](std::span<const std::byte> bytes) {
    out.write(reinterpret_cast<const char*>(bytes.data()), static_cast<std::streamsize>(bytes.size()));
  };
  if (t.bytes.empty()) return;
  if constexpr (std::endian::native == std::endian::little) return put(t.bytes);
  std::vector<std::byte> swapped(t.bytes.begin(), t.bytes.end());
  reverse_units(swapped, find_dtype(t.dtype)->unit);
  put(swapped);
}

}  // namespace detail

/// Writes a safetensors file: the same bytes for the same tensors, those the reference implementation writes. Throws
/// format_error, beginning with `target`, for a tensor or metadata the format cannot hold; nothing is written then.
inline void write_safetensors(std::ostream& out, const tensor_map& tensors, const metadata_map& metadata,
                              const std::string& target) {
  for (const auto& [name, t] : tensors) detail::expect_writable(name, t, target);
  for (const auto& [key, value] : metadata)
    if (detail::utf8_end(key) != key.size() || detail::utf8_end(value) != value.size())
      throw format_error(target + ": __metadata__ " + detail::in_quotes(key) + " is not UTF-8");
  const auto order = detail::file_order(tensors);
  const std::string header = detail::header_of(order, metadata);
  if (header.size() - 8 > detail::most_header_bytes)
    throw format_error(target + ": header length " + std::to_string(header.size() - 8) + " is above " +
                       std::to_string(detail::most_header_bytes));
  out.write(header.data(), static_cast<std::streamsize>(header.size()));
  for (const auto* t : order) detail::write_data(out, t->second);
}

/// Writes the file beside its place and moves it there when it is whole, so that whoever opens `path` finds the old file
/// or the new one, also when this program is killed. One writer at a time. Throws format_error naming the file when that
/// fails; the old file is then untouched.
inline void save_tensors(const std::string& path, const tensor_map& tensors, const metadata_map& metadata = {}) {
  const std::string beside = path + ".partial";
  try {
    std::ofstream out(beside, std::ios::binary | std::ios::trunc);
    if (!out) throw format_error(path + ": cannot be written");
    write_safetensors(out, tensors, metadata, path);
    out.close();
    if (!out) throw format_error(path + ": cannot be written to the end");
    replace_file(beside, path);
  } catch (...) {
    std::remove(beside.c_str());
    throw;
  }
}

}  // namespace moe
