"""sslfast: fused kernels and training loops for self-supervised learning in PyTorch."""

import importlib

import torch

__version__ = "0.1.0"


def _load_extension() -> None:
    """Loads sslfast._C, or says in one sentence why it cannot be loaded."""
    advice = "build it with `pip install --no-build-isolation .` in its source folder (add -e if you develop it)"
    try:
        from sslfast import _built_for
    except ImportError:
        raise ImportError(f"sslfast's extension module is not built: {advice}.") from None
    # The whole version, "+cu130" too: neither patch releases nor CPU and CUDA builds of torch promise one C++ ABI.
    built, found = _built_for.TORCH_VERSION, torch.__version__
    if built != found:
        raise ImportError(f"sslfast was built for torch {built}, and torch {found} is installed: {advice}.")
    try:
        importlib.import_module("sslfast._C")
    except ImportError as error:
        raise ImportError(f"sslfast's extension module does not load ({error}): {advice}.") from error


_load_extension()

from sslfast.patch import patch as patch  # noqa: E402


def __getattr__(name: str):
    if name == "schedulers":  # not before it is needed: where diffusers is installed, it imports diffusers
        import importlib

        return importlib.import_module("sslfast.schedulers")
    raise AttributeError(f"module 'sslfast' has no attribute {name!r}")
