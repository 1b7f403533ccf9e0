"""Checks the devices that ranks compute on, their memory, and what computes attention there."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch

from megalign.doctor.finding import Finding, State, listed, where
from megalign.doctor.nvidia import asked, health_findings
from megalign.doctor.visit import Check, Visit
from megalign.runtime.ranks import by_value

FREE_SHARE = 0.9  # of a device's memory that should be free before a job starts
NVIDIA = Path("/proc/driver/nvidia/gpus")  # a folder a device, where the driver is loaded


def device_checks() -> list[Check]:
    """Return the checks of devices and of attention's back ends."""
    return [
        Check("devices", lambda visit: _device(visit.world.device), judge_devices),
        Check("attention", lambda visit: _attention(visit.world.device), _judge_attention),
    ]


def _device(device: torch.device) -> dict[str, Any]:
    """Return what is known of this rank's device and of its machine."""
    machine = {
        "cores": hex(sum(1 << core for core in os.sched_getaffinity(0))),  # launchers bind ranks to some
        "threads": torch.get_num_threads(),
        "memory_free": psutil.virtual_memory().available,
        "present": len(list(NVIDIA.iterdir())) if NVIDIA.is_dir() else 0,
        "visible": torch.cuda.device_count() if torch.cuda.is_available() else 0,
    }
    if device.type != "cuda":
        return machine | {"name": "CPU", "identity": ""}
    properties = torch.cuda.get_device_properties(device)
    free, total = torch.cuda.mem_get_info(device)
    return machine | {
        "name": properties.name,
        "identity": str(getattr(properties, "uuid", device.index)),
        "capability": [properties.major, properties.minor],
        "free": free,
        "total": total,
        "health": asked(str(getattr(properties, "uuid", ""))),
    }


def judge_devices(visit: Visit, answers: Sequence[dict[str, Any]]) -> list[Finding]:
    """Return findings on the devices of all ranks, or one that describes them."""
    hosts, findings = visit.hosts, []
    unseen = [rank for rank, held in enumerate(answers) if held["present"] and not held["visible"]]
    if unseen:
        found = f"{answers[unseen[0]]['present']} NVIDIA devices, of which torch sees none, on {where(unseen, hosts)}"
        findings.append(Finding("devices", "fail", found, "install torch for CUDA, or correct CUDA_VISIBLE_DEVICES"))
    names = [held["name"] for held in answers]
    if len(set(names)) > 1:
        state: State = "fail" if "CPU" in names else "warn"
        found = f"ranks have different devices: {listed(names, hosts)}"
        findings.append(Finding("devices", state, found, "choose machines of one kind: all wait for the slowest"))
    if answers[0]["name"] == "CPU":
        return [*findings, *_judge_cores(visit, answers)]
    return [*findings, *_judge_cuda(visit, answers)] or [_described(answers)]


def _described(answers: Sequence[dict[str, Any]]) -> Finding:
    least = min(held["free"] for held in answers)
    found = f"{answers[0]['name']} on each rank, at least {least / 1e9:.1f} of {answers[0]['total'] / 1e9:.1f} GB free"
    return Finding("devices", "ok", found)


def _judge_cuda(visit: Visit, answers: Sequence[dict[str, Any]]) -> list[Finding]:
    hosts, findings = visit.hosts, []
    users = by_value([(host, held["identity"]) for host, held in zip(hosts, answers, strict=True)])
    for ranks in users.values():
        if len(ranks) > 1:
            advice = "start one rank a device: LOCAL_RANK, or CUDA_VISIBLE_DEVICES of the launcher, is wrong"
            findings.append(Finding("devices", "fail", f"one device is shared by {where(ranks, hosts)}", advice))
    taken = [rank for rank, held in enumerate(answers) if held["free"] < FREE_SHARE * held["total"]]
    if taken:
        held = min((answers[rank] for rank in taken), key=lambda each: each["free"] / each["total"])
        found = f"memory is in use already: {held['free'] / 1e9:.1f} of {held['total'] / 1e9:.1f} GB free"
        found += f" at the fullest; {where(taken, hosts)}"
        users_there = held["health"].get("processes") or "nvidia-smi names them"
        advice = f"end the processes of earlier jobs on it: {users_there}"
        findings.append(Finding("devices", "warn", found, advice))
    findings += health_findings([held["health"] for held in answers], hosts)
    old = [rank for rank, held in enumerate(answers) if held["capability"] < [8, 0]]
    if old and visit.cfg is not None and visit.cfg.run.dtype == "bf16":
        found = f"{answers[old[0]]['name']} has no bf16 arithmetic; {where(old, hosts)}"
        findings.append(Finding("devices", "warn", found, "set run.dtype to fp32, or choose devices of 2020 or newer"))
    return findings


def _judge_cores(visit: Visit, answers: Sequence[dict[str, Any]]) -> list[Finding]:
    """Return findings on CPUs: threads against cores, on each host."""
    findings = []
    for host, ranks in by_value(visit.hosts).items():
        threads, cores = sum(answers[rank]["threads"] for rank in ranks), _num_cores(answers[rank] for rank in ranks)
        if threads > cores:
            found = f"{len(ranks)} ranks on {host} compute with {threads} threads in all on {cores} cores"
            advice = "start fewer ranks there"
            if threads > len(ranks):
                advice = f"set OMP_NUM_THREADS to {max(1, cores // len(ranks))}, or {advice}"
            findings.append(Finding("devices", "warn", found, advice))
    free = min(held["memory_free"] for held in answers)
    cores = min(_num_cores(answers[rank] for rank in ranks) for ranks in by_value(visit.hosts).values())
    found = f"CPUs, at least {cores} cores and {free / 1e9:.1f} GB of free memory on a host"
    return findings or [Finding("devices", "ok", found)]


def _num_cores(answers: Iterable[dict[str, Any]]) -> int:
    """Return how many cores the ranks of a machine have together."""
    held = 0
    for answer in answers:
        held |= int(answer["cores"], 16)
    return held.bit_count()


def _attention(device: torch.device) -> dict[str, str]:
    """Return {package or back end: version or state} of what can compute attention on this rank."""
    found = {}
    for name in ("transformer_engine", "flash_attn", "flash_attn_interface"):
        if importlib.util.find_spec(name) is not None:
            found[name] = _imported(name if name != "transformer_engine" else "transformer_engine.pytorch")
    if found.get("transformer_engine") == "imports":
        found |= _te_backends()
    kinds = {
        "flash": torch.backends.cuda.flash_sdp_enabled(),
        "efficient": torch.backends.cuda.mem_efficient_sdp_enabled(),
    }
    enabled = [kind for kind, on in kinds.items() if on]
    found["torch"] = f"{', '.join(enabled) or 'no fused kernel'} ({device.type})"
    return found


def _imported(module: str) -> str:
    """Import a module; return `imports`, or why it does not."""
    try:
        importlib.import_module(module)
    except Exception as error:  # a package built for another torch raises whatever its libraries do
        return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
    return "imports"


def _te_backends() -> dict[str, str]:
    """Return which flash-attention versions TransformerEngine has found; its other kernels come with it."""
    try:
        utils = importlib.import_module("transformer_engine.pytorch.attention.dot_product_attention.utils")
        flash = utils.FlashAttentionUtils
        versions = {"2": flash.is_installed, "3": getattr(flash, "v3_is_installed", False)}
    except (ImportError, AttributeError) as error:
        return {"TransformerEngine's flash attention": f"unknown ({error})"}
    return {"TransformerEngine's flash attention": ", ".join(v for v, there in versions.items() if there) or "none"}


def _judge_attention(visit: Visit, answers: Sequence[dict[str, str]]) -> list[Finding]:
    findings = []
    for name in sorted({name for held in answers for name in held}):
        values = [held.get(name, "not installed") for held in answers]
        if len(set(values)) > 1:
            found = f"{name} differs: {listed(values, visit.hosts)}"
            findings.append(Finding("attention", "fail", found, "start all machines from one environment or image"))
        elif name in ("transformer_engine", "flash_attn") and values[0] != "imports":
            advice = "reinstall it for this torch; until then engine.layers auto takes torch's layers"
            findings.append(Finding("attention", "warn", f"{name} does not import: {values[0]}", advice))
    if findings:
        return findings
    shown = "; ".join(f"{name}: {value}" for name, value in answers[0].items())
    absent = "" if "transformer_engine" in answers[0] else "; TransformerEngine is not installed, so torch's layers run"
    on_cuda = visit.world.device.type == "cuda"
    advice = "install transformer-engine for fused layers and variable-length attention" if absent and on_cuda else ""
    return [Finding("attention", "warn" if advice else "ok", f"{shown}{absent}", advice)]
