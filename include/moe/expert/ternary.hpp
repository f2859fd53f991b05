// SPDX-License-Identifier: Apache-2.0
/// Experts with packed ternary weights, for inference.
#pragma once

#include "moe/concepts.hpp"
#include "moe/core/error.hpp"
#include "moe/expert/ffn.hpp"

namespace moe {

/// A stack of ternary matrices, two bits a weight, four weights a byte along the input axis; the last byte of a row may be
/// short. W[e] ~ scale[e] codes[e], codes in {-1, 0, 1}.
struct ternary_matrix {
  matrix_view<ternary> codes;    ///< [E*rows, ceil(cols/4)]
  std::span<float> scale;        ///< [E]
  dim cols = 0;                  ///< of the unpacked matrix

  static ternary_matrix make(const char* name, dim experts, dim rows, dim cols, arena& mem) noexcept {
    return {mem.matrix<ternary>(name, experts * rows, (cols + 3) / 4), mem.vector<float>(name, experts, initial::ones), cols};
  }
};

/// SwiGLU with ternary weights and int8 activations, products summed exactly in int32:
///   alpha = mean|W| + 1e-5, codes = round(W / alpha) clipped to -1..1, a scale per tensor and expert;
///   beta = max|x| + 1e-5, X = round(127 x / beta) clipped to -128..127, per row;
///   x W^T ~ alpha beta / 127 sum X codes.  Rounds half to even. Every product quantises its own input.
///
/// weights  gate, up, down as ternary_matrix, made by `pack`; 0.25 bytes a weight
/// An inference-only policy: it has no backward.
/// Ma et al. 2024 (BitNet b1.58), arXiv:2402.17764; as experts: MoTE, arXiv:2506.14435
struct ternary_expert {
  using input = matrix_view<const float>;
  using output = matrix_view<float>;
  struct weights { ternary_matrix gate, up, down; };
  using context = nothing;
  struct scratch {
    matrix_view<std::int8_t> x, a;  ///< quantised rows
    matrix_view<float> beta;        ///< [A,2] of x and of a
    matrix_view<float> gate, up;
  };

  void check(shape s) const {
    if (s.f <= 0) throw shape_error("ternary_expert: f is " + std::to_string(s.f) + ", expected at least 1");
  }
  void check(const weights& w, shape s) const {
    check(w.gate, s.experts, s.f, s.d, "ternary_expert: gate", "E*f x ceil(d/4)");
    check(w.up, s.experts, s.f, s.d, "ternary_expert: up", "E*f x ceil(d/4)");
    check(w.down, s.experts, s.d, s.f, "ternary_expert: down", "E*d x ceil(f/4)");
  }
  weights make_weights(shape s, arena& mem) const noexcept {
    return {ternary_matrix::make("gate", s.experts, s.f, s.d, mem), ternary_matrix::make("up", s.experts, s.f, s.d, mem),
            ternary_matrix::make("down", s.experts, s.d, s.f, mem)};
  }
  output make_output(shape s, dim rows, arena& mem) const noexcept { return mem.matrix<float>("ys", rows, s.d); }
  scratch make_scratch(shape s, dim rows, arena& mem) const noexcept {
    return {mem.matrix<std::int8_t>("x", rows, s.d), mem.matrix<std::int8_t>("a", rows, s.f), mem.matrix<float>("beta", rows, 2),
            mem.matrix<float>("gate", rows, s.f), mem.matrix<float>("up", rows, s.f)};
  }
  /// Quantises and packs float32 experts, separate up and gate, at load time.
  weights pack(const ffn_weights& from, shape s, arena& mem) const {
    basic_ffn_expert<>{}.check(from, s);
    weights w = make_weights(s, mem);
    pack(from.gate, s.experts, w.gate);
    pack(from.up, s.experts, w.up);
    pack(from.down, s.experts, w.down);
    return w;
  }

  template <class B>
  void forward(const call<B>& on, const weights& w, const input& x, const bank_rows& rows, output ys, context&) const noexcept {
    scratch_frame frame(on.scratch);
    const scratch s = make_scratch(on.sizes, rows.room(on.sizes), on.scratch);
    for_each_row(on, rows, quantise{rows.gather(x), s.x, s.beta, 0});
    for_each_row(on, rows, product{w.gate, w.gate.scale.data(), s.x, s.beta, 0, s.gate});
    for_each_row(on, rows, product{w.up, w.up.scale.data(), s.x, s.beta, 0, s.up});
    map_rows(on, rows, s.up, activate{s.gate, s.up});
    for_each_row(on, rows, quantise{gathered<float>{s.up}, s.a, s.beta, 1});
    for_each_row(on, rows, product{w.down, w.down.scale.data(), s.a, s.beta, 1, ys});
  }

  // What kernels are made of is public: nvcc wants to name it.
  struct quantise {
    gathered<float> x;
    matrix_view<std::int8_t> to;
    matrix_view<float> beta;
    dim which;
    MOE_HD void operator()(dim, dim r) const noexcept {
      const float* v = x.row(r);
      float largest = 0;
      for (dim j = 0; j < to.cols; ++j)
        if (!(std::fabs(v[j]) <= largest) && largest == largest) largest = std::fabs(v[j]);  // NaN stays: the row is NaN
      const float b = largest + epsilon;
      for (dim j = 0; j < to.cols; ++j)
        to(r, j) = static_cast<std::int8_t>(clip(round_to_even(127.f * v[j] / b), -128.f, 127.f));
      beta(r, which) = b;
    }
  };
  struct product {
    ternary_matrix w;
    const float* scale;
    matrix_view<const std::int8_t> x;
    matrix_view<const float> beta;
    dim which;
    matrix_view<float> y;
    MOE_HD void operator()(dim e, dim r) const noexcept {
      const float unit = scale[e] * beta(r, which) / 127.f;
      for (dim j = 0; j < y.cols; ++j) {
        const ternary* codes = w.codes.row(e * y.cols + j);
        std::int32_t sum = 0;
        for (dim c = 0; c < w.cols; ++c) sum += x(r, c) * (((codes[c / 4].bits >> (2 * (c % 4))) & 3) - 1);
        y(r, j) = unit * static_cast<float>(sum);
      }
    }
  };
  struct activate {
    matrix_view<const float> gate, up;
    MOE_HD float operator()(dim, dim r, dim j) const noexcept { return glu<silu>{}(gate(r, j), up(r, j)); }
  };

 private:
  static constexpr float epsilon = 1e-5f;

  static void check(const ternary_matrix& m, dim experts, dim rows, dim cols, const char* what, const char* symbols) {
    expect(m.codes, experts * rows, (cols + 3) / 4, what, symbols);
    expect(static_cast<dim>(m.scale.size()), experts, what, "scales", "E");
    expect(m.cols, cols, what, "columns", "unpacked");
  }
  MOE_HD static float round_to_even(float v) noexcept { return std::nearbyint(v); }
  MOE_HD static float clip(float v, float low, float high) noexcept { return v > low ? (v < high ? v : high) : low; }

  static void pack(matrix_view<const float> from, dim experts, ternary_matrix& to) noexcept {
    const dim rows = from.rows / experts;
    for (dim e = 0; e < experts; ++e) {
      double sum = 0;
      for (dim r = e * rows; r < (e + 1) * rows; ++r)
        for (dim c = 0; c < from.cols; ++c) sum += std::fabs(from(r, c));
      const float alpha = static_cast<float>(sum / static_cast<double>(rows * from.cols)) + epsilon;
      to.scale[static_cast<std::size_t>(e)] = alpha;
      for (dim r = e * rows; r < (e + 1) * rows; ++r)
        for (dim c = 0; c < to.codes.cols; ++c) {
          unsigned byte = 0;
          for (dim i = 0; i < 4 && 4 * c + i < from.cols; ++i)
            byte |= static_cast<unsigned>(clip(round_to_even(from(r, 4 * c + i) / alpha), -1.f, 1.f) + 1.f) << (2 * i);
          to.codes(r, c).bits = static_cast<std::uint8_t>(byte);
        }
    }
  }
};

}  // namespace moe
