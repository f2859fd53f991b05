// SPDX-License-Identifier: Apache-2.0
/// Selection and grouping on a device. Contracts: backend/host_route.hpp; plans are equal to the host's in every integer.
/// A plan's weights are not set yet, so their memory holds integers meanwhile.
#pragma once

#include "moe/backend/cuda/tiles.hpp"

namespace moe {

namespace detail {

inline idx* unset_weights(const routing_plan& p) noexcept { return reinterpret_cast<idx*>(p.weight.data()); }

/// chosen[t K ..] = the K best of token t, best first; count[t] = how many there are.
template <int K>
struct choose {
  matrix_view<const float> keys;
  idx *chosen, *count;

  MOE_HD void operator()(dim t) const noexcept {
    float best[K];
    idx own[K] = {};
    for (float& b : best) b = -infinity;
    int n = 0;
    for (idx e = 0; e < keys.cols; ++e) {
      float key = keys(t, e);
      if (!(key > best[K - 1])) continue;  // not eligible, or too small
      idx at = e;
      bool found = false;
      for (int j = 0; j < K; ++j)  // over constant places, so that they are registers
        if (found = found || key > best[j]; found) {
          const float lesser = best[j];
          const idx there = own[j];
          best[j] = key;
          own[j] = at;
          key = lesser;
          at = there;
        }
      if (n < K) ++n;
    }
    for (int j = 0; j < K; ++j)
      if (j < n) chosen[t * K + j] = own[j];
    count[t] = n;
  }
};
/// Tokens with fewer choices close up.
template <int K>
struct close_up {
  const idx *chosen, *token_offsets;
  idx* position;
  MOE_HD void operator()(dim t) const noexcept {
    const idx first = token_offsets[t], n = token_offsets[t + 1] - first;
    for (idx j = 0; j < n; ++j) position[first + j] = chosen[t * K + j];
  }
};

template <class F>
struct count_listed {
  F list;
  idx* count;
  MOE_HD void operator()(dim t) const noexcept { count[t] = list.count(t); }
};
template <class F>
struct write_listed {
  F list;
  const idx* token_offsets;
  idx* position;
  MOE_HD void operator()(dim t) const noexcept { list(t, position + token_offsets[t]); }
};

/// kept[i] = the choices that stay, where they were; count[t] = how many.
template <class F>
struct keep_first {
  F keep;
  const idx *token_offsets, *position;
  idx *kept, *count;
  MOE_HD void operator()(dim t) const noexcept {
    const idx first = token_offsets[t], n = keep(t, position + first, token_offsets[t + 1] - first);
    for (idx j = 0; j < n; ++j) kept[first + j] = position[first + j];
    count[t] = n;
  }
};
/// to[t] = count[t], whose place keeps where the token's choices were.
struct note_place {
  const idx* token_offsets;
  idx *count, *to;
  MOE_HD void operator()(dim t) const noexcept {
    to[t] = count[t];
    count[t] = token_offsets[t];
  }
};
struct bring_kept {
  const idx *token_offsets, *kept, *place;
  idx* position;
  MOE_HD void operator()(dim t) const noexcept {
    const idx first = token_offsets[t], n = token_offsets[t + 1] - first;
    for (idx j = 0; j < n; ++j) position[first + j] = kept[place[t] + j];
  }
};
struct copy_index {
  const idx* from;
  idx* to;
  MOE_HD void operator()(dim i) const noexcept { to[i] = from[i]; }
};

/// One block: v[0] = 0 and v[i] += v[i - 1] for i in 1 .. n.
struct running_sum {
  static constexpr int threads = 1024;
  struct shared { idx part[threads]; };
  struct local {};
  idx* v;
  dim n;

  MOE_HD dim begin(dim, int, local&) const noexcept { return 1; }
  MOE_HD void load(dim, int thread, shared& all, const local&) const noexcept {
    const run_of run(n, thread, threads);
    idx sum = 0;
    for (dim i = run.first; i < run.last; ++i) sum += v[i + 1];
    all.part[thread] = sum;
  }
  MOE_HD void use(dim, int thread, const shared& all, const local&) const noexcept {
    const run_of run(n, thread, threads);
    if (thread == 0) v[0] = 0;
    if (run.first == run.last) return;
    idx sum = 0;
    for (int before = 0; before < thread; ++before) sum += all.part[before];
    for (dim i = run.first; i < run.last; ++i) v[i + 1] = sum += v[i + 1];
  }
  MOE_HD void end(int, const local&) const noexcept {}
};

/// One block an expert, over all choices. Counts those of its expert or, with `Places`, gives them their rows in order.
template <bool Places>
struct group_program {
  static constexpr int threads = 256;
  struct shared { idx part[threads]; };
  struct local { idx expert, choices; };

  const idx *token_offsets, *chosen;
  dim tokens;
  idx *offsets, *token, *row;  ///< row[i] of choice i

  MOE_HD dim begin(dim block, int, local& own) const noexcept {
    own = {static_cast<idx>(block), token_offsets[tokens]};
    return 1;
  }
  MOE_HD void load(dim, int thread, shared& all, const local& own) const noexcept {
    const run_of run(own.choices, thread, threads);
    idx n = 0;
    for (dim i = run.first; i < run.last; ++i) n += chosen[i] == own.expert;
    all.part[thread] = n;
  }
  MOE_HD void use(dim, int thread, const shared& all, const local& own) const noexcept {
    if constexpr (Places) {
      idx r = offsets[own.expert];
      for (int before = 0; before < thread; ++before) r += all.part[before];
      place(run_of(own.choices, thread, threads), own.expert, r);
    } else if (thread == 0) {
      idx n = 0;
      for (const idx part : all.part) n += part;
      offsets[own.expert + 1] = n;
    }
  }
  MOE_HD void end(int, const local&) const noexcept {}

 private:
  MOE_HD void place(run_of run, idx expert, idx r) const noexcept {
    if (run.first == run.last) return;
    dim t = token_of(run.first);
    for (dim i = run.first; i < run.last; ++i) {
      while (token_offsets[t + 1] <= i) ++t;
      if (chosen[i] != expert) continue;
      token[r] = static_cast<idx>(t);
      row[i] = r++;
    }
  }
  /// A token whose choices begin at or before choice i, and the next token's after it.
  MOE_HD dim token_of(dim i) const noexcept {
    dim low = 0, high = tokens;
    while (high - low > 1) {
      const dim middle = low + (high - low) / 2;
      if (token_offsets[middle] <= i) low = middle;
      else high = middle;
    }
    return low;
  }
};
/// From the expert of a choice to its row; dropped choices stay as they are.
struct set_position {
  const idx *token_offsets, *row;
  dim tokens;
  idx* position;
  MOE_HD void operator()(dim i) const noexcept {
    if (i < token_offsets[tokens] && position[i] >= 0) position[i] = row[i];
  }
};

}  // namespace detail

template <int K, DeviceBackend B>
void top_k_rows(const call<B>& on, matrix_view<const float> keys, routing_plan& p) noexcept {
  idx* chosen = detail::unset_weights(p);
  on.backend.for_each(keys.rows, detail::choose<K>{keys, chosen, p.token_offsets.data() + 1});
  on.backend.run(1, detail::running_sum{p.token_offsets.data(), keys.rows});
  on.backend.for_each(keys.rows, detail::close_up<K>{chosen, p.token_offsets.data(), p.position.data()});
}

template <DeviceBackend B, class F>
void list_choices(const call<B>& on, routing_plan& p, const F& list) noexcept {
  const dim T = p.tokens();
  idx* offsets = p.token_offsets.data();
  detail::for_each_of<F>(on, T, detail::count_listed<F>{list, offsets + 1});
  on.backend.run(1, detail::running_sum{offsets, T});
  detail::for_each_of<F>(on, T, detail::write_listed<F>{list, offsets, p.position.data()});
}
/// A plan that has room for a choice of each token.
template <DeviceBackend B, class F>
void shorten_choices(const call<B>& on, routing_plan& p, const F& keep) noexcept {
  const dim T = p.tokens();
  idx *offsets = p.token_offsets.data(), *position = p.position.data(), *token = p.token.data();
  idx* kept = detail::unset_weights(p);
  detail::for_each_of<F>(on, T, detail::keep_first<F>{keep, offsets, position, kept, token});
  on.backend.for_each(T, detail::note_place{offsets, token, position});
  on.backend.for_each(T, detail::copy_index{position, offsets + 1});
  on.backend.run(1, detail::running_sum{offsets, T});
  on.backend.for_each(T, detail::bring_kept{offsets, kept, token, position});
}

template <DeviceBackend B>
void group_by_expert(const call<B>& on, routing_plan& p) noexcept {
  idx *offsets = p.offsets.data(), *row = detail::unset_weights(p);
  const idx *first = p.token_offsets.data(), *chosen = p.position.data();
  on.backend.run(p.experts(), detail::group_program<false>{first, chosen, p.tokens(), offsets, p.token.data(), row});
  on.backend.run(1, detail::running_sum{offsets, p.experts()});
  on.backend.run(p.experts(), detail::group_program<true>{first, chosen, p.tokens(), offsets, p.token.data(), row});
  on.backend.for_each(static_cast<dim>(p.position.size()), detail::set_position{first, row, p.tokens(), p.position.data()});
}

}  // namespace moe
