"""Build of reclip_d2; everything that is not code is in pyproject.toml.

``pip install -e . --no-build-isolation`` and ``python setup.py develop`` do the same: they build the extension
reclip_d2._C from csrc, for the CPU and, if nvcc and a CUDA build of torch are found, for CUDA. Settings:

    FORCE_CPU=1           build for the CPU only
    FORCE_CUDA=1          require CUDA: fail instead of building a CPU-only extension
    TORCH_CUDA_ARCH_LIST  GPU architectures (default: "7.5;8.0;9.0+PTX")
    MAX_JOBS              number of parallel compilers, torch's own setting
    NO_EXTENSION=1        build no extension: plain PyTorch is used, which is slower
    CXX                   the C++ compiler (default: c++); its OpenMP flags are detected

``pip install -v`` shows compiler output, such as nvcc's report of registers and spills per kernel.
"""

import ctypes
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import setuptools
from setuptools import Command, Extension, setup
from setuptools.command.build_py import build_py
from setuptools.errors import CCompilerError

ROOT = Path(__file__).resolve().parent
DEFAULT_ARCHITECTURES = "7.5;8.0;9.0+PTX"
if int(setuptools.__version__.split(".")[0]) < 77:  # older ones cannot read pyproject.toml, with a long error
    sys.exit(f"error: setuptools {setuptools.__version__} is too old: pip install --upgrade setuptools wheel")


class Develop(Command):
    """``python setup.py develop``: an editable install through pip, without build isolation.

    Since release 80, setuptools' own command calls pip with build isolation, which hides the installed torch; older
    releases fetch requirements with easy_install. This command works the same with all releases.
    """

    description = "install in editable mode (pip install --no-build-isolation -e .)"
    user_options: ClassVar = [("no-deps", "N", "do not install the requirements")]
    boolean_options: ClassVar = ["no-deps"]

    def initialize_options(self) -> None:
        """Set the options' defaults."""
        self.no_deps = False

    def finalize_options(self) -> None:
        """Nothing to derive."""

    def run(self) -> None:
        """Call pip of the running interpreter; its exit status becomes ours."""
        command = [sys.executable, "-m", "pip", "install", "--no-build-isolation"]
        command += ["--no-deps"] * bool(self.no_deps) + ["--editable", "."]
        status = subprocess.call(command)
        if status:
            sys.exit(status)


class BuildPackage(build_py):
    """Copies ``configs`` from the top of the checkout into the installed package, where programs find it. Editable
    installs use the checkout's."""

    def run(self) -> None:
        """Build the package, then copy."""
        super().run()
        if self.editable_mode:
            return
        shutil.copytree(ROOT / "configs", Path(self.build_lib) / "reclip_d2" / "configs", dirs_exist_ok=True)


def flag(name: str) -> bool:
    """Whether an environment variable is set to something other than 0."""
    return os.environ.get(name, "0") not in ("", "0")


def find_cuda_home() -> str | None:
    """The folder of the CUDA toolkit: CUDA_HOME, or as reported by nvcc, or /usr/local/cuda.

    torch takes the parent of nvcc's folder, which is wrong if the nvcc on the PATH is a script that calls another.
    """
    if os.environ.get("CUDA_HOME"):
        return os.environ["CUDA_HOME"]
    nvcc = shutil.which("nvcc")
    if nvcc:
        command = [nvcc, "--dryrun", "-x", "cu", "-c", os.devnull, "-o", os.devnull]
        report = subprocess.run(command, capture_output=True, text=True, check=False).stderr
        top = re.search(r"^#\$ TOP=(.+)$", report, re.MULTILINE)
        if top:
            return str(Path(top.group(1).strip()).resolve())
    return "/usr/local/cuda" if Path("/usr/local/cuda/bin/nvcc").exists() else None


def why_no_cuda(cuda_home: str | None) -> str | None:
    """The reason why the extension cannot be built for CUDA, or None if it can."""
    import torch

    if torch.version.cuda is None:
        return "the installed torch was built without CUDA"
    nvcc = Path(cuda_home or "/nowhere") / "bin" / "nvcc"
    if not nvcc.exists():
        return "nvcc was not found (set CUDA_HOME to the folder of the CUDA toolkit)"
    report = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False).stdout
    found = re.search(r"release (\d+)\.", report)
    if found is None or found.group(1) != torch.version.cuda.split(".")[0]:
        version = found.group(1) if found else "unknown"
        return f"nvcc is from CUDA {version} but torch from CUDA {torch.version.cuda}"
    return None


def extensions() -> list[Extension]:
    """The extension reclip_d2._C, or nothing if it is not wanted."""
    if flag("NO_EXTENSION"):
        return []
    if sys.platform == "win32":
        print("reclip_d2._C: not built: Windows is not supported outside WSL; plain PyTorch is used, which is slower")
        return []
    cuda_home = find_cuda_home()
    if cuda_home:
        os.environ["CUDA_HOME"] = cuda_home  # read when torch.utils.cpp_extension is imported
    try:
        from torch.utils.cpp_extension import CppExtension, CUDAExtension, get_cxx_compiler
    except ImportError:
        sys.exit(
            "error: torch must be installed before reclip_d2 is built: pip install torch, then --no-build-isolation"
        )
    compiler = get_cxx_compiler()
    if shutil.which(compiler.split()[0]) is None:
        sys.exit(f"error: no C++ compiler ({compiler}): install one, name it with CXX, or set NO_EXTENSION=1")
    sources = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").glob("**/*.cpp"))
    cuda_sources = [path for path in sources if path.endswith("_cuda_host.cpp")]
    cuda_sources += sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").glob("**/*.cu"))
    sources = [path for path in sources if path not in cuda_sources]
    # No -std: torch's builder adds the standard that its headers need (C++20 since torch 2.14).
    # No -march: the tiles of csrc/cpu are compiled for several instruction sets and chosen at run time.
    compile_args = {"cxx": ["-O3", "-Wall", "-fvisibility=hidden"]}
    reason = "FORCE_CPU is set" if flag("FORCE_CPU") else why_no_cuda(cuda_home)
    if reason is not None:
        if flag("FORCE_CUDA"):
            sys.exit(f"error: FORCE_CUDA is set, but {reason}")
        print(f"reclip_d2._C: built for the CPU only: {reason}")
        return [CppExtension("reclip_d2._C", sources, extra_compile_args=compile_args)]
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", DEFAULT_ARCHITECTURES)
    print(f"reclip_d2._C: built for the CPU and for CUDA architectures {os.environ['TORCH_CUDA_ARCH_LIST']}")
    compile_args["nvcc"] = ["-O3", "-Xptxas", "-v", "--expt-relaxed-constexpr", "-lineinfo"]
    # Only headers of the CUDA runtime are needed (not ATen/cuda, which includes cuBLAS and others), so a CUDA folder
    # with nvcc and the runtime is enough.
    return [CUDAExtension("reclip_d2._C", sources + cuda_sources, extra_compile_args=compile_args)]


OPENMP_PROBE = """
#include <omp.h>
#ifndef _OPENMP
#error "no OpenMP"
#endif
extern "C" int reclip_probe() {
  int sum = 0;
#pragma omp parallel reduction(+ : sum)
  sum += omp_get_num_threads() > 0;
  return sum;
}
"""
# The flags of GCC and Clang, and of Apple's Clang, which rejects the first.
OPENMP_FLAGS = (["-fopenmp"], ["-Xpreprocessor", "-fopenmp"])


def openmp_flags(compile_command: list[str], link: Callable[[Path, Path], None], scratch: Path) -> list[str]:
    """The OpenMP flags for at::parallel_for, or none if it must run on one thread.

    OpenMP is not linked, so that the extension uses the library that torch has loaded: two of them in one process
    compete for cores and may crash. Not every compiler's code is compatible with torch's library (Clang's is not with
    GCC's libgomp), so a probe is compiled, linked and loaded the way the extension will be.

    Args:
        compile_command: the compiler and its flags, without those of OpenMP.
        link: links an object file (the first argument) to a shared library with torch's libraries.
        scratch: an empty folder.
    """
    import torch  # noqa: F401  (its OpenMP library must be loaded before the probe)

    source = scratch / "openmp_probe.cpp"
    source.write_text(OPENMP_PROBE, encoding="utf-8")
    for number, flags in enumerate(OPENMP_FLAGS):
        made, library = scratch / f"probe{number}.o", scratch / f"probe{number}.so"
        command = [*compile_command, *flags, "-fPIC", "-c", str(source), "-o", str(made)]
        if subprocess.run(command, capture_output=True, check=False).returncode != 0:
            continue
        try:
            link(made, library)
            ctypes.CDLL(str(library)).reclip_probe()
        except (CCompilerError, OSError, AttributeError):
            continue
        return flags
    return []


def build_commands() -> dict[str, type[Command]]:
    """The commands of this build; torch's command compiles the extension."""
    commands = {"develop": Develop, "build_py": BuildPackage}
    if flag("NO_EXTENSION") or sys.platform == "win32":
        return commands
    from torch.utils.cpp_extension import BuildExtension, get_cxx_compiler, include_paths, library_paths

    class BuildKernels(BuildExtension):
        """torch's builder, with the OpenMP flags that work with its compiler."""

        def build_extensions(self) -> None:
            """Detect the flags, then build."""
            compile_command = get_cxx_compiler().split() if self.use_ninja else self._compiler_of_distutils()
            headers = [part for folder in include_paths() for part in ("-isystem", folder)]
            with tempfile.TemporaryDirectory(prefix="reclip-openmp-") as scratch:
                flags = openmp_flags([*compile_command, *headers], self._link_probe, Path(scratch))
            if not flags:
                print("reclip_d2._C: built without OpenMP: the CPU kernels run on one thread")
            for extension in self.extensions:
                extension.extra_compile_args["cxx"] += flags
            super().build_extensions()

        def _compiler_of_distutils(self) -> list[str]:
            return list(getattr(self.compiler, "compiler_so_cxx", None) or self.compiler.compiler_so)

        def _link_probe(self, made: Path, library: Path) -> None:
            folders = library_paths()
            self.compiler.link_shared_object(
                [str(made)],
                str(library),
                libraries=["c10", "torch", "torch_cpu"],
                library_dirs=folders,
                runtime_library_dirs=folders,
                target_lang="c++",
            )

    return {**commands, "build_ext": BuildKernels}


setup(ext_modules=extensions(), cmdclass=build_commands())
