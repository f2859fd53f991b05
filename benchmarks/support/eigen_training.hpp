// SPDX-License-Identifier: Apache-2.0
/// A training step as one writes it by hand with Eigen: the loop over the experts, then the same loop backwards.
#pragma once

#include "support/contestant.hpp"
#include "support/eigen_loop.hpp"

namespace bench {

class eigen_training : private eigen_loop {
 public:
  eigen_training(dim experts, int k) : eigen_loop(experts, k), kept_(static_cast<std::size_t>(experts)) {}

  /// y = the layer, as eigen_loop has it; then its gradients from dy: x is overwritten, the others are added to.
  void step(const layer_source& w, std::span<const float> bias, matrix_view<const float> x, matrix_view<const float> dy,
            matrix_view<float> y, const layer_gradients& to) {
    route(w.router, bias, x);
    as_eigen(y).setZero();
    for (std::size_t e = 0; e < kept_.size(); ++e)
      if (!rows_[e].empty()) forward(w, static_cast<dim>(e), x, y);
    dscores_.setZero(x.rows, w.router.rows);
    as_eigen(to.x).setZero();
    for (std::size_t e = 0; e < kept_.size(); ++e)
      if (!rows_[e].empty()) backward(w, static_cast<dim>(e), dy, to);
    backward_of_router(w.router, x, to);
  }

 private:
  struct kept {
    row_major xs, g, u, a;  // [n,d], [n,f]: a = silu(g) u
  };
  static auto part(matrix_view<float> m, dim e, dim rows) { return as_eigen(m.slice(e * rows, rows)); }

  void forward(const layer_source& w, dim e, matrix_view<const float> x, matrix_view<float> y) {
    const auto& rows = rows_[static_cast<std::size_t>(e)];
    const auto n = static_cast<Eigen::Index>(rows.size());
    const dim d = x.cols, f = w.up.rows / w.router.rows;
    kept& own = kept_[static_cast<std::size_t>(e)];
    own.xs.resize(n, d);
    for (Eigen::Index r = 0; r < n; ++r) own.xs.row(r) = as_eigen(x).row(rows[static_cast<std::size_t>(r)].token);
    own.g.noalias() = own.xs * part(w.gate, e, f).transpose();
    own.u.noalias() = own.xs * part(w.up, e, f).transpose();
    own.a = own.u.array() * own.g.array() / (1 + (-own.g.array()).exp());
    ys_.noalias() = own.a * part(w.down, e, d).transpose();
    for (Eigen::Index r = 0; r < n; ++r) {
      const assignment& at = rows[static_cast<std::size_t>(r)];
      as_eigen(y).row(at.token) += at.weight * ys_.row(r);
    }
  }

  // Leaves w_e <dy, y_e> of each choice in dscores_.
  void backward(const layer_source& w, dim e, matrix_view<const float> dy, const layer_gradients& to) {
    const auto& rows = rows_[static_cast<std::size_t>(e)];
    const auto n = static_cast<Eigen::Index>(rows.size());
    const dim d = dy.cols, f = w.up.rows / w.router.rows;
    const kept& own = kept_[static_cast<std::size_t>(e)];
    ys_.resize(n, d);  // gradients of the expert's outputs
    for (Eigen::Index r = 0; r < n; ++r) {
      const assignment& at = rows[static_cast<std::size_t>(r)];
      ys_.row(r) = at.weight * as_eigen(dy).row(at.token);
    }
    da_.noalias() = ys_ * part(w.down, e, d);
    for (Eigen::Index r = 0; r < n; ++r) dscores_(rows[static_cast<std::size_t>(r)].token, e) = da_.row(r).dot(own.a.row(r));
    part(to.down, e, d).noalias() += ys_.transpose() * own.a;
    g_ = 1 / (1 + (-own.g.array()).exp());
    u_ = da_.array() * own.g.array() * g_.array();
    g_ = da_.array() * own.u.array() * g_.array() * (1 + own.g.array() * (1 - g_.array()));
    part(to.gate, e, f).noalias() += g_.transpose() * own.xs;
    part(to.up, e, f).noalias() += u_.transpose() * own.xs;
    xs_.noalias() = g_ * part(w.gate, e, f);
    xs_.noalias() += u_ * part(w.up, e, f);
    for (Eigen::Index r = 0; r < n; ++r) as_eigen(to.x).row(rows[static_cast<std::size_t>(r)].token) += xs_.row(r);
  }

  // Of a softmax over the choices of a token: dscore_e = w_e (<dy, y_e> - sum_j w_j <dy, y_j>).
  void backward_of_router(matrix_view<float> router, matrix_view<const float> x, const layer_gradients& to) {
    const Eigen::VectorXf mean = dscores_.rowwise().sum();
    for (std::size_t e = 0; e < kept_.size(); ++e)
      for (const assignment& at : rows_[e]) dscores_(at.token, static_cast<Eigen::Index>(e)) -= at.weight * mean(at.token);
    as_eigen(to.router).noalias() += dscores_.transpose() * as_eigen(x);
    as_eigen(to.bias) += dscores_.colwise().sum().transpose();
    as_eigen(to.x).noalias() += dscores_ * as_eigen(router);
  }

  row_major dscores_, da_;
  std::vector<kept> kept_;  // of each expert
};

}  // namespace bench
