// SPDX-License-Identifier: Apache-2.0
// Prints a number for the bits of every kind of kernel at the level in use, and which level that is. Compiled for some
// processor and for any (MOE_CPU_LEVEL), it prints the same (same_bits.cmake).
#include <algorithm>
#include <cstdio>

#include "moe/attention/decode.hpp"
#include "moe/backend/cpu.hpp"
#include "moe/expert/activation.hpp"
#include "support/attention_trial.hpp"
#include "support/testing.hpp"

namespace {

using moe::bf16, moe::dim, moe::f16, moe::gathered, moe::matrix_view;
using testing::normals;
using backend = moe::cpu<moe::arch::native, moe::serial>;

// `cpu<>` computes products at the level of its flags. Compiled for any processor, what it has to equal is the level in use.
#if defined(__AVX2__)
using products = moe::arch::native;
#else
using products = moe::arch::dynamic;
#endif

void print(const char* what, const std::vector<float>& v) {
  std::uint64_t hash = 14695981039346656037u;  // FNV-1a
  for (const float x : v) hash = (hash ^ std::bit_cast<std::uint32_t>(x)) * 1099511628211u;
  std::printf("%s %016llx\n", what, static_cast<unsigned long long>(hash));
}

constexpr dim m = 14, n = 67, k = 301;  // beyond the blocks of every level, with tails
template <class W>
struct operands {
  std::vector<float> x = normals(n * k, 1), c = normals(m * n, 2);
  std::vector<W> w;
  operands() {
    for (const float v : normals(n * k, 3)) w.push_back(W(v));
  }
  gathered<float> rows() const { return {{x.data(), m, k}}; }
  matrix_view<const W> along(dim r, dim cols) const { return {w.data(), r, cols}; }
  matrix_view<float> to() { return {c.data(), m, n}; }
};

void float_products() {
  operands<float> o;
  const gathered<float> turned{{o.x.data(), k, m}}, right{{o.w.data(), k, n}};
  gemm_nt(products{}, o.rows(), o.along(n, k), o.to());
  gemm_nt_packed(products{}, o.rows(), o.along(n, k), o.to());
  gemm_nn(products{}, o.rows(), o.along(k, n), o.to());
  gemm_tn(products{}, turned, right, k, o.to());
  axpy(products{}, 0.7f, o.x.data(), o.c.data(), m * n - 3);
  o.c.push_back(dot(products{}, o.x.data(), o.w.data(), n * k - 3));
  print("float32", o.c);
}

void elementwise_rules() {
  const std::vector<float> gate = normals(n, 4), up = normals(n, 5);
  std::vector<float> a(static_cast<std::size_t>(n));
  moe::activate(moe::arch::dynamic{}, moe::glu<moe::gelu>{}, gate.data(), up.data(), a.data(), n);
  print("rules", a);
}

void mixed_products() {
  operands<bf16> o;
  const moe::arch::mixed_kernels kernels = mixed_kernels_of(moe::arch::native{});
  const std::vector<float> b = normals(k * n, 6);
  kernels.gemm_nt(o.rows(), o.along(n, k), o.to());
  if (!kernels.halves.round) {
    kernels.gemm_nt_packed(o.rows(), o.along(n, k), o.to());
    kernels.gemm_nn(o.rows(), o.along(k, n), o.to());
    kernels.gemm_tn({{o.x.data(), k, m}}, {{b.data(), k, n}}, k, o.to());
  }
  print("mixed", o.c);
}

template <class T>
void packed_products(const char* what) {
  const std::vector<float> x = normals(m * k, 7), w = normals(64 * k, 8);
  moe::arena count;
  (void)moe::packed_matrix<T>::make("w", "scale", 2, k, count);
  const moe::buffer memory(moe::padded(count));
  moe::arena mem(memory.bytes());
  auto packed = moe::packed_matrix<T>::make("w", "scale", 2, k, mem);
  for (dim i = 0; i < 2; ++i) packed.pack(i, matrix_view<const float>{w.data() + i * 32 * k, 32, k});

  const moe::packed_kernels kernels = kernels_of(moe::arch::native{}, moe::arch::weights_of<T>{});
  const dim padded = moe::detail::round_up(k, moe::packing<T>::depth);
  moe::prepared_rows a;
  a.lines = kernels.lines(padded);
  kernels.lay_out(a, m);
  a.factor_count = kernels.factor_count(padded);
  const auto bytes = [](dim size) { return static_cast<std::size_t>(size); };
  const moe::buffer lines(bytes(m * a.lines * 64)), line(bytes(a.lines * 64)),
      room(bytes(kernels.scratch_per_k * padded + 64)), sums(bytes(m * 64 * 4));
  std::vector<float> factors(bytes(m * a.factor_count + 1));
  a.data = lines.bytes().data();
  a.factors = factors.data();
  for (dim r = 0; r < m; ++r) {
    kernels.prepare(x.data() + r * k, k, line.bytes().data(), a.factor(r), kernels.sums_of_32);
    a.take(r, line.bytes().data(), 0, a.lines);
  }
  const std::span<float> c = sums.as<float>();
  std::fill(c.begin(), c.end(), 0.f);
  kernels.multiply(a, {reinterpret_cast<const std::byte*>(packed.panel(0)),
                       packed.panel_bytes(k),
                       2,
                       packed.panel_scale(0),
                       room.bytes().data(),
                       {c.data(), m, 64}});
  print(what, {c.begin(), c.end()});
}

/// Forward and backward.
template <class T>
void attention(const char* what) {
  const testing::attention_trial<T> trial({.h = 4, .h_kv = 2, .d = 40, .dv = 24, .m = 40, .n = 150});
  const testing::attention_floats r = trial.dense(backend{});
  std::vector<float> all;
  for (const auto* part : {&r.o, &r.lse, &r.dq, &r.dk, &r.dv}) all.insert(all.end(), part->begin(), part->end());
  print(what, all);
}

constexpr moe::attention_heads heads{4, 2, 40, 24};
constexpr dim keys = 150;
/// A step over a cache.
template <class T>
void decoding(const char* what) {
  const moe::kv_cache_shape sizes{heads, 1, keys, 0};
  moe::arena count;
  (void)moe::kv_cache<T>::make(sizes, count);
  const moe::buffer memory(moe::padded(count));
  moe::arena mem(memory.bytes());
  auto cache = moe::kv_cache<T>::make(sizes, mem);
  moe::arena scratch;
  moe::make_decode_scratch(sizes, 0, scratch);
  const moe::buffer room(moe::padded(scratch));
  moe::arena work(room.bytes());
  const moe::call<backend> on{backend{}, work, {}};
  const std::vector<float> kk = normals(keys * heads.key_cols(), 12), v = normals(keys * heads.value_cols(), 13),
                           q = normals(heads.query_cols(), 14);
  cache.append_to(on, 0, matrix_view<const float>{kk.data(), keys, heads.key_cols()},
                  matrix_view<const float>{v.data(), keys, heads.value_cols()});
  std::vector<float> o(static_cast<std::size_t>(heads.output_cols()));
  moe::decode(on, cache, matrix_view<const float>{q.data(), 1, heads.query_cols()},
              matrix_view<float>{o.data(), 1, heads.output_cols()});
  print(what, o);
}

}  // namespace

int main() try {
  moe::check_cpu_level();
  std::printf("level %s\n", std::string(name(moe::cpu_level_in_use())).c_str());
  float_products();
  elementwise_rules();
  mixed_products();
  packed_products<float>("float32 weights");
  packed_products<bf16>("bf16 weights");
  packed_products<f16>("f16 weights");
  packed_products<std::int8_t>("int8 weights");
  packed_products<moe::int4_groups<32>>("int4 weights, 32 a group");
  packed_products<moe::int4_groups<128, bf16>>("int4 weights, 128 a group");
  packed_products<moe::ternary>("ternary weights");
  attention<float>("attention");
  attention<f16>("attention over f16");
  decoding<float>("a cache of float32");
  decoding<bf16>("a cache of bf16");
  decoding<f16>("a cache of f16");
  decoding<std::int8_t>("a cache of int8");
} catch (const moe::level_error& e) {
  std::fprintf(stderr, "%s\n", e.what());
  return 1;
}
