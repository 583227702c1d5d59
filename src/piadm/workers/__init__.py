"""Who evaluates the network's rows: this process, several devices of it, or a group of processes."""

from piadm.workers.base import Workers
from piadm.workers.devices import Devices
from piadm.workers.ranks import Ranks

__all__ = ["Devices", "Ranks", "Workers"]
