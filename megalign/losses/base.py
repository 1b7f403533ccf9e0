"""What a loss gets, what it gives back, and how one registers itself.

Axes: S sequences, T scored tokens. A loss sees the whole global batch or a part of it: whole groups where it is
coupled, else any sequences, and for level "token" any of their tokens. The divisors `num_groups`, `num_sequences` and
`num_tokens` are always those of the whole global batch, so shares add up to the step's loss. What a part cannot know
of its groups is filled in beforehand by `prepared`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

from pydantic import ValidationError
from torch import Tensor

from megalign.data.group import Pairing
from megalign.losses.groups import group_size
from megalign.schema import Strict, UserError, all_problems, find_problems


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
    group_size_S: Tensor | None = None  # int64, how many sequences its group has in the whole global batch
    advantage_S: Tensor | None = None  # float64, what the loss's `prepare` made of the whole global batch

    def sizes(self) -> Tensor:
        """Int64 [S]: sequences in each one's group; counted here where nobody filled it in."""
        if self.group_size_S is not None:
            return self.group_size_S
        return group_size(self.group_S, self.num_groups)

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
    linear: bool = False  # the loss is linear in the policy's log-probs: its coefficients are constants
    reference: bool = False
    old: bool = False
    old_in_advantages: bool = False  # `prepare` reads old_S of whole groups
    teachers: bool = False
    entropy: bool = False  # reported: the distributions' entropy in nats, mean over scored tokens
    accuracy: bool = False  # reported as token_accuracy: the share of scored tokens that no other is likelier than


class LossConfig(Strict):
    """Fields of one loss; `name` is what configuration files call it."""

    name: str

    def traits(self) -> Traits:
        raise NotImplementedError


class LossFn(Protocol):
    def __call__(self, scores: Scores, cfg: Any) -> LossOut: ...


Prepare = Callable[[Scores, Any], Tensor]


@dataclass(frozen=True, slots=True)
class Loss:
    """A registered loss: its configuration class, its pure function, and what must see whole groups first."""

    config: type[LossConfig]
    function: LossFn
    prepare: Prepare | None = None


LOSSES: dict[str, Loss] = {}


def loss(config: type[LossConfig], *, prepare: Prepare | None = None) -> Callable[[LossFn], LossFn]:
    """Register a pure function under the name its configuration class declares.

    prepare: makes advantages [S] of data alone (rewards, old and reference scores, never the policy's), so that the
    function itself may then be called on any part of a group.
    """

    def register(function: LossFn) -> LossFn:
        LOSSES[config.model_fields["name"].default] = Loss(config, function, prepare)
        return function

    return register


def prepared(scores: Scores, cfg: LossConfig, *, with_advantages: bool = True) -> Scores:
    """The whole global batch's scores with group sizes and advantages filled in; `policy_S` may hold anything.

    with_advantages: False where their data are still to come; the loss function then makes them of whole groups.
    """
    prepare = LOSSES[cfg.name].prepare if with_advantages else None
    advantage_S = None if prepare is None else prepare(scores, cfg).detach()
    return replace(scores, group_size_S=scores.sizes(), advantage_S=advantage_S)


def choose_loss(raw: Any) -> LossConfig:
    """Turn ``{name: gvpo, beta: 0.1}`` into the class its loss file declares."""
    if isinstance(raw, LossConfig):
        return raw
    known = ", ".join(sorted(LOSSES))
    if not isinstance(raw, dict) or "name" not in raw:
        raise UserError(f"loss.name is missing; known: {known}")
    name = raw["name"]
    if not isinstance(name, str) or name not in LOSSES:
        raise UserError(f"loss.name is {name!r}; known: {known}")
    config = LOSSES[name].config
    try:
        return config.model_validate(raw)
    except ValidationError as error:
        raise UserError(all_problems(find_problems(error, model=config, section="loss"))) from None
