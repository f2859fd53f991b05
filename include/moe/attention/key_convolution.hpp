// SPDX-License-Identifier: Apache-2.0
/// A short causal convolution over the keys, which lets neighbouring keys gather around what a block is about.
#pragma once

#include "moe/attention/heads.hpp"
#include "moe/expert/activation.hpp"
#include "moe/loss/sum_tokens.hpp"

namespace moe {

/// k'[t] = k[t] + silu(z[t]), z[t] = sum over l = 0 .. W-1 of w[l] k[t-l], each channel on its own. k' takes the place of k in
/// routing and in attention. Before the first key of a sequence stand zeros; a sequence that goes on (in decoding, or in the
/// next piece of a long text) reads its last W-1 keys from `tail`.
///
/// weights  w[W, c], c = h_kv*d      saves  nothing, k is read again      adds to  dk, dw
/// backward u[t] = dk'[t] silu'(z[t]);  dk[t] = dk'[t] + sum of w[l] u[t+l];  dw[l] = sum over t of u[t] k[t-l]
/// k and k' are floats or halves in memory of their own; arithmetic is in float.
/// FlashMoBA, Xiao et al. 2025, arXiv:2511.11571 (kconv3, kconv5)
template <int W>
  requires(W >= 2)
struct key_convolution {
  struct weights {
    matrix_view<float> w;
  };
  using weights_grad = weights;
  /// The last W-1 keys of each sequence before the convolution, the oldest first: [S*(W-1), c].
  template <class T>
  struct tail {
    matrix_view<T> k;
  };
  struct backward_scratch {
    matrix_view<float> u, sum;
  };

  static constexpr int length = W;

  void check(const weights& p, dim cols) const { expect(p.w, W, cols, "key_convolution: w", "W x h_kv*d"); }
  weights make_weights(dim cols, arena& mem) const noexcept { return {mem.matrix<float>("w", W, cols, initial::zeros)}; }
  /// Zeroed where the memory is: no keys yet.
  template <class T>
  tail<T> make_tail(dim sequences, dim cols, arena& mem) const noexcept {
    return {mem.matrix<T>("tail", sequences * (W - 1), cols)};
  }
  /// Forgets the keys of sequence s.
  template <class T>
  void reset(const tail<T>& past, dim s) const noexcept {
    for (dim i = 0; i < W - 1; ++i)
      for (dim j = 0; j < past.k.cols; ++j) past.k(s * (W - 1) + i, j) = T(0.f);
  }
  backward_scratch make_backward_scratch(dim tokens, dim cols, arena& mem) const noexcept {
    const backward_scratch s{mem.matrix<float>("u", tokens, cols), mem.matrix<float>("sum", 1, W * cols)};
    scratch_frame for_sum(mem);
    (void)detail::make_partial_sums(detail::token_groups(tokens, 0), W * cols, mem);
    return s;
  }

  /// k' of whole sequences.
  template <class B, class In, class Out>
  void forward(const call<B>& on, const weights& p, matrix_view<In> k, const packed_sequences& sequences,
               matrix_view<Out> to) const noexcept {
    for_each_token(on, k.rows, convolve<In, Out>{p.w, k, {}, sequences, to});
  }
  /// k' of sequences that go on behind their tails, which then move on to the last of these keys.
  template <class B, class In, class Out, class T>
  void forward(const call<B>& on, const weights& p, matrix_view<In> k, const packed_sequences& sequences,
               matrix_view<Out> to, const tail<T>& past) const noexcept {
    static_assert(std::is_same_v<T, std::remove_const_t<In>>, "moe::key_convolution: the tail keeps keys as they come");
    for_each_token(on, k.rows, convolve<In, Out>{p.w, k, past.k, sequences, to});
    for_each_token(on, sequences.count(), move_on<In>{k, past.k, sequences});
  }
  /// Of whole sequences.
  template <class B, class In, class Grad>
  void backward(const call<B>& on, const weights& p, matrix_view<In> k, const packed_sequences& sequences,
                matrix_view<Grad> dto, matrix_view<float> dk, weights_grad& dp) const noexcept {
    scratch_frame frame(on.scratch);
    const matrix_view<float> u = on.scratch.template matrix<float>("u", k.rows, k.cols);
    const packed_sequences whole{sequences.offsets, {}};
    for_each_token(on, k.rows, slopes<In, Grad>{p.w, k, whole, dto, u});
    if (dk) for_each_token(on, k.rows, spread<Grad>{p.w, u, whole, dto, dk});
    if (!dp.w) return;
    const matrix_view<float> sum = on.scratch.template matrix<float>("sum", 1, W * k.cols);
    detail::sum_tokens(on, detail::token_groups(k.rows, 0), weight_terms<In>{k, whole, u}, sum);
    add(on, matrix_view<const float>(sum.data, W, k.cols), dp.w);
  }

  // What kernels are made of is public: nvcc wants to name it.
  template <class In>
  using element = std::remove_const_t<In>;

  /// The key l places before token t, which lies at place n of its sequence s; null where there is none.
  template <class In>
  MOE_HD static const In* before(matrix_view<In> k, matrix_view<element<In>> past, dim s, dim t, dim n, dim l) noexcept {
    if (l <= n) return k.row(t - l);
    return past ? past.row(s * (W - 1) + W - 1 + n - l) : nullptr;
  }
  template <class In>
  MOE_HD static float sum_at(matrix_view<const float> w, const In* const (&key)[W], dim j) noexcept {
    float z = 0;
    for (int l = 0; l < W; ++l)
      if (key[l]) z += w(l, j) * static_cast<float>(key[l][j]);
    return z;
  }
  template <class In, class Out>
  struct convolve {
    matrix_view<const float> w;
    matrix_view<In> k;
    matrix_view<element<In>> past;
    packed_sequences sequences;
    matrix_view<Out> to;
    MOE_HD void operator()(dim t) const noexcept {
      const dim s = sequences.sequence(t), n = t - sequences.first(s);
      const In* key[W];
      for (int l = 0; l < W; ++l) key[l] = before(k, past, s, t, n, l);
      for (dim j = 0; j < k.cols; ++j) to(t, j) = Out(static_cast<float>(key[0][j]) + silu{}(sum_at(w, key, j)));
    }
  };
  template <class In>
  struct move_on {
    matrix_view<In> k;
    matrix_view<element<In>> past;
    packed_sequences sequences;
    MOE_HD void operator()(dim s) const noexcept {
      const dim end = sequences.last(s, k.rows), n = end - sequences.first(s);
      for (dim i = 0; n > 0 && i < W - 1; ++i) {  // a row moves towards the front only, so none is lost
        const In* from = before(k, past, s, end - 1, n - 1, W - 2 - i);
        for (dim j = 0; j < k.cols; ++j) past(s * (W - 1) + i, j) = from[j];
      }
    }
  };
  template <class In, class Grad>
  struct slopes {
    matrix_view<const float> w;
    matrix_view<In> k;
    packed_sequences sequences;
    matrix_view<Grad> dto;
    matrix_view<float> u;
    MOE_HD void operator()(dim t) const noexcept {
      const dim s = sequences.sequence(t), n = t - sequences.first(s);
      const In* key[W];
      for (int l = 0; l < W; ++l) key[l] = before<In>(k, {}, s, t, n, l);
      for (dim j = 0; j < k.cols; ++j) u(t, j) = static_cast<float>(dto(t, j)) * silu{}.slope(sum_at(w, key, j));
    }
  };
  template <class Grad>
  struct spread {
    matrix_view<const float> w, u;
    packed_sequences sequences;
    matrix_view<Grad> dto;
    matrix_view<float> dk;
    MOE_HD void operator()(dim t) const noexcept {
      const dim end = sequences.last(sequences.sequence(t), u.rows);
      for (dim j = 0; j < u.cols; ++j) dk(t, j) += static_cast<float>(dto(t, j));
      for (dim l = 0; l < W && t + l < end; ++l)
        for (dim j = 0; j < u.cols; ++j) dk(t, j) += w(l, j) * u(t + l, j);
    }
  };
  template <class In>
  struct weight_terms {
    matrix_view<In> k;
    packed_sequences sequences;
    matrix_view<const float> u;
    MOE_HD void operator()(dim t, float* sum) const noexcept {
      const dim n = t - sequences.first(sequences.sequence(t));
      for (dim l = 0; l < W && l <= n; ++l)
        for (dim j = 0; j < k.cols; ++j) sum[l * k.cols + j] += u(t, j) * static_cast<float>(k(t - l, j));
    }
  };
};

}  // namespace moe
