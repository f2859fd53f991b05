// SPDX-License-Identifier: Apache-2.0
/// The types of weights that the library runs.
#pragma once

#include <memory>
#include <vector>

#include "support/contestant.hpp"
#include "support/report.hpp"

namespace bench {

/// Those with a layer for inference, or, where `backward`, for training.
std::vector<weight_type> library_types(bool backward);

/// The library's layer at one of those types.
std::unique_ptr<contestant> library_layer_of(const model_shape& s, std::string_view type, bool backward);

/// The static layer of a control loop, one token a call, each on another expert than the call before. Its weights are more than
/// the first cache holds: the roof is the time to read an expert's from the second.
row measure_static_layer(int rounds);

std::unique_ptr<contestant> make_f32(const model_shape& s, bool backward);
std::unique_ptr<contestant> make_f32_training(const model_shape& s);
std::unique_ptr<contestant> make_bf16(const model_shape& s, bool backward);
std::unique_ptr<contestant> make_bf16_training(const model_shape& s);
std::unique_ptr<contestant> make_f16(const model_shape& s, bool backward);
std::unique_ptr<contestant> make_int8(const model_shape& s, bool backward);
std::unique_ptr<contestant> make_int4(const model_shape& s, bool backward);
std::unique_ptr<contestant> make_ternary(const model_shape& s, bool backward);

}  // namespace bench
