// SPDX-License-Identifier: Apache-2.0
/// Plans in files: routing that one run records and another replays.
#pragma once

#include <cstring>

#include "moe/core/recorded_plan.hpp"
#include "moe/io/checkpoint.hpp"
#include "moe/io/safetensors_writer.hpp"

namespace moe {

/// Writes plans, one per layer of a model, as tensors of one safetensors file: for plan i of the span
/// "i.offsets" I32[E+1], "i.token" I32[A], "i.weight" F32[A], "i.token_offsets" I32[T+1], "i.position" I32[choices].
/// Throws shape_error for a broken plan and format_error where the file cannot be written.
inline void save_plans(const std::string& path, std::span<const routing_plan> plans) {
  tensor_map tensors;
  for (std::size_t i = 0; i < plans.size(); ++i) {
    const routing_plan& p = plans[i];
    check(p);
    const auto put = [&](const char* name, auto array, dim n) {
      tensors[std::to_string(i) + name] = as_tensor(matrix_view{array.data(), 1, n});
    };
    put(".offsets", p.offsets, p.experts() + 1);
    put(".token", p.token, p.rows());
    put(".weight", p.weight, p.rows());
    put(".token_offsets", p.token_offsets, p.tokens() + 1);
    put(".position", p.position, p.token_offsets.back());
  }
  save_tensors(path, tensors);
}
/// The same for one plan, numbered 0.
inline void save_plan(const std::string& path, const routing_plan& plan) { save_plans(path, {&plan, 1}); }

namespace detail {

/// The bytes of a vector of T; format_error where the tensor is anything else.
template <class T>
std::span<const std::byte> plan_array(const checkpoint& from, const std::string& name) {
  const tensor_view& t = from.tensor(name);
  if (t.dtype != safetensors_dtype(dtype<T>::id) || t.shape.size() != 1)
    from.fail(name, "is " + std::string(t.dtype) + ' ' + shape_text(t.shape) + ", expected " +
                        std::string(safetensors_dtype(dtype<T>::id)) + " [n]");
  return t.bytes;
}

inline recorded_plan read_plan(const checkpoint& from, const std::string& number) {
  const auto offsets = plan_array<idx>(from, number + ".offsets"), token = plan_array<idx>(from, number + ".token"),
             weight = plan_array<float>(from, number + ".weight"),
             token_offsets = plan_array<idx>(from, number + ".token_offsets"),
             position = plan_array<idx>(from, number + ".position");
  const auto length = [](std::span<const std::byte> a) { return static_cast<dim>(a.size() / sizeof(idx)); };
  const auto fail = [&](const std::string& what) { from.fail("holds a broken plan " + number + ": " + what); };
  if (length(weight) != length(token))
    fail("weight has " + std::to_string(length(weight)) + " elements, expected " + std::to_string(length(token)) + " (A)");

  recorded_plan out(length(offsets) - 1, length(token_offsets) - 1, length(token), length(position));
  const routing_plan& p = out.plan();
  const auto fill = [](std::span<const std::byte> bytes, auto array) {
    if (!bytes.empty()) std::memcpy(array.data(), bytes.data(), bytes.size());
  };
  fill(offsets, p.offsets);
  fill(token, p.token);
  fill(weight, p.weight);
  fill(token_offsets, p.token_offsets);
  fill(position, p.position);
  if (const char* broken = fault(p)) fail(broken);
  if (p.rows() != length(token)) fail("offsets end before the rows");
  if (p.token_offsets.back() != length(position)) fail("token_offsets end before the assignments");
  return out;
}

}  // namespace detail

/// Reads the plans of a file in their order. The file is not trusted: what is not a plan in every respect (`check`) is a
/// format_error.
inline std::vector<recorded_plan> load_plans(const std::string& path) {
  constexpr std::size_t arrays = 5;
  const checkpoint from(path);
  const std::size_t count = from.tensors().size() / arrays;
  if (from.tensors().size() % arrays != 0)
    from.fail("has " + std::to_string(from.tensors().size()) + " tensors, expected " + std::to_string(arrays) +
              " for each plan");
  std::vector<recorded_plan> plans;
  for (std::size_t i = 0; i < count; ++i) plans.push_back(detail::read_plan(from, std::to_string(i)));
  return plans;
}
/// Reads a file of one plan.
inline recorded_plan load_plan(const std::string& path) {
  std::vector<recorded_plan> plans = load_plans(path);
  if (plans.size() != 1) throw format_error(path + " has " + std::to_string(plans.size()) + " plans, expected 1");
  return std::move(plans.front());
}

}  // namespace moe
