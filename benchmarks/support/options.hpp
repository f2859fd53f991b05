// SPDX-License-Identifier: Apache-2.0
/// The command line.
#pragma once

#include <stdexcept>
#include <string>
#include <vector>

#include "support/shapes.hpp"

namespace bench {

struct usage_error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

/// Turns of an implementation, unless asked otherwise.
inline constexpr int usual_rounds = 15;

struct options {
  std::vector<model_shape> shapes;
  std::vector<dim> tokens;
  std::vector<weight_type> types;
  std::vector<int> threads;
  std::vector<double> skews;
  std::string json;         ///< empty: none
  std::string peer_list;    ///< empty: none
  double rotate = 1 << 30;  ///< bytes of other layers between two calls of one
  int rounds = usual_rounds;
  bool backward = false, fixed = false, help = false;
  std::vector<attention_shape> attention;  ///< instead of layers, where there is one
  attention_form form{};                   ///< `backward` as above
};

/// `types` are those that this program knows how to run. Throws usage_error, which names the flag, what came and what was
/// wanted.
options parse(int argc, char** argv, const std::vector<weight_type>& types, int cores);

extern const char* const usage;

}  // namespace bench
