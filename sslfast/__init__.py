"""sslfast: fused kernels and training loops for self-supervised learning in PyTorch."""

import torch

__version__ = "0.1.0"


def _load_extension() -> None:
    """Loads sslfast._C, or says in one sentence why it cannot be loaded."""
    advice = "build it again with `pip install --no-build-isolation --force-reinstall --no-deps .`"
    try:
        from sslfast import _built_for
    except ImportError:
        raise ImportError(f"sslfast's extension module is not built: {advice}.") from None
    built, found = _built_for.TORCH_VERSION, torch.__version__
    if built != found:
        raise ImportError(f"sslfast was built for torch {built} and torch {found} is installed: {advice}.")
    from sslfast import _C  # noqa: F401


_load_extension()
