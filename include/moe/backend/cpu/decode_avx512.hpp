// SPDX-License-Identifier: Apache-2.0
/// Decoding on 512-bit vectors, four query heads at once. Halves are widened as they are read.
///
/// Scores and weights of a tile lie head after head, decode_tile keys each. While the keys of a tile are read its values are
/// asked for, and from then on the next keys, through the softmax, too: memory never waits.
#pragma once

#include "moe/backend/cpu/attention_avx512.hpp"
#include "moe/backend/decode_kernels.hpp"

#if defined(MOE_X86_KERNELS)

namespace moe::arch::detail {

/// 32 elements as floats, of a row or two of each of 16 keys: floats and f16 in order, of bf16 the even ones and the odd
/// ones, which are the first and the second of each key.
MOE_TARGET(MOE_AVX512)
inline void load_pair_512(const float* p, __m512& a, __m512& b) noexcept {
  a = _mm512_loadu_ps(p);
  b = _mm512_loadu_ps(p + 16);
}
MOE_TARGET(MOE_AVX512)
inline void load_pair_512(const bf16* p, __m512& a, __m512& b) noexcept {
  const __m512i v = _mm512_loadu_si512(p);
  a = _mm512_castsi512_ps(_mm512_slli_epi32(v, 16));
  b = _mm512_castsi512_ps(_mm512_and_si512(v, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
}
MOE_TARGET(MOE_AVX512)
inline void load_pair_512(const f16* p, __m512& a, __m512& b) noexcept {
  a = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  b = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 16)));
}

/// Lines of memory that are needed soon, asked for in turn from two places; with steps of 0 nothing is left to ask for. The
/// hardware's own prefetching follows each page by itself, so that with two of them more is on its way.
struct lines_ahead {
  const char* at;
  dim step, both;  ///< to the next line, and the steps there and back

  template <int Lines>
  MOE_TARGET(MOE_AVX512)
  void ask() noexcept {
    MOE_UNROLL
    for (int l = 0; l < Lines; ++l) {
      _mm_prefetch(at, _MM_HINT_T1);
      at += step;
      step = both - step;
    }
  }
};
/// What is left to ask for during a tile: its values, then the next keys, each half beside the other. The softmax asks
/// whenever it runs, the rest is spread over what is read.
struct tile_ahead {
  struct region {
    const char* at;
    dim lines, half;  ///< bytes from one half to the other
  } regions[2];
  float pace = 1;  ///< lines asked for per line read
  float due = 0;

  /// With an odd n one line is asked for again.
  lines_ahead take(dim n) noexcept {
    region& r = regions[regions[0].lines > 0 ? 0 : 1];
    if (r.lines <= 0) return {r.at, 0, 0};
    const char* first = r.at;
    r.at += n / 2 * 64;
    r.lines -= n;
    return {first, r.half, 64};
  }
  /// While n lines are read.
  lines_ahead take_along(dim n) noexcept {
    due += pace * static_cast<float>(n);
    if (2 * due < static_cast<float>(n)) return {regions[1].at, 0, 0};
    due -= static_cast<float>(n);
    return take(n);
  }
};

/// Blocks of keys against four queries.
template <class T>
struct key_blocks_512 {
  const T* k;
  const std::byte* q[decode_heads];
  dim d;
  lines_ahead ahead;
};

/// Scores of N blocks, elements j and j + 1 of 16 keys at a time.
template <int Build, int N, class T>
MOE_TARGET(MOE_AVX512)
MOE_NO_INLINE void score_blocks_512(const key_blocks_512<T>& w, float* s) noexcept {
  constexpr int lines = N * 2 * kv_block * sizeof(T) / 64;
  __m512 sum[N][4];
  MOE_UNROLL
  for (int n = 0; n < N; ++n) {
    MOE_UNROLL
    for (int g = 0; g < 4; ++g) sum[n][g] = _mm512_setzero_ps();
  }
  const T* k = w.k;
  const float *q0 = reinterpret_cast<const float*>(w.q[0]), *q1 = reinterpret_cast<const float*>(w.q[1]),
              *q2 = reinterpret_cast<const float*>(w.q[2]), *q3 = reinterpret_cast<const float*>(w.q[3]);
  lines_ahead ahead = w.ahead;
  const dim step = w.d * kv_block;
  MOE_NO_UNROLL
  for (dim j = 0; j < w.d; j += 2, k += 2 * kv_block) {
    ahead.ask<lines>();
    const float* q[4] = {q0 + j, q1 + j, q2 + j, q3 + j};
    __m512 a[N], b[N];
    MOE_UNROLL
    for (int n = 0; n < N; ++n) load_pair_512(k + n * step, a[n], b[n]);
    MOE_UNROLL
    for (int g = 0; g < 4; ++g) {
      const __m512 first = _mm512_set1_ps(q[g][0]), second = _mm512_set1_ps(q[g][1]);
      MOE_UNROLL
      for (int n = 0; n < N; ++n) {
        sum[n][g] = _mm512_fmadd_ps(a[n], first, sum[n][g]);
        sum[n][g] = _mm512_fmadd_ps(b[n], second, sum[n][g]);
      }
    }
  }
  MOE_UNROLL
  for (int n = 0; n < N; ++n) {
    MOE_UNROLL
    for (int g = 0; g < 4; ++g) _mm512_storeu_ps(s + g * decode_tile + n * kv_block, sum[n][g]);
  }
}

/// A tile and which lanes of its blocks are its keys.
struct tile_512 : tile_span {
  __mmask16 lanes[decode_tile / kv_block];

  explicit tile_512(tile_span t) noexcept : tile_span(t) {
    const auto below = [](dim n) { return n <= 0 ? 0u : n >= kv_block ? 0xffffu : (1u << n) - 1; };
    for (dim r = 0; r < decode_tile; r += kv_block)
      lanes[r / kv_block] = static_cast<__mmask16>(below(hi - r) & ~below(lo - r));
  }
};

/// Lines that the softmax asks for with each block of keys of a head.
inline constexpr int soften_lines = 1;

/// Softmax of a tile for four heads side by side, see soften, of scores in units of `unit`: weights of other keys in its
/// blocks are 0. One head after another would wait for its own sums.
template <int Build>
MOE_TARGET(MOE_AVX512)
MOE_NO_INLINE void soften_512(float* s, const tile_512& t, const float* unit, float* largest, float* sum, float* fade,
                              lines_ahead ahead) noexcept {
  const __m512 least = _mm512_set1_ps(-moe::detail::infinity);
  __m512 most[4], per[4], from[4], total[4];
  MOE_UNROLL
  for (int g = 0; g < 4; ++g) most[g] = least;
  for (dim r = t.first_block(); r < t.hi; r += kv_block) {
    MOE_UNROLL
    for (int g = 0; g < 4; ++g)
      most[g] = _mm512_max_ps(most[g], _mm512_mask_loadu_ps(least, t.lanes[r / kv_block], s + g * decode_tile + r));
  }
  // The heads are lanes now.
  constexpr __mmask16 heads = 0xf;
  const __m512 found = _mm512_setr4_ps(_mm512_reduce_max_ps(most[0]), _mm512_reduce_max_ps(most[1]),
                                       _mm512_reduce_max_ps(most[2]), _mm512_reduce_max_ps(most[3]));
  const __m512 before = _mm512_maskz_loadu_ps(heads, largest);
  const __m512 top = _mm512_max_ps(_mm512_mul_ps(found, _mm512_maskz_loadu_ps(heads, unit)), before);
  alignas(64) float base[16];
  const __m512 bases = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(top, least, _CMP_GT_OQ), top);
  const __m512 fades = exp2_512(_mm512_sub_ps(before, bases));
  _mm512_store_ps(base, bases);
  _mm512_mask_storeu_ps(fade, heads, fades);
  _mm512_mask_storeu_ps(largest, heads, top);
  MOE_UNROLL
  for (int g = 0; g < 4; ++g) {
    per[g] = _mm512_set1_ps(unit[g]);
    from[g] = _mm512_set1_ps(base[g]);
    total[g] = _mm512_setzero_ps();
  }
  for (dim r = t.first_block(); r < t.hi; r += kv_block) {
    ahead.ask<4 * soften_lines>();
    MOE_UNROLL
    for (int g = 0; g < 4; ++g) {
      float* at = s + g * decode_tile + r;
      const __m512 w = exp2_512(_mm512_fmsub_ps(_mm512_loadu_ps(at), per[g], from[g]));
      const __m512 own = _mm512_maskz_mov_ps(t.lanes[r / kv_block], w);
      total[g] = _mm512_add_ps(total[g], own);
      _mm512_storeu_ps(at, own);
    }
  }
  const __m512 added = _mm512_setr4_ps(_mm512_reduce_add_ps(total[0]), _mm512_reduce_add_ps(total[1]),
                                       _mm512_reduce_add_ps(total[2]), _mm512_reduce_add_ps(total[3]));
  _mm512_mask_storeu_ps(sum, heads, _mm512_fmadd_ps(_mm512_maskz_loadu_ps(heads, sum), fades, added));
}

/// Value rows lo .. hi for four heads: o_g = fade_g o_g + sum over rows of weight(g, row) v.
template <class T>
struct value_rows_512 {
  const T* v;
  dim lo, hi, dv;
  const float *weights, *fade;
  float* o[decode_heads];
  lines_ahead ahead;
};

/// 32 C columns.
template <int Build, class T, int C>
MOE_TARGET(MOE_AVX512)
MOE_NO_INLINE void weigh_rows_512(const value_rows_512<T>& w, dim first) noexcept {
  constexpr int lines = C * kv_pad * sizeof(T) / 64;
  __m512 sum[4][2 * C];
  MOE_UNROLL
  for (int g = 0; g < 4; ++g) {
    MOE_UNROLL
    for (int c = 0; c < 2 * C; ++c)
      sum[g][c] = _mm512_mul_ps(_mm512_set1_ps(w.fade[g]), _mm512_loadu_ps(w.o[g] + first + 16 * c));
  }
  const T* v = w.v + w.lo * w.dv + first;
  lines_ahead ahead = w.ahead;
  MOE_NO_UNROLL
  for (dim r = w.lo; r < w.hi; ++r, v += w.dv) {
    ahead.ask<lines>();
    __m512 x[2 * C];
    MOE_UNROLL
    for (int c = 0; c < C; ++c) load_pair_512(v + c * kv_pad, x[2 * c], x[2 * c + 1]);
    MOE_UNROLL
    for (int g = 0; g < 4; ++g) {
      const __m512 b = _mm512_set1_ps(w.weights[g * decode_tile + r]);
      MOE_UNROLL
      for (int c = 0; c < 2 * C; ++c) sum[g][c] = _mm512_fmadd_ps(b, x[c], sum[g][c]);
    }
  }
  MOE_UNROLL
  for (int g = 0; g < 4; ++g) {
    MOE_UNROLL
    for (int c = 0; c < 2 * C; ++c) _mm512_storeu_ps(w.o[g] + first + 16 * c, sum[g][c]);
  }
}

/// one(w, r, s) for the blocks of a tile from key r on, or two(w, r, s) where there are two.
template <class T, class One, class Two>
void score_tile_512(const decode_unit& u, const tile_512& t, dim head, tile_ahead& ahead, float* s, One one,
                    Two two) noexcept {
  key_blocks_512<T> w;
  for (dim g = 0; g < decode_heads; ++g) w.q[g] = u.query(head + g);
  w.d = u.d;
  for (dim r = t.first_block(); r < t.hi;) {
    const dim blocks = r + kv_block < t.hi ? 2 : 1;
    w.k = static_cast<const T*>(u.k) + (t.base + r) * u.d;
    w.ahead = ahead.take_along(blocks * kv_block * u.d * dim{sizeof(T)} / 64);
    if (blocks == 2)
      two(w, r, s + r);
    else
      one(w, r, s + r);
    r += blocks * kv_block;
  }
}
/// softmax: lines that it asks for with each block of keys of a head.
template <class T>
tile_ahead ahead_of(const decode_unit& u, const tile_512& t, dim softmax) noexcept {
  const auto lines = [](dim n) { return n * dim{sizeof(T)} / 64; };
  const auto region = [&](const void* p, dim from, dim n) {
    return tile_ahead::region{reinterpret_cast<const char*>(static_cast<const T*>(p) + from), lines(n), lines(n) / 2 * 64};
  };
  const dim next = t.base + decode_tile, groups = moe::detail::blocks(u.heads, decode_heads);
  const bool more = next < u.last;
  const dim keys = moe::detail::at_most(more ? u.last - next : u.next_keys, decode_tile);
  const dim read = t.hi - t.first_block();
  tile_ahead a{{region(u.v, (t.base + t.first_block()) * u.dv, read * u.dv),
                more ? region(u.k, next * u.d, keys * u.d) : region(u.next, 0, keys * u.d)}};
  const dim spread = a.regions[0].lines + a.regions[1].lines - groups * decode_heads * t.blocks() * softmax;
  a.pace = static_cast<float>(spread) / static_cast<float>(groups * lines(read * (u.d + u.dv)));
  return a;
}
/// Columns that were read even ones first, 32 at a time, in order.
inline void interleave_halves(float* o, dim n) noexcept {
  for (dim j = 0; j < n; j += kv_pad) {
    float read[kv_pad];
    std::memcpy(read, o + j, sizeof read);
    for (dim l = 0; l < kv_pad; ++l) o[j + l % 16 * 2 + l / 16] = read[l];
  }
}

template <int Build, class T>
void attend_512(const decode_unit& u) noexcept {
  start_heads(u);
  for_each_tile(u, [&](tile_span span) {
    const tile_512 t(span);
    tile_ahead ahead = ahead_of<T>(u, t, soften_lines);
    for (dim head = 0; head < u.heads; head += decode_heads) {
      alignas(64) float s[decode_heads * decode_tile];
      float fade[decode_heads];
      score_tile_512<T>(
          u, t, head, ahead, s, [](const key_blocks_512<T>& w, dim, float* to) { score_blocks_512<Build, 1>(w, to); },
          [](const key_blocks_512<T>& w, dim, float* to) { score_blocks_512<Build, 2>(w, to); });
      constexpr float unit[decode_heads] = {1, 1, 1, 1};
      soften_512<Build>(s, t, unit, u.largest + head, u.sum + head, fade,
                        ahead.take(t.blocks() * decode_heads * soften_lines));
      value_rows_512<T> w{static_cast<const T*>(u.v) + t.base * u.dv, t.lo, t.hi, u.dv, s, fade, {}, {}};
      for (dim g = 0; g < decode_heads; ++g) w.o[g] = u.o + (head + g) * u.dv;
      for (dim j = 0; j < u.dv;) {
        const bool two = j + 2 * kv_pad <= u.dv;
        const dim columns = two ? 2 * kv_pad : kv_pad;
        w.ahead = ahead.take_along((t.hi - t.lo) * columns * dim{sizeof(T)} / 64);
        if (two)
          weigh_rows_512<Build, T, 2>(w, j);
        else
          weigh_rows_512<Build, T, 1>(w, j);
        j += columns;
      }
    }
  });
  if constexpr (std::is_same_v<T, bf16>)
    for (dim i = 0; i < u.heads; ++i) interleave_halves(u.o + i * u.dv, u.dv);
}

}  // namespace moe::arch::detail

namespace moe::arch {

template <int Build, class T>
  requires(!std::is_same_v<T, std::int8_t>)
decode_kernels kernels_of(basic_avx512<Build>, cache_of<T>) noexcept {
  return {detail::prepare_floats<Build>, detail::attend_512<Build, T>};
}

}  // namespace moe::arch

#endif
