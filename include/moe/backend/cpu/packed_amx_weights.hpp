// SPDX-License-Identifier: Apache-2.0
/// What tile products with packed weights read: a source whose next() is the two tiles of the next step, as they lie in memory
/// or made from codes beside the products. `Codes` has widen(half, to): 64 k of 16 rows become a tile.
#pragma once

#include "moe/backend/cpu/ladder.hpp"
#include "moe/backend/packed_kernels.hpp"

#if defined(MOE_X86_KERNELS)

namespace moe::arch::detail {

/// Weights that lie in memory as tiles read them.
class stored_weights {
 public:
  static constexpr dim step_bytes = 2 * tile_bytes;

  explicit stored_weights(const std::byte* at) noexcept : at_(at) {}
  /// The two tiles of the next step.
  MOE_INLINE const std::byte* next() noexcept { return (at_ += step_bytes) - step_bytes; }

 private:
  const std::byte* at_;
};
/// `steps` steps of codes from `first` on, as tiles in `kept` places of `to` in turn, made `lead` steps before they are
/// read: beside the products of others.
template <class Codes>
class widened_weights {
 public:
  static constexpr dim lead = 2;

  MOE_TARGET(MOE_AVX512_VNNI)
  widened_weights(const Codes& codes, dim first, dim steps, std::byte* to, dim kept) noexcept
      : codes_(codes),
        step_(first),
        end_(first + steps),
        first_(to),
        last_(to + kept * 2 * tile_bytes),
        write_(to),
        read_(to) {
    for (dim s = 0; s < lead; ++s) widen();
  }
  MOE_TARGET(MOE_AVX512_VNNI)
  MOE_INLINE const std::byte* next() noexcept {
    widen();
    const std::byte* at = read_;
    read_ = following(read_);
    return at;
  }

 private:
  MOE_INLINE std::byte* following(std::byte* place) const noexcept {
    return place + 2 * tile_bytes == last_ ? first_ : place + 2 * tile_bytes;
  }
  MOE_TARGET(MOE_AVX512_VNNI)
  MOE_INLINE void widen() noexcept {
    if (step_ == end_) return;
    codes_.widen(2 * step_, write_);
    codes_.widen(2 * step_ + 1, write_ + tile_bytes);
    ++step_;
    write_ = following(write_);
  }

  const Codes& codes_;
  dim step_, end_;
  std::byte *first_, *last_, *write_, *read_;
};
/// Weights at `at`. Halves of codes from half 2 first_step on become tiles from there on too, one beside the products of
/// each step: of the next weights, in the place of a step that was read before; or of these, those from `ready` on.
template <class Codes>
class weights_beside_codes {
 public:
  weights_beside_codes(std::byte* at, const Codes& next, dim first_step, dim halves) noexcept
      : stored_(at), codes_(next), skipped_(2 * first_step), half_(-1), halves_(halves), to_(at) {}
  /// A first block reads two halves a step and has one made. `early` more than half of them, before, keep it ahead.
  MOE_TARGET(MOE_AVX512_VNNI)
  weights_beside_codes(std::byte* at, const Codes& own, dim first_step, dim halves, dim ready) noexcept
      : stored_(at), codes_(own), skipped_(2 * first_step), half_(ready), halves_(halves), to_(at) {
    constexpr dim early = 3;
    for (dim i = 0; i < early; ++i) widen();
  }
  MOE_TARGET(MOE_AVX512_VNNI)
  MOE_INLINE const std::byte* next() noexcept {
    widen();
    return stored_.next();
  }

 private:
  MOE_TARGET(MOE_AVX512_VNNI)
  MOE_INLINE void widen() noexcept {
    if (half_ >= 0 && half_ < halves_) codes_.widen(skipped_ + half_, to_ + half_ * tile_bytes);
    ++half_;
  }

  stored_weights stored_;
  const Codes& codes_;
  dim skipped_, half_, halves_;
  std::byte* to_;
};

}  // namespace moe::arch::detail

#endif
