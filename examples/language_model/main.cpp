// SPDX-License-Identifier: Apache-2.0
// A byte-level transformer in three languages, most of whose weights are used by few bytes: tables of runs of bytes,
// chosen by a hash, and in every block a Mixture-of-Experts layer behind gated attention. Beside it one that does the same
// work for every byte with all of its weights. What must hold stands at the end of `demonstrate`, and the exit status says
// whether it did.
//
//   language_model [--quick] [FOLDER]      pictures, checkpoint and text go to FOLDER (default: demo-output)
#include <chrono>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <string>
#include <string_view>

#include "attention_sink.hpp"
#include "generate.hpp"
#include "moe/backend/cpu.hpp"
#include "moe/backend/executor/thread_pool.hpp"
#include "moe/io/safetensors.hpp"
#include "moe/loss/load_balance.hpp"
#include "moe/moe.hpp"
#include "report.hpp"

namespace {

using moe::dim;
constexpr int k = 2;
using backend = moe::cpu<moe::arch::native, moe::pool_executor>;
using mixture = moe::layer<moe::linear_gate, moe::with_loss<moe::top_k<k>, moe::load_balance>, moe::ffn_expert,
                           moe::weighted_sum, backend>;
using dense = moe::dense<moe::ffn_expert, backend>;
constexpr mixture::router_type router{.loss = {.coefficient = 0.003f}};

// [block]
struct plain_attention : moe::attention_features {
  using rotary = moe::rotary<>;
  static constexpr bool normalises_heads = true;
};
struct gated_attention : plain_attention {
  using output_gate = moe::output_gate<moe::headwise>;
};
struct gated_blocks : gated_attention {
  using selection = moe::block_attention;
};
/// What the models attend with. -DLANGUAGE_MODEL_ATTENTION=gated_blocks: Mixture of Block Attention.
#if !defined(LANGUAGE_MODEL_ATTENTION)
#define LANGUAGE_MODEL_ATTENTION gated_attention
#endif
using features = LANGUAGE_MODEL_ATTENTION;

template <class Features, class Layer>
using block = moe::transformer_block<moe::self_attention<Features, backend>, Layer>;
// [/block]
template <class Features, class Layer>
using instance = demo::language_model_instance<block<Features, Layer>>;

struct settings {
  std::size_t bytes_per_language;
  dim blocks;
  demo::window_embedding embedding;
  moe::attention_heads heads;
  moe::block_attention key_blocks;  ///< where they are chosen
  moe::shape layer;
  demo::recipe training;
  dim sink_steps;  ///< of the two short trainings that show what the gate does

  /// Of models without tables of runs.
  demo::window_embedding plain_embedding() const { return {.window = embedding.window, .longest = 1}; }
  /// One expert of a hidden width at which a dense layer does at least the work of k experts and the gate.
  moe::shape dense_layer() const {
    return {.tokens = layer.tokens, .d = layer.d, .f = (k * layer.f + layer.experts / 3 + 7) / 8 * 8, .experts = 1};
  }
};
constexpr settings full{.bytes_per_language = 1'300'000, .blocks = 2,
                        .embedding = {.window = 8, .longest = 4, .hashes = 8192},
                        .heads = {.heads = 2, .kv_heads = 1, .d = 32, .dv = 32}, .key_blocks = {.block = 16, .k = 3},
                        .layer = {.tokens = 1024, .d = 128, .f = 128, .experts = 8},
                        .training = {.steps = 1400, .length = 128, .sequences = 8, .validation = 32}, .sink_steps = 200};
// The same program on a crumb of text: what it computes is checked, how well it learns is not.
constexpr settings quick{.bytes_per_language = 60'000, .blocks = 2, .embedding = {.window = 8, .longest = 4, .hashes = 256},
                         .heads = {.heads = 2, .kv_heads = 1, .d = 16, .dv = 16}, .key_blocks = {.block = 16, .k = 3},
                         .layer = {.tokens = 256, .d = 32, .f = 32, .experts = 8},
                         .training = {.steps = 24, .length = 64, .sequences = 4, .validation = 8}, .sink_steps = 12};

/// Validation bits per byte by which the mixture must beat the dense model. Measured: 0.256. The tables do most of it in so
/// short a training: where the dense model has them too, the experts alone are better by 0.015, and by 0.075 where the
/// tables hold runs of two bytes only.
constexpr double margin = 0.1;

template <class Features, class Layer>
instance<Features, Layer> make_model(const settings& s, const demo::window_embedding& embedding, const Layer& layer) {
  const moe::self_attention<Features, backend> attention(s.layer.d, s.heads, s.key_blocks, layer.backend());
  instance<Features, Layer> m({s.blocks, embedding, block<Features, Layer>(attention, layer)}, s.training.length);
  m.initialise(s.training.seed);
  return m;
}

/// Thousands of multiplications of one token on its way through the model; attention to half a sequence.
double work(const settings& s, dim experts, dim active_width) {
  const dim d = s.layer.d, q = s.heads.query_cols(), kv = s.heads.key_cols() + s.heads.value_cols();
  const dim attention = d * (2 * q + kv + s.heads.heads) + s.training.length / 2 * 2 * q;
  return static_cast<double>(s.blocks * (attention + 3 * d * active_width + experts * d) + 256 * d) * 1e-3;
}
template <class Model>
double million_weights(const Model& m) {
  return static_cast<double>(m.params.size() / sizeof(float)) * 1e-6;
}

void write_file(const std::filesystem::path& path, const std::string& content) {
  std::ofstream file(path, std::ios::binary);
  file << content;
  if (!file.flush()) throw std::runtime_error("cannot write " + path.string());
}

template <class Model>
void save(const Model& m, const std::string& path) {
  moe::save(path, {{"", m.net.catalogue(), m.params.bytes()}},
            {{"description", "byte-level language model of examples/language_model"}});
}

/// Whether a model read from the file gives the same logits as `m`, bit for bit.
template <class Model>
bool reloads_exactly(const Model& m, const std::string& path, const demo::text& text) {
  Model again(m.net, m.length);
  moe::load(path, {{"", again.net.catalogue(), again.params.bytes()}});
  const demo::batch b = demo::walk(demo::sampler(text, 64), 0, 4);
  std::vector<float> logits[2];
  for (const Model* one : {&m, &std::as_const(again)}) {
    moe::buffer work(one->net.work_bytes(256, 4));
    moe::arena mem(work.bytes());
    auto ctx = one->make_context(b.of(text.bytes), mem);
    one->net.forward(one->w, ctx, mem);
    logits[one == &again].assign(ctx.logits.data, ctx.logits.data + 256 * 256);
  }
  return std::memcmp(logits[0].data(), logits[1].data(), sizeof(float) * 256 * 256) == 0;
}

/// Two short trainings from one seed, without the gate on attention and with it; and what the mixture came to.
template <class Model>
void compare_sinks(const settings& s, const Model& trained, const demo::corpus& text) {
  const auto& layer = trained.net.block().layer();
  demo::recipe r = s.training;
  r.steps = s.sink_steps;
  auto plain = make_model<plain_attention>(s, s.plain_embedding(), layer);
  auto gated = make_model<gated_attention>(s, s.plain_embedding(), layer);
  demo::train(plain, "no gate", r, text.train, text.valid);
  demo::train(gated, "gate", r, text.train, text.valid);
  std::printf("\nattention                 steps   bits per byte   weight of the first token   largest activation   mean gate\n");
  const auto row = [&](const char* name, dim steps, const auto& model) {
    const demo::attention_sink a = demo::measure_sink(model, text.valid, r);
    std::printf("  %-20s %8td %15.3f %13.3f (even: %.3f) %20.1f", name, steps, a.bits, a.first_token, a.uniform, a.largest);
    if (a.gate > 0) std::printf(" %11.3f", a.gate);
    std::printf("\n");
  };
  row("without gate", r.steps, plain);
  row("with gate", r.steps, gated);
  if constexpr (!features::selection::blocks) row("the mixture above", s.training.steps, trained);
}

void print_table(const demo::evaluation& m, const demo::evaluation& d) {
  std::printf("\nbits per byte, validation   ");
  for (const char* language : demo::corpus::languages) std::printf("%9s", language);
  std::printf("      all\n");
  for (const auto& [name, e] : {std::pair{"mixture of experts", &m}, std::pair{"dense, equal work", &d}}) {
    std::printf("  %-26s", name);
    for (const double bits : e->bits) std::printf("%9.3f", bits);
    std::printf("%9.3f\n", e->all);
  }
}

int demonstrate(const settings& s, bool is_quick, const std::filesystem::path& folder) {
  std::filesystem::create_directories(folder);
  const demo::corpus text = demo::load_corpus(s.bytes_per_language);
  const moe::thread_pool threads;
  const backend on{moe::pool_executor(threads)};
  auto moe_model = make_model<features>(s, s.embedding, mixture(s.layer, router, on));
  auto dense_model = make_model<features>(s, s.plain_embedding(), dense(s.dense_layer(), {}, on));
  std::printf("Text: %.1f million bytes of English (King James Bible), French and German (manual pages)\n"
              "mixture: tables of %td runs; %td blocks, %td experts, %d for each byte; %.2f million weights, "
              "%.0f thousand multiplications a byte\n"
              "dense:   %td blocks, hidden width %td;       %.2f million weights, %.0f thousand multiplications a byte\n\n",
              static_cast<double>(text.train.bytes.size()) * 1e-6,
              (s.embedding.longest - 1) * s.embedding.hashes, s.blocks, s.layer.experts, k, million_weights(moe_model),
              work(s, s.layer.experts, k * s.layer.f), s.blocks, s.dense_layer().f, million_weights(dense_model),
              work(s, 0, s.dense_layer().f));

  const auto moe_curve = demo::train(moe_model, "mixture", s.training, text.train, text.valid);
  const auto dense_curve = demo::train(dense_model, "dense", s.training, text.train, text.valid);
  const auto moe_result = demo::evaluate(moe_model, text.valid, s.training);
  const auto dense_result = demo::evaluate(dense_model, text.valid, s.training);
  print_table(moe_result, dense_result);

  const std::string checkpoint = (folder / "mixture.safetensors").string();
  save(moe_model, checkpoint);
  const bool same = reloads_exactly(moe_model, checkpoint, text.valid);
  const std::size_t length = is_quick ? 40 : 240;
  const auto start = std::chrono::steady_clock::now();
  const std::string written = demo::continue_texts(moe_model, text.valid, length);
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
  std::printf("\nWhere a text it has not seen ends (|), the mixture goes on, at %.0f bytes a second:\n\n%s",
              static_cast<double>(3 * length) / seconds.count(), written.c_str());
  compare_sinks(s, moe_model, text);
  write_file(folder / "text.txt", written);
  write_file(folder / "loss.svg", demo::draw_loss(moe_curve, dense_curve));
  write_file(folder / "experts.svg", demo::draw_experts(moe_result));
  std::printf("\nIn %s: loss.svg, experts.svg, mixture.safetensors, text.txt\n\n",
              std::filesystem::absolute(folder).string().c_str());

  // What must hold.
  const double gain = dense_result.all - moe_result.all;
  const bool learned = moe_curve.valid.back().second < moe_curve.valid.front().second &&
                       dense_curve.valid.back().second < dense_curve.valid.front().second;
  const bool better = is_quick || gain >= margin;
  std::printf("%s: the model read back from its checkpoint gives %s logits\n", same ? "pass" : "FAIL",
              same ? "bit-identical" : "different");
  std::printf("%s: the loss of both models %s\n", learned ? "pass" : "FAIL", learned ? "fell" : "did not fall");
  if (is_quick) std::printf("not asserted in a quick run: the mixture's margin over the dense model (here %+.3f)\n", gain);
  else std::printf("%s: the mixture is better by %.3f bits per byte, wanted %.3f\n", better ? "pass" : "FAIL", gain, margin);
  return same && learned && better ? 0 : 1;
}

}  // namespace

int main(int argc, char** argv) try {
  bool is_quick = false;
  std::filesystem::path folder = "demo-output";
  for (int i = 1; i < argc; ++i) {
    const std::string_view argument = argv[i];
    if (argument == "--quick") is_quick = true;
    else if (argument.starts_with('-')) return std::fputs("usage: language_model [--quick] [FOLDER]\n", stderr), 2;
    else folder = argument;
  }
  return demonstrate(is_quick ? quick : full, is_quick, folder);
} catch (const demo::missing_corpus& e) {
  std::fprintf(stderr, "language_model: %s\n", e.what());
  return 77;  // what test drivers take for "skipped"
} catch (const std::exception& e) {
  std::fprintf(stderr, "language_model: %s\n", e.what());
  return 1;
}
