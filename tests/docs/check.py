#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Holds README.md and docs/ to the files that the tests compile and run.

    tests/docs/check.py          says where they differ
    tests/docs/check.py --fix    writes the blocks anew from the files

A comment on the line before a fence says where the block comes from:
    <!-- from: examples/01_first_layer.cpp -->      the file, without its licence line
    <!-- from: tests/docs/policies.cpp#my_policy -->   what stands between // [my_policy] and // [/my_policy]
    <!-- output of: examples/01_first_layer.cpp -->    examples/01_first_layer.txt, which its test compares with the output
C++ without such a comment, a fence that names no language and a relative link to nothing are errors.
"""
import pathlib
import re
import sys
import textwrap

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
SOURCES = ("examples/", "tests/", "include/", "benchmarks/")
CPP = {"cpp", "c++", "cc", "cxx", "hpp", "c", "cu", "cuda"}
MARKER = re.compile(r"<!-- (from|output of): (\S+?)(?:#(\w+))? -->")
FENCE = re.compile(r"(\s*)(`{3,}|~{3,})\s*([\w+]*)")
REGION = re.compile(r"\s*(?://|#) \[(/?)(\w+)\]")
LICENCE = re.compile(r"(?://|#) SPDX-License-Identifier: .*")
LINK = re.compile(r"\]\(([^()\s]+)(?:\s+\"[^\"]*\")?\)|^\s*\[[^\]]+\]:\s+(\S+)|\b(?:src|href|srcset)=\"([^\"]+)\"")


class CheckError(Exception):
    pass


def region(path, lines, name):
    """The lines between // [name] and // [/name], with their common indentation removed."""
    found = [(i, REGION.fullmatch(line)) for i, line in enumerate(lines)]
    ends = [(i, match.group(1)) for i, match in found if match and match.group(2) == name]
    if [kind for _, kind in ends] != ["", "/"]:
        raise CheckError(f"{path} has no region [{name}] .. [/{name}], or several")
    return textwrap.dedent("\n".join(lines[ends[0][0] + 1:ends[1][0]])).split("\n")


def block_text(root, kind, path, name):
    """The lines that a marker stands for."""
    if not path.startswith(SOURCES) or not (root / path).is_file():
        raise CheckError(f"there is no {path} (blocks come from {', '.join(SOURCES)})")
    if kind == "output of":
        expected = (root / path).with_suffix(".txt")
        if not expected.is_file():
            raise CheckError(f"{path} has no expected output beside it, {expected.name}")
        return expected.read_text(encoding="utf-8").rstrip("\n").split("\n")
    lines = [line for line in (root / path).read_text(encoding="utf-8").split("\n") if not LICENCE.fullmatch(line)]
    if name:
        lines = region(path, lines, name)
    return "\n".join(line for line in lines if not REGION.fullmatch(line)).strip("\n").split("\n")


def slug(heading):
    """The anchor that forges give a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower().replace("`", "")).strip().replace(" ", "-")


def anchors(file):
    text = re.sub(r"^```.*?^```", "", file.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return {slug(heading) for heading in re.findall(r"^#+ +(.*)$", text, re.MULTILINE)}


def check_links(root, page, line):
    for target in (a or b or c for a, b, c in LINK.findall(re.sub(r"`[^`]*`", "", line))):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or root not in [file, *file.parents]:
            yield f"the link to {target} leads nowhere"
        elif anchor and anchor not in anchors(file):
            yield f"{path or page.name} has no heading #{anchor}"


def check_page(root, page):
    """The page as it should be, and what is wrong with it as it is: pairs of line number and message."""
    lines = page.read_text(encoding="utf-8").split("\n")
    result, problems, at = [], [], 0
    while at < len(lines):
        line, marker = lines[at], MARKER.fullmatch(lines[at - 1]) if at else None
        fence = FENCE.match(line)
        if not fence:
            if marker:
                problems.append((at, "a comment of origin stands right before a fence"))
            problems += [(at + 1, message) for message in check_links(root, page, line)]
            result.append(line)
            at += 1
            continue
        indent, ticks, language = fence.groups()
        end = at + 1
        while end < len(lines) and not re.fullmatch(rf"\s*{ticks[0]}{{{len(ticks)},}}\s*", lines[end]):
            end += 1
        if end == len(lines):
            return lines, problems + [(at + 1, "a fence that does not end")]
        body = lines[at + 1:end]
        if marker:
            try:
                wanted = [indent + text if text else "" for text in block_text(root, *marker.groups())]
                if body != wanted:
                    problems.append((at + 1, f"differs from {marker.group(2)}: run tests/docs/check.py --fix"))
                    body = wanted
            except CheckError as error:
                problems.append((at + 1, str(error)))
        elif not language:
            problems.append((at + 1, "a fence names its language (text, sh, cpp, ...)"))
        elif language.lower() in CPP:
            problems.append((at + 1, "C++ comes from a file that the tests compile: <!-- from: path#region -->"))
        result += [line, *body, lines[end]]
        at = end + 1
    return result, problems


def pages(root):
    return [page for page in [root / "README.md", *sorted((root / "docs").rglob("*.md"))] if page.exists()]


def main():
    fix = sys.argv[1:] == ["--fix"]
    if sys.argv[1:] and not fix:
        sys.exit(__doc__)
    found = 0
    for page in pages(ROOT):
        lines, problems = check_page(ROOT, page)
        if fix:
            page.write_text("\n".join(lines), encoding="utf-8")
            problems = check_page(ROOT, page)[1]
        for number, message in problems:
            print(f"{page.relative_to(ROOT)}:{number}: {message}")
        found += len(problems)
    print(f"{len(pages(ROOT))} pages, {found} problems")
    sys.exit(found > 0)


if __name__ == "__main__":
    main()
