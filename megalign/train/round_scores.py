"""Computes the log-probs that a round's updates need: of the policy that sampled it, and of a fixed reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from megalign.config.job import JobConfig
from megalign.data.group import TokenSequence
from megalign.engines.build import packing_of
from megalign.engines.loss_inputs import StepBatch, cat_tokens
from megalign.engines.protocol import Engine, Scorer, Want
from megalign.engines.scoring import Scored, score
from megalign.engines.step import is_coupled
from megalign.engines.token_metrics import mismatch, mismatch_metrics
from megalign.scores.store import ScoreStore, fill, from_plain, to_plain

Update = tuple[list[TokenSequence], int]  # its sequences and its number of groups


@dataclass
class RoundScores:
    """Holds log-probs at a round's start; each update's sequences were packed exactly as its step packs them."""

    start: list[list[Scored]] = field(default_factory=list)  # by update; empty where no update needs them
    reference: ScoreStore | None = None  # of a reference other than the policy at the round's start
    mismatch: list[dict[str, float]] = field(default_factory=list)  # metrics of each update in `start`
    current: list[Scored] | None = None  # of update 0, with log-sum-exps and entropy

    def batch(self, cfg: JobConfig, update: int, sequences: list[TokenSequence], num_groups: int) -> StepBatch:
        """Return the update's global batch. Update 0 is on policy: the step takes its own log-probs as the old ones."""
        traits = cfg.loss.traits()
        reference = None
        if traits.reference:
            reference = self.start[update] if self.reference is None else self.reference.get(sequences)
        old = self.start[update] if traits.old and update else None
        current = self.current if update == 0 else None
        return StepBatch(sequences, num_groups, reference, old, current, on_policy=update == 0)

    def plain(self) -> dict[str, Any]:
        """Return the scores that updates after the first need, as plain values for a checkpoint."""
        start = [[to_plain(entry) for entry in scored] for scored in self.start]
        reference = None if self.reference is None else self.reference.plain()
        return {"start": start, "reference": reference, "mismatch": self.mismatch}

    @classmethod
    def from_plain(cls, state: dict[str, Any], *, by_token: bool) -> RoundScores:
        """Rebuild the scores from the result of `plain`."""
        start = [[from_plain(total, logp) for total, logp in scored] for scored in state["start"]]
        entries = state["reference"]
        reference = None if entries is None else ScoreStore.from_plain(entries, by_token=by_token)
        return cls(start, reference, state["mismatch"])


def score_round(cfg: JobConfig, engine: Engine, fixed: Scorer | None, updates: Sequence[Update]) -> RoundScores:
    """Compute a round's scores before its first update; `fixed` scores a reference other than the round's policy.

    The policy is scored only if it is the reference (round_start), or if later updates need old log-probs; the first
    update uses its own step's, detached.
    """
    traits = cfg.loss.traits()
    round_start = traits.reference and cfg.reference.source == "round_start"
    scores = RoundScores()
    if round_start or (traits.old and len(updates) > 1):
        _score_start(cfg, engine, updates, scores)
    if traits.reference and not round_start:
        assert fixed is not None
        scores.reference = ScoreStore(by_token=traits.level == "token")
        sequences = (sequences for sequences, _ in updates)
        fill(scores.reference, fixed, sequences, coupled=traits.coupled, packing=packing_of(cfg))
    return scores


def _score_start(cfg: JobConfig, engine: Engine, updates: Sequence[Update], scores: RoundScores) -> None:
    """Score every update's sequences under the current weights and compare with the sampler's log-probs."""
    traits = cfg.loss.traits()
    for update, (sequences, _) in enumerate(updates):
        first = update == 0
        scored = score(
            engine,
            sequences,
            coupled=is_coupled(traits, on_policy=first),
            packing=packing_of(cfg),
            want=Want(traits.entropy and first, traits.accuracy and first, by_token=True),
        )
        logp_T = cat_tokens(each.logp_N for each in scored)
        scores.mismatch.append(mismatch_metrics(sequences, *mismatch(sequences, logp_T)))
        if first:
            scores.current = scored
        by_token = traits.level == "token"
        scores.start.append([Scored(entry.total, entry.logp_N if by_token else None) for entry in scored])
