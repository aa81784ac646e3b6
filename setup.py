"""The native operators, built by CMake. FLOWRL_BUILD_NATIVE: auto (what this machine can), 1, 0.

The CUDA operators are part of them where nvcc and CUTLASS are: see csrc/README.md.
"""

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
# cmake and ninja may be packages of an environment that is not activated.
PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])


class CMakeBuild(build_ext):
    def build_extension(self, ext):
        import torch  # not a build requirement: --no-build-isolation

        target = Path(self.get_ext_fullpath(ext.name))
        work = ROOT / "build/native"  # kept: the next build compiles what has changed
        options = [f"-DTORCH_ROOT={torch.__path__[0]}", f"-DCUTLASS_ROOT={cutlass() or ''}"]
        options += ["-G", "Ninja", "-S", str(ROOT)]
        environment = {**os.environ, "PATH": PATH}
        for step in (["-B", str(work), *options], ["--build", str(work)]):
            cmake = shutil.which("cmake", path=PATH) or "cmake"
            subprocess.run([cmake, *step], check=True, env=environment)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(work / target.name, target)


def cutlass():
    """CUTLASS's headers, from the package nvidia-cutlass; None: no CUDA operators. They need nvcc
    too."""
    package = find_spec("cutlass_library")
    if package is None or shutil.which(os.environ.get("CUDACXX", "nvcc"), path=PATH) is None:
        print("flowrl: without the CUDA operators (they need nvcc and nvidia-cutlass)")
        return None
    return Path(package.submodule_search_locations[0]) / "source/include"


def missing():
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    found = {"a C++ compiler": compiler, "torch (--no-build-isolation)": find_spec("torch")}
    found |= {name: shutil.which(name, path=PATH) for name in ("cmake", "ninja")}
    return ", ".join(name for name, there in found.items() if not there)


wanted = os.environ.get("FLOWRL_BUILD_NATIVE", "auto")
if wanted not in ("auto", "0", "1"):
    raise SystemExit(f"FLOWRL_BUILD_NATIVE must be auto, 0 or 1, got {wanted!r}; unset it for auto")
lacking = missing()
if wanted == "1" and lacking:
    raise SystemExit(f"FLOWRL_BUILD_NATIVE=1 needs {lacking}; install that, or set it to auto")
build = wanted != "0" and not lacking
if not build:
    why = f"needs {lacking}" if lacking else "FLOWRL_BUILD_NATIVE=0"
    print(f"flowrl: without the native operators ({why})")
if wanted == "0" and "editable_wheel" in sys.argv:  # else an earlier build would still be used
    (ROOT / "kernels/flowrl_kernels/_C.abi3.so").unlink(missing_ok=True)
setup(
    ext_modules=[Extension("flowrl_kernels._C", [], py_limited_api=True)] if build else [],
    cmdclass={"build_ext": CMakeBuild},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if build else {},
)
