// SPDX-License-Identifier: Apache-2.0
#include "support/report.hpp"

#include <algorithm>
#include <map>
#include <set>

namespace bench {
namespace {

// A number in a few characters: 185, 27.4k, 1.2M.
std::string brief(double v) {
  char text[32];
  if (v >= 999500) std::snprintf(text, sizeof text, "%.2fM", v / 1e6);
  else if (v >= 9999.5) std::snprintf(text, sizeof text, "%.1fk", v / 1e3);
  else if (v >= 99.95) std::snprintf(text, sizeof text, "%.0f", v);
  else std::snprintf(text, sizeof text, "%.1f", v);
  return text;
}

void write_limits(std::FILE* to, const machine_limits& l) {
  std::fprintf(to,
               "\"threads\": %d, \"dram_read_bytes_per_s\": %.6g, \"fma_f32_flops_per_s\": %.6g, "
               "\"amx_bf16_flops_per_s\": %.6g, \"amx_int8_ops_per_s\": %.6g, \"vnni_int8_ops_per_s\": %.6g, \"quiet\": %s",
               l.threads, l.dram_read, l.fma_f32, l.amx_bf16, l.amx_int8, l.vnni_int8, l.quiet ? "true" : "false");
}

void write_row(std::FILE* to, const row& r) {
  std::fprintf(to,
               "{\"case\": \"%s\", \"shape\": \"%s\", \"d\": %td, \"f\": %td, \"E\": %td, \"k\": %td, \"T\": %td, "
               "\"type\": \"%s\", \"threads\": %d, \"skew\": %g, \"backward\": %s, ",
               r.name, r.shape.name.c_str(), r.shape.d, r.shape.f, r.shape.experts, r.shape.k, r.tokens,
               std::string(r.type.name).c_str(), r.threads, r.skew, r.backward ? "true" : "false");
  std::fprintf(to,
               "\"tokens_per_s\": %.6g, \"flops_per_s\": %.6g, \"weight_bytes_per_s\": %.6g, \"roof_tokens_per_s\": %.6g, "
               "\"roof\": \"%s\", \"share\": %.4g, \"quiet\": %s, \"peers\": {",
               r.tokens_per_s, r.flops_per_s, r.weight_bytes_per_s, r.roof_tokens_per_s,
               r.memory_bound ? "memory" : "compute", r.share(), r.quiet ? "true" : "false");
  for (std::size_t i = 0; i < r.peers.size(); ++i)
    std::fprintf(to, "%s\"%s\": %.6g", i == 0 ? "" : ", ", r.peers[i].name.c_str(), r.peers[i].tokens_per_s);
  std::fprintf(to, "}}");
}

std::map<std::string, std::string> versions(const std::vector<row>& rows) {
  std::map<std::string, std::string> all;
  for (const row& r : rows)
    for (const peer_result& p : r.peers) all[p.name] = p.version;
  return all;
}

}  // namespace

void table::limits(const machine_limits& l) const {
  const auto unit = [](double rate, const char* what) { return rate > 0 ? brief(rate / 1e9) + " " + what : std::string("none"); };
  std::printf("limits of %d thread%s: memory %.1f GB/s, float32 %s, VNNI int8 %s, AMX bf16 %s, AMX int8 %s%s\n", l.threads,
              l.threads == 1 ? "" : "s", l.dram_read / 1e9, unit(l.fma_f32, "Gflop/s").c_str(), unit(l.vnni_int8, "Gop/s").c_str(),
              unit(l.amx_bf16, "Gflop/s").c_str(), unit(l.amx_int8, "Gop/s").c_str(), l.quiet ? "" : "  !");
}

void table::heading() const {
  std::printf("\n%-6s %-16s %4s %5s %-7s %3s %9s %8s %9s %6s %-7s", "case", "shape", "skew", "T", "type", "thr", "tokens/s",
              "Gflop/s", "roof", "share", "by");
  for (const std::string& p : peers_) std::printf(" %16s", p.c_str());
  std::printf("\n");
}

void table::add(const row& r) const {
  std::printf("%-6s %-16s %4.3g %5td %-7s %3d %9s %8s %9s %5.1f%% %-7s", r.backward ? "train" : r.name, r.shape.name.c_str(),
              r.skew, r.tokens, std::string(r.type.name).c_str(), r.threads, brief(r.tokens_per_s).c_str(),
              brief(r.flops_per_s / 1e9).c_str(), brief(r.roof_tokens_per_s).c_str(), 100 * r.share(),
              r.memory_bound ? "memory" : "compute");
  for (const std::string& name : peers_) {
    const auto p = std::find_if(r.peers.begin(), r.peers.end(), [&](const peer_result& x) { return x.name == name; });
    if (p == r.peers.end()) std::printf(" %16s", "-");
    else std::printf(" %8s x%6.2f", brief(p->tokens_per_s).c_str(), r.tokens_per_s / p->tokens_per_s);
  }
  std::printf("%s\n", r.quiet ? "" : "  !");
  std::fflush(stdout);
}

void table::footer(const std::vector<row>& rows) const {
  std::printf("\n");
  for (const auto& [name, version] : versions(rows)) std::printf("%s: %s\n", name.c_str(), version.c_str());
  std::set<std::string> said;
  for (const row& r : rows)
    for (const absent_peer& p : r.left_out)
      if (said.insert(p.name + p.reason).second) std::printf("left out: %s: %s\n", p.name.c_str(), p.reason.c_str());
}

void write_json(std::FILE* to, const std::vector<machine_limits>& limits, const std::vector<row>& rows) {
  std::fprintf(to, "[\n{\"case\": \"limits\", ");
  write_limits(to, limits.back());
  std::fprintf(to, ", \"with_fewer_threads\": [");
  for (std::size_t i = 0; i + 1 < limits.size(); ++i) {
    std::fprintf(to, "%s{", i == 0 ? "" : ", ");
    write_limits(to, limits[i]);
    std::fprintf(to, "}");
  }
  std::fprintf(to, "], \"versions\": {");
  const char* between = "";
  for (const auto& [name, version] : versions(rows)) {
    std::fprintf(to, "%s\"%s\": \"%s\"", between, name.c_str(), version.c_str());
    between = ", ";
  }
  std::fprintf(to, "}}");
  for (const row& r : rows) {
    std::fprintf(to, ",\n");
    write_row(to, r);
  }
  std::fprintf(to, "\n]\n");
}

}  // namespace bench
