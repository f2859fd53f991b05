// SPDX-License-Identifier: Apache-2.0
/// A safetensors file open for reading.
#pragma once

#include <bit>
#include <cstring>

#include "moe/io/mapped_file.hpp"
#include "moe/io/safetensors_reader.hpp"

namespace moe {

/// An element type that holds real numbers and converts through float.
template <class T>
concept RealElement = std::same_as<T, float> || std::same_as<T, bf16> || std::same_as<T, f16>;

/// A tensor of any rank as a matrix: the last dimension is `cols`, all before it are `rows`. So [n] is 1 x n, a stack
/// [E, f, d] is E*f x d, and a scalar is 1 x 1.
struct matrix_extent {
  dim rows = 1, cols = 1;
  friend bool operator==(matrix_extent, matrix_extent) = default;
};

namespace detail {

/// Rows are 0 where their product overflows, which takes a tensor without elements.
inline matrix_extent as_matrix(const std::vector<dim>& shape) noexcept {
  matrix_extent m;
  if (shape.empty()) return m;
  m.cols = shape.back();
  for (std::size_t i = 0; i + 1 < shape.size(); ++i)
    m.rows = shape[i] != 0 && m.rows > std::numeric_limits<dim>::max() / shape[i] ? 0 : m.rows * shape[i];
  return m;
}

/// Calls f(type{}) with the type that a real or int8 `dtype` names; false for any other.
template <class F>
bool with_number(std::string_view dtype, F&& f) {
  if (dtype == "F32") return f(float{}), true;
  if (dtype == "BF16") return f(bf16{}), true;
  if (dtype == "F16") return f(f16{}), true;
  if (dtype == "I8") return f(std::int8_t{}), true;
  return false;
}

/// Elements at any address, converted through float; equal types keep every bit.
template <class From, class To>
void convert(const std::byte* from, matrix_view<To> to) noexcept {
  for (dim r = 0; r < to.rows; ++r)
    for (dim c = 0; c < to.cols; ++c, from += sizeof(From)) {
      From v;
      std::memcpy(&v, from, sizeof v);
      if constexpr (std::same_as<From, To>)
        to(r, c) = v;
      else
        to(r, c) = static_cast<To>(static_cast<float>(v));
    }
}

}  // namespace detail

/// A safetensors file and typed views of it. Opening checks the whole file (safetensors_reader.hpp) and copies nothing; a
/// big-endian host turns the elements round in its private copy. Every error is a format_error naming file and tensor.
class checkpoint {
 public:
  explicit checkpoint(const std::string& path) : checkpoint(mapped_file(path), {}, path) {}
  /// Over bytes that the caller keeps alive; `source` names them in messages.
  checkpoint(std::span<std::byte> bytes, const std::string& source) : checkpoint(mapped_file(), bytes, source) {}

  const std::string& source() const noexcept { return source_; }
  const tensor_map& tensors() const noexcept { return content_.tensors; }
  const metadata_map& metadata() const noexcept { return content_.metadata; }
  bool contains(std::string_view name) const noexcept { return content_.tensors.contains(name); }

  const tensor_view& tensor(std::string_view name) const {
    const auto found = content_.tensors.find(name);
    if (found == content_.tensors.end()) fail("has no tensor " + detail::in_quotes(name));
    return found->second;
  }

  /// The tensor in place, as rows x cols elements of type T (see matrix_extent). Writing to it changes this object's
  /// memory, never the file.
  template <class T>
  matrix_view<T> matrix(std::string_view name, dim rows, dim cols) const {
    const tensor_view& t = tensor(name);
    const std::string_view wanted = safetensors_dtype(dtype<std::remove_const_t<T>>::id);
    if (t.dtype != wanted) fail(name, "is " + std::string(t.dtype) + ", expected " + std::string(wanted));
    expect_extent(name, {rows, cols});
    std::byte* const first = bytes_.data() + (t.bytes.data() - bytes_.data());
    if (reinterpret_cast<std::uintptr_t>(first) % alignof(T) != 0)
      fail(name, "is not aligned for " + std::string(wanted) + ", at byte " + std::to_string(first - bytes_.data()) +
                     " of the file; read_into copies it");
    return {reinterpret_cast<T*>(first), rows, cols};
  }

  /// Copies F32, BF16, F16 or I8 elements to `to`, rounding as its type does.
  template <RealElement T>
  void read_into(matrix_view<T> to, std::string_view name) const {
    const tensor_view& t = tensor(name);
    expect_extent(name, {to.rows, to.cols});
    moe::expect(to, to.rows, to.cols, "checkpoint::read_into: destination", "rows x cols");
    const bool known = detail::with_number(t.dtype, [&](auto from) { detail::convert<decltype(from)>(t.bytes.data(), to); });
    if (!known) fail(name, "is " + std::string(t.dtype) + ", expected F32, BF16, F16 or I8");
  }

  /// Throws unless the tensor is a matrix of this extent.
  void expect_extent(std::string_view name, matrix_extent wanted) const {
    const tensor_view& t = tensor(name);
    if (detail::as_matrix(t.shape) != wanted)
      fail(name, "is " + std::string(t.dtype) + ' ' + detail::shape_text(t.shape) + ", expected " +
                     std::to_string(wanted.rows) + " x " + std::to_string(wanted.cols));
  }

  [[noreturn]] void fail(const std::string& what) const { throw format_error(source_ + ' ' + what); }
  [[noreturn]] void fail(std::string_view name, const std::string& what) const {
    throw format_error(source_ + ": tensor " + detail::in_quotes(name) + ' ' + what);
  }

 private:
  checkpoint(mapped_file file, std::span<std::byte> bytes, const std::string& source)
      : file_(std::move(file)),
        bytes_(bytes.empty() ? file_.bytes() : bytes),
        source_(source),
        content_(parse_safetensors(bytes_, source)) {
    if constexpr (std::endian::native == std::endian::big)
      for (const auto& [name, t] : content_.tensors)
        detail::reverse_units({bytes_.data() + (t.bytes.data() - bytes_.data()), t.bytes.size()},
                              detail::find_dtype(t.dtype)->unit);
  }

  mapped_file file_;
  std::span<std::byte> bytes_;
  std::string source_;
  safetensors_content content_;
};

}  // namespace moe
