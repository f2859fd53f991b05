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

/// `length` bytes that the model writes after a text of at least `text::margin` bytes. The same seed gives the same bytes.
template <class Block>
std::string generate(const language_model_instance<Block>& m, std::string_view before, std::size_t length, float temperature,
                     moe::rng random) {
  std::string all(before);
  moe::buffer work(m.net.work_bytes(1));
  for (std::size_t i = 0; i < length; ++i) {
    all += '\0';  // the byte to predict
    const moe::idx last[] = {static_cast<moe::idx>(all.size() - 1)};
    moe::arena mem(work.bytes());
    auto ctx = m.net.make_context({{reinterpret_cast<const std::uint8_t*>(all.data()), all.size()}, last}, mem);
    m.net.forward(m.w, ctx, mem);
    all.back() = static_cast<char>(sample({ctx.logits.data, 256}, temperature, random.uniform(i)));
  }
  return all.substr(before.size());
}

/// Goes on where a stretch of each language's text ends: "… the end of the stretch | what the model writes".
template <class Block>
std::string continue_texts(const language_model_instance<Block>& m, const text& t, std::size_t length) {
  const std::string_view all(reinterpret_cast<const char*>(t.bytes.data()), t.bytes.size());
  std::string out;
  for (std::size_t l = 0; l < t.languages(); ++l) {
    std::string_view before = all.substr(t.begin[l] + text::margin, 2 * text::margin);
    before = before.substr(0, before.rfind(' ') + 1);
    const std::string_view end = before.substr(before.find(' ', before.size() - 70) + 1);
    out += "... " + printable(end) + "| " + printable(generate(m, before, length, 0.6f, moe::rng(7))) + "\n\n";
  }
  return out;
}

}  // namespace demo
