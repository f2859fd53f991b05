// SPDX-License-Identifier: Apache-2.0
// expect: a reason
static_assert(false, "a reason");
static_assert(false, "another");
