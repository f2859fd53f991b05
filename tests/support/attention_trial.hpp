// SPDX-License-Identifier: Apache-2.0
/// The library's attention on random numbers, with no more memory than it says it takes.
#pragma once

#include <algorithm>
#include <cmath>

#include "moe/backend/host_attention_backward.hpp"
#include "moe/backend/host_moba.hpp"
#include "support/attention_reference.hpp"
#include "support/testing.hpp"

namespace testing {

using attention_floats = reference::attention_numbers<float>;

/// Rows of elements T as they lie, rounded from floats.
template <class T>
std::vector<T> rounded(const std::vector<float>& v) {
  std::vector<T> r;
  for (const float x : v) r.push_back(T(x));
  return r;
}

template <class T>
struct attention_trial {
  reference::attention_shape shape;
  moe::attention_mask mask;
  float scale = 0;
  std::vector<T> q, k, v;
  std::vector<float> dout;

  explicit attention_trial(reference::attention_shape s, moe::attention_mask seen = {}, std::uint64_t seed = 1)
      : shape(std::move(s)),
        mask(seen),
        q(rounded<T>(normals(shape.m * shape.h * shape.d, seed))),
        k(rounded<T>(normals(shape.n * shape.h_kv * shape.d, seed + 1))),
        v(rounded<T>(normals(shape.n * shape.h_kv * shape.dv, seed + 2))),
        dout(normals(shape.m * shape.h * shape.dv, seed + 3)) {}

  moe::attention_problem problem() const {
    return {{shape.h, shape.h_kv, shape.d, shape.dv}, mask, {shape.query_offsets, {}}, {shape.key_offsets, {}}, scale};
  }
  moe::attention_sizes sizes() const { return {shape.m, shape.n}; }
  moe::matrix_stack<const T> queries() const { return heads_of(q, shape.m, shape.h); }
  moe::matrix_stack<const T> keys() const { return heads_of(k, shape.n, shape.h_kv); }
  moe::matrix_stack<const T> values() const { return heads_of(v, shape.n, shape.h_kv); }

  /// Forward and backward over all keys that the mask shows; over blocks of keys, with the earlier ones that were chosen.
  template <class B>
  attention_floats dense(const B& backend) const {
    return run(backend, moe::every_key{}, [](moe::arena&) {}, [](const auto&) {});
  }
  template <class B>
  attention_floats blocks(const B& backend, dim block, dim k_blocks, std::vector<idx>* chosen = nullptr) const {
    moe::arena count;
    (void)carve_key_blocks(problem().heads, problem().sequences(), shape.n, block, k_blocks, count);
    const moe::buffer memory(moe::padded(count));
    moe::arena mem(memory.bytes());
    moe::key_blocks selection = carve_key_blocks(problem().heads, problem().sequences(), shape.n, block, k_blocks, mem);
    std::vector<idx> own(static_cast<std::size_t>(shape.m * shape.h * (k_blocks - 1)) + 1, 77);
    selection.chosen = {own.data(), shape.m * shape.h, k_blocks - 1};
    const attention_floats r = run(
        backend, selection, [&](moe::arena& a) { (void)count_prepare_key_blocks(backend, problem().heads, a); },
        [&](const auto& on) { prepare_key_blocks(on, problem(), keys(), selection); });
    own.pop_back();
    if (chosen) *chosen = own;
    return r;
  }

  reference::attention_numbers<double> by_definition(const reference::attention_matrix& seen) const {
    return reference::attention(shape, scale != 0 ? scale : 1 / std::sqrt(static_cast<double>(shape.d)), seen, q, k, v, dout);
  }
  reference::attention_numbers<double> by_definition() const {
    return by_definition(reference::dense_matrix(shape, mask.causal, mask.window));
  }

 private:
  template <class X>
  static moe::matrix_stack<const X> heads_of(const std::vector<X>& rows, dim tokens, dim n) {
    return moe::split_heads(moe::matrix_view<const X>(rows.data(), tokens, tokens > 0 ? static_cast<dim>(rows.size()) / tokens : 0), n);
  }
  static moe::matrix_stack<float> heads_of(std::vector<float>& rows, dim tokens, dim n) {
    return moe::split_heads(moe::matrix_view<float>(rows.data(), tokens, tokens > 0 ? static_cast<dim>(rows.size()) / tokens : 0), n);
  }
  template <class B, class Selection, class Count, class Prepare>
  attention_floats run(const B& backend, const Selection& selection, Count count_prepare, Prepare prepare) const {
    const auto sized = [](dim n) { return std::vector<float>(static_cast<std::size_t>(n), 9); };  // is overwritten
    attention_floats r{sized(shape.m * shape.h * shape.dv), sized(shape.m * shape.h), sized(shape.m * shape.h * shape.d),
                       sized(shape.n * shape.h_kv * shape.d), sized(shape.n * shape.h_kv * shape.dv)};
    std::vector<float> delta = sized(shape.m * shape.h);
    const moe::matrix_view<float> delta_rows(delta.data(), shape.m, shape.h);
    const moe::attention_problem p = problem();
    p.check(sizes());
    const auto with_memory = [&](auto count_scratch, auto f) {
      moe::arena count;
      count_scratch(count);
      const moe::buffer memory(moe::padded(count));
      moe::arena mem(memory.bytes());
      f(moe::call<B>{backend, mem, {}});
    };
    with_memory(count_prepare, prepare);
    with_memory([&](moe::arena& mem) { count_attend(backend, p, sizes(), selection, mem); },
                [&](const moe::call<B>& on) {
                  attend(on, p, queries(), keys(), values(), selection, [&](dim t, dim a, const float* o, float lse) {
                    std::copy_n(o, shape.dv, r.o.begin() + (t * shape.h + a) * shape.dv);
                    r.lse[static_cast<std::size_t>(t * shape.h + a)] = lse;
                  });
                });
    with_memory([&](moe::arena& mem) { count_attend_backward(backend, p, sizes(), selection, mem); },
                [&](const moe::call<B>& on) {
                  const auto out = heads_of(dout, shape.m, shape.h);
                  attention_delta(on, p.heads, out, heads_of(std::as_const(r.o), shape.m, shape.h), delta_rows,
                                  rounds_gradients(backend, queries(), keys(), values()));
                  attend_backward(on, p, queries(), keys(), values(), selection, out, {r.lse.data(), shape.m, shape.h},
                                  delta_rows, heads_of(r.dq, shape.m, shape.h), heads_of(r.dk, shape.n, shape.h_kv),
                                  heads_of(r.dv, shape.n, shape.h_kv));
                });
    return r;
  }
};

}  // namespace testing
