// SPDX-License-Identifier: Apache-2.0
/// Whether attention has a sink: a first token that takes weight which queries have no better use for.
#pragma once

#include <algorithm>
#include <cmath>

#include "training.hpp"

namespace demo {

/// Over the queries of a text, and the heads of all blocks. Qiu et al. 2025, arXiv:2505.06708, section 4.3
struct attention_sink {
  double first_token = 0;   ///< mean weight of the first token of the sequence
  double uniform = 0;       ///< the same if each query weighed all tokens alike
  double largest = 0;       ///< |h| in the residual stream
  double gate = 0;          ///< mean value of the heads' gates, sigmoids of logits of their own; 0 without
  double bits = 0;          ///< per byte
};

/// The weight of key 0 for query t is exp(<q, k_0> / sqrt(d) - lse). Of attention with normalised heads.
template <class Block, class Context>
void add_block(const Block& block, const Context& c, std::span<const moe::idx> offsets, attention_sink& out) {
  const moe::attention_heads& heads = block.attention().heads();
  const auto& a = c.attention;
  const float scale = 1 / std::sqrt(static_cast<float>(heads.d));
  for (std::size_t s = 0; s + 1 < offsets.size(); ++s)
    for (moe::dim t = offsets[s]; t < offsets[s + 1]; ++t)
      for (moe::dim n = 0; n < heads.heads; ++n) {
        const float *q = a.q.row(t) + n * heads.d, *k = a.k_normed.row(offsets[s]) + heads.key_head(n) * heads.d;
        float product = 0;
        for (moe::dim j = 0; j < heads.d; ++j) product += q[j] * k[j];
        out.first_token += std::exp(double{product * scale - a.lse(t, n)}) / static_cast<double>(heads.heads);
        out.uniform += 1 / static_cast<double>((t - offsets[s] + 1) * heads.heads);
        if (a.logits) out.gate += double{moe::sigmoid{}(a.logits(t, n))} / static_cast<double>(heads.heads);
      }
}

template <class Block>
attention_sink measure_sink(const language_model_instance<Block>& m, const text& t, const recipe& r) {
  attention_sink out;
  double queries = 0;
  std::vector<batch> batches;
  const sampler at(t, static_cast<std::size_t>(r.length));
  for (moe::dim i = 0; i < r.validation; i += r.sequences)
    batches.push_back(walk(at, static_cast<std::size_t>(i), r.sequences));
  out.bits = bits_per_byte(m, t.bytes, batches, r, [&](const auto& ctx) {
    for (const auto& c : ctx.blocks) {
      add_block(m.net.block(), c, ctx.in.offsets, out);
      queries += static_cast<double>(ctx.in.tokens());
    }
    for (const auto& h : ctx.h)
      for (moe::dim i = 0; i < h.rows * h.cols; ++i) out.largest = std::max(out.largest, std::fabs(double{h.data[i]}));
  });
  out.first_token /= queries;
  out.uniform /= queries;
  out.gate /= queries;
  return out;
}

}  // namespace demo
