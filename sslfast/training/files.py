"""Files of a run: written whole or not at all, never through a link, and by one process at a time."""

import contextlib
import errno
import fcntl
import os
import secrets
import socket
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from sslfast.training import UserError

_held: set[tuple[Path, int]] = set()  # (folder, process) of the locks that this process has


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """Open a new file that takes the place of ``path`` when the block has ended well: a reader sees the old or the new.

    It is written beside it under a name of its own, ….unfinished, which is removed after an error.
    """
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.unfinished")
    try:
        with temporary.open("xb") as file:  # x: never something that is there already, such as a link
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_atomically(path: Path, text: str) -> None:
    """Write a text file so that a reader sees the old text or the new one, never a part."""
    with replacing(path) as file:
        file.write(text.encode())


def sweep(folder: Path) -> None:
    """Remove what killed processes have left half written in a run's folder; for its owner."""
    for path in folder.rglob("*.unfinished"):
        if path.is_file():
            path.unlink(missing_ok=True)


def flush_to_disk(path: Path) -> None:
    """Make sure that a file's content, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def refuse_links(folder: Path) -> None:
    """Raise UserError for anything in a run's folder that is neither a file nor a folder.

    A run's folder may come from someone else. Through a link in it a run would write elsewhere, a pipe has no end.
    """
    for place, names, files in os.walk(folder):
        for name in (*names, *files):
            path = Path(place, name)
            with contextlib.suppress(FileNotFoundError):  # a checkpoint that was pruned just now
                mode = path.lstat().st_mode
                if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                    kind = "a link" if stat.S_ISLNK(mode) else "neither a file nor a folder"
                    raise UserError(f"{path} is {kind}: {folder} is not used as long as it is there")


@contextlib.contextmanager
def owned(folder: Path) -> Iterator[None]:
    """Own a run's folder within the block: another process that asks for it gets a UserError that names this one.

    The lock is that of the operating system on ``folder/.lock``, and ends with this process, however that ends. Asked
    again by the process that has it, it does nothing.
    """
    key = (folder.resolve(), os.getpid())
    if key in _held:
        yield
        return
    descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    with os.fdopen(descriptor, "r+") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                owner = file.read(200) or "another process"
                raise UserError(f"{folder} is being written by {owner}: wait for it, or end it first") from None
            print(f"{folder}: its file system has no locks ({error}): start no second process on this run")
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        _held.add(key)
        try:
            yield
        finally:
            _held.discard(key)
            with contextlib.suppress(OSError):
                file.truncate(0)
