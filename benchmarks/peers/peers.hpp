// SPDX-License-Identifier: Apache-2.0
/// The other implementations of a layer that this build has.
#pragma once

#include <memory>
#include <vector>

#include "support/contestant.hpp"

namespace bench {

std::unique_ptr<contestant> make_eigen_loop(const model_shape& s);

/// Those that can run the type of weights, or stand for a float32 one beside it.
std::vector<std::unique_ptr<contestant>> peers_of(const model_shape& s, const weight_type& type);

}  // namespace bench
