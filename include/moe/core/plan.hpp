// SPDX-License-Identifier: Apache-2.0
/// The plan: a sparse matrix between tokens and experts, kept in both orders, so that every sum has one writer.
#pragma once

#include <span>
#include <vector>

#include "moe/core/arena.hpp"
#include "moe/core/error.hpp"
#include "moe/core/view.hpp"

namespace moe {

/// The part of a plan that one bank of experts works on. Row numbers stay those of the whole plan.
/// An empty `token` means that row r is token r; an empty `weight` means one.
struct bank_rows {
  std::span<const idx> offsets{};        ///< [n+1]  rows of the bank's e-th expert: offsets[e] .. offsets[e+1]
  std::span<const idx> token{};          ///< [A]    source token of row r
  std::span<const float> weight{};       ///< [A]    combine weight of row r
  std::span<const idx> token_offsets{};  ///< [T+1]  assignments of token t
  std::span<const idx> position{};       ///< row of an assignment; negative when dropped

  dim experts() const noexcept { return static_cast<dim>(offsets.size()) - 1; }
  dim tokens() const noexcept { return static_cast<dim>(token_offsets.size()) - 1; }
  /// Rows that per-row memory must hold.
  dim room(shape s) const noexcept { return token.empty() ? s.tokens : static_cast<dim>(token.size()); }
  /// Host only: a device plan is never read by the host.
  dim first() const noexcept { return offsets.front(); }
  dim last() const noexcept { return offsets.back(); }

  bank_rows bank(dim e, dim n) const noexcept {
    bank_rows part = *this;
    part.offsets = offsets.subspan(static_cast<std::size_t>(e), static_cast<std::size_t>(n) + 1);
    return part;
  }
  /// The rows of `source` in plan order.
  template <class T>
  gathered<T> gather(matrix_view<const T> source) const noexcept {
    return {source, token.data(), nullptr};
  }
};

/// All assignments of a batch: grouped by expert on the way in, by token on the way back.
/// Invariants (`check`): offsets ascend from 0 to A; an expert's rows are in token order; position and token agree; an
/// expert appears once per token.
struct routing_plan {
  std::span<idx> offsets;        ///< [E+1]    rows of expert e: offsets[e] .. offsets[e+1]
  std::span<idx> token;          ///< [>=A]    source token of row r
  std::span<float> weight;       ///< [>=A]    combine weight of row r
  std::span<idx> token_offsets;  ///< [T+1]    assignments of token t, in the order of its choices
  std::span<idx> position;       ///< [<=max]  row of token t's j-th choice; -1 - e when expert e had no room for it

  dim experts() const noexcept { return static_cast<dim>(offsets.size()) - 1; }
  dim tokens() const noexcept { return static_cast<dim>(token_offsets.size()) - 1; }
  dim rows() const noexcept { return offsets.back(); }  ///< A; host only
  bank_rows all() const noexcept { return {offsets, token, weight, token_offsets, position}; }
  bank_rows bank(dim e, dim n) const noexcept { return all().bank(e, n); }
};

/// Some columns of some tokens' results: what a combine makes at a time.
struct result_part {
  dim token = 0, tokens = 0, column = 0, columns = 0;
};

/// Room for a plan of s.tokens tokens and at most `max_rows` assignments.
inline routing_plan make_plan(shape s, dim max_rows, arena& mem) noexcept {
  return {mem.vector<idx>("offsets", s.experts + 1), mem.vector<idx>("token", max_rows), mem.vector<float>("weight", max_rows),
          mem.vector<idx>("token_offsets", s.tokens + 1), mem.vector<idx>("position", max_rows)};
}

/// Dropped assignments: wanted by the router and refused by capacity.
inline dim dropped(const routing_plan& p) noexcept {
  dim n = 0;
  for (idx i = 0; i < p.token_offsets.back(); ++i) n += p.position[static_cast<std::size_t>(i)] < 0;
  return n;
}

namespace detail {

/// Positions are within the rows. Few choices of a token are compared in pairs; only a plan with many of them allocates.
inline bool names_a_row_twice(const routing_plan& p) {
  std::vector<bool> named;
  for (std::size_t t = 0; t + 1 < p.token_offsets.size(); ++t) {
    const auto mine = p.position.subspan(static_cast<std::size_t>(p.token_offsets[t]),
                                         static_cast<std::size_t>(p.token_offsets[t + 1] - p.token_offsets[t]));
    if (mine.size() > 64 && named.empty()) named.resize(static_cast<std::size_t>(p.rows()));
    for (std::size_t i = 0; i < mine.size(); ++i) {
      if (mine[i] < 0) continue;
      if (mine.size() <= 64) {
        for (std::size_t j = 0; j < i; ++j)
          if (mine[i] == mine[j]) return true;
      } else {
        if (named[static_cast<std::size_t>(mine[i])]) return true;
        named[static_cast<std::size_t>(mine[i])] = true;
      }
    }
  }
  return false;
}

}  // namespace detail

/// The first broken invariant of a plan, or null. Safe on any content: a plan may come from a file.
inline const char* fault(const routing_plan& p) {
  const auto at = [](dim i) { return static_cast<std::size_t>(i); };
  if (p.offsets.size() < 2 || p.token_offsets.empty()) return "offsets or token_offsets are missing";
  if (p.offsets.front() != 0 || p.token_offsets.front() != 0) return "offsets do not start at 0";
  for (std::size_t e = 1; e < p.offsets.size(); ++e)
    if (p.offsets[e] < p.offsets[e - 1]) return "offsets do not ascend";
  for (std::size_t t = 1; t < p.token_offsets.size(); ++t)
    if (p.token_offsets[t] < p.token_offsets[t - 1]) return "token_offsets do not ascend";
  const dim rows = p.rows(), tokens = p.tokens(), choices = p.token_offsets.back();
  if (rows > static_cast<dim>(p.token.size()) || rows > static_cast<dim>(p.weight.size())) return "offsets end beyond the rows";
  if (choices > static_cast<dim>(p.position.size())) return "token_offsets end beyond the assignments";
  for (dim e = 0; e < p.experts(); ++e)
    for (dim r = p.offsets[at(e)]; r < p.offsets[at(e + 1)]; ++r) {
      const idx t = p.token[at(r)];
      if (t < 0 || t >= tokens) return "a row names a token that does not exist";
      if (r > p.offsets[at(e)] && p.token[at(r - 1)] >= t) return "an expert's rows are not in token order, once per token";
    }
  dim kept = 0;
  for (dim t = 0; t < tokens; ++t)
    for (idx i = p.token_offsets[at(t)]; i < p.token_offsets[at(t + 1)]; ++i) {
      const idx r = p.position[at(i)];
      if (r < 0 && -1 - r >= p.experts()) return "a dropped assignment names an expert that does not exist";
      if (r >= rows) return "a position is beyond the rows";
      if (r >= 0 && p.token[at(r)] != t) return "position and token disagree";
      kept += r >= 0;
    }
  if (detail::names_a_row_twice(p)) return "a token names one row twice";
  return kept == rows ? nullptr : "a row belongs to no assignment";
}

/// Throws shape_error with the first broken invariant.
inline void check(const routing_plan& p) {
  if (const char* broken = fault(p)) throw shape_error(std::string("routing_plan: ") + broken);
}

}  // namespace moe
