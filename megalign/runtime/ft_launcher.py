"""Sends heartbeats to `ft_launcher` of nvidia-resiliency-ext where that started the job; the package is optional."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any

SOCKET = "FT_RANK_MONITOR_IPC_SOCKET"  # set by ft_launcher for each rank
MODULE = "nvidia_resiliency_ext.fault_tolerance"


def launcher_heartbeat() -> Callable[[], None]:
    """Connect to the rank's monitor and return what sends it a heartbeat; without ft_launcher that does nothing."""
    if SOCKET not in os.environ:
        return lambda: None
    try:
        client: Any = import_module(MODULE).RankMonitorClient()
        client.init_workload_monitoring()
    except Exception as error:  # its time-out for the first heartbeat would end a job that is well
        print(f"megalign: no heartbeats to ft_launcher: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return lambda: None
    return lambda: client.send_heartbeat()
