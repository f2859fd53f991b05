#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""What tests/docs/check.py accepts and what it finds, on small pages."""
import pathlib
import sys
import tempfile
import unittest

sys.dont_write_bytecode = True
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))
import check  # noqa: E402

SOURCE = "// SPDX-License-Identifier: Apache-2.0\n#include <cstdio>\n\n  // [part]\n  int a;\n    int b;\n  // [/part]\n"


def examine(page):
    """The page as it should be, and the messages."""
    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder).resolve()
        (root / "examples").mkdir()
        (root / "examples/a.cpp").write_text(SOURCE)
        (root / "examples/a.txt").write_text("1 2\n3\n")
        (root / "README.md").write_text(page)
        lines, problems = check.check_page(root, root / "README.md")
        return "\n".join(lines), [f"{number}: {message}" for number, message in problems]


class Blocks(unittest.TestCase):
    def accepts(self, page):
        self.assertEqual(examine(page), (page, []))

    def finds(self, message, page):
        problems = examine(page)[1]
        self.assertEqual(len(problems), 1, problems)
        self.assertIn(message, problems[0])

    def test_a_block_equal_to_its_file_its_region_or_its_output_is_accepted(self):
        self.accepts("<!-- from: examples/a.cpp -->\n```cpp\n#include <cstdio>\n\n  int a;\n    int b;\n```\n")
        self.accepts("<!-- from: examples/a.cpp#part -->\n```cpp\nint a;\n  int b;\n```\n")
        self.accepts("<!-- output of: examples/a.cpp -->\n```text\n1 2\n3\n```\n")

    def test_a_block_that_differs_is_found_and_written_anew(self):
        page = "# x\n<!-- from: examples/a.cpp#part -->\n```cpp\nint c;\n```\nend\n"
        self.finds("3: differs from examples/a.cpp", page)
        self.accepts(examine(page)[0])
        self.finds("2: differs from examples/a.cpp", "<!-- output of: examples/a.cpp -->\n```text\n1 2\n4\n```\n")

    def test_cpp_without_an_origin_is_found(self):
        for fence in ("```cpp", "``` c++", "~~~cpp", "  ```C++"):
            self.finds("1: C++ comes from a file", f"{fence}\nint a;\n{fence.strip()[:3]}\n")
        self.finds("names its language", "```\nint a;\n```\n")
        self.accepts("```sh\nls\n```\n")

    def test_a_wrong_origin_is_found(self):
        self.finds("there is no examples/b.cpp", "<!-- from: examples/b.cpp -->\n```cpp\n```\n")
        self.finds("no region [whole]", "<!-- from: examples/a.cpp#whole -->\n```cpp\n```\n")
        self.finds("right before a fence", "<!-- from: examples/a.cpp -->\n\ntext\n")
        self.finds("does not end", "```sh\nls\n")

    def test_relative_links_and_anchors_have_to_resolve(self):
        self.accepts("# A `b` c\n[a](examples/a.cpp) [b](#a-b-c) [c](https://example.org/x) `[d](nowhere)`\n")
        self.finds("1: the link to docs/x.md leads nowhere", "[x](docs/x.md)\n")
        self.finds("the link to ../README.md leads nowhere", "[x](../README.md)\n")
        self.finds("the link to x.svg leads nowhere", '<img src="x.svg">\n')
        self.finds("has no heading #b", "# A\n[x](#b)\n")


unittest.main()
