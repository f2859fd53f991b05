#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# each_alone.sh HEADER... -- COMMAND...   compiles a file with nothing but each header, included twice
set -u
headers=
while [ "$1" != -- ]; do
  headers="$headers $1"
  shift
done
shift

file=$(mktemp) || exit 2
trap 'rm -f "$file"' EXIT
failed=0
for header in $headers; do
  printf '#include "%s"\n#include "%s"\n' "$header" "$header" >"$file"
  "$@" "$file" || { echo "$header does not compile alone" && failed=1; }
done
exit $failed
