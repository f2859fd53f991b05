// SPDX-License-Identifier: Apache-2.0
/// Attention over bf16 on the tile unit of Intel processors: both products of forward, all five of backward. Scores, their
/// exponentials and sums are float32; the weights of the values are rounded to bf16, and in backward also the gradients of
/// scores and of outputs. `Tiles` as in packed_amx.hpp.
#pragma once

#include "moe/backend/cpu/attention_amx_blocks.hpp"

#if defined(MOE_X86_KERNELS)

namespace moe::arch::detail {

/// One step of forward.
template <int Build, class Tiles>
class attention_tiles : public attention_tile_step<Build, Tiles, attention_step> {
  using base = attention_tile_step<Build, Tiles, attention_step>;
  using base::s_, base::h_;
  using typename base::rules;

 public:
  using base::base;

  /// A value that is not finite is left out of the tiles and added at the end.
  void run() noexcept {
    const bool finite = base::pack_rows(h_.v, h_.values);
    base::pack_columns(h_.k, h_.keys);
    base::score(h_.rows, h_.k.cols, h_.keys, s_.p);
    for (dim i = 0; i < s_.rows; ++i) take_weights(i);
    base::weigh(h_.values, h_.v.cols, s_.state.o);
    if (!finite) base::add_strange_keys(s_.p, h_.v, s_.state.o);
  }

 private:
  /// Weights of row i as halves, from its scores; the sums are of the floats.
  void take_weights(dim i) noexcept {
    float* p = s_.p + i * attention_pitch;
    const key_range seen = seen_by(s_, i);
    if (!seen.empty()) {
      const dim r = s_.at(i), first = seen.lo / tile_rows * tile_rows;
      rules::scale(p + first, h_.scale, seen.hi - first);
      const float fade = rules::softmax(p, seen.lo, seen.hi, s_.state.largest[r], s_.state.sum[r]);
      if (fade != 1) rules::scale(s_.state.o.row(r), fade, s_.state.o.cols);
    }
    base::round_row(p, seen.lo, seen.hi, base::key_chunks() * 32, base::key_steps, i, h_.weights);
  }
};

/// One step of backward: as attend_backward, but for the scale of queries, which are as they are stored.
template <int Build, class Tiles>
class attention_backward_tiles : public attention_tile_step<Build, Tiles, attention_backward_step> {
  using base = attention_tile_step<Build, Tiles, attention_backward_step>;
  using base::s_, base::h_, base::pair, base::block_bytes, base::steps_of;
  using typename base::rules;

 public:
  using base::base;

  /// What is not finite is left out of the right operands and added at the end.
  void run() noexcept {
    const bool finite = base::pack_rows(h_.k, h_.key_rows);
    if (!h_.paired) pair_rows();
    base::pack_columns(h_.k, h_.keys);
    base::score(h_.rows, h_.k.cols, h_.keys, s_.p);
    base::pack_columns(h_.v, h_.values);
    base::score(h_.gradients, h_.v.cols, h_.values, s_.ds);
    for (dim i = 0; i < s_.rows; ++i) take_slopes(i);
    base::weigh(h_.key_rows, h_.k.cols, s_.dq);
    if (!finite) base::add_strange_keys(s_.ds, h_.k, s_.dq);
    sum_by_key(s_.p, h_.gradients, h_.gradient_pairs, h_.v.cols, s_.dv);
    sum_by_key(s_.ds, h_.rows, h_.row_pairs, h_.k.cols, s_.dk);
  }

 private:
  /// Column j of the step's row i in a left operand of the tile.
  auto row_of(const std::byte* blocks, dim steps) const noexcept {
    return [this, blocks, steps](dim i, dim j) noexcept {
      return reinterpret_cast<const bf16*>(blocks + base::place(s_.at(i), steps) + j / 32 * block_bytes) + j % 32;
    };
  }
  /// Rows and gradients as right operands: of the tile where the step has all its rows, so that later ones have them too.
  void pair_rows() noexcept {
    const dim d = steps_of(h_.k.cols), dv = steps_of(h_.v.cols);
    const bool rows = base::pack_rows(s_.rows, d * 32, row_of(h_.rows, d), h_.row_pairs);
    const bool gradients = base::pack_rows(s_.rows, dv * 32, row_of(h_.gradients, dv), h_.gradient_pairs);
    h_.finite = rows && gradients;
    h_.paired = s_.row == nullptr;
  }
  /// p and ds of row i, of which ds becomes halves.
  void take_slopes(dim i) noexcept {
    const key_range seen = seen_by(s_, i);
    const dim r = s_.at(i), row = i * attention_pitch, n = base::key_chunks() * 32, first = seen.lo / tile_rows * tile_rows;
    if (!seen.empty()) rules::scale(s_.p + row + first, h_.scale, seen.hi - first);
    rules::slopes(s_.p + row, s_.ds + row, seen.lo, seen.hi, n, s_.state.largest[r], s_.state.sum[r]);
    base::round_row(s_.ds + row, 0, n, n, base::key_steps, i, h_.weights);
  }
  /// turned = the transpose of the weights of 16 keys, as a left operand.
  MOE_TARGET(MOE_AVX512)
  void turn(const float* weights, dim key) noexcept {
    alignas(64) float pairs[tile_rows * tile_rows];
    const float* row[tile_rows];
    for (dim q = 0; q < tile_rows; ++q) row[q] = pairs + q * tile_rows;
    std::byte* to = h_.turned + key * steps_of(s_.rows) * line_bytes;
    for (dim i = 0; i < s_.rows; i += 32, to += block_bytes) {
      for (dim q = 0; q < tile_rows; ++q) {
        const float* upper = weights + (i + 2 * q) * attention_pitch + key;
        const dim left = s_.rows - i - 2 * q;
        const __m512 low = first_floats(upper, left > 0 ? tile_rows : 0);
        const __m512 high = first_floats(upper + attention_pitch, left > 1 ? tile_rows : 0);
        _mm512_store_si512(pairs + q * tile_rows, paired_halves(low, high));
      }
      blocks_avx512<Build>::template transpose<tile_rows>(row, 0, reinterpret_cast<float*>(to));
    }
  }
  /// to(key, .) += the sum over the step's rows that see it of weights(row, key) m(row, .), whose rows are in `pairs`.
  void sum_by_key(const float* weights, const std::byte* m, const std::byte* pairs, dim width,
                  matrix_view<float> to) noexcept {
    const dim chunks = steps_of(s_.rows);
    for (dim key = 0; key < to.rows; key += tile_rows) turn(weights, key);
    tile_heights<Tiles> heights;
    for (dim key = 0; key < to.rows; key += pair) {
      const dim keys = moe::detail::at_most(to.rows - key, pair);
      const key_range seeing = rows_seeing(key, keys);
      if (seeing.empty()) continue;
      const dim first = seeing.lo / 32, n = steps_of(seeing.hi) - first;
      const std::byte* upper = h_.turned + key * chunks * line_bytes + first * block_bytes;
      const std::byte* lower = keys > tile_rows ? upper + chunks * block_bytes : nullptr;
      base::set_heights(heights, keys);
      for (dim j = 0; j < width; j += pair)
        multiply_tiles<Build, Tiles, false>({upper, lower, block_bytes, block_bytes,
                                             pairs + (j / pair * chunks + first) * 2 * tile_bytes, n, upper, 0,
                                             to.row(key) + j, to.ld * dim{sizeof(float)}, true});
    }
    Tiles::release();
    if (h_.finite) return;
    base::for_each_strange(s_.rows, width, row_of(m, steps_of(width)), [&](dim i, dim j, float value) noexcept {
      const key_range seen = seen_by(s_, i);
      for (dim key = seen.lo; key < seen.hi; ++key) to(key, j) += weights[i * attention_pitch + key] * value;
    });
  }
  /// From the first row of the step that sees one of the keys to the last.
  key_range rows_seeing(dim key, dim keys) const noexcept {
    key_range rows{s_.rows, 0};
    for (dim i = 0; i < s_.rows; ++i)
      if (const key_range seen = seen_by(s_, i); seen.lo < key + keys && seen.hi > key && !seen.empty())
        rows = {i < rows.lo ? i : rows.lo, i + 1};
    return rows;
  }
};

template <int Build, class Tiles>
void attend_halves(const attention_step& s) noexcept {
  attention_tiles<Build, Tiles>(s).run();
}
template <int Build, class Tiles>
void attend_backward_halves(const attention_backward_step& s) noexcept {
  attention_backward_tiles<Build, Tiles>(s).run();
}
template <int Build, class Tiles>
constexpr attention_kernels attention_on_tiles() noexcept {
  attention_kernels k = attention_of<attention_avx512<Build>>;
  k.take_halves = &attention_tiles<Build, Tiles>::take_row;
  k.round_halves = &attention_tiles<Build, Tiles>::take_floats;
  k.attend_halves = &attend_halves<Build, Tiles>;
  k.backward_halves = &attend_backward_halves<Build, Tiles>;
  return k;
}

}  // namespace moe::arch::detail

#endif
