# SPDX-License-Identifier: Apache-2.0
s/\[([^]]*)\]\(#[^)]*\)/\1/g
s/(\]\([^):#]*)#[^)]*\)/\1)/g
