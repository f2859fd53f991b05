// SPDX-License-Identifier: Apache-2.0
/// A peer in a process of its own: benchmarks/peers/peer.py has the protocol and the other side.
#pragma once

#include <memory>
#include <string_view>
#include <vector>

#include "peers/peer_list.hpp"
#include "support/contestant.hpp"

namespace bench {

/// One contestant for each of `listed`, of one shape at one type, which keep what they exchange in one temporary folder. Of
/// the layers they take the first and hold copies of it, `rotate` bytes in all.
std::vector<std::unique_ptr<contestant>> process_peers(const std::vector<listed_peer>& listed, const model_shape& s,
                                                       std::string_view type, double rotate);

}  // namespace bench
