// SPDX-License-Identifier: Apache-2.0
/// Floats side by side without intrinsics: the value of elementwise rules in functions that name their processor by
/// MOE_TARGET, where the vectors of the build would be too narrow. Where the compiler has no vectors of its own it is one float.
#pragma once

#include <cmath>
#include <cstring>
#include <utility>

#include "moe/core/view.hpp"

namespace moe::arch {

#if defined(MOE_VECTORS)

namespace detail {

template <int N>
struct vectors {
  typedef float floats __attribute__((vector_size(N * sizeof(float))));
  typedef std::int32_t ints __attribute__((vector_size(N * sizeof(std::int32_t))));
};

}  // namespace detail

/// N floats, 4 or a power of two above. It has constructors of its own so that it is passed by reference, whatever the
/// processor of a function: callers and callees agree, and a rule that is not inlined is slow, not wrong. Level is a part of
/// the names of rules that take it.
template <int N, int Level>
class lanes {
  using vector = typename detail::vectors<N>::floats;
  using bits = typename detail::vectors<N>::ints;

 public:
  static constexpr int width = N;
  using half = lanes<(N > 4 ? N / 2 : 4), Level>;

  /// What a comparison returns: -1 or 0 a lane.
  struct mask {
    bits v;
    MOE_INLINE mask(const mask& m) noexcept : v(m.v) {}
    MOE_INLINE explicit mask(const bits& b) noexcept : v(b) {}
  };

  MOE_INLINE lanes() noexcept {}
  MOE_INLINE lanes(float s) noexcept : v_(s - vector{}) {}
  MOE_INLINE lanes(const lanes& o) noexcept : v_(o.v_) {}
  MOE_INLINE lanes& operator=(const lanes& o) noexcept {
    v_ = o.v_;
    return *this;
  }

  MOE_INLINE static lanes load(const float* p) noexcept {
    lanes r;
    std::memcpy(&r.v_, p, sizeof r.v_);
    return r;
  }
  /// The first n floats at p, then zeros.
  MOE_INLINE static lanes load(const float* p, dim n) noexcept {
    lanes r(0);
    std::memcpy(&r.v_, p, static_cast<std::size_t>(n) * sizeof(float));
    return r;
  }
  MOE_INLINE void store(float* p) const noexcept { std::memcpy(p, &v_, sizeof v_); }
  MOE_INLINE void store(float* p, dim n) const noexcept { std::memcpy(p, &v_, static_cast<std::size_t>(n) * sizeof(float)); }

  MOE_INLINE friend lanes operator+(const lanes& a, const lanes& b) noexcept { return lanes(a.v_ + b.v_); }
  MOE_INLINE friend lanes operator-(const lanes& a, const lanes& b) noexcept { return lanes(a.v_ - b.v_); }
  MOE_INLINE friend lanes operator*(const lanes& a, const lanes& b) noexcept { return lanes(a.v_ * b.v_); }
  MOE_INLINE friend lanes operator/(const lanes& a, const lanes& b) noexcept { return lanes(a.v_ / b.v_); }
  MOE_INLINE friend lanes operator-(const lanes& a) noexcept { return lanes(-a.v_); }
  MOE_INLINE friend mask operator<(const lanes& a, const lanes& b) noexcept { return mask(a.v_ < b.v_); }
  MOE_INLINE friend mask operator>(const lanes& a, const lanes& b) noexcept { return mask(a.v_ > b.v_); }
  MOE_INLINE friend mask operator<=(const lanes& a, const lanes& b) noexcept { return mask(a.v_ <= b.v_); }
  MOE_INLINE friend mask operator>=(const lanes& a, const lanes& b) noexcept { return mask(a.v_ >= b.v_); }
  MOE_INLINE friend lanes select(const mask& m, const lanes& yes, const lanes& no) noexcept {
    return lanes(m.v ? yes.v_ : no.v_);
  }
  /// a b + c, rounded once where the processor can
  MOE_INLINE friend lanes multiply_add(const lanes& a, const lanes& b, const lanes& c) noexcept {
    return lanes(a.v_ * b.v_ + c.v_);
  }
  /// f(x) of every lane, one by one.
  template <class F>
  MOE_INLINE lanes each(F f) const noexcept {
    lanes r;
    for (int l = 0; l < N; ++l) r.v_[l] = f(v_[l]);
    return r;
  }
  /// Of the lanes, pairs that are far from each other first.
  MOE_INLINE float sum() const noexcept {
    if constexpr (N > 4)
      return halves(std::make_index_sequence<N / 2>{}).sum();
    else
      return (v_[0] + v_[2]) + (v_[1] + v_[3]);
  }

  /// e^x within two units in the last place; infinite from e^88.37, 0 below 2^-126. Cephes' expf.
  MOE_INLINE friend lanes exp(const lanes& x) noexcept {
    const lanes low(-87.33f), high(88.37f);
    const lanes z = select(x < low, low, select(x > high, high, x));
    const lanes turns = multiply_add(z, lanes(1.44269504f), select(z < lanes(0), lanes(-0.5f), lanes(0.5f)));
    const bits whole = __builtin_convertvector(turns.v_, bits);
    const lanes n(__builtin_convertvector(whole, vector));
    const lanes r = multiply_add(n, lanes(2.12194440e-4f), multiply_add(n, lanes(-0.693359375f), z));
    const lanes p = horner(r, 1.9875691500e-4f, 1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f,
                           5.0000001201e-1f, 1.f, 1.f);
    const bits exponent = (whole + 127) << 23;
    lanes scale;
    std::memcpy(&scale.v_, &exponent, sizeof exponent);
    return select(x > high, lanes(INFINITY), select(x < low, lanes(0), p * scale));
  }
  /// Within four units in the last place. Cephes' tanhf.
  MOE_INLINE friend lanes tanh(const lanes& x) noexcept {
    const lanes z = magnitude(x), s = x * x;
    const lanes near = horner(s, -5.70498872745e-3f, 2.06390887954e-2f, -5.37397155531e-2f, 1.33314422036e-1f,
                              -3.33332819422e-1f, 0.f);
    const lanes far = lanes(1) - lanes(2) / (exp(z + z) + lanes(1));
    return select(z < lanes(0.625f), multiply_add(near, x, x), select(x < lanes(0), -far, far));
  }
  /// Within two units in the last place: an odd polynomial near 0, 1 - e^p(|x|) beyond.
  MOE_INLINE friend lanes erf(const lanes& x) noexcept {
    const lanes z = magnitude(x), s = x * x;
    const lanes near = horner(s, -5.96761703e-4f, 4.99119423e-3f, -2.67681349e-2f, 1.12819925e-1f, -3.76125336e-1f,
                              1.28379166e-1f);
    const lanes power = horner(z, -1.72853470e-5f, 3.83197126e-4f, -3.88396438e-3f, 2.42546219e-2f, -1.06777877e-1f,
                               -6.34846687e-1f, -1.28717512e-1f, 0.f);
    const lanes far = lanes(1) - exp(power - z);
    return select(z < lanes(0.927734375f), multiply_add(near, x, x), select(x < lanes(0), -far, far));
  }

 private:
  MOE_INLINE explicit lanes(const vector& v) noexcept : v_(v) {}

  template <std::size_t... I>
  MOE_INLINE half halves(std::index_sequence<I...>) const noexcept {
    half low, high;
    low.v_ = __builtin_shufflevector(v_, v_, static_cast<int>(I)...);
    high.v_ = __builtin_shufflevector(v_, v_, static_cast<int>(I + N / 2)...);
    return low + high;
  }
  MOE_INLINE static lanes magnitude(const lanes& x) noexcept { return select(x < lanes(0), -x, x); }
  /// A polynomial, the highest power's coefficient first.
  template <class... C>
  MOE_INLINE static lanes horner(const lanes& x, float first, C... rest) noexcept {
    lanes p(first);
    ((p = multiply_add(p, x, lanes(rest))), ...);
    return p;
  }

  template <int, int>
  friend class lanes;
  vector v_;
};

#else

template <int, int Level>
struct lanes {
  static constexpr int width = 1;
  using half = lanes;
  float v;

  lanes(float s = 0) noexcept : v(s) {}
  operator float() const noexcept { return v; }
  static lanes load(const float* p, dim = 1) noexcept { return *p; }
  void store(float* p, dim = 1) const noexcept { *p = v; }
  friend lanes multiply_add(const lanes& a, const lanes& b, const lanes& c) noexcept { return a.v * b.v + c.v; }
  float sum() const noexcept { return v; }
};

#endif

/// What a rule computes with in a row of `count` more floats: as many of them as there are lanes.
template <class V>
struct lanes_of_row {
  using value = V;
  dim count;

  MOE_INLINE V load(const float* p) const noexcept { return count >= V::width ? V::load(p) : V::load(p, count); }
  MOE_INLINE void store(float* p, const V& v) const noexcept { count >= V::width ? v.store(p) : v.store(p, count); }
  MOE_INLINE float sum(const V& v) const noexcept {
    if (count >= V::width) return v.sum();
    float lane[V::width] = {};
    v.store(lane, count);
    return V::load(lane).sum();
  }
};

}  // namespace moe::arch
