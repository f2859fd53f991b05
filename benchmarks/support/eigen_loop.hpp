// SPDX-License-Identifier: Apache-2.0
/// What one writes by hand with Eigen: gather the rows of each expert, three products, scatter. Eigen shares its products
/// between threads by itself.
#pragma once

#include <Eigen/Core>
#include <algorithm>
#include <numeric>
#include <span>
#include <vector>

#include "moe/core/view.hpp"

namespace bench {

using row_major = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

inline Eigen::Map<const row_major> as_eigen(moe::matrix_view<const float> v) { return {v.data, v.rows, v.cols}; }
inline Eigen::Map<row_major> as_eigen(moe::matrix_view<float> v) { return {v.data, v.rows, v.cols}; }

class eigen_loop {
 public:
  eigen_loop(moe::dim experts, int k) : rows_(static_cast<std::size_t>(experts)), k_(k) {}

  /// y = the layer with softmax over the k best of the scores plus `bias`; weights as expert/ffn.hpp lays them out.
  void forward(moe::matrix_view<const float> router, std::span<const float> bias, moe::matrix_view<const float> gate,
               moe::matrix_view<const float> up, moe::matrix_view<const float> down, moe::matrix_view<const float> x,
               moe::matrix_view<float> y) {
    const auto in = as_eigen(x);
    auto out = as_eigen(y);
    const moe::dim experts = router.rows, d = x.cols, f = up.rows / experts;
    route(router, bias, x);
    out.setZero();
    for (moe::dim e = 0; e < experts; ++e) {
      const auto& rows = rows_[static_cast<std::size_t>(e)];
      const auto n = static_cast<Eigen::Index>(rows.size());
      if (n == 0) continue;
      xs_.resize(n, d);
      for (Eigen::Index r = 0; r < n; ++r) xs_.row(r) = in.row(rows[static_cast<std::size_t>(r)].token);
      g_.noalias() = xs_ * as_eigen(gate.slice(e * f, f)).transpose();
      u_.noalias() = xs_ * as_eigen(up.slice(e * f, f)).transpose();
      u_.array() *= g_.array() / (1 + (-g_.array()).exp());
      ys_.noalias() = u_ * as_eigen(down.slice(e * d, d)).transpose();
      for (Eigen::Index r = 0; r < n; ++r) {
        const auto& a = rows[static_cast<std::size_t>(r)];
        out.row(a.token) += a.weight * ys_.row(r);
      }
    }
  }

 protected:
  struct assignment {
    Eigen::Index token;
    float weight;
  };

  void route(moe::matrix_view<const float> router, std::span<const float> bias, moe::matrix_view<const float> x) {
    scores_.noalias() = as_eigen(x) * as_eigen(router).transpose();
    scores_.rowwise() += Eigen::Map<const Eigen::RowVectorXf>(bias.data(), router.rows);
    for (auto& r : rows_) r.clear();
    order_.resize(static_cast<std::size_t>(scores_.cols()));
    for (Eigen::Index t = 0; t < scores_.rows(); ++t) {
      std::iota(order_.begin(), order_.end(), 0);
      const auto better = [&](int a, int b) {
        return scores_(t, a) != scores_(t, b) ? scores_(t, a) > scores_(t, b) : a < b;
      };
      std::partial_sort(order_.begin(), order_.begin() + k_, order_.end(), better);
      float sum = 0;
      for (int j = 0; j < k_; ++j) sum += std::exp(scores_(t, order_[static_cast<std::size_t>(j)]) - scores_(t, order_[0]));
      for (int j = 0; j < k_; ++j) {
        const int e = order_[static_cast<std::size_t>(j)];
        rows_[static_cast<std::size_t>(e)].push_back({t, std::exp(scores_(t, e) - scores_(t, order_[0])) / sum});
      }
    }
  }

  row_major scores_, xs_, g_, u_, ys_;
  std::vector<std::vector<assignment>> rows_;  // of each expert

 private:
  std::vector<int> order_;
  int k_;
};

}  // namespace bench
