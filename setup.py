"""Builds the extension `dml_kernels._C`, or the pure-Python package when torch cannot be imported.

DML_BUILD_CUDA=auto|0|1: auto builds csrc/cuda when torch has CUDA and there are nvcc and sources, 1 fails
when it cannot; a GPU is never looked for. DML_SANITIZE=address,undefined instruments the C++ code.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import setuptools

FIX = "pip install torch -r requirements/build.txt && pip install -e . --no-build-isolation"
CUDA_MODE = os.environ.get("DML_BUILD_CUDA", "auto")
SANITIZERS = os.environ.get("DML_SANITIZE", "")
sys.stdout.reconfigure(line_buffering=True)  # what is built is said before the compiler speaks


def check(ok, text):
    if not ok:
        sys.exit(f"dml_kernels: {text}")


def why_no_cuda(torch, sources):
    """The reason for which the CUDA kernels cannot be built here, or None. Sets CUDA_HOME for torch."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    home = os.environ.get("CUDA_HOME")
    candidates = [f"{home}/bin/nvcc"] if home else ["nvcc", "/usr/local/cuda/bin/nvcc"]
    nvcc = next(filter(None, map(shutil.which, candidates)), None)
    if not nvcc:
        return "nvcc was not found (set CUDA_HOME or PATH)"
    # Asked of nvcc itself: the one on PATH may be a wrapper outside its toolkit.
    report = subprocess.getoutput(f"'{nvcc}' --version; '{nvcc}' --dryrun -x cu /dev/null")
    release, top = re.search(r"release (\d+)\.", report), re.search(r"TOP=(.*)", report)
    if not release or release[1] != torch.version.cuda.split(".")[0]:
        return f"{nvcc} is CUDA {release[1] if release else '?'}, torch has CUDA {torch.version.cuda}"
    os.environ["CUDA_HOME"] = str(Path(top[1]).resolve() if top else Path(nvcc).parents[1])
    return None if sources else "csrc/cuda holds no .cu file yet"


def extension(torch):
    """The arguments of setup() that build `dml_kernels._C`; says on stdout what it holds and why."""
    version = tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])
    check(version >= (2, 10), f"torch {torch.__version__} is too old, 2.10 or newer is needed: {FIX}")
    cxx = os.environ.get("CXX", "c++")
    check(shutil.which(cxx.split()[0]), f"no C++ compiler ({cxx}): sudo apt-get install -y g++, or set CXX")
    sources = sorted(str(file) for where in ("*.cpp", "cpu/*.cpp") for file in Path("csrc").glob(where))
    cuda_sources = sorted(map(str, Path("csrc").glob("cuda/*.cu")))
    no_cuda = "DML_BUILD_CUDA=0" if CUDA_MODE == "0" else why_no_cuda(torch, cuda_sources)
    check(CUDA_MODE != "1" or not no_cuda, f"DML_BUILD_CUDA=1, but CUDA kernels cannot be built: {no_cuda}")
    if not no_cuda:  # without the variable torch would ask for the GPUs present
        newest = ";10.0;12.0+PTX" if tuple(map(int, torch.version.cuda.split("."))) >= (12, 8) else "+PTX"
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0" + newest)
    # ninja lies beside the interpreter, whose environment need not be activated
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    # No -march: the instruction set is chosen at run time, see csrc/cpu/isa.h.
    flags = ["-O3", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden"]
    sanitize = [f"-fsanitize={SANITIZERS}"] if SANITIZERS else []
    if sanitize:  # -fwrapv, which many Pythons pass on, would hide signed overflow from UBSan
        flags += ["-O1", "-g", "-fno-omit-frame-pointer", "-fno-wrapv", "-D_GLIBCXX_ASSERTIONS"]
        flags += ["-fno-sanitize-recover=all", *sanitize]
    flags += [] if version >= (2, 13) else ["-std=c++20"]  # torch's own default from 2.13 on
    text = {"FLAGS": " ".join(flags), "TORCH": torch.__version__, "SANITIZERS": SANITIZERS}
    text |= {"NO_CUDA": no_cuda or "", "CUDA": "" if no_cuda else os.environ["TORCH_CUDA_ARCH_LIST"]}
    macros = [("TORCH_TARGET_VERSION", "0x020a000000000000"), ("TORCH_STABLE_ONLY", None)]
    macros += [(f"DML_BUILD_{name}", f'"{value}"') for name, value in text.items()]
    pybind11 = importlib.import_module("pybind11") if importlib.util.find_spec("pybind11") else None
    module = (CppExtension if no_cuda else CUDAExtension)(
        name="dml_kernels._C",
        sources=sources + ([] if no_cuda else cuda_sources),
        include_dirs=[pybind11.get_include()] if pybind11 else [],  # torch carries a copy among its headers
        define_macros=macros + ([] if no_cuda else [("DML_WITH_CUDA", None)]),
        extra_compile_args={"cxx": flags, "nvcc": ["-O3", "-std=c++20"]},
        extra_link_args=["-fopenmp", *sanitize],
    )
    module.libraries.remove("torch_python")  # only the stable part of libtorch is used
    print(f"dml_kernels: CPU kernels: yes (torch {torch.__version__}, {cxx} {' '.join(flags)})")
    print(f"dml_kernels: CUDA kernels: {f'no ({no_cuda})' if no_cuda else 'yes, for ' + text['CUDA']}")
    return {"ext_modules": [module], "cmdclass": {"build_ext": BuildExtension}}


check(int(setuptools.__version__.split(".")[0]) >= 77, f"setuptools is older than 77: {FIX}")
check(CUDA_MODE in ("auto", "0", "1"), f"DML_BUILD_CUDA={CUDA_MODE!r} is not one of auto, 0, 1")
check({*SANITIZERS.split(",")} <= {"", "address", "undefined", "thread"}, "unknown name in DML_SANITIZE")
try:
    import torch
except (ImportError, OSError) as error:
    check(CUDA_MODE != "1", f"DML_BUILD_CUDA=1, but torch cannot be imported ({error}): {FIX}")
    print(f"dml_kernels: CPU and CUDA kernels: no, torch cannot be imported ({error}); for them: {FIX}")
    setuptools.setup()
else:
    setuptools.setup(**extension(torch))
