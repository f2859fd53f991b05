// SPDX-License-Identifier: Apache-2.0
/// Attention beside its peers, beside forms of itself, and the limits of the machine.
#pragma once

#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "moe/core/arena.hpp"
#include "peers/peer_list.hpp"
#include "support/measure.hpp"
#include "support/options.hpp"
#include "support/report.hpp"

namespace bench {

using moe::matrix_view;

/// What one row is about.
struct attention_case {
  attention_shape shape;
  weight_type type;
  attention_form form;
  double rotate;  ///< bytes of caches that decoding goes round

  bool blocks() const { return form.block > 0; }
  bool gated() const { return form.gate != attention_gate::none; }
  /// Logits of a query's gate.
  dim gate_columns() const { return gated() ? shape.h * (form.gate == attention_gate::elementwise ? shape.d : 1) : 0; }
  dim queries() const { return form.decode ? 1 : shape.m; }
  dim past() const { return shape.n - queries(); }  ///< keys before the first query's own
  /// Pairs of a query and a key that it sees, under one head: of a causal mask, and of what is visited.
  double dense_pairs() const;
  double pairs() const;
  double flops() const { return 4 * pairs() * static_cast<double>(shape.h * shape.d) * (form.backward ? 2.5 : 1); }
  /// Keys and values as they lie in memory, of all heads; what is visited of them; and all that is read and written once.
  double cache_bytes() const;
  double visited_bytes() const;
  double bytes() const;
};

/// Numbers that every type of element but bytes holds exactly: q[m,h*d], k[n,h_kv*d], v[n,h_kv*d] and the logits of the gate.
struct attention_source {
  matrix_view<float> q, k, v, logits;
  moe::buffer memory;

  explicit attention_source(const attention_case& c);
  /// What the gate multiplies channel i of query t under head a by.
  double gate(const attention_case& c, dim t, dim a, dim i) const;
};

/// One way to compute it. It is prepared for a number of threads, and then called.
class attention_contestant {
 public:
  explicit attention_contestant(std::string name) : name_(std::move(name)) {}
  attention_contestant(const attention_contestant&) = delete;
  attention_contestant& operator=(const attention_contestant&) = delete;
  virtual ~attention_contestant() = default;

  const std::string& name() const { return name_; }
  virtual std::string failure() const { return {}; }
  virtual std::string version() const { return {}; }
  virtual void prepare(int threads) = 0;
  /// o[m,h*d] of one call; false where it gives something else than the case asks for.
  virtual bool run(matrix_view<float> o) = 0;
  /// What so many calls take, the first of them number `first`.
  virtual double seconds_of(std::size_t first, std::size_t calls) {
    const double start = seconds();
    for (std::size_t i = 0; i < calls; ++i) call(first + i);
    return seconds() - start;
  }

 protected:
  virtual void call(std::size_t) {}

 private:
  std::string name_;
};

/// The library: the form that was asked for, then what it is compared with, `dense`, `routed`, `forward` or `ungated`.
std::vector<std::unique_ptr<attention_contestant>> library_attention(const attention_case& c,
                                                                     std::shared_ptr<const attention_source> source);
std::vector<std::unique_ptr<attention_contestant>> library_decode(const attention_case& c,
                                                                  std::shared_ptr<const attention_source> source);
/// Peers of plain forward and decoding.
std::vector<std::unique_ptr<attention_contestant>> attention_peers(const std::vector<listed_peer>& listed, const attention_case& c,
                                                                   std::shared_ptr<const attention_source> source);

/// Types of elements that the library has.
std::vector<weight_type> attention_types(bool decode);

struct attention_row {
  attention_case of;
  int threads;
  double seconds, roof_seconds;  ///< of a call
  bool memory_bound, quiet;
  std::vector<peer_result> beside;  ///< the library's other forms, calls per second
  std::vector<peer_result> peers;   ///< tokens per second
  std::vector<absent_peer> left_out;

  double tokens_per_s() const { return static_cast<double>(of.queries()) / seconds; }
  double share() const { return roof_seconds / seconds; }
  /// Seconds of that form over those of this one; 0 where it did not run.
  double ratio_to(const char* form) const;
};

/// Every row of one case. Throws std::runtime_error where the library's output is not what attention is.
void compete_attention(const attention_case& c, const options& o, const std::vector<listed_peer>& listed,
                       const std::function<const machine_limits&(int)>& of,
                       const std::function<void(const attention_row&)>& done);

class attention_table {
 public:
  explicit attention_table(std::vector<std::string> peers) : peers_(std::move(peers)) {}
  void heading() const;
  void add(const attention_row& r) const;

 private:
  std::vector<std::string> peers_;
};
std::string json_of(const attention_row& r);

}  // namespace bench
