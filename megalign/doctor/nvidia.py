"""Asks nvidia-smi for what torch does not say of devices: errors of their memory, slowed clocks, who uses them."""

from __future__ import annotations

import csv
import shutil
import subprocess
from collections.abc import Mapping, Sequence

from megalign.doctor.finding import Finding, where

PROGRAM_S = 10.0
ERRORS = "ecc.errors.uncorrected.volatile.total"
PENDING = ("retired_pages.pending", "remapped_rows.pending")  # before and since the A100
# The device protects itself. Power capped by software is left out: that is every busy device's state.
SLOWED = {
    "clocks_throttle_reasons.hw_thermal_slowdown": "heat",
    "clocks_throttle_reasons.sw_thermal_slowdown": "heat",
    "clocks_throttle_reasons.hw_power_brake_slowdown": "the power supply",
}


def asked(uuid: str) -> dict[str, str]:
    """Return {field: value} of this device; fields that its driver does not know are left out."""
    program = shutil.which("nvidia-smi")
    if program is None or not uuid:
        return {}
    device = uuid if uuid.startswith("GPU-") else f"GPU-{uuid}"
    found: dict[str, str] = {}
    for fields in ((ERRORS,), *((field,) for field in PENDING), tuple(SLOWED)):  # one unknown field fails a question
        found |= answer(_said(program, f"--query-gpu=uuid,{','.join(fields)}"), device, fields)
    lines = _rows(_said(program, "--query-compute-apps=gpu_uuid,pid,process_name"))
    found["processes"] = ", ".join(f"{row[1]} ({row[2]})" for row in lines if len(row) == 3 and row[0] == device)
    return found


def answer(text: str, device: str, fields: Sequence[str]) -> dict[str, str]:
    """Return {field: value} from lines of `uuid, value, ...`; empty where the device is not among them."""
    for row in _rows(text):
        if row[0] == device and len(row) == 1 + len(fields):
            return dict(zip(fields, row[1:], strict=True))
    return {}


def _rows(text: str) -> list[list[str]]:
    return [row for row in csv.reader(text.splitlines(), skipinitialspace=True) if row]


def _said(program: str, query: str) -> str:
    command = [program, query, "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PROGRAM_S)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def health_findings(answers: Sequence[Mapping[str, str]], hosts: Sequence[str]) -> list[Finding]:
    """Return findings on devices that have lost data, wait for a reset, or are slowed; answers: those of all ranks."""
    findings = []
    broken = {rank: int(held[ERRORS]) for rank, held in enumerate(answers) if held.get(ERRORS, "").isdecimal()}
    broken = {rank: count for rank, count in broken.items() if count}
    if broken:
        found = f"memory errors that could not be corrected, {max(broken.values())} at most: {where(broken, hosts)}"
        findings.append(Finding("devices", "fail", found, "take these devices out of the job until they are reset"))
    waiting = [rank for rank, held in enumerate(answers) if any(held.get(field) == "Yes" for field in PENDING)]
    if waiting:
        found = f"bad memory is still in use until the device is reset: {where(waiting, hosts)}"
        findings.append(Finding("devices", "warn", found, "reset the device (nvidia-smi -r) or restart the machine"))
    for why in dict.fromkeys(SLOWED.values()):
        fields = [field for field, reason in SLOWED.items() if reason == why]
        slowed = [rank for rank, held in enumerate(answers) if any(held.get(field) == "Active" for field in fields)]
        if slowed:
            found = f"clocks are slowed to protect the device from {why}: {where(slowed, hosts)}"
            findings.append(
                Finding("devices", "warn", found, "look at the machine's cooling and power: all ranks wait")
            )
    return findings
