// SPDX-License-Identifier: Apache-2.0
/// What follows a part of a step: function objects that a step calls without being compiled for each of them.
#pragma once

#include <concepts>

#include "moe/core/plan.hpp"

namespace moe {

/// Refers to a function object, which outlives it and is called from any thread.
template <class... A>
class callee {
 public:
  template <class F>
    requires(!std::same_as<F, callee>)
  callee(const F& f) noexcept
      : object_(&f), call_([](const void* object, A... a) noexcept { (*static_cast<const F*>(object))(a...); }) {}
  void operator()(A... a) const noexcept { call_(object_, a...); }

 private:
  const void* object_;
  void (*call_)(const void*, A...) noexcept;
};

/// The scores of tokens first .. first + n are final.
using then_tokens = callee<dim, dim>;
/// A part of the results is final in all rows.
using then_part = callee<const result_part&>;
/// Makes scores and calls what is given once for each run of tokens.
using fill_scores = callee<const then_tokens&>;

}  // namespace moe
