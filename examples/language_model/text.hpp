// SPDX-License-Identifier: Apache-2.0
/// Bytes of several languages, and the order in which training reads them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <numeric>
#include <string_view>
#include <vector>

namespace demo {

/// Texts of several languages, one after the other: language l is bytes begin[l] .. begin[l+1]. Each begins with `margin`
/// newlines, so that every byte has that many before it.
struct text {
  static constexpr std::size_t margin = 64;
  std::vector<std::uint8_t> bytes;
  std::vector<std::size_t> begin{0};

  std::size_t languages() const noexcept { return begin.size() - 1; }
  std::size_t language_of(std::size_t position) const noexcept {
    std::size_t l = 0;
    while (position >= begin[l + 1]) ++l;
    return l;
  }
};

/// Appends the text of one more language.
inline void append_language(text& t, std::string_view bytes) {
  t.bytes.insert(t.bytes.end(), text::margin, '\n');
  t.bytes.insert(t.bytes.end(), bytes.begin(), bytes.end());
  t.begin.push_back(t.bytes.size());
}

/// Walks over a text in sequences of `length` bytes so that every one comes once before any comes again, and every
/// stretch of the walk is spread evenly over the whole text, hence over its languages: sequence i of the walk is i * stride modulo
/// their number, both coprime.
class sampler {
 public:
  sampler(const text& t, std::size_t length) : length_(length) {
    for (std::size_t l = 0; l < t.languages(); ++l)
      for (std::size_t p = t.begin[l] + text::margin; p + length <= t.begin[l + 1]; p += length) first_.push_back(p);
    stride_ = static_cast<std::size_t>(0.6180339887 * static_cast<double>(size()));
    while (std::gcd(stride_, size()) != 1) ++stride_;
  }
  std::size_t size() const noexcept { return first_.size(); }
  std::size_t length() const noexcept { return length_; }
  /// The first byte of the i-th sequence; it has `margin` bytes before it.
  std::size_t operator()(std::size_t i) const noexcept { return first_[i % size() * stride_ % size()]; }

 private:
  std::vector<std::size_t> first_;
  std::size_t length_, stride_ = 1;
};

}  // namespace demo
