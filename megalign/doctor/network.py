"""Measures collectives of every group of the job's layout, and compares them with what a network should give.

Bandwidths are those of the busiest link (bus bandwidth, as nccl-tests reports it), so that they do not depend on the
number of ranks.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megalign.config.job import layout_of
from megalign.config.layout import Layout
from megalign.doctor.finding import Finding, State, where
from megalign.doctor.visit import Check, Visit

# (GB/s, microseconds of a small message) by backend and by whether a group spans machines. A group below the
# expectation slows training down, below a tenth of it something is broken: a wrong network card, a link that fell back.
EXPECTED = {
    ("nccl", False): (20.0, 200.0),  # PCIe 4 x16 gives 25; NVLink hundreds
    ("nccl", True): (5.0, 500.0),  # a 100 Gb/s card for two devices
    ("gloo", False): (0.02, 50000.0),  # far below what idle cores give: ranks may share them
    ("gloo", True): (0.05, 20000.0),  # 1 Gb/s Ethernet gives 0.118 to all ranks of a machine together
}
ADVICE = {
    ("nccl", False): "`nvidia-smi topo -m` and NCCL_DEBUG=INFO say which way data take; look for other jobs there",
    (
        "nccl",
        True,
    ): "NCCL_DEBUG=INFO says which card is used (NET_INTERFACE, NCCL_IB_HCA); look at ibstat and at its link",
    ("gloo", False): "ranks share cores, or the machine is busy: start fewer ranks, look for other jobs",
    ("gloo", True): "look at the network card that is used (NET_INTERFACE), its link, and at other jobs",
}
BROKEN, SLOWER = 0.1, 0.5  # shares of the expectation, and of the median group
SIZES = {"nccl": 64 << 20, "gloo": 2 << 20}  # bytes that each rank sends
ROUNDS, WARM_UPS = 5, 1
UNTIL_S = 48.0  # from the beginning of the visit, until which groups are measured; the engine comes after them
LEAST_S, MOST_S = 2.0, 8.0  # for all operations of an axis
SETTLE_S = 20.0  # for one operation, and for the ranks of a group to come to it


@dataclass(frozen=True, slots=True)
class Axis:
    """Names an axis of the layout and its groups: every rank is in one of them, or in none."""

    name: str
    groups: tuple[tuple[int, ...], ...]


def axes(layout: Layout, world_size: int) -> list[Axis]:
    """Return the groups of more than one rank of a layout, in Megatron's order of ranks (tp-cp-ep-dp-pp).

    There are none where the layout does not fit the number of ranks. Experts are split over tensor, context and data
    ranks of one stage; pipeline groups hold the stages of one model.
    """
    inner = layout.tensor * layout.context
    stage = world_size // layout.pipeline
    if world_size % (inner * layout.pipeline) or stage % layout.expert:
        return []
    expert_data = stage // layout.expert
    sizes = {
        "tensor": (layout.tensor, 1),
        "context": (layout.context, layout.tensor),
        "data": (stage // inner, inner),
        "expert": (layout.expert, 1),
        "expert data": (expert_data if layout.expert > 1 else 1, layout.expert),
        "pipeline": (layout.pipeline, stage),
    }
    return [Axis(name, _strided(size, stride, world_size)) for name, (size, stride) in sizes.items() if size > 1]


def _strided(size: int, stride: int, world_size: int) -> tuple[tuple[int, ...], ...]:
    """Return groups of `size` ranks whose neighbours are `stride` apart."""
    firsts = (first for first in range(world_size) if first // stride % size == 0)
    return tuple(tuple(range(first, first + size * stride, stride)) for first in firsts)


def network_checks(visit: Visit) -> list[Check]:
    """Return a check for each axis of the job's layout, or one of all ranks without a configuration."""
    size = visit.world.size
    if size == 1:
        return []
    found = [] if visit.cfg is None else axes(layout_of(visit.cfg), size)
    found = found or [Axis("all", (tuple(range(size)),))]
    return [_check(axis, len(found) - place) for place, axis in enumerate(found)]


def _check(axis: Axis, num_left: int) -> Check:
    def read(visit: Visit) -> dict[str, list[float]]:
        left = visit.began + UNTIL_S - time.monotonic()
        return measured(visit, axis, budget_s=min(MOST_S, max(LEAST_S, left / num_left)))

    return Check(f"network {axis.name}", read, lambda visit, answers: judge_network(visit, axis, answers))


def measured(visit: Visit, axis: Axis, *, budget_s: float) -> dict[str, list[float]]:
    """Return {operation: [bus bandwidth in GB/s, latency in microseconds]} of this rank's group; empty outside groups.

    Groups of an axis work at the same time, as in training. Operations that a group's time does not suffice for are
    left out on all its ranks.
    """
    own = next((ranks for ranks in axis.groups if visit.world.rank in ranks), ())
    # Made by its own ranks alone: with a thousand ranks, all waiting for each group would take the whole time.
    timeout = timedelta(seconds=SETTLE_S)
    group = dist.new_group(list(own), timeout=timeout, use_local_synchronization=True) if own else None
    visit.share(f"groups of {axis.name}", None)
    if group is None:
        return {}
    results: dict[str, list[float]] = {}
    deadline = time.monotonic() + budget_s
    for name, operation in OPERATIONS.items():
        if results and _late(deadline, group, visit.world.device):
            break
        results[name] = _measure(operation, group, visit.world.device, deadline)
    dist.destroy_process_group(group)
    return results


def _measure(
    operation: Callable[[int, dist.ProcessGroup, torch.device], tuple[Callable[[], object], float]],
    group: dist.ProcessGroup,
    device: torch.device,
    deadline: float,
) -> list[float]:
    size = group.size()
    run, moved = operation(SIZES[dist.get_backend(group)], group, device)
    seconds = _seconds(run, group, device, deadline)
    small, _ = operation(8 * size, group, device)
    return [moved / seconds / 1e9, _seconds(small, group, device, deadline) * 1e6]


def _seconds(run: Callable[[], object], group: dist.ProcessGroup, device: torch.device, deadline: float) -> float:
    """Return the median seconds of a call; past the deadline of any rank, that of the first one."""
    times: list[float] = []
    for _ in range(ROUNDS + WARM_UPS):
        _synchronise(device)
        start = time.perf_counter()
        run()
        _synchronise(device)
        times.append(time.perf_counter() - start)
        if _late(deadline, group, device):
            break
    return statistics.median(times[WARM_UPS:] or times)


def _late(deadline: float, group: dist.ProcessGroup, device: torch.device) -> bool:
    """Return whether the deadline of any rank of the group is over."""
    late = torch.tensor(float(time.monotonic() > deadline), device=device)
    dist.all_reduce(late, op=dist.ReduceOp.MAX, group=group)
    return bool(late)


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _numbers(num_bytes: int, size: int, device: torch.device) -> Tensor:
    """Return fp32 zeros of about that many bytes, in equal parts for all ranks of a group."""
    return torch.zeros(max(1, num_bytes // 4 // size) * size, device=device)


def _all_reduce(num_bytes: int, group: dist.ProcessGroup, device: torch.device) -> tuple[Callable[[], object], float]:
    size = group.size()
    held = _numbers(num_bytes, size, device)
    return lambda: dist.all_reduce(held, group=group), 2 * (size - 1) / size * held.nbytes


def _all_gather(num_bytes: int, group: dist.ProcessGroup, device: torch.device) -> tuple[Callable[[], object], float]:
    size = group.size()
    whole = _numbers(num_bytes, size, device)
    part = whole[: whole.numel() // size].clone()
    return lambda: dist.all_gather_into_tensor(whole, part, group=group), (size - 1) / size * whole.nbytes


def _reduce_scatter(
    num_bytes: int, group: dist.ProcessGroup, device: torch.device
) -> tuple[Callable[[], object], float]:
    size = group.size()
    whole = _numbers(num_bytes, size, device)
    part = torch.empty(whole.numel() // size, device=device)
    return lambda: dist.reduce_scatter_tensor(part, whole, group=group), (size - 1) / size * whole.nbytes


def _all_to_all(num_bytes: int, group: dist.ProcessGroup, device: torch.device) -> tuple[Callable[[], object], float]:
    size = group.size()
    sent = _numbers(num_bytes, size, device)
    received = torch.empty_like(sent)
    return lambda: dist.all_to_all_single(received, sent, group=group), (size - 1) / size * sent.nbytes


def _point_to_point(
    num_bytes: int, group: dist.ProcessGroup, device: torch.device
) -> tuple[Callable[[], object], float]:
    """Send to the next rank of the group and receive from the one before it, as pipeline stages do."""
    ranks, mine = dist.get_process_group_ranks(group), group.rank()
    sent = _numbers(num_bytes, 1, device)
    received = torch.empty_like(sent)
    following, before = ranks[(mine + 1) % len(ranks)], ranks[mine - 1]

    def run() -> None:
        operations = [dist.P2POp(dist.isend, sent, following, group), dist.P2POp(dist.irecv, received, before, group)]
        for work in dist.batch_isend_irecv(operations):
            work.wait()

    return run, float(sent.nbytes)


OPERATIONS = {
    "all-reduce": _all_reduce,
    "all-gather": _all_gather,
    "reduce-scatter": _reduce_scatter,
    "all-to-all": _all_to_all,
    "point to point": _point_to_point,
}


def judge_network(visit: Visit, axis: Axis, answers: Sequence[dict[str, Any]]) -> list[Finding]:
    """Return findings on groups that are slow within a machine or between machines, or what was measured."""
    backend = "nccl" if visit.world.device.type == "cuda" else "gloo"
    name, findings = f"network {axis.name}", []
    done = [operation for operation in OPERATIONS if all(operation in answer for answer in answers)]
    # The slowest rank of each group: the others wait for it.
    speeds = {op: [min(answers[rank][op][0] for rank in ranks) for ranks in axis.groups] for op in done}
    delays = {op: [max(answers[rank][op][1] for rank in ranks) for ranks in axis.groups] for op in done}
    for spans in (False, True):
        chosen = [i for i, ranks in enumerate(axis.groups) if (len({visit.hosts[r] for r in ranks}) > 1) == spans]
        limits = EXPECTED[backend, spans]
        slow = [told for op in done if chosen and (told := _slow(op, chosen, speeds[op], delays[op], limits))]
        if slow:
            state: State = "fail" if any(told[0] == "fail" for told in slow) else "warn"
            groups = [where(axis.groups[index], visit.hosts) for index in sorted({told[2] for told in slow})]
            found = f"{'between machines' if spans else 'within a machine'}: {'; '.join(told[1] for told in slow)}"
            found += f" (slowest: {'; '.join(groups)})"
            findings.append(Finding(name, state, found, ADVICE[backend, spans]))
    left_out = [operation for operation in OPERATIONS if operation not in done]
    if left_out:
        found = f"the time did not suffice to measure {', '.join(left_out)}"
        findings.append(Finding(name, "warn", found, "the network is slow, or many ranks share few cores"))
    if findings:
        return findings
    size, number = len(axis.groups[0]), len(axis.groups)
    shown = ", ".join(f"{op} {min(speeds[op]):.2f} GB/s {max(delays[op]):.0f} us" for op in done)
    return [Finding(name, "ok", f"{number} group{'s' * (number > 1)} of {size} ({backend}), the slowest: {shown}")]


def _slow(
    operation: str,
    chosen: Sequence[int],
    speeds: Sequence[float],
    delays: Sequence[float],
    expected: tuple[float, float],
) -> tuple[State, str, int] | None:
    """Return (state, what is slow, index of the slowest group) of an operation; None where all groups are as expected.

    chosen: indices of groups of one kind, which are compared with the expectation and with each other.
    """
    gigabytes, microseconds = expected
    slowest, latest = min(chosen, key=lambda i: speeds[i]), max(chosen, key=lambda i: delays[i])
    speed, delay, middle = speeds[slowest], delays[latest], statistics.median(speeds[i] for i in chosen)
    if speed < gigabytes:
        state: State = "fail" if speed < BROKEN * gigabytes else "warn"
        return state, f"{operation} {speed:.3f} GB/s, expected {gigabytes:g}", slowest
    if len(chosen) > 2 and speed < SLOWER * middle:
        return "warn", f"{operation} {speed:.2f} GB/s, other groups {middle:.2f}", slowest
    if delay > microseconds:
        state = "fail" if delay > microseconds / BROKEN else "warn"
        return state, f"{operation} of a few bytes takes {delay:.0f} us, expected {microseconds:g}", latest
    return None
