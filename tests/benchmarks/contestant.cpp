// SPDX-License-Identifier: Apache-2.0
#include "support/contestant.hpp"

#include <doctest/doctest.h>

namespace {

/// Layers of so many bytes each.
class of_size final : public bench::contestant {
 public:
  explicit of_size(double bytes) : contestant("of_size"), each_(bytes) {}
  void prepare(std::span<const bench::batch>, int) override {}
  void run(std::size_t, moe::matrix_view<float>) override {}

 private:
  double add(const std::shared_ptr<const bench::layer_source>&) override { return each_; }
  double each_;
};

}  // namespace

TEST_SUITE("benchmarks/support/contestant") {
  TEST_CASE("a contestant takes layers until those between two uses of one hold what was asked for, and no more") {
    constexpr double rotate = 1 << 30;
    for (const double bytes : {1e6, rotate / 8, rotate / 2, rotate - 1, rotate, 3 * rotate}) {
      CAPTURE(bytes);
      of_size c(bytes);
      while (c.wants_layers(rotate)) c.take(nullptr);
      const auto others = [&](int layers) { return bytes * (layers - 1); };
      CHECK(others(c.layers()) >= rotate);
      CHECK(others(c.layers() - 1) < rotate);
    }
    of_size one(1);
    CHECK(one.wants_layers(0));  // a first one in any case
    one.take(nullptr);
    CHECK_FALSE(one.wants_layers(0));
  }
}
