// SPDX-License-Identifier: Apache-2.0
/// Values for weights of every type, where a model starts out with those of float32 alone.
#pragma once

#include "moe/expert/ffn.hpp"
#include "support/testing.hpp"

namespace testing {

/// Fills the tensors of bf16, and packs experts that are packed ones.
template <class L>
void fill_other_weights(model<L>& m) {
  const moe::rng random(17);
  for (const moe::slot& s : m.net.catalogue())
    if (s.type == moe::element::bf16)
      for (std::size_t i = s.offset / 2; i < (s.offset + s.bytes) / 2; ++i)
        m.params.template as<moe::bf16>()[i] = moe::bf16(random.normal(i) / std::sqrt(static_cast<float>(s.cols)));
  if constexpr (requires(moe::ffn_weights from) { m.net.experts().pack(from, m.net.sizes(), m.w.experts); }) {
    const moe::ffn_expert dense;
    std::vector<moe::slot> list;
    moe::arena count(list);
    (void)dense.make_weights(m.net.sizes(), count);
    const moe::buffer memory(moe::padded(count));
    randomise(list, memory.as<float>(), 18);
    moe::arena mem(memory.bytes());
    m.net.experts().pack(dense.make_weights(m.net.sizes(), mem), m.net.sizes(), m.w.experts);
  }
}

}  // namespace testing
