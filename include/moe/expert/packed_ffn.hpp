// SPDX-License-Identifier: Apache-2.0
/// Feed-forward experts with packed weights, for inference.
#pragma once

#include "moe/backend/packed.hpp"
#include "moe/concepts.hpp"
#include "moe/core/error.hpp"
#include "moe/expert/ffn.hpp"
#include "moe/expert/packed_rows.hpp"

namespace moe {

/// y = down form(gate x, up x), the experts of basic_ffn_expert with weights of type T, packed at load time by `pack`:
///
///   T                              bytes a weight      error of a weight
///   float                          4                   none
///   bf16, f16                      2                   2^-9, 2^-12 of it
///   std::int8_t                    1                   1/254 of the largest of its row
///   int4_groups<32>, <128>         0.5625, 0.515625    1/16 of the largest of its group, 1/8 of it next to its opposite
///   ternary                        0.25                half of the mean magnitude up to that, and what is beyond it
///
/// and, for the scaled types, 4 bytes a row. Activations are floats; with scaled weights each product quantises its rows to
/// bytes, one scale a row (error 1/254 of the largest of the row), and sums them exactly. On a device std::int8_t and
/// ternary run, a thread an element.
///
/// weights  gate_up, down and biases       saves  nothing
/// errors   shape_error when f is not positive or a tensor does not fit
/// An inference-only policy: it has no backward.
/// A scale for each row of both operands: Dettmers et al. 2022 (LLM.int8()), arXiv:2208.07339
template <class T, class Form = glu<silu>, bool Biased = false>
struct packed_ffn_expert {
  static constexpr dim together = Form::gated ? 2 : 1;
  using input = matrix_view<const float>;
  using output = matrix_view<float>;
  struct weights {
    packed_matrix<T> gate_up;  ///< panels of gate and up in turn; of up alone where the form is not gated
    packed_matrix<T> down;
    std::span<float> gate_up_bias, down_bias;  ///< in the order of the panels' rows
  };
  using context = nothing;

  [[no_unique_address]] Form form{};

  void check(shape s) const {
    if (s.f <= 0) throw shape_error("packed_ffn_expert: f is " + std::to_string(s.f) + ", expected at least 1");
    constexpr dim most = 1 << 16;  // sums of bytes stay within 32 bits
    if (packing<T>::scaled && (s.d > most || s.f > most))
      throw shape_error("packed_ffn_expert: d is " + std::to_string(s.d) + " and f " + std::to_string(s.f) +
                        ", expected at most 65536");
  }
  void check(const weights& w, shape s) const {
    check_matrix(w.gate_up, s.experts * detail::panels_of(s.f) * together, s.d, "packed_ffn_expert: gate_up");
    check_matrix(w.down, s.experts * detail::panels_of(s.d), s.f, "packed_ffn_expert: down");
    if constexpr (Biased) {
      expect(static_cast<dim>(w.gate_up_bias.size()), w.gate_up.panels.rows * detail::panel_rows,
             "packed_ffn_expert: gate_up_bias", "values", "32 a panel");
      expect(static_cast<dim>(w.down_bias.size()), w.down.panels.rows * detail::panel_rows, "packed_ffn_expert: down_bias",
             "values", "32 a panel");
    }
  }
  weights make_weights(shape s, arena& mem) const noexcept {
    weights w;
    w.gate_up = packed_matrix<T>::make("gate_up", "gate_up_scale", s.experts * detail::panels_of(s.f) * together, s.d, mem);
    w.down = packed_matrix<T>::make("down", "down_scale", s.experts * detail::panels_of(s.d), s.f, mem);
    if constexpr (Biased) {
      w.gate_up_bias = mem.vector<float>("gate_up_bias", w.gate_up.panels.rows * detail::panel_rows, initial::zeros);
      w.down_bias = mem.vector<float>("down_bias", w.down.panels.rows * detail::panel_rows, initial::zeros);
    }
    return w;
  }
  output make_output(shape s, dim rows, arena& mem) const noexcept { return mem.matrix<float>("ys", rows, s.d); }
  template <class B>
  void make_scratch(const B& backend, shape s, dim rows, arena& mem) const noexcept {
    if constexpr (std::same_as<typename B::space, host>)
      count_packed_ffn<T>(backend, s, rows, mem);
    else
      (void)detail::packed_rows_scratch::make(s, rows, mem);
  }

  /// Packs float32 experts into `to`, made by make_weights for the same shape.
  template <class Layout = separate>
  void pack(const ffn_weights& from, shape s, weights& to) const {
    basic_ffn_expert<Form, Layout, Biased>{form}.check(from, s);
    check(to, s);
    using source = basic_ffn_expert<Form, Layout, Biased>;
    const matrix_stack<const float> gate = source::gate_of(from, s.f), up = source::up_of(from, s.f),
                                    down = stack<const float>(from.down, s.d);
    for (dim e = 0; e < s.experts; ++e) {
      const dim first = e * detail::panels_of(s.f) * together;
      if constexpr (Form::gated) to.gate_up.pack(first, gate[e], together);
      to.gate_up.pack(first + together - 1, up[e], together);
      to.down.pack(e * detail::panels_of(s.d), down[e]);
      if constexpr (Biased) {
        if constexpr (Form::gated) pack_bias(source::gate_bias_of(from, s.f)[e], to.gate_up_bias, first, together);
        pack_bias(source::up_bias_of(from, s.f)[e], to.gate_up_bias, first + together - 1, together);
        pack_bias(stack<const float>(from.down_bias, s.d)[e], to.down_bias, e * detail::panels_of(s.d), 1);
      }
    }
  }
  /// The same into weights carved from `mem`.
  template <class Layout = separate>
  weights pack(const ffn_weights& from, shape s, arena& mem) const {
    basic_ffn_expert<Form, Layout, Biased>{form}.check(from, s);
    weights w = make_weights(s, mem);
    pack<Layout>(from, s, w);
    return w;
  }

  template <class B, class... Then>
  void forward(const call<B>& on, const weights& w, const input& x, const bank_rows& rows, output ys, context&,
               const Then&... then) const noexcept {
    if constexpr (std::same_as<typename B::space, host>)
      packed_ffn(on, rows, rows.gather(x), form, w.gate_up, w.gate_up_bias, w.down, w.down_bias, ys, then...);
    else
      packed_ffn_by_rows(on, rows, rows.gather(x), form, w.gate_up, w.gate_up_bias, w.down, w.down_bias, ys);
  }

 private:
  static void check_matrix(const packed_matrix<T>& m, dim rows, dim cols, const char* what) {
    expect(m.panels, rows, packed_matrix<T>::panel_bytes(cols) / dim{sizeof(typename packing<T>::unit)}, what,
           "panels x elements of one");
    expect(m.cols, cols, what, "columns", "unpacked");
    if constexpr (packing<T>::scaled)
      expect(static_cast<dim>(m.scale.size()), rows * detail::panel_rows, what, "scales", "32 a panel");
  }
  static void pack_bias(matrix_view<const float> bias, std::span<float> to, dim first, dim step) noexcept {
    for (dim r = 0; r < bias.rows; ++r)
      to[static_cast<std::size_t>((first + r / detail::panel_rows * step) * detail::panel_rows + r % detail::panel_rows)] =
          bias(r, 0);
  }
};

/// SwiGLU with weights of -1, 0, 1 times a scale for each tensor and expert, as packing<ternary> has it. Both operands are
/// integers: with alpha = mean|W| + 1e-5, codes = round(W / alpha) clipped to -1 .. 1, beta = max|x| + 1e-5 for each row,
/// X = round(127 x / beta), all to the nearest, ties to even: x W^T ~ alpha beta / 127 sum X codes.
/// Ma et al. 2024 (BitNet b1.58), arXiv:2402.17764; as experts: MoTE, arXiv:2506.14435
using ternary_expert = packed_ffn_expert<ternary>;

}  // namespace moe
