// SPDX-License-Identifier: Apache-2.0
/// libFuzzer target: any bytes as a safetensors file. A broken promise leaves as an exception, which ends the program.
#include "../support/fuzz_safetensors.hpp"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  testing::try_safetensors(std::as_bytes(std::span(data, size)));
  return 0;
}
