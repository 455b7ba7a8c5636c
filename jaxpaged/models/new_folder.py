"""Folders that appear complete or not at all, whatever becomes of the process that writes them."""

import errno
import importlib
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jaxpaged.interrupts import held_interrupts

fcntl: Any = importlib.import_module("fcntl") if os.name == "posix" else None
SUBFOLDERS = ("orbax", "native")
"""How the names of folders begin that conversions make inside the folder they write."""


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Give a folder beside `target` to write into; it becomes `target` if the block ends well, else it is removed.

    An existing `target` is replaced at that moment and not before. A Ctrl-C waits until folders are in order again. The
    folder is locked for as long as this process writes into it (see `remove_dead_partials`). OSError names `target`.
    """
    try:
        with _partial_folder(target.absolute()) as partial:
            yield partial
    except OSError as error:
        reason = f"cannot be written ({error.strerror or error}), and nothing was: make room or choose another target"
        raise OSError(error.errno or errno.EIO, reason, str(target)) from error


@contextmanager
def _partial_folder(target: Path) -> Iterator[Path]:
    target.parent.mkdir(parents=True, exist_ok=True)
    token = uuid.uuid4().hex[:12]
    partial = target.parent / f".{target.name}.partial-{token}"
    replaced = target.parent / f".{target.name}.replaced-{token}"
    lock = None
    try:
        partial.mkdir()
        lock = _lock(partial)
        yield partial
        with held_interrupts():
            if target.exists():
                target.rename(replaced)
            try:
                partial.rename(target)
            except BaseException:
                if replaced.exists():
                    replaced.rename(target)
                raise
            remove_folder(replaced)
    finally:
        with held_interrupts():
            remove_folder(partial)
            if lock is not None:
                os.close(lock)


def remove_dead_partials(target: Path) -> tuple[Path, ...]:
    """Remove what killed processes left of `new_folder(target)`, and return the folders' paths.

    A folder whose lock is held is being written to and stays; the system drops a lock with its process, however that
    ends. Where there are no such locks, or what is inside is not ours, nothing is removed.
    """
    removed = []
    pattern = re.compile(rf"\.{re.escape(target.name)}\.partial-[0-9a-f]{{12}}")
    for path in sorted(target.parent.iterdir()) if target.parent.is_dir() else ():
        if not pattern.fullmatch(path.name) or path.is_symlink() or not path.is_dir():
            continue
        lock = _lock(path)
        if lock is None:
            continue
        try:
            if all(_is_part(entry) for entry in path.iterdir()):
                remove_folder(path)
                removed.append(path)
        finally:
            os.close(lock)
    return tuple(removed)


def _is_part(entry: Path) -> bool:
    """Say whether a conversion may have made this in its partial folder."""
    if entry.is_symlink():
        return False
    return entry.is_file() or (entry.is_dir() and entry.name.startswith(SUBFOLDERS))


def _lock(folder: Path) -> int | None:
    """Lock the folder and return the descriptor that holds the lock; None if another has it, or there are no locks."""
    if fcntl is None:
        return None
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def remove_folder(folder: Path) -> None:
    """Remove a folder that was written here, if it is there."""
    if folder.exists():
        shutil.rmtree(folder)
