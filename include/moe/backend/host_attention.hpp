// SPDX-License-Identifier: Apache-2.0
/// Attention on the host: how it is cut into tiles of rows and shared between threads.
///
/// A tile is some queries of one sequence under all heads that share a key head: their rows stay in the second cache while
/// the keys that they see pass by, a step at a time. Which keys those are is a selection's to say: all (every_key), or
/// blocks (host_moba.hpp). Scratch is a tile and a step for each thread, whatever the number of keys.
#pragma once

#include "moe/backend/host_attention_gathered.hpp"

namespace moe {

/// A selection says which keys the rows of a tile meet. This one: all that its mask shows.
struct every_key {
  /// Of a tile: as many as make packing keys cheap.
  dim rows(const attention_heads&) const noexcept { return 384; }

  struct slot {};
  slot carve(const attention_problem&, attention_sizes, dim, arena&) const noexcept { return {}; }
  /// Called when the queries of a tile are there, in forward; and in backward.
  void choose(const attention_kernels&, const attention_problem&, const detail::attention_tile&, detail::attention_slot&,
              slot&) const noexcept {}
  void recall(const attention_problem&, const detail::attention_tile&, detail::attention_slot&, slot&) const noexcept {}
  /// f(range) for every step.
  template <class F>
  void for_each_step(const attention_problem&, const detail::attention_tile&, const detail::attention_slot& s, const slot&,
                     F f) const noexcept {
    const dim n = s.state.q.rows, first = s.first[0] / attention_keys * attention_keys;
    detail::for_each_key_step(first, s.end[n - 1], [&](dim key, dim keys) { f(detail::step_range{key, keys, nullptr, n}); });
  }
};

/// What attend takes from its scratch: a tile and a step for each thread, and what packed_blocks says.
template <HostBackend B, class Selection>
void count_attend(const B& backend, const attention_problem& p, attention_sizes n, const Selection& selection,
                  arena& mem) noexcept {
  const detail::attention_grid grid(p, n, selection.rows(p.heads));
  if constexpr (detail::gathers<Selection>)
    (void)detail::carve_packed_blocks(attention_kernels_of(typename B::arch{}), p, n, selection, grid.height(), mem);
  (void)detail::make_attention_slots(backend, p, n, selection, grid.rows(), mem);
}

/// q, k and v are heads of float, bf16 or f16. o[t,a] = sum over the keys j that the selection has query t meet under head a
/// of softmax_j(scale <q_t, k_j>) v_j, and lse, the log-sum-exp of the scaled scores. finish(t, a, o, lse) is told each as
/// soon as it is there, with o[dv] in memory that it may change; calls of different t, a come from different threads. A
/// query that meets no key gives o = 0, lse = -inf. Nothing is read of a key that a query does not see. Results do not
/// depend on the threads, nor on the other queries.
template <HostBackend B, HeadViews Q, HeadViews K, HeadViews V, class Selection, class Finish>
void attend(const call<B>& on, const attention_problem& p, const Q& q, const K& k, const V& v, const Selection& selection,
            Finish finish) noexcept {
  const attention_kernels kernels = attention_kernels_of(typename B::arch{});
  constexpr bool all_halves = detail::all_halves<Q, K, V>, by_halves = all_halves && !detail::gathers<Selection>;
  if constexpr (all_halves && !by_halves)
    if (kernels.meet_halves) return detail::attend_gathered(on, kernels, p, q, k, v, selection, finish);
  scratch_frame frame(on.scratch);
  const attention_sizes n{q[0].rows, k[0].rows};
  const detail::attention_grid grid(p, n, selection.rows(p.heads));
  const dim group = p.heads.group();
  const detail::slot_memory slots = detail::make_attention_slots(on.backend, p, n, selection, grid.rows(), on.scratch);
  detail::share_units(on, slots, grid.size(), [&](arena mem, auto take) {
    detail::attention_slot s = detail::carve_attention_slot(kernels, p.heads, grid.rows(), mem);
    typename Selection::slot chosen = selection.carve(p, n, grid.rows(), mem);
    [[maybe_unused]] attention_halves halves{};
    if constexpr (!detail::gathers<Selection>) halves = detail::carve_halves(kernels, p, grid.rows(), mem);
    for (dim unit; take(unit);) {
      const detail::attention_tile t = grid[unit];
      detail::start_rows(p, t, s);
      if constexpr (by_halves)
        if (kernels.attend_halves) detail::take_halves(kernels, p, t, q, halves.rows);
      if (!by_halves || !kernels.attend_halves) detail::load_queries(kernels, p, t, q, s);
      selection.choose(kernels, p, t, s, chosen);
      const auto run = [&](const detail::step_range& r, const detail::step_range& next) {
        if constexpr (by_halves)
          if (kernels.attend_halves) return kernels.attend_halves(detail::step_of_halves(t, k, v, r, next, s, halves));
        kernels.attend(detail::step_of(t, k, v, r, next, s));
      };
      detail::for_each_step_and_next(selection, p, t, s, chosen, run);
      for (dim r = 0; r < s.state.q.rows; ++r) {
        const float lse = detail::finish_row(kernels, s, r);
        finish(t.in.query + t.first + r / group, t.head * group + r % group, s.state.o.row(r), lse);
      }
    }
  });
}

/// to[a] = from[a], rounded to nearest even, for n heads.
template <HostBackend B, HeadViews X>
void round_heads(const call<B>& on, const X& from, const matrix_stack<bf16>& to, dim n) noexcept {
  for_each_token(on, to.first.rows, [&](dim t) {
    for (dim a = 0; a < n; ++a) {
      const float* x = from[a].row(t);
      bf16* half = to[a].row(t);
      for (dim j = 0; j < to.first.cols; ++j) half[j] = bf16(x[j]);
    }
  });
}

}  // namespace moe
