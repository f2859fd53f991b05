# SPDX-License-Identifier: Apache-2.0
from conan import ConanFile
from conan.tools.build import check_min_cppstd
from conan.tools.files import copy, load
from conan.tools.layout import basic_layout
import os
import re

required_conan_version = ">=2.1"


class MoeConan(ConanFile):
    name = "moe"
    description = "Mixture-of-Experts layers composed by the compiler"
    license = "Apache-2.0"
    topics = ("mixture-of-experts", "machine-learning", "header-only")
    package_type = "header-library"
    settings = "os", "arch", "compiler", "build_type"
    options = {"with_cpu": [True, False]}
    default_options = {"with_cpu": True}
    options_description = {"with_cpu": "moe::cpu, the backend that uses xsimd"}
    exports_sources = "include/*", "LICENSE"
    no_copy_source = True
    test_package_folder = "tests/packaging/conan/test_package"

    def set_version(self):
        header = load(self, os.path.join(self.recipe_folder, "include", "moe", "version.hpp"))
        self.version = self.version or re.search(r'MOE_VERSION_STRING "([^"]+)"', header).group(1)

    def requirements(self):
        if self.options.with_cpu:
            self.requires("xsimd/[>=8.1 <15]")

    def validate(self):
        check_min_cppstd(self, 20)

    def layout(self):
        basic_layout(self)

    def package(self):
        copy(self, "LICENSE", self.source_folder, os.path.join(self.package_folder, "licenses"))
        copy(self, "*.*h*", os.path.join(self.source_folder, "include"), os.path.join(self.package_folder, "include"))

    def package_id(self):
        self.info.clear()

    def package_info(self):
        self.cpp_info.set_property("cmake_file_name", "moe")
        self.cpp_info.set_property("cmake_target_name", "moe::everything")
        self.cpp_info.set_property("cmake_components", ["moe", "cpu"] if self.options.with_cpu else ["moe"])
        core = self.cpp_info.components["core"]
        core.set_property("cmake_target_name", "moe::moe")
        core.set_property("pkg_config_name", "moe")
        if self.options.with_cpu:
            cpu = self.cpp_info.components["cpu"]
            cpu.set_property("cmake_target_name", "moe::cpu")
            cpu.set_property("pkg_config_name", "moe-cpu")
            cpu.requires = ["core", "xsimd::xsimd"]
        for component in self.cpp_info.components.values():
            component.bindirs, component.libdirs = [], []
