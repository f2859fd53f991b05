// SPDX-License-Identifier: Apache-2.0
/// Feed-forward experts with packed weights on the host: how their products are cut and shared between threads.
///
/// Many rows: a unit of work is a chunk of one expert's rows through both products, so that rows are gathered and converted
/// once and the activation never leaves the second cache. Few rows: a unit is a run of panels of one expert, so that every
/// weight is read once, by one thread, and one expert feeds all threads; the activation is shared in between, made ready for
/// the second product by whoever finishes the last run of a chunk. Experts with the most rows begin first in either cut.
/// Each element of a result is computed in the same way in both, so results depend neither on the cut nor on the threads.
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

/// Products of one expert's chunk of rows.
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
  void prepare_tokens(packed_slot& s, dim first, dim n) const noexcept {
    kernels.lay_out(s.x, n);
    const packed_tokens& tokens = memory.tokens;
    for (dim r = 0; r < n; ++r) {
      const dim t = x.token && tokens.rows.rows > 0 ? dim{x.token[first + r]} : -1;
      const float* token = x.row(first + r);
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
  prepared_rows shared_hidden(dim first, dim n, prepared_rows like) const noexcept {
    kernels.lay_out(like, n);
    like.data = reinterpret_cast<std::byte*>(memory.a.row(first));
    like.factors = memory.factors.row(first);
    return like;
  }
  void share_hidden(packed_slot& s, dim first, dim n) const noexcept {
    prepare_hidden(s, memory.a.slice(first, n));
    const prepared_rows to = shared_hidden(first, n, s.a);
    std::memcpy(to.data, s.a.data, static_cast<std::size_t>(n * s.a.lines * line_bytes));
    std::memcpy(to.factors, s.a.factors, static_cast<std::size_t>(n * s.a.factor_count) * sizeof(float));
  }
  void multiply(const packed_slot& s, const prepared_rows& a, const packed_matrix<T>& w, std::span<const float> bias,
                dim first, dim n, matrix_view<float> c) const noexcept {
    kernels.multiply(a, {reinterpret_cast<const std::byte*>(w.panel(first)), packed_matrix<T>::panel_bytes(w.cols), n,
                         w.panel_scale(first), s.wide, c});
    if (bias.empty()) return;
    for (dim r = 0; r < c.rows; ++r) axpy(typename B::arch{}, 1.f, bias.data() + first * panel_rows, c.row(r), n * panel_rows);
  }
  /// a = form(up x) of hidden panels first .. first + n.
  void up_panels(packed_slot& s, dim e, dim first, dim n, matrix_view<float> a) const noexcept {
    multiply_up(s, e, first, n);
    for (dim r = 0; r < s.x.rows; ++r) activate_panels(s.c.row(r), first, n, a.row(r) + first * panel_rows);
  }
  void multiply_up(packed_slot& s, dim e, dim first, dim n) const noexcept {
    multiply(s, s.x, up, up_bias, (e * hidden_panels() + first) * together, n * together, s.c.slice(0, s.x.rows));
  }
  void activate_panels(const float* z, dim first, dim n, float* a) const noexcept {
    for (dim i = 0; i < n; ++i, z += together * panel_rows, a += panel_rows)
      activate(typename B::arch{}, form, z, Form::gated ? z + panel_rows : z, a,
               at_most(f() - (first + i) * panel_rows, panel_rows));
  }
  /// The same, straight into the prepared rows.
  void up_panels_prepared(packed_slot& s, dim e, dim first, dim n) const noexcept {
    multiply_up(s, e, first, n);
    const dim depth = line_depth(kernels.activations), column = first * panel_rows, line = column / depth;
    const dim lines = at_most(s.a.lines - line, n * panel_rows / depth);
    float a[panels_at_once * panel_rows] = {};
    for (dim r = 0; r < s.x.rows; ++r) {
      activate_panels(s.c.row(r), first, n, a);
      prepare(a, lines * depth, s.row, nullptr);
      s.a.take(r, s.row, line, lines);
    }
  }
  void down_panels(packed_slot& s, const prepared_rows& a, dim e, dim row, dim first, dim n) const noexcept {
    const dim column = first * panel_rows, width = at_most(d() - column, n * panel_rows);
    const matrix_view<float> to = ys.slice(row, a.rows).columns(column, width), near = s.c.slice(0, a.rows);
    const bool in_place = kernels.writes_once && width == n * panel_rows;
    multiply(s, a, down, down_bias, e * output_panels() + first, n, in_place ? to : near);
    if (in_place) return;
    if (kernels.stream && ys.rows * ys.cols >= many_results) return kernels.stream(near.columns(0, width), to);
    for (dim r = 0; r < to.rows; ++r)
      std::memcpy(to.row(r), near.row(r), static_cast<std::size_t>(width) * sizeof(float));
  }

  dim at(dim e) const noexcept { return rows.offsets[static_cast<std::size_t>(e)]; }
  dim rows_of(dim e) const noexcept { return at(e + 1) - at(e); }
  dim chunks_of(dim e) const noexcept { return blocks(rows_of(e), kernels.chunk); }
  /// Experts that have rows, those with the most first: what is begun last is soon over.
  void set_order() const noexcept {
    idx* order = memory.order.data();
    dim n = 0;
    for (dim e = 0; e < rows.experts(); ++e) {
      if (rows_of(e) == 0) continue;
      dim i = n++;
      for (; i > 0 && rows_of(order[i - 1]) < rows_of(e); --i) order[i] = order[i - 1];
      order[i] = static_cast<idx>(e);
    }
  }
  /// f(e, first row, rows) for the i-th chunk, chunks of an expert of nearly equal height.
  template <class F>
  void visit_chunk(dim i, F f) const noexcept {
    const idx* e = memory.order.data();
    for (dim n; i >= (n = chunks_of(*e)); ++e) i -= n;
    const dim height = blocks(rows_of(*e), chunks_of(*e)), first = at(*e) + i * height;
    f(dim{*e}, first, at_most(at(*e + 1) - first, height));
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
    dim chunks = 0, tallest = 0;
    for (dim e = 0; e < rows.experts(); ++e)
      if (const dim n = chunks_of(e); n > 0) {
        chunks += n;
        if (const dim height = blocks(rows_of(e), n); height > tallest) tallest = height;
      }
    if (chunks == 0) return (then(result_part{0, on.sizes.tokens, 0, d()}), ...);
    const dim per_chunk = (rows.last() - rows.first()) / chunks;
    const bool hot = tallest > kernels.height && tallest > 2 * per_chunk;
    set_order();
    if (per_chunk < kernels.height || chunks < 4 * memory.slots.count) return runs_of_panels(chunks, hot, then...);
    whole_chunks(chunks, hot);
    (finish(then), ...);
  }
  /// Neighbours that a thread may take of `units` of a chunk: where some experts are hot, no more than its share of one, or
  /// it might take all of their work.
  dim neighbours(dim units, bool hot) const noexcept {
    return hot ? blocks(units, memory.slots.count) : std::numeric_limits<dim>::max();
  }
  void whole_chunks(dim chunks, bool hot) const noexcept {
    share(chunks, neighbours(1, hot), [&](packed_slot& s, dim unit) {
      visit_chunk(unit, [&](dim e, dim row, dim n) {
        prepare_tokens(s, row, n);
        constexpr dim most = panels_at_once / together;
        const bool whole = s.hidden.rows > 0;
        kernels.lay_out(s.a, n);
        for (dim p = 0; p < hidden_panels(); p += most) {
          const dim panels = at_most(hidden_panels() - p, most);
          if (whole) up_panels(s, e, p, panels, s.hidden);
          else up_panels_prepared(s, e, p, panels);
        }
        if (whole) prepare_hidden(s, s.hidden.slice(0, n));
        for (dim p = 0; p < output_panels(); p += panels_at_once)
          down_panels(s, s.a, e, row, p, at_most(output_panels() - p, panels_at_once));
      });
    });
  }
  template <class Then>
  void finish(const Then& then) const noexcept {
    on.executor().for_each(on.sizes.tokens, 16, [&](dim t, dim last) { then(result_part{t, last - t, 0, d()}); });
  }
  template <class... Then>
  void runs_of_panels(dim chunks, bool hot, const Then&... then) const noexcept {
    up_runs(chunks, hot);
    const dim run = run_of(chunks, output_panels(), panels_at_once), width = run * panel_rows;
    const column_stripes stripes(chunks, rows.last() - rows.first(), blocks(output_panels(), run), width);
    countdown left;
    share(stripes.units(), neighbours(stripes.pieces(0), hot), [&](packed_slot& s, dim unit) {
      const auto [stripe, chunk, piece] = stripes[unit];
      visit_chunk(chunk, [&, p = piece * run](dim e, dim row, dim n) {
        down_panels(s, shared_hidden(row, n, s.a), e, row, p, at_most(output_panels() - p, run));
      });
      if constexpr (sizeof...(then) > 0) {
        if (!left.is_last(stripe, stripes.units(stripe))) return;
        const dim column = stripes.first(stripe) * width, n = at_most(d() - column, stripes.pieces(stripe) * width);
        (then(result_part{0, on.sizes.tokens, column, n}), ...);
      }
    });
  }
  void up_runs(dim chunks, bool hot) const noexcept {
    auto* done = reinterpret_cast<std::atomic<std::int32_t>*>(memory.done.data());
    for (dim i = 0; i < chunks; ++i) new (done + i) std::atomic<std::int32_t>(0);
    const dim run = run_of(chunks, hidden_panels(), panels_at_once / together), runs = blocks(hidden_panels(), run);
    share(chunks * runs, neighbours(runs, hot), [&](packed_slot& s, dim unit) {
      visit_chunk(unit / runs, [&](dim e, dim row, dim n) {
        if (s.ready != unit / runs) prepare_tokens(s, row, n);
        s.ready = unit / runs;
        const dim p = unit % runs * run;
        up_panels(s, e, p, at_most(hidden_panels() - p, run), memory.a.slice(row, n));
        if (done[unit / runs].fetch_add(1, std::memory_order_acq_rel) + 1 == runs) share_hidden(s, row, n);
      });
    });
  }
  /// Panels of a run: at most `most`, fewer where there are few runs.
  static dim run_of(dim chunks, dim panels, dim most) noexcept {
    constexpr dim enough = 64;
    while (most > 1 && chunks * blocks(panels, most) < enough) most /= 2;
    return most;
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
