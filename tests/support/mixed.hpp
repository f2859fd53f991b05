// SPDX-License-Identifier: Apache-2.0
/// Layers with weights of bf16, their float32 masters, and tiles where the machine has none.
#pragma once

#include "moe/backend/cpu.hpp"
#include "moe/combine/weighted_sum.hpp"
#include "moe/expert/ffn.hpp"
#include "moe/gate/linear.hpp"
#include "moe/router/top_k.hpp"
#include "moe/train/mixed.hpp"
#include "support/emulated_amx.hpp"
#include "support/reference.hpp"
#include "support/testing.hpp"

namespace testing {

template <int K, class B, class Expert = moe::bf16_ffn_expert>
using bf16_layer = moe::layer<moe::linear_gate, moe::top_k<K>, Expert, moe::weighted_sum, B>;

/// As `model`, with masters that the weights are rounded from.
template <class L>
struct mixed_model : model<L> {
  std::vector<moe::slot> names;
  std::vector<float> masters;
  moe::weight_copy copy;

  mixed_model(const L& layer, dim T, dim width, std::uint64_t seed)
      : model<L>(layer, T, width, seed),
        names(layer.gradient_catalogue()),
        masters(layer.gradient_bytes() / sizeof(float)),
        copy(names, layer.catalogue(), this->params.bytes()) {
    randomise(names, masters, seed + 2);
    copy.write(masters);
  }
  /// What the layer reads, as floats, where the masters are.
  std::vector<float> rounded() const {
    std::vector<float> v = masters;
    const auto types = this->net.catalogue();
    for (std::size_t i = 0; i < names.size(); ++i)
      for (std::size_t j = names[i].offset / 4; j < (names[i].offset + names[i].bytes) / 4; ++j)
        if (types[i].type == moe::element::bf16) v[j] = static_cast<float>(moe::bf16(v[j]));
    return v;
  }
};

}  // namespace testing
