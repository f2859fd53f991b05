// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <type_traits>

#include "attention/gate.hpp"
#include "moe/backend/cpu.hpp"
#include "moe/backend/host_attention_backward.hpp"
#include "moe/backend/host_moba.hpp"

namespace bench {
namespace {

using moe::idx;
using backend = moe::cpu<>;

/// Blocks that were chosen before.
struct known_blocks : moe::key_blocks {
  void choose(const moe::attention_kernels&, const moe::attention_problem& p, const moe::detail::attention_tile& t,
              moe::detail::attention_slot& s, slot& b) const noexcept {
    recall(p, t, s, b);
  }
};

/// Queries, keys, values and logits of one type, and memory for a call.
template <class T>
class tensors {
 public:
  explicit tensors(const attention_case& c, const attention_source& from)
      : of(c), problem{{c.shape.h, c.shape.h_kv, c.shape.d, c.shape.d}}, o(size(c.shape.m * c.shape.h * c.shape.d)) {
    take(from.q, q_);
    take(from.k, k_);
    take(from.v, v_);
    take(from.logits, s_);
  }
  auto q() const { return heads(q_, of.shape.m, of.shape.h); }
  auto k() const { return heads(k_, of.shape.n, of.shape.h_kv); }
  auto v() const { return heads(v_, of.shape.n, of.shape.h_kv); }
  auto logits() const { return heads(s_, of.shape.m, of.shape.h); }
  moe::attention_sizes sizes() const { return {of.shape.m, of.shape.n}; }
  static std::size_t size(dim n) { return static_cast<std::size_t>(n); }

  attention_case of;
  moe::attention_problem problem;
  std::vector<float> o;

 private:
  static void take(matrix_view<const float> from, std::vector<T>& to) {
    to.resize(size(from.rows * from.cols));
    std::transform(from.data, from.data + from.rows * from.cols, to.begin(), [](float x) { return T(x); });
  }
  static moe::matrix_stack<const T> heads(const std::vector<T>& v, dim rows, dim n) {
    return moe::split_heads(matrix_view<const T>(v.data(), rows, static_cast<dim>(v.size()) / rows), n);
  }
  std::vector<T> q_, k_, v_, s_;
};

/// A call's scratch, as large as `count(arena)` says.
class scratch {
 public:
  template <class Count>
  void make(Count count) {
    moe::arena mem;
    count(mem);
    memory_ = moe::buffer(moe::padded(mem));
    mem_ = moe::arena(memory_.bytes());
  }
  moe::call<backend> call() { return {backend_, mem_, {}}; }
  const backend& on() const { return backend_; }

 private:
  backend backend_;
  moe::buffer memory_;
  moe::arena mem_;
};

/// Selections, prepared: what `make` gives, and what a call does first.
template <class T>
struct all_keys {
  static constexpr bool blocks = false;
  moe::every_key selection;
  void make(const tensors<T>&) {}
  void prepare(const moe::call<backend>&, const tensors<T>&) const {}
};
template <class T, class Blocks>
struct some_blocks {
  static constexpr bool blocks = true;
  Blocks selection;
  moe::buffer memory;

  void make(const tensors<T>& x) {
    const auto carve = [&](moe::arena& mem) {
      return carve_key_blocks(x.problem.heads, 1, x.of.shape.n, x.of.form.block, x.of.form.k, mem);
    };
    moe::arena count;
    (void)carve(count);
    memory = moe::buffer(moe::padded(count));
    moe::arena mem(memory.bytes());
    static_cast<moe::key_blocks&>(selection) = carve(mem);
  }
  void prepare(const moe::call<backend>& on, const tensors<T>& x) const {
    if constexpr (std::same_as<Blocks, moe::key_blocks>) prepare_key_blocks(on, x.problem, x.k(), selection);
  }
};

/// Forward. A gate acts in the epilogue, with logits of the type of the queries.
template <class T, class Selected>
class forward final : public attention_contestant {
 public:
  forward(const char* name, attention_gate gate, const attention_case& c, std::shared_ptr<const attention_source> source)
      : attention_contestant(name), gate_(gate), x_(std::make_unique<tensors<T>>(c, *source)) {}
  void prepare(int) override {
    selected_.make(*x_);
    scratch_.make([&](moe::arena& mem) {
      count_attend(scratch_.on(), x_->problem, x_->sizes(), selected_.selection, mem);
      if constexpr (Selected::blocks)
        (void)count_prepare_key_blocks(scratch_.on(), x_->problem.heads, mem);
    });
    if constexpr (std::same_as<Selected, some_blocks<T, known_blocks>>) choose();
  }
  bool run(matrix_view<float> o) override {
    call(0);
    std::copy(x_->o.begin(), x_->o.end(), o.data);
    return gate_ == x_->of.form.gate && Selected::blocks == x_->of.blocks();
  }

 private:
  void call(std::size_t) override {
    const auto on = scratch_.call();
    selected_.prepare(on, *x_);
    attend(on, x_->problem, x_->q(), x_->k(), x_->v(), selected_.selection, [this](dim t, dim a, float* o, float) noexcept {
      const dim h = x_->of.shape.h, d = x_->of.shape.d;
      with_gate(gate_, [&](const auto& gate) { gate.apply(backend::arch{}, x_->logits()[a].row(t), o, d); });
      std::copy_n(o, d, x_->o.data() + (t * h + a) * d);
    });
  }
  void choose() {
    const dim earlier = x_->of.form.k - 1, queries = x_->of.shape.m * x_->of.shape.h;
    chosen_.resize(tensors<T>::size(queries * earlier));
    selected_.selection.chosen = {chosen_.data(), queries, earlier};
    const auto on = scratch_.call();
    const moe::key_blocks& blocks = selected_.selection;
    prepare_key_blocks(on, x_->problem, x_->k(), blocks);
    attend(on, x_->problem, x_->q(), x_->k(), x_->v(), blocks, [](dim, dim, float*, float) noexcept {});
  }

  attention_gate gate_;
  std::unique_ptr<tensors<T>> x_;
  Selected selected_{};
  scratch scratch_;
  std::vector<idx> chosen_;
};

/// Backward, from what a forward kept: through the gate, then through attention.
template <class T, class Selected>
class backward final : public attention_contestant {
 public:
  backward(const char* name, attention_gate gate, const attention_case& c, std::shared_ptr<const attention_source> source)
      : attention_contestant(name), gate_(gate), x_(std::make_unique<tensors<T>>(c, *source)), source_(std::move(source)) {}

  void prepare(int) override {
    const attention_shape& s = x_->of.shape;
    const auto sized = [](std::vector<float>& v, dim n) { v.resize(tensors<T>::size(n)); };
    sized(lse_, s.m * s.h);
    sized(delta_, s.m * s.h);
    sized(dq_, s.m * s.h * s.d);
    sized(dk_, s.n * s.h_kv * s.d);
    sized(dv_, s.n * s.h_kv * s.d);
    if (gate_ != attention_gate::none) {
      sized(dy_, s.m * s.h * s.d);
      sized(dlogits_, s.m * x_->of.gate_columns());
    }
    selected_.make(*x_);
    if constexpr (Selected::blocks) {
      const dim earlier = x_->of.form.k - 1;
      chosen_.resize(tensors<T>::size(s.m * s.h * earlier));
      selected_.selection.chosen = {chosen_.data(), s.m * s.h, earlier};
    }
    scratch_.make([&](moe::arena& mem) {
      count_attend(scratch_.on(), x_->problem, x_->sizes(), selected_.selection, mem);
      count_attend_backward(scratch_.on(), x_->problem, x_->sizes(), selected_.selection, mem);
    });
    const auto on = scratch_.call();
    selected_.prepare(on, *x_);
    attend(on, x_->problem, x_->q(), x_->k(), x_->v(), selected_.selection, [&](dim t, dim a, float* o, float lse) noexcept {
      std::copy_n(o, s.d, x_->o.data() + (t * s.h + a) * s.d);
      lse_[tensors<T>::size(t * s.h + a)] = lse;
    });
  }
  /// Gives gradients, which it checks: the weights of a query sum up to one, so dv sums up to what the gradients of outputs do.
  bool run(matrix_view<float>) override {
    call(0);
    const attention_shape& s = x_->of.shape;
    double got = 0, wanted = 0, size = 0;
    for (dim t = 0; t < s.n; ++t) got += dv_[tensors<T>::size(t * s.h_kv * s.d)];
    for (dim t = 0; t < s.m; ++t)
      for (dim a = 0; a < s.h / s.h_kv; ++a) {
        const double dy = source_->q(t, a * s.d) * (gate_ == attention_gate::none ? 1 : source_->gate(x_->of, t, a, 0));
        wanted += dy;
        size += std::fabs(dy);
      }
    if (!(std::fabs(got - wanted) <= x_->of.type.tolerance * size)) throw std::runtime_error("moe: gradients of values do not add up");
    return false;
  }

 private:
  void call(std::size_t) override {
    const attention_shape& s = x_->of.shape;
    const auto on = scratch_.call();
    const auto rows = [&](std::vector<float>& v, dim n, dim heads) {
      return moe::split_heads(matrix_view<float>(v.data(), n, heads * s.d), heads);
    };
    auto dout = moe::split_heads(matrix_view<const float>(source_->q), s.h);
    with_gate(gate_, [&](const auto& gate) {
      const matrix_view<float> dlogits(dlogits_.data(), s.m, x_->of.gate_columns());
      gate.backward(on, x_->logits(), s.h, rows(x_->o, s.m, s.h), dout, rows(dy_, s.m, s.h), moe::split_heads(dlogits, s.h));
      dout = moe::split_heads(matrix_view<const float>(dy_.data(), s.m, s.h * s.d), s.h);
    });
    attention_delta(on, x_->problem.heads, dout, rows(x_->o, s.m, s.h), {delta_.data(), s.m, s.h},
                    rounds_gradients(on.backend, x_->q(), x_->k(), x_->v()));
    attend_backward(on, x_->problem, x_->q(), x_->k(), x_->v(), selected_.selection, dout, {lse_.data(), s.m, s.h},
                    {delta_.data(), s.m, s.h}, rows(dq_, s.m, s.h), rows(dk_, s.n, s.h_kv), rows(dv_, s.n, s.h_kv));
  }

  attention_gate gate_;
  std::unique_ptr<tensors<T>> x_;
  std::shared_ptr<const attention_source> source_;
  Selected selected_{};
  scratch scratch_;
  std::vector<float> lse_, delta_, dq_, dk_, dv_, dy_, dlogits_;
  std::vector<idx> chosen_;
};

using contestants = std::vector<std::unique_ptr<attention_contestant>>;

template <class T>
contestants forms_of(const attention_case& c, const std::shared_ptr<const attention_source>& source) {
  contestants all;
  const auto add = [&]<class Form>(const char* name, attention_gate gate, std::type_identity<Form>) {
    all.push_back(std::make_unique<Form>(name, gate, c, source));
  };
  using dense = all_keys<T>;
  using moba = some_blocks<T, moe::key_blocks>;
  const attention_gate gate = c.form.gate;
  const auto add_asked = [&]<class Selected>(std::type_identity<Selected>) {
    const std::type_identity<forward<T, Selected>> forwards;
    const std::type_identity<backward<T, Selected>> backwards;
    const auto add_either = [&](const char* name, attention_gate g) {
      if (c.form.backward) add(name, g, backwards);
      else add(name, g, forwards);
    };
    add_either("moe", gate);
    if (c.gated()) add_either("ungated", attention_gate::none);
    if (c.form.backward) add("forward", gate, forwards);
  };
  if (!c.blocks()) {
    add_asked(std::type_identity<dense>{});
    return all;
  }
  add_asked(std::type_identity<moba>{});
  if (c.form.backward) {
    add("dense", gate, std::type_identity<backward<T, dense>>{});
  } else {
    add("routed", gate, std::type_identity<forward<T, some_blocks<T, known_blocks>>>{});
    add("dense", gate, std::type_identity<forward<T, dense>>{});
  }
  return all;
}

}  // namespace

contestants library_attention(const attention_case& c, std::shared_ptr<const attention_source> source) {
  if (c.type.name == "f32") return forms_of<float>(c, source);
  if (c.type.name == "bf16") return forms_of<moe::bf16>(c, source);
  return forms_of<moe::f16>(c, source);
}

}  // namespace bench
