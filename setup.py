"""Builds grpo_kernels._native (csrc/, bound with pybind11) and, where it is asked for, _cuda.so; without PyTorch. Everything else
stands in pyproject.toml.

GRPO_KERNELS_BUILD_CUDA=1 builds the CUDA C++ kernels for every architecture, which takes minutes; =native for the GPUs of this
machine. Without it, or with auto or 0, they are not built: `grpo-kernels doctor --build-cuda` builds them later.

GRPO_KERNELS_CXXFLAGS="-O1 -g" overrides the flags that _native is compiled with, and also links it: for a debugger or a sanitizer.

An install never fails for want of a compiler, unless the CUDA C++ kernels were asked for: what was built, or why nothing was, goes
into grpo_kernels/_build_info.json, which `grpo-kernels doctor` reads.
"""

import importlib.util
import json
import os
import platform
import shlex
import shutil
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

EXTRA = shlex.split(os.environ.get("GRPO_KERNELS_CXXFLAGS", ""))
FLAGS = [
    "-std=c++17",
    "-O3",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-g0",
    "-Wno-maybe-uninitialized",  # GCC 12 warns about its own intrinsics header
    *EXTRA,
]
X86_64 = platform.machine().lower() in ("x86_64", "amd64") and sys.maxsize > 2**32
AVX2 = ["-mavx2", "-mfma"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
AMX = [*AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"]
# row_kernels_cpu.cpp and products_cpu.cpp are compiled once for each: name, bytes of a vector register, flags
VARIANTS = [("baseline", 16, [])] + ([("avx2", 32, AVX2), ("avx512", 64, AVX512)] if X86_64 else [])
INFO = "_build_info.json"
BUILD_CUDA = os.environ.get("GRPO_KERNELS_BUILD_CUDA", "auto")
if BUILD_CUDA not in ("auto", "0", "1", "native"):
    sys.exit(f"GRPO_KERNELS_BUILD_CUDA must be auto, 0, 1 or native, got {BUILD_CUDA!r}")


def load(path):
    """A module of the package by its path: importing the package would import PyTorch."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


build_cuda = load(Path(__file__).parent / "grpo_kernels" / "build_cuda.py")


class BuildNative(build_ext):
    def build_extension(self, ext):
        info = {"compiler": None, "flags": FLAGS, "isas": [], "openmp": False, "cuda": None, "error": None, "cuda_error": None}
        info["sources"] = build_cuda.fingerprint(Path("csrc"), build_cuda.CPU_SOURCES)
        library = Path(self.get_ext_fullpath(ext.name))
        library.unlink(missing_ok=True)  # of an earlier build: it must not outlive a compiler that fails now
        try:
            self.build_native(ext, info)
        except Exception as error:  # of the compiler or its absence: the package works without, and says so
            info["error"] = f"{type(error).__name__}: {error}"
            print(f"grpo-kernels: no compiled kernels, {info['error']}", file=sys.stderr)
        path = self.info_path(library)
        path.parent.mkdir(parents=True, exist_ok=True)
        self.build_cuda(path.parent, info)
        path.write_text(json.dumps(info, indent=2) + "\n")

    def build_cuda(self, package, info):
        """The CUDA kernels beside the extension; in a wheel all sources: to build them later, and to know those of a library."""
        library, in_place = package / build_cuda.LIBRARY, package.resolve() == build_cuda.PACKAGE.resolve()
        if BUILD_CUDA in ("1", "native"):
            try:
                only = build_cuda.present() if BUILD_CUDA == "native" else ()
                info["cuda"] = build_cuda.build(library, Path("csrc"), only)
            except build_cuda.BuildError as error:
                sys.exit(f"GRPO_KERNELS_BUILD_CUDA={BUILD_CUDA}: {error}")
        else:
            info["cuda_error"] = f"not asked for at install, GRPO_KERNELS_BUILD_CUDA={BUILD_CUDA}"
            if not in_place:
                library.unlink(missing_ok=True)  # of an earlier build in the same folder
        if not in_place:
            (package / "csrc").mkdir(exist_ok=True)
            for name in {*build_cuda.SOURCES, *build_cuda.CPU_SOURCES}:
                shutil.copyfile(Path("csrc", name), package / "csrc" / name)

    def build_native(self, ext, info):
        compiler = getattr(self.compiler, "compiler_so_cxx", None) or getattr(self.compiler, "compiler_so", None)
        info["compiler"] = " ".join(compiler) if compiler else self.compiler.compiler_type
        openmp = ["-fopenmp"] if self.accepts(["-fopenmp"]) else []
        info["openmp"] = bool(openmp)
        amx = X86_64 and sys.platform == "linux" and self.accepts(AMX)
        x86 = [("GRPO_KERNELS_X86_VARIANTS", None)] if X86_64 else []
        x86 += [("GRPO_KERNELS_AMX", None)] if amx else []

        def variant(source, name, width, flags):
            return source, name, [*FLAGS, *openmp, *flags], [("GK_ISA", name), ("GK_VECTOR_BYTES", width), *x86]

        jobs = [variant("csrc/products_cpu.cpp", "amx", 64, AMX)] if amx else []
        jobs += [variant(f"csrc/{kernels}_cpu.cpp", *each) for kernels in ("products", "row_kernels") for each in VARIANTS]
        macros = [("GRPO_SOURCES", f'"{info["sources"]}"'), *x86]
        jobs.append(("csrc/bindings.cpp", "bindings", FLAGS, macros))

        def compile_one(job):
            source, name, flags, macros = job
            return self.compiler.compile(
                [source],
                output_dir=str(Path(self.build_temp, name)),
                macros=macros,
                include_dirs=ext.include_dirs,
                extra_postargs=flags,
                depends=ext.depends,
            )

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = [o for made in pool.map(compile_one, jobs) for o in made]
        self.compiler.link_shared_object(
            objects,
            self.get_ext_fullpath(ext.name),
            extra_postargs=openmp + EXTRA,
            target_lang="c++",
            build_temp=self.build_temp,
        )
        info["isas"] = [name for name, *_ in VARIANTS] + (["amx"] if amx else [])

    def accepts(self, flags):
        """Whether the compiler builds and links an empty program with these flags."""
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "probe.cpp")
            source.write_text("int main() { return 0; }\n")
            try:
                objects = self.compiler.compile([str(source)], output_dir=folder, extra_postargs=flags)
                self.compiler.link_executable(objects, str(Path(folder, "probe")), extra_postargs=flags, target_lang="c++")
            except Exception:
                return False
        return True

    @staticmethod
    def info_path(library):
        return Path(library).with_name(INFO)

    def copy_extensions_to_source(self):
        super().copy_extensions_to_source()
        build_py = self.get_finalized_command("build_py")
        for ext in self.extensions:
            target, source = self._get_inplace_equivalent(build_py, ext)
            shutil.copyfile(self.info_path(source), self.info_path(target))
            if not Path(source).exists():
                Path(target).unlink(missing_ok=True)
            library = Path(source).with_name(build_cuda.LIBRARY)
            if library.exists():
                shutil.copyfile(library, Path(target).with_name(build_cuda.LIBRARY))


setup(
    cmdclass={"build_ext": BuildNative},
    ext_modules=[
        Extension(
            "grpo_kernels._native",
            sources=["csrc/bindings.cpp", "csrc/row_kernels_cpu.cpp", "csrc/products_cpu.cpp"],
            depends=[str(path) for path in sorted(Path("csrc").glob("*.h"))],
            include_dirs=["csrc", pybind11.get_include()],
            language="c++",
            optional=True,
        )
    ],
)
