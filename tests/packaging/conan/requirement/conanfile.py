# SPDX-License-Identifier: Apache-2.0
"""Stands in for the recipe of xsimd in the public index: packages the headers that the machine has, from $MOE_HEADERS."""
from conan import ConanFile
from conan.tools.files import copy
import os


class InstalledHeaders(ConanFile):
    package_type = "header-library"

    def package(self):
        copy(self, "xsimd/*", os.environ["MOE_HEADERS"], os.path.join(self.package_folder, "include"))

    def package_info(self):
        self.cpp_info.bindirs, self.cpp_info.libdirs = [], []
