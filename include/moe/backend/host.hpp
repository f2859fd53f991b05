// SPDX-License-Identifier: Apache-2.0
/// Primitives on the host: how work is cut into tiles and shared between threads. The tiles follow from shapes and plan,
/// never from the number of threads; each element of a result has one writer and one order of additions, so results are
/// equal bit for bit for any executor. What a tile computes is a kernel, overloaded on the architecture's tag.
#pragma once

#include "moe/backend/host_backend.hpp"
#include "moe/backend/host_ffn.hpp"
#include "moe/backend/host_gemm.hpp"
#include "moe/backend/host_route.hpp"
#include "moe/backend/host_rows.hpp"
