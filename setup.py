"""Hand the native library to setuptools; everything else about the package stands in pyproject.toml.

CMake owns the sources and their flags, `tools/native.py` the command line. torch is imported only when the library
is built, so that an sdist needs none.
"""

import sys
from pathlib import Path

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "tools"))

import native  # noqa: E402


class CMakeBuild(build_ext):
    """Build `fastrnn._C` below build/ and put it where setuptools wants it (in place, or into the wheel)."""

    def build_extension(self, ext):
        """Build the one extension that there is."""
        native.put(native.build_library(), Path(self.get_ext_fullpath(ext.name)))

    def get_source_files(self):
        """Return no sources: MANIFEST.in says what an sdist holds."""
        return []


if int(setuptools.__version__.split(".")[0]) < 77:  # a license as a plain SPDX name
    sys.exit(f"fastrnn: setuptools {setuptools.__version__} is too old: pip install --upgrade setuptools")

try:
    # Before pip resolves the dependencies: it would fetch a torch, and this build could not use it.
    if native.wants_native() and {"dist_info", "editable_wheel", "bdist_wheel", "build_ext"} & set(sys.argv):
        native.check()
        native.find_tool("cmake")
        native.find_tool("ninja")
        native.import_torch()
    setup(
        version=native.version(),
        ext_modules=[Extension("fastrnn._C", sources=[])] if native.wants_native() else [],
        cmdclass={"build_ext": CMakeBuild},
    )
except native.BuildError as error:
    sys.exit(f"fastrnn: {error}")
