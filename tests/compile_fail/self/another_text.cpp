// SPDX-License-Identifier: Apache-2.0
// expect: never said
static_assert(false, "a reason");
