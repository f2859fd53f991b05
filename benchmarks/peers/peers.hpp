// SPDX-License-Identifier: Apache-2.0
/// The other implementations of a layer that this build has.
#pragma once

#include <memory>
#include <string_view>
#include <vector>

#include "support/contestant.hpp"

namespace bench {

/// The names of all of them, or, where `backward`, of those that train, in the order of the table.
std::vector<std::string> peer_names(bool backward);

/// Those that run the type of weights; the Eigen loop, which comes first, runs float32 beside every type.
std::vector<std::unique_ptr<contestant>> peers_of(const model_shape& s, std::string_view type, bool backward);

std::unique_ptr<contestant> make_eigen_loop(const model_shape& s, bool backward);
std::unique_ptr<contestant> make_onednn_loop(const model_shape& s, std::string_view type);

}  // namespace bench
