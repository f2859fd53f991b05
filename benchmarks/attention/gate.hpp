// SPDX-License-Identifier: Apache-2.0
/// The gate on the output that a form asks for, as the library has it.
#pragma once

#include "attention/attention.hpp"
#include "moe/attention/output_gate.hpp"

namespace bench {

/// f(gate) with that gate; nothing where there is none. The kind is a value, so that attention is compiled once for all.
template <class F>
void with_gate(attention_gate kind, F f) {
  if (kind == attention_gate::headwise) f(moe::output_gate<moe::headwise>{});
  if (kind == attention_gate::elementwise) f(moe::output_gate<moe::elementwise>{});
}

}  // namespace bench
