// SPDX-License-Identifier: Apache-2.0
/// One query a sequence against a cache, on the host: how the keys are cut and shared between threads.
///
/// A unit of work is a chunk of keys, of a length that does not depend on the threads, under one key head; or, where blocks
/// are selected, one block and those heads of the group that chose it. Every unit leaves a partial softmax, and those of a
/// head are merged in the order of their keys, by whoever finishes the last one: results are equal bit for bit for any
/// executor.
#pragma once

#include <atomic>
#include <new>

#include "moe/backend/decode_units.hpp"
#include "moe/concepts.hpp"

namespace moe {

namespace detail {

/// The units of one key head of a sequence, appended from unit n on; returns one beyond the last.
inline dim cut_chunks(const decode_units& u, dim first, dim last, dim group, dim n) noexcept {
  for (dim key = first; key < last; ++n) {
    const dim end = at_most((key / decode_chunk + 1) * decode_chunk, last);
    u.keys(n, 0) = static_cast<idx>(key);
    u.keys(n, 1) = static_cast<idx>(end);
    for (dim g = 0; g < group; ++g) u.pick(n, g) = static_cast<idx>(g);
    key = end;
  }
  return n;
}
/// `chosen`: the rows of the group's heads. Blocks in ascending order, each with the heads that chose it.
inline dim cut_blocks(const decode_units& u, matrix_view<const idx> chosen, dim block, dim length, dim n) noexcept {
  for (idx b = -1;;) {
    idx next = -1;
    for (dim g = 0; g < chosen.rows; ++g)
      for (dim i = 0; i < chosen.cols; ++i)
        if (const idx c = chosen(g, i); c > b && (next < 0 || c < next)) next = c;
    if (next < 0) return n;
    b = next;
    u.keys(n, 0) = static_cast<idx>(b * block);
    u.keys(n, 1) = static_cast<idx>(at_most((b + 1) * block, length));
    dim count = 0;
    for (dim g = 0; g < chosen.rows; ++g) {
      dim i = 0;
      while (i < chosen.cols && chosen(g, i) != b) ++i;
      if (i < chosen.cols) u.pick(n, count++) = static_cast<idx>(g);
    }
    while (count < chosen.rows) u.pick(n, count++) = -1;
    ++n;
  }
}
template <class T>
void cut_units(const cached_keys<T>& cache, const decode_options& options, const decode_units& u) noexcept {
  const cached_sizes& h = cache.sizes;
  dim n = 0;
  for (dim s = 0; s < h.sequences; ++s)
    for (dim a = 0; a < h.kv_heads; ++a) {
      const dim length = cache.length(s),
                first = options.window > 0 && options.window < length ? length - options.window : 0;
      const dim head = s * h.kv_heads + a, start = n;
      u.sequence_offsets[static_cast<std::size_t>(head)] = static_cast<idx>(n);
      n = options.blocks ? cut_blocks(u, options.blocks.slice(s * h.heads + a * h.group(), h.group()), h.block, length, n)
                         : cut_chunks(u, first, length, h.group(), n);
      for (dim i = start; i < n; ++i) u.keys(i, 2) = static_cast<idx>(head);
    }
  u.sequence_offsets.back() = static_cast<idx>(n);
}

inline dim units_of(const decode_units& u, dim head) noexcept {
  return u.sequence_offsets[static_cast<std::size_t>(head) + 1] - u.sequence_offsets[static_cast<std::size_t>(head)];
}

template <class T>
decode_unit unit_of(const cached_keys<T>& cache, const decode_units& u, dim n) noexcept {
  const dim group = cache.sizes.group(), head = u.keys(n, 2);
  decode_unit unit;
  unit.k = cache.k.row(head);
  unit.v = cache.v.row(head);
  unit.first = u.keys(n, 0);
  unit.last = u.keys(n, 1);
  unit.d = round_up(cache.sizes.d, kv_pad);
  unit.dv = round_up(cache.sizes.dv, kv_pad);
  if (cache.k_scale) {
    unit.k_scale = cache.k_scale.row(head);
    unit.v_scale = cache.v_scale.row(head);
  }
  unit.q = reinterpret_cast<const std::byte*>(u.q.row(head * group));
  unit.pick = u.pick.row(n);
  while (unit.heads < group && unit.pick[unit.heads] >= 0) ++unit.heads;
  unit.o = u.o.row(n * u.largest.cols);
  unit.largest = u.largest.row(n);
  unit.sum = u.sum.row(n);
  return unit;
}
/// Units in one range for each thread, which reads on where it was: memory is slow to start. Who is done early takes from
/// the others.
class unit_ranges {
 public:
  unit_ranges(dim units, dim threads) noexcept : units_(units), count_(at_most(threads, most)) {
    for (dim r = 0; r < count_; ++r) next_[r].store(first(r), std::memory_order_relaxed);
  }
  /// f(unit, one beyond the last of its range), from a thread's own range first.
  template <class F>
  void take(dim thread, F f) noexcept {
    for (dim i = 0; i < count_; ++i) {
      const dim r = (thread + i) % count_, last = first(r + 1);
      for (dim n; (n = next_[r].fetch_add(1, std::memory_order_relaxed)) < last;) f(n, last);
    }
  }

 private:
  static constexpr dim most = 64;
  dim first(dim r) const noexcept { return units_ * r / count_; }

  dim units_, count_;
  std::atomic<dim> next_[most] = {};
};

/// Runs unit n; where it is not the last of its range, it asks for the first keys of the next one.
template <class T>
void run_unit(const cached_keys<T>& cache, const decode_kernels& kernels, const decode_units& u, dim n, dim last) noexcept {
  decode_unit unit = unit_of(cache, u, n);
  if (n + 1 < last) {
    const dim first = u.keys(n + 1, 0) / kv_block * kv_block;
    unit.next = cache.k.row(u.keys(n + 1, 2)) + first * unit.d;
    unit.next_keys = u.keys(n + 1, 1) - first;
  }
  kernels.attend(unit);
}

/// o and lse of query head g of a key head, from its units.
template <class Out>
void merge_units(const decode_units& u, dim head, idx g, Out* o, dim dv, float* lse) noexcept {
  const idx first = u.sequence_offsets[static_cast<std::size_t>(head)],
            last = u.sequence_offsets[static_cast<std::size_t>(head) + 1];
  // f(unit, slot) for the units that the head takes part in
  const auto visit = [&](auto f) {
    for (dim n = first; n < last; ++n)
      for (dim i = 0; i < u.pick.cols && u.pick(n, i) >= 0; ++i)
        if (u.pick(n, i) == g) f(n, i);
  };
  float largest = -infinity, sum = 0;
  visit([&](dim n, dim i) { largest = u.largest(n, i) > largest ? u.largest(n, i) : largest; });
  const float base = largest > -infinity ? largest : 0.f;
  visit([&](dim n, dim i) {
    const float w = std::exp2(u.largest(n, i) - base);
    sum += w * u.sum(n, i);
    u.largest(n, i) = w;  // from here on its weight
  });
  constexpr dim piece = 64;
  const float per = sum == 0 ? 0.f : 1 / sum;
  for (dim j = 0; j < dv; j += piece) {
    float total[piece] = {};
    const dim m = at_most(dv - j, piece);
    visit([&](dim n, dim i) {
      const float w = u.largest(n, i) * per, *from = u.o.row(n * u.largest.cols + i) + j;
      for (dim c = 0; c < m; ++c) total[c] += w * from[c];
    });
    for (dim c = 0; c < m; ++c) o[j + c] = Out(total[c]);
  }
  if (lse) *lse = sum == 0 ? -infinity : (base + std::log2(sum)) * 0.693147181f;
}

/// o and lse of all query heads of a key head.
template <class Out>
void merge_group(const decode_units& u, const cached_sizes& h, dim head, matrix_view<Out> o,
                 matrix_view<float> lse) noexcept {
  const dim s = head / h.kv_heads, first = head % h.kv_heads * h.group();
  for (dim g = 0; g < h.group(); ++g)
    merge_units(u, head, static_cast<idx>(g), o.row(s) + (first + g) * h.dv, h.dv, lse ? &lse(s, first + g) : nullptr);
}
template <class In>
void prepare_queries(const decode_kernels& kernels, const decode_units& u, const cached_sizes& h, matrix_view<In> q,
                     float scale) noexcept {
  for (dim s = 0; s < q.rows; ++s)
    for (dim a = 0; a < h.heads; ++a) {
      float* row = u.row.row(s * h.heads + a);
      for (dim j = 0; j < u.row.cols; ++j)
        row[j] = j < h.d ? static_cast<float>(q(s, a * h.d + j)) * scale * 1.44269504f : 0.f;
      kernels.prepare(row, u.row.cols, reinterpret_cast<std::byte*>(u.q.row(s * h.heads + a)));
    }
}

}  // namespace detail

/// o[S, h*dv] and lse[S, h] (or empty) of one query a sequence, q[S, h*d]. One join.
template <HostBackend B, class T, class In, class Out>
void attend_cache(const call<B>& on, const cached_keys<T>& cache, matrix_view<In> q, const decode_options& options,
                  matrix_view<Out> o, matrix_view<float> lse) noexcept {
  const cached_sizes& h = cache.sizes;
  const decode_kernels kernels = kernels_of(typename B::arch{}, arch::cache_of<T>{});
  scratch_frame frame(on.scratch);
  const detail::decode_units u = detail::carve_units(cache.sizes, options.blocks.cols, on.scratch);
  detail::cut_units(cache, options, u);
  detail::prepare_queries(kernels, u, h, q, options.scale);
  auto* done = reinterpret_cast<std::atomic<std::int32_t>*>(u.done.data());
  for (dim head = 0; head < h.sequences * h.kv_heads; ++head) {
    new (done + head) std::atomic<std::int32_t>(0);
    if (detail::units_of(u, head) == 0) detail::merge_group(u, h, head, o, lse);
  }
  const dim units = u.sequence_offsets.back(), threads = detail::at_most(on.executor().concurrency(), units);
  detail::unit_ranges ranges(units, threads);
  on.executor().for_each(threads, 1, [&](dim thread, dim beyond) {
    for (; thread < beyond; ++thread)
      ranges.take(thread, [&](dim n, dim last) {
        detail::run_unit(cache, kernels, u, n, last);
        const dim head = u.keys(n, 2);
        if (done[head].fetch_add(1, std::memory_order_acq_rel) + 1 == detail::units_of(u, head))
          detail::merge_group(u, h, head, o, lse);
      });
  });
}

}  // namespace moe
