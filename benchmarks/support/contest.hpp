// SPDX-License-Identifier: Apache-2.0
/// Times the library and its peers in turn.
#pragma once

#include <functional>

#include "peers/peer_list.hpp"
#include "support/contestant.hpp"
#include "support/options.hpp"
#include "support/report.hpp"

namespace bench {

/// Every row of one shape at one type, beside the peers of this build and the `listed` ones. `of(threads)` are the limits of
/// that many threads. Throws std::runtime_error where the library's output is not what the layer's is; a peer whose output
/// is not, or that cannot run, is among those that the row says are left out.
void compete(const model_shape& s, const weight_type& type, const options& o, const std::vector<listed_peer>& listed,
             const std::function<const machine_limits&(int)>& of, const std::function<void(const row&)>& done);

}  // namespace bench
