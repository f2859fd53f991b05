// SPDX-License-Identifier: Apache-2.0
/// A backend in memory of the host.
#pragma once

#include <concepts>

#include "moe/core/call.hpp"
#include "moe/core/executor.hpp"
#include "moe/core/plan.hpp"
#include "moe/core/types.hpp"

namespace moe {

namespace detail {

/// A level that is chosen at run time can be refused: then a backend cannot be made.
template <class Arch>
concept CheckedArch = requires { Arch::check(); };
template <class Arch>
constexpr void check_arch() noexcept(!CheckedArch<Arch>) {
  if constexpr (CheckedArch<Arch>) Arch::check();
}

}  // namespace detail

/// A backend on the host: kernels of level `Arch`, tiles run by `Ex`.
template <class Arch, class Ex>
  requires Executor<Ex>
struct host_backend {
  using space = host;
  using arch = Arch;
  [[no_unique_address]] Ex threads;

  constexpr host_backend() noexcept(!detail::CheckedArch<Arch>)
    requires std::default_initializable<Ex>
      : threads() {
    detail::check_arch<Arch>();
  }
  host_backend(Ex ex) noexcept(!detail::CheckedArch<Arch>) : threads(ex) { detail::check_arch<Arch>(); }
  const Ex& executor() const noexcept { return threads; }
};

/// A backend whose memory the calling thread can read.
template <class B>
concept HostBackend = std::same_as<typename B::space, host>;

/// Loads and stores one float: the lane of elementwise rules where there is no vector type.
struct scalar_lane {
  using value = float;
  static float load(const float* p) noexcept { return *p; }
  static void store(float* p, float v) noexcept { *p = v; }
  static float sum(float v) noexcept { return v; }
};

}  // namespace moe
