// SPDX-License-Identifier: Apache-2.0
// How the work of packed experts is shared: kernels that count instead of multiplying, on threads that take turns so that
// each gets as far as it would if equal work took equal time.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <condition_variable>
#include <map>
#include <mutex>
#include <numeric>
#include <set>
#include <thread>
#include <vector>

#include "moe/backend/executor/thread_pool.hpp"
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

using backend = moe::host_backend<noting, in_turns>;

/// One call for experts with so many rows each, one choice a token.
struct trial {
  dim hidden, output;  // panels of an expert
  record all;
  moe::buffer weights;
  moe::packed_matrix<moe::bf16> up, down;
  std::vector<idx> offsets{0};

  trial(const std::vector<dim>& rows, int threads, dim d = 256, dim f = 512) : hidden(f / 32 * 2), output(d / 32) {
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
  dim experts() const { return static_cast<dim>(offsets.size()) - 1; }
  static dim chunks_of(dim n) { return (n + chunk - 1) / chunk; }
  dim chunks() const {
    dim n = 0;
    for (dim e = 0; e < experts(); ++e) n += chunks_of(rows(e));
    return n;
  }
  dim bytes(const std::byte* panel) const {
    const dim i = panel - reinterpret_cast<const std::byte*>(up.panel(0)),
              up_bytes = moe::packed_matrix<moe::bf16>::panel_bytes(up.cols);
    return i >= 0 && i < up.panels.rows * up_bytes ? up_bytes : moe::packed_matrix<moe::bf16>::panel_bytes(down.cols);
  }

  /// Each panel meets all rows of its expert, on one thread, a chunk of them after another.
  void check_readings() const {
    std::map<const std::byte*, std::vector<dim>> readings;
    dim threads = 0;  // of all panels
    for (const auto& thread : all.by_thread) {
      std::set<const std::byte*> own;
      for (const reading& r : thread) {
        readings[r.panel].push_back(r.rows);
        own.insert(r.panel);
      }
      threads += static_cast<dim>(own.size());
    }
    dim used = 0;
    for (dim e = 0; e < experts(); ++e) used += rows(e) > 0;
    CHECK(static_cast<dim>(readings.size()) == used * (hidden + output));
    CHECK(threads == static_cast<dim>(readings.size()));
    bool often = true, complete = true;
    for (const auto& [panel, heights] : readings) {
      const dim n = rows(expert_of(panel));
      often = often && static_cast<dim>(heights.size()) == chunks_of(n);
      complete = complete && std::accumulate(heights.begin(), heights.end(), dim{0}) == n;
    }
    CHECK(often);
    CHECK(complete);
  }
  /// The most bytes of weights that a thread reads from one reading of a panel to the next, that one's included: if caches
  /// hold them, it comes from memory once.
  dim farthest() const {
    dim most = 0;
    for (const auto& thread : all.by_thread) {
      std::map<const std::byte*, std::size_t> last;
      for (std::size_t i = 0; i < thread.size(); ++i) {
        const auto before = last.find(thread[i].panel);
        if (before != last.end()) {
          dim sum = 0;
          for (std::size_t j = before->second; j < i; ++j) sum += bytes(thread[j].panel);
          most = std::max(most, sum);
        }
        last[thread[i].panel] = i;
      }
    }
    return most;
  }
  /// Where experts are units, no thread goes on to an expert with more rows: what ends last is short.
  void check_order() const {
    bool falls = true;
    for (const auto& thread : all.by_thread)
      for (std::size_t i = 1; i < thread.size(); ++i)
        falls = falls && rows(expert_of(thread[i].panel)) <= rows(expert_of(thread[i - 1].panel));
    CHECK(falls);
  }
  /// What a unit may take: an expert of one chunk; or a run of panels that all rows pass, which is what is multiplied at
  /// once or an eighth of a thread's work.
  dim longest_unit(dim threads) const {
    dim longest = 0;
    for (dim e = 0, n; e < experts(); ++e) {
      if ((n = rows(e)) == 0) continue;
      const dim passes = chunks_of(n), pass = time_of((n + passes - 1) / passes);
      const dim whole = passes == 1 ? hidden + output : 0, part = hidden * offsets.back() / (n * 8 * threads);
      longest = std::max(longest, passes * pass * std::max(whole, moe::detail::panels_at_once + part));
    }
    return longest;
  }
  /// The most that a thread waits for another in one join.
  dim spread() const {
    dim most = 0;
    for (const auto& join : all.work)
      most = std::max(most, *std::ranges::max_element(join) - *std::ranges::min_element(join));
    return most;
  }
};

/// The plain kernels with chunks of a few rows.
struct low : moe::arch::scalar {};
template <class T>
moe::packed_kernels kernels_of(low, moe::arch::weights_of<T>) noexcept {
  moe::packed_kernels k = kernels_of(moe::arch::scalar{}, moe::arch::weights_of<T>{});
  k.chunk = 4;
  return k;
}
/// What two products of experts with so many rows each give, weights of more than 4 MiB each.
template <class T, class Arch>
std::vector<float> results(const std::vector<dim>& rows, int threads) {
  const moe::thread_pool pool(threads);
  using pooled = moe::host_backend<Arch, moe::pool_executor>;
  const pooled on_pool{moe::pool_executor(pool)};
  std::vector<idx> offsets{0}, token;
  for (const dim n : rows) offsets.push_back(offsets.back() + static_cast<idx>(n));
  const dim A = offsets.back(), tokens = A / 2;  // two of each
  for (idx i = 0; i < A; ++i) token.push_back(i % static_cast<idx>(tokens));
  const moe::shape s{.tokens = tokens, .d = 1024, .f = 2112, .experts = static_cast<dim>(rows.size())};
  const moe::packed_ffn_expert<T> expert;
  moe::arena count;
  (void)expert.make_weights(s, count);
  moe::buffer weights(moe::padded(count));
  moe::arena mem(weights.bytes());
  const auto w = expert.make_weights(s, mem);
  const auto fill = [&](const moe::packed_matrix<T>& m, moe::dim stream) {
    auto* first = const_cast<std::byte*>(reinterpret_cast<const std::byte*>(m.panel(0)));
    for (dim i = 0, n = m.panels.rows * moe::packed_matrix<T>::panel_bytes(m.cols); i < n; i += 2) {
      const auto bits = static_cast<std::uint32_t>((i + stream) * 2654435761u) >> 9;
      const auto half = static_cast<std::uint16_t>((bits & 0x807f) | 0x3c00);  // small and finite, as halves and as bytes
      std::memcpy(first + i, &half, sizeof half);
    }
    if constexpr (moe::packing<T>::scaled)
      for (dim p = 0; p < m.panels.rows; ++p) std::fill_n(const_cast<float*>(m.panel_scale(p)), 32, 1e-3f);
  };
  fill(w.gate_up, 1);
  fill(w.down, 7);
  std::vector<float> x(at(tokens * s.d)), ys(at(A * s.d), NAN);
  for (std::size_t i = 0; i < x.size(); ++i) x[i] = moe::rng(5).normal(i);
  const std::vector<float> weight(at(A), 1.f);
  moe::arena need;
  moe::count_packed_ffn<T>(on_pool, s, A, need);
  const moe::buffer scratch(moe::padded(need));
  moe::arena room(scratch.bytes());
  const moe::call<pooled> on{on_pool, room, s};
  moe::packed_ffn(on, {.offsets = offsets, .token = token, .weight = weight},
                  moe::gathered<float>{{x.data(), tokens, s.d}, token.data()}, moe::glu<moe::silu>{}, w.gate_up, {}, w.down,
                  {}, {ys.data(), A, s.d});
  return ys;
}

/// Of so many tokens, with one choice each, `hot` in five go to expert `e` of nine, the others to the rest in turn.
std::vector<dim> hot_rows(dim tokens, dim hot, dim e) {
  std::vector<dim> rows(9);
  rows[at(e)] = tokens * hot / 5;
  for (dim t = rows[at(e)], i = 0; t < tokens; ++t, i = (i + 1) % 9) ++rows[at(i == e ? (i + 1) % 9 : i)];
  return rows;
}

}  // namespace

TEST_SUITE("backend/host_packed") {
  TEST_CASE("one hot expert leaves no thread idle, and every weight is read by one thread") {
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
              const trial got(hot_rows(tokens, hot, at_e), threads);
              got.check_readings();
              CHECK(got.spread() <= got.longest_unit(threads));
            }
  }
  TEST_CASE("experts are units where each is a small part, those with the most rows first") {
    for (const std::vector<dim>& rows : {std::vector<dim>{100, 320, 200, 0, 64, 300, 320, 310, 250, 300, 20, 150},
                                         std::vector<dim>{700, 330, 700, 100, 200, 700, 600, 640, 700, 0, 650, 600}})
      for (const int threads : {1, 2}) {
        CAPTURE(threads);
        const trial got(rows, threads);
        CHECK(got.all.work.size() == 1);
        got.check_readings();
        got.check_order();
      }
  }
  TEST_CASE_TEMPLATE("results are the same bits, however experts are cut", T, moe::bf16, std::int8_t) {
    const std::vector<dim> rows{5, 6, 7, 5, 7};
    const std::vector<float> whole = results<T, moe::arch::scalar>(rows, 1);  // experts of a chunk, each a unit
    CHECK(std::ranges::all_of(whole, [](float v) { return std::isfinite(v) && v != 0; }));
    for (const int threads : {1, 2, 8})  // experts of two chunks: units of all runs, or of one
      CHECK(results<T, low>(rows, threads) == whole);
    CHECK(results<T, low>({3, 6, 4, 16, 3}, 2) == results<T, moe::arch::scalar>({3, 6, 4, 16, 3}, 1));  // both at once
  }
  TEST_CASE("rows pass by weights that caches hold, however many there are") {
    for (const std::vector<dim>& rows : {std::vector<dim>{512, 512, 512, 512, 512, 512, 512, 512}, hot_rows(2048, 4, 3),
                                         hot_rows(2048, 5, 3), std::vector<dim>{321, 50, 1500, 320}})
      for (const int threads : {1, 8}) {
        CAPTURE(threads);
        const trial got(rows, threads, 1024, 1792);
        got.check_readings();
        CHECK(got.farthest() > 0);
        CHECK(got.farthest() <= moe::detail::near_weights);
      }
  }
}
