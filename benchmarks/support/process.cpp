// SPDX-License-Identifier: Apache-2.0
#include "support/process.hpp"

#if defined(__unix__) || defined(__APPLE__)
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>
#if defined(__linux__)
#include <sys/prctl.h>
#endif

#include <cerrno>
#include <cstring>

#include "support/measure.hpp"

namespace bench {
namespace {

void close_all(std::initializer_list<int> files) {
  for (const int file : files) close(file);
}

// In the child: nothing but calls that are safe after fork.
[[noreturn]] void become(char* const* command, int in, int out, int errors) {
  dup2(in, STDIN_FILENO);
  dup2(out, STDOUT_FILENO);
  dup2(errors, STDERR_FILENO);
#if defined(__linux__)
  prctl(PR_SET_PDEATHSIG, SIGKILL);  // a stopped process would outlive us for ever
#endif
  execvp(command[0], command);
  _exit(127);
}

}  // namespace

process::process(const std::vector<std::string>& command, const std::string& errors) {
  std::vector<char*> words;
  for (const std::string& word : command) words.push_back(const_cast<char*>(word.c_str()));
  words.push_back(nullptr);
  int in[2], out[2];
  if (pipe(in) != 0) throw process_error("no pipe: " + std::string(std::strerror(errno)));
  if (pipe(out) != 0) {
    close_all({in[0], in[1]});
    throw process_error("no pipe: " + std::string(std::strerror(errno)));
  }
  for (const int file : {in[0], in[1], out[0], out[1]}) fcntl(file, F_SETFD, FD_CLOEXEC);
  const int log = open(errors.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
  signal(SIGPIPE, SIG_IGN);  // writing to a program that ended is an error, not our end
  pid_ = fork();
  if (pid_ == 0) become(words.data(), in[0], out[1], log);
  close_all({in[0], out[1], log});
  to_ = in[1];
  from_ = out[0];
  if (pid_ < 0) {
    close_all({to_, from_});
    throw process_error("no process: " + std::string(std::strerror(errno)));
  }
}

// A program that does not end when its input does is stopped for good.
process::~process() {
  close_all({to_, from_});
  kill(pid_, SIGCONT);
  for (int tries = 0; tries < 200; ++tries) {
    if (waitpid(pid_, nullptr, WNOHANG) == pid_) return;
    usleep(10000);
  }
  kill(pid_, SIGKILL);
  waitpid(pid_, nullptr, 0);
}

std::string process::ask(const std::string& line, double patience) {
  kill(pid_, SIGCONT);
  if (!line.empty()) {
    const std::string all = line + '\n';
    if (write(to_, all.data(), all.size()) != static_cast<ssize_t>(all.size())) throw process_error("it ended");
  }
  std::string answer = receive(patience);
  kill(pid_, SIGSTOP);
  return answer;
}

std::string process::receive(double patience) {
  const double end = seconds() + patience;
  for (std::size_t at; (at = received_.find('\n')) == received_.npos;) {
    pollfd ready{from_, POLLIN, 0};
    const double left = end - seconds();
    if (left <= 0 || poll(&ready, 1, static_cast<int>(1000 * left) + 1) == 0) throw process_error("no answer came");
    char some[4096];
    const ssize_t n = read(from_, some, sizeof some);
    if (n == 0 || (n < 0 && errno != EINTR)) throw process_error("it ended");
    if (n > 0) received_.append(some, static_cast<std::size_t>(n));
  }
  const std::size_t at = received_.find('\n');
  std::string line = received_.substr(0, at);
  received_.erase(0, at + 1);
  return line;
}

}  // namespace bench

#else

namespace bench {

process::process(const std::vector<std::string>&, const std::string&) { throw process_error("needs a POSIX system"); }
process::~process() = default;
std::string process::ask(const std::string&, double) { return {}; }
std::string process::receive(double) { return {}; }
}  // namespace bench
#endif
