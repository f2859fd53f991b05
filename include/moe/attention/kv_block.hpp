// SPDX-License-Identifier: Apache-2.0
/// A block of keys and values as an expert.
#pragma once

#include <limits>

#include "moe/attention/input.hpp"

namespace moe {

/// Row r is query t on block b: o = softmax(q_t k_i^T / sqrt d) v_i over the keys i of the block up to t's position, and
/// the log-sum-exp of those scores.
///
/// saves    nothing: the rows themselves are kept by the layer, since lse_merge needs them
/// adds to  dq, dk, dv
struct kv_block_expert {
  using input = attention_input;
  using input_grad = attention_gradient;
  using output = attention_rows;
  using weights = nothing;
  struct context { attention_rows rows; };

  dim block = 64;  ///< keys per block
  dim dv = 0;      ///< width of a value; 0: d

  output make_output(shape s, dim rows, arena& mem) const noexcept {
    return {mem.matrix<float>("o", rows, dv > 0 ? dv : s.d), mem.matrix<float>("lse", rows, 1)};
  }
  context make_context(shape, dim, arena&) const noexcept { return {}; }

  template <class B>
  void forward(const call<B>& on, const weights&, const input& x, const bank_rows& rows, output ys, context& ctx) const noexcept {
    ctx.rows = ys;
    for_each_row(on, rows, attend<typename B::arch>{x, ys, rows.token.data(), block});
  }
  /// With p_i = exp(score_i - lse): ds_i = p_i (<do, v_i> - <do, o> + dlse).
  template <class B>
  void backward(const call<B>& on, const weights&, const input& x, const bank_rows& rows, const context& ctx, output dys,
                input_grad dx, weights&, std::span<float>) const noexcept {
    // dq: one writer per query; dk and dv: one writer per block, so both walks are free of races and in a fixed order.
    for_each_row_by_token(on, rows, query_gradient<typename B::arch>{x, ctx.rows, dys, rows.offsets.data(), rows.experts(), block, dx.q});
    for_each_token(on, rows.experts(), block_gradient<typename B::arch>{x, ctx.rows, dys, rows.offsets.data(), rows.token.data(), block, dx.k, dx.v});
  }

  // What kernels are made of is public: nvcc wants to name it.
  struct span {
    dim first, last;
  };
  MOE_HD static span visible(const attention_input& x, dim b, dim block, dim t) noexcept {
    const dim first = b * block, end = first + block < x.k.rows ? first + block : x.k.rows, own = x.position(t) + 1;
    return {first, own < end ? own : end};
  }
  MOE_HD static float scale(const attention_input& x) noexcept { return 1.f / std::sqrt(static_cast<float>(x.q.cols)); }

  template <class Arch>
  struct attend {
    attention_input x;
    attention_rows ys;
    const idx* token;
    dim block;
    MOE_HD void operator()(dim b, dim r) const noexcept {
      const dim t = token[r], n = ys.o.cols;
      const span keys = visible(x, b, block, t);
      float* o = ys.o.row(r);
      float largest = -detail::infinity, sum = 0;
      for (dim j = 0; j < n; ++j) o[j] = 0;
      for (dim i = keys.first; i < keys.last; ++i) {
        const float s = scale(x) * dot(Arch{}, x.q.row(t), x.k.row(i), x.q.cols);
        if (s > largest) {
          const float fade = std::exp(largest - s);
          for (dim j = 0; j < n; ++j) o[j] *= fade;
          sum *= fade;
          largest = s;
        }
        const float p = std::exp(s - largest);
        sum += p;
        axpy(Arch{}, p, x.v.row(i), o, n);
      }
      for (dim j = 0; j < n && sum > 0; ++j) o[j] /= sum;
      ys.lse(r, 0) = sum > 0 ? largest + std::log(sum) : -detail::infinity;
    }
  };
  /// p and ds of key i for row r.
  template <class Arch>
  MOE_HD static void pair(const attention_input& x, const attention_rows& ys, const attention_rows& dys, dim t, dim r, dim i,
                          float& p, float& ds) noexcept {
    const dim n = ys.o.cols;
    p = std::exp(scale(x) * dot(Arch{}, x.q.row(t), x.k.row(i), x.q.cols) - ys.lse(r, 0));
    const float pull = dot(Arch{}, dys.o.row(r), x.v.row(i), n) - dot(Arch{}, dys.o.row(r), ys.o.row(r), n);
    ds = scale(x) * p * (pull + dys.lse(r, 0));
  }
  template <class Arch>
  struct query_gradient {
    attention_input x;
    attention_rows ys, dys;
    const idx* offsets;
    dim experts, block;
    matrix_view<float> dq;
    MOE_HD void operator()(dim t, dim r) const noexcept {
      dim b = 0;
      while (b + 1 < experts && offsets[b + 1] <= r) ++b;
      const span keys = visible(x, b, block, t);
      for (dim i = keys.first; i < keys.last; ++i) {
        float p, ds;
        pair<Arch>(x, ys, dys, t, r, i, p, ds);
        axpy(Arch{}, ds, x.k.row(i), dq.row(t), dq.cols);
      }
    }
  };
  template <class Arch>
  struct block_gradient {
    attention_input x;
    attention_rows ys, dys;
    const idx *offsets, *token;
    dim block;
    matrix_view<float> dk, dv;
    MOE_HD void operator()(dim b) const noexcept {
      for (dim r = offsets[b]; r < offsets[b + 1]; ++r) {
        const dim t = token[r];
        const span keys = visible(x, b, block, t);
        for (dim i = keys.first; i < keys.last; ++i) {
          float p, ds;
          pair<Arch>(x, ys, dys, t, r, i, p, ds);
          axpy(Arch{}, ds, x.q.row(t), dk.row(i), dk.cols);
          axpy(Arch{}, p, dys.o.row(r), dv.row(i), dv.cols);
        }
      }
    }
  };
};

}  // namespace moe
