// SPDX-License-Identifier: Apache-2.0
#include <doctest/doctest.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <type_traits>
#include <vector>

#include "moe/backend/executor/thread_pool.hpp"
#include "moe/backend/scalar.hpp"
#include "moe/core/executor.hpp"
#include "moe/core/rng.hpp"

using namespace moe;

namespace {

/// An executor of a user: the ranges in an order of its own, cut smaller than it was asked to.
struct shuffled {
  std::uint64_t seed = 0;

  static constexpr int concurrency() noexcept { return 1; }
  template <class F>
  void for_each(dim n, dim grain, F&& f) const {
    const dim cut = grain > 1 ? grain - 1 : 1;
    std::vector<dim> starts;
    for (dim first = 0; first < n; first += cut) starts.push_back(first);
    const auto key = [&](dim first) { return rng(seed)(static_cast<std::uint64_t>(first)); };
    std::sort(starts.begin(), starts.end(), [&](dim a, dim b) { return key(a) < key(b); });
    for (const dim first : starts) f(first, std::min(first + cut, n));
  }
};

static_assert(Executor<serial> && Executor<default_executor> && Executor<shuffled>);
static_assert(Executor<thread_pool> && Executor<pool_executor>);
static_assert(std::is_trivially_copyable_v<pool_executor> && sizeof(pool_executor) == sizeof(void*));
static_assert(!std::is_constructible_v<pool_executor, thread_pool>, "a temporary pool would be gone");
static_assert(!std::is_copy_constructible_v<thread_pool>);
static_assert(std::is_default_constructible_v<scalar<>> && !std::is_default_constructible_v<scalar<pool_executor>>);

/// Every index once, in ranges that are not empty and not above the grain.
template <Executor X>
void check_contract(const X& executor) {
  CHECK(executor.concurrency() >= 1);
  for (const dim n : {1, 2, 7, 64, 1000})
    for (const dim grain : {1, 3, 64, 5000}) {
      std::vector<std::atomic<int>> visits(static_cast<std::size_t>(n));
      std::atomic<int> bad = 0;
      executor.for_each(n, grain, [&](dim first, dim last) {
        bad += !(0 <= first && first < last && last <= n && last - first <= grain);
        for (dim i = first; i < last; ++i) ++visits[static_cast<std::size_t>(i)];
      });
      CAPTURE(n);
      CAPTURE(grain);
      CHECK(bad == 0);
      CHECK(std::all_of(visits.begin(), visits.end(), [](const auto& v) { return v == 1; }));
    }
  int calls = 0;
  executor.for_each(0, 1, [&](dim, dim) { ++calls; });
  CHECK(calls == 0);
}

dim sum_of_indices(const thread_pool& pool, dim n) {
  std::atomic<dim> sum = 0;
  pool.for_each(n, 1, [&](dim first, dim) { sum += first; });
  return sum;
}

/// Waits for the others of a party, or gives up after ten seconds.
class meeting {
 public:
  explicit meeting(int guests) : missing_(guests) {}
  bool join() {
    --missing_;
    const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(10);
    while (missing_ > 0 && std::chrono::steady_clock::now() < end) std::this_thread::yield();
    return missing_ == 0;
  }

 private:
  std::atomic<int> missing_;
};

void pause(int milliseconds) { std::this_thread::sleep_for(std::chrono::milliseconds(milliseconds)); }

}  // namespace

TEST_SUITE("core/executor") {
  TEST_CASE("every executor calls each index once, in ranges up to the grain") {
    SUBCASE("serial") { check_contract(serial{}); }
#if defined(_OPENMP)
    SUBCASE("OpenMP") { check_contract(openmp{}); }
#endif
    SUBCASE("a user's own") { check_contract(shuffled{.seed = 3}); }
    SUBCASE("a pool of one") { check_contract(thread_pool(1)); }
    SUBCASE("a pool of as many threads as there are") { check_contract(thread_pool()); }
    SUBCASE("a pool of too many threads") { check_contract(thread_pool(7)); }
    SUBCASE("a pool by reference") {
      const thread_pool pool(3);
      check_contract(pool_executor(pool));
    }
  }
  TEST_CASE("serial goes through the indices in order, on the calling thread") {
    std::vector<dim> ends;
    serial{}.for_each(10, 4, [&](dim first, dim last) {
      ends.push_back(first);
      ends.push_back(last);
    });
    CHECK(ends == std::vector<dim>{0, 4, 4, 8, 8, 10});
  }
}

TEST_SUITE("backend/executor/thread_pool") {
  TEST_CASE("all its threads work at once, the caller among them") {
    const thread_pool pool(3);
    meeting all(3);
    std::array<std::thread::id, 3> who;
    std::atomic<int> met = 0;
    pool.for_each(3, 1, [&](dim i, dim) {
      met += all.join();
      who[static_cast<std::size_t>(i)] = std::this_thread::get_id();
    });
    CHECK(met == 3);
    CHECK(std::set(who.begin(), who.end()).size() == 3);
    CHECK(std::count(who.begin(), who.end(), std::this_thread::get_id()) == 1);
  }
  TEST_CASE("it never uses more threads than it was given") {
    const thread_pool pool(2);
    CHECK(pool.concurrency() == 2);
    std::mutex lock;
    std::set<std::thread::id> who;
    for (int run = 0; run < 50; ++run)
      pool.for_each(20, 1, [&](dim, dim) {
        const std::lock_guard guard(lock);
        who.insert(std::this_thread::get_id());
      });
    CHECK(who.size() <= 2);
  }
  TEST_CASE("without a number it has as many threads as the machine") {
    CHECK(thread_pool().concurrency() == std::max(1, static_cast<int>(std::thread::hardware_concurrency())));
  }
  TEST_CASE("fewer than one thread is refused") {
    CHECK_THROWS_WITH_AS(thread_pool(0), "thread_pool: threads is 0, expected at least 1", shape_error);
    CHECK_THROWS_AS(thread_pool(-2), shape_error);
  }
  TEST_CASE("inside a task for_each runs serially on the same thread, of whatever pool") {
    const thread_pool outer(3), inner(2);
    std::atomic<int> elsewhere = 0;
    std::atomic<dim> sum = 0;
    outer.for_each(8, 1, [&](dim, dim) {
      const auto here = std::this_thread::get_id();
      for (const thread_pool* pool : {&outer, &inner})
        pool->for_each(10, 2, [&](dim first, dim last) {
          elsewhere += std::this_thread::get_id() != here;
          for (dim i = first; i < last; ++i) sum += i;
        });
    });
    CHECK(elsewhere == 0);
    CHECK(sum == 8 * 2 * 45);
    CHECK(sum_of_indices(inner, 100) == 4950);  // and in parallel again afterwards
  }
  TEST_CASE("threads of the program take turns") {
    const thread_pool pool(2);
    std::atomic<int> running = 0, most = 0, wrong = 0;
    std::vector<std::thread> hosts;
    for (int h = 0; h < 4; ++h)
      hosts.emplace_back([&] {
        for (int run = 0; run < 100; ++run) {
          std::atomic<dim> sum = 0;
          pool.for_each(16, 1, [&](dim first, dim) {
            const int now = ++running;
            for (int seen = most; now > seen && !most.compare_exchange_weak(seen, now);) {
            }
            sum += first;
            std::this_thread::yield();  // lets another host in, were there no turns
            --running;
          });
          wrong += sum != 120;
        }
      });
    for (auto& h : hosts) h.join();
    CHECK(wrong == 0);
    CHECK(most >= 1);
    CHECK(most <= 2);
  }
  TEST_CASE("many short calls in a row are each complete on return") {
    const thread_pool pool(4);
    int wrong = 0;
    for (dim n = 0; n < 3000; ++n) wrong += sum_of_indices(pool, n % 9) != (n % 9) * (n % 9 - 1) / 2;
    CHECK(wrong == 0);
  }
  TEST_CASE("what a task wrote is there on return, without an atomic of the caller") {
    const thread_pool pool(3);
    std::vector<int> v(512);
    for (int run = 1; run <= 100; ++run)
      pool.for_each(512, 16, [&](dim first, dim last) {
        for (dim i = first; i < last; ++i) ++v[static_cast<std::size_t>(i)];
      });
    CHECK(v == std::vector<int>(512, 100));
  }
  TEST_CASE("sleeping threads wake for work, and a caller that waited long enough to sleep wakes at the end") {
    const thread_pool pool(2);
    for (int run = 0; run < 5; ++run) {
      pause(2);  // the workers are asleep
      meeting both(2);
      std::atomic<int> met = 0;
      pool.for_each(2, 1, [&](dim, dim) { met += both.join(); });
      CHECK(met == 2);
      const auto caller = std::this_thread::get_id();
      std::atomic<bool> done = false;
      meeting start(2);
      pool.for_each(2, 1, [&](dim, dim) {
        start.join();
        if (std::this_thread::get_id() == caller) return;
        pause(3);  // the caller is asleep
        done = true;
      });
      CHECK(done);
    }
  }
  TEST_CASE("it ends while its threads start, spin or sleep") {
    dim sum = 0;
    for (int run = 0; run < 30; ++run) {
      const thread_pool pool(4);
      if (run % 3 > 0) sum += sum_of_indices(pool, 10);
      if (run % 3 > 1) pause(1);
    }
    CHECK(sum == 20 * 45);
  }
  TEST_CASE("a backend holds it by value") {
    const thread_pool pool(2);
    const scalar<pool_executor> backend{pool}, copy = backend;
    CHECK(copy.executor().concurrency() == 2);
    std::atomic<dim> sum = 0;
    copy.executor().for_each(10, 1, [&](dim first, dim) { sum += first; });
    CHECK(sum == 45);
  }
  TEST_CASE("tasks may be functions, constant function objects and objects that cannot be copied") {
    const thread_pool pool(2);
    static std::atomic<dim> total;
    total = 0;
    struct counter {
      counter() = default;
      counter(const counter&) = delete;
      void operator()(dim first, dim last) const { total += last - first; }
    };
    const counter count;
    pool.for_each(10, 3, count);
    void (*const function)(dim, dim) = [](dim first, dim last) { total += last - first; };
    pool.for_each(10, 3, function);
    pool.for_each(10, 3, *function);
    CHECK(total == 30);
  }
}
