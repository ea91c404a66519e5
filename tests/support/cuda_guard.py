"""A CUDA device for fake tensors in a torch without CUDA. It changes torch, so it runs in a separate process:

`python cuda_guard.py GUARD OUT`, where `build_guard` made GUARD, runs the cases of `support.fake_cuda`; with a third
argument, a kernel of `model.attention`, it compiles a step in `support.hopper`.
"""

import ctypes
import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path


def build_guard(folder: Path) -> Path:
    """Compile the guard (2 seconds).

    Raises:
        FileNotFoundError: there is no C++ compiler.
    """
    from torch.utils import cpp_extension

    compiler = shutil.which(cpp_extension.get_cxx_compiler())
    if compiler is None:
        raise FileNotFoundError("no C++ compiler")
    out, source = folder / "cuda_guard.so", Path(__file__).with_suffix(".cpp")
    includes = [f"-I{path}" for path in cpp_extension.include_paths()]
    flags = ["-shared", "-fPIC", "-O1", "-std=c++20", *includes, f"-L{torch_lib()}", "-lc10", "-ltorch_cpu"]
    subprocess.run([compiler, str(source), "-o", str(out), *flags], check=True)
    return out


def torch_lib() -> Path:
    """The folder of torch's shared objects, without importing it."""
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "lib"


def load_guard(guard: Path) -> None:
    """Give torch its device. torch looks for devices once, so this comes before its first import."""
    assert "torch" not in sys.modules
    for name in ("libc10.so", "libtorch_cpu.so"):
        ctypes.CDLL(str(torch_lib() / name), ctypes.RTLD_GLOBAL)
    ctypes.CDLL(str(guard), ctypes.RTLD_GLOBAL)


if __name__ == "__main__":
    load_guard(Path(sys.argv[1]))
    if len(sys.argv) == 3:
        from support import fake_cuda

        fake_cuda.main(Path(sys.argv[2]))
    else:
        from support import hopper

        hopper.main(Path(sys.argv[2]), sys.argv[3])
