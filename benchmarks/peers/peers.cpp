// SPDX-License-Identifier: Apache-2.0
#include "peers/peers.hpp"

namespace bench {
namespace {

struct entry {
  const char* name;
  std::unique_ptr<contestant> (*make)(const model_shape&, std::string_view type);  ///< null for a type that it lacks
};

constexpr entry entries[] = {
#if defined(MOE_BENCHMARK_EIGEN)
    {"eigen", [](const model_shape& s, std::string_view) { return make_eigen_loop(s); }},
#endif
#if defined(MOE_BENCHMARK_ONEDNN)
    {"onednn", make_onednn_loop},
#endif
    {nullptr, nullptr}};

}  // namespace

std::vector<std::string> peer_names() {
  std::vector<std::string> names;
  for (const entry* e = entries; e->name != nullptr; ++e) names.emplace_back(e->name);
  return names;
}

std::vector<std::unique_ptr<contestant>> peers_of(const model_shape& s, std::string_view type) {
  std::vector<std::unique_ptr<contestant>> peers;
  for (const entry* e = entries; e->name != nullptr; ++e)
    if (auto p = e->make(s, type)) peers.push_back(std::move(p));
  return peers;
}

}  // namespace bench
