"""Everything is in pyproject.toml but this: wheels leave out kernels/__init__.py.

In site-packages that folder is shared with Hugging Face's `kernels`, and the package installed last would overwrite the
other's `__init__.py`. Ours is not needed there: without one, `kernels.<operation>` is found in a namespace package.
"""

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildPy(build_py):
    """Builds all modules but `kernels/__init__.py`."""

    def build_module(self, module, module_file, package):
        if (package, module) != ("kernels", "__init__"):
            return super().build_module(module, module_file, package)


setup(cmdclass={"build_py": BuildPy})
