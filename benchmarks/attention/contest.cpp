// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cmath>
#include <numeric>
#include <stdexcept>

#include "attention/attention.hpp"
#include "moe/core/dtype.hpp"
#include "moe/core/rng.hpp"

namespace bench {

double attention_case::dense_pairs() const {
  const double m = static_cast<double>(queries());
  return m * static_cast<double>(past()) + m * (m + 1) / 2;
}
double attention_case::pairs() const {
  if (!blocks()) return dense_pairs();
  dim sum = 0;
  for (dim at = past(); at < shape.n; ++at) sum += at % form.block + 1 + std::min(at / form.block, form.k - 1) * form.block;
  return static_cast<double>(sum);
}
double attention_case::cache_bytes() const {
  const double heads = static_cast<double>(2 * shape.n * shape.h_kv);  // of keys and of values; bytes have a scale each
  return heads * (static_cast<double>(shape.d) * type.bytes + (type.name == "int8" ? 4 : 0));
}
double attention_case::visited_bytes() const {
  const double readers = form.decode ? static_cast<double>(shape.h / shape.h_kv) : 1;  // each head reads blocks of its own
  return cache_bytes() * std::min(1., blocks() ? readers * pairs() / dense_pairs() : 1);
}
double attention_case::bytes() const {
  const double rows = static_cast<double>(queries() * shape.h * shape.d), logits = static_cast<double>(queries() * gate_columns());
  const double forward = (form.decode ? visited_bytes() : cache_bytes()) + rows * (type.bytes + 4) + logits * type.bytes;
  return form.backward ? forward + cache_bytes() / type.bytes * 4 + rows * 8 + logits * 4 : forward;
}

attention_source::attention_source(const attention_case& c) {
  const auto carve = [&](moe::arena& mem) {
    q = mem.matrix<float>("q", c.queries(), c.shape.h * c.shape.d);
    k = mem.matrix<float>("k", c.shape.n, c.shape.h_kv * c.shape.d);
    v = mem.matrix<float>("v", c.shape.n, c.shape.h_kv * c.shape.d);
    logits = mem.matrix<float>("logits", c.queries(), c.gate_columns());
  };
  moe::arena count;
  carve(count);
  memory = moe::buffer(count.used());
  moe::arena mem(memory.bytes());
  carve(mem);
  std::uint64_t tensor = 0;
  for (const matrix_view<float> m : {q, k, v, logits}) {
    const moe::rng random(3, ++tensor);
    for (dim i = 0; i < m.rows * m.cols; ++i)  // an eighth of the bits, which a half has too
      m.data[i] = static_cast<float>(moe::bf16(random.normal(static_cast<std::uint64_t>(i))));
  }
}

double attention_source::gate(const attention_case& c, dim t, dim a, dim i) const {
  if (!c.gated()) return 1;
  return 1 / (1 + std::exp(-static_cast<double>(logits(t, c.form.gate == attention_gate::headwise ? a : a * c.shape.d + i))));
}

std::vector<weight_type> attention_types(bool decode) {
  std::vector<weight_type> types;
  for (const weight_type& t : weight_types)
    if (t.name == "f32" || t.name == "bf16" || t.name == "f16" || (decode && t.name == "int8")) types.push_back(t);
  return types;
}

namespace {

/// The blocks of earlier keys that a query takes: the best means, the lower of two equals.
std::vector<dim> best_blocks(const attention_case& c, const attention_source& x, dim t, dim a) {
  const dim d = c.shape.d, own = (c.past() + t) / c.form.block, g = a / (c.shape.h / c.shape.h_kv);
  std::vector<std::pair<double, dim>> order;
  for (dim b = 0; b < own; ++b) {
    double sum = 0;
    for (dim j = b * c.form.block; j < (b + 1) * c.form.block; ++j)
      sum += std::inner_product(x.q.row(t) + a * d, x.q.row(t) + (a + 1) * d, x.k.row(j) + g * d, 0.);
    order.emplace_back(-sum, b);
  }
  std::sort(order.begin(), order.end());
  std::vector<dim> best;
  for (const auto& [score, b] : order)
    if (static_cast<dim>(best.size()) < c.form.k - 1) best.push_back(b);
  return best;
}
/// Output of query t under head a, by definition.
std::vector<double> defined_output(const attention_case& c, const attention_source& x, dim t, dim a) {
  const dim d = c.shape.d, at = c.past() + t, g = a / (c.shape.h / c.shape.h_kv);
  std::vector<double> o(static_cast<std::size_t>(d));
  double sum = 0;
  const auto add = [&](dim first, dim last) {
    for (dim j = first; j < last; ++j) {
      const float *q = x.q.row(t) + a * d, *k = x.k.row(j) + g * d, *v = x.v.row(j) + g * d;
      const double p = std::exp(std::inner_product(q, q + d, k, 0.) / std::sqrt(static_cast<double>(d)));
      sum += p;
      for (dim i = 0; i < d; ++i) o[static_cast<std::size_t>(i)] += p * v[i];
    }
  };
  if (c.blocks()) {
    for (const dim b : best_blocks(c, x, t, a)) add(b * c.form.block, (b + 1) * c.form.block);
    add(at / c.form.block * c.form.block, at + 1);
  } else {
    add(0, at + 1);
  }
  for (dim i = 0; i < d; ++i) o[static_cast<std::size_t>(i)] *= x.gate(c, t, a, i) / sum;
  return o;
}
/// Of a few rows of the output.
double relative_error(const attention_case& c, const attention_source& x, matrix_view<const float> o) {
  double error = 0, size = 0;
  for (const dim t : {dim{0}, c.queries() / 2, c.queries() - 1})
    for (const dim a : {dim{0}, c.shape.h - 1}) {
      const std::vector<double> wanted = defined_output(c, x, t, a);
      for (dim i = 0; i < c.shape.d; ++i) {
        const double w = wanted[static_cast<std::size_t>(i)], e = o(t, a * c.shape.d + i) - w;
        error += e * e;
        size += w * w;
      }
    }
  return std::sqrt(error / size);
}

struct entrant {
  std::unique_ptr<attention_contestant> who;
  std::size_t calls = 1, next = 0;  ///< of a turn, and the number of the next
  std::string disagreement{};
  turn_record turns{1};

  std::string left_out() const { return who->failure().empty() ? disagreement : who->failure(); }
};

class contest {
 public:
  contest(const attention_case& c, const std::vector<listed_peer>& listed) : case_(c), source_(std::make_shared<attention_source>(c)) {
    for (auto& form : c.form.decode ? library_decode(c, source_) : library_attention(c, source_)) entrants_.push_back({std::move(form)});
    own_ = entrants_.size();
    for (auto& peer : attention_peers(listed, c, source_)) entrants_.push_back({std::move(peer)});
  }
  attention_row measure(const machine_limits& limits, int rounds) {
    use_threads(limits.threads);
    for (entrant& e : entrants_) {
      warm_up(e, limits.threads);
      e.turns = turn_record(rounds);
    }
    const auto waits = [](const entrant& e) { return e.left_out().empty() && !e.turns.complete(); };
    while (std::any_of(entrants_.begin(), entrants_.end(), waits))
      for (std::size_t i = 0; i < entrants_.size(); ++i)
        if (entrant& e = entrants_[i]; waits(e))
          e.turns.take(limits.threads, i >= own_, [&] {
            e.next += e.calls;
            return e.who->seconds_of(e.next - e.calls, e.calls) / static_cast<double>(e.calls);
          });
    return result(limits);
  }

 private:
  /// A call to look at what it gives, one to know how long it takes.
  void warm_up(entrant& e, int threads) const {
    e.disagreement.clear();
    e.who->prepare(threads);
    std::vector<float> o(static_cast<std::size_t>(case_.queries() * case_.shape.h * case_.shape.d));
    const matrix_view<float> rows(o.data(), case_.queries(), case_.shape.h * case_.shape.d);
    if (e.who->run(rows) && e.left_out().empty()) {
      const double error = relative_error(case_, *source_, rows);
      constexpr double halves = 2e-2;  // a peer may add up in halves
      const double allowed = &e == &entrants_[0] ? case_.type.tolerance : std::max(case_.type.tolerance, halves);
      if (!(error <= allowed)) e.disagreement = "disagrees with the definition of attention: relative error " + std::to_string(error);
      if (!e.disagreement.empty() && &e == &entrants_[0]) throw std::runtime_error(e.who->name() + " " + e.disagreement);
    }
    if (e.left_out().empty()) e.calls = static_cast<std::size_t>(std::max(1l, std::lround(turn / e.who->seconds_of(e.next++, 1))));
  }
  attention_row result(const machine_limits& limits) const {
    const double by_memory = case_.bytes() / limits.dram_read, by_compute = case_.flops() / limits.peak(case_.form.decode ? unit::fma : case_.type.multiplies);
    attention_row r{case_, limits.threads, entrants_[0].turns.time(), std::max(by_memory, by_compute), by_memory >= by_compute, entrants_[0].turns.quiet(), {}, {}, {}};
    for (std::size_t i = 1; i < entrants_.size(); ++i) {
      const entrant& e = entrants_[i];
      if (!e.left_out().empty()) {
        r.left_out.push_back({e.who->name(), e.left_out()});
        continue;
      }
      if (i < own_) r.beside.push_back({e.who->name(), {}, 1 / e.turns.time()});
      else r.peers.push_back({e.who->name(), e.who->version(), static_cast<double>(case_.queries()) / e.turns.time()});
      r.quiet = r.quiet && e.turns.quiet();
    }
    return r;
  }

  attention_case case_;
  std::shared_ptr<const attention_source> source_;
  std::vector<entrant> entrants_;  // the library first
  std::size_t own_ = 0;            // entrants of the library
};

}  // namespace

double attention_row::ratio_to(const char* form) const {
  for (const peer_result& b : beside)
    if (b.name == form) return 1 / b.tokens_per_s / seconds;
  return 0;
}

void compete_attention(const attention_case& c, const options& o, const std::vector<listed_peer>& listed,
                       const std::function<const machine_limits&(int)>& of,
                       const std::function<void(const attention_row&)>& done) {
  contest all(c, listed);
  for (const int threads : o.threads) done(all.measure(of(threads), o.rounds));
}

}  // namespace bench
