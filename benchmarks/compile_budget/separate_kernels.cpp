// SPDX-License-Identifier: Apache-2.0
#define MOE_SEPARATE_KERNELS
#include "first_layer.cpp"
