// SPDX-License-Identifier: Apache-2.0
/// Training and evaluation of a language model.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "model.hpp"
#include "moe/train/clip.hpp"
#include "moe/train/initialise.hpp"
#include "moe/train/optimizer.hpp"
#include "moe/train/schedule.hpp"
#include "progress.hpp"
#include "text.hpp"

namespace demo {

static_assert(text::margin >= window_embedding::reach, "every byte of a text needs what the model reads before it");

/// How a model is trained. Both models of the demonstration are trained alike.
struct recipe {
  moe::dim steps, tokens;  ///< tokens of one step
  moe::dim validation;     ///< tokens of an evaluation on the way
  float rate = 5e-3f;
  std::uint64_t seed = 1;

  moe::dim interval() const noexcept { return steps < 24 ? 1 : steps / 24; }  ///< steps between evaluations
};

/// Bits per byte against millions of bytes read.
struct learning_curve {
  std::vector<std::pair<double, double>> train, valid;
};

/// A model with its weights in one flat buffer.
template <class Block>
struct language_model_instance {
  language_model<Block> net;
  moe::buffer params;
  typename language_model<Block>::weights w;

  explicit language_model_instance(const language_model<Block>& model) : net(model), params(net.weight_bytes()) {
    moe::arena mem(params.bytes());
    w = net.make_weights(mem);
  }
  void initialise(std::uint64_t seed) {
    moe::initialise(net.block().backend().executor(), params.bytes(), net.catalogue(), moe::rng(seed));
  }
};

/// Mean bits per byte over positions of a text, `tokens` at a time; `after(context)` sees each batch.
template <class Block, class After>
double bits_per_byte(const language_model_instance<Block>& m, std::span<const std::uint8_t> text,
                     std::span<const moe::idx> positions, moe::dim tokens, After after) {
  moe::buffer work(m.net.work_bytes(tokens));
  double total = 0;
  for (std::size_t first = 0; first < positions.size(); first += static_cast<std::size_t>(tokens)) {
    const auto batch = positions.subspan(first, std::min(static_cast<std::size_t>(tokens), positions.size() - first));
    moe::arena mem(work.bytes());
    auto ctx = m.net.make_context({text, batch}, mem);
    total += m.net.forward(m.w, ctx, mem) * static_cast<double>(batch.size());
    after(ctx);
  }
  return total / static_cast<double>(positions.size());
}

/// The first `n` positions of a walk, from position `from` of it.
inline std::vector<moe::idx> walk(const sampler& at, std::size_t from, moe::dim n) {
  std::vector<moe::idx> positions;
  for (std::size_t i = 0; i < static_cast<std::size_t>(n); ++i) positions.push_back(static_cast<moe::idx>(at(from + i)));
  return positions;
}

/// AdamW with warm-up, cosine decay and clipping, over `steps` batches of a walk through the text.
template <class Block>
learning_curve train(language_model_instance<Block>& m, const std::string& name, const recipe& r, const text& train_text,
                     const text& valid_text) {
  const auto& executor = m.net.block().backend().executor();
  const std::span<float> w = m.params.template as<float>();
  const auto n = static_cast<moe::dim>(w.size());
  const moe::adamw optimizer{.beta2 = 0.99f, .decay = 0.01f};
  const moe::warmup_cosine rate{.peak = r.rate, .floor = r.rate / 20, .warmup = r.steps / 20, .steps = r.steps};

  moe::buffer grads(m.params.size()), moments(optimizer.state_bytes(n)), work(m.net.work_bytes(r.tokens));
  moe::arena grad_mem(grads.bytes()), moment_mem(moments.bytes());
  auto dw = m.net.make_gradients(grad_mem);
  const auto state = optimizer.make_state(n, moment_mem);

  const sampler at(train_text), valid_at(valid_text);
  const auto valid = walk(valid_at, 0, r.validation);
  learning_curve curve;
  progress bar(name, r.steps, r.tokens);
  double recent = 8;
  for (moe::dim step = 0; step < r.steps; ++step) {
    const auto positions = walk(at, static_cast<std::size_t>(step * r.tokens), r.tokens);
    moe::arena mem(work.bytes());
    auto ctx = m.net.make_context({train_text.bytes, positions}, mem);
    const double bits = m.net.forward(m.w, ctx, mem);
    std::fill_n(grads.as<float>().data(), n, 0.f);
    m.net.backward(m.w, ctx, dw, mem);
    const double norm = moe::global_norm(executor, grads.as<const float>());
    optimizer.step(executor, {.rate = rate(step), .step = step, .scale = moe::clip_factor(norm, 1.f)}, w, grads.as<const float>(),
                   state);

    const double read = static_cast<double>((step + 1) * r.tokens) * 1e-6;
    recent += (bits - recent) * (step < 20 ? 0.5 : 0.05);
    curve.train.emplace_back(read, recent);
    if ((step + 1) % r.interval() == 0)
      curve.valid.emplace_back(read, bits_per_byte(m, valid_text.bytes, valid, r.tokens, [](const auto&) {}));
    bar.step(step + 1, recent);
  }
  return curve;
}

}  // namespace demo
