// SPDX-License-Identifier: Apache-2.0
/// Backward of attention on the host. As forward, in tiles of rows; each thread sums the gradients of the keys of one head
/// and one part of the queries.
#pragma once

#include "moe/backend/host_attention.hpp"
#include "moe/backend/host_rows.hpp"

namespace moe {

namespace detail {

/// Queries first .. end of a sequence.
struct attention_part {
  attention_sequence in;
  dim first, end;
};
/// How the queries of a sequence are cut for backward: each part sums its own gradients of keys and values.
struct attention_parts {
  dim count, sequences, heads;

  attention_parts(const attention_problem& p, attention_sizes n) noexcept
      : count(1), sequences(p.sequences()), heads(p.heads.kv_heads) {
    constexpr dim enough = 16, worthwhile = 512;
    dim most = 0;
    for (dim s = 0; s < sequences; ++s) {
      const dim queries = p.sequence(s, n).queries;
      most = queries > most ? queries : most;
    }
    const dim wanted = blocks(enough, sequences * heads > 0 ? sequences * heads : 1);
    count = at_most(wanted, most / worthwhile > 0 ? most / worthwhile : 1);
  }
  dim units() const noexcept { return count * sequences * heads; }
  attention_part part(const attention_sequence& in, dim i) const noexcept {
    const dim per = blocks(in.queries, count), first = at_most(in.queries, i * per);
    return {in, first, at_most(in.queries, first + per)};
  }
};
/// Sums of dk and dv, padded: of each part, key head and key.
struct attention_sums {
  matrix_view<float> dk, dv;

  attention_sums of(dim first, dim keys) const noexcept { return {dk.slice(first, keys), dv.slice(first, keys)}; }
  void clear() const noexcept {
    std::memset(dk.data, 0, static_cast<std::size_t>(dk.rows * dk.ld) * sizeof(float));
    std::memset(dv.data, 0, static_cast<std::size_t>(dv.rows * dv.ld) * sizeof(float));
  }
};
inline attention_sums carve_attention_sums(const attention_kernels& k, const attention_problem& p, dim parts, dim keys,
                                           arena& mem) noexcept {
  const dim rows = parts * p.heads.kv_heads * keys;
  return {mem.matrix<float>("dk", rows, round_up(p.heads.d, k.columns)),
          mem.matrix<float>("dv", rows, round_up(p.heads.dv, k.columns))};
}

/// Memory of one thread at work on tiles of backward.
struct attention_backward_slot : attention_slot {
  matrix_view<float> dq;
  float *ds, *packed_rows, *turned;
};
inline attention_backward_slot carve_attention_backward_slot(const attention_kernels& k, const attention_heads& h, dim rows,
                                                             arena& mem) noexcept {
  const dim d = round_up(h.d, k.columns), dv = round_up(h.dv, k.columns);
  attention_backward_slot s{carve_attention_slot(k, h, rows, mem), {}, nullptr, nullptr, nullptr};
  s.dq = mem.matrix<float>("dq", rows, d);
  s.ds = mem.matrix<float>("ds", rows, attention_pitch).data;
  s.packed_rows = mem.matrix<float>("packed_rows", rows, d > dv ? d : dv).data;
  s.turned = mem.matrix<float>("turned", attention_keys, arch::detail::outer_depth).data;
  return s;
}

/// What a step on halves takes in backward, where the level has them.
inline attention_halves carve_backward_halves(const attention_kernels& k, const attention_problem& p, dim rows,
                                              arena& mem) noexcept {
  const attention_heads& h = p.heads;
  attention_halves b = carve_halves(k, p, rows, mem);
  if (!k.backward_halves) return b;
  constexpr dim pair = 32;
  const auto block = [&](const char* name, dim n, dim width) { return carve_blocks_of_halves(name, n, width, mem); };
  b.gradients = block("gradients", rows, h.dv);
  b.key_rows = block("key_rows", attention_keys, h.d);
  b.row_pairs = block("row_pairs", round_up(rows, pair), h.d);
  b.gradient_pairs = block("gradient_pairs", round_up(rows, pair), h.dv);
  b.turned = block("turned", 2 * attention_keys, round_up(rows, pair));
  return b;
}

/// What backward reads of a tile's rows: the gradient of the output, the log2-sum and delta; dq is cleared.
template <HeadViews DO>
void start_gradients(const attention_kernels& k, const attention_tile& t, dim group, const DO& dout,
                     matrix_view<const float> lse, matrix_view<const float> delta, attention_backward_slot& s) noexcept {
  for (dim r = 0; r < s.state.q.rows; ++r) {
    const dim token = t.in.query + t.first + r / group, a = t.head * group + r % group;
    load_floats(k, dout[a].slice(token, 1), s.state.o.row(r));
    s.state.largest[r] = lse(token, a) == -infinity ? infinity : lse(token, a) * log2_e;
    s.state.sum[r] = delta(token, a);
  }
  s.dq.rows = s.state.q.rows;
  std::memset(s.dq.data, 0, static_cast<std::size_t>(s.dq.rows * s.dq.ld) * sizeof(float));
}
/// The same as halves: queries, unscaled, and the gradients that start_gradients loaded.
template <HeadViews Q>
void take_gradient_halves(const attention_kernels& k, const attention_problem& p, const attention_tile& t, const Q& q,
                          const attention_backward_slot& s, attention_halves& b) noexcept {
  take_halves(k, p, t, q, b.rows);
  for (dim r = 0; r < s.state.o.rows; ++r) k.round_halves(s.state.o.row(r), p.heads.dv, r, b.gradients);
  b.paired = false;
}
template <HostBackend B, class Selection>
slot_memory make_attention_backward_slots(const B& backend, const attention_problem& p, attention_sizes n,
                                          const Selection& selection, dim rows, arena& mem) noexcept {
  return make_slots(backend, mem, [&](arena& a) {
    const attention_kernels k = attention_kernels_of(typename B::arch{});
    (void)carve_attention_backward_slot(k, p.heads, rows, a);
    (void)selection.carve(p, n, rows, a);
    (void)carve_backward_halves(k, p, rows, a);
  });
}
/// dk, scaled, and dv from the sums of all parts, in order.
template <HostBackend B>
void add_parts(const call<B>& on, const attention_parts& parts, const attention_sums& sums, float scale,
               matrix_stack<float> dk, matrix_stack<float> dv) noexcept {
  const dim keys = dk.first.rows;
  for_each_token(on, keys, [&](dim key) {
    for (dim g = 0; g < parts.heads; ++g) {
      float *to_k = dk[g].row(key), *to_v = dv[g].row(key);
      for (dim part = 0; part < parts.count; ++part) {
        const dim row = (part * parts.heads + g) * keys + key;
        for (dim j = 0; j < dk.first.cols; ++j) to_k[j] = (part > 0 ? to_k[j] : 0.f) + scale * sums.dk(row, j);
        for (dim j = 0; j < dv.first.cols; ++j) to_v[j] = (part > 0 ? to_v[j] : 0.f) + sums.dv(row, j);
      }
    }
  });
}

}  // namespace detail

/// What attend_backward takes from its scratch: (d + dv) floats, padded, for each key and key head and part of the
/// queries (1, or at most 16 where key heads and sequences are few), and a tile for each thread.
template <HostBackend B, class Selection>
void count_attend_backward(const B& backend, const attention_problem& p, attention_sizes n, const Selection& selection,
                           arena& mem) noexcept {
  const attention_kernels k = attention_kernels_of(typename B::arch{});
  (void)detail::carve_attention_sums(k, p, detail::attention_parts(p, n).count, n.keys, mem);
  (void)detail::make_attention_backward_slots(backend, p, n, selection,
                                              detail::attention_grid(p, n, selection.rows(p.heads) / 2).rows(), mem);
}

/// Whether attend_backward rounds dout to bf16 before it multiplies: where q, k and v are bf16 and the level multiplies
/// bf16.
template <HostBackend B, HeadViews Q, HeadViews K, HeadViews V>
bool rounds_gradients(const B&, const Q&, const K&, const V&) noexcept {
  return detail::all_halves<Q, K, V> && attention_kernels_of(typename B::arch{}).backward_halves;
}
/// delta[t,a] = <do, o> of token t under head a; of the rounded do where attend_backward rounds it, so that the terms of a
/// query that sees few keys cancel as they should. With a gate after attention, y' = y g, the gated tensors give the same:
/// <dy, y> = <dy', y'>.
template <HostBackend B, HeadViews DO, HeadViews O>
void attention_delta(const call<B>& on, const attention_heads& h, const DO& dout, const O& o, matrix_view<float> delta,
                     bool rounded = false) noexcept {
  for_each_token(on, delta.rows, [=](dim t) {
    for (dim a = 0; a < h.heads; ++a) {
      const auto* x = dout[a].row(t);
      const auto* y = o[a].row(t);
      const auto term = [=](dim j, float dy) { return dy * static_cast<float>(y[j]); };
      delta(t, a) =
          rounded ? detail::sum_of(h.dv, [&](dim j) { return term(j, static_cast<float>(bf16(static_cast<float>(x[j])))); })
                  : detail::sum_of(h.dv, [&](dim j) { return term(j, static_cast<float>(x[j])); });
    }
  });
}

/// Gradients of attend, from its lse[T,h] and delta[T,h] = <do, o>; dq, dk and dv are overwritten. A selection carries no
/// gradient. Results do not depend on the threads.
template <HostBackend B, HeadViews Q, HeadViews K, HeadViews V, class Selection, HeadViews DO, HeadViews DQ>
void attend_backward(const call<B>& on, const attention_problem& p, const Q& q, const K& k, const V& v,
                     const Selection& selection, const DO& dout, matrix_view<const float> lse,
                     matrix_view<const float> delta, const DQ& dq, matrix_stack<float> dk, matrix_stack<float> dv) noexcept {
  scratch_frame frame(on.scratch);
  const attention_kernels kernels = attention_kernels_of(typename B::arch{});
  const attention_sizes n{q[0].rows, k[0].rows};
  const detail::attention_grid grid(p, n, selection.rows(p.heads) / 2);
  const detail::attention_parts parts(p, n);
  const detail::attention_sums sums = detail::carve_attention_sums(kernels, p, parts.count, n.keys, on.scratch);
  const detail::slot_memory slots =
      detail::make_attention_backward_slots(on.backend, p, n, selection, grid.rows(), on.scratch);
  const bool on_halves = rounds_gradients(on.backend, q, k, v);
  detail::share_units(on, slots, parts.units(), [&](arena mem, auto take) {
    detail::attention_backward_slot s = detail::carve_attention_backward_slot(kernels, p.heads, grid.rows(), mem);
    typename Selection::slot chosen = selection.carve(p, n, grid.rows(), mem);
    [[maybe_unused]] attention_halves halves = detail::carve_backward_halves(kernels, p, grid.rows(), mem);
    for (dim unit; take(unit);) {
      const dim g = unit % parts.heads, part = parts.count - 1 - unit / parts.heads % parts.count, group = p.heads.group();
      const detail::attention_part of = parts.part(p.sequence(unit / (parts.heads * parts.count), n), part);
      const detail::attention_sums own = sums.of((part * parts.heads + g) * n.keys + of.in.key, of.in.keys);
      own.clear();
      for (dim first = of.first; first < of.end; first += grid.height()) {
        const detail::attention_tile t{of.in, g, first, detail::at_most(of.end - first, grid.height())};
        detail::start_rows(p, t, s);
        if (!on_halves) detail::load_queries(kernels, p, t, q, s);
        detail::start_gradients(kernels, t, group, dout, lse, delta, s);
        selection.recall(p, t, s, chosen);
        if constexpr (detail::all_halves<Q, K, V>)
          if (on_halves) detail::take_gradient_halves(kernels, p, t, q, s, halves);
        const auto run = [&](const detail::step_range& r, const detail::step_range& next) {
          const auto with = [&](const attention_step& step) -> attention_backward_step {
            return {step, s.dq, own.dk.slice(r.key, r.keys), own.dv.slice(r.key, r.keys), s.ds, s.packed_rows, s.turned};
          };
          if constexpr (detail::all_halves<Q, K, V>)
            if (on_halves) return kernels.backward_halves(with(detail::step_of_halves(t, k, v, r, {}, s, halves)));
          kernels.backward(with(detail::step_of(t, k, v, r, next, s)));
        };
        detail::for_each_step_and_next(selection, p, t, s, chosen, run);
        for (dim r = 0; r < s.dq.rows; ++r) {
          float* row = dq[g * group + r % group].row(of.in.query + first + r / group);
          for (dim j = 0; j < p.heads.d; ++j) row[j] = p.score_scale() * s.dq(r, j);
        }
      }
    }
  });
  detail::add_parts(on, parts, sums, on_halves ? p.score_scale() : detail::ln_2, dk, dv);
}

}  // namespace moe
