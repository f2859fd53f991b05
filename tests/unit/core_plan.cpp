// SPDX-License-Identifier: Apache-2.0
#include <doctest/doctest.h>

#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "moe/core/plan.hpp"

using namespace moe;

namespace {

/// Three tokens, three experts: token 0 goes to experts 2 and 0, token 1 to 2, token 2 to 0 and wanted 1, which was full.
struct sample {
  std::vector<idx> offsets{0, 2, 2, 4}, token{0, 2, 0, 1}, token_offsets{0, 2, 3, 5}, position{2, 0, 3, 1, -2};
  std::vector<float> weight{.25f, 1.f, .75f, .5f};

  routing_plan plan() { return {offsets, token, weight, token_offsets, position}; }
  std::string fault() {
    const char* const broken = moe::fault(plan());
    return broken ? broken : "sound";
  }
};

}  // namespace

TEST_SUITE("core/plan") {
  TEST_CASE("a plan that keeps its invariants has no fault") {
    sample s;
    CHECK(s.fault() == "sound");
    CHECK_NOTHROW(check(s.plan()));
    CHECK(s.plan().experts() == 3);
    CHECK(s.plan().tokens() == 3);
    CHECK(s.plan().rows() == 4);
  }
  TEST_CASE("so has one with room to spare, and one without a token or without an assignment") {
    sample s;
    s.token.resize(6, -7);
    s.weight.resize(6);
    s.position.resize(6, 99);
    CHECK(s.fault() == "sound");
    sample empty{.offsets = {0, 0}, .token = {}, .token_offsets = {0}, .position = {}, .weight = {}};
    CHECK(empty.fault() == "sound");
    empty.token_offsets = {0, 0, 0};
    CHECK(empty.fault() == "sound");
    CHECK(empty.plan().rows() == 0);
  }
  TEST_CASE("a dropped assignment is -1 - e of the expert that had no room") {
    sample s;
    CHECK(dropped(s.plan()) == 1);
    s.position[4] = -1;  // expert 0: even though it kept another token
    CHECK(s.fault() == "sound");
    s.position[4] = -3;
    CHECK(s.fault() == "sound");
    s.position[4] = -4;
    CHECK(s.fault() == "a dropped assignment names an expert that does not exist");
    s.position[4] = std::numeric_limits<idx>::min();
    CHECK(s.fault() == "a dropped assignment names an expert that does not exist");
  }
  TEST_CASE("each broken invariant is found and named") {
    sample s;
    SUBCASE("no expert") {
      s.offsets = {0};
      CHECK(s.fault() == "offsets or token_offsets are missing");
    }
    SUBCASE("no token_offsets") {
      s.token_offsets = {};
      CHECK(s.fault() == "offsets or token_offsets are missing");
    }
    SUBCASE("the first offset") {
      s.offsets[0] = 1;
      CHECK(s.fault() == "offsets do not start at 0");
    }
    SUBCASE("the first token offset") {
      s.token_offsets[0] = -1;
      CHECK(s.fault() == "offsets do not start at 0");
    }
    SUBCASE("descending offsets") {
      s.offsets = {0, 3, 2, 4};
      CHECK(s.fault() == "offsets do not ascend");
    }
    SUBCASE("descending token offsets") {
      s.token_offsets = {0, 4, 3, 5};
      CHECK(s.fault() == "token_offsets do not ascend");
    }
    SUBCASE("more rows than tokens of rows") {
      s.token.pop_back();
      CHECK(s.fault() == "offsets end beyond the rows");
    }
    SUBCASE("more rows than weights") {
      s.weight.pop_back();
      CHECK(s.fault() == "offsets end beyond the rows");
    }
    SUBCASE("more assignments than positions") {
      s.position.pop_back();
      CHECK(s.fault() == "token_offsets end beyond the assignments");
    }
    SUBCASE("a token that does not exist") {
      s.token[1] = 3;
      CHECK(s.fault() == "a row names a token that does not exist");
    }
    SUBCASE("a negative token") {
      s.token[0] = -1;
      CHECK(s.fault() == "a row names a token that does not exist");
    }
    SUBCASE("an expert's rows out of order") {
      std::swap(s.token[0], s.token[1]);
      std::swap(s.position[1], s.position[3]);
      CHECK(s.fault() == "an expert's rows are not in token order, once per token");
    }
    SUBCASE("an expert twice for one token") {
      s.token[3] = 0;
      CHECK(s.fault() == "an expert's rows are not in token order, once per token");
    }
    SUBCASE("a position that is no row") {
      s.position[0] = 4;
      CHECK(s.fault() == "a position is beyond the rows");
    }
    SUBCASE("positions of each other's tokens") {
      std::swap(s.position[0], s.position[2]);
      CHECK(s.fault() == "position and token disagree");
    }
    SUBCASE("a row named twice") {
      s.position[1] = 2;
      CHECK(s.fault() == "a token names one row twice");
    }
    SUBCASE("a row that nobody named") {
      s.position[1] = -1;
      CHECK(s.fault() == "a row belongs to no assignment");
    }
    CHECK_THROWS_WITH_AS(check(s.plan()), ("routing_plan: " + s.fault()).c_str(), shape_error);
  }
  TEST_CASE("a bank sees its experts' offsets and the whole plan's rows") {
    sample s;
    const bank_rows rows = s.plan().bank(1, 2);
    CHECK(rows.experts() == 2);
    CHECK(rows.tokens() == 3);
    CHECK(rows.first() == 2);
    CHECK(rows.last() == 4);
    CHECK(rows.token[static_cast<std::size_t>(rows.offsets[1])] == 0);
    CHECK(rows.bank(1, 1).first() == 2);
    CHECK(s.plan().all().bank(0, 1).last() == 2);
  }
  TEST_CASE("gathering a bank's rows reads tokens in plan order, unweighed") {
    sample s;
    std::vector<float> x{0, 10, 20};
    const auto rows = s.plan().all().gather(matrix_view<const float>(x.data(), 3, 1));
    CHECK(*rows.row(1) == 20);
    CHECK(*rows.row(3) == 10);
    CHECK(rows.scale(0) == 1.f);
  }
  TEST_CASE("room for a plan is counted and carved alike") {
    const shape s{.tokens = 3, .d = 8, .f = 0, .experts = 4};
    arena count;
    (void)make_plan(s, 6, count);
    const buffer memory(count.used());
    arena mem(memory.bytes());
    const routing_plan p = make_plan(s, 6, mem);
    CHECK(p.offsets.size() == 5);
    CHECK(p.token.size() == 6);
    CHECK(p.weight.size() == 6);
    CHECK(p.token_offsets.size() == 4);
    CHECK(p.position.size() == 6);
    CHECK(fault(p) == nullptr);  // zeroed memory is the plan in which nobody goes anywhere
    CHECK(mem.left() == 0);
  }
}
