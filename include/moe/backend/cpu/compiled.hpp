// SPDX-License-Identifier: Apache-2.0
/// Kernels compiled once, in the library moe::kernels, for programs with many files that use layers.
///
/// Where MOE_SEPARATE_KERNELS is defined, as linking moe::kernels does, `cpu<>` includes no xsimd and its kernels are these
/// declarations and those of the tables of kernels that are chosen at run time (cpu/*_levels.hpp); where MOE_DEFINE_KERNELS
/// is, as in the one source of that library, they are defined by the kernels of the level that the library is compiled for.
/// Results are those of that level. Activation forms beyond the listed ones run as plain loops in the user's file.
#pragma once

#include "moe/backend/cpu/gemm_xsimd.hpp"
#include "moe/backend/cpu/level.hpp"
#include "moe/backend/cpu/rows_xsimd.hpp"
#include "moe/backend/host_ffn.hpp"
#include "moe/backend/scalar.hpp"
#include "moe/expert/activation.hpp"

namespace moe::arch {

struct compiled : scalar {
  /// Throws level_error where MOE_CPU_LEVEL cannot be had: products with packed weights run at that level.
  static void check() { check_cpu_level(); }
};

void gemm_nt(compiled, gathered<float> a, matrix_view<const float> b, matrix_view<float> c) noexcept;
void gemm_nt_packed(compiled, gathered<float> a, matrix_view<const float> b, matrix_view<float> c) noexcept;
void gemm_nn(compiled, gathered<float> a, matrix_view<const float> b, matrix_view<float> c) noexcept;
void gemm_tn(compiled, gathered<float> a, gathered<float> b, dim depth, matrix_view<float> c) noexcept;
void axpy(compiled, float w, const float* x, float* y, dim n) noexcept;
float dot(compiled, const float* x, const float* y, dim n) noexcept;

/// A form whose rows the library activates.
template <class Form>
inline constexpr bool is_compiled = false;
template <class Form>
  requires is_compiled<Form>
void activate(compiled, const Form& form, const float* gate, const float* up, float* a, dim n) noexcept;
template <class Form>
  requires is_compiled<Form>
float activate_backward(compiled, const Form& form, float w, const float* gate, const float* up, float* a, float* dgate,
                        float* dup, dim n) noexcept;

#define MOE_COMPILED_FORMS(declare)                                                                              \
  declare(plain<relu>) declare(plain<relu_squared>) declare(plain<silu>) declare(plain<gelu>) declare(plain<gelu_tanh>) \
  declare(glu<silu>) declare(glu<gelu>) declare(glu<gelu_tanh>) declare(clamped<glu<silu>>) declare(gpt_oss_glu)
#define MOE_COMPILED_FORM(form) \
  template <>                   \
  inline constexpr bool is_compiled<form> = true;
MOE_COMPILED_FORMS(MOE_COMPILED_FORM)
#undef MOE_COMPILED_FORM

#if defined(MOE_SEPARATE_KERNELS)
using native = compiled;
#endif

#if defined(MOE_DEFINE_KERNELS)

void gemm_nt(compiled, gathered<float> a, matrix_view<const float> b, matrix_view<float> c) noexcept { gemm_nt(native{}, a, b, c); }
void gemm_nt_packed(compiled, gathered<float> a, matrix_view<const float> b, matrix_view<float> c) noexcept { gemm_nt_packed(native{}, a, b, c); }
void gemm_nn(compiled, gathered<float> a, matrix_view<const float> b, matrix_view<float> c) noexcept { gemm_nn(native{}, a, b, c); }
void gemm_tn(compiled, gathered<float> a, gathered<float> b, dim depth, matrix_view<float> c) noexcept { gemm_tn(native{}, a, b, depth, c); }
void axpy(compiled, float w, const float* x, float* y, dim n) noexcept { axpy(native{}, w, x, y, n); }
float dot(compiled, const float* x, const float* y, dim n) noexcept { return dot(native{}, x, y, n); }

template <class Form>
  requires is_compiled<Form>
void activate(compiled, const Form& form, const float* gate, const float* up, float* a, dim n) noexcept {
  moe::activate(native{}, form, gate, up, a, n);
}
template <class Form>
  requires is_compiled<Form>
float activate_backward(compiled, const Form& form, float w, const float* gate, const float* up, float* a, float* dgate,
                        float* dup, dim n) noexcept {
  return moe::activate_backward(native{}, form, w, gate, up, a, dgate, dup, n);
}

#define MOE_COMPILED_FORM(form)                                                                          \
  template void activate(compiled, const form&, const float*, const float*, float*, dim) noexcept;       \
  template float activate_backward(compiled, const form&, float, const float*, const float*, float*, float*, float*, dim) noexcept;
MOE_COMPILED_FORMS(MOE_COMPILED_FORM)
#undef MOE_COMPILED_FORM

#endif
#undef MOE_COMPILED_FORMS

}  // namespace moe::arch
