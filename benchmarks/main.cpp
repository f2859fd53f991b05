// SPDX-License-Identifier: Apache-2.0
// Whole layers, or attention, beside their peers and the limits of the machine: `benchmarks/run --help`.
#include <algorithm>
#include <cstdio>
#include <functional>
#include <thread>

#include "attention/attention.hpp"
#include "layers/layers.hpp"
#include "moe/backend/cpu/level.hpp"
#include "peers/peers.hpp"
#include "support/contest.hpp"
#include "support/judge.hpp"
#include "support/options.hpp"
#include "support/report.hpp"

namespace {

using namespace bench;

std::vector<machine_limits> measure_all_limits(std::vector<int> threads, int rounds) {
  std::sort(threads.begin(), threads.end());
  threads.erase(std::unique(threads.begin(), threads.end()), threads.end());
  std::vector<machine_limits> all;
  for (const int n : threads) all.push_back(measure_limits(n, rounds));
  return all;
}

using limits_of = std::function<const machine_limits&(int)>;

std::vector<std::string> run_layers(const options& o, const std::vector<listed_peer>& listed,
                                    const std::vector<std::string>& processes, const limits_of& of, peer_record& peers) {
  std::vector<std::string> columns = peer_names(o.backward);
  if (!o.backward) columns.insert(columns.end(), processes.begin(), processes.end());
  const table out(columns);
  out.heading();
  std::vector<row> rows;
  if (o.fixed) {
    const row& r = rows.emplace_back(measure_static_layer(o.rounds));
    out.add(r);
    std::printf("%.0f ns a call, %.0f to read an expert's weights\n", 1e9 / r.tokens_per_s, 1e9 / r.roof_tokens_per_s);
  }
  for (const model_shape& s : o.fixed ? std::vector<model_shape>() : o.shapes)
    for (const weight_type& type : o.types)
      compete(s, type, o, listed, of, [&](const row& r) {
        out.add(r);
        rows.push_back(r);
      });
  std::vector<std::string> json;
  for (const row& r : rows) {
    json.push_back(json_of(r));
    peers.add(r.peers, r.left_out);
  }
  for (const std::string& weak : judge_loop(rows)) std::printf("%s\n", weak.c_str());
  return json;
}

std::vector<std::string> run_attention(const options& o, const std::vector<listed_peer>& listed,
                                       const std::vector<std::string>& processes, const limits_of& of, peer_record& peers) {
  const attention_table out(processes);
  out.heading();
  std::vector<std::string> json;
  for (const attention_shape& s : o.attention)
    for (const weight_type& type : o.types)
      compete_attention({s, type, o.form, o.rotate}, o, listed, of, [&](const attention_row& r) {
        out.add(r);
        json.push_back(json_of(r));
        peers.add(r.peers, r.left_out);
      });
  return json;
}

int run(const options& o) {
  moe::check_cpu_level();
  const moe::cpu_level_report level = moe::report_cpu_level();
  const std::vector<listed_peer> listed = read_peer_list(o.peer_list, o.attention.empty() ? "layer" : "attention");
  std::vector<std::string> processes;
  for (const listed_peer& p : listed)
    if (!p.command.empty()) processes.push_back(p.name);
  const std::vector<machine_limits> limits = measure_all_limits(o.fixed ? std::vector<int>{1} : o.threads, o.rounds);
  std::printf("level %s: %s\n", std::string(moe::name(level.level)).c_str(), level.why);
  for (const machine_limits& l : limits) print_limits(l);
  const auto of = [&](int threads) -> const machine_limits& {
    return *std::find_if(limits.begin(), limits.end(), [&](const machine_limits& l) { return l.threads == threads; });
  };
  peer_record peers;
  const std::vector<std::string> rows =
      o.attention.empty() ? run_layers(o, listed, processes, of, peers) : run_attention(o, listed, processes, of, peers);
  peers.print();

  if (o.json.empty()) return 0;
  std::FILE* file = std::fopen(o.json.c_str(), "w");
  if (file == nullptr) throw std::runtime_error("--json: cannot write " + o.json);
  write_json(file, limits, peers, rows);
  if (std::fclose(file) != 0) throw std::runtime_error("--json: cannot write " + o.json);
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    const auto given = [&](std::string_view flag) { return std::find(argv + 1, argv + argc, flag) != argv + argc; };
    const int cores = std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
    const options o = parse(argc, argv, given("--attention") ? attention_types(given("--decode")) : library_types(given("--backward")), cores);
    if (o.help) return std::fputs(usage, stdout) < 0;
    return run(o);
  } catch (const usage_error& e) {
    std::fprintf(stderr, "%s\n\n%s", e.what(), usage);
    return 2;
  } catch (const std::exception& e) {
    std::fprintf(stderr, "%s\n", e.what());
    return 1;
  }
}
