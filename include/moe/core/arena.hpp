// SPDX-License-Identifier: Apache-2.0
/// All memory of the library: one type that owns bytes, one that carves them.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <new>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "moe/core/dtype.hpp"
#include "moe/core/view.hpp"

namespace moe {

/// Owns zeroed bytes, aligned to 64. The only owner in the library.
class buffer {
 public:
  buffer() = default;
  explicit buffer(std::size_t bytes) : size_(bytes) {
    if (bytes < static_cast<std::size_t>(-1) / 2 - alignment) block_ = std::calloc(bytes + alignment, 1);
    if (block_ == nullptr) throw std::bad_alloc();
    detail::prefer_large_pages(block_, bytes + alignment);
  }
  buffer(buffer&& other) noexcept : block_(std::exchange(other.block_, nullptr)), size_(std::exchange(other.size_, 0)) {}
  buffer& operator=(buffer&& other) noexcept {
    std::swap(block_, other.block_);
    std::swap(size_, other.size_);
    return *this;
  }
  buffer(const buffer&) = delete;
  buffer& operator=(const buffer&) = delete;
  ~buffer() { std::free(block_); }

  std::size_t size() const noexcept { return size_; }
  std::span<std::byte> bytes() const noexcept { return {first(), size_}; }
  /// The bytes as elements: the flat view an optimizer runs over.
  template <class T>
  std::span<T> as() const noexcept {
    return {reinterpret_cast<T*>(first()), size_ / sizeof(T)};
  }

 private:
  static constexpr std::size_t alignment = 64;
  std::byte* first() const noexcept {
    const auto address = reinterpret_cast<std::uintptr_t>(block_);
    return block_ ? static_cast<std::byte*>(block_) + ((alignment - address % alignment) % alignment) : nullptr;
  }
  void* block_ = nullptr;
  std::size_t size_ = 0;
};

/// How a tensor of weights starts out (train/initialise.hpp): normal with deviation 1/sqrt(cols), or a constant.
enum class initial : std::uint8_t { fan_in, zeros, ones };

/// One tensor of a catalogue: what a checkpoint or an initialiser needs to know of it.
struct slot {
  std::string name;  ///< with its scopes: "experts.up"
  element type;
  dim rows, cols;
  std::size_t offset, bytes;  ///< in the flat buffer
  initial start;
};

/// Carves views from caller memory, one after the other; every tensor starts at a multiple of 64 elements, so buffers of
/// the same tensors agree in their element offsets whatever the element type. Without memory it only counts, so one
/// function sizes a buffer and carves it; with a list it also records every tensor.
class arena {
 public:
  arena() = default;
  explicit arena(std::span<std::byte> memory) noexcept : base_(memory.data()), size_(memory.size()) {}
  explicit arena(std::vector<slot>& list) noexcept : list_(&list) {}

  template <class T>
  matrix_view<T> matrix(const char* name, dim rows, dim cols, initial start = initial::fan_in) noexcept {
    constexpr std::size_t grain = 64 * sizeof(T);
    const std::size_t first = (used_ + grain - 1) / grain * grain;
    const std::size_t bytes = static_cast<std::size_t>(rows) * static_cast<std::size_t>(cols) * sizeof(T);
    if (list_) list_->push_back({scope_ + name, dtype<T>::id, rows, cols, first, bytes, start});
    used_ = first + bytes;
    if (used_ > peak_) peak_ = used_;
    MOE_ASSERT(base_ == nullptr || used_ <= size_);
    return {base_ ? reinterpret_cast<T*>(base_ + first) : nullptr, rows, cols};
  }
  template <class T>
  std::span<T> vector(const char* name, dim n, initial start = initial::fan_in) noexcept {
    const auto m = matrix<T>(name, 1, n, start);
    return {m.data, m.data ? static_cast<std::size_t>(n) : 0};
  }

  /// A field of `width` elements in the record that each of `rows` rows has: a matrix of its own, or, between begin_records
  /// and end_records, a column of the records shared by the banks of a set of experts.
  template <class T>
  matrix_view<T> column(const char* name, dim rows, dim width) noexcept {
    if (stride_ == 0) return matrix<T>(name, rows, width);
    const std::size_t first = field_;
    field_ += (static_cast<std::size_t>(width) * sizeof(T) + record_grain - 1) / record_grain * record_grain;
    return {records_ ? reinterpret_cast<T*>(records_ + first) : nullptr, rows, width, static_cast<dim>(stride_ / sizeof(T))};
  }
  static constexpr std::size_t record_grain = 64;
  void begin_records(std::byte* records, std::size_t stride) noexcept {
    records_ = records;
    stride_ = stride;
    field_ = 0;
  }
  bool carves_records() const noexcept { return stride_ != 0; }
  /// Where the next column of a record starts. Banks that never hold the same row start at the same place.
  std::size_t field() const noexcept { return field_; }
  void move_field(std::size_t start) noexcept { field_ = start; }
  /// Bytes of a record as carved since begin_records.
  std::size_t end_records() noexcept {
    stride_ = 0;
    return field_;
  }

  bool counts() const noexcept { return base_ == nullptr; }
  std::size_t used() const noexcept { return used_; }
  std::size_t peak() const noexcept { return peak_; }
  std::size_t left() const noexcept {
    if (base_ == nullptr) return static_cast<std::size_t>(-1);
    return used_ < size_ ? size_ - used_ : 0;
  }
  std::size_t mark() const noexcept { return used_; }
  void rewind(std::size_t m) noexcept { used_ = m; }
  /// Pads to the alignment of every element type, so that what follows has the same size wherever it lies.
  void align() noexcept {
    constexpr std::size_t grain = 64 * 8;
    used_ = (used_ + grain - 1) / grain * grain;
    if (used_ > peak_) peak_ = used_;
  }

  /// Names what is carved while it lives: `arena::scope in(mem, "experts");`
  class scope {
   public:
    scope(arena& mem, const char* name) : mem_(mem), length_(mem.scope_.size()) {
      if (mem_.list_) mem_.scope_.append(name).append(1, '.');
    }
    scope(const scope&) = delete;
    scope& operator=(const scope&) = delete;
    ~scope() { mem_.scope_.resize(length_); }

   private:
    arena& mem_;
    std::size_t length_;
  };

 private:
  std::byte* base_ = nullptr;
  std::size_t size_ = 0, used_ = 0, peak_ = 0;
  std::byte* records_ = nullptr;
  std::size_t stride_ = 0, field_ = 0;
  std::vector<slot>* list_ = nullptr;
  std::string scope_;
};

/// What a counting arena counted, padded so that whatever follows in the same memory has its size too.
inline std::size_t padded(arena& count) noexcept {
  count.rewind(count.peak());
  count.align();
  return count.peak();
}

/// Gives back on leaving what a call took from its scratch.
class scratch_frame {
 public:
  explicit scratch_frame(arena& mem) noexcept : mem_(mem), mark_(mem.mark()) {}
  scratch_frame(const scratch_frame&) = delete;
  scratch_frame& operator=(const scratch_frame&) = delete;
  ~scratch_frame() { mem_.rewind(mark_); }

 private:
  arena& mem_;
  std::size_t mark_;
};

}  // namespace moe
