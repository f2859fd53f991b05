#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Checks both vcpkg manifests for form, strictly, and that every file which states the version states the same."""
import json
import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
NAME = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
SEMVER = re.compile(r"(0|[1-9]\d*)\.(0|[1-9]\d*)\.(0|[1-9]\d*)")
REQUIRED = {"name", "version-semver", "description", "license", "dependencies"}
OPTIONAL = {"homepage", "documentation", "supports", "default-features", "features"}
problems = []


def check(condition, message):
    if not condition:
        problems.append(message)


def unique(pairs):
    keys = [k for k, _ in pairs]
    check(len(keys) == len(set(keys)), f"a key appears twice among {keys}")
    return dict(pairs)


def check_dependencies(where, dependencies):
    names = []
    for entry in dependencies:
        entry = {"name": entry} if isinstance(entry, str) else entry
        check(set(entry) <= {"name", "host", "features", "platform"}, f"{where}: unknown keys in {entry}")
        names.append(entry.get("name", ""))
        check(NAME.fullmatch(names[-1]), f"{where}: '{names[-1]}' is not the name of a port")
    check(names == sorted(set(names)), f"{where}: {names} are not in order, or not unique")
    return names


def check_manifest(path):
    manifest = json.loads((ROOT / path).read_text(encoding="utf-8"), object_pairs_hook=unique)
    check(REQUIRED <= set(manifest), f"{path}: lacks {sorted(REQUIRED - set(manifest))}")
    check(set(manifest) <= REQUIRED | OPTIONAL, f"{path}: unknown keys {sorted(set(manifest) - REQUIRED - OPTIONAL)}")
    check(manifest["name"] == "moe", f"{path}: the name is {manifest['name']}")
    check(SEMVER.fullmatch(manifest["version-semver"]), f"{path}: {manifest['version-semver']} is no semantic version")
    check(manifest["license"] == "Apache-2.0", f"{path}: the licence is {manifest['license']}")
    needs = check_dependencies(path, manifest["dependencies"])
    features = manifest.get("features", {})
    for name, feature in features.items():
        check(NAME.fullmatch(name), f"{path}: '{name}' is not the name of a feature")
        check(set(feature) <= {"description", "dependencies", "supports"}, f"{path}: unknown keys in feature {name}")
        check(feature.get("description"), f"{path}: feature {name} has no description")
        needs += check_dependencies(f"{path}, feature {name}", feature.get("dependencies", []))
    for name in manifest.get("default-features", []):
        check(name in features, f"{path}: the default feature {name} does not exist")
    check("xsimd" in needs, f"{path}: xsimd is not a dependency")
    return manifest["version-semver"]


def stated(path, pattern):
    match = re.search(pattern, (ROOT / path).read_text(encoding="utf-8"), re.MULTILINE)
    check(match, f"{path}: no version found")
    return ".".join(match.groups()) if match else ""


def main():
    versions = {path: check_manifest(path) for path in ("vcpkg.json", "tests/packaging/vcpkg/moe/vcpkg.json")}
    header = "include/moe/version.hpp"
    versions[header] = stated(header, r'MOE_VERSION_STRING "([^"]+)"')
    numbers = stated(header, r"MAJOR (\d+)[^$]*?MINOR (\d+)[^$]*?PATCH (\d+)")
    versions[f"{header}, as numbers"] = numbers
    versions["CHANGELOG.md"] = stated("CHANGELOG.md", r"^## \[(\d\S*)\]")
    if (ROOT / "CITATION.cff").exists():
        versions["CITATION.cff"] = stated("CITATION.cff", r'^version: "?([\d.]+)')
    check(len(set(versions.values())) == 1, f"versions differ: {versions}")
    print("\n".join(problems) or f"both manifests are well formed, and {len(versions)} files say {numbers}")
    sys.exit(bool(problems))


main()
