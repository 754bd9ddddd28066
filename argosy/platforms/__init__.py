"""What a device is. The only package that names ``torch.cuda``."""

from argosy.platforms.base import DeviceGraph, HostCopy, Mark, MemoryInfo, Platform
from argosy.platforms.select import select_platform
from argosy.platforms.side_lane import NoSideLane, SideLane, SideWork

__all__ = [
    "DeviceGraph",
    "HostCopy",
    "Mark",
    "MemoryInfo",
    "NoSideLane",
    "Platform",
    "SideLane",
    "SideWork",
    "select_platform",
]
