#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# run.sh FILE COMMAND...   checks that the command fails on the file as the file's first lines state:
#   // expect: TEXT     what the compiler's output contains; may be repeated
#   // lines: <= N      how long the output is at most; 15 where nothing is said
# and that there is one error and no other.
set -u
file=$1
shift
verdict() {
  echo "$file: $1"
  [ -z "${output:-}" ] || printf '%s\n' "$output"
  exit 1
}

expected=$(sed -n 's|^// expect: ||p' "$file")
limit=$(sed -n 's|^// lines: <= ||p' "$file")
[ -n "$expected" ] || verdict "states no expectation"

output=$(LC_ALL=C "$@" "$file" 2>&1) && verdict "it compiles"
while IFS= read -r text; do
  case $output in *"$text"*) ;; *) verdict "the message lacks: $text" ;; esac
done <<END
$expected
END
errors=$(printf '%s\n' "$output" | grep -c 'error: ')
[ "$errors" -eq 1 ] || verdict "$errors errors, expected one"
lines=$(printf '%s\n' "$output" | wc -l)
[ "$lines" -le "${limit:-15}" ] || verdict "$lines lines, expected at most ${limit:-15}"
echo "fails as stated, in $lines lines"
