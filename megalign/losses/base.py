"""What a loss gets, what it gives back, and how one registers itself.

Axes: S sequences, T scored tokens. A loss sees either the whole global batch or whole groups of it; the divisors
`num_groups` and `num_tokens` are always those of the whole global batch, so shares add up to the step's loss.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from torch import Tensor

from megalign.data.group import Pairing
from megalign.schema import Strict, UserError


@dataclass(frozen=True, slots=True)
class Scores:
    """Everything a loss may use. `[S]` sums are float64 over scored tokens; `[T]` log-probs are fp32.

    T runs over the scored tokens of these S sequences, in order; `seq_T` maps a token to its place in S.
    The `[T]` fields are None for losses of level "sequence".
    """

    policy_S: Tensor
    group_S: Tensor  # int64, a group's number in the step, 0 <= group < num_groups
    length_S: Tensor  # int64, scored tokens
    role_S: tuple[str, ...]
    num_groups: int  # of the whole global batch
    num_sequences: int  # likewise
    num_tokens: int  # scored tokens, likewise
    reference_S: Tensor | None = None
    old_S: Tensor | None = None
    reward_S: Tensor | None = None  # float64
    teacher_S: Tensor | None = None  # float64, mean over teachers of their mean token log-prob
    policy_T: Tensor | None = None
    old_T: Tensor | None = None
    reference_T: Tensor | None = None
    seq_T: Tensor | None = None

    def of_role(self, *roles: str) -> Tensor:
        """Bool [S]: which sequences play one of `roles`."""
        flags = [role in roles for role in self.role_S]
        return self.policy_S.new_tensor(flags).bool()


@dataclass(frozen=True, slots=True)
class LossOut:
    """The loss with its global divisor inside, and metrics.

    Metrics of level "sequence" losses are computed by one call on the whole global batch and taken as they are.
    Those of level "token" losses are shares with a global divisor inside, added up like the loss.
    """

    loss: Tensor
    metrics: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Traits:
    """What a loss needs, so that loaders and steps never ask for its name."""

    pairing: Pairing
    level: Literal["sequence", "token"] = "sequence"
    coupled: bool = False  # a sequence's coefficient depends on other sequences' scores
    reference: bool = False
    old: bool = False
    teachers: bool = False


class LossConfig(Strict):
    """Fields of one loss; `name` is what configuration files call it."""

    name: str

    def traits(self) -> Traits:
        raise NotImplementedError


class LossFn(Protocol):
    def __call__(self, scores: Scores, cfg: Any) -> LossOut: ...


@dataclass(frozen=True, slots=True)
class Loss:
    """A registered loss: its configuration class and its pure function."""

    config: type[LossConfig]
    function: LossFn


LOSSES: dict[str, Loss] = {}


def loss(config: type[LossConfig]) -> Callable[[LossFn], LossFn]:
    """Register a pure function under the name its configuration class declares."""

    def register(function: LossFn) -> LossFn:
        LOSSES[config.model_fields["name"].default] = Loss(config, function)
        return function

    return register


def choose_loss(raw: Any) -> LossConfig:
    """Turn ``{name: gvpo, beta: 0.1}`` into the class its loss file declares."""
    if isinstance(raw, LossConfig):
        return raw
    known = ", ".join(sorted(LOSSES))
    if not isinstance(raw, dict) or "name" not in raw:
        raise UserError(f"loss.name is missing; known: {known}")
    if raw["name"] not in LOSSES:
        raise UserError(f"loss.name is {raw['name']!r}; known: {known}")
    return LOSSES[raw["name"]].config.model_validate(raw)
