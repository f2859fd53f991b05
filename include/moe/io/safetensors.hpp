// SPDX-License-Identifier: Apache-2.0
/// Checkpoints of layers: the catalogue of an arena, saved and loaded.
#pragma once

#include <initializer_list>
#include <set>

#include "moe/io/checkpoint.hpp"
#include "moe/io/safetensors_writer.hpp"

namespace moe {

/// A flat buffer and what lies in it: the weights of one layer, or an optimizer's moments of the same layout.
///
///   moe::save("model.safetensors", {{"block0", layer.catalogue(), params.bytes()}});
///   moe::load("model.safetensors", {{"block0", layer.catalogue(), params.bytes()}});
///
/// A slot is saved under "prefix.name", or under its name where the prefix is empty; one of a single row is a vector, of
/// shape [cols], any other has the shape [rows, cols].
struct checkpoint_part {
  std::string prefix;
  std::vector<slot> catalogue;
  std::span<std::byte> bytes;
};

namespace detail {

inline std::string full_name(const checkpoint_part& part, const slot& s) {
  return part.prefix.empty() ? s.name : part.prefix + '.' + s.name;
}

/// Throws shape_error unless the catalogue lies within its bytes.
inline void expect_room(const checkpoint_part& part, const char* caller) {
  std::size_t needed = 0;
  for (const slot& s : part.catalogue) needed = std::max(needed, s.offset + s.bytes);
  expect_bytes(part.bytes.size(), needed, (std::string(caller) + ": part " + in_quotes(part.prefix)).c_str(),
               "its catalogue");
}

inline bool is_real(std::string_view dtype) noexcept { return dtype == "F32" || dtype == "BF16" || dtype == "F16"; }

/// Throws format_error unless the tensor can fill the slot.
inline void expect_slot(const checkpoint& from, const std::string& name, const slot& s) {
  const std::string_view came = from.tensor(name).dtype, wanted = safetensors_dtype(s.type);
  if (came != wanted && !(is_real(came) && is_real(wanted)))
    from.fail(name,
              "is " + std::string(came) + ", expected " + (is_real(wanted) ? "F32, BF16 or F16" : std::string(wanted)));
  from.expect_extent(name, {s.rows, s.cols});
}

/// Fills a slot from a tensor that fits it.
inline void read_slot(const checkpoint& from, const std::string& name, const slot& s, std::span<std::byte> bytes) {
  std::byte* const first = bytes.data() + s.offset;
  const auto read = [&]<class T>(T) { from.read_into(matrix_view<T>(reinterpret_cast<T*>(first), s.rows, s.cols), name); };
  if (s.type == element::f32) return read(float{});
  if (s.type == element::bf16) return read(bf16{});
  if (s.type == element::f16) return read(f16{});
  std::copy_n(from.tensor(name).bytes.data(), s.bytes, first);
}

}  // namespace detail

/// Writes the tensors of all parts into one file (save_tensors). Throws shape_error for a part shorter than its catalogue
/// and format_error for two tensors of one name.
inline void save(const std::string& path, std::span<const checkpoint_part> parts, const metadata_map& metadata = {}) {
  tensor_map tensors;
  for (const checkpoint_part& part : parts) {
    detail::expect_room(part, "moe::save");
    for (const slot& s : part.catalogue) {
      const std::string name = detail::full_name(part, s);
      const tensor_view t{safetensors_dtype(s.type),
                          s.rows == 1 ? std::vector<dim>{s.cols} : std::vector<dim>{s.rows, s.cols},
                          part.bytes.subspan(s.offset, s.bytes)};
      if (!tensors.emplace(name, t).second) throw format_error(path + ": two slots are named " + detail::in_quotes(name));
    }
  }
  save_tensors(path, tensors, metadata);
}
inline void save(const std::string& path, std::initializer_list<checkpoint_part> parts, const metadata_map& metadata = {}) {
  save(path, std::span(parts.begin(), parts.size()), metadata);
}

/// Fills the parts from a file that holds exactly their tensors, of their shapes ([1, n] and [n] are one) and element
/// types, where real ones convert with rounding. Anything missing, left over or different is a format_error, a part shorter
/// than its catalogue a shape_error, and then nothing has been written.
inline void load(const checkpoint& from, std::span<const checkpoint_part> parts) {
  std::set<std::string, std::less<>> wanted;
  for (const checkpoint_part& part : parts) {
    detail::expect_room(part, "moe::load");
    for (const slot& s : part.catalogue) {
      const std::string name = detail::full_name(part, s);
      if (!wanted.insert(name).second) from.fail("is asked for tensor " + detail::in_quotes(name) + " twice");
      detail::expect_slot(from, name, s);
    }
  }
  for (const auto& [name, t] : from.tensors())
    if (!wanted.contains(name)) from.fail(name, "belongs to none of the parts to load");
  for (const checkpoint_part& part : parts)
    for (const slot& s : part.catalogue) detail::read_slot(from, detail::full_name(part, s), s, part.bytes);
}
inline void load(const checkpoint& from, std::initializer_list<checkpoint_part> parts) {
  load(from, std::span(parts.begin(), parts.size()));
}
inline void load(const std::string& path, std::span<const checkpoint_part> parts) { load(checkpoint(path), parts); }
inline void load(const std::string& path, std::initializer_list<checkpoint_part> parts) { load(checkpoint(path), parts); }

}  // namespace moe
