// SPDX-License-Identifier: Apache-2.0
#include <doctest/doctest.h>

#include <cmath>
#include <sstream>

#include "moe/attention/self_attention.hpp"
#include "moe/io/safetensors.hpp"
#include "moe/moe.hpp"

namespace {

using moe::dim;

/// As the gated models of arXiv:2505.06708 are published: logits of each head behind the queries of its group.
struct gated : moe::attention_features {
  using rotary = moe::rotary<>;
  using output_gate = moe::output_gate<moe::elementwise>;
  template <class Gate>
  using projection = moe::grouped_projection<Gate>;
  static constexpr bool normalises_heads = true;
};
using layer = moe::self_attention<gated, moe::scalar<>>;

constexpr dim d = 8, h = 4, h_kv = 2, width = 4, T = 5;

/// A tensor of the file, and its numbers.
struct tensor {
  std::string name;
  std::vector<dim> shape;
  std::vector<float> values;
};
std::vector<tensor> published() {
  const auto made = [](const char* name, std::vector<dim> shape) {
    tensor t{std::string("model.layers.3.self_attn.") + name + ".weight", shape, {}};
    dim n = 1;
    for (const dim s : shape) n *= s;
    for (dim i = 0; i < n; ++i) t.values.push_back(0.5f * moe::rng(9, t.name.size()).normal(static_cast<std::uint64_t>(i)));
    return t;
  };
  return {made("q_proj", {h * width * 2, d}), made("k_proj", {h_kv * width, d}), made("v_proj", {h_kv * width, d}),
          made("o_proj", {d, h * width}), made("q_norm", {width}), made("k_norm", {width})};
}

}  // namespace

TEST_SUITE("attention/checkpoint") {
  TEST_CASE("tensors of a published checkpoint are read into the weights as they are, and give what its heads compute") {
    std::vector<tensor> tensors = published();
    moe::tensor_map map;
    for (tensor& t : tensors)
      map.emplace(t.name, moe::tensor_view{"F32", t.shape, std::as_writable_bytes(std::span<float>(t.values))});
    std::ostringstream out;
    moe::write_safetensors(out, map, {}, "memory");
    std::string bytes = out.str();
    const moe::checkpoint file({reinterpret_cast<std::byte*>(bytes.data()), bytes.size()}, "memory");

    const layer net(d, {.heads = h, .kv_heads = h_kv, .d = width, .dv = width});
    moe::buffer params(net.weight_bytes()), work(net.scratch_bytes(T)), angles(4096);
    moe::arena p(params.bytes()), mem(work.bytes()), a(angles.bytes());
    const layer::weights w = net.make_weights(p);
    const std::string prefix = "model.layers.3.self_attn.";
    const auto row = [](std::span<float> s) { return moe::matrix_view<float>(s.data(), 1, static_cast<dim>(s.size())); };
    file.read_into(w.q, prefix + "q_proj.weight");
    file.read_into(w.k, prefix + "k_proj.weight");
    file.read_into(w.v, prefix + "v_proj.weight");
    file.read_into(w.o, prefix + "o_proj.weight");
    file.read_into(row(w.q_norm.weight), prefix + "q_norm.weight");
    file.read_into(row(w.k_norm.weight), prefix + "k_norm.weight");

    std::vector<float> x(T * d), y(T * d);
    for (std::size_t i = 0; i < x.size(); ++i) x[i] = moe::rng(4).normal(i);
    net.forward(w, {{x.data(), T, d}, {}, net.make_table(T, a)}, {y.data(), T, d}, mem);

    // The first token sees itself alone: head a gives sigmoid(logits) times the value of its group, whatever its query.
    const auto times = [&](const std::vector<float>& m, dim r) {
      double sum = 0;
      for (dim j = 0; j < d; ++j) sum += double{m[static_cast<std::size_t>(r * d + j)]} * double{x[static_cast<std::size_t>(j)]};
      return sum;
    };
    std::vector<double> heads;
    for (dim head = 0; head < h; ++head)
      for (dim c = 0; c < width; ++c) {
        const dim group = head / 2, logit = group * 4 * width + 2 * width + head % 2 * width + c;
        heads.push_back(times(tensors[2].values, group * width + c) / (1 + std::exp(-times(tensors[0].values, logit))));
      }
    for (dim j = 0; j < d; ++j) {
      double wanted = 0;
      for (dim i = 0; i < h * width; ++i)
        wanted += double{tensors[3].values[static_cast<std::size_t>(j * h * width + i)]} * heads[static_cast<std::size_t>(i)];
      CHECK(y[static_cast<std::size_t>(j)] == doctest::Approx(wanted).epsilon(1e-5));
    }
  }
}
