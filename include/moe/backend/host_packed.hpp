// SPDX-License-Identifier: Apache-2.0
/// Feed-forward experts with packed weights on the host: how their products are cut and shared between threads.
///
/// Every weight belongs to one unit of work: one thread reads it from memory, once, and all rows of its expert pass by. Many
/// rows that fit beside weights in the second cache, a chunk: a unit is an expert, through both products, so that rows are
/// gathered and converted once and the activation stays near. Few rows in all: a unit is a run of panels of one expert, so
/// that one expert feeds all threads; the activation is shared in between. More rows than a chunk: chunks pass one after
/// another by a run of panels that caches hold meanwhile; an expert that is a small part of all work is a unit again, run
/// after run. Experts with the most rows begin first.
/// Each element of a result is computed in the same way in all, so results depend neither on the cut nor on the threads.
#pragma once

#include <atomic>
#include <limits>
#include <new>

#include "moe/backend/host_ffn.hpp"
#include "moe/backend/host_parts.hpp"
#include "moe/backend/host_slots.hpp"
#include "moe/backend/packed_kernels.hpp"

namespace moe {

namespace detail {

inline constexpr dim panels_at_once = 8;
inline constexpr dim near_weights = dim{4} << 20;  ///< bytes: a core's part of second and last caches, mostly
inline constexpr dim units_each = 4;               ///< at least, of a thread, where an expert or a chunk of it is a unit
inline constexpr dim many_results = dim{1} << 20;  ///< floats, more than second caches hold

/// Memory of one thread at work.
struct packed_slot {
  prepared_rows x, a;
  std::byte* row = nullptr;   ///< one of them, before it is laid out
  matrix_view<float> hidden;  ///< what `a` is made of, where that takes a whole row
  matrix_view<float> c;       ///< sums of panels_at_once panels
  std::byte* wide = nullptr;
  dim ready = -1;  ///< the chunk whose rows are prepared
};

/// Tokens in the form in which products read them. The first thread that needs one of them converts it; who comes while it
/// does converts a copy of its own, so nobody waits.
struct packed_tokens {
  enum step : std::uint8_t { as_given, in_work, ready };
  prepared_rows rows;  ///< none where a token is needed once, or as it is
  std::atomic<std::uint8_t>* state = nullptr;

  void reset() const noexcept {
    for (dim t = 0; t < rows.rows; ++t) new (state + t) std::atomic<std::uint8_t>(as_given);
  }
  /// Whether token t is there now; convert() makes it, at most once.
  template <class F>
  bool have(dim t, F convert) const noexcept {
    std::uint8_t now = state[t].load(std::memory_order_acquire);
    if (now == as_given && state[t].compare_exchange_strong(now, in_work, std::memory_order_acquire)) {
      convert();
      state[t].store(ready, std::memory_order_release);
      return true;
    }
    return now == ready;
  }
  void copy(dim t, const prepared_rows& to, dim r) const noexcept {
    to.take(r, rows.block(t), 0, rows.lines);
    std::memcpy(to.factor(r), rows.factor(t), static_cast<std::size_t>(rows.factor_count) * sizeof(float));
  }
};

/// Sizes of a product's work, and its memory: a slot for each thread, the activations that few rows share, and the tokens.
struct packed_scratch {
  slot_memory slots;
  matrix_view<float> a;        ///< [rows, f], then a chunk after another as prepared rows in the same place
  matrix_view<float> factors;  ///< of those
  std::span<std::int32_t> done;  ///< finished runs of each chunk: memory of counters
  std::span<idx> order;          ///< experts, in the order in which they are worked on
  packed_tokens tokens;
};

inline prepared_rows carve_rows(const packed_kernels& k, dim rows, dim padded, arena& mem) noexcept {
  prepared_rows p;
  p.lines = k.lines(padded);
  p.height = 1;
  p.stretch = p.lines;
  p.factor_count = k.factor_count(padded);
  p.data = reinterpret_cast<std::byte*>(mem.matrix<std::int8_t>("rows", rows, p.lines * line_bytes).data);
  p.factors = mem.matrix<float>("factors", rows, p.factor_count).data;
  return p;
}
template <class T>
packed_slot carve_slot(const packed_kernels& k, shape s, dim rows, arena& mem) noexcept {
  const dim d = round_up(s.d, packing<T>::depth), f = round_up(s.f, packing<T>::depth),
            chunk = at_most(rows, k.chunk);
  packed_slot slot;
  slot.x = carve_rows(k, chunk, d, mem);
  slot.a = carve_rows(k, chunk, f, mem);
  slot.row = reinterpret_cast<std::byte*>(mem.vector<std::int8_t>("row", k.lines(d > f ? d : f) * line_bytes).data());
  slot.hidden = mem.matrix<float>("hidden", k.activations == operand::i8 ? chunk : 0, s.f);
  // A line between rows: with a power of two from row to row their sums would meet in a few sets of the first cache.
  slot.c = mem.matrix<float>("c", chunk, panels_at_once * panel_rows + 16).columns(0, panels_at_once * panel_rows);
  slot.wide = reinterpret_cast<std::byte*>(mem.vector<std::int8_t>("wide", k.scratch_per_k * (d > f ? d : f)).data());
  return slot;
}
template <class T, HostBackend B>
packed_scratch make_packed_scratch(const B& backend, shape s, dim rows, arena& mem) noexcept {
  const packed_kernels k = kernels_of(typename B::arch{}, arch::weights_of<T>{});
  packed_scratch p;
  p.slots = make_slots(backend, mem, [&](arena& a) { (void)carve_slot<T>(k, s, rows, a); });
  const dim f = round_up(s.f, packing<T>::depth);
  p.a = mem.matrix<float>("a", rows, f).columns(0, s.f);
  p.factors = mem.matrix<float>("a_factors", rows, k.factor_count(f));
  p.done = mem.vector<std::int32_t>("done", s.experts + rows / k.chunk);
  p.order = mem.vector<idx>("order", s.experts);
  if (k.activations == operand::f32 || rows <= s.tokens) return p;
  p.tokens.rows = carve_rows(k, s.tokens, round_up(s.d, packing<T>::depth), mem);
  p.tokens.rows.rows = s.tokens;
  p.tokens.state = reinterpret_cast<std::atomic<std::uint8_t>*>(mem.vector<std::int8_t>("state", s.tokens).data());
  return p;
}

/// Rows of an expert that are prepared together.
struct chunk_of_rows {
  dim id, first, rows;
};

/// The products of one call.
template <HostBackend B, class T, class Form>
struct packed_ffn_work {
  const call<B>& on;
  const bank_rows& rows;
  gathered<float> x;
  const Form& form;
  const packed_matrix<T>&up, &down;           ///< gated forms: panels of gate and up in turn
  std::span<const float> up_bias, down_bias;  ///< as the panels' rows, or empty
  matrix_view<float> ys;
  const packed_scratch& memory;
  packed_kernels kernels;

  static constexpr dim together = Form::gated ? 2 : 1;
  dim f() const noexcept { return on.sizes.f; }
  dim d() const noexcept { return on.sizes.d; }
  dim hidden_panels() const noexcept { return panels_of(f()); }
  dim output_panels() const noexcept { return panels_of(d()); }

  packed_slot slot(dim s) const noexcept {
    arena mem = memory.slots[s];
    return carve_slot<T>(kernels, on.sizes, memory.a.rows, mem);
  }
  void prepare(const float* from, dim k, std::byte* to, float* factors) const noexcept {
    kernels.prepare(from, k, to, factors, kernels.sums_of_32);
  }
  void prepare_tokens(packed_slot& s, chunk_of_rows c) const noexcept {
    if (s.ready == c.id) return;
    s.ready = c.id;
    kernels.lay_out(s.x, c.rows);
    const packed_tokens& tokens = memory.tokens;
    for (dim r = 0; r < c.rows; ++r) {
      const dim t = x.token && tokens.rows.rows > 0 ? dim{x.token[c.first + r]} : -1;
      const float* token = x.row(c.first + r);
      if (t >= 0 && tokens.have(t, [&] { prepare(token, d(), tokens.rows.block(t), tokens.rows.factor(t)); })) {
        tokens.copy(t, s.x, r);
      } else {
        prepare(token, d(), s.row, s.x.factor(r));
        s.x.take(r, s.row, 0, s.x.lines);
      }
    }
  }
  void prepare_hidden(packed_slot& s, matrix_view<const float> a) const noexcept {
    kernels.lay_out(s.a, a.rows);
    for (dim r = 0; r < a.rows; ++r) {
      prepare(a.row(r), f(), s.row, s.a.factor(r));
      s.a.take(r, s.row, 0, s.a.lines);
    }
  }
  /// The prepared rows of a chunk in the place of its activations.
  prepared_rows shared_hidden(chunk_of_rows c, prepared_rows like) const noexcept {
    kernels.lay_out(like, c.rows);
    like.data = reinterpret_cast<std::byte*>(memory.a.row(c.first));
    like.factors = memory.factors.row(c.first);
    return like;
  }
  void share_hidden(packed_slot& s, chunk_of_rows c, matrix_view<const float> a) const noexcept {
    prepare_hidden(s, a);
    const prepared_rows to = shared_hidden(c, s.a);
    std::memcpy(to.data, s.a.data, static_cast<std::size_t>(c.rows * s.a.lines * line_bytes));
    std::memcpy(to.factors, s.a.factors, static_cast<std::size_t>(c.rows * s.a.factor_count) * sizeof(float));
  }
  void multiply(const packed_slot& s, const prepared_rows& a, const packed_matrix<T>& w, std::span<const float> bias,
                dim first, dim n, matrix_view<float> c) const noexcept {
    kernels.multiply(a, {reinterpret_cast<const std::byte*>(w.panel(first)), packed_matrix<T>::panel_bytes(w.cols), n,
                         w.panel_scale(first), s.wide, c});
    if (bias.empty()) return;
    for (dim r = 0; r < c.rows; ++r) axpy(typename B::arch{}, 1.f, bias.data() + first * panel_rows, c.row(r), n * panel_rows);
  }
  /// a = form(up x) of hidden panels p .. last: of the prepared rows, into floats or straight into rows prepared for `down`.
  template <class To>
  void up_panels(packed_slot& s, dim e, dim p, dim last, const To& a) const noexcept {
    for (dim n; p < last; p += n) {
      n = at_most(last - p, panels_at_once / together);
      multiply(s, s.x, up, up_bias, (e * hidden_panels() + p) * together, n * together, s.c.slice(0, s.x.rows));
      activate_panels(s, p, n, a);
    }
  }
  void activate_panels(packed_slot& s, dim first, dim n, matrix_view<float> a) const noexcept {
    for (dim r = 0; r < s.x.rows; ++r) activate_panels(s.c.row(r), first, n, a.row(r) + first * panel_rows);
  }
  void activate_panels(packed_slot& s, dim first, dim n, const prepared_rows& to) const noexcept {
    const dim depth = line_depth(kernels.activations), line = first * panel_rows / depth;
    const dim lines = at_most(to.lines - line, n * panel_rows / depth);
    float a[panels_at_once * panel_rows] = {};
    for (dim r = 0; r < s.x.rows; ++r) {
      activate_panels(s.c.row(r), first, n, a);
      prepare(a, lines * depth, s.row, nullptr);
      to.take(r, s.row, line, lines);
    }
  }
  void activate_panels(const float* z, dim first, dim n, float* a) const noexcept {
    for (dim i = 0; i < n; ++i, z += together * panel_rows, a += panel_rows)
      activate(typename B::arch{}, form, z, Form::gated ? z + panel_rows : z, a,
               at_most(f() - (first + i) * panel_rows, panel_rows));
  }
  /// Output panels p .. last of rows that begin at `row`.
  void down_panels(packed_slot& s, const prepared_rows& a, dim e, dim row, dim p, dim last) const noexcept {
    for (dim n; p < last; p += n) {
      n = at_most(last - p, panels_at_once);
      const dim column = p * panel_rows, width = at_most(d() - column, n * panel_rows);
      const matrix_view<float> to = ys.slice(row, a.rows).columns(column, width), near = s.c.slice(0, a.rows);
      const bool in_place = kernels.writes_once && width == n * panel_rows;
      multiply(s, a, down, down_bias, e * output_panels() + p, n, in_place ? to : near);
      if (in_place) continue;
      if (kernels.stream && ys.rows * ys.cols >= many_results) {
        kernels.stream(near.columns(0, width), to);
        continue;
      }
      for (dim r = 0; r < to.rows; ++r) std::memcpy(to.row(r), near.row(r), static_cast<std::size_t>(width) * sizeof(float));
    }
  }

  dim at(dim e) const noexcept { return rows.offsets[static_cast<std::size_t>(e)]; }
  dim rows_of(dim e) const noexcept { return at(e + 1) - at(e); }
  dim chunks_of(dim e) const noexcept { return blocks(rows_of(e), kernels.chunk); }
  /// Experts that have rows, those with the most first: what is begun last is soon over. Returns their number.
  dim set_order() const noexcept {
    idx* order = memory.order.data();
    dim n = 0;
    for (dim e = 0; e < rows.experts(); ++e) {
      if (rows_of(e) == 0) continue;
      dim i = n++;
      for (; i > 0 && rows_of(order[i - 1]) < rows_of(e); --i) order[i] = order[i - 1];
      order[i] = static_cast<idx>(e);
    }
    return n;
  }
  dim in_order(dim i) const noexcept { return memory.order[static_cast<std::size_t>(i)]; }
  /// The i-th of an expert's chunks, which are of nearly equal height.
  chunk_of_rows chunk(dim e, dim i) const noexcept {
    const dim height = blocks(rows_of(e), chunks_of(e)), first = at(e) + i * height;
    return {e + at(e) / kernels.chunk + i, first, at_most(at(e + 1) - first, height)};
  }
  /// f(chunk) for all of them: odd runs begin with the chunk that the one before ended with, whose rows are prepared.
  template <class F>
  void for_chunks(dim e, dim run, F f) const noexcept {
    for (dim i = 0, n = chunks_of(e); i < n; ++i) f(chunk(e, run % 2 == 0 ? i : n - 1 - i));
  }
  /// f(slot, unit) for every unit, each thread in a slot of its own. A thread takes neighbouring units, many at first and
  /// one at a time in the end, so that it reads on where it was and all end together; but at most so many.
  template <class F>
  void share(dim units, dim most, F f) const noexcept {
    std::atomic<dim> next{0};
    const dim slots = at_most(memory.slots.count, units);
    on.executor().for_each(slots, 1, [&](dim first, dim last) {
      for (; first < last; ++first) {
        packed_slot s = slot(first);
        for (dim unit = next.load(std::memory_order_relaxed), n = 0; unit < units;) {
          n = at_most((units - unit) / (2 * slots) + 1, most);
          if (!next.compare_exchange_weak(unit, unit + n, std::memory_order_relaxed)) continue;
          for (dim end = unit + n; unit < end; ++unit) f(s, unit);
          unit = next.load(std::memory_order_relaxed);
        }
      }
    });
  }

  template <class... Then>
  void run(const Then&... then) const noexcept {
    const dim experts = set_order(), all = rows.last() - rows.first();
    if (experts == 0) return (then(result_part{0, on.sizes.tokens, 0, d()}), ...);
    dim chunks = 0, in_runs = 0;  // experts that are cut into runs of panels: the first ones
    for (dim i = 0; i < experts; ++i) {
      const dim n = rows_of(in_order(i));
      chunks += chunks_of(in_order(i));
      in_runs += n > kernels.chunk && n * units_each * memory.slots.count > all;
    }
    if (all < chunks * kernels.height || chunks < units_each * memory.slots.count) in_runs = experts;
    const bool hot = rows_of(in_order(0)) > kernels.height && rows_of(in_order(0)) * experts > 2 * all;
    up_units(in_runs, experts, hot);
    if (in_runs > 0)
      down_units(in_runs, hot, then...);
    else
      (finish(then), ...);
  }
  void up_units(dim in_runs, dim experts, bool hot) const noexcept {
    for (dim i = 0; i < static_cast<dim>(memory.done.size()); ++i) new (done() + i) std::atomic<std::int32_t>(0);
    const dim run = up_run(in_runs), runs = blocks(hidden_panels(), run), units = in_runs * runs;
    share(units + experts - in_runs, neighbours(in_runs > 0 ? runs : 1, hot), [&](packed_slot& s, dim unit) {
      if (unit < units) return up_rows(s, in_order(unit / runs), unit % runs * run, run);
      const dim e = in_order(unit - units + in_runs);
      if (rows_of(e) <= kernels.chunk)
        whole_chunk(s, e);
      else
        all_runs(s, e);
    });
  }
  template <class... Then>
  void down_units(dim experts, bool hot, const Then&... then) const noexcept {
    const dim run = down_run(experts), width = run * panel_rows;
    const column_stripes stripes(experts, rows.last() - rows.first(), blocks(output_panels(), run), width);
    countdown left;
    share(stripes.units(), neighbours(stripes.pieces(0), hot), [&](packed_slot& s, dim unit) {
      const auto [stripe, i, piece] = stripes[unit];
      down_rows(s, in_order(i), piece * run, run);
      if constexpr (sizeof...(then) > 0) {
        if (!left.is_last(stripe, stripes.units(stripe))) return;
        const dim column = stripes.first(stripe) * width, n = at_most(d() - column, stripes.pieces(stripe) * width);
        (then(result_part{0, on.sizes.tokens, column, n}), ...);
      }
    });
  }
  template <class Then>
  void finish(const Then& then) const noexcept {
    on.executor().for_each(on.sizes.tokens, 16, [&](dim t, dim last) { then(result_part{t, last - t, 0, d()}); });
  }

  /// An expert of one chunk, through both products.
  void whole_chunk(packed_slot& s, dim e) const noexcept {
    const chunk_of_rows c = chunk(e, 0);
    prepare_tokens(s, c);
    kernels.lay_out(s.a, c.rows);
    if (by_row()) {
      up_panels(s, e, 0, hidden_panels(), s.hidden);
      prepare_hidden(s, s.hidden.slice(0, c.rows));
    } else {
      up_panels(s, e, 0, hidden_panels(), s.a);
    }
    down_panels(s, s.a, e, c.first, 0, output_panels());
  }
  /// One of several chunks, run after run.
  void all_runs(packed_slot& s, dim e) const noexcept {
    const dim up = up_run(0), down = down_run(0);
    for (dim p = 0; p < hidden_panels(); p += up) up_rows(s, e, p, up);
    for (dim p = 0; p < output_panels(); p += down) down_rows(s, e, p, down);
  }
  /// A run of hidden panels from p on, all rows of an expert. What becomes an operand a whole row at a time does so when
  /// the last run of a chunk is there.
  void up_rows(packed_slot& s, dim e, dim p, dim run) const noexcept {
    const dim last = at_most(hidden_panels(), p + run), runs = blocks(hidden_panels(), run);
    for_chunks(e, p / run, [&](chunk_of_rows c) {
      prepare_tokens(s, c);
      if (!by_row()) return up_panels(s, e, p, last, shared_hidden(c, s.a));
      const matrix_view<float> a = runs == 1 ? s.hidden.slice(0, c.rows) : memory.a.slice(c.first, c.rows);
      up_panels(s, e, p, last, a);
      if (done()[c.id].fetch_add(1, std::memory_order_acq_rel) + 1 == runs) share_hidden(s, c, a);
    });
  }
  void down_rows(packed_slot& s, dim e, dim p, dim run) const noexcept {
    const dim last = at_most(output_panels(), p + run);
    for_chunks(e, p / run, [&](chunk_of_rows c) { down_panels(s, shared_hidden(c, s.a), e, c.first, p, last); });
  }
  bool by_row() const noexcept { return kernels.activations == operand::i8; }
  std::atomic<std::int32_t>* done() const noexcept {
    return reinterpret_cast<std::atomic<std::int32_t>*>(memory.done.data());
  }

  /// Panels of a run of either product, where so many experts are cut into runs; with none, of an expert that is one unit.
  dim up_run(dim experts) const noexcept {
    return run_of(experts, hidden_panels(), together * packed_matrix<T>::panel_bytes(up.cols), panels_at_once / together);
  }
  dim down_run(dim experts) const noexcept {
    return run_of(experts, output_panels(), packed_matrix<T>::panel_bytes(down.cols), panels_at_once);
  }
  /// `most`, what is multiplied at once, or fewer where there are few runs. Where an expert has several chunks: as many as
  /// stay near while these pass, or `most`, but no more than an eighth of a thread's work.
  dim run_of(dim experts, dim panels, dim bytes, dim most) const noexcept {
    const dim tallest = rows_of(in_order(0));
    if (tallest > kernels.chunk) {
      const dim part =
          experts > 0 ? panels * (rows.last() - rows.first()) / (tallest * 2 * units_each * memory.slots.count) : panels;
      const dim n = at_most(near_weights / bytes, part) / most * most;
      if (n > 0) return round_up(blocks(panels, blocks(panels, n)), most);
      return part < 1 ? 1 : at_most(part, most);
    }
    constexpr dim enough = 64;
    while (most > 1 && experts * blocks(panels, most) < enough) most /= 2;
    return most;
  }
  /// Neighbours that a thread may take of `units` of an expert: where one is hot, no more than its share of it, or it might
  /// take all of that one's work.
  dim neighbours(dim units, bool hot) const noexcept {
    return hot ? blocks(units, memory.slots.count) : std::numeric_limits<dim>::max();
  }
};

}  // namespace detail

/// What packed_ffn takes from its scratch.
template <class T, HostBackend B>
void count_packed_ffn(const B& backend, shape s, dim rows, arena& mem) noexcept {
  (void)detail::make_packed_scratch<T>(backend, s, rows, mem);
}

/// ys = down form(up x) for the rows of a bank, with packed weights. Where there is a `then`, it is called as
/// then(result_part) once for every part of the results that is there, from any thread.
template <HostBackend B, class T, class Form, class... Then>
void packed_ffn(const call<B>& on, const bank_rows& rows, gathered<float> x, const Form& form, const packed_matrix<T>& up,
                std::span<const float> up_bias, const packed_matrix<T>& down, std::span<const float> down_bias,
                matrix_view<float> ys, const Then&... then) noexcept {
  scratch_frame frame(on.scratch);
  const detail::packed_scratch memory = detail::make_packed_scratch<T>(on.backend, on.sizes, ys.rows, on.scratch);
  memory.tokens.reset();
  detail::packed_ffn_work<B, T, Form>{
      on, rows, x, form, up, down, up_bias, down_bias, ys, memory, kernels_of(typename B::arch{}, arch::weights_of<T>{})}
      .run(then...);
}

}  // namespace moe
