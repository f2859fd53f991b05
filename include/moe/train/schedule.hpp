// SPDX-License-Identifier: Apache-2.0
/// Learning rates as pure functions of the step: nothing advances, so a restart needs only the step.
#pragma once

#include <cmath>
#include <string>

#include "moe/core/error.hpp"
#include "moe/core/types.hpp"

namespace moe {

/// A linear warm-up, half a cosine, and a floor:
///
///   step < warmup    peak (step + 1) / warmup            the first step already moves
///   step < steps     floor + (peak - floor) (1 + cos(pi (step - warmup) / (steps - warmup))) / 2
///   after that       floor
///
/// Loshchilov & Hutter 2017, arXiv:1608.03983 (one period). Throws shape_error unless 0 <= floor <= peak, finite, and
/// 0 <= warmup <= steps, 0 <= step. With `floor` equal to `peak` the rate is constant after the warm-up.
struct warmup_cosine {
  float peak;
  float floor = 0.f;
  dim warmup = 0;
  dim steps = 0;

  float operator()(dim step) const {
    check(step);
    if (step < warmup) return static_cast<float>(peak * static_cast<double>(step + 1) / static_cast<double>(warmup));
    if (step >= steps) return floor;
    const double part = static_cast<double>(step - warmup) / static_cast<double>(steps - warmup);
    return static_cast<float>(floor + (double{peak} - floor) * 0.5 * (1 + std::cos(3.14159265358979323846 * part)));
  }

 private:
  void check(dim step) const {
    if (!(0 <= floor && floor <= peak && std::isfinite(peak)))
      throw shape_error("warmup_cosine: floor is " + std::to_string(floor) + " and peak " + std::to_string(peak) +
                        ", expected 0 <= floor <= peak, finite");
    if (!(0 <= warmup && warmup <= steps))
      throw shape_error("warmup_cosine: warmup is " + std::to_string(warmup) + " and steps " + std::to_string(steps) +
                        ", expected 0 <= warmup <= steps");
    if (step < 0) throw shape_error("warmup_cosine: step is " + std::to_string(step) + ", expected 0 <= step");
  }
};

}  // namespace moe
