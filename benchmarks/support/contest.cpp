// SPDX-License-Identifier: Apache-2.0
#include "support/contest.hpp"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <stdexcept>

#include "layers/layers.hpp"
#include "moe/core/arena.hpp"
#include "moe/core/rng.hpp"
#include "peers/peers.hpp"
#include "peers/process_peer.hpp"
#include "support/measure.hpp"
#include "support/routing.hpp"

namespace bench {
namespace {

// Normal numbers of mean 0: a block of random ones over and over, of a length that no row is a multiple of.
void fill(std::span<float> to, float deviation, std::uint64_t seed) {
  constexpr std::size_t block = 65521;
  const moe::rng random(seed);
  for (std::size_t i = 0; i < to.size(); ++i) to[i] = i < block ? deviation * random.normal(i) : to[i - block];
}

// A layer in float32, with its memory.
struct owned_layer : layer_source {
  moe::buffer memory;
  owned_layer(const model_shape& s, std::uint64_t seed) {
    const auto carve = [&](moe::arena& mem) {
      router = mem.matrix<float>("router", s.experts, s.d);
      gate = mem.matrix<float>("gate", s.experts * s.f, s.d);
      up = mem.matrix<float>("up", s.experts * s.f, s.d);
      down = mem.matrix<float>("down", s.experts * s.d, s.f);
    };
    moe::arena count;
    carve(count);
    memory = moe::buffer(count.used());
    moe::arena mem(memory.bytes());
    carve(mem);
    std::uint64_t tensor = 0;
    for (const matrix_view<float> m : {router, gate, up, down})
      fill({m.data, static_cast<std::size_t>(m.rows * m.cols)}, 1 / std::sqrt(static_cast<float>(m.cols)), 4 * seed + tensor++);
  }
};

// The relative error of a row, at most, but for one row in so many. Rows that are zero in both do not count.
double relative_error(matrix_view<const float> y, matrix_view<const float> wanted, std::size_t but_one_in) {
  std::vector<double> errors;
  for (dim t = 0; t < y.rows; ++t) {
    double error = 0, size = 0;
    for (dim i = 0; i < y.cols; ++i) {
      const double w = wanted(t, i), e = y(t, i) - w;
      error += e * e;
      size += w * w;
    }
    if (error == 0 && size == 0) continue;
    errors.push_back(std::sqrt(error / size));
    if (!(errors.back() < 1e30)) return 1e30;
  }
  std::sort(errors.begin(), errors.end());
  const std::size_t n = errors.size();
  return n == 0 ? 0 : errors[n - 1 - n / but_one_in];
}
// Rounding may send a token on the edge between two experts to the other one: that spoils the row of the token, and of
// weights those of two experts.
constexpr std::size_t one_token_in = 100, one_expert_in = 4;
double relative_error(const layer_gradients& got, const layer_gradients& wanted) {
  double most = relative_error(got.x, wanted.x, one_token_in);
  for (const auto m : {&layer_gradients::gate, &layer_gradients::up, &layer_gradients::down})
    most = std::max(most, relative_error(got.*m, wanted.*m, one_expert_in));
  // Gradients of scores are differences between experts: of few tokens, nearly nothing may be left of them but rounding.
  if (got.x.rows >= 32) most = std::max(most, relative_error(got.router, wanted.router, one_expert_in));
  return most;
}

// Takes from Google Benchmark what a run took; prints nothing.
class collector : public benchmark::BenchmarkReporter {
 public:
  double seconds_per_call = 0;
  bool ReportContext(const Context&) override { return true; }
  void ReportRuns(const std::vector<Run>& runs) override {
    for (const Run& r : runs) seconds_per_call = r.real_accumulated_time / static_cast<double>(r.iterations);
  }
};

struct entrant {
  explicit entrant(std::unique_ptr<contestant> c) : who(std::move(c)) {}
  std::unique_ptr<contestant> who;
  long calls = 1;        // in a turn
  std::size_t next = 0;  // batch
  std::string disagreement;
  turn_record turns{1};

  std::string left_out() const { return who->failure().empty() ? disagreement : who->failure(); }
  bool competes() const { return left_out().empty(); }
};

class contest {
 public:
  contest(const model_shape& s, const weight_type& type, const options& o, const std::vector<listed_peer>& listed)
      : shape_(s), type_(type), options_(o) {
    entrants_.emplace_back(library_layer_of(s, type.name, o.backward));
    for (auto& p : peers_of(s, type.name, o.backward)) entrants_.emplace_back(std::move(p));
    if (o.backward)
      for (const listed_peer& p : listed) absent_.push_back({p.name, "does not train"});
    else
      for (auto& p : process_peers(listed, s, type.name, o.rotate)) entrants_.emplace_back(std::move(p));
    build_layers();
  }

  void run(const std::function<const machine_limits&(int)>& of, const std::function<void(const row&)>& done) {
    for (const double skew : options_.skews) {
      const std::vector<float> by_rank = popularity_bias(shape_.experts, shape_.k, skew);
      for (const dim T : options_.tokens) {
        make_batches(T, by_rank);
        for (const int threads : options_.threads) done(measure(T, skew, of(threads)));
      }
    }
  }

 private:
  void build_layers() {
    const auto wants = [&](const entrant& e) { return e.competes() && e.who->wants_layers(options_.rotate); };
    while (std::any_of(entrants_.begin(), entrants_.end(), wants)) {
      const auto w = std::make_shared<owned_layer>(shape_, routers_.size());
      moe::buffer router(static_cast<std::size_t>(w->router.rows * w->router.cols) * sizeof(float));
      std::copy_n(w->router.data, w->router.rows * w->router.cols, router.as<float>().data());
      routers_.push_back(std::move(router));
      if (wants(entrants_[0])) entrants_[0].who->take(w);
      // The library rounds by itself. Of the layer whose outputs are compared the others are handed what it rounded to, so that
      // outputs differ by no more than the rounding of activations.
      if (routers_.size() == 1) entrants_[0].who->read_back(*w);
      for (std::size_t i = 1; i < entrants_.size(); ++i)
        if (wants(entrants_[i])) entrants_[i].who->take(w);
    }
  }

  // As many calls as it takes that inputs come from memory too, and that the choice of experts is an average one; at least
  // one for every layer.
  void make_batches(dim T, std::span<const float> bias_by_rank) {
    const std::size_t layers = routers_.size(), wanted = T <= 128 ? 64 : 2, n = (wanted + layers - 1) / layers * layers;
    const std::size_t E = static_cast<std::size_t>(shape_.experts), size = static_cast<std::size_t>(T * shape_.d);
    inputs_ = moe::buffer(n * size * sizeof(float));
    result_ = moe::buffer(size * sizeof(float));
    fill(inputs_.as<float>(), 1, 1000003);
    biases_.assign(n * E, 0);
    batches_.clear();
    active_ = 0;
    for (std::size_t i = 0; i < n; ++i) {
      const std::span<float> bias(biases_.data() + i * E, E);
      shuffle(bias_by_rank, bias, i);
      batch b{.layer = static_cast<int>(i % layers),
              .x = {inputs_.as<float>().data() + i * size, T, shape_.d},
              .router = {routers_[i % layers].as<float>().data(), shape_.experts, shape_.d},
              .bias = bias, .expert = {}, .weight = {}};
      plan(b, shape_.k);
      active_ += static_cast<double>(active_experts(b)) / static_cast<double>(n);
      batches_.push_back(std::move(b));
    }
  }
  static void shuffle(std::span<const float> from, std::span<float> to, std::uint64_t seed) {
    std::copy(from.begin(), from.end(), to.begin());
    const moe::rng random(seed, 17);
    for (std::size_t i = to.size(); i > 1; --i) std::swap(to[i - 1], to[random(i) % i]);
  }

  row measure(dim T, double skew, const machine_limits& limits) {
    use_threads(limits.threads);
    warm_up(T, limits.threads);
    const auto waits = [](const entrant& e) { return e.competes() && !e.turns.complete(); };
    while (std::any_of(entrants_.begin(), entrants_.end(), waits))
      for (entrant& e : entrants_)
        if (waits(e)) e.turns.take(limits.threads, e.who->keeps_time(), [&] { return time_of_turn(e); });
    return result(T, skew, limits);
  }

  matrix_view<float> y() const { return {result_.as<float>().data(), batches_[0].x.rows, shape_.d}; }

  // One call to compare outputs and gradients, one to know how long it takes.
  void warm_up(dim T, int threads) {
    std::vector<std::vector<float>> outputs;
    for (entrant& e : entrants_) {
      e.turns = turn_record(options_.rounds);
      e.next = 0;
      e.disagreement.clear();
      e.who->prepare(batches_, threads);
      e.who->run(0, y());
      outputs.emplace_back(result_.as<float>().begin(), result_.as<float>().end());
    }
    // The reference is the float32 loop of Eigen where there is one.
    const std::size_t reference = entrants_.size() > 1 && entrants_[1].who->name() == "eigen" ? 1 : 0;
    for (std::size_t i = 0; i < entrants_.size(); ++i) {
      const double error = entrants_[i].competes() ? error_of(i, reference, outputs) : 0;
      if (error <= (i == 0 ? type_.tolerance : type_.peer_tolerance)) continue;
      entrants_[i].disagreement = "disagrees with " + entrants_[reference].who->name() + " on " + shape_.name +
                                  ", T = " + std::to_string(T) + ", " + std::string(type_.name) + ": relative error " +
                                  std::to_string(error);
      if (i == 0) throw std::runtime_error(entrants_[0].who->name() + " " + entrants_[0].disagreement);
    }
    for (entrant& e : entrants_) e.calls = std::max(1l, std::lround(turn / e.who->seconds_of(1 % batches_.size(), y())));
  }
  double error_of(std::size_t i, std::size_t reference, const std::vector<std::vector<float>>& outputs) const {
    const auto rows = [&](std::size_t n) { return matrix_view<const float>(outputs[n].data(), y().rows, y().cols); };
    const double error = relative_error(rows(i), rows(reference), one_token_in);
    if (!options_.backward) return error;
    return std::max(error, relative_error(entrants_[i].who->gradients(), entrants_[reference].who->gradients()));
  }

  // Seconds of a call: one run of Google Benchmark for each turn, so that turns go A B C A B C. (Its own repetitions would
  // go A A B B, or in random order.)
  double time_of_turn(entrant& e) {
    collector times;
    benchmark::ClearRegisteredBenchmarks();
    auto* b = benchmark::RegisterBenchmark(e.who->name().c_str(), [&](benchmark::State& state) {
      e.who->repeat(state, e.next, batches_.size(), y());
      e.next += static_cast<std::size_t>(state.iterations());
    });
    b->Iterations(e.calls);
    if (e.who->keeps_time()) b->UseManualTime();
    else b->UseRealTime();
    benchmark::RunSpecifiedBenchmarks(&times);
    return times.seconds_per_call;
  }

  row result(dim T, double skew, const machine_limits& limits) const {
    const double tokens = static_cast<double>(T), time = entrants_[0].turns.time(), router = 4 * shape_.router_weights();
    const double weights = active_ * shape_.expert_weights() * type_.bytes + router;
    const double gradients = static_cast<double>(shape_.experts) * shape_.expert_weights() * 4 + router;
    const double rows = 4 * tokens * static_cast<double>(shape_.d);
    const double moved = options_.backward ? 2 * weights + gradients + 4 * rows : weights + 2 * rows;
    const double flops = shape_.flops(T) * (options_.backward ? 3 : 1);
    const double by_memory = moved / limits.dram_read, by_compute = flops / limits.peak(type_.multiplies);
    row r{shape_, type_, T, limits.threads, skew, options_.backward, tokens / time, flops / time,
          (options_.backward ? 2 : 1) * weights / time, tokens / std::max(by_memory, by_compute), by_memory >= by_compute,
          entrants_[0].turns.quiet(), {}};
    r.left_out = absent_;
    for (std::size_t i = 1; i < entrants_.size(); ++i) {
      const entrant& e = entrants_[i];
      if (!e.competes()) {
        r.left_out.push_back({e.who->name(), e.left_out()});
        continue;
      }
      r.peers.push_back({e.who->name(), e.who->version(), tokens / e.turns.time()});
      r.quiet = r.quiet && e.turns.quiet();
    }
    return r;
  }

  model_shape shape_;
  weight_type type_;
  const options& options_;
  std::vector<entrant> entrants_;     // the library first, then the reference
  std::vector<absent_peer> absent_;   // who has nothing to run here
  std::vector<moe::buffer> routers_;  // of every layer
  moe::buffer inputs_, result_;
  std::vector<float> biases_;
  std::vector<batch> batches_;
  double active_ = 0;  // experts that a call uses, on average
};

}  // namespace

void compete(const model_shape& s, const weight_type& type, const options& o, const std::vector<listed_peer>& listed,
             const std::function<const machine_limits&(int)>& of, const std::function<void(const row&)>& done) {
  contest(s, type, o, listed).run(of, done);
}

}  // namespace bench
