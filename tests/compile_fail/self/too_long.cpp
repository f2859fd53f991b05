// SPDX-License-Identifier: Apache-2.0
// expect: a reason
// lines: <= 1
static_assert(false, "a reason");
