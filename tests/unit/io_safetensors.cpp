// SPDX-License-Identifier: Apache-2.0
#include <doctest/doctest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <map>
#include <string>
#include <type_traits>
#include <vector>

#include "moe/io/safetensors.hpp"
#include "support/fuzz_safetensors.hpp"
#include "support/temporary_file.hpp"

using namespace moe;
using testing::content;
using testing::message;
using testing::same;
using testing::temporary_file;
using testing::written;

static_assert(std::is_nothrow_move_constructible_v<mapped_file> && !std::is_copy_constructible_v<mapped_file>);
static_assert(std::is_move_constructible_v<checkpoint> && !std::is_copy_constructible_v<checkpoint>);

namespace {

const std::string reference = MOE_TEST_DATA_DIR "/reference.safetensors";
constexpr float infinity = std::numeric_limits<float>::infinity();

template <class T>
std::vector<T> elements(matrix_view<T> m) {
  return {m.data, m.data + m.rows * m.cols};
}
template <class T>
tensor_view vector_of(const std::vector<T>& v) {
  return as_tensor(matrix_view<const T>(v.data(), 1, static_cast<dim>(v.size())));
}
std::vector<float> read(const checkpoint& from, const char* name, dim rows, dim cols) {
  std::vector<float> out(static_cast<std::size_t>(rows * cols));
  from.read_into(matrix_view<float>(out.data(), rows, cols), name);
  return out;
}

/// A flat buffer with one slot of every kind, filled with small numbers.
struct small_layer {
  std::vector<slot> list;
  buffer params;
  matrix_view<float> up;
  matrix_view<bf16> down;
  std::span<f16> bias;
  matrix_view<std::int8_t> codes;
  std::span<std::int32_t> ids;
  std::span<std::int64_t> counts;
  matrix_view<ternary> packed;

  explicit small_layer(float first = 1) {
    arena recorder(list);
    carve(recorder);
    params = buffer(recorder.used());
    arena mem(params.bytes());
    carve(mem);
    for (dim i = 0; i < 6; ++i) {
      up.data[i] = first + static_cast<float>(i);
      down.data[i] = bf16(first - static_cast<float>(i));
    }
    for (std::size_t i = 0; i < 3; ++i) {
      bias[i] = f16(first / 2 + static_cast<float>(i));
      codes.data[i] = static_cast<std::int8_t>(first + static_cast<float>(i));
      ids[i] = -static_cast<std::int32_t>(i);
      counts[i] = std::int64_t{1} << (40 + i);
      packed.data[i].bits = static_cast<std::uint8_t>(0x80 + i);
    }
  }
  std::vector<std::byte> bytes() const { return {params.bytes().begin(), params.bytes().end()}; }

 private:
  void carve(arena& mem) {
    const arena::scope inside(mem, "experts");
    up = mem.matrix<float>("up", 2, 3);
    down = mem.matrix<bf16>("down", 3, 2);
    bias = mem.vector<f16>("bias", 3);
    codes = mem.matrix<std::int8_t>("codes", 3, 1);
    ids = mem.vector<std::int32_t>("ids", 3);
    counts = mem.vector<std::int64_t>("counts", 3);
    packed = mem.matrix<ternary>("packed", 1, 3);
  }
};

/// A layer of one matrix "w" whose elements are of type T.
template <class T>
struct one_matrix {
  std::vector<slot> list;
  buffer params;
  matrix_view<T> w;

  one_matrix(dim rows, dim cols) {
    arena recorder(list);
    recorder.matrix<T>("w", rows, cols);
    params = buffer(recorder.used());
    arena mem(params.bytes());
    w = mem.matrix<T>("w", rows, cols);
  }
};

}  // namespace

TEST_SUITE("io/mapped_file") {
  TEST_CASE("a mapping shows the file, and writing to it leaves the file as it was") {
    const temporary_file file("mapped");
    testing::write(file.path(), "abc");
    const mapped_file mapped(file.path());
    REQUIRE(mapped.bytes().size() == 3);
    CHECK(mapped.bytes()[2] == std::byte{'c'});
    mapped.bytes()[2] = std::byte{'x'};
    CHECK(mapped.bytes()[2] == std::byte{'x'});
    CHECK(content(file.path()) == "abc");
  }

  TEST_CASE("a mapping moves with its bytes") {
    const temporary_file file("moved");
    testing::write(file.path(), "abc");
    mapped_file first(file.path());
    const std::byte* const at = first.bytes().data();
    mapped_file second(std::move(first));
    CHECK(second.bytes().data() == at);
    mapped_file third;
    third = std::move(second);
    CHECK(third.bytes().data() == at);
    CHECK(third.bytes()[0] == std::byte{'a'});
  }

  TEST_CASE("an empty file has no bytes, and what is no file is an error that names it") {
    const temporary_file file("empty");
    testing::write(file.path(), "");
    CHECK(mapped_file(file.path()).bytes().empty());
    CHECK(message<format_error>([] { mapped_file("no/such/file"); }) == "no/such/file: cannot be opened");
    const std::string folder = MOE_TEST_DATA_DIR;
    CHECK(message<format_error>([&] { mapped_file{folder}; }) == folder + ": is not a regular file");
  }
}

TEST_SUITE("io/checkpoint") {
  TEST_CASE("a file of the reference implementation reads as what was put in") {
    const checkpoint c(reference);
    CHECK(c.tensors().size() == 13);
    CHECK(c.metadata() == metadata_map{{"format", "moe \"golden\"\n\u00e9"}});
    CHECK(elements(c.matrix<float>("scalar", 1, 1)) == std::vector<float>{2.5f});
    CHECK(elements(c.matrix<float>("vector.f32", 1, 5)) == std::vector<float>{1, -2, 0.5f, 3e38f, -0.f});
    CHECK(std::signbit(c.matrix<float>("vector.f32", 1, 5)(0, 4)));
    CHECK(elements(c.matrix<float>("matrix.f32", 2, 3)) == std::vector<float>{1, 2, 3, 4, 5, 6});
    CHECK(read(c, "stack.bf16", 4, 3) ==
          std::vector<float>{-1, -.75f, -.5f, -.25f, 0, .25f, .5f, .75f, 1, 1.25f, 1.5f, 1.75f});
    CHECK(read(c, "matrix.f16", 3, 2) == std::vector<float>{0.0999755859375f, -65504, 0x1p-24f, 1, infinity, 2});
    CHECK(elements(c.matrix<std::int8_t>("codes.i8", 1, 3)) == std::vector<std::int8_t>{-128, 0, 127});
    CHECK(elements(c.matrix<std::int32_t>("ids.i32", 1, 4)) ==
          std::vector<std::int32_t>{-2147483647 - 1, -1, 0, 2147483647});
    CHECK(elements(c.matrix<std::int64_t>("ids.i64", 1, 2)) ==
          std::vector<std::int64_t>{std::numeric_limits<std::int64_t>::min(), std::numeric_limits<std::int64_t>::max()});
    CHECK(c.tensor("mask.bool").dtype == "BOOL");
    CHECK(c.tensor("raw.f64").dtype == "F64");
    CHECK(c.tensor("raw.u8").shape == std::vector<dim>{2, 2});
    CHECK(c.tensor("raw.u8").bytes[2] == std::byte{254});
    CHECK(c.tensor("empty").shape == std::vector<dim>{0, 4});
    CHECK(c.tensor("empty").bytes.empty());
    CHECK(c.contains("n\u00e4me \"quoted\"\\\t\x01 \U0001f600"));
    CHECK_FALSE(c.contains("name"));
  }

  TEST_CASE("views read in place, and writing through one leaves the file as it was") {
    const std::string before = content(reference);
    const checkpoint c(reference);
    const auto m = c.matrix<float>("matrix.f32", 2, 3);
    CHECK(reinterpret_cast<const std::byte*>(m.data) == c.tensor("matrix.f32").bytes.data());
    m(1, 2) = 42;
    CHECK(c.matrix<const float>("matrix.f32", 2, 3)(1, 2) == 42);
    CHECK(content(reference) == before);
  }

  TEST_CASE("a checkpoint keeps its views when it moves") {
    checkpoint first(reference);
    const auto m = first.matrix<float>("matrix.f32", 2, 3);
    const checkpoint second = std::move(first);
    CHECK(second.matrix<float>("matrix.f32", 2, 3).data == m.data);
    CHECK(m(1, 0) == 4);
  }

  TEST_CASE("a name, type or shape that the file does not have is an error that says what it has") {
    const checkpoint c(reference);
    const auto view = [&](const char* name, dim rows, dim cols) {
      return message<format_error>([&] { c.matrix<float>(name, rows, cols); }).substr(reference.size());
    };
    CHECK(view("absent", 1, 1) == " has no tensor \"absent\"");
    CHECK(view("stack.bf16", 4, 3) == ": tensor \"stack.bf16\" is BF16, expected F32");
    CHECK(view("raw.f64", 1, 1) == ": tensor \"raw.f64\" is F64, expected F32");
    CHECK(view("matrix.f32", 3, 2) == ": tensor \"matrix.f32\" is F32 [2, 3], expected 3 x 2");
    CHECK(view("vector.f32", 5, 1) == ": tensor \"vector.f32\" is F32 [5], expected 5 x 1");
    std::vector<float> out(4, 7.f);
    const auto copy = [&](const char* name, dim rows, dim cols) {
      return message<format_error>([&] { c.read_into(matrix_view<float>(out.data(), rows, cols), name); })
          .substr(reference.size());
    };
    CHECK(copy("mask.bool", 1, 3) == ": tensor \"mask.bool\" is BOOL, expected F32, BF16, F16 or I8");
    CHECK(copy("ids.i32", 2, 2) == ": tensor \"ids.i32\" is I32 [4], expected 2 x 2");
    CHECK(out == std::vector<float>(4, 7.f));
    CHECK(message<shape_error>([&] { c.read_into(matrix_view<float>(nullptr, 2, 3), "matrix.f32"); }) ==
          "checkpoint::read_into: destination has no memory, expected 2 x 3 (rows x cols)");
  }

  TEST_CASE("every real type converts to every other, int8 by value, and rows may be strided") {
    const std::vector<float> f{1, -2.00390625f, 1.0009765625f, 70000};
    const std::vector<bf16> b{bf16(1.5f), bf16(-3.f)};
    const std::vector<f16> h{f16(0.1f), f16(-2.f)};
    const std::vector<std::int8_t> i{-128, 127};
    const std::string bytes = written({{"f", vector_of(f)}, {"b", vector_of(b)}, {"h", vector_of(h)}, {"i", vector_of(i)}});
    std::vector<std::byte> memory(bytes.size());
    std::memcpy(memory.data(), bytes.data(), bytes.size());
    const checkpoint c(memory, "memory");

    CHECK(read(c, "f", 1, 4) == f);
    CHECK(read(c, "b", 1, 2) == std::vector<float>{1.5f, -3});
    CHECK(read(c, "h", 1, 2) == std::vector<float>{0.0999755859375f, -2});
    CHECK(read(c, "i", 1, 2) == std::vector<float>{-128, 127});
    std::vector<bf16> to_bf16(4);
    c.read_into(matrix_view<bf16>(to_bf16.data(), 1, 4), "f");
    CHECK(float(to_bf16[1]) == -2);  // halfway between -2 and -2.015625: to the even one
    CHECK(float(to_bf16[3]) == 70144);
    std::vector<f16> to_f16(4);
    c.read_into(matrix_view<f16>(to_f16.data(), 1, 4), "f");
    CHECK(float(to_f16[1]) == -2.00390625f);
    CHECK(float(to_f16[3]) == infinity);
    c.read_into(matrix_view<f16>(to_f16.data(), 1, 2), "b");
    CHECK(float(to_f16[0]) == 1.5f);

    std::vector<float> strided(8, 9.f);
    const std::string matrix = written({{"m", as_tensor(matrix_view<const float>(f.data(), 2, 2))}});
    std::vector<std::byte> second(matrix.size());
    std::memcpy(second.data(), matrix.data(), matrix.size());
    checkpoint(second, "memory").read_into(matrix_view<float>(strided.data(), 2, 2, 4), "m");
    CHECK(strided == std::vector<float>{f[0], f[1], 9, 9, f[2], f[3], 9, 9});
  }

  TEST_CASE("the bits of a NaN survive when no conversion is asked for") {
    const std::vector<std::uint32_t> bits{0x7fc00001u, 0x7f800001u, 0xffffffffu};
    std::vector<float> nan(3);
    std::memcpy(nan.data(), bits.data(), 12);
    const std::string bytes = written({{"n", vector_of(nan)}});
    std::vector<std::byte> memory(bytes.size());
    std::memcpy(memory.data(), bytes.data(), bytes.size());
    const std::vector<float> back = read(checkpoint(memory, "memory"), "n", 1, 3);
    CHECK(std::memcmp(back.data(), bits.data(), 12) == 0);
  }

  TEST_CASE("an unaligned tensor cannot be viewed but can be read") {
    const std::string header =
        R"({"a":{"dtype":"I8","shape":[1],"data_offsets":[0,1]},"b":{"dtype":"F32","shape":[1],"data_offsets":[1,5]}})";
    std::string bytes(8, '\0');
    bytes[0] = static_cast<char>(header.size());
    bytes += header + std::string("\x07\0\0\x80\x3f", 5);
    buffer memory(bytes.size());
    std::memcpy(memory.bytes().data(), bytes.data(), bytes.size());
    const checkpoint c(memory.bytes(), "f");
    REQUIRE((8 + header.size() + 1) % 4 != 0);
    CHECK(message<format_error>([&] { c.matrix<float>("b", 1, 1); }) == "f: tensor \"b\" is not aligned for F32, at byte " +
                                                                            std::to_string(8 + header.size() + 1) +
                                                                            " of the file; read_into copies it");
    if constexpr (std::endian::native == std::endian::little) CHECK(read(c, "b", 1, 1) == std::vector<float>{1});
  }
}

TEST_SUITE("io/safetensors_writer") {
  TEST_CASE("what the reference implementation wrote is written again byte for byte") {
    const checkpoint c(reference);
    CHECK(written(c.tensors(), c.metadata()) == content(reference));
  }

  TEST_CASE("every element type and rank comes back as it was written") {
    const std::vector<std::byte> data(64, std::byte{0x5a});
    tensor_map tensors;
    const std::map<const char*, std::size_t> bytes_of_eight{
        {"BOOL", 8},    {"F4", 4},      {"F6_E2M3", 6}, {"F6_E3M2", 6},     {"U8", 8},          {"I8", 8},
        {"F8_E5M2", 8}, {"F8_E4M3", 8}, {"F8_E8M0", 8}, {"F8_E4M3FNUZ", 8}, {"F8_E5M2FNUZ", 8}, {"I16", 16},
        {"U16", 16},    {"F16", 16},    {"BF16", 16},   {"I32", 32},        {"U32", 32},        {"F32", 32},
        {"C64", 64},    {"F64", 64},    {"I64", 64},    {"U64", 64}};
    for (const auto& [name, bytes] : bytes_of_eight)
      tensors["type." + std::string(name)] = {name, {8}, std::span(data).first(bytes)};
    std::vector<dim> shape;
    for (int rank = 0; rank < 5; ++rank, shape.push_back(2))
      tensors["rank." + std::to_string(rank)] = {"F32", shape, std::span(data).first(std::size_t{4} << rank)};
    tensors["empty"] = {"I64", {3, 0, 2}, {}};
    const temporary_file file("types");
    save_tensors(file.path(), tensors, {{"a", "1"}, {"b", ""}});
    const checkpoint c(file.path());
    CHECK(same(c.tensors(), tensors));
    CHECK(c.metadata() == metadata_map{{"a", "1"}, {"b", ""}});
  }

  TEST_CASE("the header is padded with spaces to a multiple of 8, wide types come first, and bytes repeat") {
    const std::vector<std::int8_t> a{1};
    const std::vector<float> b{1};
    const std::vector<std::int64_t> z{1};
    const tensor_map tensors{{"a", vector_of(a)}, {"b", vector_of(b)}, {"z", vector_of(z)}};
    const std::string bytes = written(tensors, {{"k", "v"}});
    const std::string json =
        R"({"__metadata__":{"k":"v"},"z":{"dtype":"I64","shape":[1],"data_offsets":[0,8]},)"
        R"("b":{"dtype":"F32","shape":[1],"data_offsets":[8,12]},"a":{"dtype":"I8","shape":[1],"data_offsets":[12,13]}})";
    const std::size_t padded = (json.size() + 7) / 8 * 8;
    CHECK(static_cast<std::size_t>(static_cast<unsigned char>(bytes[0])) == padded);
    CHECK(bytes.substr(1, 7) == std::string(7, '\0'));
    CHECK(bytes.substr(8, padded) == json + std::string(padded - json.size(), ' '));
    CHECK(bytes.size() == 8 + padded + 13);
    CHECK(written(tensors, {{"k", "v"}}) == bytes);
    CHECK(written({}) == std::string("\x08\0\0\0\0\0\0\0{}      ", 16));
  }

  TEST_CASE("what the format cannot hold is refused, and the file that was there stays") {
    const std::vector<std::byte> four(4);
    const temporary_file file("refused");
    testing::write(file.path(), "old");
    const auto refused = [&](const std::string& name, std::string_view dtype, std::vector<dim> shape) {
      return message<format_error>([&] { save_tensors(file.path(), {{name, {dtype, std::move(shape), four}}}); })
          .substr(file.path().size());
    };
    CHECK(refused("a", "F32", {2}) == ": tensor \"a\" has 4 bytes, but F32 [2] has 8");
    CHECK(refused("a", "F33", {1}) == ": tensor \"a\" has the unknown dtype \"F33\"");
    CHECK(refused("a", "F32", {-1, -1}) == ": tensor \"a\" has a negative size in its shape [-1, -1]");
    CHECK(refused("a", "F32", {dim{1} << 62, 4}) ==
          ": tensor \"a\" has the shape [4611686018427387904, 4], whose product overflows");
    CHECK(refused("a", "F32", std::vector<dim>(65, 1)) == ": tensor \"a\" has more than 64 dimensions");
    CHECK(refused("__metadata__", "F32", {1}) == ": tensor \"__metadata__\" has the name of the metadata");
    CHECK(refused(std::string("a\0b", 3), "F32", {1}) == ": tensor \"a?b\" has NUL in its name");
    CHECK(refused("\xff", "F32", {1}) == ": tensor \"\xff\" has a name that is not UTF-8");
    CHECK(message<format_error>([&] { save_tensors(file.path(), {}, {{"k", "\xff"}}); }) ==
          file.path() + ": __metadata__ \"k\" is not UTF-8");
    CHECK(content(file.path()) == "old");
    CHECK_FALSE(std::filesystem::exists(file.path() + ".partial"));
    CHECK(message<format_error>([] { save_tensors("no/such/folder/f", {}); }) == "no/such/folder/f: cannot be written");
    const std::vector<float> values(6);
    CHECK(message<shape_error>([&] { as_tensor(matrix_view<const float>(values.data(), 2, 2, 3)); }) ==
          "as_tensor: matrix has row stride 3, expected 2 (cols)");
  }

  TEST_CASE("a file is replaced while it is open, and the open one keeps its content") {
    const std::vector<float> one{1}, two{2};
    const temporary_file file("replaced");
    save_tensors(file.path(), {{"v", vector_of(one)}});
    const checkpoint open(file.path());
    save_tensors(file.path(), {{"v", vector_of(two)}});
    CHECK(open.matrix<float>("v", 1, 1)(0, 0) == 1);
    CHECK(checkpoint(file.path()).matrix<float>("v", 1, 1)(0, 0) == 2);
  }

  TEST_CASE("a change of byte order reverses each unit and undoes itself") {
    std::vector<std::byte> bytes;
    for (int i = 0; i < 8; ++i) bytes.push_back(std::byte(i));
    const auto order = [&](std::size_t unit) {
      auto copy = bytes;
      detail::reverse_units(copy, unit);
      std::string out;
      for (const std::byte b : copy) out += static_cast<char>('0' + std::to_integer<int>(b));
      return out;
    };
    CHECK(order(1) == "01234567");
    CHECK(order(2) == "10325476");
    CHECK(order(4) == "32107654");
    CHECK(order(8) == "76543210");
  }
}

TEST_SUITE("io/safetensors") {
  TEST_CASE("a layer's flat buffer comes back bit for bit, padding left alone") {
    const small_layer saved(1), other(2);
    small_layer loaded(9);
    const temporary_file file("layer");
    save(file.path(), {{"block0", saved.list, saved.params.bytes()}, {"block1", other.list, other.params.bytes()}},
         {{"step", "7"}});
    load(file.path(), {{"block0", loaded.list, loaded.params.bytes()}, {"block1", other.list, other.params.bytes()}});
    CHECK(loaded.bytes() == saved.bytes());
    const checkpoint c(file.path());
    CHECK(c.metadata().at("step") == "7");
    CHECK(c.tensor("block0.experts.up").shape == std::vector<dim>{2, 3});
    CHECK(c.tensor("block1.experts.bias").shape == std::vector<dim>{3});
    CHECK(c.tensor("block1.experts.codes").shape == std::vector<dim>{3, 1});
    CHECK(c.tensor("block0.experts.packed").dtype == "U8");
    load(c, {{"block1", loaded.list, loaded.params.bytes()}, {"block0", small_layer().list, other.params.bytes()}});
    CHECK(loaded.bytes() == small_layer(2).bytes());
  }

  TEST_CASE("an empty prefix leaves the names as the catalogue has them, and the same input the same bytes") {
    const small_layer layer;
    const temporary_file first("first"), second("second");
    save(first.path(), {{"", layer.list, layer.params.bytes()}});
    save(second.path(), {{"", layer.list, layer.params.bytes()}});
    CHECK(checkpoint(first.path()).contains("experts.up"));
    CHECK(content(first.path()) == content(second.path()));
  }

  TEST_CASE_TEMPLATE("a real slot is filled from any real type, rounded as its own type does", T, float, bf16, f16) {
    const std::vector<float> f{1, -0.333333343f, 70000, 0, 5, 6};
    std::vector<bf16> b;
    std::vector<f16> h;
    for (const float v : f) {
      b.emplace_back(v);
      h.emplace_back(v);
    }
    const temporary_file file("real");
    one_matrix<T> to(2, 3);
    const auto filled_as = [&](const auto& from) {
      save_tensors(file.path(), {{"w", as_tensor(matrix_view(from.data(), 2, 3))}});
      load(file.path(), {{"", to.list, to.params.bytes()}});
      bool equal = true;
      for (std::size_t i = 0; i < 6; ++i) {
        const T wanted(static_cast<float>(from[i]));
        equal = equal && std::memcmp(&wanted, &to.w.data[i], sizeof wanted) == 0;
      }
      return equal;
    };
    CHECK(filled_as(f));
    CHECK(filled_as(b));
    CHECK(filled_as(h));
  }

  TEST_CASE("a vector is read from [n] and from [1, n], a matrix from any stack of its rows") {
    std::vector<float> six{1, 2, 3, 4, 5, 6};
    one_matrix<float> vector(1, 6), matrix(3, 2);
    const temporary_file file("shapes");
    const auto load_shape = [&](std::vector<dim> shape, const one_matrix<float>& to) {
      save_tensors(file.path(), {{"w", {"F32", std::move(shape), std::as_bytes(std::span(six))}}});
      load(file.path(), {{"", to.list, to.params.bytes()}});
      return elements(to.w);
    };
    CHECK(load_shape({6}, vector) == six);
    six[0] = 7;
    CHECK(load_shape({1, 6}, vector) == six);
    CHECK(load_shape({3, 2}, matrix) == six);
    six[0] = 8;
    CHECK(load_shape({3, 1, 2}, matrix) == six);
    const std::string end = message<format_error>([&] { load_shape({2, 3}, matrix); }).substr(file.path().size());
    CHECK(end == ": tensor \"w\" is F32 [2, 3], expected 3 x 2");
    CHECK_THROWS_AS(load_shape({6, 1}, vector), format_error);
  }

  TEST_CASE("a checkpoint of another layer is refused before anything is written") {
    const small_layer layer;
    small_layer to(9);
    const std::vector<std::byte> before = to.bytes();
    const temporary_file file("other");
    save(file.path(), {{"l", layer.list, layer.params.bytes()}});
    const checkpoint good(file.path());
    const auto refused = [&](const tensor_map& tensors) {
      const temporary_file changed("changed");
      save_tensors(changed.path(), tensors);
      const std::string said = message<format_error>([&] { load(changed.path(), {{"l", to.list, to.params.bytes()}}); });
      CHECK(to.bytes() == before);
      REQUIRE(said.starts_with(changed.path()));
      return said.substr(changed.path().size());
    };
    const auto with = [&](const std::string& name, std::string_view dtype, std::vector<dim> shape) {
      static const std::vector<std::byte> data(64);
      tensor_map t = good.tensors();
      const std::size_t bytes = detail::byte_count(*detail::find_dtype(dtype), shape, [](const std::string&) {});
      t[name] = {dtype, std::move(shape), std::span(data).first(bytes)};
      return t;
    };
    tensor_map missing = good.tensors();
    missing.erase("l.experts.packed");
    CHECK(refused(missing) == " has no tensor \"l.experts.packed\"");
    CHECK(refused(with("l.experts.gate", "F32", {1})) == ": tensor \"l.experts.gate\" belongs to none of the parts to load");
    CHECK(refused(with("l.experts.packed", "U8", {2})) == ": tensor \"l.experts.packed\" is U8 [2], expected 1 x 3");
    CHECK(refused(with("l.experts.up", "F64", {2, 3})) == ": tensor \"l.experts.up\" is F64, expected F32, BF16 or F16");
    CHECK(refused(with("l.experts.up", "I8", {2, 3})) == ": tensor \"l.experts.up\" is I8, expected F32, BF16 or F16");
    CHECK(refused(with("l.experts.ids", "F32", {3})) == ": tensor \"l.experts.ids\" is F32, expected I32");
    CHECK(refused(with("l.experts.counts", "I32", {3})) == ": tensor \"l.experts.counts\" is I32, expected I64");
    CHECK(refused(with("l.experts.packed", "I8", {3})) == ": tensor \"l.experts.packed\" is I8, expected U8");
    load(good, {{"l", to.list, to.params.bytes()}});
    CHECK(to.bytes() == layer.bytes());
  }

  TEST_CASE("parts of one name or shorter than their catalogue are refused") {
    const small_layer layer;
    const temporary_file file("parts");
    CHECK(message<format_error>([&] {
            save(file.path(), {{"l", layer.list, layer.params.bytes()}, {"l", layer.list, layer.params.bytes()}});
          }) == file.path() + ": two slots are named \"l.experts.up\"");
    const std::string bytes = std::to_string(layer.params.size());
    const auto cut = layer.params.bytes().first(layer.params.size() - 1);
    CHECK(message<shape_error>([&] { save(file.path(), {{"l", layer.list, cut}}); }) ==
          "moe::save: part \"l\" has " + std::to_string(cut.size()) + " bytes left, needs " + bytes + " (its catalogue)");
    CHECK_FALSE(std::filesystem::exists(file.path()));
    save(file.path(), {{"l", layer.list, layer.params.bytes()}});
    CHECK(message<shape_error>([&] { load(file.path(), {{"l", layer.list, cut}}); }) ==
          "moe::load: part \"l\" has " + std::to_string(cut.size()) + " bytes left, needs " + bytes + " (its catalogue)");
    CHECK(message<format_error>([&] {
            load(file.path(), {{"l", layer.list, layer.params.bytes()}, {"l", layer.list, layer.params.bytes()}});
          }) == file.path() + " is asked for tensor \"l.experts.up\" twice");
  }
}
