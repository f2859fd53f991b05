// SPDX-License-Identifier: Apache-2.0
#include "peers/peers.hpp"

namespace bench {
namespace {

struct entry {
  const char* name;
  bool trains;
  std::unique_ptr<contestant> (*make)(const model_shape&, std::string_view type,
                                      bool backward);  ///< null for a type that it lacks
};

constexpr entry entries[] = {
#if defined(MOE_BENCHMARK_EIGEN)
    {"eigen", true, [](const model_shape& s, std::string_view, bool backward) { return make_eigen_loop(s, backward); }},
#endif
#if defined(MOE_BENCHMARK_ONEDNN)
    {"onednn", false, [](const model_shape& s, std::string_view type, bool) { return make_onednn_loop(s, type); }},
#endif
    {nullptr, false, nullptr}};

}  // namespace

std::vector<std::string> peer_names(bool backward) {
  std::vector<std::string> names;
  for (const entry* e = entries; e->name != nullptr; ++e)
    if (e->trains || !backward) names.emplace_back(e->name);
  return names;
}

std::vector<std::unique_ptr<contestant>> peers_of(const model_shape& s, std::string_view type, bool backward) {
  std::vector<std::unique_ptr<contestant>> peers;
  for (const entry* e = entries; e->name != nullptr; ++e) {
    if (backward && !e->trains) continue;
    if (auto p = e->make(s, type, backward)) peers.push_back(std::move(p));
  }
  return peers;
}

}  // namespace bench
