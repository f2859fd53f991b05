// SPDX-License-Identifier: Apache-2.0
/// More values than the registers that the compiler may use (CMakeLists.txt).
__global__ void spills(float* p) {
  float v[64];
  for (int i = 0; i < 64; ++i) v[i] = p[i * 1024 + threadIdx.x];
  __syncthreads();
  for (int j = 0; j < 64; ++j) {
    float sum = 0;
    for (int i = 0; i < 64; ++i) sum += v[i] * v[i * j % 64];
    p[j * 1024 + threadIdx.x] = sum;
  }
}
