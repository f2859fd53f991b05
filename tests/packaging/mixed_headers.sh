#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# mixed_headers.sh SOURCE COMPILER...: the folder of headers and the single header in one unit are an error that says so.
set -u
source=$1
shift
wanted="the folder of headers and the single header are both included"
for order in "include single_include" "single_include include"; do
  # shellcheck disable=SC2086 # two words
  said=$(printf "#include \"$source/%s/moe/moe.hpp\"\n" $order |
    "$@" -Wfatal-errors -fsyntax-only -I"$source/include" -x c++ - 2>&1 | grep -m 1 error)
  case $said in
    *"$wanted"*) ;;
    *) echo "$order: the first error is '$said', expected '$wanted'" && exit 1 ;;
  esac
done
