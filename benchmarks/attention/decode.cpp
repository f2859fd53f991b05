// SPDX-License-Identifier: Apache-2.0
#include "moe/attention/decode.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "attention/attention.hpp"
#include "moe/backend/cpu.hpp"
#include "moe/backend/cpu/decode_levels.hpp"

namespace bench {
namespace {

using backend = moe::cpu<>;

/// One query a call, each on another of as many equal caches as fill what decoding goes round.
template <class T>
class decoding final : public attention_contestant {
 public:
  decoding(const attention_case& c, std::shared_ptr<const attention_source> source)
      : attention_contestant("moe"), source_(std::move(source)), sizes_{{c.shape.h, c.shape.h_kv, c.shape.d, c.shape.d}, 1, c.shape.n} {
    const auto count = static_cast<std::size_t>(std::max(1., std::ceil(c.rotate / c.cache_bytes())));
    moe::arena bytes;
    (void)moe::kv_cache<T>::make(sizes_, bytes);
    for (std::size_t i = 0; i < count; ++i) {
      memory_.emplace_back(bytes.used());
      moe::arena mem(memory_.back().bytes());
      caches_.push_back(moe::kv_cache<T>::make(sizes_, mem));
    }
    moe::arena none;
    caches_[0].append_to(moe::call<backend>{backend_, none, {}}, 0, matrix_view<const float>(source_->k), matrix_view<const float>(source_->v));
    for (std::size_t i = 1; i < count; ++i) std::memcpy(memory_[i].bytes().data(), memory_[0].bytes().data(), memory_[0].size());
    o_.resize(static_cast<std::size_t>(c.shape.h * c.shape.d));
  }
  void prepare(int) override {
    moe::arena count;
    moe::make_decode_scratch(sizes_, 0, count);
    work_ = moe::buffer(moe::padded(count));
    mem_ = moe::arena(work_.bytes());
  }
  bool run(matrix_view<float> o) override {
    call(0);
    std::copy(o_.begin(), o_.end(), o.data);
    return true;
  }

 private:
  void call(std::size_t i) override {
    decode(moe::call<backend>{backend_, mem_, {}}, caches_[i % caches_.size()], matrix_view<const float>(source_->q).slice(0, 1),
           matrix_view<float>(o_.data(), 1, static_cast<dim>(o_.size())));
  }

  std::shared_ptr<const attention_source> source_;
  moe::kv_cache_shape sizes_;
  backend backend_;
  std::vector<moe::buffer> memory_;
  std::vector<moe::kv_cache<T>> caches_;
  moe::buffer work_;
  moe::arena mem_;
  std::vector<float> o_;
};

}  // namespace

std::vector<std::unique_ptr<attention_contestant>> library_decode(const attention_case& c,
                                                                  std::shared_ptr<const attention_source> source) {
  std::vector<std::unique_ptr<attention_contestant>> all;
  if (c.type.name == "f32") all.push_back(std::make_unique<decoding<float>>(c, std::move(source)));
  else if (c.type.name == "bf16") all.push_back(std::make_unique<decoding<moe::bf16>>(c, std::move(source)));
  else if (c.type.name == "f16") all.push_back(std::make_unique<decoding<moe::f16>>(c, std::move(source)));
  else all.push_back(std::make_unique<decoding<std::int8_t>>(c, std::move(source)));
  return all;
}

}  // namespace bench
