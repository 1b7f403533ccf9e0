"""Checks whether the job's layout fits the model, the memory of the ranks, and the hosts that they are on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import psutil
import torch

from megalign.config.job import JobConfig, layout_of, scored_models
from megalign.convert.hf.model import HFModel, read_model
from megalign.convert.hf.reader import cached_model
from megalign.doctor.finding import Finding, where
from megalign.doctor.limits import UNLIMITED, cgroup_limit
from megalign.doctor.needed import gigabytes, model_of
from megalign.doctor.network import axes
from megalign.doctor.visit import Check, Visit
from megalign.engines.build import engine_package
from megalign.engines.needs import RankNeeds
from megalign.schema import UserError

# Besides the estimate: Python and its libraries, or CUDA's context, NCCL's buffers and what the allocator cannot use.
RESERVED = {"cpu": 1.0e9, "cuda": 2.5e9}
# Axes whose groups talk in every layer, and what to do where one spans hosts.
TALKATIVE = {
    "tensor": "tensor ranks sum activations twice a layer: keep them inside a host, pipeline stages outside",
    "expert": "each layer sends every token to its experts and back: inside a host where experts fit there",
}
FULL, TIGHT = 0.95, 0.80  # shares of the memory: of what is held at all times, and of the whole estimate


def layout_checks() -> list[Check]:
    """Return the check of the layout; it needs the model's config.json alone."""
    return [Check("layout", _look, _judge)]


def layout_refusal(cfg: JobConfig, model: HFModel, world_size: int) -> str | None:
    """Return why the policy cannot run in the job's layout, in the line that training has for it."""
    try:
        return engine_package(cfg).layout_problem(cfg, model, world_size, trained=True)
    except UserError as error:  # a model that the engine cannot build at all
        return str(error)


def _look(visit: Visit) -> dict[str, Any]:
    """Return the memory of this rank's device, and that of its machine."""
    if visit.cfg is None:
        return {}
    memory: dict[str, Any] = {"kind": visit.world.device.type, "host": host_memory()}
    if visit.world.device.type == "cuda":
        memory["device"] = torch.cuda.get_device_properties(visit.world.device).total_memory
    return memory


def host_memory() -> int:
    """Return the bytes of memory that processes may use here: the machine's, or a container's limit."""
    total, limit = psutil.virtual_memory().total, cgroup_limit("memory")
    return total if limit == UNLIMITED else min(total, limit)


def _judge(visit: Visit, answers: Sequence[dict[str, Any]]) -> list[Finding]:
    cfg = visit.cfg
    if cfg is None:
        return []
    findings = host_findings(cfg, visit.hosts)
    model = model_of(cfg)
    if model is None:
        line = f"model.path {cfg.model.path} has no config.json here, so layout and memory are not known"
        return [*findings, Finding("layout", "warn", line, "run the doctor again when the model is there")]
    problem = layout_refusal(cfg, model, visit.world.size)
    if problem is not None:
        return [*findings, Finding("layout", "fail", problem, "choose a layout that the line names")]
    shown = layout_of(cfg).text(visit.world.size)
    ok = Finding("layout", "ok", f"{shown}: fits the model and the number of ranks, {visit.world.size}")
    return [ok, *findings, *memory_findings(cfg, model, visit.hosts, answers)]


def host_findings(cfg: JobConfig, hosts: Sequence[str]) -> list[Finding]:
    """Tell which groups that talk in every layer span hosts, and whether hosts have different numbers of ranks."""
    counts = Counter(hosts)
    findings = []
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{count} on {host}" for host, count in list(counts.items())[:6])
        advice = "give every host as many ranks; groups of neighbouring ranks otherwise lie across hosts"
        findings.append(Finding("ranks a host", "warn", f"unequal: {listed}", advice))
    for axis in axes(layout_of(cfg), len(hosts)):
        apart = next((ranks for ranks in axis.groups if len({hosts[rank] for rank in ranks}) > 1), None)
        if axis.name in TALKATIVE and apart is not None:
            size = len(apart)
            line = f"parallel.{axis.name} {size}: {where(apart, hosts)} are one group on several hosts"
            findings.append(Finding(f"{axis.name} groups", "warn", line, TALKATIVE[axis.name]))
    return findings


def memory_findings(
    cfg: JobConfig, model: HFModel, hosts: Sequence[str], memories: Sequence[dict[str, Any]]
) -> list[Finding]:
    """Compare the estimate with the memory of each kind of rank, and of each host."""
    kind = memories[0]["kind"]
    try:
        needs = engine_package(cfg).rank_needs(cfg, model, len(hosts), device=kind)
    except UserError as error:
        return [Finding("memory", "warn", f"cannot be estimated: {error}")]
    stage_of = [rank * len(needs) // len(hosts) for rank in range(len(hosts))]  # stages are runs of ranks
    findings = _on_devices(needs, stage_of, memories) if kind == "cuda" else []
    findings += _on_hosts(needs, stage_of, hosts, memories, on_cuda=kind == "cuda")
    findings += _other_models(cfg, hosts, memories)
    return findings


def _on_devices(
    needs: Sequence[RankNeeds], stage_of: Sequence[int], memories: Sequence[dict[str, Any]]
) -> list[Finding]:
    """Compare each stage's needs with the smallest device that it is on."""
    findings = []
    for stage, need in enumerate(needs):
        smallest = min(memory["device"] for memory, at in zip(memories, stage_of, strict=True) if at == stage)
        room = smallest - RESERVED["cuda"]
        findings.append(_compared(need.ranks, _in_words(need), need.certain, need.peak, room, gigabytes(smallest)))
    worst = max(findings, key=lambda finding: ("ok", "warn", "fail").index(finding.state))
    return [finding for finding in findings if finding.state != "ok"] or [worst]


def _on_hosts(
    needs: Sequence[RankNeeds],
    stage_of: Sequence[int],
    hosts: Sequence[str],
    memories: Sequence[dict[str, Any]],
    *,
    on_cuda: bool,
) -> list[Finding]:
    """Compare what all ranks of a host hold in its memory with what it has; tells of the fullest host."""
    fullest: tuple[float, Finding] | None = None
    for host in dict.fromkeys(hosts):
        ranks = [rank for rank in range(len(hosts)) if hosts[rank] == host]
        held = [needs[stage_of[rank]] for rank in ranks]
        memory = min(memories[rank]["host"] for rank in ranks)
        certain = sum(need.offloaded + (0 if on_cuda else need.certain) for need in held)
        passing = [need.saving if on_cuda else max(need.peak - need.certain, need.saving) for need in held]
        peak = certain + sum(passing)
        if not peak:
            continue
        who = f"{host}'s {len(ranks)} ranks" if len(ranks) > 1 else f"{host}'s rank"
        what = f"offloaded {gigabytes(certain)}, saving a checkpoint" if on_cuda else _in_words(held[0])
        room = memory - RESERVED["cpu"] * len(ranks)
        finding = _compared(who, what, certain, peak, room, f"{gigabytes(memory)} of host memory")
        if fullest is None or peak / memory > fullest[0]:
            fullest = peak / memory, finding
    return [] if fullest is None else [fullest[1]]


def _in_words(need: RankNeeds) -> str:
    held = need.weights + need.gradients + need.optimizer
    text = f"{need.num_parameters:,} parameters a rank, {gigabytes(held)} with gradients and optimizer"
    text += f", {gigabytes(need.beside)} for other models" if need.beside else ""
    return f"{text}, {gigabytes(need.activations + need.head)} of activations"


def _compared(who: str, what: str, certain: float, peak: float, room: float, memory: str) -> Finding:
    """Judge what is held at all times and the whole estimate by the room there is."""
    found = f"{who}: {what}; about {gigabytes(peak)} (an estimate) of {memory}"
    more = "raise parallel.tensor or pipeline, engine.zero.stage or offload with deepspeed, or use lora"
    if certain > FULL * room:
        return Finding("memory", "fail", f"{found}: {gigabytes(certain)} are held at all times", more)
    if peak > TIGHT * room:
        advice = "lower data.tokens_per_micro_batch, set engine.recompute=full, or split the model further"
        return Finding("memory", "warn", found, advice)
    return Finding("memory", "ok", found)


def _other_models(cfg: JobConfig, hosts: Sequence[str], memories: Sequence[dict[str, Any]]) -> list[Finding]:
    """Tell where a reference or a teacher, which is scored before training, does not fit."""
    findings = []
    plain = cfg.model_copy(update={"lora": None, "rollout": None})
    for field, path in scored_models(cfg).items():
        folder = cached_model(path)
        if folder is None:
            continue  # told by the check of the inputs
        try:
            needs = engine_package(cfg).rank_needs(plain, read_model(folder), len(hosts), device=memories[0]["kind"])
        except UserError:
            continue  # told by training's checks
        weights = max(need.weights for need in needs)
        for host, count in Counter(hosts).items():
            memory = memories[hosts.index(host)]
            room = memory.get("device", memory["host"] / count)
            if weights > FULL * (room - RESERVED[memory["kind"]]):
                line = f"{field}: {gigabytes(weights)} of weights a rank; {gigabytes(room)} are there on {host}"
                findings.append(Finding("memory", "fail", line, "raise parallel.tensor or pipeline, or score it apart"))
    return findings
