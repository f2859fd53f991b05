// SPDX-License-Identifier: Apache-2.0
/// The three ways a call can be refused. Each message names the argument, what came and what was wanted, and nothing has
/// been written when it is thrown.
#pragma once

#include <stdexcept>
#include <string>

#include "moe/core/view.hpp"

namespace moe {

/// Sizes that do not fit together, or too little memory.
struct shape_error : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};
/// A file that is not what it claims to be, or not what was asked for.
struct format_error : std::runtime_error {
  using std::runtime_error::runtime_error;
};
/// An accelerator that failed; thrown at `sync()`.
struct device_error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

/// Throws unless `got == wanted`: "linear_gate: x has 8 columns, expected 16 (d)".
inline void expect(dim got, dim wanted, const char* what, const char* unit, const char* symbol) {
  if (got == wanted) return;
  throw shape_error(std::string(what) + " has " + std::to_string(got) + ' ' + unit + ", expected " + std::to_string(wanted) +
                    " (" + symbol + ')');
}

namespace detail {

inline void expect_matrix(const void* data, dim rows, dim cols, dim ld, dim wanted_rows, dim wanted_cols, const char* what,
                          const char* symbols) {
  const bool sizes = rows == wanted_rows && cols == wanted_cols;
  if (sizes && ld >= cols && (data != nullptr || rows * cols == 0)) return;
  std::string message = what;
  if (sizes && data == nullptr) message += " has no memory";
  else message += " is " + std::to_string(rows) + " x " + std::to_string(cols);
  if (ld < cols) message += " with row stride " + std::to_string(ld);
  message += ", expected " + std::to_string(wanted_rows) + " x " + std::to_string(wanted_cols);
  throw shape_error(message + " (" + symbols + ')');
}

}  // namespace detail

/// Throws unless `m` is a matrix of rows x cols: "ffn_expert: up is 64 x 32, expected 128 x 32 (E*f x d)".
template <class T>
void expect(matrix_view<T> m, dim rows, dim cols, const char* what, const char* symbols) {
  detail::expect_matrix(m.data, m.rows, m.cols, m.ld, rows, cols, what, symbols);
}

namespace detail {

/// Throws where a matrix of these sizes, tokens x experts x width or experts x d x width, has more bytes than can be counted.
inline void check_countable(const shape& s) {
  const auto real = [](dim n) { return static_cast<double>(n); };
  const double width = 8 * (real(s.d) + 2 * real(s.f)), most = 0x1p61;
  const double tallest = real(s.tokens) > real(s.d) ? real(s.tokens) : real(s.d);
  if (tallest * real(s.experts) * width < most && real(s.tokens) < 0x1p31 && real(s.experts) < 0x1p31) return;
  throw shape_error("moe: tokens = " + std::to_string(s.tokens) + ", d = " + std::to_string(s.d) + ", f = " +
                    std::to_string(s.f) + ", experts = " + std::to_string(s.experts) + " are too large to be counted");
}

}  // namespace detail

/// Throws unless `bytes` are left: "moe::layer::forward: scratch has 64 bytes left, needs 4096 (scratch_bytes(T))".
inline void expect_bytes(std::size_t left, std::size_t needed, const char* what, const char* sizer) {
  if (left >= needed) return;
  throw shape_error(std::string(what) + " has " + std::to_string(left) + " bytes left, needs " + std::to_string(needed) + " (" +
                    sizer + ')');
}

}  // namespace moe
