// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cstdio>

#include "attention/attention.hpp"

namespace bench {
namespace {

const char* name(attention_gate g) { return g == attention_gate::none ? "none" : g == attention_gate::headwise ? "headwise" : "elementwise"; }

std::string name(const attention_form& f) {
  const bool gated = f.gate != attention_gate::none;
  std::string text = f.block > 0 ? "moba" : f.decode ? "decode" : gated ? "gate" : "dense";
  if (gated) text += f.gate == attention_gate::headwise ? "/h" : "/e";
  return f.backward ? text + "-b" : f.decode && f.block > 0 ? text + "-d" : text;
}
double cache_bytes_per_s(const attention_row& r) { return r.of.visited_bytes() / r.seconds; }
double visited_share(const attention_row& r) { return r.of.pairs() / r.of.dense_pairs(); }

/// What a form costs beside another of the library's: name and value, as JSON has them.
std::vector<std::pair<std::string, double>> comparisons(const attention_row& r) {
  std::vector<std::pair<std::string, double>> all;
  const auto add = [&](const char* name, double value) { all.emplace_back(name, value); };
  if (const double dense = r.ratio_to("dense"); dense > 0) {
    add("ratio_to_dense", dense);
    add("share_of_ideal_ratio", dense * visited_share(r));
  }
  if (const double routed = r.ratio_to("routed"); routed > 0) add("routing_share", 1 - routed);
  if (const double ungated = r.ratio_to("ungated"); ungated > 0) add("gate_overhead", 1 / ungated - 1);
  if (const double forward = r.ratio_to("forward"); forward > 0) add("rate_to_forward", 2.5 * forward);
  return all;
}
template <class... Arguments>
std::string text_of(const char* format, Arguments... arguments) {
  char text[512];
  std::snprintf(text, sizeof text, format, arguments...);
  return text;
}

}  // namespace

void attention_table::heading() const {
  std::printf("\n%-8s %7s %4s %6s %6s %-5s %3s %10s %8s %7s %6s %-7s", "form", "h/hkv", "d", "m", "n", "type", "thr", "tokens/s",
              "Gflop/s", "GB/s", "share", "by");
  for (const std::string& p : peers_) std::printf(" %16s", p.c_str());
  std::printf("\n");
}

void attention_table::add(const attention_row& r) const {
  const attention_shape& s = r.of.shape;
  std::printf("%-8s %3td/%-3td %4td %6td %6td %-5s %3d %10.5g %8.4g %7.3g %5.1f%% %-7s", name(r.of.form).c_str(), s.h, s.h_kv, s.d,
              r.of.queries(), s.n, std::string(r.of.type.name).c_str(), r.threads, r.tokens_per_s(), r.of.flops() / r.seconds / 1e9,
              cache_bytes_per_s(r) / 1e9, 100 * r.share(), r.memory_bound ? "memory" : "compute");
  for (const std::string& name : peers_) {
    const auto p = std::find_if(r.peers.begin(), r.peers.end(), [&](const peer_result& x) { return x.name == name; });
    if (p == r.peers.end()) std::printf(" %16s", "-");
    else std::printf(" %8.4g x%6.2f", p->tokens_per_s, r.tokens_per_s() / p->tokens_per_s);
  }
  for (const auto& [what, value] : comparisons(r)) std::printf("  %s %.3f", what.c_str(), value);
  std::printf("%s\n", r.quiet ? "" : "  !");
  std::fflush(stdout);
}

std::string json_of(const attention_row& r) {
  const attention_shape& s = r.of.shape;
  const attention_form& f = r.of.form;
  std::string text = text_of(
      "{\"case\": \"attention\", \"h\": %td, \"hkv\": %td, \"d\": %td, \"m\": %td, \"n\": %td, \"type\": \"%s\", \"threads\": %d, "
      "\"decode\": %s, \"backward\": %s, \"gate\": \"%s\", \"B\": %td, \"k\": %td, ",
      s.h, s.h_kv, s.d, r.of.queries(), s.n, std::string(r.of.type.name).c_str(), r.threads, f.decode ? "true" : "false",
      f.backward ? "true" : "false", name(f.gate), f.block, f.k);
  text += text_of(
      "\"tokens_per_s\": %.6g, \"useful_flops_per_s\": %.6g, \"cache_bytes_per_s\": %.6g, \"visited_share\": %.6g, "
      "\"roof_tokens_per_s\": %.6g, \"roof\": \"%s\", \"share\": %.4g, \"quiet\": %s, ",
      r.tokens_per_s(), r.of.flops() / r.seconds, cache_bytes_per_s(r), visited_share(r),
      static_cast<double>(r.of.queries()) / r.roof_seconds, r.memory_bound ? "memory" : "compute", r.share(), r.quiet ? "true" : "false");
  for (const auto& [what, value] : comparisons(r)) text += text_of("\"%s\": %.4g, ", what.c_str(), value);
  text += "\"peers\": {";
  for (std::size_t i = 0; i < r.peers.size(); ++i)
    text += text_of("%s\"%s\": %.6g", i == 0 ? "" : ", ", r.peers[i].name.c_str(), r.peers[i].tokens_per_s);
  return text + "}}";
}

}  // namespace bench
