// SPDX-License-Identifier: Apache-2.0
#include "peers/peers.hpp"

namespace bench {

std::vector<std::unique_ptr<contestant>> peers_of([[maybe_unused]] const model_shape& s, const weight_type&) {
  std::vector<std::unique_ptr<contestant>> peers;
#if defined(MOE_BENCHMARK_EIGEN)
  peers.push_back(make_eigen_loop(s));
#endif
  return peers;
}

}  // namespace bench
