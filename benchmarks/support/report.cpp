// SPDX-License-Identifier: Apache-2.0
#include "support/report.hpp"

#include <algorithm>

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
               "\"amx_bf16_flops_per_s\": %.6g, \"amx_int8_ops_per_s\": %.6g, \"vnni_int8_ops_per_s\": %.6g, "
               "\"avx512_bf16_flops_per_s\": %.6g, \"quiet\": %s",
               l.threads, l.dram_read, l.fma_f32, l.amx_bf16, l.amx_int8, l.vnni_int8, l.avx512_bf16,
               l.quiet ? "true" : "false");
}

}  // namespace

void print_limits(const machine_limits& l) {
  const auto unit = [](double rate, const char* what) { return rate > 0 ? brief(rate / 1e9) + " " + what : std::string("none"); };
  std::printf(
      "limits of %d thread%s: memory %.1f GB/s, float32 %s, VNNI int8 %s, AVX-512 bf16 %s, AMX bf16 %s, AMX int8 %s%s\n",
      l.threads, l.threads == 1 ? "" : "s", l.dram_read / 1e9, unit(l.fma_f32, "Gflop/s").c_str(),
      unit(l.vnni_int8, "Gop/s").c_str(), unit(l.avx512_bf16, "Gflop/s").c_str(), unit(l.amx_bf16, "Gflop/s").c_str(),
      unit(l.amx_int8, "Gop/s").c_str(), l.quiet ? "" : "  !");
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

std::string json_of(const row& r) {
  char text[512];
  std::snprintf(text, sizeof text,
                "{\"case\": \"%s\", \"shape\": \"%s\", \"d\": %td, \"f\": %td, \"E\": %td, \"k\": %td, \"T\": %td, "
                "\"type\": \"%s\", \"threads\": %d, \"skew\": %g, \"backward\": %s, ",
                r.name, r.shape.name.c_str(), r.shape.d, r.shape.f, r.shape.experts, r.shape.k, r.tokens,
                std::string(r.type.name).c_str(), r.threads, r.skew, r.backward ? "true" : "false");
  std::string json = text;
  std::snprintf(text, sizeof text,
                "\"tokens_per_s\": %.6g, \"flops_per_s\": %.6g, \"weight_bytes_per_s\": %.6g, \"roof_tokens_per_s\": %.6g, "
                "\"roof\": \"%s\", \"share\": %.4g, \"quiet\": %s, \"peers\": {",
                r.tokens_per_s, r.flops_per_s, r.weight_bytes_per_s, r.roof_tokens_per_s,
                r.memory_bound ? "memory" : "compute", r.share(), r.quiet ? "true" : "false");
  json += text;
  const char* between = "";
  for (const peer_result& p : r.peers) {
    std::snprintf(text, sizeof text, "%s\"%s\": %.6g", between, p.name.c_str(), p.tokens_per_s);
    json += text;
    between = ", ";
  }
  return json + "}}";
}

void peer_record::add(const std::vector<peer_result>& peers, const std::vector<absent_peer>& left_out) {
  for (const peer_result& p : peers) versions_[p.name] = p.version;
  for (const absent_peer& p : left_out) left_out_.insert(p.name + ": " + p.reason);
}
void peer_record::print() const {
  std::printf("\n");
  for (const auto& [name, version] : versions_) std::printf("%s: %s\n", name.c_str(), version.c_str());
  for (const std::string& p : left_out_) std::printf("left out: %s\n", p.c_str());
}

void write_json(std::FILE* to, const std::vector<machine_limits>& limits, const peer_record& peers,
                const std::vector<std::string>& rows) {
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
  for (const auto& [name, version] : peers.versions()) {
    std::fprintf(to, "%s\"%s\": \"%s\"", between, name.c_str(), version.c_str());
    between = ", ";
  }
  std::fprintf(to, "}}");
  for (const std::string& r : rows) std::fprintf(to, ",\n%s", r.c_str());
  std::fprintf(to, "\n]\n");
}

}  // namespace bench
