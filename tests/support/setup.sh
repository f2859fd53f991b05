# SPDX-License-Identifier: Apache-2.0
# Sourced by tests/run and examples/run: what both need to know about the machine.
# `want PACKAGE CHECK...` notes the Debian package where the check fails; `provide` installs what was noted.
wanted=
apt_options=

have_command() { command -v "$1" >/dev/null 2>&1; }

# A header where compilers and CMake look, with the folders a user has added.
have_header() {
  for dir in /usr/include /usr/local/include $(printf '%s' "${CPATH:-}" | tr ':' ' ') \
    $(printf '%s' "${CMAKE_PREFIX_PATH:-}" | tr ':;' '\n\n' | sed 's|$|/include|'); do
    if [ -e "$dir/$1" ] || [ -e "$dir/eigen3/$1" ]; then return 0; fi
  done
  return 1
}

have_cmake() {
  version=$(cmake --version 2>/dev/null | sed -n '1s/[^0-9]*\([0-9]*\.[0-9]*\).*/\1/p')
  [ -n "$version" ] && [ $((${version%.*} * 1000 + ${version#*.})) -ge 3025 ]
}

have_python_module() { python3 -c "import $1" >/dev/null 2>&1; }

have_generator() { have_command ninja || have_command make; }

have_files() { ls $1 >/dev/null 2>&1; }

want() {
  package=$1
  shift
  "$@" || wanted="$wanted $package"
}

want_build_tools() {
  want g++ have_command "${CXX:-c++}"
  want cmake have_cmake
  want ninja-build have_generator
  want libxsimd-dev have_header xsimd/xsimd.hpp
}

# What the main demonstration reads. Images of minimal systems tell dpkg to leave manual pages out: they are brought back,
# also in packages that have lost them.
want_texts() {
  apt_options=" --reinstall -o Dpkg::Options::=--path-include=/usr/share/man/*"
  want bible-kjv have_command bible
  want bible-kjv-text have_files /usr/lib/bible.data
  want manpages-fr have_files /usr/share/man/fr/man7/ascii.7.gz
  want manpages-de have_files /usr/share/man/de/man7/ascii.7.gz
}

# Installs what `requirements`, a function of the caller, finds missing.
provide() {
  requirements
  [ -n "$wanted" ] || return 0
  install="apt-get install -y --no-install-recommends$apt_options$wanted"
  if ! have_command apt-get; then
    echo "Missing; by their names in Debian 12:$wanted" >&2
    exit 1
  elif [ "$(id -u)" -eq 0 ]; then
    as_root="env"
  elif have_command sudo && sudo -n true 2>/dev/null; then
    as_root="sudo env"
  else
    echo "Missing packages, which only root may install. Type this, then run $0 again:" >&2
    echo "  sudo apt-get update && sudo $install" >&2
    exit 1
  fi
  echo "Installing:$wanted"
  log=$(mktemp)
  set -f
  if ! { $as_root apt-get update && $as_root DEBIAN_FRONTEND=noninteractive $install; } </dev/null >"$log" 2>&1; then
    tail -n 20 "$log" >&2
    exit 1
  fi
  set +f
  rm -f "$log"
  wanted=
  requirements
  [ -z "$wanted" ] || { echo "Still missing after installing:$wanted" >&2; exit 1; }
}

# All cores for a build and its tests, and Ninja where it is; what the user has set stays.
use_machine() {
  cores=$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
  export CMAKE_BUILD_PARALLEL_LEVEL="${CMAKE_BUILD_PARALLEL_LEVEL:-$cores}"
  export CTEST_PARALLEL_LEVEL="${CTEST_PARALLEL_LEVEL:-$cores}"
  if have_command ninja; then export CMAKE_GENERATOR="${CMAKE_GENERATOR:-Ninja}"; fi
}
