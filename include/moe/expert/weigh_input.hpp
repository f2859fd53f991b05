// SPDX-License-Identifier: Apache-2.0
/// The combine weight on an expert's input instead of its output.
#pragma once

#include "moe/concepts.hpp"

namespace moe {

/// Rows of an expert that stores none, and the weighed input they are made from.
template <class Rows>
struct weighed_rows {
  Rows rows{};
  matrix_view<float> input;

  template <class Arch>
    requires RowSource<Rows, Arch>
  MOE_HD void add_row(Arch arch, dim r, float w, float* y, dim n) const noexcept {
    add_one_row(arch, rows, r, w, y, n);
  }
};

/// ys[r] = X(weight[r] x[token[r]]), to be combined by `unweighted_sum`. Not the same as weighing the output, since an
/// expert is not linear. Llama-4.
///
/// weights, saves  those of X      adds to  dx, the gradients of X, dweight[r] = <d(weight x), x>
template <class X>
struct weigh_input {
  static constexpr bool weighs_input = true, replaces_gradients = true;
  static constexpr bool stores_rows = std::same_as<typename X::output, matrix_view<float>>;
  using input = matrix_view<const float>;
  using input_grad = matrix_view<float>;
  using output = std::conditional_t<stores_rows, matrix_view<float>, weighed_rows<typename X::output>>;
  using weights = typename X::weights;
  using weights_grad = detail::weights_grad<X>;
  using context = typename X::context;

  [[no_unique_address]] X expert{};

  void check(shape s) const { detail::check_shape(expert, s); }
  void check(const weights& w, shape s) const { detail::check_weights(expert, w, s); }
  weights make_weights(shape s, arena& mem) const noexcept { return detail::make_weights(expert, s, mem); }
  weights_grad make_gradients(shape s, arena& mem) const noexcept { return detail::make_gradients(expert, s, mem); }
  context make_context(shape s, dim rows, arena& mem) const noexcept { return detail::make_context(expert, s, rows, mem); }
  output make_output(shape s, dim rows, arena& mem) const noexcept {
    if constexpr (stores_rows) return expert.make_output(s, rows, mem);
    else return {expert.make_output(s, rows, mem), mem.matrix<float>("weighed", rows, s.d)};
  }
  template <class B>
  void make_scratch(const B& backend, shape s, dim rows, arena& mem) const noexcept {
    if constexpr (stores_rows) (void)mem.matrix<float>("weighed", rows, s.d);
    detail::count_scratch_on(backend, expert, mem, inner(s, rows), rows);
  }
  template <class B>
  void count_backward(const B& backend, shape s, dim rows, arena& mem) const noexcept {
    (void)mem.matrix<float>("weighed", rows, s.d);
    (void)mem.matrix<float>("dweighed", rows, s.d);
    detail::count_expert_backward(backend, expert, inner(s, rows), rows, mem);
  }

  template <class B>
    requires Expert<X, B>
  void forward(const call<B>& on, const weights& w, const input& x, const bank_rows& rows, output& ys,
               context& ctx) const noexcept {
    scratch_frame frame(on.scratch);
    const dim room = rows.room(on.sizes);
    const auto run = [&](matrix_view<float> weighed, auto& to) {
      map_rows(on, rows, weighed, scaled{rows.gather(x), rows.weight.data()});
      expert.forward(on.with(inner(on.sizes, room)), w, weighed, unweighed(rows), to, ctx);
    };
    if constexpr (stores_rows) run(on.scratch.template matrix<float>("weighed", room, on.sizes.d), ys);
    else run(ys.input, ys.rows);
  }
  template <class B>
    requires TrainableExpert<X, B>
  void backward(const call<B>& on, const weights& w, const input& x, const bank_rows& rows, const context& ctx,
                gathered<float> dys, input_grad dx, weights_grad& dw, std::span<float> dweight) const noexcept {
    scratch_frame frame(on.scratch);
    const dim room = rows.room(on.sizes);
    const auto weighed = on.scratch.template matrix<float>("weighed", room, on.sizes.d);
    auto dweighed = on.scratch.template matrix<float>("dweighed", room, on.sizes.d);
    map_rows(on, rows, weighed, scaled{rows.gather(x), rows.weight.data()});
    fill_rows(on, rows, dweighed, 0.f);
    detail::expert_backward(on.with(inner(on.sizes, room)), expert, w, input(weighed), unweighed(rows), ctx, dys, dweighed, dw,
                            dweight);
    if (!dweight.empty() && !rows.weight.empty()) dot_rows(on, rows, gathered<float>{dweighed}, rows.gather(x), dweight);
    if (dx) scatter_add_rows(on, rows, gathered<float>{dweighed, nullptr, rows.weight.data()}, dx);
  }

  // What kernels are made of is public: nvcc wants to name it.
  struct scaled {
    gathered<float> x;
    const float* weight;
    MOE_HD float operator()(dim, dim r, dim j) const noexcept { return (weight ? weight[r] : 1.f) * x.row(r)[j]; }
  };
 private:
  static shape inner(shape s, dim rows) noexcept { return {rows, s.d, s.f, s.experts}; }
  static bank_rows unweighed(const bank_rows& rows) noexcept {
    bank_rows own;
    own.offsets = rows.offsets;
    return own;
  }
};

}  // namespace moe
