"""Build of reclip_d2; everything that is not code to run at build time stands in pyproject.toml."""

import subprocess
import sys
from typing import ClassVar

from setuptools import Command, setup


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


setup(cmdclass={"develop": Develop})
