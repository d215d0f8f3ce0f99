"""The command `sslfast info`: what was built, and what of it this machine uses."""

import platform

import torch

import sslfast
from sslfast import _C


def info() -> str:
    """Return, a line each: versions, compiler, instruction sets found and used, threads, CUDA or why it is missing."""
    build = _C.build_info()
    if not build["cuda"]:
        cuda = f"not built: {build['cuda_why_not']}"
    elif torch.cuda.is_available():
        cuda = f"built; {torch.cuda.get_device_name()}"
    else:
        cuda = "built; torch finds no device here"
    rows = {
        "sslfast": sslfast.__version__,
        "torch": f"{torch.__version__} (built for {build['torch']})",
        "python": f"{platform.python_version()} on {platform.platform()}",
        "compiler": build["compiler"],
        "instruction sets": f"{_C.cpu_capability()} in use; {', '.join(_C.available_cpu_capabilities())} "
        "possible here (SSLFAST_CPU_CAPABILITY chooses)",
        "threads": f"{torch.get_num_threads()} (torch.set_num_threads or OMP_NUM_THREADS choose)",
        "CUDA": cuda,
    }
    return "\n".join(f"{name + ':':18s}{text}" for name, text in rows.items())


def main(args: list[str] | None = None) -> None:
    """The command `sslfast info`, which has no options."""
    if args:
        raise SystemExit(f"usage: sslfast info (it has no options; got {' '.join(args)})")
    print(info())
