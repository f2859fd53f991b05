#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# refusals.sh CMAKE PREFIX WORK: what find_package(moe) refuses, and how it says so.
set -eu
cmake=$1 prefix=$2 work=$3
rm -rf "$work"
mkdir -p "$work"

configure() {
  printf 'cmake_minimum_required(VERSION 3.25)\nproject(consumer LANGUAGES NONE)\nfind_package(moe %s)\n' "$1" \
    >"$work/CMakeLists.txt"
  "$cmake" -S "$work" -B "$work/build" -DCMAKE_PREFIX_PATH="$prefix" >"$work/log" 2>&1
}
refuses() {
  if configure "$1"; then echo "find_package(moe $1) was accepted" && exit 1; fi
  tr -s ' \n' ' ' <"$work/log" >"$work/line"
  grep -qF "$2" "$work/line" || { echo "find_package(moe $1) does not say '$2':" && cat "$work/log" && exit 1; }
}

configure "REQUIRED"
configure "REQUIRED COMPONENTS moe"
configure "REQUIRED OPTIONAL_COMPONENTS nonsense"
refuses "REQUIRED COMPONENTS nonsense" "there is no component nonsense, only moe, cpu, cuda and kernels"
refuses "99.0 REQUIRED" 'compatible with requested version "99.0"'
refuses "0.0.1 REQUIRED" 'compatible with requested version "0.0.1"'
