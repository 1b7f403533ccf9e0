"""Steps on which layouts are compared: tiny checkpoints, ragged batches, and the jobs that run them on the engine.

A job runs once in fresh processes for all layouts of one world size; rank 0 leaves what came out in a file a layout.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from megalign.data.group import Response, TokenSequence
from megalign.model_config import Lora
from tests.support.loss_cases import COUPLED, KINDS, LOSSES
from tests.support.parity_layouts import DEFAULT, EXPERTS, LAYOUTS, OLDER, QUICK

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 1000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
# name: (model_type, tied, what differs from SIZES)
MODELS: dict[str, tuple[str, bool, dict[str, Any]]] = {
    "llama": ("llama", False, {}),
    "llama-tied": ("llama", True, {}),
    "llama-scaled-biased": (
        "llama",
        False,
        {"num_hidden_layers": 4, "rope_parameters": LLAMA3_ROPE, "attention_bias": True, "mlp_bias": True},
    ),
    "mistral": ("mistral", False, {"sliding_window": 5}),
    "qwen2": ("qwen2", True, {}),
    "qwen3": ("qwen3", False, {"head_dim": 10}),
    # Stages of unequal depth; as many key heads as the widest tensor group has ranks.
    "deep": ("llama", True, {"num_hidden_layers": 5, "num_attention_heads": 8, "num_key_value_heads": 4}),
    "mixtral": ("mixtral", False, {"num_hidden_layers": 4, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2_moe": (
        "qwen2_moe",
        False,
        {
            "num_hidden_layers": 5,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 40,
            "mlp_only_layers": [1],
            "norm_topk_prob": False,
        },
    ),
    "qwen3_moe": (
        "qwen3_moe",
        True,
        {
            "num_hidden_layers": 4,
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 20,
            "decoder_sparse_step": 2,
            "norm_topk_prob": True,
            "head_dim": 10,
        },
    ),
}
AUX = 0.03  # coefficient of the experts' auxiliary loss
# Seeds whose weights leave the k-th and the next router logit of every token apart.
SEEDS = {"mixtral": 39, "qwen2_moe": 28, "qwen3_moe": 27}
FAMILIES = ("llama-scaled-biased", "mistral", "qwen2", "qwen3")
SIZES = {
    "vocab_size": 131,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0},
}


def fill_randomly(model: torch.nn.Module, draw: torch.Generator) -> None:
    """Give every parameter a random value, norms near one."""
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=draw)
            # Wider vocabulary tensors: logits far from uniform without layers that amplify rounding.
            scale = 0.3 if "embed_tokens" in key or "lm_head" in key else 0.2
            parameter.copy_(1 + 0.2 * noise if key.endswith("norm.weight") else scale * noise)


def write_checkpoints(folder: Path, name: str) -> None:
    """`policy` with every parameter random, and `reference` and `old`, which are near it."""
    import transformers

    model_type, tied, fields = MODELS[name]
    config = transformers.AutoConfig.for_model(
        model_type, **copy.deepcopy({**SIZES, "tie_word_embeddings": tied, **fields})
    )
    draw = torch.Generator().manual_seed(SEEDS.get(name, 21))  # chosen like that of `step_sequences`
    model = transformers.AutoModelForCausalLM.from_config(config)
    fill_randomly(model, draw)
    with torch.no_grad():
        policy = {key: parameter.clone() for key, parameter in model.named_parameters()}
        for checkpoint, scale in (("policy", 0.0), ("reference", 0.02), ("old", 0.004)):
            for key, parameter in model.named_parameters():
                parameter.copy_(policy[key] + scale * torch.randn(parameter.shape, generator=draw))
            model.save_pretrained(folder / name / checkpoint)


def step_sequences(kind: str) -> list[TokenSequence]:
    """A step's global batch: ragged groups, a prompt of one token, a response that is not scored throughout.

    The seed is one whose losses are not small differences of large terms, so that relative errors mean something.
    """
    draw = torch.Generator().manual_seed(48 + list(KINDS).index(kind))

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=draw))

    sequences = []
    for group, roles in enumerate(KINDS[kind]):
        prompt = tuple(number(0, 131) for _ in range(1 if group == 0 else number(2, 9)))
        teacher = -3.0 + group / 4 if kind == "single" else None
        for role in roles:
            length = number(1, 13)
            scored = tuple(place % 3 != 1 for place in range(length)) if len(sequences) == 1 else None
            ids = tuple(number(0, 131) for _ in range(length))
            response = Response(ids, reward=number(0, 5) / 2, scored=scored)
            sequences.append(TokenSequence(group, group, role, prompt, response, teacher))
    longest = sequences[-1]
    ids = (longest.response.ids * 20)[:20]
    sequences[-1] = replace(longest, response=replace(longest.response, ids=ids, scored=None))
    return sequences


SMALL, LARGE = 32, 160  # token positions; the first is less than some groups need
CUTTINGS = [(budget, packing) for budget in (SMALL, LARGE) for packing in (True, False)]
ALONE = (1, True)  # every sequence is longer than that
EXTREMES = (CUTTINGS[0], CUTTINGS[3])


@dataclass(frozen=True)
class Case:
    """One step: a model, a loss and a cutting."""

    model: str
    loss: str
    budget: int
    packing: bool
    gradients: bool = False

    @property
    def key(self) -> str:
        """The case's name among the results."""
        return f"{self.model} {self.loss} {self.budget} {'packed' if self.packing else 'padded'}"


def parity_cases(layout: str) -> list[Case]:
    """The steps of a layout, grouped by model."""
    if layout not in OLDER:
        return _cases_of_new_axes(layout)
    everything = layout not in DEFAULT
    cases = [
        Case("llama", loss, *cutting, gradients=everything or loss in ("gvpo", "epa"))
        for loss in LOSSES
        for cutting in (CUTTINGS if everything or layout in ("one", "tp2+sp") else EXTREMES)
    ]
    if layout == "one":
        cases += [Case(model, "gvpo", *cut, gradients=True) for model in ("deep", *EXPERTS) for cut in EXTREMES]
    cases += [Case("llama", loss, *ALONE, gradients=True) for loss in ("sft", "poft", "gvpo")]
    # All losses share the engine's way from coefficients to gradients; these show it for tied heads.
    for loss in LOSSES if everything else ("sft", "gvpo"):
        cuttings = CUTTINGS if everything else EXTREMES
        cases += [Case("llama-tied", loss, *cutting, gradients=True) for cutting in cuttings]
    if everything or layout in ("one", "tp2+sp", "tp2xpp2"):
        for model in FAMILIES:
            cases += [Case(model, "gvpo", *cutting, gradients=True) for cutting in EXTREMES]
    return cases


def _cases_of_new_axes(name: str) -> list[Case]:
    layout, few = LAYOUTS[name], name in QUICK
    cases = []
    for model in ("deep", *EXPERTS):
        if layout.takes(model):
            losses: Sequence[str] = ("sft", "gvpo") if few or model != "deep" else tuple(LOSSES)
            losses = ("sft", "dapo", "epa", "gvpo") if few and model == "deep" else losses
            cuttings = EXTREMES if few or model != "deep" else CUTTINGS
            cases += [Case(model, loss, *cutting, gradients=True) for loss in losses for cutting in cuttings]
    return cases


# Every loss in each pass mode where two kinds of ranks hold the scores, some losses elsewhere.
MODES = {
    "one": tuple(LOSSES),
    "tp2+sp": tuple(LOSSES),
    "pp2": ("sft", "dapo", "rloo", "gvpo"),
    "dp2": ("sft", "dapo", "rloo", "gvpo"),
}
# Ways to compute a head: (model, options of the engine; `fields` change the model's description).
HEADS = ("tp2", "tp2+sp", "pp2", "dp2")
CAPPED = {"logit_scale": 0.7, "logit_softcap": 3.0}
OVERLAP = {"megatron": {"overlap_grad_reduce": True}}
HEAD_WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "capped": ("llama", {"fields": CAPPED}),
    "invariant, small chunks": ("llama", {"tp_invariant": True, "chunk_tokens": 5}),
    "overlap": ("llama", OVERLAP),
    "overlap, tied": ("llama-tied", OVERLAP),
}
ADAM_STEPS, LR, CLIP, EPS, DECAY = 3, 1e-3, 1.0, 1e-5, 0.1
# Losses bend more over adapters: at LR rounding alone moves weights so that the third loss is off by 1e-5.
ADAPTER_LR = 1e-4
OVERLAP_BOTH = {"megatron": {"overlap_grad_reduce": True, "overlap_param_gather": True}}
# On which layouts the same is computed with a setting that must not matter.
RECOMPUTED = {"one": "llama", "tp2": "llama", "cp2": "deep", "pp2+vpp2": "deep", "ep2": "qwen2_moe"}
OVERLAPPED = {"dp2": "llama", "cp2": "deep", "pp2+vpp2": "deep", "pp2xdp2+vpp2+ep2": "qwen2_moe"}
REPEATED = {"tp2+sp": "llama", "cp2": "deep", "pp2+vpp2": "deep", "ep2": "qwen2_moe"}
# Adapters on all kinds of layers, and which model gets them where.
ADAPTERS = Lora(4, 8.0, ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"))
FEW_ADAPTERS = Lora(2, 5.0, ("q_proj", "v_proj", "up_proj", "down_proj"))
LORA = {
    "one": "deep",
    "tp2": "deep",
    "tp2+sp": "deep",
    "dp2": "deep",
    "pp2+vpp2": "deep",
    "ep2": "qwen2_moe",
    "tp2xcp2+sp": "mixtral",
    "tp2xdp2+sp+ep4": "qwen3_moe",
    "pp2xdp2+vpp2+ep2": "qwen2_moe",
    "tp4": "deep",
    "cp2xdp2": "deep",
    "tp2xpp2+vpp2+sp": "deep",
}


def trajectories(layout: str) -> list[tuple[str, str]]:
    """(model, loss) of the runs of some optimizer steps."""
    if layout in OLDER:
        found = [("llama", "epa"), ("llama-tied", "gvpo")]
        return [*found, ("qwen2_moe", "gvpo")] if layout == "one" else found
    return [(model, "gvpo") for model in ("deep", "qwen2_moe") if LAYOUTS[layout].takes(model)]


def by_mode(
    modes: dict[str, dict[str, Any]], loss: str, cutting: tuple[int, bool]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A step's result in two passes, and those in the other modes that it can be taken in; each went as was asked."""
    key = Case("llama", loss, *cutting).key
    two_pass, known = modes[f"{key} two_pass"], modes[f"{key} known_scores"]
    assert (two_pass["pass_mode"], known["pass_mode"]) == ("two_pass", "known_scores")
    # On a CPU in fp32 scoring, and both passes, are the same arithmetic.
    assert two_pass["pass_gap"] == known["pass_gap"] == 0.0
    others = [known]
    if loss not in COUPLED or cutting[0] == LARGE:
        others.append(modes[f"{key} single_pass"])
        assert others[-1]["pass_mode"] == "single_pass" and others[-1]["pass_gap"] is None
    return two_pass, others


def run_world(folder: Path, names: Sequence[str]) -> None:
    """The job: every part of every named layout."""
    from megalign.runtime.distributed import process_group

    with process_group(timeout_s=120) as world:
        from tests.support.parity_job import Job

        for name in names:
            results = Job(folder, name, LAYOUTS[name], world).run()
            if world.is_main:
                torch.save(results, folder / f"{name}.pt")
