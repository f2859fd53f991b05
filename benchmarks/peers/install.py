#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Installs the released packages of the peers into a folder of their own: benchmarks/peers/install.py FOLDER

Everything goes into a virtual environment and build folders there, nothing anywhere else; what is there already stays.
Writes FOLDER/peers.txt as benchmarks/peers/peer_list.hpp has it. A peer that cannot be installed gets a line with the
reason. ik_llama.cpp has no released package: it is a peer, with and without its `-rtr`, where MOE_IK_GGML names the folder of a
libggml.so that was built from it with -DGGML_MAX_CONTEXTS=4096.
"""
import argparse
import os
import pathlib
import subprocess
import sys
import tarfile

HERE = pathlib.Path(__file__).resolve().parent


class Failure(Exception):
    pass


def last_words(log):
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower()]
    return ((errors or lines or ["no word why"])[-1]).replace("\t", " ")[:200]


class Folder:
    def __init__(self, path):
        self.path = pathlib.Path(path).resolve()
        self.path.mkdir(parents=True, exist_ok=True)
        self.python = str(self.path / "venv" / "bin" / "python")

    def run(self, name, *command):
        """One step of a peer's installation, its output in a log."""
        log = self.path / f"{name}.log"
        with log.open("ab") as to:
            try:
                done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=to, stderr=to, check=False).returncode == 0
            except OSError as error:
                raise Failure(str(error)) from error
        if not done:
            raise Failure(last_words(log))

    def pip(self, name, *words):
        self.run(name, self.python, "-m", "pip", "--disable-pip-version-check", "--no-cache-dir", *words)

    def has(self, *modules):
        names = ", ".join(modules)
        return subprocess.run([self.python, "-c", f"import {names}"], capture_output=True, check=False).returncode == 0


def base(to):
    if not pathlib.Path(to.python).exists():
        to.run("venv", sys.executable, "-m", "venv", str(to.path / "venv"))
    if not to.has("numpy"):
        to.pip("venv", "install", "numpy")


def torch(to):
    # The registry has no smaller build for this platform than the one that can use graphics processors, too.
    if not to.has("torch"):
        to.pip("torch", "install", "torch")
    return {"layer": [to.python, str(HERE / "torch_layer.py")]}


def onnxruntime(to):
    if not to.has("onnxruntime", "onnx"):
        to.pip("onnxruntime", "install", "onnxruntime", "onnx")
    return {"layer": [to.python, str(HERE / "onnxruntime_layer.py")]}


def kt_kernel(to):
    torch(to)
    if not to.has("kt_kernel"):
        # It asks for one old release of PyTorch, of which it uses nothing here but that it can be imported.
        to.pip("kt-kernel", "install", "safetensors", "gguf")
        to.pip("kt-kernel", "install", "--no-deps", "--only-binary", ":all:", "kt-kernel")
        to.run("kt-kernel", to.python, "-c", "import kt_kernel")
    return {"layer": [to.python, str(HERE / "kt_kernel_layer.py")]}


def llama_cpp(to):
    """llama-cpp-python carries the source of llama.cpp, of which ggml is built for this machine."""
    libraries = to.path / "ggml" / "bin"
    if not (libraries / "libggml.so").exists():
        to.pip("llama.cpp", "download", "--no-deps", "--no-binary", "llama-cpp-python", "-d", str(to.path / "llama.cpp"),
               "llama-cpp-python")
        package = max((to.path / "llama.cpp").glob("llama_cpp_python-*.tar.gz"))
        with tarfile.open(package) as source:
            source.extractall(to.path / "llama.cpp")
        parts = [f"-DLLAMA_BUILD_{part}=OFF" for part in ("COMMON", "TESTS", "TOOLS", "EXAMPLES", "SERVER")]
        to.run("llama.cpp", "cmake", "-S", str(package).removesuffix(".tar.gz") + "/vendor/llama.cpp", "-B",
               str(to.path / "ggml"), "-DCMAKE_BUILD_TYPE=Release", "-DBUILD_SHARED_LIBS=ON", *parts)
        to.run("llama.cpp", "cmake", "--build", str(to.path / "ggml"), "--target", "ggml")
    command = ["env", f"MOE_GGML={libraries}", to.python]
    return {"layer": [*command, str(HERE / "llama_cpp_layer.py")],
            "attention": [*command, str(HERE / "llama_cpp_attention.py")]}


def ik_llama_cpp(repack):
    def install(to):
        libraries = pathlib.Path(os.environ["MOE_IK_GGML"]).resolve()
        if not (libraries / "libggml.so").exists():
            raise Failure(f"MOE_IK_GGML: no libggml.so in {libraries}")
        return {"layer": ["env", f"MOE_GGML={libraries}", f"MOE_IK_REPACK={repack}", to.python,
                          str(HERE / "ik_llama_cpp_layer.py")]}

    return install


PEERS = {"onnxruntime": onnxruntime, "torch": torch, "llama.cpp": llama_cpp, "kt-kernel": kt_kernel}
if "MOE_IK_GGML" in os.environ:
    PEERS |= {"ik_llama.cpp": ik_llama_cpp(0), "ik_llama.cpp -rtr": ik_llama_cpp(1)}
CASES = {"llama.cpp": ("layer", "attention")}


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("folder", metavar="FOLDER")
    to = Folder(arguments.parse_args().folder)
    lines = []
    for name, install in PEERS.items():
        print(f"peer {name} ...", end=" ", flush=True)
        try:
            base(to)
            for case, command in install(to).items():
                lines.append(["run", case, name, *command])
            print("there")
        except Failure as why:
            for case in CASES.get(name, ("layer",)):
                lines.append(["lack", case, name, f"not installed: {why}"])
            print(f"not installed: {why}")
    (to.path / "peers.txt").write_text("".join("\t".join(line) + "\n" for line in lines), encoding="utf-8")


if __name__ == "__main__":
    main()
