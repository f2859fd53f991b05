// SPDX-License-Identifier: Apache-2.0
/// What follows a part of a result without a join: the thread that finishes the last unit of the part goes on with it.
/// Nobody waits, so any executor will do; and whoever goes on reads what is final, so results do not depend on who that is.
/// And what comes before one: whoever needs it first begins with it, who comes meanwhile helps.
#pragma once

#include <atomic>

#include "moe/backend/host_backend.hpp"

namespace moe::detail {

/// Counts the finished units of each part of a result.
class countdown {
 public:
  static constexpr dim most = 64;  ///< parts

  /// One more of the `units` of a part is done. True once a part: for the last, which sees what all others wrote.
  bool is_last(dim part, dim units) noexcept { return done_[part].fetch_add(1, std::memory_order_acq_rel) + 1 == units; }

 private:
  std::atomic<dim> done_[most] = {};
};

/// A result of many columns in stripes, the parts that are finished one after another: units of work are (stripe, chunk of
/// rows, piece of columns), the first of them outermost. What follows the last stripe is done by one thread alone, so
/// stripes become narrower towards the end, as long as a stripe is worth it.
class column_stripes {
 public:
  struct unit { dim stripe, chunk, piece; };

  /// For `chunks` of `rows` rows in all, and so many pieces of `columns` columns.
  column_stripes(dim chunks, dim rows, dim pieces, dim columns) noexcept : chunks_(chunks) {
    constexpr dim wide = 256, worthwhile = 1 << 16;
    const dim least = at_least_one(worthwhile / (at_least_one(rows) * columns));
    dim widest = at_least_one(wide / columns);
    if (widest < 4 * least) widest = 4 * least;
    if (const dim few = blocks(pieces, countdown::most / 2); widest < few) widest = few;
    for (dim left = pieces; left > 0; first_[++count_] = pieces - left) {
      dim n = blocks(left, 2);
      if (n < least) n = least;
      left -= at_most(at_most(n, widest), left);
    }
  }
  dim units() const noexcept { return chunks_ * first_[count_]; }
  unit operator[](dim i) const noexcept {
    dim s = 0;
    while (i >= chunks_ * first_[s + 1]) ++s;
    const dim within = i - chunks_ * first_[s], n = pieces(s);
    return {s, within / n, first_[s] + within % n};
  }
  dim first(dim stripe) const noexcept { return first_[stripe]; }  ///< piece
  dim pieces(dim stripe) const noexcept { return first_[stripe + 1] - first_[stripe]; }
  dim units(dim stripe) const noexcept { return chunks_ * pieces(stripe); }

 private:
  static dim at_least_one(dim n) noexcept { return n > 1 ? n : 1; }

  dim chunks_, count_ = 0, first_[countdown::most + 1] = {};
};

/// How far a step is that units of another need.
struct helpers {
  std::atomic<dim> next{0};
  std::atomic<int> finished{0};
};
/// The executor of that step: who needs it calls for_each with it, as often as need be, does what nobody has begun, and goes on
/// when all is done. It waits only for units that somebody is at.
struct helping {
  helpers* all;

  static constexpr int concurrency() noexcept { return 1; }
  template <class F>
  void for_each(dim n, dim grain, F&& f) const noexcept {
    const auto units = static_cast<int>(blocks(n, grain));
    for (dim i; (i = all->next.fetch_add(1, std::memory_order_relaxed)) < units;) {
      f(i * grain, at_most((i + 1) * grain, n));
      if (all->finished.fetch_add(1, std::memory_order_acq_rel) + 1 == units) all->finished.notify_all();
    }
    for (int seen; (seen = all->finished.load(std::memory_order_acquire)) < units;)
      all->finished.wait(seen, std::memory_order_acquire);
  }
};
/// step(call) by all that come to it: one step, without scratch.
template <HostBackend B, class Step>
void with_helpers(const call<B>& on, helpers& all, Step step) noexcept {
  arena none;
  const host_backend<typename B::arch, helping> backend{helping{&all}};
  step(call<host_backend<typename B::arch, helping>>{backend, none, on.sizes, on.training, on.rng});
}

}  // namespace moe::detail
