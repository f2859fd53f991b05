// SPDX-License-Identifier: Apache-2.0
/// Experts of different kinds side by side.
#pragma once

#include <tuple>
#include <utility>

#include "moe/concepts.hpp"
#include "moe/core/error.hpp"

namespace moe {

/// Consecutive experts run by one policy: how many, how wide, and the policy itself.
template <class X>
struct bank {
  dim count = 0;
  dim f = 0;  ///< hidden width; 0: that of the layer
  [[no_unique_address]] X expert{};

  /// The sizes of a layer as this bank sees them.
  shape narrow(shape s) const noexcept { return {s.tokens, s.d, f > 0 ? f : s.f, count}; }
};

namespace detail {

/// A tuple that device code reads too.
template <class...>
struct row_pack {};
template <class First, class... Rest>
struct row_pack<First, Rest...> {
  First first{};
  row_pack<Rest...> rest{};

  template <std::size_t I>
  MOE_HD constexpr const auto& get() const noexcept {
    if constexpr (I == 0) return first;
    else return rest.template get<I - 1>();
  }
  template <std::size_t I>
  constexpr auto& get() noexcept {
    if constexpr (I == 0) return first;
    else return rest.template get<I - 1>();
  }
};

}  // namespace detail

/// Row sources of several banks as one: row r belongs to the bank whose experts own it.
template <class... Rows>
struct set_rows {
  detail::row_pack<Rows...> banks{};
  const idx* offsets = nullptr;         ///< of the plan
  dim last[sizeof...(Rows)] = {};       ///< one past the last expert of each bank
  dim rows = 0;                         ///< room

  template <class Arch>
    requires(RowSource<Rows, Arch> && ...)
  MOE_HD void add_row(Arch arch, dim r, float w, float* y, dim n) const noexcept {
    add_from<0>(arch, r, w, y, n);
  }

 private:
  template <std::size_t I, class Arch>
  MOE_HD void add_from(Arch arch, dim r, float w, float* y, dim n) const noexcept {
    if constexpr (I + 1 == sizeof...(Rows)) {
      add_one_row(arch, banks.template get<I>(), r, w, y, n);
    } else {
      if (r < offsets[last[I]]) add_one_row(arch, banks.template get<I>(), r, w, y, n);
      else add_from<I + 1>(arch, r, w, y, n);
    }
  }
};

/// Banks one after another in the plan's expert order; itself an Expert. Each bank runs on its slice of the plan, by a fold:
/// no virtual call, no branch per row. The banks' saved rows share one record per plan row, as wide as the widest bank's.
///
///   expert_set<ffn_expert, copy_expert>{{.count = 3, .f = 256}, {.count = 1}}
///
/// errors   shape_error when the counts do not add up to the layer's experts
template <class... X>
class expert_set {
  using first = std::tuple_element_t<0, std::tuple<X...>>;
  static constexpr std::size_t size = sizeof...(X);

 public:
  static constexpr bool weighs_input = (detail::weighs_input<X> || ...);
  static constexpr bool replaces_gradients = true;  // bank by bank
  static constexpr bool banks_read_the_same = (std::same_as<typename first::input, typename X::input> && ...);
  using input = typename first::input;
  using input_grad = detail::input_grad<first>;
  using output = set_rows<typename X::output...>;
  using weights = std::tuple<typename X::weights...>;
  using weights_grad = std::tuple<detail::weights_grad<X>...>;
  using context = std::tuple<typename X::context...>;

  expert_set() = default;
  expert_set(bank<X>... banks) noexcept : banks_(banks...) {}
  const std::tuple<bank<X>...>& banks() const noexcept { return banks_; }

  void check(shape s) const {
    dim held = 0;
    each([&](auto, const auto& b) {
      if (b.f < 0) throw shape_error("expert_set: a bank's f is " + std::to_string(b.f) + ", expected at least 0");
      if (b.count < 0) throw shape_error("expert_set: a bank's count is " + std::to_string(b.count) + ", expected at least 0");
      if (b.count > 0) detail::check_shape(b.expert, b.narrow(s));
      held += b.count;
    });
    if (held != s.experts)
      throw shape_error("expert_set: the banks hold " + std::to_string(held) + " experts, expected " + std::to_string(s.experts) +
                        " (E)");
  }
  void check(const weights& w, shape s) const {
    each([&](auto i, const auto& b) { detail::check_weights(b.expert, std::get<i>(w), b.narrow(s)); });
  }
  weights make_weights(shape s, arena& mem) const noexcept {
    weights w;
    each([&](auto i, const auto& b) {
      arena::scope in(mem, names[i]);
      std::get<i>(w) = detail::make_weights(b.expert, b.narrow(s), mem);
    });
    return w;
  }
  weights_grad make_gradients(shape s, arena& mem) const noexcept {
    weights_grad w;
    each([&](auto i, const auto& b) {
      arena::scope in(mem, names[i]);
      std::get<i>(w) = detail::make_gradients(b.expert, b.narrow(s), mem);
    });
    return w;
  }
  context make_context(shape s, dim rows, arena& mem) const noexcept {
    if (mem.carves_records()) return overlay(s, rows, mem);  // a set within a set
    arena count;
    count.begin_records(nullptr, arena::record_grain);
    (void)overlay(s, rows, count);
    const std::size_t widest = count.end_records();
    auto* records = reinterpret_cast<std::byte*>(mem.matrix<std::int8_t>("records", rows, static_cast<dim>(widest)).data);
    if (widest > 0) mem.begin_records(records, widest);
    const context c = overlay(s, rows, mem);
    mem.end_records();
    return c;
  }
  /// Banks that store rows share one matrix: their rows are disjoint.
  output make_output(shape s, dim rows, arena& mem) const noexcept {
    output ys;
    ys.rows = rows;
    matrix_view<float> shared;
    dim at = 0;
    each([&](auto i, const auto& b) {
      ys.last[i] = at += b.count;
      if (b.count == 0) return;
      auto& own = ys.banks.template get<i>();
      if constexpr (std::same_as<std::remove_reference_t<decltype(own)>, matrix_view<float>>) {
        if (shared.rows == 0) shared = b.expert.make_output(b.narrow(s), rows, mem);
        own = shared;
      } else {
        own = b.expert.make_output(b.narrow(s), rows, mem);
      }
    });
    return ys;
  }
  template <class B>
  void make_scratch(const B& backend, shape s, dim rows, arena& mem) const noexcept {
    each([&](auto, const auto& b) {
      if (b.count > 0) detail::count_scratch_on(backend, b.expert, mem, b.narrow(s), rows);
    });
  }
  template <class B>
  void count_backward(const B& backend, shape s, dim rows, arena& mem) const noexcept {
    each([&](auto, const auto& b) {
      if (b.count > 0) detail::count_expert_backward(backend, b.expert, b.narrow(s), rows, mem);
    });
  }

  template <class B>
    requires(Expert<X, B> && ...)
  void forward(const call<B>& on, const weights& w, const input& x, const bank_rows& rows, output& ys,
               context& ctx) const noexcept {
    ys.offsets = rows.offsets.data();
    each_bank(on, rows, [&](auto i, const auto& b, const call<B>& own, const bank_rows& part) {
      b.expert.forward(own, std::get<i>(w), x, part, ys.banks.template get<i>(), std::get<i>(ctx));
    });
  }
  template <class B>
    requires(TrainableExpert<X, B> && ...)
  void backward(const call<B>& on, const weights& w, const input& x, const bank_rows& rows, const context& ctx,
                gathered<float> dys, input_grad dx, weights_grad& dw, std::span<float> dweight) const noexcept {
    each_bank(on, rows, [&](auto i, const auto& b, const call<B>& own, const bank_rows& part) {
      detail::expert_backward(own, b.expert, std::get<i>(w), x, part, std::get<i>(ctx), dys, dx, std::get<i>(dw), dweight);
    });
  }

 private:
  static constexpr const char* names[] = {"0", "1", "2", "3", "4", "5", "6", "7", "8", "9", "10", "11", "12", "13", "14", "15"};
  static_assert(size <= std::size(names), "moe::expert_set: at most 16 banks");

  /// The columns of all banks, one bank over the other.
  context overlay(shape s, dim rows, arena& mem) const noexcept {
    const std::size_t start = mem.field();
    std::size_t end = start;
    context c;
    each([&](auto i, const auto& b) {
      if (b.count == 0) return;
      mem.move_field(start);
      std::get<i>(c) = detail::make_context(b.expert, b.narrow(s), rows, mem);
      if (mem.field() > end) end = mem.field();
    });
    mem.move_field(end);
    return c;
  }
  template <class F>
  void each(F f) const {
    [&]<std::size_t... I>(std::index_sequence<I...>) {
      (f(std::integral_constant<std::size_t, I>{}, std::get<I>(banks_)), ...);
    }(std::make_index_sequence<size>{});
  }
  template <class B, class F>
  void each_bank(const call<B>& on, const bank_rows& rows, F f) const noexcept {
    dim at = 0;
    each([&](auto i, const auto& b) {
      if (b.count > 0) f(i, b, on.with(b.narrow(on.sizes)), rows.bank(at, b.count));
      at += b.count;
    });
  }

  std::tuple<bank<X>...> banks_{};
};

}  // namespace moe
