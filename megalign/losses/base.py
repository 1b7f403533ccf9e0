"""Defines the interface of losses: inputs, result, traits, registry.

Axes: S sequences, T scored tokens. A loss is called on the whole global batch or on a part of it: whole groups where it
is coupled, else any sequences, and for level "token" any of their tokens. The divisors `num_groups`, `num_sequences`
and `num_tokens` are always those of the whole global batch, so the parts' losses add up to the step's. What a part
cannot know of its groups (sizes, advantages) is filled in beforehand by `prepared`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, get_args, get_type_hints

import torch
from pydantic import ValidationError
from torch import Tensor

from megalign.data.group import Pairing
from megalign.losses.group_means import sequences_per_group
from megalign.modules import describe, find_function, is_module
from megalign.schema import Strict, UserError, all_problems, did_you_mean, find_problems, shorten

# Names that a step's own line of metrics has.
RESERVED = (
    *("step", "epoch", "round", "time", "seconds", "loss", "grad_norm", "lr", "tokens", "sequences", "groups"),
    *("tokens_per_second", "padding_fraction", "pass_mode", "pass_gap", "peak_memory_gb", "entropy", "token_accuracy"),
    *("aux_loss", "rollout_mismatch", "rollout_mismatch_max"),
)


@dataclass(frozen=True, slots=True)
class Scores:
    """Holds the inputs of a loss. `[S]` log-probs are float64 sums over scored tokens; `[T]` log-probs are fp32.

    T runs over the scored tokens of these S sequences, in order; `seq_T` maps a token to its index in S.
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
    advantage_S: Tensor | None = None  # float64, the loss's `prepare` of the whole global batch

    def sizes(self) -> Tensor:
        """Return int64 [S]: the size of each sequence's group; counted in these rows unless `prepared` filled it in."""
        if self.group_size_S is not None:
            return self.group_size_S
        return sequences_per_group(self.group_S, self.num_groups)

    def of_role(self, *roles: str) -> Tensor:
        """Return bool [S]: which sequences play one of `roles`."""
        flags = [role in roles for role in self.role_S]
        return self.policy_S.new_tensor(flags).bool()

    def part(self, members: Sequence[int]) -> Scores:
        """Select the rows of `members`; num_groups, num_sequences and num_tokens stay global."""
        index = torch.tensor(list(members), dtype=torch.int64)
        rows: dict[str, Any] = {name: getattr(self, name) for name in _BY_SEQUENCE}
        for name, value in rows.items():
            rows[name] = None if value is None else value[index]
        return replace(self, role_S=tuple(self.role_S[member] for member in members), **rows)

    def with_sums(self, policy_S: Tensor, *, on_policy: bool = False) -> Scores:
        """Return a copy with policy_S set; on_policy: old_S is set to the same values, detached."""
        return replace(self, policy_S=policy_S, old_S=policy_S.detach() if on_policy else self.old_S)

    def with_tokens(self, policy_T: Tensor, *, old_T: Tensor | None, reference_T: Tensor | None) -> Scores:
        """Return a copy with the `[T]` fields set, one value for each scored token of these sequences, in order."""
        seq_T = torch.arange(len(self.length_S)).repeat_interleave(self.length_S)
        return replace(self, policy_T=policy_T, seq_T=seq_T, old_T=old_T, reference_T=reference_T)


_BY_SEQUENCE = (
    *("policy_S", "group_S", "length_S", "reference_S", "old_S", "reward_S", "teacher_S"),
    *("group_size_S", "advantage_S"),
)


@dataclass(frozen=True, slots=True)
class LossOut:
    """Holds the loss with its global divisor inside, and metrics.

    Metrics of level "sequence" losses are computed by one call on the whole global batch and taken as they are.
    Those of level "token" losses are shares with a global divisor inside, added up like the loss.
    """

    loss: Tensor
    metrics: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Traits:
    """Declares what a loss needs, so that loaders and steps never ask for its name."""

    pairing: Pairing
    level: Literal["sequence", "token"] = "sequence"
    coupled: bool = False  # a sequence's coefficient depends on other sequences' scores
    linear: bool = False  # the loss is linear in the policy's log-probs: its coefficients are constants
    reference: bool = False
    old: bool = False
    old_in_advantages: bool = False  # `prepare` reads old_S of whole groups
    teachers: bool = False
    entropy: bool = False  # reported: the distributions' entropy in nats, mean over scored tokens
    accuracy: bool = False  # reported as token_accuracy: the fraction of tokens that no other is likelier than
    token_metrics: tuple[str, ...] = ()  # of level "token": the names of the metrics that the function returns


class LossConfig(Strict):
    """Holds the settings of one loss; `name` in a configuration is a built-in's name, or `module:function`."""

    name: str
    """Loss to train with: a built-in's name, or module:function of your own."""

    def traits(self) -> Traits:
        """Return what the loss needs under these settings; every loss's class has its own."""
        raise NotImplementedError(f"{type(self).__name__} has no traits()")


class LossFn(Protocol):
    def __call__(self, scores: Scores, cfg: Any) -> LossOut: ...


Prepare = Callable[[Scores, Any], Tensor]


@dataclass(frozen=True, slots=True)
class Loss:
    """Holds a registered loss: configuration class, pure function, and the function that computes advantages."""

    config: type[LossConfig]
    function: LossFn
    prepare: Prepare | None = None


class LossError(UserError):
    """Says what a user's loss did wrong; `members`: the sequences of the step that it had, None for all of them."""

    members: Sequence[int] | None = None


LOSSES: dict[str, Loss] = {}  # the built-in ones, by name
_DECORATED: list[Loss] = []  # those and the users' own


def loss(config: type[LossConfig], *, prepare: Prepare | None = None) -> Callable[[LossFn], LossFn]:
    """Register a pure function: a built-in one under its configuration class's `name`, a user's as `module:function`.

    prepare: computes advantages [S] of data alone (rewards, old and reference scores, never the policy's), so that the
    function itself may then be called on any part of a group.
    """

    def register(function: LossFn) -> LossFn:
        entry = Loss(config, function, prepare)
        _DECORATED.append(entry)
        name = _default_name(config)
        if name is not None and function.__module__.rpartition(".")[0] == __package__:
            if name in LOSSES:
                raise ValueError(f"the name {name!r} of {config.__name__} is another loss's; must be a new one")
            LOSSES[name] = entry
        return function

    return register


def _default_name(config: Any) -> str | None:
    """Return the default of a configuration class's `name`; None without one."""
    field = getattr(config, "model_fields", {}).get("name")
    return field.default if field is not None and isinstance(field.default, str) else None


def find_loss(name: str) -> Loss:
    """Return the built-in loss of that name, or the user's own that `module:function` names."""
    if ":" not in name:
        if name not in LOSSES:
            raise UserError(f"loss.name is {name!r}{_meant(name)}; must be one of {_known()}")
        return LOSSES[name]
    function = find_function("loss.name", name, signature="(scores, cfg)")
    entry = next((entry for entry in reversed(_DECORATED) if entry.function is function), None)
    if entry is None:
        raise UserError(f"loss.name is {name!r}: the function is not a loss; must be one under @loss(ItsConfigClass)")
    config = entry.config
    if not (isinstance(config, type) and issubclass(config, LossConfig)):
        raise UserError(f"loss.name is {name!r}: @loss has {shorten(config)}; must be a class derived from LossConfig")
    if _default_name(config) is not None or config.model_fields["name"].annotation is not str:
        reason = f"{config.__name__} declares a name; must leave it to LossConfig, where it is module:function"
        raise UserError(f"loss.name is {name!r}: {reason}")
    return entry


def _meant(name: str) -> str:
    """Return the part of an error that says what an unknown name may stand for; empty if nothing is near."""
    for known, entry in sorted(LOSSES.items()):
        variant = entry.config.model_fields.get("variant")
        if variant is not None and name in get_args(variant.annotation):
            return f"; did you mean {known} with variant: {name}?"
    guess = did_you_mean(name, sorted(LOSSES))
    if not guess and is_module(name):
        return f"; that is a module, must be {name}:function"
    return guess


def loss_function(cfg: LossConfig) -> LossFn:
    """Return the function of a chosen loss; errors of a user's own become UserErrors that name the loss."""
    entry = find_loss(cfg.name)
    return entry.function if cfg.name in LOSSES else _checked(entry.function, cfg.name)


def _checked(function: LossFn, name: str) -> LossFn:
    """Wrap a user's loss so that errors and wrong results name it."""

    def checked(scores: Scores, cfg: Any) -> LossOut:
        out = _call(name, function, scores, cfg)
        problem = _result_problem(out)
        if problem is not None:
            raise LossError(f"loss {name!r} returned {problem}")
        return out

    return checked


def _result_problem(out: object) -> str | None:
    """Say what is wrong with what a user's loss returned; None if nothing is."""
    if not isinstance(out, LossOut) or not isinstance(out.metrics, Mapping):
        return f"{shorten(out)}; must be LossOut of tensors without dimensions, its metrics a dict"
    if not all(isinstance(value, Tensor) and value.ndim == 0 for value in (out.loss, *out.metrics.values())):
        return f"{shorten(out)}; must be LossOut of tensors without dimensions"
    if any(value.is_complex() for value in (out.loss, *out.metrics.values())):
        return f"{shorten(out)}; must be LossOut of real numbers"
    for name in out.metrics:
        if not isinstance(name, str) or name in RESERVED or name.startswith("eval_"):
            return f"the metric {shorten(name)}; must be a word that no step reports of its own"
    return None


def _call(name: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a user's function; an exception in it becomes a UserError that names the loss and the line."""
    try:
        return function(*arguments)
    except (Exception, SystemExit) as error:
        raise LossError(f"loss {name!r} raised {describe(error)}") from error


def gradient_of(out: LossOut, leaf: Tensor, cfg: LossConfig) -> Tensor:
    """Return d loss / d leaf, zeros where the loss does not depend on it; LossError where it has no derivative."""
    if not out.loss.requires_grad:
        return torch.zeros_like(leaf)
    try:
        return torch.autograd.grad(out.loss, leaf)[0]
    except (Exception, SystemExit) as error:  # a user's own autograd function, or values changed in place
        raise LossError(f"loss {cfg.name!r}: its derivative raised {describe(error)}") from error


def prepared(scores: Scores, cfg: LossConfig, *, with_advantages: bool = True) -> Scores:
    """Fill in group sizes and advantages of the whole global batch's scores; `policy_S` may hold anything.

    with_advantages: False where old log-probs do not exist yet; the loss then computes advantages of whole groups.
    """
    prepare = find_loss(cfg.name).prepare if with_advantages else None
    advantage_S = None if prepare is None else _call(cfg.name, prepare, scores, cfg)
    if advantage_S is not None and (not isinstance(advantage_S, Tensor) or advantage_S.shape != scores.group_S.shape):
        returned = shorten(advantage_S)
        raise LossError(f"loss {cfg.name!r}: prepare returned {returned}; must be a tensor of one number a sequence")
    return replace(
        scores, group_size_S=scores.sizes(), advantage_S=None if advantage_S is None else advantage_S.detach()
    )


def choose_loss(raw: Any) -> LossConfig:
    """Turn ``{name: gvpo, beta: 0.1}`` into the loss's configuration class; `name` may be ``module:function``."""
    if isinstance(raw, LossConfig):
        return raw
    if not isinstance(raw, dict) or "name" not in raw:
        raise UserError(f"loss.name is missing; must be one of {_known()}")
    name = raw["name"]
    if not isinstance(name, str):
        raise UserError(f"loss.name is {name!r}; must be one of {_known()}")
    config = find_loss(name).config
    try:
        cfg = config.model_validate(raw)
    except ValidationError as error:
        raise UserError(all_problems(find_problems(error, model=config, section="loss"))) from None
    except Exception as error:  # in the validator of a user's loss
        raise UserError(f"loss {name!r} raised {describe(error)}") from error
    if name not in LOSSES:
        problem = traits_problem(_call(name, cfg.traits))
        if problem is not None:
            raise UserError(f"loss.name is {name!r}: {config.__name__}.traits() {problem}")
    return cfg


def traits_problem(traits: object) -> str | None:
    """Say what is wrong with what a configuration class's `traits` returned; None if nothing is."""
    if not isinstance(traits, Traits) or not isinstance(traits.pairing, Pairing):
        return f"returned {shorten(traits)}; must be Traits(Pairing(...), ...)"
    kinds, levels = (get_args(get_type_hints(cls)[key]) for cls, key in ((Pairing, "kind"), (Traits, "level")))
    if traits.pairing.kind not in kinds:
        return f"has Pairing({traits.pairing.kind!r}); must be one of {', '.join(kinds)}"
    if traits.level not in levels:
        return f"has level {traits.level!r}; must be one of {', '.join(levels)}"
    if traits.level == "token" and traits.coupled:
        return "has level 'token' and coupled; must be one of them: what a group decides together belongs in `prepare`"
    if traits.level != "token" and traits.token_metrics:
        return "has token_metrics at level 'sequence'; must be left out there"
    if "loss" in traits.token_metrics:
        return "has 'loss' among token_metrics; must be another name"
    if traits.old_in_advantages and not traits.old:
        return "has old_in_advantages without old; must be both"
    return None


def token_metrics_problem(out: LossOut, traits: Traits) -> str | None:
    """Say how the metrics of a token-level loss differ from those that its traits declare; None if they do not."""
    if traits.level != "token" or set(out.metrics) == set(traits.token_metrics):
        return None
    returned, declared = (", ".join(sorted(names)) or "none" for names in (out.metrics, traits.token_metrics))
    return f"returned the metrics {returned}; must be those of its traits' token_metrics, {declared}"


def _known() -> str:
    return f"{', '.join(sorted(LOSSES))}, or module:function"
