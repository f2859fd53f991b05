// SPDX-License-Identifier: Apache-2.0
#include <doctest/doctest.h>

#include <algorithm>
#include <functional>
#include <string>
#include <type_traits>
#include <vector>

#include "moe/core/recorded_plan.hpp"
#include "moe/io/plan_file.hpp"
#include "moe/io/safetensors.hpp"
#include "moe/moe.hpp"
#include "support/temporary_file.hpp"
#include "support/testing.hpp"

using namespace moe;
using testing::message;
using testing::temporary_file;

static_assert(std::is_nothrow_move_constructible_v<recorded_plan> && !std::is_copy_constructible_v<recorded_plan>);

namespace {

/// Three tokens over two experts: token 0 takes both, token 1 expert 1, token 2 wanted expert 0, which had no room.
/// The arrays are longer than the plan, as a router's are.
struct small_plan {
  std::vector<idx> offsets{0, 1, 3}, token{0, 0, 1, -7, -7, -7}, token_offsets{0, 2, 3, 4}, position{1, 0, 2, -1, -7, -7};
  std::vector<float> weight{0.25f, 0.75f, 1.f, -7, -7, -7};
  routing_plan plan() { return {offsets, token, weight, token_offsets, position}; }
};

template <class T>
std::vector<T> all(std::span<T> s) {
  return {s.begin(), s.end()};
}

void check_is_small_plan(const routing_plan& p) {
  CHECK(all(p.offsets) == std::vector<idx>{0, 1, 3});
  CHECK(all(p.token) == std::vector<idx>{0, 0, 1});
  CHECK(all(p.weight) == std::vector<float>{0.25f, 0.75f, 1.f});
  CHECK(all(p.token_offsets) == std::vector<idx>{0, 2, 3, 4});
  CHECK(all(p.position) == std::vector<idx>{1, 0, 2, -1});
  CHECK(dropped(p) == 1);
}

}  // namespace

TEST_SUITE("core/recorded_plan") {
  TEST_CASE("a record holds the plan exactly and does not change with it") {
    small_plan source;
    const recorded_plan copy = record(source.plan());
    source.token[0] = 2;
    source.weight[0] = 9;
    check_is_small_plan(copy.plan());
  }

  TEST_CASE("a record moves with its memory and leaves nothing behind") {
    recorded_plan first = record(small_plan().plan());
    const idx* const at = first.plan().token.data();
    recorded_plan second(std::move(first));
    CHECK(second.plan().token.data() == at);
    recorded_plan third;
    CHECK(third.plan().offsets.empty());
    third = std::move(second);
    CHECK(third.plan().token.data() == at);
    CHECK(second.plan().offsets.empty());
    check_is_small_plan(third.plan());
  }

  TEST_CASE("a plan without tokens has a record") {
    std::vector<idx> offsets{0, 0, 0}, token_offsets{0};
    const recorded_plan copy = record({offsets, {}, {}, token_offsets, {}});
    CHECK(copy.plan().experts() == 2);
    CHECK(copy.plan().tokens() == 0);
    CHECK(copy.plan().rows() == 0);
    CHECK(fault(copy.plan()) == nullptr);
  }

  TEST_CASE("a broken plan has none") {
    small_plan source;
    source.token[2] = 0;
    CHECK(message<shape_error>([&] { record(source.plan()); }) ==
          "routing_plan: an expert's rows are not in token order, once per token");
    CHECK_THROWS_AS(record(routing_plan{}), shape_error);
  }
}

TEST_SUITE("io/plan_file") {
  TEST_CASE("a plan comes back from its file exactly, without what lay behind its end") {
    const temporary_file file("plan");
    save_plan(file.path(), small_plan().plan());
    check_is_small_plan(load_plan(file.path()).plan());
    const checkpoint c(file.path());
    CHECK(c.tensors().size() == 5);
    CHECK(c.tensor("0.position").dtype == "I32");
    CHECK(c.tensor("0.position").shape == std::vector<dim>{4});
    CHECK(c.tensor("0.weight").dtype == "F32");
  }

  TEST_CASE("plans of several layers come back in their order, beyond nine") {
    std::vector<recorded_plan> plans;
    std::vector<routing_plan> views;
    for (int i = 0; i < 12; ++i) {
      small_plan p;
      p.weight[0] = static_cast<float>(i);
      plans.push_back(record(p.plan()));
      views.push_back(plans.back().plan());
    }
    const temporary_file file("plans");
    save_plans(file.path(), views);
    const std::vector<recorded_plan> loaded = load_plans(file.path());
    REQUIRE(loaded.size() == 12);
    for (std::size_t i = 0; i < 12; ++i) CHECK(loaded[i].plan().weight[0] == static_cast<float>(i));
    CHECK(message<format_error>([&] { load_plan(file.path()); }) == file.path() + " has 12 plans, expected 1");
    save_plans(file.path(), {});
    CHECK(load_plans(file.path()).empty());
  }

  TEST_CASE("a plan without tokens comes back") {
    std::vector<idx> offsets{0, 0}, token_offsets{0};
    const temporary_file file("no_tokens");
    save_plan(file.path(), {offsets, {}, {}, token_offsets, {}});
    const recorded_plan p = load_plan(file.path());
    CHECK(p.plan().tokens() == 0);
    CHECK(p.plan().experts() == 1);
  }

  TEST_CASE("a layer loaded from one file and replayed along the plan of another gives the same bits") {
    using layer = moe::layer<linear_gate, top_k<2>, ffn_expert, weighted_sum, scalar<>>;
    const layer net({.tokens = 9, .d = 6, .f = 5, .experts = 4});
    testing::model first(net, 9, 6, 1), second(net, 9, 6, 2);
    first.forward();
    const temporary_file weights("weights"), plan("routing");
    save(weights.path(), {{"block", net.catalogue(), first.params.bytes()}});
    save_plan(plan.path(), first.ctx.plan);

    load(weights.path(), {{"block", net.catalogue(), second.params.bytes()}});
    const recorded_plan routing = load_plan(plan.path());
    net.replay(second.w, first.in, routing.plan(), second.y_view(), second.ctx, second.work);
    CHECK(second.y == first.y);
    CHECK(testing::assignments(second.ctx.plan) == testing::assignments(first.ctx.plan));
  }

  TEST_CASE("a broken plan is not written") {
    const temporary_file file("broken");
    small_plan p;
    p.offsets[1] = 5;
    CHECK(message<shape_error>([&] { save_plan(file.path(), p.plan()); }) == "routing_plan: offsets do not ascend");
    CHECK_FALSE(std::filesystem::exists(file.path()));
  }

  TEST_CASE("a file that is no plan is refused, whatever is wrong with it") {
    const temporary_file file("hostile");
    const auto refused = [&](const std::function<void(small_plan&)>& damage) {
      small_plan p;
      p.token.resize(3);
      p.weight.resize(3);
      p.position.resize(4);
      damage(p);
      const auto of = [](const auto& v) { return as_tensor(matrix_view(v.data(), 1, static_cast<dim>(v.size()))); };
      save_tensors(file.path(), {{"0.offsets", of(p.offsets)},
                                 {"0.token", of(p.token)},
                                 {"0.weight", of(p.weight)},
                                 {"0.token_offsets", of(p.token_offsets)},
                                 {"0.position", of(p.position)}});
      const std::string said = message<format_error>([&] { load_plan(file.path()); });
      const std::string start = file.path() + " holds a broken plan 0: ";
      return said.starts_with(start) ? said.substr(start.size()) : said;
    };
    CHECK(refused([](small_plan&) {}) == "no such error");
    CHECK(refused([](small_plan& p) { p.offsets.clear(); }) == "offsets or token_offsets are missing");
    CHECK(refused([](small_plan& p) { p.token_offsets.clear(); }) == "offsets or token_offsets are missing");
    CHECK(refused([](small_plan& p) { p.offsets[0] = -1; }) == "offsets do not start at 0");
    CHECK(refused([](small_plan& p) { p.offsets[2] = 1 << 30; }) == "offsets end beyond the rows");
    CHECK(refused([](small_plan& p) { p.token_offsets[3] = 1 << 30; }) == "token_offsets end beyond the assignments");
    CHECK(refused([](small_plan& p) { p.token[1] = 3; }) == "a row names a token that does not exist");
    CHECK(refused([](small_plan& p) { p.token[1] = -1; }) == "a row names a token that does not exist");
    CHECK(refused([](small_plan& p) { p.position[0] = 3; }) == "a position is beyond the rows");
    CHECK(refused([](small_plan& p) { p.position[3] = -3; }) == "a dropped assignment names an expert that does not exist");
    CHECK(refused([](small_plan& p) { p.position[3] = -2147483647 - 1; }) ==
          "a dropped assignment names an expert that does not exist");
    CHECK(refused([](small_plan& p) { p.weight.pop_back(); }) == "weight has 2 elements, expected 3 (A)");
    CHECK(refused([](small_plan& p) {
            p.token.push_back(2);
            p.weight.push_back(1);
          }) == "offsets end before the rows");
    CHECK(refused([](small_plan& p) { p.position.push_back(-1); }) == "token_offsets end before the assignments");
  }

  TEST_CASE("a file of other tensors is refused with what it has") {
    const temporary_file file("tensors");
    const std::vector<idx> i{0};
    const std::vector<float> f{0};
    const tensor_view ids = as_tensor(matrix_view(i.data(), 1, 1)), reals = as_tensor(matrix_view(f.data(), 1, 1));
    const auto refused = [&](const tensor_map& tensors) {
      save_tensors(file.path(), tensors);
      return message<format_error>([&] { load_plans(file.path()); }).substr(file.path().size());
    };
    CHECK(refused({{"a", ids}}) == " has 1 tensors, expected 5 for each plan");
    CHECK(refused({{"a", ids}, {"0.offsets", ids}, {"0.token", ids}, {"0.weight", reals}, {"0.position", ids}}) ==
          " has no tensor \"0.token_offsets\"");
    CHECK(
        refused(
            {{"0.offsets", reals}, {"0.token", ids}, {"0.weight", reals}, {"0.token_offsets", ids}, {"0.position", ids}}) ==
        ": tensor \"0.offsets\" is F32 [1], expected I32 [n]");
    const tensor_view square{"I32", {1, 1}, ids.bytes};
    CHECK(
        refused(
            {{"0.offsets", ids}, {"0.token", square}, {"0.weight", reals}, {"0.token_offsets", ids}, {"0.position", ids}}) ==
        ": tensor \"0.token\" is I32 [1, 1], expected I32 [n]");
  }
}
