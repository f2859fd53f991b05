// SPDX-License-Identifier: Apache-2.0
/// Text from a trained model.
#pragma once

#include <algorithm>
#include <cmath>
#include <string>
#include <string_view>
#include <vector>

#include "training.hpp"

namespace demo {

/// Draws an index with probability proportional to exp(logits / temperature); `u` in [0, 1) is the draw.
inline std::size_t sample(std::span<const float> logits, float temperature, float u) {
  const float top = *std::max_element(logits.begin(), logits.end());
  std::vector<float> p;
  float sum = 0;
  for (const float z : logits) sum += p.emplace_back(std::exp((z - top) / temperature));
  float left = u * sum;
  for (std::size_t i = 0; i < p.size(); ++i)
    if ((left -= p[i]) < 0) return i;
  return static_cast<std::size_t>(std::max_element(p.begin(), p.end()) - p.begin());
}

/// The text with every byte that begins no whole character of UTF-8 replaced, and line ends kept; fit for a terminal.
inline std::string printable(std::string_view s) {
  std::string out;
  for (std::size_t i = 0; i < s.size();) {
    const auto lead = static_cast<unsigned char>(s[i]);
    const std::size_t size = lead < 0x80 ? 1 : lead < 0xc2 ? 0 : lead < 0xe0 ? 2 : lead < 0xf0 ? 3 : lead < 0xf5 ? 4 : 0;
    std::size_t n = 1;
    while (n < size && i + n < s.size() && (static_cast<unsigned char>(s[i + n]) & 0xc0) == 0x80) ++n;
    const bool whole = n == size && (lead >= 0x20 || lead == '\n');
    if (whole) out += s.substr(i, n);
    else out += "\ufffd";
    i += whole ? n : 1;
  }
  return out;
}

/// Reads a text byte by byte and says what comes next; the keys and values of what it has read stay in caches. Where they
/// are full, the second half of what they hold is read again, as a new sequence.
template <class Block>
class reader {
 public:
  /// After a text of at least window_embedding::window bytes.
  reader(const language_model_instance<Block>& model, std::string_view before)
      : m_(model), all_(before), logits_(256), cache_memory_(m_.net.cache_bytes(m_.length)) {
    begin_again(std::max(static_cast<moe::dim>(before.size()) - m_.length / 2, m_.net.embedding().window - 1));
  }
  std::span<const float> logits() const noexcept { return logits_; }
  const std::string& text() const noexcept { return all_; }

  void append(char c) {
    all_ += c;
    if (caches_[0].tokens.length(0) < m_.length) read(static_cast<moe::dim>(all_.size()));
    else begin_again(static_cast<moe::dim>(all_.size()) - m_.length / 2);
  }

 private:
  /// Tokens that predict bytes first + 1 .. the next one, as a sequence of their own.
  void begin_again(moe::dim first) {
    moe::arena mem(cache_memory_.bytes());
    caches_ = m_.net.make_caches(m_.length, mem);
    if (work_.size() == 0) work_ = moe::buffer(m_.net.work_bytes(m_.length, caches_[0]));
    read(first + 1);
  }
  /// Tokens that predict bytes first .. the next one.
  void read(moe::dim first) {
    position_.clear();
    for (moe::dim p = first; p <= static_cast<moe::dim>(all_.size()); ++p) position_.push_back(static_cast<moe::idx>(p));
    const windows in{{reinterpret_cast<const std::uint8_t*>(all_.data()), all_.size()}, position_, {}};
    moe::arena mem(work_.bytes());
    m_.net.forward(m_.w, in, m_.angles, caches_, logits_, mem);
  }

  const language_model_instance<Block>& m_;
  std::string all_;
  std::vector<float> logits_;
  moe::buffer cache_memory_, work_;
  std::vector<typename language_model<Block>::cache> caches_;
  std::vector<moe::idx> position_;
};

/// `length` bytes that the model writes after a text. The same seed gives the same bytes.
template <class Block>
std::string generate(const language_model_instance<Block>& m, std::string_view before, std::size_t length, float temperature,
                     moe::rng random) {
  reader<Block> at(m, before);
  for (std::size_t i = 0; i < length; ++i) at.append(static_cast<char>(sample(at.logits(), temperature, random.uniform(i))));
  return at.text().substr(before.size());
}

/// Goes on where a stretch of each language's text ends: "… the end of the stretch | what the model writes".
template <class Block>
std::string continue_texts(const language_model_instance<Block>& m, const text& t, std::size_t length) {
  const std::string_view all(reinterpret_cast<const char*>(t.bytes.data()), t.bytes.size());
  std::string out;
  for (std::size_t l = 0; l < t.languages(); ++l) {
    std::string_view before = all.substr(t.begin[l] + text::margin, 512);
    before = before.substr(0, before.rfind(' ') + 1);
    const std::string_view end = before.substr(before.find(' ', before.size() - 70) + 1);
    out += "... " + printable(end) + "| " + printable(generate(m, before, length, 0.6f, moe::rng(7))) + "\n\n";
  }
  return out;
}

}  // namespace demo
