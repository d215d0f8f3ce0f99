"""What a machine does to a program, told in a sentence: a full disk, no memory left, a killed process."""

_MEMORY = (
    "allocate memory",
    "not enough memory",
    "out of memory",
    "storage size calculation overflowed",
    "bad_alloc",
    "status_alloc_failed",
)
_SHARED = ("file </torch_", "shared memory", "bus error")
_LIMITS = ("too many open files", "start new thread")
_DISK = ("pytorchstreamwriter", "inline_container", "unexpected pos")


def line(error: BaseException) -> str:
    """Return what an error says, on one line."""
    text = str(error).strip()
    if "\nOriginal Traceback" in text:  # of a worker process
        text = text.splitlines()[-1]
    return " ".join(text.split())[:300] or type(error).__name__


def sentence(error: BaseException) -> str | None:
    """Return what to tell the user of an error that the machine made, or None for one that the program made.

    Libraries tell of a full disk or of missing memory by exceptions of many kinds, RuntimeError above all.
    """
    import torch
    from safetensors import SafetensorError

    said = line(error)
    if isinstance(error, OSError):
        return str(error)
    if isinstance(error, SafetensorError):
        return f"a file of weights could not be read or written ({said})"
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return f"there is not enough memory ({said}): try a smaller --batch-size"
    if not isinstance(error, RuntimeError):
        return None
    text = str(error).lower()
    if any(word in text for word in _MEMORY):
        return f"there is not enough memory ({said}): try a smaller --batch-size"
    if any(word in text for word in _DISK):
        return f"a file could not be written; the disk may be full ({said})"
    if any(word in text for word in _SHARED):
        return f"/dev/shm, where workers leave images, is too small ({said}): try --workers 0 or a smaller --batch-size"
    if any(word in text for word in _LIMITS):
        return f"a limit of the machine is reached ({said}): try fewer --workers"
    if "dataloader worker (pid" in text:
        return (
            "a worker process that reads images was killed, perhaps for want of memory: try fewer --workers, a smaller "
            f"--batch-size or --max-pixels ({said})"
        )
    return None
