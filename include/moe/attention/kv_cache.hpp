// SPDX-License-Identifier: Apache-2.0
/// Keys and values of tokens that have been, kept for those that come.
#pragma once

#include "moe/attention/heads.hpp"
#include "moe/backend/decode_units.hpp"
#include "moe/backend/packed.hpp"
#include "moe/concepts.hpp"

namespace moe {

/// Sizes of a cache. Widths are padded to a multiple of 32 elements, with zeros, and tokens to one of 16.
struct kv_cache_shape {
  attention_heads heads;
  dim sequences = 0;  ///< S
  dim capacity = 0;   ///< N, tokens of a sequence
  dim block = 0;      ///< keys of a block, where blocks are to be selected (MoBA); 0: no centroids are kept

  constexpr cached_sizes read_sizes() const noexcept {
    return {sequences, capacity, heads.heads, heads.kv_heads, heads.d, heads.dv, block};
  }
  constexpr dim blocks() const noexcept { return block > 0 ? detail::blocks(capacity, block) : 0; }
  void check() const {
    heads.check("kv_cache");
    const auto least = [](dim n, dim wanted, const char* name) {
      if (n < wanted)
        throw shape_error(std::string("kv_cache: ") + name + " is " + std::to_string(n) + ", expected at least " +
                          std::to_string(wanted));
    };
    least(sequences, 1, "sequences");
    least(capacity, 1, "capacity");
    least(block, 0, "block");
  }
};

/// S sequences of up to N tokens, keys as they enter attention: after norm, rotation and convolution. Elements are float,
/// bf16, f16, or bytes with a scale for each token and head: x ~ scale q, scale = max|x| / 127, off by at most half of the
/// scale. A row that is not finite has a scale of NaN, and whoever sees it a result of NaN.
///
/// They lie as kernels read them, keys in blocks of 16 (backend/decode_layout.hpp): read_keys and read_values give rows.
///
/// memory   S h_kv N (d + dv) elements; bytes: 8 S h_kv N more; with blocks: 4 S h_kv d ceil(N / block) more
/// Functions that take sequences throw shape_error before anything is written. One call at a time.
template <class T>
struct kv_cache {
  static constexpr bool scaled = std::same_as<T, std::int8_t>;

  kv_cache_shape sizes;
  matrix_view<T> k, v;                  ///< [S*h_kv, N d] and N dv, padded: see decode_layout
  matrix_view<float> k_scale, v_scale;  ///< [S*h_kv, N], padded, bytes only
  /// [S*h_kv*blocks, d]: the mean of a block's keys as they came; of the block that is still open, their sum.
  matrix_view<float> centroids;
  std::span<idx> lengths;  ///< [S] tokens so far

  static kv_cache make(const kv_cache_shape& s, arena& mem) noexcept {
    const dim heads = s.sequences * s.heads.kv_heads, n = detail::round_up(s.capacity, detail::kv_block);
    kv_cache c;
    c.sizes = s;
    c.k = mem.matrix<T>("k", heads, n * padded(s.heads.d), initial::zeros);
    c.v = mem.matrix<T>("v", heads, n * padded(s.heads.dv), initial::zeros);
    if constexpr (scaled) {
      c.k_scale = mem.matrix<float>("k_scale", heads, n, initial::zeros);
      c.v_scale = mem.matrix<float>("v_scale", heads, n, initial::zeros);
    }
    if (s.block > 0) c.centroids = mem.matrix<float>("centroids", heads * s.blocks(), s.heads.d, initial::zeros);
    c.lengths = mem.vector<idx>("lengths", s.sequences, initial::zeros);
    for (idx& length : c.lengths) length = 0;
    return c;
  }

  dim length(dim s) const noexcept { return lengths[static_cast<std::size_t>(s)]; }
  /// What decoding reads.
  cached_keys<T> read() const noexcept { return {sizes.read_sizes(), k, v, k_scale, v_scale, lengths}; }
  /// Scales of key head a of sequence s, one a token.
  std::span<const float> key_scales(dim s, dim a) const noexcept { return scales_of(k_scale, s, a); }
  std::span<const float> value_scales(dim s, dim a) const noexcept { return scales_of(v_scale, s, a); }
  /// Of key head a of sequence s, a row a block.
  matrix_view<float> centroids_of(dim s, dim a) const noexcept {
    return centroids.slice((s * sizes.heads.kv_heads + a) * sizes.blocks(), sizes.blocks());
  }
  /// The mean of block b's keys, of which there is at least one.
  void centroid(dim s, dim a, dim b, float* to) const noexcept {
    const dim n = length(s) - b * sizes.block;
    const float* from = centroids_of(s, a).row(b);
    for (dim j = 0; j < sizes.heads.d; ++j) to[j] = n < sizes.block ? from[j] / static_cast<float>(n) : from[j];
  }

  /// Appends to each sequence its tokens of k[T, h_kv*d] and v[T, h_kv*dv].
  template <class B, class K, class V>
  void append(const call<B>& on, const packed_sequences& tokens, matrix_view<K> new_k, matrix_view<V> new_v) {
    check_rows(new_k, new_v);
    tokens.check(new_k.rows, "kv_cache::append");
    expect(tokens.count(), sizes.sequences, "kv_cache::append: tokens", "sequences", "S");
    for (dim s = 0; s < sizes.sequences; ++s) check_room(s, tokens.last(s, new_k.rows) - tokens.first(s));
    append_pieces(on, new_k, new_v, 0, sizes.sequences,
                  [tokens, n = new_k.rows](dim s) { return piece{tokens.first(s), tokens.last(s, n) - tokens.first(s)}; });
  }
  /// Appends one token to each sequence: k[S, h_kv*d] and v[S, h_kv*dv].
  template <class B, class K, class V>
  void append_each(const call<B>& on, matrix_view<K> new_k, matrix_view<V> new_v) {
    check_rows(new_k, new_v);
    expect(new_k.rows, sizes.sequences, "kv_cache::append_each: k", "rows", "S");
    for (dim s = 0; s < sizes.sequences; ++s) check_room(s, 1);
    append_pieces(on, new_k, new_v, 0, sizes.sequences, [](dim s) { return piece{s, 1}; });
  }
  /// Appends all tokens to sequence s.
  template <class B, class K, class V>
  void append_to(const call<B>& on, dim s, matrix_view<K> new_k, matrix_view<V> new_v) {
    check_rows(new_k, new_v);
    check_sequence(s, "append_to");
    check_room(s, new_k.rows);
    append_pieces(on, new_k, new_v, s, 1, [n = new_k.rows](dim) { return piece{0, n}; });
  }
  /// Forgets what sequence s has beyond its first n tokens. The sum of a block that opens again is that of its keys as
  /// stored.
  void truncate(dim s, dim n) {
    check_sequence(s, "truncate");
    if (n < 0 || n > length(s))
      throw shape_error("kv_cache::truncate: n is " + std::to_string(n) + ", expected at most " + std::to_string(length(s)) +
                        " (the length of sequence " + std::to_string(s) + ")");
    if (n == length(s)) return;
    lengths[static_cast<std::size_t>(s)] = static_cast<idx>(n);
    if (sizes.block > 0 && n % sizes.block != 0)
      for (dim a = 0; a < sizes.heads.kv_heads; ++a) sum_open_block(s, a);
  }
  void reset(dim s) { truncate(s, 0); }

  /// Tokens first .. first + to.rows of a key head as rows.
  template <class Out = float>
  void read_keys(dim s, dim a, dim first, matrix_view<Out> to) const noexcept {
    read_rows(k, k_scale, s, a, first, to, detail::key_place<T>);
  }
  template <class Out = float>
  void read_values(dim s, dim a, dim first, matrix_view<Out> to) const noexcept {
    read_rows(v, v_scale, s, a, first, to, detail::value_place<T>);
  }

 private:
  struct piece {
    dim first, count;
  };

  static constexpr dim padded(dim width) noexcept { return detail::round_up(width, detail::kv_pad); }
  dim head_of(dim s, dim a) const noexcept { return s * sizes.heads.kv_heads + a; }
  float scale_of(matrix_view<const float> m, dim s, dim a, dim t) const noexcept {
    return scaled ? m(head_of(s, a), t) : 1.f;
  }
  template <class Out, class Place>
  void read_rows(matrix_view<const T> from, matrix_view<const float> scales, dim s, dim a, dim first, matrix_view<Out> to,
                 Place place) const noexcept {
    const dim width = from.cols / detail::round_up(sizes.capacity, detail::kv_block);
    const T* own = from.row(head_of(s, a));
    for (dim t = 0; t < to.rows; ++t) {
      const float scale = scale_of(scales, s, a, first + t);
      for (dim j = 0; j < to.cols; ++j) {
        const T x = own[place(first + t, j, width)];
        if constexpr (std::same_as<Out, T>)
          to(t, j) = x;
        else
          to(t, j) = Out(static_cast<float>(x) * scale);
      }
    }
  }
  std::span<const float> scales_of(matrix_view<const float> m, dim s, dim a) const noexcept {
    if constexpr (!scaled) return {};
    return {m.row(head_of(s, a)), static_cast<std::size_t>(length(s))};
  }

  void check_sequence(dim s, const char* function) const {
    if (s < 0 || s >= sizes.sequences)
      throw shape_error(std::string("kv_cache::") + function + ": s is " + std::to_string(s) + ", expected below " +
                        std::to_string(sizes.sequences) + " (S)");
  }
  void check_room(dim s, dim n) const {
    if (length(s) + n > sizes.capacity)
      throw shape_error("kv_cache: sequence " + std::to_string(s) + " holds " + std::to_string(length(s)) + " tokens and " +
                        std::to_string(n) + " come, expected at most " + std::to_string(sizes.capacity) + " (N)");
  }
  template <class K, class V>
  void check_rows(matrix_view<K> new_k, matrix_view<V> new_v) const {
    expect(new_k, new_k.rows, sizes.heads.key_cols(), "kv_cache: k", "T x h_kv*d");
    expect(new_v, new_k.rows, sizes.heads.value_cols(), "kv_cache: v", "T x h_kv*dv");
  }

  template <class B, class K, class V, class Piece>
  void append_pieces(const call<B>& on, matrix_view<K> new_k, matrix_view<V> new_v, dim first, dim count,
                     Piece of) noexcept {
    const dim heads = sizes.heads.kv_heads, d = sizes.heads.d, dv = sizes.heads.dv;
    on.executor().for_each(count * heads, 1, [&](dim unit, dim last) {
      for (; unit < last; ++unit) {
        const dim s = first + unit / heads, a = unit % heads;
        const piece p = of(s);
        write(k, k_scale, s, a, new_k.slice(p.first, p.count).columns(a * d, d), detail::key_place<T>);
        write(v, v_scale, s, a, new_v.slice(p.first, p.count).columns(a * dv, dv), detail::value_place<T>);
        if (sizes.block > 0) add_to_centroids(s, a, new_k.slice(p.first, p.count).columns(a * d, d));
      }
    });
    for (dim s = first; s < first + count; ++s) lengths[static_cast<std::size_t>(s)] += static_cast<idx>(of(s).count);
  }
  /// A block that begins is filled with zeros first.
  template <class In, class Place>
  void write(matrix_view<T> to, matrix_view<float> scale, dim s, dim a, matrix_view<In> from, Place place) noexcept {
    const dim width = padded(from.cols);
    T* own = to.row(head_of(s, a));
    for (dim i = 0; i < from.rows; ++i) {
      const dim t = length(s) + i;
      if (t % detail::kv_block == 0)
        for (dim j = 0; j < detail::kv_block * width; ++j) own[t * width + j] = T(0);
      const In* row = from.row(i);
      if constexpr (scaled) {
        const float per = to_bytes(row, from.cols, scale(head_of(s, a), t));
        for (dim j = 0; per != 0 && j < from.cols; ++j)
          own[place(t, j, width)] = static_cast<std::int8_t>(std::nearbyint(static_cast<float>(row[j]) * per));
        for (dim j = 0; per == 0 && j < from.cols; ++j) own[place(t, j, width)] = 0;
      } else {
        for (dim j = 0; j < from.cols; ++j) own[place(t, j, width)] = T(static_cast<float>(row[j]));
      }
    }
  }
  /// What makes bytes of n numbers, 0 for none, and the scale of these bytes.
  template <class In>
  static float to_bytes(const In* from, dim n, float& scale) noexcept {
    float largest = 0, rest = 0;
    for (dim j = 0; j < n; ++j) {
      const float v = static_cast<float>(from[j]);
      largest = std::fabs(v) > largest ? std::fabs(v) : largest;
      rest += v - v;  // NaN where v is not finite
    }
    scale = rest == 0 ? largest / 127 : NAN;
    return rest == 0 ? detail::to_bytes(largest) : 0.f;
  }
  template <class In>
  void add_to_centroids(dim s, dim a, matrix_view<In> from) noexcept {
    const matrix_view<float> own = centroids_of(s, a);
    for (dim t = 0; t < from.rows; ++t) {
      const dim at = length(s) + t, place = at % sizes.block;
      float* sum = own.row(at / sizes.block);
      for (dim j = 0; j < from.cols; ++j) sum[j] = (place == 0 ? 0.f : sum[j]) + static_cast<float>(from(t, j));
      if (place == sizes.block - 1)
        for (dim j = 0; j < from.cols; ++j) sum[j] /= static_cast<float>(sizes.block);
    }
  }
  void sum_open_block(dim s, dim a) noexcept {
    const dim b = length(s) / sizes.block;
    float* sum = centroids_of(s, a).row(b);
    for (dim j = 0; j < sizes.heads.d; ++j) sum[j] = 0;
    const T* own = k.row(head_of(s, a));
    for (dim t = b * sizes.block; t < length(s); ++t)
      for (dim j = 0; j < sizes.heads.d; ++j)
        sum[j] += static_cast<float>(own[detail::key_place<T>(t, j, padded(sizes.heads.d))]) * scale_of(k_scale, s, a, t);
  }
};

}  // namespace moe
