// SPDX-License-Identifier: Apache-2.0
/// Mixed precision: a layer computes with weights of bf16, and float32 masters of them are what an optimizer changes.
/// Masters, gradients and moments are float32 buffers of one layout, the one of `make_gradients`; what the layer reads is
/// rounded from the masters, to nearest even, while they are written:
///
///   moe::buffer masters(net.gradient_bytes()), gradients(net.gradient_bytes()), weights(net.weight_bytes());
///   moe::initialise(executor, masters.bytes(), net.gradient_catalogue(), moe::rng(seed));
///   const moe::weight_copy copy(net.gradient_catalogue(), net.catalogue(), weights.bytes());
///   copy.write(masters.as<float>());  // once, at the start
///   optimizer.step(executor, update, masters.as<float>(), gradients.as<float>(), moments, copy);
///
/// Micikevicius et al. 2018, arXiv:1710.03740, section 3.1; with bf16 no loss needs scaling: Kalamkar et al. 2019,
/// arXiv:1905.12322.
#pragma once

#include <cstring>
#include <span>
#include <string>
#include <vector>

#include "moe/core/arena.hpp"
#include "moe/core/error.hpp"

namespace moe {

/// The weights that a layer reads, as a copy of float32 masters: floats as they are, bf16 and f16 rounded to nearest even.
/// One that was not given a catalogue copies nothing.
class weight_copy {
 public:
  weight_copy() = default;
  /// `masters` and `weights` are the layer's gradient_catalogue and catalogue, `memory` holds the weights. Throws shape_error
  /// where the two do not list the same tensors, for tensors that reach beyond the memory and for element types that are no
  /// floating-point numbers.
  weight_copy(std::span<const slot> masters, std::span<const slot> weights, std::span<std::byte> memory) {
    expect(static_cast<dim>(masters.size()), static_cast<dim>(weights.size()), "weight_copy: masters", "tensors",
           "the weights");
    for (std::size_t i = 0; i < weights.size(); ++i) {
      expect_pair(masters[i], weights[i], memory.size());
      const std::size_t first = masters[i].offset / sizeof(float), n = masters[i].bytes / sizeof(float);
      parts_.push_back({first, first + n, memory.data() + weights[i].offset, weights[i].type});
    }
  }

  /// Masters that there are at least; what lies between their tensors is not copied.
  std::size_t masters() const noexcept { return parts_.empty() ? 0 : parts_.back().last; }

  /// Copies the masters first .. last of all of them.
  void write(std::span<const float> masters, std::size_t first, std::size_t last) const noexcept {
    for (const part& p : parts_) {
      const std::size_t from = first > p.first ? first : p.first, to = last < p.last ? last : p.last;
      if (from >= to) continue;
      const float* const v = masters.data() + from;
      const std::size_t at = from - p.first, n = to - from;
      if (p.type == element::f32) std::memcpy(reinterpret_cast<float*>(p.data) + at, v, n * sizeof(float));
      else if (p.type == element::bf16) round(v, reinterpret_cast<bf16*>(p.data) + at, n);
      else round(v, reinterpret_cast<f16*>(p.data) + at, n);
    }
  }
  /// Copies all of them. Throws shape_error where there are fewer than masters().
  void write(std::span<const float> masters) const {
    check(masters.size(), "weight_copy");
    write(masters, 0, masters.size());
  }
  /// Throws shape_error, which names `what`, where n masters are too few.
  void check(std::size_t n, const char* what) const {
    if (n < masters())
      throw shape_error(std::string(what) + ": there are " + std::to_string(n) + " masters, expected at least " +
                        std::to_string(masters()) + " (the catalogue)");
  }

 private:
  struct part {
    std::size_t first, last;  ///< masters
    std::byte* data;
    element type;
  };
  template <class T>
  static void round(const float* from, T* to, std::size_t n) noexcept {
    for (std::size_t i = 0; i < n; ++i) to[i] = T(from[i]);
  }
  static void expect_pair(const slot& master, const slot& s, std::size_t memory) {
    if (master.name != s.name || master.rows != s.rows || master.cols != s.cols || master.type != element::f32)
      throw shape_error("weight_copy: master " + master.name + " is " + name(master.type) + ' ' + std::to_string(master.rows) +
                        " x " + std::to_string(master.cols) + ", expected f32 " + std::to_string(s.rows) + " x " +
                        std::to_string(s.cols) + " (weight " + s.name + ')');
    if (s.type != element::f32 && s.type != element::bf16 && s.type != element::f16)
      throw shape_error("weight_copy: " + s.name + " is " + name(s.type) + ", expected f32, bf16 or f16");
    if (s.offset > memory || s.bytes > memory - s.offset)
      throw shape_error("weight_copy: " + s.name + " ends at byte " + std::to_string(s.offset + s.bytes) +
                        ", expected at most " + std::to_string(memory) + " (the memory)");
  }

  std::vector<part> parts_;
};

}  // namespace moe
