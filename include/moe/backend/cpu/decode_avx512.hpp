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

/// 32 elements as floats, of a row or two of each of 16 keys: floats and f16 in order, of bf16 the even ones and the odd ones,
/// which are the first and the second of each key.
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

/// Lines of memory that are needed soon, asked for one after the other; with a step of 0 nothing is left to ask for.
struct lines_ahead {
  const char* at;
  dim step;

  template <int Lines>
  MOE_TARGET(MOE_AVX512)
  void ask() noexcept {
    MOE_UNROLL
    for (int l = 0; l < Lines; ++l, at += step) _mm_prefetch(at, _MM_HINT_T1);
  }
};
/// What is left to ask for during a tile: its values, then the next keys. The softmax asks whenever it runs, the rest is
/// spread over what is read.
struct tile_ahead {
  const char* at[2];
  dim lines[2];
  float pace = 1;  ///< lines asked for per line read
  float due = 0;

  lines_ahead take(dim n) noexcept {
    const int i = lines[0] > 0 ? 0 : 1;
    if (lines[i] <= 0) return {at[i], 0};
    const char* first = at[i];
    at[i] += 64 * n;
    lines[i] -= n;
    return {first, 64};
  }
  /// While n lines are read.
  lines_ahead take_along(dim n) noexcept {
    due += pace * static_cast<float>(n);
    if (2 * due < static_cast<float>(n)) return {at[1], 0};
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

/// Lines that the softmax asks for with each block of keys.
inline constexpr int soften_lines = 2;

/// Softmax of a tile for one head, see soften, of scores in units of `unit`: weights of other keys in its blocks are 0.
template <int Build>
MOE_TARGET(MOE_AVX512)
MOE_NO_INLINE
    float soften_512(float* s, const tile_512& t, float unit, float& largest, float& sum, lines_ahead ahead) noexcept {
  const __m512 least = _mm512_set1_ps(-moe::detail::infinity);
  __m512 most = least;
  for (dim r = t.first_block(); r < t.hi; r += kv_block)
    most = _mm512_max_ps(most, _mm512_mask_loadu_ps(least, t.lanes[r / kv_block], s + r));
  const float found = _mm512_reduce_max_ps(most) * unit, top = found > largest ? found : largest;
  const float base = top > -moe::detail::infinity ? top : 0.f;
  const __m512 per = _mm512_set1_ps(unit), from = _mm512_set1_ps(base);
  __m512 total = _mm512_setzero_ps();
  for (dim r = t.first_block(); r < t.hi; r += kv_block) {
    ahead.ask<soften_lines>();
    const __m512 w = exp2_512(_mm512_fmsub_ps(_mm512_loadu_ps(s + r), per, from));
    const __m512 own = _mm512_maskz_mov_ps(t.lanes[r / kv_block], w);
    total = _mm512_add_ps(total, own);
    _mm512_storeu_ps(s + r, own);
  }
  const float fade = _mm512_cvtss_f32(exp2_512(_mm512_set1_ps(largest - base)));
  largest = top;
  sum = sum * fade + _mm512_reduce_add_ps(total);
  return fade;
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
/// softmax: lines that it asks for with each block of keys.
template <class T>
tile_ahead ahead_of(const decode_unit& u, const tile_512& t, dim softmax) noexcept {
  const auto at = [](const void* p, dim n) { return reinterpret_cast<const char*>(static_cast<const T*>(p) + n); };
  const auto lines = [](dim n) { return n * dim{sizeof(T)} / 64; };
  const dim next = t.base + decode_tile, groups = moe::detail::blocks(u.heads, decode_heads);
  const bool more = next < u.last;
  const dim keys = moe::detail::at_most(more ? u.last - next : u.next_keys, decode_tile);
  const dim read = t.hi - t.first_block();
  tile_ahead a{{at(u.v, (t.base + t.first_block()) * u.dv), more ? at(u.k, next * u.d) : at(u.next, 0)},
               {lines(read * u.dv), lines(keys * u.d)}};
  const dim spread = a.lines[0] + a.lines[1] - groups * decode_heads * t.blocks() * softmax;
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
      for (dim g = 0; g < decode_heads; ++g)
        fade[g] = soften_512<Build>(s + g * decode_tile, t, 1.f, u.largest[head + g], u.sum[head + g],
                                    ahead.take(t.blocks() * soften_lines));
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
