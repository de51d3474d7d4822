"""Build of reclip_d2; everything that is not code to run at build time stands in pyproject.toml.

``pip install -e . --no-build-isolation`` and ``python setup.py develop`` do the same: they build the extension
reclip_d2._C from csrc, for the CPU and, where nvcc and a CUDA build of torch are found, for CUDA. Settings:

    FORCE_CPU=1           build for the CPU only
    FORCE_CUDA=1          building for CUDA is a must: an error instead of a CPU-only extension
    TORCH_CUDA_ARCH_LIST  GPU architectures, "7.5;8.0;9.0+PTX" if it is not set
    MAX_JOBS              compilers at a time, torch's own setting
    NO_EXTENSION=1        no extension at all: plain PyTorch serves, slower

Compiler output, such as nvcc's report of registers and spills for each kernel, shows with ``pip install -v``.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

from setuptools import Command, Extension, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
DEFAULT_ARCHITECTURES = "7.5;8.0;9.0+PTX"


class Develop(Command):
    """``python setup.py develop``: an editable install through pip, without build isolation.

    From release 80 on setuptools' own command calls pip with build isolation, where the installed torch is
    out of sight; older ones fetch requirements with easy_install. This one is the same under all of them.
    """

    description = "install in editable mode (pip install --no-build-isolation -e .)"
    user_options: ClassVar = [("no-deps", "N", "do not install the requirements")]
    boolean_options: ClassVar = ["no-deps"]

    def initialize_options(self) -> None:
        """Set the defaults of the options."""
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
    """Puts ``configs`` and ``train_net.py``, which stand at the top of the checkout, into the installed package, where
    the command ``reclip`` finds them. An editable install has them in the checkout."""

    def run(self) -> None:
        """Build the package, then copy."""
        super().run()
        if self.editable_mode:
            return
        package = Path(self.build_lib) / "reclip_d2"
        shutil.copytree(ROOT / "configs", package / "configs", dirs_exist_ok=True)
        shutil.copy(ROOT / "train_net.py", package / "train_net.py")


def flag(name: str) -> bool:
    """Whether an environment variable is set to something other than 0."""
    return os.environ.get(name, "0") not in ("", "0")


def find_cuda_home() -> str | None:
    """The folder of the CUDA toolkit: CUDA_HOME, or what nvcc itself says, or /usr/local/cuda.

    torch takes the parent of nvcc's folder, which is wrong where the nvcc on the PATH is a script that calls another.
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
        return "the installed torch is a build without CUDA"
    nvcc = Path(cuda_home or "/nowhere") / "bin" / "nvcc"
    if not nvcc.exists():
        return "no nvcc was found (CUDA_HOME names the folder of the CUDA toolkit)"
    report = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False).stdout
    found = re.search(r"release (\d+)\.", report)
    if found is None or found.group(1) != torch.version.cuda.split(".")[0]:
        version = found.group(1) if found else "unknown"
        return f"nvcc is of CUDA {version} but torch of CUDA {torch.version.cuda}"
    return None


def extensions() -> list[Extension]:
    """The extension reclip_d2._C, or nothing if it is not wanted."""
    if flag("NO_EXTENSION"):
        return []
    cuda_home = find_cuda_home()
    if cuda_home:
        os.environ["CUDA_HOME"] = cuda_home  # read when torch.utils.cpp_extension is imported
    try:
        from torch.utils.cpp_extension import CppExtension, CUDAExtension
    except ImportError:
        sys.exit(
            "error: torch must be installed before reclip_d2 is built: pip install torch, then --no-build-isolation"
        )
    sources = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").glob("**/*.cpp"))
    cuda_sources = [path for path in sources if path.endswith("_cuda_host.cpp")]
    cuda_sources += sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").glob("**/*.cu"))
    sources = [path for path in sources if path not in cuda_sources]
    # -fopenmp makes at::parallel_for run in parallel; it is not linked, so that torch's own OpenMP library serves.
    # No -march: the tiles of csrc/cpu are compiled for several instruction sets and chosen at run time.
    compile_args = {"cxx": ["-O3", "-std=c++17", "-Wall", "-fvisibility=hidden", "-fopenmp"]}
    reason = "FORCE_CPU is set" if flag("FORCE_CPU") else why_no_cuda(cuda_home)
    if reason is not None:
        if flag("FORCE_CUDA"):
            sys.exit(f"error: FORCE_CUDA is set, but {reason}")
        print(f"reclip_d2._C: built for the CPU only: {reason}")
        return [CppExtension("reclip_d2._C", sources, extra_compile_args=compile_args)]
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", DEFAULT_ARCHITECTURES)
    print(f"reclip_d2._C: built for the CPU and for CUDA architectures {os.environ['TORCH_CUDA_ARCH_LIST']}")
    compile_args["nvcc"] = ["-O3", "-std=c++17", "-Xptxas", "-v", "--expt-relaxed-constexpr", "-lineinfo"]
    # Only headers of the CUDA runtime are needed (ATen/cuda, which wants cuBLAS and its like, is left alone): a CUDA
    # folder with nvcc and the runtime will do.
    return [CUDAExtension("reclip_d2._C", sources + cuda_sources, extra_compile_args=compile_args)]


def build_commands() -> dict[str, type[Command]]:
    """The commands of this build; torch's own compiles the extension."""
    commands = {"develop": Develop, "build_py": BuildPackage}
    if flag("NO_EXTENSION"):
        return commands
    from torch.utils.cpp_extension import BuildExtension

    return {**commands, "build_ext": BuildExtension}


setup(ext_modules=extensions(), cmdclass=build_commands())
