"""Files that the user names, with errors that name the flag.

It does not read their contents. Invariant: a file that cannot be opened is a ``ValueError``: exit code 2.
"""

from typing import BinaryIO


def read_lines(flag: str, path: str) -> list[bytes]:
    """Raises ValueError naming the flag, the path and the reason."""
    try:
        with open(path, "rb") as stream:
            return stream.readlines()
    except OSError as error:
        raise ValueError(f"{flag} {path} cannot be read: {error.strerror}; check the path") from error


def open_for_writing(flag: str, path: str) -> BinaryIO:
    """The caller closes it. Raises ValueError naming the flag, the path and the reason."""
    try:
        return open(path, "wb")
    except OSError as error:
        raise ValueError(f"{flag} {path} cannot be written: {error.strerror}; check the path") from error
