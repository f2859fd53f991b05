// SPDX-License-Identifier: Apache-2.0
#pragma once

#define MOE_VERSION_MAJOR 0
#define MOE_VERSION_MINOR 1
#define MOE_VERSION_PATCH 0
#define MOE_VERSION_STRING "0.1.0"
#define MOE_VERSION_AT_LEAST(major, minor, patch) \
  (MOE_VERSION_MAJOR * 10000 + MOE_VERSION_MINOR * 100 + MOE_VERSION_PATCH >= (major)*10000 + (minor)*100 + (patch))
