// SPDX-License-Identifier: Apache-2.0
/// How well block attention finds the block of a key that matters, and the sizes that follow.
#pragma once

#include <cmath>

#include "moe/core/error.hpp"

namespace moe {

/// What a query sees: keys are unit vectors, those that do not matter have affinity 0 to it in the mean, the one that does
/// has `gap` more. Of its block, `related` keys in all (itself included) belong together; the others of them have
/// `related_gap`.
struct key_affinity {
  double gap = 1;
  dim related = 1;  ///< m
  double related_gap = 0;

  /// Delta_eff = Delta + (m - 1)(mu_c - mu_0)
  constexpr double effective() const noexcept { return gap + static_cast<double>(related - 1) * related_gap; }
};

/// Delta_eff sqrt(d / (2 B)): the mean lead of the block's score over that of another, Delta_eff / B, in deviations of it,
/// sqrt(2 / (d B)). Halving the block multiplies it by sqrt 2.
/// FlashMoBA, Xiao et al. 2025, arXiv:2511.11571
inline double signal_to_noise(const key_affinity& a, dim d, dim block) noexcept {
  return a.effective() * std::sqrt(static_cast<double>(d) / (2 * static_cast<double>(block)));
}
/// Phi(-SNR): how often a block without the key scores higher.
inline double probability_outranked(double snr) noexcept { return 0.5 * std::erfc(snr / std::sqrt(2.0)); }

/// The least SNR with which a top-k of n blocks finds the key reliably: Phi^-1(1 - k/n). -inf where every block is kept.
inline double reliable_signal_to_noise(dim k, dim n) noexcept {
  if (k >= n) return -static_cast<double>(detail::infinity);
  const double share = static_cast<double>(k) / static_cast<double>(n);
  double low = -40, high = 40;  // probability_outranked falls
  for (int i = 0; i < 100; ++i) {
    const double middle = (low + high) / 2;
    (probability_outranked(middle) > share ? low : high) = middle;
  }
  return (low + high) / 2;
}

/// A block size and a k, and what to expect of them.
struct block_advice {
  dim block, k;  ///< k counts the query's own block
  double snr, outranked;
  bool reliable;  ///< snr is at least reliable_signal_to_noise(k, n)
};

/// The largest block, a power of two that divides the budget, with which top-k stays reliable for sequences of N keys of
/// which a query reads `budget` = k B. Smaller blocks find keys better, larger ones cost less routing. Where none is
/// reliable, the smallest with its figures.
/// errors   shape_error for sizes below 1, or a budget that is no multiple of the smallest block
inline block_advice advise_blocks(dim keys, dim budget, dim d, const key_affinity& a, dim smallest = 16) {
  if (keys < 1 || budget < 1 || d < 1 || smallest < 1)
    throw shape_error("advise_blocks: keys, budget, d and smallest are " + std::to_string(keys) + ", " +
                      std::to_string(budget) + ", " + std::to_string(d) + " and " + std::to_string(smallest) +
                      ", expected at least 1 each");
  if (budget % smallest != 0)
    throw shape_error("advise_blocks: budget is " + std::to_string(budget) + ", expected a multiple of " +
                      std::to_string(smallest) + " (smallest)");
  const auto figures = [&](dim block) {
    const dim k = budget / block;
    const double snr = signal_to_noise(a, d, block);
    return block_advice{block, k, snr, probability_outranked(snr),
                        snr >= reliable_signal_to_noise(k, detail::blocks(keys, block))};
  };
  block_advice best = figures(smallest);
  for (dim block = 2 * smallest; block <= budget && budget % block == 0; block *= 2)
    if (const block_advice next = figures(block); next.reliable) best = next;
  return best;
}

}  // namespace moe
