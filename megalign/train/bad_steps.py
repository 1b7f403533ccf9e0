"""Skips a step whose loss or gradient is not finite, and names its records."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch

from megalign.engines.scoring import Scored
from megalign.engines.step import StepBatch, StepResult
from megalign.losses.base import LossError
from megalign.schema import UserError
from megalign.train.job import Job

MOST = 6  # records named in a line; the log's file has all


def skip(job: Job, batch: StepBatch, result: StepResult, problem: str) -> None:
    """Count a step that is skipped and log it with its records; RuntimeError beyond `run.max_bad_steps`."""
    job.bad_steps += 1
    number, most = job.step + 1, job.cfg.run.max_bad_steps
    origins = job.feed.origins(job.step, offenders(batch, result))
    job.report.note(f"step {number}: {problem}; the records: {', '.join(dict.fromkeys(origins))}")
    problem += f" with {named(origins)}"
    if job.bad_steps > most:
        raise RuntimeError(f"{problem}; bad steps {job.bad_steps}, run.max_bad_steps {most}")
    job.report.say(f"step {number}: {problem}; skipped, {job.bad_steps} of run.max_bad_steps {most}")


@contextmanager
def naming_records(job: Job, batch: StepBatch) -> Iterator[None]:
    """Name the records that a user's loss had when it went wrong inside the block."""
    try:
        yield
    except LossError as error:
        members = range(len(batch.sequences)) if error.members is None else error.members
        raise UserError(f"{named(job.feed.origins(job.step, members))}: {error}") from error


def offenders(batch: StepBatch, result: StepResult) -> list[int]:
    """Return the indices of the sequences whose own numbers are not finite; all where none shows it by itself.

    A sequence's log-probs, those of reference and old policy, and its reward are looked at first: one that is not
    finite spoils the coefficients of its whole group, or batch. Coefficients come next, in the fp32 of the gradient.
    """
    sequences = range(len(batch.sequences))
    scores = [result.policy_S.tolist(), *(_totals(each) for each in (batch.reference, batch.old) if each is not None)]
    rewards = [sequence.response.reward or 0.0 for sequence in batch.sequences]
    bad = _not_finite([*scores, rewards])
    bad = bad or _not_finite([result.coefficient_S.tolist()])
    return bad or [*sequences]


def _totals(scored: Sequence[Scored]) -> list[float]:
    return [entry.total for entry in scored]


def _not_finite(columns: Iterable[Sequence[float]]) -> list[int]:
    """Return the rows in which a number is not finite in fp32."""
    finite = torch.stack([torch.tensor(column, dtype=torch.float64).float().isfinite() for column in columns])
    return (~finite.all(0)).nonzero().flatten().tolist()


def named(origins: Sequence[str]) -> str:
    """Return the origins in a line, each once, the first few by name."""
    different = list(dict.fromkeys(origins))
    more = len(different) - MOST
    return ", ".join(different[:MOST]) + (f" and {more} more" if more > 0 else "")
