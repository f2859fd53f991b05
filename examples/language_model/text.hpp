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
  static constexpr std::size_t margin = 256;
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

/// Walks over a text so that every position comes once before any comes again, and every stretch of the walk is spread
/// evenly over the whole text, hence over its languages: position i is i * stride modulo the size, both coprime.
class sampler {
 public:
  explicit sampler(const text& t) : languages_(t.languages()), size_(t.bytes.size() - languages_ * text::margin) {
    for (std::size_t l = 0; l < languages_; ++l) begin_.push_back(t.begin[l] - l * text::margin);
    stride_ = static_cast<std::size_t>(0.6180339887 * static_cast<double>(size_));
    while (std::gcd(stride_, size_) != 1) ++stride_;
  }
  std::size_t size() const noexcept { return size_; }
  /// The i-th position: a byte of the text that has `margin` bytes before it.
  std::size_t operator()(std::size_t i) const noexcept {
    const std::size_t p = i % size_ * stride_ % size_;
    std::size_t l = languages_ - 1;
    while (p < begin_[l]) --l;
    return p + (l + 1) * text::margin;
  }

 private:
  std::size_t languages_, size_, stride_ = 1;
  std::vector<std::size_t> begin_;
};

}  // namespace demo
