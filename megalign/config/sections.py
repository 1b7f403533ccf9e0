"""Declare the sections of a job's configuration except `data`, `loss` and `engine`, which have files of their own.

Keys for a later version exist already and accept only their default.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from megalign.schema import NoneWord, PathText, Strict, Text, UserError, hub_hint

Pair = BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)
# Linear layers of the families in megalign's tables; other models' layers have names of their own.
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
DecayRate = Annotated[float, Field(ge=0, lt=1)]


def only(default: Any) -> AfterValidator:
    """Return a validator that accepts only the default of a key whose other values are not implemented yet."""

    def check(value: Any) -> Any:
        if value != default:
            raise ValueError(f"must be {json.dumps(default)} in this version")
        return value

    return AfterValidator(check)


# One line per section, shown by the command line's help, `megalign keys` and docs/configuration.md.
SECTIONS = {
    "run": "where the run is kept, its length, its number format and its seed",
    "model": "the model to train",
    "rollout": "rounds of sampling, rewarding and training; leave it out to train on records",
    "data": "the training records, their tokens, and how steps and micro-batches are filled",
    "eval": "held-out data and how often they are evaluated",
    "loss": "the loss and its own keys",
    "reference": "the policy that a loss compares with",
    "teachers": "aligned models that PoFT weighs records by",
    "optimizer": "AdamW, gradient clipping and the learning rate",
    "parallel": "how the ranks share the model and the data",
    "lora": "adapters instead of whole weights",
    "engine": "which engine trains, how it computes, and its own settings",
    "checkpoint": "when checkpoints are written, which are kept, and how a run goes on",
    "export": "the Hugging Face checkpoint that a run writes",
    "watchdog": "when a job that hangs is ended, and how often ranks compare their weights",
    "trackers": "where metrics go besides metrics.jsonl: tensorboard, wandb",
}


def is_checkpoint_dir(path: str) -> bool:
    """Return whether `path` is a local directory with a config.json, as of a Hugging Face checkpoint."""
    return (Path(path) / "config.json").is_file()


class RunConfig(Strict):
    """Declares `run`: where the run is kept, its length, its number format and its seed."""

    dir: PathText
    """Directory that the run writes: log, metrics, checkpoints; the same command in the same directory goes on."""
    seed: NonNegativeInt = 0
    """Seed of data order, sampled responses, adapters and new weights; change it to repeat a run with other draws."""
    steps: PositiveInt | None = None
    """Number of optimizer steps; give this or `run.epochs`, and neither with a `rollout` section."""
    epochs: PositiveFloat | None = None
    """Number of passes over the training data, fractions too; give this or `run.steps`."""
    dtype: Literal["bf16", "fp32"] = "bf16"
    """Number format of weights and activations; bf16 keeps fp32 master weights and gradients, fp32 is for small models
    and tests."""
    max_minutes: Annotated[PositiveFloat | None, NoneWord] = None
    """Minutes after which the run saves and ends with code 75; set it below a queue's time limit (Slurm's is known)."""
    max_bad_steps: NonNegativeInt = 0
    """Number of steps with a loss or gradient that is not finite that are skipped before the run fails; raise it for
    rare spikes in bf16."""
    max_pass_gap: NonNegativeFloat | Literal["auto"] = "auto"
    """Largest difference in nats of a token's log-prob between the two passes of a step before the run stops; auto is
    1e-3 in fp32 and 0.1 in bf16."""
    dump_steps: list[PositiveInt] = []
    """Steps, counted from 1, whose sequences are written with log-probs and coefficients to `steps/`; set it to look
    into a loss."""
    deterministic: bool = False
    """Whether torch may use only deterministic kernels, so that a layout run twice gives the same bits; slower on a
    GPU."""


class ModelSection(Strict):
    """Declares `model`: the model to train."""

    path: PathText
    """Hugging Face directory of the model to train, or hf://org/name[@revision] for one of the Hub's."""
    aux_loss_coefficient: NonNegativeFloat = 0.0
    """Weight of the load-balancing loss of a mixture of experts; 0.001 to 0.01 keeps experts evenly used, 0 leaves it
    out."""


class EvalConfig(Strict):
    """Declares `eval`: held-out data and how often they are evaluated."""

    path: Annotated[PathText | None, NoneWord] = None
    """Held-out records in a format that `data.path` takes, or prompts with a `rollout` section; none evaluates
    nothing."""
    every: NonNegativeInt = 0
    """Steps between evaluations, besides those before the first and after the last step; 0 is only these two."""

    @model_validator(mode="after")
    def _complete(self) -> EvalConfig:
        if self.every and self.path is None:
            raise UserError(f"eval.path is missing; eval.every is {self.every}, so it is required")
        return self


class ReferenceConfig(Strict):
    """Declares `reference`: the policy that a loss compares with."""

    source: PathText | None = None
    """Model that gives the reference's log-probs: initial (the model as it began), round_start, none, or a Hugging Face
    directory; by default initial for losses that need one."""
    cache_dir: Annotated[PathText | None, NoneWord, only(None)] = None
    """Directory for scores that several runs share; not implemented yet, so none."""

    @field_validator("source")
    @classmethod
    def _known(cls, source: str | None) -> str | None:
        if source is None or source in ("initial", "none", "round_start") or source.startswith("hf://"):
            return source
        if is_checkpoint_dir(source):
            return source
        raise ValueError(
            "must be initial, none, round_start, hf://org/name or an existing Hugging Face directory with a config.json"
            + hub_hint(source)
        )


class TeacherConfig(Strict):
    """Declares an entry of `teachers`: one of the aligned models that PoFT weighs records by."""

    name: Text
    """Name of the model in `teacher_scores` of records; a record that has the score is not scored again."""
    path: PathText
    """Hugging Face directory of the model, or hf://org/name; it is scored with its own tokenizer and chat template."""


class RolloutConfig(Strict):
    """Declares `rollout`: rounds of sampling responses to prompts, rewarding them and training on them."""

    path: PathText
    """File of prompts: records with `prompt` and what the reward needs, such as `answer`."""
    rounds: PositiveInt
    """Number of rounds; the run has rounds x updates_per_round steps."""
    prompts_per_round: PositiveInt
    """Number of prompts that a round samples responses to."""
    k: PositiveInt
    """Number of responses to each prompt, 2 or more; more make a better baseline and cost sampling time."""
    temperature: PositiveFloat = 1.0
    """Sampling temperature; log-probs of policy, old policy and reference are divided by it too."""
    max_new_tokens: PositiveInt
    """Largest number of tokens of a response; must be below `data.max_length`, raise it where many responses are
    cut."""
    updates_per_round: PositiveInt
    """Number of optimizer steps on the samples of a round; must divide `prompts_per_round` unless
    `data.groups_per_step` is set."""
    reward: Text
    """Reward of a response: exact_match, final_number, reasoning_gym or module:function of your own."""


class ScheduleConfig(Strict):
    """Declares `optimizer.schedule`: the learning rate over the steps."""

    name: Literal["constant", "cosine", "linear"] = "constant"
    """Shape after the warm-up: constant, or cosine or linear down to `min_lr` at the last step."""
    warmup_steps: NonNegativeInt = 0
    """Number of first steps over which the rate rises from 0; 10 to 100 avoids a jump while Adam has no history."""
    min_lr: NonNegativeFloat = 0.0
    """Learning rate at the last step, absolute; only cosine and linear go down to it."""


class OptimizerSection(Strict):
    """AdamW, gradient clipping and the learning rate."""

    lr: NonNegativeFloat
    """Learning rate; about 1e-5 for SFT and 1e-6 or less for preference and reward losses of whole models, ten times
    that for LoRA."""
    betas: Annotated[tuple[DecayRate, DecayRate], Pair] = (0.9, 0.95)
    """Decay rates of Adam's averages of the gradient and of its square."""
    eps: PositiveFloat = 1e-8
    """Number added to Adam's denominator; raise it to 1e-5 where gradients are tiny or runs are compared to the bit."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay of parameters of two or more dimensions."""
    clip_norm: Annotated[PositiveFloat | None, NoneWord] = 1.0
    """Largest gradient norm; longer gradients are scaled down to it, none never scales."""
    schedule: ScheduleConfig = ScheduleConfig()
    """The learning rate over the steps."""

    @model_validator(mode="after")
    def _downward(self) -> OptimizerSection:
        if self.schedule.min_lr > self.lr:
            raise UserError(
                f"optimizer.schedule.min_lr is {self.schedule.min_lr}: must be at most optimizer.lr {self.lr}"
            )
        return self


class ParallelConfig(Strict):
    """Declares `parallel`: the sizes of the parallel axes; the remaining ranks are data-parallel."""

    tensor: PositiveInt = 1
    """Ranks that share every layer's matrices and the vocabulary; raise it when a layer or its activations do not fit
    one GPU."""
    pipeline: PositiveInt = 1
    """Stages of layers; raise it when the model does not fit the GPUs of one machine."""
    virtual_pipeline: PositiveInt = 1
    """Runs of layers that each stage holds (interleaved schedule); raise it when stages wait for each other."""
    context: PositiveInt = 1
    """Ranks that share each sequence's tokens; raise it when long sequences do not fit."""
    expert: PositiveInt = 1
    """Ranks that share the experts of a mixture; must divide the number of experts."""
    sequence: bool = False
    """Whether tensor ranks also share token positions between matrices; saves activation memory, needed with
    experts."""


class LoraConfig(Strict):
    """Declares `lora`: adapters on linear layers, by their names in Hugging Face checkpoints; the base stays frozen."""

    rank: PositiveInt
    """Rank of the adapters; 8 to 64, higher learns more and costs memory."""
    alpha: PositiveFloat
    """Scale of the adapters: their product is multiplied by alpha / rank."""
    targets: Annotated[list[Text], Field(min_length=1)] = list(LORA_TARGETS)
    """Linear layers that get adapters, by the last part of their names; fewer save memory."""

    @field_validator("targets")
    @classmethod
    def _once(cls, targets: list[str]) -> list[str]:
        if len(set(targets)) < len(targets):
            raise ValueError("must name every layer once")
        return targets


class CheckpointConfig(Strict):
    """Declares `checkpoint`: when checkpoints are written, which are kept, and how a run goes on."""

    every: Annotated[NonNegativeInt | None, NoneWord] = None
    """Steps between checkpoints; 0 writes one only when the run stops early or has no export. none is 200 in runs of
    more than 200 steps, else 0."""
    keep: PositiveInt = 2
    """Number of newest checkpoints that are kept."""
    keep_every: NonNegativeInt = 0
    """Steps whose checkpoints are never dropped: those that this divides; 0 for none."""
    async_save: bool = Field(default=False, alias="async")
    """Whether checkpoints are written beside training, from a copy in host memory: 16 bytes a parameter, over the data
    ranks."""
    resume: PathText = "auto"
    """Checkpoint to go on from: auto (the run's newest), never, or a checkpoint directory to start from."""
    allow: list[Text] = []
    """Keys or sections in which a resumed job may differ from the one that saved, such as optimizer.lr."""


class ExportConfig(Strict):
    """Declares `export`: the Hugging Face checkpoint that a run writes."""

    hf_dir: Annotated[PathText | None, NoneWord] = None
    """Directory for the trained model as a Hugging Face checkpoint, such as "{run.dir}/hf"; none writes no export."""
    every: NonNegativeInt = 0
    """Steps between exports, besides that at the end; 0 is only at the end."""

    @model_validator(mode="after")
    def _complete(self) -> ExportConfig:
        if self.every and self.hf_dir is None:
            raise UserError(f"export.hf_dir is missing; export.every is {self.every}, so it is required")
        return self


class WatchdogConfig(Strict):
    """Declares `watchdog`: when a job that hangs is ended, and how often ranks compare their weights."""

    timeout_s: PositiveFloat = 600.0
    """Seconds after which a job is ended, with a report, because a rank gives no sign of life or none makes progress:
    micro-batches, sampled tokens, rewards and bytes of a checkpoint count. Ranks also wait that long for each other to
    come."""
    check_every: NonNegativeInt = 100
    """Steps between two comparisons, by a checksum, of the weights that several ranks hold alike; 0 is never."""
