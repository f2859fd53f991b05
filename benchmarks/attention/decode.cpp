// SPDX-License-Identifier: Apache-2.0
#include "moe/attention/decode.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "attention/gate.hpp"
#include "moe/attention/select_blocks.hpp"
#include "moe/backend/cpu.hpp"
#include "moe/backend/cpu/decode_levels.hpp"

namespace bench {
namespace {

using moe::idx;
using backend = moe::cpu<>;

/// As many equal caches as it takes that what decoding goes round lies in others than one.
template <class T>
class filled_caches {
 public:
  filled_caches(const attention_case& c, const attention_source& source)
      : sizes{{c.shape.h, c.shape.h_kv, c.shape.d, c.shape.d}, 1, c.shape.n, c.form.block} {
    const auto count = 1 + static_cast<std::size_t>(std::ceil(c.rotate / c.cache_bytes()));
    moe::arena bytes;
    (void)moe::kv_cache<T>::make(sizes, bytes);
    for (std::size_t i = 0; i < count; ++i) {
      memory_.emplace_back(bytes.used());
      moe::arena mem(memory_.back().bytes());
      caches_.push_back(moe::kv_cache<T>::make(sizes, mem));
    }
    moe::arena none;
    caches_[0].append_to(moe::call<backend>{backend{}, none, {}}, 0, matrix_view<const float>(source.k),
                         matrix_view<const float>(source.v));
    for (std::size_t i = 1; i < count; ++i)
      std::memcpy(memory_[i].bytes().data(), memory_[0].bytes().data(), memory_[0].size());
  }
  const moe::kv_cache<T>& operator[](std::size_t i) const { return caches_[i % caches_.size()]; }

  const moe::kv_cache_shape sizes;

 private:
  std::vector<moe::buffer> memory_;
  std::vector<moe::kv_cache<T>> caches_;
};

/// What a query reads: all keys; blocks that it chooses; the same, chosen before.
enum class reading { all, chosen, known };

/// One query a call, each on another of the caches.
template <class T>
class decoding final : public attention_contestant {
 public:
  decoding(const char* name, reading what, attention_gate gate, const attention_case& c,
           std::shared_ptr<const filled_caches<T>> caches, std::shared_ptr<const attention_source> source)
      : attention_contestant(name),
        what_(what),
        gate_(gate),
        as_asked_(gate == c.form.gate && (what != reading::all) == c.blocks()),
        k_(what == reading::all ? 0 : c.form.k),
        caches_(std::move(caches)),
        source_(std::move(source)),
        o_(static_cast<std::size_t>(c.shape.h * c.shape.d)),
        blocks_(static_cast<std::size_t>(c.shape.h * k_)) {}

  void prepare(int) override {
    const moe::kv_cache_shape& sizes = caches_->sizes;
    moe::arena choose, read;
    moe::make_select_blocks_scratch(sizes, choose);
    moe::make_decode_scratch(sizes, k_, read);
    work_ = moe::buffer(std::max(moe::padded(choose), moe::padded(read)));
    mem_ = moe::arena(work_.bytes());
    if (what_ == reading::known) choose_blocks(0);
  }
  bool run(matrix_view<float> o) override {
    call(0);
    std::copy(o_.begin(), o_.end(), o.data);
    return as_asked_;
  }

 private:
  moe::call<backend> on() { return {backend_, mem_, {}}; }
  matrix_view<const float> query() const { return matrix_view<const float>(source_->q).slice(0, 1); }
  matrix_view<idx> blocks() {
    return k_ > 0 ? matrix_view<idx>(blocks_.data(), static_cast<dim>(blocks_.size()) / k_, k_) : matrix_view<idx>();
  }
  void choose_blocks(std::size_t i) { select_blocks(on(), (*caches_)[i], query(), blocks()); }
  void call(std::size_t i) override {
    if (what_ == reading::chosen) choose_blocks(i);
    const moe::decode_options options{.blocks = blocks()};
    const matrix_view<float> o(o_.data(), 1, static_cast<dim>(o_.size()));
    decode(on(), (*caches_)[i], query(), o, {}, options);
    with_gate(gate_, [&](const auto& gate) {
      const dim h = caches_->sizes.heads.heads;
      gate.forward(on(), moe::split_heads(matrix_view<const float>(source_->logits), h), h, moe::split_heads(o, h),
                   moe::split_heads(o, h));
    });
  }

  reading what_;
  attention_gate gate_;
  bool as_asked_;
  dim k_;
  std::shared_ptr<const filled_caches<T>> caches_;
  std::shared_ptr<const attention_source> source_;
  backend backend_;
  moe::buffer work_;
  moe::arena mem_;
  std::vector<float> o_;
  std::vector<idx> blocks_;
};

using contestants = std::vector<std::unique_ptr<attention_contestant>>;

template <class T>
contestants forms_of(const attention_case& c, const std::shared_ptr<const attention_source>& source) {
  contestants all;
  const auto caches = std::make_shared<const filled_caches<T>>(c, *source);
  const auto add = [&](const char* name, reading what, attention_gate gate) {
    all.push_back(std::make_unique<decoding<T>>(name, what, gate, c, caches, source));
  };
  const reading asked = c.blocks() ? reading::chosen : reading::all;
  add("moe", asked, c.form.gate);
  if (c.gated()) add("ungated", asked, attention_gate::none);
  if (c.blocks()) add("routed", reading::known, c.form.gate);
  if (c.blocks()) add("dense", reading::all, c.form.gate);
  return all;
}

}  // namespace

contestants library_decode(const attention_case& c, std::shared_ptr<const attention_source> source) {
  if (c.type.name == "f32") return forms_of<float>(c, source);
  if (c.type.name == "bf16") return forms_of<moe::bf16>(c, source);
  if (c.type.name == "f16") return forms_of<moe::f16>(c, source);
  return forms_of<std::int8_t>(c, source);
}

}  // namespace bench
