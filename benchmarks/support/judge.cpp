// SPDX-License-Identifier: Apache-2.0
#include "support/judge.hpp"

#include <algorithm>
#include <cstdio>

namespace bench {

std::vector<std::string> judge_loop(const std::vector<row>& rows) {
  constexpr double wanted = 0.85;
  std::vector<std::string> weak;
  for (const row& r : rows)
    for (const peer_result& p : r.peers) {
      const auto at = std::find(default_tokens.begin(), default_tokens.end(), r.tokens);
      if (p.name != "eigen" || r.threads != 2 || r.skew != 0 || r.backward || at == default_tokens.end()) continue;
      const double known = r.shape.known_loop[static_cast<std::size_t>(at - default_tokens.begin())];
      if (p.tokens_per_s >= wanted * known) continue;
      char text[256];
      std::snprintf(text, sizeof text,
                    "the Eigen loop reached %.0f tokens/s on %s, T = %td (%s): %.0f%% of the %.0f that it is known for",
                    p.tokens_per_s, r.shape.name.c_str(), r.tokens, std::string(r.type.name).c_str(),
                    100 * p.tokens_per_s / known, known);
      weak.emplace_back(text);
    }
  return weak;
}

}  // namespace bench
