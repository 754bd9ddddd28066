"""Files that the user names, with errors that name the flag.

It does not read their contents. Invariant: a file that cannot be opened is a ``ValueError``: exit code 2.
"""

import os
from typing import BinaryIO


def read_lines(flag: str, path: str) -> list[bytes]:
    """Raises ValueError naming the flag, the path and the reason."""
    try:
        with open(path, "rb") as stream:
            return stream.readlines()
    except OSError as error:
        raise ValueError(f"{flag} {path} cannot be read: {error.strerror}; check the path") from error


def check_writable(flag: str, path: str | None) -> None:
    """Finds most mistakes before a model is loaded for minutes, and leaves the file alone.

    Raises:
        ValueError: ``path`` is a directory, or in one that does not exist.
    """
    if path is None:
        return
    parent = os.path.dirname(path) or "."
    if os.path.isdir(path):
        raise ValueError(f"{flag} {path} cannot be written: it is a directory; name a file in it")
    if not os.path.isdir(parent):
        raise ValueError(f"{flag} {path} cannot be written: there is no directory {parent}; make it, or name another")


def open_for_writing(flag: str, path: str) -> BinaryIO:
    """The caller closes it. Raises ValueError naming the flag, the path and the reason."""
    try:
        return open(path, "wb")
    except OSError as error:
        raise ValueError(f"{flag} {path} cannot be written: {error.strerror}; check the path") from error
