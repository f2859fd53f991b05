// SPDX-License-Identifier: Apache-2.0
#include <doctest/doctest.h>

#include <cmath>
#include <sstream>

#include "moe/attention/self_attention.hpp"
#include "moe/io/safetensors.hpp"
#include "moe/moe.hpp"
#include "support/self_attention_reference.hpp"

namespace {

using moe::dim;

/// As the gated models of arXiv:2505.06708 are published: logits of each head behind the queries of its group.
template <class Granularity>
struct gated : moe::attention_features {
  using rotary = moe::rotary<>;
  using output_gate = moe::output_gate<Granularity>;
  template <class Gate>
  using projection = moe::grouped_projection<Gate>;
  static constexpr bool normalises_heads = true;
};

constexpr dim d = 8, h = 4, h_kv = 2, group = h / h_kv, width = 4, T = 5;
const std::string prefix = "model.layers.3.self_attn.";

/// Tensors of a file, no two alike; `own` logits of a head.
class published {
 public:
  explicit published(dim own) : own_(own) {
    add("q_proj", {h * (width + own), d});
    add("k_proj", {h_kv * width, d});
    add("v_proj", {h_kv * width, d});
    add("o_proj", {d, h * width});
    add("q_norm", {width});
    add("k_norm", {width});
  }
  std::string file() {
    moe::tensor_map map;
    for (tensor& t : tensors_)
      map.emplace(t.name, moe::tensor_view{"F32", t.shape, std::as_writable_bytes(std::span<float>(t.values))});
    std::ostringstream out;
    moe::write_safetensors(out, map, {}, "memory");
    return out.str();
  }
  /// What the published code computes of x[T,d]; `naive` takes all queries to come first, then all logits.
  reference::numbers output(const std::vector<float>& x, bool naive) const {
    constexpr std::size_t G = group, n = width;
    const auto own = static_cast<std::size_t>(own_);
    const auto row = [this](std::size_t which, std::size_t r) {
      return reference::self_attention::row{tensors_[which].values.data() + r * d};
    };
    const auto query = [=](std::size_t a, std::size_t j) {
      return row(0, naive ? a * n + j : a / G * G * (n + own) + a % G * n + j);
    };
    const auto logit = [=](std::size_t a, std::size_t j) {
      return row(0, naive ? h * n + a * own + j : a / G * G * (n + own) + G * n + a % G * own + j);
    };
    reference::self_attention r{};
    r.d = d, r.h = h, r.h_kv = h_kv, r.width = r.dv = n, r.starts = {0, T};
    r.query = query;
    r.key = [=](std::size_t g, std::size_t j) { return row(1, g * n + j); };
    r.value = [=](std::size_t g, std::size_t j) { return row(2, g * n + j); };
    r.output = tensors_[3].values.data();
    r.norm = [this](reference::numbers v, bool of_query) {
      return reference::normalised(v, tensors_[of_query ? 4 : 5].values.data());
    };
    r.turn = [](const reference::numbers& v, std::size_t p) { return reference::turned_half_split(v, p); };
    r.output_gate =
        reference::gated_by(logit, own == 1 ? reference::gates::head : reference::gates::channel, h, d, reference::sigmoid);
    r.visible = reference::all_until;
    return r.run(x.data());
  }

 private:
  struct tensor {
    std::string name;
    std::vector<dim> shape;
    std::vector<float> values;
  };
  void add(const char* name, std::vector<dim> shape) {
    dim n = 1;
    for (const dim s : shape) n *= s;
    tensor t{prefix + name + ".weight", shape, {}};
    for (dim i = 0; i < n; ++i) t.values.push_back(moe::rng(9, tensors_.size()).normal(static_cast<std::uint64_t>(i)));
    tensors_.push_back(t);
  }
  dim own_;
  std::vector<tensor> tensors_;
};

double distance(const std::vector<float>& y, const reference::numbers& wanted) {
  double worst = 0;
  for (std::size_t i = 0; i < y.size(); ++i) worst = std::max(worst, std::fabs(double{y[i]} - wanted[i]));
  return worst;
}

}  // namespace

TEST_SUITE("attention/checkpoint") {
  TEST_CASE_TEMPLATE(
      "tensors of a published checkpoint are read into the weights as they are, and give what its heads compute",
      Granularity, moe::elementwise, moe::headwise) {
    using layer = moe::self_attention<gated<Granularity>, moe::scalar<>>;
    published model(Granularity::head_cols(width));
    std::string bytes = model.file();
    const moe::checkpoint file({reinterpret_cast<std::byte*>(bytes.data()), bytes.size()}, "memory");

    const layer net(d, {.heads = h, .kv_heads = h_kv, .d = width, .dv = width});
    moe::buffer params(net.weight_bytes()), work(net.scratch_bytes(T)), angles(4096);
    moe::arena p(params.bytes()), mem(work.bytes()), a(angles.bytes());
    const typename layer::weights w = net.make_weights(p);
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
    CHECK(distance(y, model.output(x, false)) < 1e-4);  // results are about 5
    CHECK(distance(y, model.output(x, true)) > 1);
  }
}
