// SPDX-License-Identifier: Apache-2.0
// measure FOLDER COMPILER FLAG...   compiles the units of FOLDER and prints what they cost beside what they may cost: user
// time, the least of three, and peak memory. Ends with 1 when one takes more than half again as much. Times are scaled to a
// machine that needs 0.14 s for the yardstick, like the one the budgets were set on. POSIX.
#include <fcntl.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <string>
#include <vector>

namespace {

struct cost {
  double seconds = 0, megabytes = 0;
};

struct budget {
  const char* name;
  const char* unit;
  cost limit;
  const char* beyond = nullptr;  ///< the unit whose cost is taken off
  int pieces = 1;                ///< what is left is shared by so many
};

const budget budgets[] = {
    {"core, concepts, layer", "core.cpp", {0.25, 90}},
    {"umbrella", "umbrella.cpp", {0.7, 160}},
    {"first CPU layer, forward and backward", "first_layer.cpp", {4, 450}},
    {"each further layer type in the file", "further_layers.cpp", {0.25, 10}, "first_layer.cpp", 8},
    {"the first with MOE_SEPARATE_KERNELS", "separate_kernels.cpp", {0.9, 160}},
};
constexpr int most_lines = 15;  // of the message about a wrong composition
constexpr double tolerance = 1.5;
constexpr double yardstick_seconds = 0.14;

struct compiler {
  std::string folder;
  std::vector<std::string> command;
  double speed = 1;  ///< of a machine as the budgets mean it, over that of this one

  /// What one run costs; `log` takes what it prints. Fails when the compiler does not end as expected.
  cost run(const std::string& unit, const std::string& log, bool compiles = true) const {
    std::vector<std::string> words = command;
    words.insert(words.end(), {"-c", "-o", "/dev/null", folder + "/" + unit});
    std::vector<char*> argv;
    for (std::string& word : words) argv.push_back(word.data());
    argv.push_back(nullptr);

    const pid_t child = fork();
    if (child == 0) {
      const int out = open(log.c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0600);
      if (out < 0 || dup2(out, 1) < 0 || dup2(out, 2) < 0) _exit(126);
      execvp(argv[0], argv.data());
      _exit(127);
    }
    int status = 0;
    rusage used{};
    if (child < 0 || wait4(child, &status, 0, &used) != child || !WIFEXITED(status) ||
        (WEXITSTATUS(status) == 0) != compiles) {
      std::fprintf(stderr, "%s: the compiler ended unexpectedly; its output is in %s\n", unit.c_str(), log.c_str());
      std::exit(2);
    }
    return {static_cast<double>(used.ru_utime.tv_sec) + 1e-6 * static_cast<double>(used.ru_utime.tv_usec),
            static_cast<double>(used.ru_maxrss) / 1024};
  }

  cost least(const std::string& unit) const {
    cost best = run(unit, "compile_budget.log");
    for (int i = 1; i < 3; ++i) {
      const cost next = run(unit, "compile_budget.log");
      best = {std::min(best.seconds, next.seconds), std::min(best.megabytes, next.megabytes)};
    }
    return {best.seconds * speed, best.megabytes};
  }
};

bool within(const budget& b, const compiler& with) {
  cost used = with.least(b.unit);
  if (b.beyond) {
    const cost base = with.least(b.beyond);
    used = {(used.seconds - base.seconds) / b.pieces, (used.megabytes - base.megabytes) / b.pieces};
  }
  const bool ok = used.seconds <= tolerance * b.limit.seconds && used.megabytes <= tolerance * b.limit.megabytes;
  std::printf("| %-37s | %5.2f s | %5.2f s | %6.0f MB | %6.0f MB |%s\n", b.name, used.seconds, b.limit.seconds,
              used.megabytes, b.limit.megabytes, ok ? "" : "  over by more than half");
  std::fflush(stdout);
  return ok;
}

bool wrong_composition_is_short(const compiler& with) {
  const std::string log = "wrong_composition.log";
  with.run("wrong_composition.cpp", log, false);
  std::ifstream in(log);
  int lines = 0, errors = 0;
  for (std::string line; std::getline(in, line); ++lines) errors += line.find("error: ") != std::string::npos;
  const bool ok = errors == 1 && lines <= most_lines;
  std::printf("| %-37s | %d error, %d lines; budget: 1 error, %d lines |%s\n", "a wrong composition", errors, lines,
              most_lines, ok ? "" : "  over");
  return ok;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 3) {
    std::fputs("measure FOLDER COMPILER FLAG...\n", stderr);
    return 2;
  }
  compiler with{argv[1], {argv + 2, argv + argc}};
  const double yardstick = with.least("yardstick.cpp").seconds;
  with.speed = yardstick_seconds / yardstick;
  std::printf("The yardstick takes %.2f s here; times are multiplied by %.2f.\n\n", yardstick, with.speed);
  std::printf("| %-37s | %7s | %7s | %9s | %9s |\n|---|---|---|---|---|\n", "unit", "time", "budget", "memory", "budget");
  bool ok = true;
  for (const budget& b : budgets) ok = within(b, with) && ok;
  ok = wrong_composition_is_short(with) && ok;
  return ok ? 0 : 1;
}
