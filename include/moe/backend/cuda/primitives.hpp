// SPDX-License-Identifier: Apache-2.0
/// Every primitive on a device, over any backend that launches for_each and run (backend/cuda/device.hpp).
#pragma once

#include "moe/backend/cuda/edge.hpp"
#include "moe/backend/cuda/ffn.hpp"
#include "moe/backend/cuda/gemm.hpp"
#include "moe/backend/cuda/route.hpp"
#include "moe/backend/cuda/rows.hpp"
