"""What a device is. The only package that names ``torch.cuda``."""

from argosy.platforms.base import DeviceGraph, HostCopy, MemoryInfo, Platform
from argosy.platforms.select import select_platform

__all__ = ["DeviceGraph", "HostCopy", "MemoryInfo", "Platform", "select_platform"]
