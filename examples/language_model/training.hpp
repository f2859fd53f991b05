// SPDX-License-Identifier: Apache-2.0
/// Training and evaluation of a language model.
#pragma once

#include <algorithm>
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

/// How a model is trained. All models of the demonstration are trained alike.
struct recipe {
  moe::dim steps;
  moe::dim length, sequences;  ///< of a step: bytes of a sequence, and how many of them
  moe::dim validation;         ///< sequences of an evaluation on the way
  float rate = 5e-3f;
  std::uint64_t seed = 1;

  moe::dim tokens() const noexcept { return length * sequences; }
  moe::dim interval() const noexcept { return steps < 24 ? 1 : steps / 24; }  ///< steps between evaluations
};

/// Bits per byte against millions of bytes read.
struct learning_curve {
  std::vector<std::pair<double, double>> train, valid;
};

/// Sequences of tokens: where in the text each predicts a byte, and where sequences begin.
struct batch {
  std::vector<moe::idx> position, offsets{0};

  void add(std::size_t first, std::size_t length) {
    for (std::size_t i = 0; i < length; ++i) position.push_back(static_cast<moe::idx>(first + i));
    offsets.push_back(static_cast<moe::idx>(position.size()));
  }
  windows of(std::span<const std::uint8_t> text) const noexcept { return {text, position, offsets}; }
};

/// `n` sequences of a walk, from the `from`-th of it.
inline batch walk(const sampler& at, std::size_t from, moe::dim n) {
  batch b;
  for (std::size_t i = 0; i < static_cast<std::size_t>(n); ++i) b.add(at(from + i), at.length());
  return b;
}
/// Bytes first .. last of a text, in sequences of `length` and, at the end, what is left.
inline std::vector<batch> all_of(std::size_t first, std::size_t last, const recipe& r) {
  std::vector<batch> out;
  while (first < last) {
    batch& b = out.emplace_back();
    for (moe::dim s = 0; s < r.sequences && first < last; ++s) {
      const std::size_t n = std::min(static_cast<std::size_t>(r.length), last - first);
      b.add(first, n);
      first += n;
    }
  }
  return out;
}

/// A model with its weights in one flat buffer, and the angles of `length` positions.
template <class Block>
struct language_model_instance {
  language_model<Block> net;
  moe::dim length;
  moe::buffer params, angle_memory;
  typename language_model<Block>::weights w;
  typename language_model<Block>::table angles;

  language_model_instance(const language_model<Block>& model, moe::dim positions)
      : net(model), length(positions), params(net.weight_bytes()), angle_memory(angle_bytes(net, positions)) {
    moe::arena mem(params.bytes()), angle_mem(angle_memory.bytes());
    w = net.make_weights(mem);
    angles = net.block().make_table(positions, angle_mem);
  }
  /// What a block adds starts at nothing: the last product of each of its paths is zero.
  void initialise(std::uint64_t seed) {
    auto catalogue = net.catalogue();
    for (moe::slot& s : catalogue)
      if (s.name.ends_with("attention.o") || s.name.ends_with("experts.down")) s.start = moe::initial::zeros;
    moe::initialise(net.block().backend().executor(), params.bytes(), catalogue, moe::rng(seed));
  }
  auto make_context(const windows& in, moe::arena& mem) const { return net.make_context(in, angles, mem); }

 private:
  static std::size_t angle_bytes(const language_model<Block>& net, moe::dim positions) {
    moe::arena count;
    (void)net.block().make_table(positions, count);
    return padded(count);
  }
};

/// Mean bits per byte over batches of a text of at most r.tokens() each; `after(context)` sees each.
template <class Block, class After>
double bits_per_byte(const language_model_instance<Block>& m, std::span<const std::uint8_t> text,
                     std::span<const batch> batches, const recipe& r, After after) {
  moe::buffer work(m.net.work_bytes(r.tokens(), r.sequences));
  double total = 0, bytes = 0;
  for (const batch& b : batches) {
    moe::arena mem(work.bytes());
    auto ctx = m.make_context(b.of(text), mem);
    total += m.net.forward(m.w, ctx, mem) * static_cast<double>(b.position.size());
    bytes += static_cast<double>(b.position.size());
    after(ctx);
  }
  return total / bytes;
}

/// AdamW with warm-up, cosine decay and clipping, over r.steps batches of a walk through the text.
template <class Block>
learning_curve train(language_model_instance<Block>& m, const std::string& name, const recipe& r, const text& train_text,
                     const text& valid_text) {
  const auto& executor = m.net.block().backend().executor();
  const std::span<float> w = m.params.template as<float>();
  const auto n = static_cast<moe::dim>(w.size());
  const moe::adamw optimizer{.beta2 = 0.99f, .decay = 0.01f};
  const moe::warmup_cosine rate{.peak = r.rate, .floor = r.rate / 20, .warmup = r.steps / 20, .steps = r.steps};

  moe::buffer grads(m.params.size()), moments(optimizer.state_bytes(n)), work(m.net.work_bytes(r.tokens(), r.sequences));
  moe::arena grad_mem(grads.bytes()), moment_mem(moments.bytes());
  auto dw = m.net.make_gradients(grad_mem);
  const auto state = optimizer.make_state(n, moment_mem);

  const auto length = static_cast<std::size_t>(r.length);
  const sampler at(train_text, length);
  std::vector<batch> valid;
  for (moe::dim i = 0; i < r.validation; i += r.sequences)
    valid.push_back(walk(sampler(valid_text, length), static_cast<std::size_t>(i), std::min(r.sequences, r.validation - i)));
  learning_curve curve;
  progress bar(name, r.steps, r.tokens());
  double recent = 8;
  for (moe::dim step = 0; step < r.steps; ++step) {
    const batch b = walk(at, static_cast<std::size_t>(step * r.sequences), r.sequences);
    moe::arena mem(work.bytes());
    auto ctx = m.make_context(b.of(train_text.bytes), mem);
    const double bits = m.net.forward(m.w, ctx, mem);
    m.net.backward(m.w, ctx, dw, mem);
    const double norm = moe::global_norm(executor, grads.as<const float>());
    optimizer.step(executor, {.rate = rate(step), .step = step, .scale = moe::clip_factor(norm, 1.f)}, w,
                   grads.as<const float>(), state);

    const double read = static_cast<double>((step + 1) * r.tokens()) * 1e-6;
    recent += (bits - recent) * (step < 20 ? 0.5 : 0.05);
    curve.train.emplace_back(read, recent);
    if ((step + 1) % r.interval() == 0)
      curve.valid.emplace_back(read, bits_per_byte(m, valid_text.bytes, valid, r, [](const auto&) {}));
    bar.step(step + 1, recent);
  }
  return curve;
}

}  // namespace demo
