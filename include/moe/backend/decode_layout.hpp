// SPDX-License-Identifier: Apache-2.0
/// How the keys and values of one head lie in a cache: one layout per element type, whatever the instruction set.
///
/// keys     blocks of 16; within one, lines of 64 bytes (32 of halves that lie alone) for each run of elements that lie
///          together: [blocks][d / together][16 keys][together]. A vector of a line holds as many keys, so their scores need
///          no sums across lanes. Floats and f16 lie alone, of bf16 two together, of bytes four.
/// values   rows; bytes: of four tokens together, [N / 4][dv][4], as products of bytes add up four
#pragma once

#include "moe/core/dtype.hpp"

namespace moe::detail {

/// Elements that widths are padded to, and keys of a block.
inline constexpr dim kv_pad = 32, kv_block = 16;

template <class T>
inline constexpr dim keys_together = std::is_same_v<T, std::int8_t> ? 4
                                     : std::is_same_v<T, bf16>      ? 2
                                                                    : 1;
template <class T>
inline constexpr dim values_together = std::is_same_v<T, std::int8_t> ? 4 : 1;

/// Where element j of token t lies, d and dv padded.
template <class T>
constexpr dim key_place(dim t, dim j, dim d) noexcept {
  constexpr dim n = keys_together<T>;
  return t / kv_block * kv_block * d + j / n * n * kv_block + t % kv_block * n + j % n;
}
template <class T>
constexpr dim value_place(dim t, dim j, dim dv) noexcept {
  constexpr dim n = values_together<T>;
  return t / n * n * dv + j * n + t % n;
}

}  // namespace moe::detail
