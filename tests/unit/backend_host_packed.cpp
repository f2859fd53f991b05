// SPDX-License-Identifier: Apache-2.0
// How the work of packed experts is shared: kernels that count instead of multiplying, on threads that take turns so that
// each gets as far as it would if equal work took equal time.
#include <doctest/doctest.h>

#include <algorithm>
#include <condition_variable>
#include <map>
#include <mutex>
#include <numeric>
#include <thread>
#include <vector>

#include "moe/backend/host_packed.hpp"
#include "moe/expert/activation.hpp"
#include "moe/moe.hpp"

namespace {

using moe::dim;
using moe::idx;

std::size_t at(dim i) { return static_cast<std::size_t>(i); }

/// Threads of one join. Who has done the least goes on, the others wait: a schedule that does not depend on the machine.
class turns {
 public:
  static thread_local turns* now;
  static thread_local std::size_t self;

  explicit turns(int threads) : done_(static_cast<std::size_t>(threads)), at_work_(done_.size(), true) {}
  void work(dim cost) {
    std::unique_lock lock(mutex_);
    done_[self] += cost;
    next(lock);
  }
  void begin(std::size_t thread) {
    now = this;
    self = thread;
    work(0);
  }
  void end() {
    const std::lock_guard lock(mutex_);
    at_work_[self] = false;
    changed_.notify_all();
  }
  const std::vector<dim>& done() const { return done_; }

 private:
  void next(std::unique_lock<std::mutex>& lock) {
    changed_.notify_all();
    changed_.wait(lock, [&, me = self] {
      for (std::size_t i = 0; i < done_.size(); ++i)
        if (at_work_[i] && (done_[i] < done_[me] || (done_[i] == done_[me] && i < me))) return false;
      return true;
    });
  }
  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<dim> done_;
  std::vector<bool> at_work_;
};
thread_local turns* turns::now = nullptr;
thread_local std::size_t turns::self = 0;

struct reading {
  const std::byte* panel;
  dim rows;
};
/// What all threads of all joins did.
struct record {
  std::vector<std::vector<dim>> work;           ///< of each join, of each thread: time for panels
  std::vector<std::vector<reading>> by_thread;  ///< in the order of reading
};
record* recording = nullptr;

struct in_turns {
  int threads = 2;

  int concurrency() const noexcept { return threads; }
  template <class F>
  void for_each(dim n, dim grain, F&& f) const {
    turns order(threads);
    std::atomic<dim> unit{0};
    std::vector<std::thread> all;
    for (int i = 0; i < threads; ++i)
      all.emplace_back([&, i] {
        order.begin(static_cast<std::size_t>(i));
        for (dim first; (first = unit.fetch_add(grain)) < n; order.work(0)) f(first, std::min(first + grain, n));
        order.end();
      });
    for (std::thread& t : all) t.join();
    recording->work.push_back(order.done());
  }
};

/// As at the level `amx`: tiles and rows of a chunk.
constexpr dim height = 32, chunk = 320;
/// The rows whose products with a panel take as long as it takes to come from memory; fewer wait for it. 172 on tiles with
/// bf16 (6.3 TFLOP/s over 36.6 GB/s), 10 with float32 on vectors of 256 bits.
dim ridge = 172;
dim time_of(dim rows) noexcept { return rows > ridge ? rows : ridge; }

/// Where nothing is multiplied but noted.
struct noting : moe::arch::scalar {};
void prepare_nothing(const float*, dim, std::byte*, float*, bool) noexcept {}
void note(const moe::prepared_rows& a, const moe::panel_product& p) noexcept {
  for (dim j = 0; j < p.panels; ++j) recording->by_thread[turns::self].push_back({p.weights + j * p.panel_bytes, a.rows});
  for (dim r = 0; r < p.c.rows; ++r) std::fill_n(p.c.row(r), p.panels * 32, 0.f);
  turns::now->work(time_of(a.rows) * p.panels);
}
template <class T>
moe::packed_kernels kernels_of(noting, moe::arch::weights_of<T>) noexcept {
  return {moe::operand::bf16, height, chunk, false, 0, prepare_nothing, note};
}

constexpr dim d = 256, f = 512, hidden = f / 32 * 2, output = d / 32;  // panels
using backend = moe::host_backend<noting, in_turns>;

/// One call for experts with so many rows each, one choice a token.
struct trial {
  record all;
  moe::buffer weights;
  moe::packed_matrix<moe::bf16> up, down;
  std::vector<idx> offsets{0};

  trial(const std::vector<dim>& rows, int threads) {
    for (const dim n : rows) offsets.push_back(offsets.back() + static_cast<idx>(n));
    const dim A = offsets.back(), E = static_cast<dim>(rows.size());
    all.by_thread.resize(at(threads));
    recording = &all;
    const moe::packed_ffn_expert<moe::bf16> expert;
    const moe::shape s{.tokens = A, .d = d, .f = f, .experts = E};
    moe::arena count;
    (void)expert.make_weights(s, count);
    weights = moe::buffer(moe::padded(count));
    moe::arena mem(weights.bytes());
    const auto w = expert.make_weights(s, mem);
    up = w.gate_up;
    down = w.down;
    const backend on_turns(in_turns{threads});
    moe::arena need;
    moe::count_packed_ffn<moe::bf16>(on_turns, s, A, need);
    const moe::buffer scratch(moe::padded(need));
    moe::arena room(scratch.bytes());
    std::vector<idx> token(at(A));
    std::iota(token.begin(), token.end(), 0);
    const std::vector<float> x(at(A * d)), weight(at(A), 1.f);
    std::vector<float> ys(at(A * d));
    const moe::call<backend> on{on_turns, room, s};
    moe::packed_ffn(on, {.offsets = offsets, .token = token, .weight = weight},
                    moe::gathered<float>{{x.data(), A, d}, token.data()}, moe::glu<moe::silu>{}, up, {}, down, {},
                    {ys.data(), A, d});
  }
  dim expert_of(const std::byte* panel) const {
    const auto in = [&](const moe::packed_matrix<moe::bf16>& m) {
      return (panel - reinterpret_cast<const std::byte*>(m.panel(0))) / moe::packed_matrix<moe::bf16>::panel_bytes(m.cols);
    };
    const dim i = in(up);
    return i >= 0 && i < up.panels.rows ? i / hidden : in(down) / output;
  }
  dim rows(dim e) const { return offsets[at(e) + 1] - offsets[at(e)]; }
  dim chunks() const {
    dim n = 0;
    for (dim e = 0; e < static_cast<dim>(offsets.size()) - 1; ++e) n += (rows(e) + chunk - 1) / chunk;
    return n;
  }

  void check_readings() const {
    std::map<const std::byte*, std::vector<dim>> readings;
    for (const auto& thread : all.by_thread)
      for (const reading& r : thread) readings[r.panel].push_back(r.rows);
    dim experts = 0;
    for (dim e = 0; e < static_cast<dim>(offsets.size()) - 1; ++e) experts += rows(e) > 0;
    CHECK(static_cast<dim>(readings.size()) == experts * (hidden + output));
    bool often = true, complete = true;
    for (const auto& [panel, heights] : readings) {
      const dim n = rows(expert_of(panel));
      often = often && static_cast<dim>(heights.size()) == (n + chunk - 1) / chunk;
      complete = complete && std::accumulate(heights.begin(), heights.end(), dim{0}) == n;
    }
    CHECK(often);
    CHECK(complete);
    // Between two readings of a panel by a thread it reads nothing but the same expert's.
    bool together = true;
    for (const auto& thread : all.by_thread) {
      std::map<const std::byte*, std::size_t> last;
      for (std::size_t i = 0; i < thread.size(); ++i) {
        if (const auto before = last.find(thread[i].panel); before != last.end())
          for (std::size_t j = before->second; j < i; ++j)
            together = together && expert_of(thread[j].panel) == expert_of(thread[i].panel);
        last[thread[i].panel] = i;
      }
    }
    CHECK(together);
  }
  /// Where a join takes whole chunks, no thread goes on to an expert with more rows: what ends last is short.
  void check_order() const {
    bool falls = true;
    for (const auto& thread : all.by_thread)
      for (std::size_t i = 1; i < thread.size(); ++i)
        falls = falls && rows(expert_of(thread[i].panel)) <= rows(expert_of(thread[i - 1].panel));
    CHECK(falls);
  }
  /// The most that a thread waits for another in one join.
  dim spread() const {
    dim most = 0;
    for (const auto& join : all.work)
      most = std::max(most, *std::ranges::max_element(join) - *std::ranges::min_element(join));
    return most;
  }
};

}  // namespace

TEST_SUITE("backend/host_packed") {
  TEST_CASE("one hot expert leaves no thread idle, and weights are read once for each chunk of an expert's rows") {
    for (const dim tokens : {1, 7, 64, 512, 2048, 8192})
      for (const dim wait : {172, 10})
        for (const dim hot : {5, 4})  // of five rows: all and most of them go to one expert
          for (const dim at_e : {3, 8})
            for (const int threads : {1, 2, 3, 8}) {
              CAPTURE(tokens);
              CAPTURE(hot);
              CAPTURE(threads);
              CAPTURE(at_e);
              CAPTURE(wait);
              ridge = wait;
              std::vector<dim> rows(9);
              rows[at(at_e)] = tokens * hot / 5;
              for (dim t = rows[at(at_e)], e = 0; t < tokens; ++t, e = (e + 1) % 9) ++rows[at(e == at_e ? (e + 1) % 9 : e)];
              const trial got(rows, threads);
              got.check_readings();
              // Nobody waits for more than one unit: a chunk through all panels of an expert, where there are four chunks
              // and more for each thread; else a run of panels of a chunk.
              const bool by_chunks = got.all.work.size() == 1;
              const dim panels = by_chunks ? hidden + output : moe::detail::panels_at_once;
              CHECK(got.spread() <= time_of(std::min(chunk, tokens)) * panels);
              if (by_chunks) CHECK(got.chunks() >= 4 * threads);
              if (by_chunks) got.check_order();
            }
  }
}
