// SPDX-License-Identifier: Apache-2.0
#include <doctest/doctest.h>

#include "moe/attention/output_gate.hpp"
#include "moe/backend/scalar.hpp"
#include "support/reference.hpp"
#include "support/testing.hpp"

namespace {

using moe::bf16, moe::dim, moe::matrix_view;
using testing::normals;
using backend = moe::scalar<>;

matrix_view<float> matrix(std::vector<float>& v, dim rows) { return {v.data(), rows, static_cast<dim>(v.size()) / rows}; }
moe::call<backend> on() { return testing::on<backend>(); }
reference::vec doubles(const std::vector<float>& v) { return {v.begin(), v.end()}; }

constexpr dim T = 5, n = 4, width = 70;  // more than one piece of 64 channels

double value(moe::sigmoid, double z) { return 1 / (1 + std::exp(-z)); }
double value(moe::ns_sigmoid, double z) { return 0.5 + 0.5 / (1 + std::exp(-z)); }
double value(moe::silu, double z) { return z / (1 + std::exp(-z)); }
double value(moe::identity, double z) { return z; }
double slope(moe::sigmoid, double z) { return std::exp(-std::fabs(z)) / std::pow(1 + std::exp(-std::fabs(z)), 2); }
double slope(moe::ns_sigmoid, double z) { return slope(moe::sigmoid{}, z) / 2; }
double slope(moe::silu, double z) { return value(moe::sigmoid{}, z) + z * slope(moe::sigmoid{}, z); }
double slope(moe::identity, double) { return 1; }

/// y' from y[T, n*width] and logits, as the paper writes it.
template <class G, class A, class F>
reference::vec gated(const reference::vec& y, const reference::vec& s) {
  reference::vec to(y.size());
  for (dim t = 0; t < T; ++t)
    for (dim a = 0; a < n; ++a)
      for (dim j = 0; j < width; ++j) {
        double z = 0;
        if constexpr (std::is_same_v<G, moe::headwise>) z = s[static_cast<std::size_t>(t * n + a)];
        if constexpr (std::is_same_v<G, moe::elementwise>) z = s[static_cast<std::size_t>((t * n + a) * width + j)];
        if constexpr (std::is_same_v<G, moe::head_shared>)
          for (dim b = 0; b < n; ++b) z += s[static_cast<std::size_t>((t * n + b) * width + j)] / n;
        const std::size_t i = static_cast<std::size_t>((t * n + a) * width + j);
        to[i] = std::is_same_v<F, moe::additive> ? y[i] + value(A{}, z) : y[i] * value(A{}, z);
      }
  return to;
}

template <class Gate>
struct result {
  std::vector<float> to, dy, ds;
  result(std::vector<float> s, std::vector<float> y, std::vector<float> dto) : to(y.size()), dy(dto), ds(s.size()) {
    const auto logits = moe::split_heads(matrix(s, T), n);
    Gate{}.forward(on(), logits, n, moe::split_heads(matrix(y, T), n), moe::split_heads(matrix(to, T), n));
    Gate{}.backward(on(), logits, n, moe::split_heads(matrix(y, T), n), moe::split_heads(matrix(dy, T), n),
                    moe::split_heads(matrix(dy, T), n), moe::split_heads(matrix(ds, T), n));
  }
};

template <class G, class A, class F>
struct variant {
  using gate = moe::output_gate<G, A, F>;
  static reference::vec reference_of(const reference::vec& y, const reference::vec& s) { return gated<G, A, F>(y, s); }
};
using moe::additive, moe::multiplicative, moe::elementwise, moe::headwise, moe::head_shared;
/// f(gate) for one of each granularity, activation and form.
template <class F>
void for_every_gate(F f) {
  f(variant<elementwise, moe::sigmoid, multiplicative>{});
  f(variant<headwise, moe::sigmoid, multiplicative>{});
  f(variant<head_shared, moe::sigmoid, multiplicative>{});
  f(variant<elementwise, moe::ns_sigmoid, multiplicative>{});
  f(variant<headwise, moe::silu, multiplicative>{});
  f(variant<elementwise, moe::identity, multiplicative>{});
  f(variant<elementwise, moe::silu, additive>{});
  f(variant<headwise, moe::identity, additive>{});
  f(variant<head_shared, moe::ns_sigmoid, additive>{});
}

}  // namespace

TEST_SUITE("attention/output_gate") {
  TEST_CASE("outputs and gradients are those of the formula") {
    for_every_gate([]<class V>(V) {
      const std::vector<float> s = normals(T * V::gate::cols(n, width), 1, 2), y = normals(T * n * width, 2),
                               dto = normals(T * n * width, 3);
      const result<typename V::gate> r(s, y, dto);
      reference::vec vs = doubles(s), vy = doubles(y);
      const auto loss = [&] {
        const reference::vec to = V::reference_of(vy, vs);
        double sum = 0;
        for (std::size_t i = 0; i < to.size(); ++i) sum += to[i] * dto[i];
        return sum;
      };
      CHECK(reference::error(r.to, V::reference_of(vy, vs)) < 1e-6);
      CHECK(reference::error(r.dy, reference::gradient(vy, loss)) < 1e-5);
      CHECK(reference::error(r.ds, reference::gradient(vs, loss)) < 1e-5);
    });
  }
  TEST_CASE("one token and head at a time is the same as the whole") {
    for_every_gate([]<class V>(V) {
      std::vector<float> s = normals(T * V::gate::cols(n, width), 1, 2), y = normals(T * n * width, 2);
      const result<typename V::gate> whole(s, y, y);
      std::vector<float> mean(T * width);
      const auto logits = typename V::gate{}.bind(on(), moe::split_heads(matrix(s, T), n), n, matrix(mean, T));
      for (dim t = 0; t < T; ++t)
        for (dim a = 0; a < n; ++a)
          typename V::gate{}.apply(moe::arch::scalar{}, logits[a].row(t), y.data() + (t * n + a) * width, width);
      CHECK(y == whole.to);
    });
  }
  TEST_CASE("logits of +40 change nothing; of -40 they close the gate, forward and backward") {
    const std::vector<float> y = normals(T * n * width, 2), dto = normals(T * n * width, 3);
    using gate = moe::output_gate<>;
    const result<gate> open(std::vector<float>(y.size(), 40.f), y, dto), closed(std::vector<float>(y.size(), -40.f), y, dto);
    CHECK(open.to == y);
    CHECK(open.dy == dto);
    for (std::size_t i = 0; i < y.size(); ++i) {
      CHECK(std::fabs(closed.to[i]) < 1e-16);
      CHECK(std::fabs(closed.dy[i]) < 1e-16);
      CHECK(std::fabs(open.ds[i]) > 0);  // the slope does not vanish with 1 - g
      CHECK(open.ds[i] == doctest::Approx(static_cast<double>(y[i]) * dto[i] * std::exp(-40.0)).epsilon(1e-4));
    }
    const result<gate> far(std::vector<float>(y.size(), -1000.f), y, dto),
        beyond(std::vector<float>(y.size(), 1000.f), y, dto);
    CHECK(beyond.to == y);
    for (std::size_t i = 0; i < y.size(); ++i) {
      CHECK(far.to[i] == 0);
      CHECK(far.dy[i] == 0);
      CHECK(far.ds[i] == 0);
      CHECK(beyond.ds[i] == 0);
    }
  }
  TEST_CASE("logits of 0 halve the output, or leave three quarters where the gate cannot close") {
    const std::vector<float> y = normals(T * n * width, 2), zero(y.size());
    const result<moe::output_gate<>> half(zero, y, y);
    const result<moe::output_gate<elementwise, moe::ns_sigmoid>> most(zero, y, y);
    for (std::size_t i = 0; i < y.size(); ++i) {
      CHECK(half.to[i] == y[i] / 2);
      CHECK(most.to[i] == y[i] * 0.75f);
    }
  }
  TEST_CASE("a gate of heads equals an elementwise one with equal columns, and a shared one with equal heads") {
    const std::vector<float> s = normals(T * n, 1), y = normals(T * n * width, 2), dto = normals(T * n * width, 3);
    std::vector<float> equal, alike;
    for (const float z : s) equal.insert(equal.end(), width, z);
    const std::vector<float> row = normals(T * width, 5);
    for (dim t = 0; t < T; ++t)
      for (dim a = 0; a < n; ++a) alike.insert(alike.end(), row.begin() + t * width, row.begin() + (t + 1) * width);
    const result<moe::output_gate<headwise>> heads(s, y, dto);
    const result<moe::output_gate<>> columns(equal, y, dto), own(alike, y, dto);
    const result<moe::output_gate<head_shared>> shared(alike, y, dto);
    CHECK(reference::error(heads.to, doubles(columns.to)) < 1e-6);
    CHECK(reference::error(heads.dy, doubles(columns.dy)) < 1e-6);
    CHECK(reference::error(shared.to, doubles(own.to)) < 1e-6);
    double sum = 0;
    for (std::size_t j = 0; j < width; ++j) sum += static_cast<double>(columns.ds[j]);
    CHECK(heads.ds[0] == doctest::Approx(sum).epsilon(1e-4));
  }
  TEST_CASE("delta comes from either side of a gate that multiplies, whatever it is") {
    for_every_gate([]<class V>(V) {
      if constexpr (!V::gate::scales) return;
      const std::vector<float> s = normals(T * V::gate::cols(n, width), 1), y = normals(T * n * width, 2),
                               dto = normals(T * n * width, 3);
      const result<typename V::gate> r(s, y, dto);
      for (dim a = 0; a < T * n; ++a) {
        double before = 0, after = 0, size = 0;
        for (dim j = 0; j < width; ++j) {
          const auto i = static_cast<std::size_t>(a * width + j);
          before += static_cast<double>(r.dy[i]) * y[i];
          after += static_cast<double>(dto[i]) * r.to[i];
          size += std::fabs(static_cast<double>(dto[i]) * r.to[i]);
        }
        CHECK(std::fabs(before - after) < 1e-6 * size);
      }
    });
  }
  TEST_CASE("halves are gated in float") {
    std::vector<bf16> s, y, to(T * n * width);
    for (const float v : normals(T * n * width, 1)) s.push_back(bf16(v));
    for (const float v : normals(T * n * width, 2)) y.push_back(bf16(v));
    const auto heads = [](std::vector<bf16>& v) { return moe::split_heads(matrix_view<bf16>{v.data(), T, n * width}, n); };
    moe::output_gate<>{}.forward(on(), heads(s), n, heads(y), heads(to));
    for (std::size_t i = 0; i < to.size(); ++i) {
      const float z = static_cast<float>(s[i]);
      CHECK(std::fabs(static_cast<float>(to[i]) - static_cast<float>(y[i]) / (1 + std::exp(-z))) <=
            std::fabs(static_cast<float>(y[i])) * 0x1p-8f);
    }
  }
  TEST_CASE("gradients of halves are those of the formula, rounded once, where logits are far from zero") {
    for_every_gate([]<class G, class A, class F>(variant<G, A, F>) {
      constexpr dim cols = moe::output_gate<G, A, F>::cols(n, width);
      std::vector<bf16> s, y, dto, dy(T * n * width), ds(T * cols);
      for (dim i = 0; i < T * cols; ++i)  // 8 .. 20 or -20 .. -8, of one sign in a row: heads may share them
        s.push_back(bf16((i / cols % 2 ? -1.f : 1.f) * (8 + 12 * static_cast<float>(i * 37 % 101) / 100)));
      for (const float v : normals(T * n * width, 2)) y.push_back(bf16(v));
      for (const float v : normals(T * n * width, 3)) dto.push_back(bf16(v));
      const auto heads = [](std::vector<bf16>& v) {
        return moe::split_heads(matrix_view<bf16>{v.data(), T, static_cast<dim>(v.size()) / T}, n);
      };
      moe::buffer memory(4096);
      moe::arena mem(memory.bytes());
      moe::output_gate<G, A, F>{}.backward(moe::call<backend>{{}, mem, {}}, heads(s), n, heads(y), heads(dto), heads(dy),
                                           heads(ds));
      const auto number = [](const std::vector<bf16>& v, dim i) {
        return static_cast<double>(static_cast<float>(v[static_cast<std::size_t>(i)]));
      };
      const auto logit = [&](dim t, dim a, dim j) {
        if constexpr (std::is_same_v<G, headwise>) return number(s, t * n + a);
        if constexpr (std::is_same_v<G, elementwise>) return number(s, (t * n + a) * width + j);
        double sum = 0;
        for (dim b = 0; b < n; ++b) sum += number(s, (t * n + b) * width + j);
        return sum / n;
      };
      constexpr bool scales = std::is_same_v<F, multiplicative>;
      std::vector<double> sums(ds.size()), sizes(ds.size());
      dim wrong = 0;
      for (dim t = 0; t < T; ++t)
        for (dim a = 0; a < n; ++a)
          for (dim j = 0; j < width; ++j) {
            const dim i = (t * n + a) * width + j;
            const double z = logit(t, a, j), up = number(dto, i), wanted = scales ? up * value(A{}, z) : up;
            wrong += !(std::fabs(number(dy, i) - wanted) <= std::fabs(wanted) * 0x1p-8);
            const double term = (scales ? up * number(y, i) : up) * slope(A{}, z);
            for (dim b = 0; b < n; ++b) {  // heads that have a part in it
              if (!std::is_same_v<G, head_shared> && b != a) continue;
              const auto to = static_cast<std::size_t>(std::is_same_v<G, headwise> ? t * n + a : (t * n + b) * width + j);
              sums[to] += term / (std::is_same_v<G, head_shared> ? n : 1);
              sizes[to] += std::fabs(term) / (std::is_same_v<G, head_shared> ? n : 1);
            }
          }
      CHECK(wrong == 0);
      for (std::size_t i = 0; i < ds.size(); ++i)
        wrong += !(std::fabs(static_cast<double>(static_cast<float>(ds[i])) - sums[i]) <= sizes[i] * 0x1p-8);
      CHECK(wrong == 0);
    });
  }
  TEST_CASE("a gate that does not depend on the input is a stack whose rows are one; its gradient is their sum") {
    for_every_gate([]<class V>(V) {
      constexpr dim cols = V::gate::cols(n, width), own = V::gate::head_cols(width);
      const std::vector<float> dto = normals(T * n * width, 3);
      std::vector<float> learned = normals(cols, 1), y = normals(T * n * width, 2), to(y.size()), dy = dto, ds(T * cols);
      const moe::matrix_stack<float> s{{learned.data(), T, own, 0}, own};
      const auto heads = [](std::vector<float>& v) { return moe::split_heads(matrix(v, T), n); };
      typename V::gate{}.forward(on(), s, n, heads(y), heads(to));
      typename V::gate{}.backward(on(), s, n, heads(y), heads(dy), heads(dy), heads(ds));

      reference::vec parameter = doubles(learned);
      const auto expected = [&] {
        reference::vec every;
        for (dim t = 0; t < T; ++t) every.insert(every.end(), parameter.begin(), parameter.end());
        return V::reference_of(doubles(y), every);
      };
      const auto loss = [&] {
        const reference::vec gated = expected();
        double sum = 0;
        for (std::size_t i = 0; i < gated.size(); ++i) sum += gated[i] * dto[i];
        return sum;
      };
      std::vector<float> slope(learned.size());
      for (std::size_t i = 0; i < ds.size(); ++i) slope[i % slope.size()] += ds[i];
      CHECK(reference::error(to, expected()) < 1e-6);
      CHECK(reference::error(slope, reference::gradient(parameter, loss)) < 1e-5);
    });
  }

  TEST_CASE("the fused projection keeps queries and logits of a key head together; splitting all columns fails") {
    const moe::attention_heads h{.heads = 4, .kv_heads = 2, .d = 3, .dv = 5};
    constexpr dim model = 7;
    const auto test = [&](auto gate) {
      using layout = moe::grouped_projection<decltype(gate)>;
      const dim own = decltype(gate)::head_cols(h.dv), cols = layout::cols(h);
      CHECK(cols == 2 * (2 * 3 + 2 * own));
      std::vector<float> x = normals(T * model, 1), w = normals(cols * model, 2), fused(static_cast<std::size_t>(T * cols));
      gemm_nt(on(), matrix(x, T), matrix_view<const float>(w.data(), cols, model), matrix(fused, T));
      const auto q = layout::queries(matrix(fused, T), h), s = layout::logits(matrix(fused, T), h);
      // Row r of the weight belongs to key head r / (cols/2); there, first G*d rows of queries, then G*own rows of logits.
      const auto product = [&](dim t, dim row) {
        double sum = 0;
        for (dim j = 0; j < model; ++j)
          sum +=
              static_cast<double>(x[static_cast<std::size_t>(t * model + j)]) * w[static_cast<std::size_t>(row * model + j)];
        return sum;
      };
      bool naive_fits = true;
      for (dim t = 0; t < T; ++t)
        for (dim a = 0; a < 4; ++a) {
          const dim group = a / 2 * (cols / 2);
          for (dim j = 0; j < 3; ++j) {
            CHECK(q[a](t, j) == doctest::Approx(product(t, group + a % 2 * 3 + j)).epsilon(1e-4));
            naive_fits = naive_fits && q[a](t, j) == fused[static_cast<std::size_t>(t * cols + a * 3 + j)];
          }
          for (dim j = 0; j < own; ++j)
            CHECK(s[a](t, j) == doctest::Approx(product(t, group + 6 + a % 2 * own + j)).epsilon(1e-4));
        }
      CHECK(!naive_fits);
    };
    test(moe::output_gate<>{});
    test(moe::output_gate<headwise>{});
    CHECK(moe::grouped_projection<moe::no_output_gate>::cols(h) == h.query_cols());
  }
  TEST_CASE("fused and separate projections gate alike, and gradients go where the logits came from") {
    const moe::attention_heads h{.heads = 4, .kv_heads = 2, .d = 6, .dv = 6};
    using gate = moe::output_gate<>;
    const dim cols = moe::grouped_projection<gate>::cols(h);
    std::vector<float> fused = normals(T * cols, 1), dfused(fused.size(), -7.f), apart(T * 24), dapart(T * 24);
    const auto s = moe::grouped_projection<gate>::logits(matrix(fused, T), h);
    const auto own = moe::separate_projection<gate>::logits(matrix(apart, T), h);
    for (dim a = 0; a < 4; ++a)
      for (dim t = 0; t < T; ++t)
        for (dim j = 0; j < 6; ++j) own[a](t, j) = s[a](t, j);
    std::vector<float> y = normals(T * 24, 2), first(y.size()), second(y.size()), dy(y.size());
    const auto heads = [](std::vector<float>& v) { return moe::split_heads(matrix(v, T), 4); };
    gate{}.forward(on(), s, 4, heads(y), heads(first));
    gate{}.forward(on(), own, 4, heads(y), heads(second));
    CHECK(first == second);
    gate{}.backward(on(), s, 4, heads(y), heads(y), heads(dy), moe::grouped_projection<gate>::logits(matrix(dfused, T), h));
    gate{}.backward(on(), own, 4, heads(y), heads(y), heads(dy), heads(dapart));
    for (dim t = 0; t < T; ++t)
      for (dim a = 0; a < 4; ++a) {
        const auto ds = moe::grouped_projection<gate>::logits(matrix(dfused, T), h);
        CHECK(ds[a](t, 5) == dapart[static_cast<std::size_t>(t * 24 + a * 6 + 5)]);
        CHECK(moe::grouped_projection<gate>::queries(matrix(dfused, T), h)[a](t, 0) == -7);
      }
    CHECK(moe::separate_projection<gate>::cols(h) == 24);
    CHECK(moe::separate_projection<gate>::logit_cols(h) == 24);
  }
  TEST_CASE("parameters of the gates of the 15A2B model are those of the paper's table, in millions") {
    constexpr dim d = 2048, layers = 24, q = 32, kv = 4, dk = 128;
    const auto millions = [](dim per_layer) { return static_cast<double>(per_layer * layers) / 1e6; };
    CHECK(millions(moe::output_gate<>::parameters(d, q, dk)) == doctest::Approx(201).epsilon(0.002));
    CHECK(millions(moe::output_gate<headwise>::parameters(d, q, dk)) == doctest::Approx(1.6).epsilon(0.02));
    CHECK(millions(moe::output_gate<>::parameters(d, kv, dk)) == doctest::Approx(25).epsilon(0.01));           // G2
    CHECK(millions(moe::output_gate<headwise>::parameters(d, kv, dk)) == doctest::Approx(0.2).epsilon(0.02));  // G2
    CHECK(millions(moe::output_gate<>::parameters(d, 1, d)) == doctest::Approx(100).epsilon(0.01));            // G5
    CHECK(moe::output_gate<headwise>::parameters(d, 1, d) == d);  // one logit a token
  }
}
