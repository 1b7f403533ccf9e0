"""Choose which responses of a group a loss gets, and their roles; draw EPA's weak negatives.

Every draw depends only on (seed, epoch, record), so neither layout nor resume can change it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from megalign.data.group import Group, Pairing, Response, Role, without_rounding
from megalign.data.records import BadRecord, bad_field
from megalign.schema import UserError

Picked = list[tuple[Role, Response]]
NEEDS = {
    "single": "one response (messages, or prompt with completion)",
    "preference": "chosen and rejected, or two or more responses with rewards",
    "contrast": "chosen and rejected, or responses with rewards",
    "samples": "two or more responses with rewards",
}
STREAMS = {"cycle": 0, "epoch": 1, "strong": 2, "weak": 3}
MAX_DRAWS = 1024
NO_NEGATIVE = (
    "no negative: no response has a lower reward, and no response to another prompt fits within {max_length} tokens "
    "after this one; must be a worse response, or more data"
)


def generator(stream: str, seed: int, *, epoch: int, item: int) -> np.random.RandomState:
    """Return the random generator of a stream, epoch and item (a record, a source, or 0).

    RandomState, because its streams never change between numpy versions.
    """
    entropy = np.random.SeedSequence([STREAMS[stream], seed, epoch, item])
    return np.random.RandomState(np.random.MT19937(entropy))


def check_pairing(group: Group, pairing: Pairing, *, format: str) -> None:
    """Refuse a record that the loss cannot use; pinned weak negatives are checked later, by `check_pins`."""
    field, needs = _field(format), NEEDS[pairing.kind]
    count = len(group.responses)
    if pairing.kind == "single":
        if count != 1:
            raise BadRecord("wrong format", f"field {field} holds {count} responses; must be {needs}, for this loss")
        return
    if group.paired:
        if pairing.kind == "samples":
            raise BadRecord("wrong format", f"field {field} is a pair without rewards; must be {needs}, for this loss")
        return
    if format != "responses":
        raise BadRecord("wrong format", f"field {field} holds one response; must be {needs}, for this loss")
    for index, response in enumerate(group.responses):
        if response.reward is None:
            message = f"field responses[{index}].reward is missing; must be a finite number"
            raise BadRecord("reward", message)
    if pairing.kind == "samples" and count < 2:
        raise BadRecord("one response", f"field responses has {count} response; must be {needs}")
    if pairing.kind == "preference" and len(set(rewards(group))) < 2:
        raise bad_field("responses", rewards(group), "rewards that are not all equal", reason="equal rewards")
    if pairing.kind == "contrast" and not pairing.weak and len(set(rewards(group))) < 2:
        allowed = "a response with a lower reward than the best (loss.weak is 0, so there is no other negative)"
        raise bad_field("responses", rewards(group), allowed, reason="no negative")


def _field(format: str) -> str:
    return {"prompt_completion": "completion", "preference": "chosen"}.get(format, format)


def rewards(group: Group) -> list[float]:
    """Return the rewards of all responses, rounding differences removed; the loader has checked that they exist."""
    return without_rounding([response.reward for response in group.responses if response.reward is not None])


def positive(group: Group) -> int:
    """Return the index of the chosen or positive response: the first of a pair, else the first of highest reward."""
    return 0 if group.paired else int(np.argmax(rewards(group)))


def own_sequences(group: Group, pairing: Pairing, *, seed: int, epoch: int) -> Picked:
    """Return the group's own responses with their roles in the loss, without weak negatives."""
    if pairing.kind in ("single", "samples"):
        return [("response", response) for response in group.responses]
    best = positive(group)
    if pairing.kind == "preference":
        worst = 1 if group.paired else int(np.argmin(rewards(group)))
        return [("chosen", group.responses[best]), ("rejected", group.responses[worst])]
    picked: Picked = [("positive", group.responses[best])]
    picked += [("strong", group.responses[index]) for index in _strong(group, pairing, best, seed=seed, epoch=epoch)]
    return picked


def _strong(group: Group, pairing: Pairing, best: int, *, seed: int, epoch: int) -> list[int]:
    values = [1.0, 0.0] if group.paired else rewards(group)
    worse = [index for index, value in enumerate(values) if value < values[best]]
    if pairing.strong_from == "all":
        return worse
    if pairing.strong_from == "random":
        draws = generator("strong", seed, epoch=epoch, item=group.record)
        return sorted(worse[index] for index in draws.permutation(len(worse))[: pairing.strong])
    return sorted(worse, key=lambda index: values[index])[: pairing.strong]


class WeakPool:
    """Holds the responses that may be weak negatives of other prompts, and draws a group's from them."""

    def __init__(self, groups: Sequence[Group], pairing: Pairing, *, seed: int, max_length: int) -> None:
        """Collect the responses of `groups`, among which pins are looked up too."""
        self.groups, self.pairing, self.seed, self.max_length = groups, pairing, seed, max_length
        self.records = {group.record: group for group in groups}
        # Draws are uniform over responses: a prompt with many responses is drawn from more often.
        positives_only = pairing.weak_from == "positives"
        counts = [1 if positives_only else len(group.responses) for group in groups]
        self.starts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])

    def draw(self, group: Group, *, epoch: int, num_strong: int) -> list[Response]:
        """Return a group's weak negatives, pinned ones first, then drawn ones; fewer than wanted if too few fit."""
        taken = {response.ids for response in group.responses}
        weak = []
        for record, index in group.weak[: self.pairing.weak]:
            weak.append(self.records[record].responses[index])
            taken.add(weak[-1].ids)
        for number in self._order(group, epoch) if len(weak) < self.pairing.weak else ():
            other, response = self._at(number)
            if self._fits(group, other, response) and response.ids not in taken:
                weak.append(response)
                taken.add(response.ids)
            if len(weak) == self.pairing.weak:
                break
        if not weak and not num_strong:
            raise UserError(f"record {group.record}: {NO_NEGATIVE.format(max_length=self.max_length)}")
        # Drop reward and behaviour log-probs: they belong to the response's own prompt.
        return [replace(response, reward=None, behaviour_logp=None) for response in weak]

    def _order(self, group: Group, epoch: int) -> list[int]:
        """Return numbers of the pool's responses to try for a group, in random order."""
        total = int(self.starts[-1])
        if not total:
            return []
        draws = generator("weak", self.seed, epoch=epoch, item=group.record)
        # A small pool is tried completely, so that no fitting response is missed.
        order = draws.permutation(total) if total <= MAX_DRAWS else draws.randint(0, total, MAX_DRAWS)
        return [int(number) for number in order]

    def check_pins(self, group: Group, *, first_record: int, num_records: int) -> None:
        """Refuse pins to missing records or responses, and used pins that break a rule of weak negatives."""
        own = {response.ids for response in group.responses}
        for number, (record, index) in enumerate(group.weak):
            field, shown = f"weak[{number}]", [record - first_record, index]
            if shown[0] >= num_records:
                raise bad_field(field, shown, f"records 0 to {num_records - 1}", reason="weak")
            other = self.records.get(record)
            if other is None:
                raise bad_field(field, shown, "a record that is not bad itself", reason="weak")
            if index >= len(other.responses):
                raise bad_field(
                    field, shown, f"responses 0 to {len(other.responses) - 1} of that record", reason="weak"
                )
            if number >= self.pairing.weak:
                continue
            response = other.responses[index]
            if other.prompt_ids == group.prompt_ids or response.ids in own:
                raise bad_field(
                    field,
                    shown,
                    "another prompt's response, unlike this prompt's own and earlier pins",
                    reason="weak",
                )
            if not self._fits(group, other, response):
                raise bad_field(field, shown, f"prompt and response within {self.max_length} tokens", reason="weak")
            own.add(response.ids)

    def _at(self, number: int) -> tuple[Group, Response]:
        index = int(np.searchsorted(self.starts, number, side="right")) - 1
        group = self.groups[index]
        response = positive(group) if self.pairing.weak_from == "positives" else number - int(self.starts[index])
        return group, group.responses[response]

    def _fits(self, group: Group, other: Group, response: Response) -> bool:
        return other.prompt_ids != group.prompt_ids and len(group.prompt_ids) + len(response.ids) <= self.max_length
