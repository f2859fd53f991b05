// SPDX-License-Identifier: Apache-2.0
/// The safetensors format, read from bytes that nobody vouches for.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>

#include "moe/io/tensor.hpp"

namespace moe {

/// What a file holds. Names and shapes are owned, the bytes of a tensor are those of the file.
struct safetensors_content {
  tensor_map tensors;
  metadata_map metadata;
};

namespace detail {

/// Reads the header's subset of JSON: objects of strings, of whole numbers and of one fixed form. Nothing recurses, so
/// nesting has no depth to limit. Every fault is a format_error with the byte of the file it was met at.
class header_cursor {
 public:
  header_cursor(std::string_view text, std::size_t first, const std::string& source) noexcept
      : text_(text), first_(first), source_(source) {}

  [[noreturn]] void fail(const std::string& what) const { fail(what, at_); }
  [[noreturn]] void fail(const std::string& what, std::size_t at) const {
    throw format_error(source_ + ": byte " + std::to_string(first_ + at) + ": " + what);
  }

  /// Takes `c` if it is next.
  bool take(char c) noexcept {
    skip_space();
    if (at_ == text_.size() || text_[at_] != c) return false;
    ++at_;
    return true;
  }
  void need(char c, const char* where) {
    if (!take(c)) fail(std::string("expected '") + c + "' " + where);
  }
  void need_end() {
    skip_space();
    if (at_ != text_.size()) fail("something follows the header's closing brace");
  }

  /// Calls `member(key)` for each member of an object, the cursor standing at its value.
  template <class F>
  void object(const char* what, F&& member) {
    need('{', what);
    if (take('}')) return;
    do {
      skip_space();
      const std::size_t at = at_;
      const std::string key = string("a name");
      need(':', "after a name");
      member(key, at);
    } while (take(','));
    need('}', what);
  }

  dim whole_number() {
    constexpr dim most = std::numeric_limits<dim>::max();
    skip_space();
    const std::size_t start = at_;
    dim n = 0;
    for (; is_digit(peek()); ++at_) {
      const dim digit = peek() - '0';
      if (n > (most - digit) / 10) fail("a number is too large", start);
      n = n * 10 + digit;
    }
    const char next = peek();
    if (at_ == start || next == '.' || next == 'e' || next == 'E')
      fail("expected a whole number that is not negative", start);
    if (text_[start] == '0' && at_ - start > 1) fail("a number starts with 0", start);
    return n;
  }

  std::string string(const char* what) {
    skip_space();
    const std::size_t start = at_;
    if (!take('"')) fail(std::string("expected ") + what + " in quotes");
    std::string out;
    for (;; ++at_) {
      if (at_ == text_.size()) fail("a string does not end", start);
      const char c = text_[at_];
      if (static_cast<unsigned char>(c) < 0x20) fail("a control character in a string");
      if (c == '"') break;
      if (c == '\\')
        escape(out);
      else
        out += c;
    }
    ++at_;
    return out;
  }

 private:
  static bool is_digit(char c) noexcept { return c >= '0' && c <= '9'; }
  char peek() const noexcept { return at_ < text_.size() ? text_[at_] : '\0'; }
  void skip_space() noexcept {
    while (at_ < text_.size() && (text_[at_] == ' ' || text_[at_] == '\n' || text_[at_] == '\t' || text_[at_] == '\r'))
      ++at_;
  }

  /// Takes an escape up to its last character.
  void escape(std::string& out) {
    constexpr std::string_view names = "\"\\/bfnrt", values = "\"\\/\b\f\n\r\t";
    const std::size_t start = at_++;
    const std::size_t which = names.find(peek());
    if (which != names.npos) return void(out += values[which]);
    if (peek() != 'u') fail("an unknown escape", start);
    std::uint32_t point = hex4(start);
    if (point >= 0xd800 && point < 0xdc00 && text_.substr(at_ + 1, 2) == "\\u") {
      at_ += 2;
      const std::uint32_t low = hex4(start);
      if (low < 0xdc00 || low > 0xdfff) fail("half a surrogate pair", start);
      point = 0x10000 + ((point - 0xd800) << 10) + (low - 0xdc00);
    }
    if (point >= 0xd800 && point <= 0xdfff) fail("half a surrogate pair", start);
    append_utf8(out, point);
  }
  /// Takes four digits after the `u` at the cursor.
  std::uint32_t hex4(std::size_t start) {
    std::uint32_t value = 0;
    for (int i = 0; i < 4; ++i) {
      ++at_;
      const char c = peek(), lower = static_cast<char>(c | 0x20);
      if (!is_digit(c) && (lower < 'a' || lower > 'f')) fail("an escape without four hexadecimal digits", start);
      value = value * 16 + static_cast<std::uint32_t>(is_digit(c) ? c - '0' : lower - 'a' + 10);
    }
    return value;
  }
  static void append_utf8(std::string& out, std::uint32_t point) {
    const auto put = [&](std::uint32_t byte) { out += static_cast<char>(static_cast<unsigned char>(byte)); };
    if (point < 0x80) return put(point);
    const int more = point < 0x800 ? 1 : point < 0x10000 ? 2 : 3;
    put((more == 1 ? 0xc0u : more == 2 ? 0xe0u : 0xf0u) | point >> (6 * more));
    for (int i = more - 1; i >= 0; --i) put(0x80u | (point >> (6 * i) & 0x3fu));
  }

  std::string_view text_;
  std::size_t first_, at_ = 0;
  const std::string& source_;
};

/// The header's text, or a format_error about its length.
inline std::string_view header_text(std::span<const std::byte> file, const std::string& source) {
  if (file.size() < 8)
    throw format_error(source + ": is " + std::to_string(file.size()) +
                       " bytes long, shorter than the header's length field");
  std::uint64_t length = 0;
  for (std::size_t i = 8; i-- > 0;) length = length << 8 | std::to_integer<std::uint64_t>(file[i]);
  if (length > most_header_bytes)
    throw format_error(source + ": header length " + std::to_string(length) + " is above " +
                       std::to_string(most_header_bytes));
  if (length > file.size() - 8)
    throw format_error(source + ": header length " + std::to_string(length) +
                       " goes beyond the end of the file, which has " + std::to_string(file.size() - 8) + " bytes after it");
  const std::string_view text(reinterpret_cast<const char*>(file.data()) + 8, static_cast<std::size_t>(length));
  if (text.empty() || text.front() != '{') throw format_error(source + ": byte 8: the header does not start with '{'");
  if (const std::size_t end = utf8_end(text); end != text.size())
    throw format_error(source + ": byte " + std::to_string(8 + end) + ": the header is not UTF-8");
  return text;
}

inline std::vector<dim> read_shape(header_cursor& in) {
  std::vector<dim> shape;
  in.need('[', "before a shape");
  if (in.take(']')) return shape;
  do {
    if (shape.size() == most_dimensions) in.fail("a shape of more than " + std::to_string(most_dimensions) + " dimensions");
    shape.push_back(in.whole_number());
  } while (in.take(','));
  in.need(']', "after a shape");
  return shape;
}

/// What the header says of one tensor.
struct tensor_entry {
  const file_dtype* type = nullptr;
  std::vector<dim> shape;
  dim begin = 0, end = 0;
  bool has_shape = false, has_offsets = false;
};

/// Takes {"dtype":...,"shape":[...],"data_offsets":[begin,end]}, the members in any order, each once. `fail(what, at)`
/// speaks of the tensor.
template <class F>
tensor_entry read_entry(header_cursor& in, std::size_t start, F&& fail) {
  tensor_entry t;
  in.object("around a tensor", [&](const std::string& key, std::size_t at) {
    const bool twice = key == "dtype"   ? t.type != nullptr
                       : key == "shape" ? t.has_shape
                                        : key == "data_offsets" && t.has_offsets;
    if (twice) fail("has " + key + " twice", at);
    if (key == "dtype") {
      const std::string name = in.string("a dtype");
      t.type = find_dtype(name);
      if (t.type == nullptr) fail("has the unknown dtype " + in_quotes(name), at);
    } else if (key == "shape") {
      t.shape = read_shape(in);
      t.has_shape = true;
    } else if (key == "data_offsets") {
      in.need('[', "before data_offsets");
      t.begin = in.whole_number();
      in.need(',', "between data_offsets");
      t.end = in.whole_number();
      in.need(']', "after data_offsets");
      t.has_offsets = true;
    } else {
      fail("has the unknown member " + in_quotes(key), at);
    }
  });
  if (t.type == nullptr) fail("has no dtype", start);
  if (!t.has_shape) fail("has no shape", start);
  if (!t.has_offsets) fail("has no data_offsets", start);
  return t;
}

/// Takes one tensor, whose name began at `start`, and finds its bytes.
inline tensor_view read_tensor(header_cursor& in, std::string_view name, std::size_t start,
                               std::span<const std::byte> data) {
  const auto fail = [&](const std::string& what, std::size_t at) { in.fail("tensor " + in_quotes(name) + ' ' + what, at); };
  tensor_entry t = read_entry(in, start, fail);
  const auto fail_offsets = [&](const std::string& what) {
    fail("has data_offsets [" + std::to_string(t.begin) + ", " + std::to_string(t.end) + "], " + what, start);
  };
  const auto begin = static_cast<std::size_t>(t.begin), end = static_cast<std::size_t>(t.end);
  if (begin > end) fail_offsets("which are reversed");
  if (end > data.size()) fail_offsets("beyond the " + std::to_string(data.size()) + " bytes of data");
  const std::size_t wanted = byte_count(*t.type, t.shape, [&](const std::string& what) { fail(what, start); });
  if (end - begin != wanted)
    fail_offsets(std::to_string(end - begin) + " bytes, but " + std::string(t.type->name) + ' ' + shape_text(t.shape) +
                 " has " + std::to_string(wanted));
  return {t.type->name, std::move(t.shape), data.subspan(begin, wanted)};
}

/// Throws format_error unless the tensors lie in the data one after the other, without overlap or gap, to its end.
inline void expect_covered(const tensor_map& tensors, std::span<const std::byte> data, const std::string& source) {
  std::vector<const tensor_map::value_type*> order;
  for (const auto& t : tensors) order.push_back(&t);
  const auto begin = [&](const tensor_map::value_type* t) {
    return static_cast<std::size_t>(t->second.bytes.data() - data.data());
  };
  std::sort(order.begin(), order.end(), [&](const auto* a, const auto* b) {
    return begin(a) != begin(b) ? begin(a) < begin(b) : a->second.bytes.size() < b->second.bytes.size();
  });
  const auto gap = [&](std::size_t from, std::size_t to) {
    throw format_error(source + ": bytes " + std::to_string(from) + " to " + std::to_string(to) +
                       " of the data belong to no tensor");
  };
  std::size_t end = 0;
  for (const auto* t : order) {
    if (begin(t) < end)
      throw format_error(source + ": tensor " + in_quotes(t->first) + " begins at byte " + std::to_string(begin(t)) +
                         " of the data, inside the tensor that ends at " + std::to_string(end));
    if (begin(t) > end) gap(end, begin(t));
    end += t->second.bytes.size();
  }
  if (end != data.size()) gap(end, data.size());
}

}  // namespace detail

/// Reads a safetensors file: a 64-bit length, that many bytes of JSON, and the data. Nothing is copied but names and
/// shapes. Stricter than the reference implementation in that a name appears once, no member is unknown, a name has no
/// NUL and a shape at most 64 dimensions. Throws format_error, beginning with `source`, saying what is wrong and where.
inline safetensors_content parse_safetensors(std::span<const std::byte> file, const std::string& source) {
  const std::string_view header = detail::header_text(file, source);
  const std::span<const std::byte> data = file.subspan(8 + header.size());
  detail::header_cursor in(header, 8, source);
  safetensors_content out;
  bool has_metadata = false;
  in.object("around the header", [&](const std::string& name, std::size_t at) {
    if (name == "__metadata__") {
      if (std::exchange(has_metadata, true)) in.fail("__metadata__ appears twice", at);
      in.object("around __metadata__", [&](const std::string& key, std::size_t key_at) {
        if (!out.metadata.emplace(key, in.string("a value of __metadata__")).second)
          in.fail("__metadata__ has " + detail::in_quotes(key) + " twice", key_at);
      });
      return;
    }
    if (name.find('\0') != std::string::npos) in.fail("tensor " + detail::in_quotes(name) + " has NUL in its name", at);
    if (out.tensors.contains(name)) in.fail("tensor " + detail::in_quotes(name) + " appears twice", at);
    out.tensors.emplace(name, detail::read_tensor(in, name, at, data));
  });
  in.need_end();
  detail::expect_covered(out.tensors, data, source);
  return out;
}

}  // namespace moe
