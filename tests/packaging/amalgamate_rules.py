#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""What single_include/amalgamate.py writes and what it refuses, on small trees."""
import pathlib
import sys
import tempfile
import unittest

sys.dont_write_bytecode = True
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent.parent / "single_include"))
import amalgamate  # noqa: E402

VERSION = '#pragma once\n#define MOE_VERSION_STRING "1.2.3"\n'


def build(files):
    """The outputs for a tree of {path below moe/: text after #pragma once}."""
    files = {"moe.hpp": '#include "moe/version.hpp"\n', "backend/cpu.hpp": '#include "moe/version.hpp"\n'} | files
    with tempfile.TemporaryDirectory() as folder:
        include = pathlib.Path(folder)
        for path, text in files.items():
            file = include / "moe" / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(f"{amalgamate.SPDX}\n#pragma once\n{text}")
        (include / "moe/version.hpp").write_text(VERSION)
        return amalgamate.amalgamate(include)


class Writes(unittest.TestCase):
    def test_a_header_stands_once_and_after_those_it_includes(self):
        text = build({"moe.hpp": '#include "moe/b.hpp"\n#include "moe/a.hpp"\n#include "moe/version.hpp"\n',
                      "a.hpp": "int a;\n", "b.hpp": '#include "moe/a.hpp"\nint b = a;\n'})["moe/moe.hpp"]
        self.assertEqual(text.count("int a;"), 1)
        self.assertLess(text.index("int a;"), text.index("int b = a;"))
        self.assertNotIn("pragma once", text)
        self.assertEqual(text.count("SPDX"), 1)
        self.assertIn("moe 1.2.3", text)

    def test_includes_outside_conditionals_are_collected_and_those_inside_stay(self):
        text = build({"moe.hpp": '#include <vector>\n#include "moe/a.hpp"\n#include "moe/version.hpp"\nint m;\n',
                      "a.hpp": "#include <array>\n#include <vector>\nint a;\n"
                               "#if defined(_OPENMP)\n#include <omp.h>\n#endif\n"})["moe/moe.hpp"]
        self.assertIn("#include <array>\n#include <vector>\n\n", text)
        self.assertEqual(text.count("<vector>"), 1)
        self.assertIn("int a;\n#if defined(_OPENMP)\n#include <omp.h>\n#endif\n", text)

    def test_the_cpu_output_includes_the_first_and_holds_the_rest(self):
        texts = build({"moe.hpp": '#include "moe/a.hpp"\n#include "moe/version.hpp"\n', "a.hpp": "int a;\n",
                       "backend/cpu.hpp": '#include "moe/a.hpp"\n#include "moe/backend/cpu/b.hpp"\nint c = a;\n',
                       "backend/cpu/b.hpp": "#include <xsimd/xsimd.hpp>\nint b;\n"})
        text = texts["moe/backend/cpu.hpp"]
        self.assertIn('#include "../moe.hpp"\n\n#include <xsimd/xsimd.hpp>\n', text)
        self.assertIn("int b;", text)
        self.assertNotIn("int a;", text)
        self.assertNotIn("int b;", texts["moe/moe.hpp"])

    def test_the_first_output_holds_what_the_umbrella_leaves_out_for_its_cost(self):
        self.assertIn("int x;", build({"io/file.hpp": "int x;\n"})["moe/moe.hpp"])

    def test_the_hash_changes_with_the_text_and_nothing_else(self):
        self.assertEqual(build({}), build({}))
        umbrella = '#include "moe/a.hpp"\n#include "moe/version.hpp"\n'
        texts = [build({"moe.hpp": umbrella, "a.hpp": blank}) for blank in ("", "\n")]
        self.assertNotEqual(*(text["moe/moe.hpp"].split("\n")[3] for text in texts))


class Refuses(unittest.TestCase):
    def refuses(self, message, files):
        with self.assertRaisesRegex(amalgamate.TreeError, message):
            build(files)

    def test_own_includes_inside_a_conditional(self):
        self.refuses("a.hpp:4: .* conditional", {"moe.hpp": '#include "moe/a.hpp"\n',
                                                 "a.hpp": '#if X\n#include "moe/version.hpp"\n#endif\n'})

    def test_own_includes_that_are_indented(self):
        self.refuses("moe.hpp:3: .* column 0", {"moe.hpp": ' #include "moe/version.hpp"\n'})

    def test_includes_after_code(self):
        self.refuses("moe.hpp:4: .* before any code", {"moe.hpp": 'int x;\n#include "moe/version.hpp"\n'})
        self.refuses("moe.hpp:4: .* before any code", {"moe.hpp": "#define X\n#include <vector>\n"})

    def test_own_includes_in_angle_brackets_and_relative_ones(self):
        self.refuses('moe.hpp:3: .* not <moe/version.hpp>', {"moe.hpp": "#include <moe/version.hpp>\n"})
        self.refuses('moe.hpp:3: .* not "version.hpp"', {"moe.hpp": '#include "version.hpp"\n'})

    def test_cycles(self):
        self.refuses("moe/a.hpp -> moe/b.hpp -> moe/a.hpp",
                     {"moe.hpp": '#include "moe/a.hpp"\n', "a.hpp": '#include "moe/b.hpp"\n',
                      "b.hpp": '#include "moe/a.hpp"\n'})

    def test_headers_that_the_umbrella_or_the_cpu_backend_forgets(self):
        self.refuses("moe/moe.hpp does not reach moe/router/lost.hpp", {"router/lost.hpp": "int x;\n"})
        self.refuses("moe/backend/cpu.hpp does not reach moe/backend/cpu/lost.hpp", {"backend/cpu/lost.hpp": "int x;\n"})

    def test_third_party_headers_outside_the_accelerated_backends(self):
        self.refuses("moe/a.hpp is part of .*xsimd/xsimd.hpp",
                     {"moe.hpp": '#include "moe/a.hpp"\n#include "moe/version.hpp"\n', "a.hpp": "#include <xsimd/xsimd.hpp>\n"})
        self.refuses("moe/backend/cpu.hpp is part of", {"io/file.hpp": '#include "moe/backend/cpu.hpp"\n'})

    def test_headers_that_do_not_exist(self):
        self.refuses("moe/moe.hpp: there is no moe/a.hpp", {"moe.hpp": '#include "moe/a.hpp"\n'})

    def test_headers_without_pragma_once(self):
        with tempfile.TemporaryDirectory() as folder:
            (pathlib.Path(folder) / "moe").mkdir()
            (pathlib.Path(folder) / "moe/moe.hpp").write_text("int x;\n")
            with self.assertRaisesRegex(amalgamate.TreeError, "no #pragma once"):
                amalgamate.amalgamate(pathlib.Path(folder))


unittest.main()
