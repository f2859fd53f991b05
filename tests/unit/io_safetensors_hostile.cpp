// SPDX-License-Identifier: Apache-2.0
#include <doctest/doctest.h>

#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

#include "moe/io/safetensors_reader.hpp"
#include "support/fuzz_safetensors.hpp"

using namespace moe;
using namespace std::string_literals;

namespace {

std::vector<std::byte> as_bytes(const std::string& s) {
  const auto bytes = std::as_bytes(std::span(s));
  return {bytes.begin(), bytes.end()};
}

/// A file of this header and as many zero bytes of data.
std::string file(const std::string& header, std::size_t data = 0) {
  std::string out;
  for (std::uint64_t n = header.size(), i = 0; i < 8; ++i, n >>= 8) out += static_cast<char>(n & 0xff);
  return out + header + std::string(data, '\0');
}

/// What the reader says of these bytes.
std::string fault(const std::string& bytes) {
  try {
    parse_safetensors(as_bytes(bytes), "f");
  } catch (const format_error& e) {
    return e.what();
  }
  return "accepted";
}

/// A header of one tensor "a" of 4 bytes of data, with one member in place of the right one.
std::string with_dtype(const std::string& v) {
  return file(R"({"a":{"dtype":)" + v + R"(,"shape":[1],"data_offsets":[0,4]}})", 4);
}
std::string with_shape(const std::string& v) {
  return file(R"({"a":{"dtype":"F32","shape":)" + v + R"(,"data_offsets":[0,4]}})", 4);
}
std::string with_offsets(const std::string& v) {
  return file(R"({"a":{"dtype":"F32","shape":[1],"data_offsets":)" + v + "}}", 4);
}
std::string with_name(const std::string& v) {
  return file("{" + v + R"(:{"dtype":"F32","shape":[1],"data_offsets":[0,4]}})", 4);
}

/// Two float tensors of 4 and 8 bytes at these offsets.
std::string two(const std::string& a, const std::string& b, std::size_t data) {
  return file(R"({"a":{"dtype":"F32","shape":[1],"data_offsets":)" + a +
                  R"(},"b":{"dtype":"F32","shape":[2],"data_offsets":)" + b + "}}",
              data);
}

/// The name that a header's spelling of it stands for, or the fault.
std::string name_of(const std::string& spelling) {
  const std::string bytes = with_name(spelling);
  const auto kept = as_bytes(bytes);
  try {
    return parse_safetensors(kept, "f").tensors.begin()->first;
  } catch (const format_error& e) {
    return e.what();
  }
}

}  // namespace

TEST_SUITE("io/safetensors_reader") {
  TEST_CASE("a well-formed file is accepted, whatever its order, spacing and padding") {
    CHECK(fault(file("{}")) == "accepted");
    CHECK(fault(file("{ }\n\t\r ")) == "accepted");
    CHECK(fault(with_shape("[1]")) == "accepted");
    CHECK(fault(with_shape("[]")) == "accepted");
    CHECK(fault(with_shape(" [ 1 , 1\n]\t")) == "accepted");
    CHECK(fault(file(R"({"a":{"data_offsets":[0,1],"shape":[1],"dtype":"U8"},"__metadata__":{"k":"v"}})", 1)) == "accepted");
    CHECK(fault(two("[0,4]", "[4,12]", 12)) == "accepted");
    CHECK(fault(two("[8,12]", "[0,8]", 12)) == "accepted");
  }

  TEST_CASE("a file cut short at any byte is refused") {
    const std::string whole =
        file(R"({"__metadata__":{"k":"v"},"a":{"dtype":"F32","shape":[1,2],"data_offsets":[0,8]}} )", 8);
    REQUIRE(fault(whole) == "accepted");
    for (std::size_t n = 0; n < whole.size(); ++n) {
      CAPTURE(n);
      CHECK(fault(whole.substr(0, n)).starts_with("f: "));
    }
    CHECK(fault("") == "f: is 0 bytes long, shorter than the header's length field");
    CHECK(fault(whole.substr(0, 7)) == "f: is 7 bytes long, shorter than the header's length field");
    CHECK(fault(whole.substr(0, 20)) == "f: header length 82 goes beyond the end of the file, which has 12 bytes after it");
    CHECK(fault(whole.substr(0, whole.size() - 1)) ==
          "f: byte 34: tensor \"a\" has data_offsets [0, 8], beyond the 7 bytes of data");
  }

  TEST_CASE("a header whose JSON is cut at any byte is refused") {
    const std::string json = R"({"__metadata__":{"k":"\u00e9"},"a":{"dtype":"F32","shape":[1,2],"data_offsets":[0,8]}})";
    REQUIRE(fault(file(json, 8)) == "accepted");
    for (std::size_t n = 0; n < json.size(); ++n) {
      CAPTURE(n);
      CHECK(fault(file(json.substr(0, n), 8)).starts_with("f: byte "));
    }
  }

  TEST_CASE("a header length beyond the limit or the file is refused before anything is read") {
    CHECK(fault("\xff\xff\xff\xff\xff\xff\xff\xff{}"s) == "f: header length 18446744073709551615 is above 100000000");
    CHECK(fault("\x01\xe1\xf5\x05\0\0\0\0{}"s) == "f: header length 100000001 is above 100000000");
    CHECK(fault("\x03\0\0\0\0\0\0\0{}"s) ==
          "f: header length 3 goes beyond the end of the file, which has 2 bytes after it");
    CHECK(fault("\0\0\0\0\0\0\0\0"s) == "f: byte 8: the header does not start with '{'");
    CHECK(fault(file(" {}")) == "f: byte 8: the header does not start with '{'");
  }

  TEST_CASE("offsets that are reversed, outside, overlapping or leave a gap are refused") {
    CHECK(fault(with_offsets("[4,0]")) == "f: byte 9: tensor \"a\" has data_offsets [4, 0], which are reversed");
    CHECK(fault(with_offsets("[0,5]")) == "f: byte 9: tensor \"a\" has data_offsets [0, 5], beyond the 4 bytes of data");
    CHECK(fault(with_offsets("[9223372036854775803,9223372036854775807]")) ==
          "f: byte 9: tensor \"a\" has data_offsets [9223372036854775803, 9223372036854775807], beyond the 4 bytes of data");
    CHECK(fault(two("[0,4]", "[0,8]", 8)) ==
          "f: tensor \"b\" begins at byte 0 of the data, inside the tensor that ends at 4");
    CHECK(fault(two("[2,6]", "[0,8]", 8)) ==
          "f: tensor \"a\" begins at byte 2 of the data, inside the tensor that ends at 8");
    CHECK(fault(two("[0,4]", "[5,13]", 13)) == "f: bytes 4 to 5 of the data belong to no tensor");
    CHECK(fault(two("[1,5]", "[5,13]", 13)) == "f: bytes 0 to 1 of the data belong to no tensor");
    CHECK(fault(two("[0,4]", "[4,12]", 13)) == "f: bytes 12 to 13 of the data belong to no tensor");
    CHECK(fault(file("{}", 3)) == "f: bytes 0 to 3 of the data belong to no tensor");
  }

  TEST_CASE("tensors without elements may share a place but not lie inside another") {
    const auto empty_at = [](const std::string& at) {
      return file(
          R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"b":{"dtype":"F32","shape":[0],"data_offsets":[)" + at +
              "," + at + "]}}",
          4);
    };
    CHECK(fault(empty_at("0")) == "accepted");
    CHECK(fault(empty_at("4")) == "accepted");
    CHECK(fault(empty_at("2")) == "f: tensor \"b\" begins at byte 2 of the data, inside the tensor that ends at 4");
  }

  TEST_CASE("a size that is not the product of shape and element is refused, overflow included") {
    CHECK(fault(with_shape("[2]")) == "f: byte 9: tensor \"a\" has data_offsets [0, 4], 4 bytes, but F32 [2] has 8");
    CHECK(fault(with_shape("[0]")) == "f: byte 9: tensor \"a\" has data_offsets [0, 4], 4 bytes, but F32 [0] has 0");
    CHECK(fault(with_dtype("\"I64\"")) == "f: byte 9: tensor \"a\" has data_offsets [0, 4], 4 bytes, but I64 [1] has 8");
    CHECK(fault(with_shape("[4611686018427387905,4]")) ==
          "f: byte 9: tensor \"a\" has the shape [4611686018427387905, 4], whose product overflows");
    CHECK(fault(with_shape("[2305843009213693953,2]")) ==
          "f: byte 9: tensor \"a\" has the shape [2305843009213693953, 2], whose size in bits overflows");
    CHECK(fault(with_shape("[9223372036854775808]")) == "f: byte 37: a number is too large");
    CHECK(fault(file(R"({"a":{"dtype":"F4","shape":[3],"data_offsets":[0,1]}})", 1)) ==
          "f: byte 9: tensor \"a\" has the shape [3], which ends inside a byte");
    CHECK(fault(file(R"({"a":{"dtype":"F4","shape":[2],"data_offsets":[0,1]}})", 1)) == "accepted");
  }

  TEST_CASE("a shape of more than 64 dimensions is refused") {
    const auto ones = [](int n) {
      std::string s = "[1";
      for (int i = 1; i < n; ++i) s += ",1";
      return s + ']';
    };
    CHECK(fault(with_shape(ones(64))) == "accepted");
    CHECK(fault(with_shape(ones(65))) == "f: byte 165: a shape of more than 64 dimensions");
  }

  TEST_CASE("a number is whole, not negative, and plainly written") {
    for (const std::string bad : {"-1", "1.0", "1.5", "1e0", "1E2", "+1", "\"1\"", "null", "true", "", "NaN"}) {
      CAPTURE(bad);
      CHECK(fault(with_shape("[" + bad + ",1]")) == "f: byte 37: expected a whole number that is not negative");
    }
    CHECK(fault(with_shape("[01]")) == "f: byte 37: a number starts with 0");
    CHECK(fault(with_shape("[1 1]")) == "f: byte 39: expected ']' after a shape");
    CHECK(fault(with_shape("[1,]")) == "f: byte 39: expected a whole number that is not negative");
    CHECK(fault(with_shape("1")) == "f: byte 36: expected '[' before a shape");
    CHECK(fault(with_offsets("[0]")) == "f: byte 57: expected ',' between data_offsets");
    CHECK(fault(with_offsets("[0,4,4]")) == "f: byte 59: expected ']' after data_offsets");
    CHECK(fault(with_offsets("{}")) == "f: byte 55: expected '[' before data_offsets");
  }

  TEST_CASE("an element type is one of the format's, in its spelling") {
    for (const std::string bad : {"F128", "f32", "F32 ", "", "float32"}) {
      CAPTURE(bad);
      CHECK(fault(with_dtype('"' + bad + '"')) == "f: byte 14: tensor \"a\" has the unknown dtype \"" + bad + '"');
    }
    CHECK(fault(with_dtype("32")) == "f: byte 22: expected a dtype in quotes");
    CHECK(fault(with_dtype("null")) == "f: byte 22: expected a dtype in quotes");
  }

  TEST_CASE("a name, a member or a key that appears twice is refused") {
    const std::string t = R"({"dtype":"F32","shape":[0],"data_offsets":[0,0]})";
    CHECK(fault(file(R"({"a":)" + t + R"(,"a":)" + t + "}")) == "f: byte 62: tensor \"a\" appears twice");
    CHECK(fault(file(R"({"a":)" + t + R"(,"\u0061":)" + t + "}")) == "f: byte 62: tensor \"a\" appears twice");
    CHECK(fault(file(R"({"__metadata__":{},"__metadata__":{}})")) == "f: byte 27: __metadata__ appears twice");
    CHECK(fault(file(R"({"__metadata__":{"k":"v","k":"v"}})")) == "f: byte 33: __metadata__ has \"k\" twice");
    CHECK(fault(file(R"({"a":{"dtype":"F32","dtype":"F32"}})")) == "f: byte 28: tensor \"a\" has dtype twice");
    CHECK(fault(file(R"({"a":{"shape":[],"shape":[]}})")) == "f: byte 25: tensor \"a\" has shape twice");
    CHECK(fault(file(R"({"a":{"data_offsets":[0,0],"data_offsets":[0,0]}})")) ==
          "f: byte 35: tensor \"a\" has data_offsets twice");
  }

  TEST_CASE("a tensor has the three members of the format and no other") {
    CHECK(fault(file(R"({"a":{}})")) == "f: byte 9: tensor \"a\" has no dtype");
    CHECK(fault(file(R"({"a":{"dtype":"F32","data_offsets":[0,0]}})")) == "f: byte 9: tensor \"a\" has no shape");
    CHECK(fault(file(R"({"a":{"dtype":"F32","shape":[0]}})")) == "f: byte 9: tensor \"a\" has no data_offsets");
    CHECK(fault(file(R"({"a":{"dtype":"F32","strides":[1]}})")) ==
          "f: byte 28: tensor \"a\" has the unknown member \"strides\"");
    CHECK(fault(file(R"({"a":[]})")) == "f: byte 13: expected '{' around a tensor");
    CHECK(fault(file(R"({"__metadata__":{"k":1}})")) == "f: byte 29: expected a value of __metadata__ in quotes");
  }

  TEST_CASE("nesting of any depth is refused at its first level") {
    const std::string deep(1'000'000, '[');
    CHECK(fault(with_shape(deep)) == "f: byte 37: expected a whole number that is not negative");
    std::string braces;
    for (int i = 0; i < 100'000; ++i) braces += "{\"a\":";
    CHECK(fault(file(braces)) == "f: byte 14: tensor \"a\" has the unknown member \"a\"");
  }

  TEST_CASE("what follows the header's object is refused, but for spaces") {
    CHECK(fault(file("{}{}")) == "f: byte 10: something follows the header's closing brace");
    CHECK(fault(file("{}\0"s)) == "f: byte 10: something follows the header's closing brace");
    CHECK(fault(file("{} x")) == "f: byte 11: something follows the header's closing brace");
    CHECK(fault(file("{,}")) == "f: byte 9: expected a name in quotes");
    CHECK(fault(file(R"({"a" {}})")) == "f: byte 13: expected ':' after a name");
    CHECK(fault(file(R"({a:{}})")) == "f: byte 9: expected a name in quotes");
  }

  TEST_CASE("a name is UTF-8, with the escapes of JSON and without NUL") {
    CHECK(name_of(R"("\"\\\/\b\f\n\r\t")") == "\"\\/\b\f\n\r\t");
    CHECK(name_of(R"("\u0041\u00e9\u20AC\ud83d\ude00")") == "A\u00e9\u20ac\U0001f600");
    CHECK(name_of(R"("\u007f\u0080\u07ff\u0800\uffff\ud800\udc00\udbff\udfff")") ==
          "\x7f\xc2\x80\xdf\xbf\xe0\xa0\x80\xef\xbf\xbf\xf0\x90\x80\x80\xf4\x8f\xbf\xbf");
    CHECK(name_of("\"\u00e9\u20ac\U0001f600\"") == "\u00e9\u20ac\U0001f600");
    CHECK(name_of("\"\"") == "");
    CHECK(name_of(R"("a\u0000b")") == "f: byte 9: tensor \"a?b\" has NUL in its name");
    CHECK(name_of("\"a\0b\""s) == "f: byte 11: a control character in a string");
    CHECK(name_of("\"a\nb\"") == "f: byte 11: a control character in a string");
    CHECK(name_of(R"("\x41")") == "f: byte 10: an unknown escape");
    CHECK(name_of(R"("\u12g4")") == "f: byte 10: an escape without four hexadecimal digits");
    CHECK(name_of(R"("\u12)") == "f: byte 10: an escape without four hexadecimal digits");
    for (const std::string half : {R"("\ud83d")", R"("\ude00")", R"("\ud83d\u0041")", R"("\ud83dx")", R"("\ud83d\ud83d")",
                                   R"("\udc00\udc00")", R"("\ud83d\ue000")", R"("\udfff")"}) {
      CAPTURE(half);
      CHECK(name_of(half) == "f: byte 10: half a surrogate pair");
    }
  }

  TEST_CASE("bytes that are not UTF-8 are refused where they stand") {
    for (const std::string bad :
         {"\x80", "\xbf", "\xc0\x80", "\xc1\xbf", "\xe0\x9f\xbf", "\xed\xa0\x80", "\xf0\x8f\xbf\xbf", "\xf4\x90\x80\x80",
          "\xf5\x80\x80\x80", "\xff", "\xc3", "\xe2\x82", "\xf0\x9f\x98", "\xc3\x28"}) {
      CAPTURE(bad);
      CHECK(fault(with_name("\"n" + bad + '"')) == "f: byte 11: the header is not UTF-8");
    }
    CHECK(fault(file("{\"\xc3") + '\x80') == "f: byte 10: the header is not UTF-8");  // goes on in the data
    for (const std::string good : {"\x7f", "\xc2\x80", "\xdf\xbf", "\xe0\xa0\x80", "\xed\x9f\xbf", "\xee\x80\x80",
                                   "\xef\xbf\xbf", "\xf0\x90\x80\x80", "\xf4\x8f\xbf\xbf"})
      CHECK(name_of('"' + good + '"') == good);
  }

  TEST_CASE("a message shows a long or unprintable name cut and cleaned") {
    const std::string t = R"(:{}})";
    CHECK(fault(file("{\"" + std::string(100, 'x') + '"' + t)) ==
          "f: byte 9: tensor \"" + std::string(80, 'x') + "...\" has no dtype");
    CHECK(fault(file("{\"\\u001b[31m\x7f\"" + t)) == "f: byte 9: tensor \"?[31m?\" has no dtype");
  }

  TEST_CASE("every file of the fuzz corpus is read or refused as its name says") {
    std::size_t files = 0;
    for (const auto& entry : std::filesystem::directory_iterator(MOE_FUZZ_CORPUS_DIR "/safetensors")) {
      CAPTURE(entry.path().filename().string());
      std::ifstream in(entry.path(), std::ios::binary);
      const std::string content((std::istreambuf_iterator<char>(in)), {});
      CHECK(testing::try_safetensors(as_bytes(content)) == entry.path().filename().string().starts_with("valid_"));
      ++files;
    }
    CHECK(files >= 24);
  }
}
