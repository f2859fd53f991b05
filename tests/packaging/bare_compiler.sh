#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# bare_compiler.sh PROGRAM EXPECTED COMMAND...
# Compiles with COMMAND -o PROGRAM (MODULE in the environment adds what pkg-config says of it), runs, compares.
set -eu
program=$1 expected=$2
shift 2
flags=${MODULE:+$(pkg-config --cflags --libs "$MODULE")}
# shellcheck disable=SC2086 # flags are words
"$@" $flags -o "$program"
"$program" >"$program.txt"
[ ! -e "$expected" ] || diff "$expected" "$program.txt"
