// SPDX-License-Identifier: Apache-2.0
#include "layers/layers.hpp"

#include <algorithm>

namespace bench {
namespace {

struct entry {
  std::string_view type;
  bool trains;
  std::unique_ptr<contestant> (*make)(const model_shape&, bool backward);
};
constexpr entry entries[] = {{"f32", true, make_f32},
                             {"bf16", true, make_bf16},
                             {"f16", false, make_f16},
                             {"int8", false, make_int8},
                             {"int4", false, make_int4},
                             {"ternary", false, make_ternary}};

}  // namespace

std::vector<weight_type> library_types(bool backward) {
  std::vector<weight_type> types;
  for (const weight_type& t : weight_types)
    if (std::any_of(std::begin(entries), std::end(entries),
                    [&](const entry& e) { return e.type == t.name && (e.trains || !backward); }))
      types.push_back(t);
  return types;
}

std::unique_ptr<contestant> library_layer_of(const model_shape& s, std::string_view type, bool backward) {
  const auto* e = std::find_if(std::begin(entries), std::end(entries), [&](const entry& x) { return x.type == type; });
  return e == std::end(entries) ? nullptr : e->make(s, backward);
}

}  // namespace bench
