"""Checks that every rank can read what the job reads, that all read the same, and that training would accept it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from megalign.config.job import JobConfig
from megalign.convert.hf.reader import HUB_MODEL
from megalign.doctor.finding import Finding, where
from megalign.doctor.input_files import differing, digests, inputs_of, settings_digest, signature
from megalign.doctor.visit import Check, Visit
from megalign.modules import describe
from megalign.rollout.rewards import choose_reward
from megalign.runtime.ranks import by_value
from megalign.schema import UserError

HASHING_S = 8.0  # after which no more files are compared
ADVICE = "copy it to every machine, or give a path on a shared file system"


def input_checks() -> list[Check]:
    """Return the checks of the files and of the reward's module."""
    return [Check("inputs", _look, _judge), Check("reward", _import_reward, _judge_reward)]


def _look(visit: Visit) -> dict[str, Any]:
    """Hash what this rank reads, unless a rank before it reads the very same files on the same machine."""
    cfg = visit.cfg
    if cfg is None:
        return {}
    inputs = inputs_of(cfg, visit.config_file)
    mine = signature(inputs)
    first = visit.share("which files ranks read", mine).index(mine)
    seen: dict[str, Any] = {"like": first, "settings": settings_digest(cfg)}
    if first == visit.world.rank:
        until = time.monotonic() + HASHING_S
        seen["inputs"] = [[each.field, each.shown, *digests(each, until)] for each in inputs]
        seen["late"] = time.monotonic() > until
    return seen


def _judge(visit: Visit, answers: Sequence[dict[str, Any]]) -> list[Finding]:
    if visit.cfg is None:
        return []
    findings = []
    by_settings = by_value([answer["settings"] for answer in answers])
    for ranks in list(by_settings.values())[1:]:
        line = f"{where(ranks, visit.hosts)} has other settings than {where([0], visit.hosts)}"
        findings.append(Finding("configuration", "fail", line, "start all ranks with the same file and overrides"))
    groups: dict[int, list[int]] = {}
    for rank, answer in enumerate(answers):
        groups.setdefault(answer["like"], []).append(rank)
    for index, (field, shown, *_) in enumerate(answers[0]["inputs"]):
        seen = {first: answers[first]["inputs"][index][2:] for first in groups}
        findings += _judge_input(visit, field, shown, groups, seen)
    if any(answer.get("late") for answer in answers):
        line = f"not all files were compared within {HASHING_S:g} s"
        findings.append(Finding("inputs", "warn", line, "the disk that holds them is slow to read"))
    if all(finding.state == "ok" for finding in findings):
        names = ", ".join(field for field, *_ in answers[0]["inputs"])
        same = ", the same on all ranks" if visit.world.size > 1 else ""
        return [Finding("inputs", "ok", f"{names}: readable{same}")]
    return findings


def _judge_input(
    visit: Visit, field: str, shown: str, groups: dict[int, list[int]], seen: dict[int, list[Any]]
) -> list[Finding]:
    """Compare one input between ranks; groups: {a rank: those that see its files}, seen: its [hashes, problem]."""
    findings = []
    unreadable = {first: problem for first, (_, problem) in seen.items() if problem}
    for problem in dict.fromkeys(unreadable.values()):
        ranks = [rank for first, reason in unreadable.items() if reason == problem for rank in groups[first]]
        findings.append(_unreadable(field, shown, problem, where(ranks, visit.hosts)))
    readable = {first: hashes for first, (hashes, problem) in seen.items() if not problem}
    if not readable:
        return findings
    reference = next(iter(readable))
    for first, hashes in readable.items():
        others = differing(hashes, readable[reference])
        if others:
            more = f" and {len(others) - 3} more" if len(others) > 3 else ""
            line = f"{shown}: {where(groups[first], visit.hosts)} reads another one than rank {reference}: "
            findings.append(Finding(field, "fail", line + ", ".join(others[:3]) + more, ADVICE))
    return findings


def _unreadable(field: str, shown: str, problem: str, ranks: str) -> Finding:
    if HUB_MODEL.fullmatch(shown):
        name = shown.removeprefix("hf://").partition("@")[0]
        line = f"{shown}: not in the Hub's cache of {ranks}"
        return Finding(field, "warn", line, f"download it before the job: hf download {name}; else train does, on all")
    return Finding(field, "fail", f"{shown}: {problem} ({ranks})", ADVICE)


def _import_reward(visit: Visit) -> str:
    """Return why the reward's module cannot be used on this rank; only rank 0 would say so in training's checks."""
    cfg = visit.cfg
    if cfg is None or cfg.rollout is None:
        return ""
    try:
        choose_reward(cfg.rollout.reward)
    except UserError as error:
        return str(error)
    except (Exception, SystemExit) as error:
        return f"rollout.reward is {cfg.rollout.reward!r}: {describe(error)}"
    return ""


def _judge_reward(visit: Visit, problems: Sequence[str]) -> list[Finding]:
    cfg: JobConfig | None = visit.cfg
    if cfg is None or cfg.rollout is None:
        return []
    findings = [
        Finding("rollout.reward", "fail", f"{problem} ({where(ranks, visit.hosts)})", "install it on every machine")
        for problem, ranks in by_value(problems).items()
        if problem
    ]
    return findings or [Finding("rollout.reward", "ok", f"{cfg.rollout.reward}: imported by all ranks")]
