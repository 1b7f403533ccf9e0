"""Choose which sequences of a group a loss gets, and their roles; draw EPA's weak negatives.

Everything drawn is a function of (seed, epoch, record) alone, so neither layout nor resume can change it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from megalign.data.group import Group, Pairing, Response, Role, without_rounding
from megalign.data.records import BadRecord, refuse
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
    "no negative: no response has a lower reward, and none of another prompt fits under this one in {max_length} "
    "tokens; allowed: a worse response, or more data"
)


def generator(stream: str, seed: int, *, epoch: int, place: int) -> np.random.RandomState:
    """Return a random generator for one purpose. RandomState: its streams never change between numpy versions."""
    entropy = np.random.SeedSequence([STREAMS[stream], seed, epoch, place])
    return np.random.RandomState(np.random.MT19937(entropy))


def check_pairing(group: Group, pairing: Pairing, *, format: str) -> None:
    """Refuse a record that the loss cannot use; pinned weak negatives are checked once all records are known."""
    field, needs = _field(format), NEEDS[pairing.kind]
    count = len(group.responses)
    if pairing.kind == "single":
        if count != 1:
            raise BadRecord("wrong format", f"field {field} gives {count} responses to this loss; allowed: {needs}")
        return
    if group.paired:
        if pairing.kind == "samples":
            raise BadRecord("wrong format", f"field {field} is a pair without rewards; allowed: {needs}")
        return
    if format != "responses":
        raise BadRecord("wrong format", f"field {field} gives one response to this loss; allowed: {needs}")
    for place, response in enumerate(group.responses):
        if response.reward is None:
            message = f"field responses[{place}].reward is missing; allowed: a finite number"
            raise BadRecord("reward", message)
    if pairing.kind == "samples" and count < 2:
        raise BadRecord("one response", f"field responses has {count} response; allowed: {needs}")
    if pairing.kind == "preference" and len(set(rewards(group))) < 2:
        raise refuse("responses", rewards(group), "rewards that are not all equal", reason="equal rewards")
    if pairing.kind == "contrast" and not pairing.weak and len(set(rewards(group))) < 2:
        allowed = "a response with a lower reward than the best (loss.weak is 0, so there is no other negative)"
        raise refuse("responses", rewards(group), allowed, reason="no negative")


def _field(format: str) -> str:
    return {"prompt_completion": "completion", "preference": "chosen"}.get(format, format)


def rewards(group: Group) -> list[float]:
    """Return the rewards of all responses, without differences of rounding; the loader has checked that they exist."""
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
    picked += [("strong", group.responses[place]) for place in _strong(group, pairing, best, seed=seed, epoch=epoch)]
    return picked


def _strong(group: Group, pairing: Pairing, best: int, *, seed: int, epoch: int) -> list[int]:
    values = [1.0, 0.0] if group.paired else rewards(group)
    worse = [place for place, value in enumerate(values) if value < values[best]]
    if pairing.strong_from == "all":
        return worse
    if pairing.strong_from == "random":
        draws = generator("strong", seed, epoch=epoch, place=group.record)
        return sorted(worse[place] for place in draws.permutation(len(worse))[: pairing.strong])
    return sorted(worse, key=lambda place: values[place])[: pairing.strong]


class WeakPool:
    """Responses that may be weak negatives of other prompts, and the rules of who gets which."""

    def __init__(
        self,
        groups: Sequence[Group],
        pairing: Pairing,
        *,
        seed: int,
        max_length: int,
        records: Mapping[int, Group] | None = None,
    ) -> None:
        """`records`: where pins look a record number up (default: `groups`)."""
        self.groups, self.pairing, self.seed, self.max_length = groups, pairing, seed, max_length
        self.records = {group.record: group for group in groups} if records is None else records
        # Draws are uniform over responses, so a prompt with many gives more of them.
        positives_only = pairing.weak_from == "positives"
        counts = [1 if positives_only else len(group.responses) for group in groups]
        self.starts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])

    def draw(self, group: Group, *, epoch: int, num_strong: int) -> list[Response]:
        """Return weak negatives: pinned ones first, then drawn ones; fewer than wanted if the data holds no more."""
        taken = {response.ids for response in group.responses}
        weak = []
        for record, place in group.weak[: self.pairing.weak]:
            weak.append(self.records[record].responses[place])
            taken.add(weak[-1].ids)
        total = int(self.starts[-1])
        if len(weak) < self.pairing.weak and total:
            draws = generator("weak", self.seed, epoch=epoch, place=group.record)
            # A small pool is walked through whole, so that nothing that fits is missed.
            order = draws.permutation(total) if total <= MAX_DRAWS else draws.randint(0, total, MAX_DRAWS)
            for number in order:
                other, response = self._at(int(number))
                if self._fits(group, other, response) and response.ids not in taken:
                    weak.append(response)
                    taken.add(response.ids)
                    if len(weak) == self.pairing.weak:
                        break
        if not weak and not num_strong:
            raise UserError(f"record {group.record}: {NO_NEGATIVE.format(max_length=self.max_length)}")
        # Drop reward and behaviour log-probs: they belong to the response's own prompt.
        return [replace(response, reward=None, behaviour_logp=None) for response in weak]

    def check_pins(self, group: Group, *, first_record: int, num_records: int) -> None:
        """Refuse pins to what is not there, and those of the first W that break a rule of weak negatives."""
        own = {response.ids for response in group.responses}
        for number, (record, place) in enumerate(group.weak):
            field, shown = f"weak[{number}]", [record - first_record, place]
            if shown[0] >= num_records:
                raise refuse(field, shown, f"records 0 to {num_records - 1}", reason="weak")
            other = self.records.get(record)
            if other is None:
                raise refuse(field, shown, "a record that is not bad itself", reason="weak")
            if place >= len(other.responses):
                raise refuse(field, shown, f"responses 0 to {len(other.responses) - 1} of that record", reason="weak")
            if number >= self.pairing.weak:
                continue
            response = other.responses[place]
            if other.prompt_ids == group.prompt_ids or response.ids in own:
                raise refuse(
                    field, shown, "another prompt's response, unlike this prompt's own and earlier pins", reason="weak"
                )
            if not self._fits(group, other, response):
                raise refuse(field, shown, f"prompt and response within {self.max_length} tokens", reason="weak")
            own.add(response.ids)

    def _at(self, number: int) -> tuple[Group, Response]:
        index = int(np.searchsorted(self.starts, number, side="right")) - 1
        group = self.groups[index]
        place = positive(group) if self.pairing.weak_from == "positives" else number - int(self.starts[index])
        return group, group.responses[place]

    def _fits(self, group: Group, other: Group, response: Response) -> bool:
        return other.prompt_ids != group.prompt_ids and len(group.prompt_ids) + len(response.ids) <= self.max_length
