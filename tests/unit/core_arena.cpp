// SPDX-License-Identifier: Apache-2.0
#include <doctest/doctest.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <new>
#include <utility>
#include <vector>

#include "moe/core/arena.hpp"

using namespace moe;

namespace {

bool aligned(const void* p) { return reinterpret_cast<std::uintptr_t>(p) % 64 == 0; }

struct weights {
  matrix_view<float> up;
  std::span<float> bias;
  matrix_view<float> down;
};

/// What a policy writes once and gets a size, views and a catalogue from.
weights make_weights(arena& mem) {
  const arena::scope in(mem, "experts");
  return {mem.matrix<float>("up", 3, 5), mem.vector<float>("bias", 7, initial::zeros), mem.matrix<float>("down", 2, 64)};
}

template <class T>
std::vector<std::size_t> element_offsets() {
  std::vector<slot> list;
  arena mem(list);
  for (const dim n : {1, 63, 64, 65, 1000}) (void)mem.matrix<T>("t", n, 3);
  std::vector<std::size_t> offsets;
  for (const slot& s : list) offsets.push_back(s.offset * 8 / static_cast<std::size_t>(dtype<T>::bits));
  return offsets;
}

}  // namespace

TEST_SUITE("core/arena: buffer") {
  TEST_CASE("its bytes are zero and aligned to 64, whatever the size") {
    for (const std::size_t bytes : {1u, 63u, 64u, 1000u, 100000u}) {
      const buffer b(bytes);
      CHECK(b.size() == bytes);
      CHECK(aligned(b.bytes().data()));
      CHECK(std::all_of(b.bytes().begin(), b.bytes().end(), [](std::byte v) { return v == std::byte{0}; }));
    }
  }
  TEST_CASE("it shows its bytes as whole elements") {
    const buffer b(35);
    CHECK(b.as<float>().size() == 8);
    CHECK(static_cast<void*>(b.as<float>().data()) == static_cast<void*>(b.bytes().data()));
  }
  TEST_CASE("an empty one has no bytes") {
    const buffer none, zero(0);
    CHECK(none.size() == 0);
    CHECK(none.bytes().data() == nullptr);
    CHECK(zero.bytes().empty());
  }
  TEST_CASE("moving hands the same memory over") {
    buffer a(256);
    const auto first = a.bytes().data();
    first[10] = std::byte{7};
    buffer b(std::move(a));
    CHECK(b.bytes().data() == first);
    CHECK(b.bytes()[10] == std::byte{7});
    CHECK(a.size() == 0);
    CHECK(a.bytes().data() == nullptr);
    buffer c(64);
    c = std::move(b);
    CHECK(c.bytes().data() == first);
    CHECK(c.size() == 256);
  }
  TEST_CASE("more than there can be is std::bad_alloc, also where the size would wrap around") {
    const auto most = std::numeric_limits<std::size_t>::max();
    CHECK_THROWS_AS(buffer{most}, std::bad_alloc);
    CHECK_THROWS_AS(buffer{most - 64}, std::bad_alloc);
  }
}

TEST_SUITE("core/arena") {
  TEST_CASE("one function counts, carves and lists, and the three agree") {
    arena count;
    const weights none = make_weights(count);
    CHECK(count.counts());
    CHECK_FALSE(none.up);
    CHECK(none.up.rows == 3);
    CHECK(none.bias.empty());

    const buffer memory(count.used());
    arena carve(memory.bytes());
    const weights w = make_weights(carve);
    CHECK(carve.used() == count.used());
    CHECK(carve.left() == 0);

    std::vector<slot> list;
    arena names(list);
    (void)make_weights(names);
    REQUIRE(list.size() == 3);
    CHECK(names.used() == count.used());
    const void* const places[] = {w.up.data, w.bias.data(), w.down.data};
    for (std::size_t i = 0; i < 3; ++i) CHECK(places[i] == memory.bytes().data() + list[i].offset);
    CHECK(list[2].offset + list[2].bytes == count.used());
  }
  TEST_CASE("a list holds name, type, shape, bytes and start of every tensor") {
    std::vector<slot> list;
    arena names(list);
    (void)make_weights(names);
    (void)names.matrix<bf16>("scale", 4, 6, initial::ones);
    REQUIRE(list.size() == 4);
    CHECK(list[0].name == "experts.up");
    CHECK(list[0].rows == 3);
    CHECK(list[0].cols == 5);
    CHECK(list[0].bytes == 60);
    CHECK(list[0].type == element::f32);
    CHECK(list[0].start == initial::fan_in);
    CHECK(list[1].name == "experts.bias");
    CHECK(list[1].rows == 1);
    CHECK(list[1].cols == 7);
    CHECK(list[1].start == initial::zeros);
    CHECK(list[3].name == "scale");
    CHECK(list[3].type == element::bf16);
    CHECK(list[3].bytes == 48);
    CHECK(list[3].start == initial::ones);
  }
  TEST_CASE("scopes nest and end") {
    std::vector<slot> list;
    arena mem(list);
    {
      const arena::scope outer(mem, "block");
      {
        const arena::scope inner(mem, "experts");
        (void)mem.vector<float>("up", 1);
      }
      (void)mem.vector<float>("gate", 1);
    }
    (void)mem.vector<float>("embedding", 1);
    REQUIRE(list.size() == 3);
    CHECK(list[0].name == "block.experts.up");
    CHECK(list[1].name == "block.gate");
    CHECK(list[2].name == "embedding");
  }
  TEST_CASE("every tensor starts at a multiple of 64 elements") {
    const buffer memory(1 << 16);
    arena mem(memory.bytes());
    for (const dim n : {1, 63, 64, 65, 129}) {
      const auto v = mem.vector<float>("v", n);
      CHECK((reinterpret_cast<std::byte*>(v.data()) - memory.bytes().data()) % (64 * 4) == 0);
      CHECK(v.size() == static_cast<std::size_t>(n));
    }
    const auto h = mem.matrix<bf16>("h", 3, 5);
    CHECK((reinterpret_cast<std::byte*>(h.data) - memory.bytes().data()) % (64 * 2) == 0);
    CHECK(h.ld == 5);
  }
  TEST_CASE("element offsets agree between element types, so weights, masters, gradients and moments share a layout") {
    const auto f32 = element_offsets<float>();
    CHECK(f32 == std::vector<std::size_t>{0, 64, 256, 448, 704});
    CHECK(element_offsets<bf16>() == f32);
    CHECK(element_offsets<f16>() == f32);
    CHECK(element_offsets<std::int8_t>() == f32);
    CHECK(element_offsets<std::int64_t>() == f32);
  }
  TEST_CASE("rewinding gives memory back, and the peak remembers") {
    const buffer memory(4096);
    arena mem(memory.bytes());
    (void)mem.vector<float>("kept", 64);
    const auto mark = mem.mark();
    const auto a = mem.vector<float>("a", 512);
    mem.rewind(mark);
    CHECK(mem.used() == 256);
    CHECK(mem.left() == 4096 - 256);
    CHECK(mem.peak() == 256 + 2048);
    CHECK(mem.vector<float>("b", 8).data() == a.data());
    CHECK(mem.peak() == 256 + 2048);
  }
  TEST_CASE("a scratch frame gives back on leaving, also while counting") {
    arena count;
    {
      const scratch_frame outer(count);
      (void)count.vector<float>("a", 64);
      {
        const scratch_frame inner(count);
        (void)count.vector<float>("b", 64);
      }
      CHECK(count.used() == 256);
    }
    CHECK(count.used() == 0);
    CHECK(count.peak() == 512);
  }
  TEST_CASE("after align, what follows has the same size for every element type before it") {
    arena after_float, after_bytes;
    (void)after_float.vector<float>("a", 3);
    (void)after_bytes.vector<std::int8_t>("a", 3);
    for (arena* mem : {&after_float, &after_bytes}) {
      mem->align();
      CHECK(mem->used() == 512);
      CHECK(mem->peak() == 512);
      (void)mem->vector<std::int64_t>("b", 10);
      CHECK(mem->used() == 512 + 80);
    }
  }
  TEST_CASE("an arena that only counts never runs out") {
    const arena count;
    CHECK(count.left() == std::numeric_limits<std::size_t>::max());
  }
}
