"""Every socket on which a program and what it has started listen: TCP addresses, and names of Unix sockets."""

import contextlib
import os
from dataclasses import dataclass, field
from pathlib import Path

LISTENING = "0A"  # the kernel's word for it in /proc/net/tcp
_UNIX_ACCEPTS = 0x10000  # its flag of a listening Unix socket


@dataclass
class Listeners:
    """``tcp``: host and port by the listening process; ``unix``: names, "@" first where there is no file."""

    tcp: set[tuple[str, int]] = field(default_factory=set)
    unix: set[str] = field(default_factory=set)


def family_of(pid: int) -> list[int]:
    """The process and all that descend from it."""
    family = [pid]
    for parent in family:  # grows while it is read
        try:
            for task in Path(f"/proc/{parent}/task").iterdir():
                family += [int(word) for word in (task / "children").read_text(encoding="ascii").split()]
        except OSError:  # it ended just now
            continue
    return family


def find_listeners(pid: int) -> Listeners:
    """Of the process and all that descend from it."""
    inodes = {inode for member in family_of(pid) for inode in _socket_inodes(member)}
    found = Listeners()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text(encoding="ascii").splitlines()[1:]:
            words = line.split()
            if words[3] == LISTENING and words[9] in inodes:
                host, port = words[1].split(":")
                dotted = ".".join(str(int(host[i : i + 2], 16)) for i in (6, 4, 2, 0)) if table == "tcp" else host
                found.tcp.add((dotted, int(port, 16)))
    for line in Path(f"/proc/{pid}/net/unix").read_text(encoding="utf-8").splitlines()[1:]:
        words = line.split()
        if len(words) > 7 and int(words[3], 16) & _UNIX_ACCEPTS and words[6] in inodes:
            found.unix.add(words[7])
    return found


def _socket_inodes(pid: int) -> set[str]:
    inodes = set()
    for name in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(OSError):  # it was closed just now
            target = os.readlink(f"/proc/{pid}/fd/{name}")
            if target.startswith("socket:["):
                inodes.add(target[8:-1])
    return inodes
