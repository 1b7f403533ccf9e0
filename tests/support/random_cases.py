"""Drawn steps: any layout that works, with a model, data, a loss and a cutting, held against the float64 answer.

hypothesis draws, from a seed; cases of one number of ranks run in one launch.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from torch import Tensor

from megalign.config.layout import Layout, problem
from megalign.convert import read_model_config
from megalign.data.group import Response, TokenSequence
from megalign.model_config import ModelConfig
from tests.support.loss_cases import LOSSES, USERS
from tests.support.oracle import aux_loss, load_float64, router_logits, scored_rows, slow_loss, token_scores
from tests.support.parity_cases import EPS, LLAMA3_ROPE, fill_randomly
from tests.support.parity_layouts import EXPERTS

SIZES = (1, 2, 2, 4, 4, 4)  # of worlds; larger ones have more layouts
MOST_LOSS_ERROR, MOST_NORM_ERROR = 1e-5, 1e-4
MARGIN = 1e-4  # between the last chosen expert's logit and the next one's, so that rounding chooses alike


@dataclass(frozen=True)
class RandomCase:
    """One step; `model` is what transformers builds it from, `groups` are (prompt, its responses') lengths."""

    ranks: int
    layout: Layout
    model: dict[str, Any]
    loss: str
    groups: tuple[tuple[int, tuple[int, ...]], ...]
    budget: int
    packing: bool
    recompute: str
    chunk_tokens: int | None
    aux: float
    seed: int

    def __str__(self) -> str:
        shape = {key: value for key, value in self.model.items() if key not in ("rope_parameters", "pad_token_id")}
        return (
            f"{self.layout.text(self.ranks)} | {self.loss} {list(self.groups)} budget {self.budget} "
            f"{'packed' if self.packing else 'padded'} recompute {self.recompute} chunk {self.chunk_tokens} "
            f"aux {self.aux} seed {self.seed} | {shape}"
        )


def draw_cases(count: int, *, number: int, sizes: Sequence[int] = SIZES) -> list[RandomCase]:
    """`count` different cases, the same ones for the same `number`."""
    found: dict[tuple[Any, ...], RandomCase] = {}

    def collect(case: RandomCase) -> None:
        # hypothesis likes what is all zeros from some draw on, the seed being the last, and repeats itself.
        tokens = sum(sum(lengths) for _, lengths in case.groups)
        if len(found) < count and case.seed > 0 and tokens >= 10:
            found.setdefault((case.layout, case.loss, case.model["model_type"]), case)

    turn = 0
    while len(found) < count:
        once = settings(
            max_examples=2 * count,
            phases=[Phase.generate],
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        )
        seed(number + 1000 * turn)(once(given(random_case(sizes))(collect)))()
        turn += 1
    return list(found.values())


@st.composite
def random_case(draw: Callable[..., Any], sizes: Sequence[int]) -> RandomCase:
    """Draw a step: model, loss, layout, batch and cutting."""
    ranks, model = draw(st.sampled_from(sizes)), draw(random_model())
    fitting = layouts(describe(model), ranks)
    loss = draw(st.sampled_from(sorted(set(LOSSES) - set(USERS))))
    kind = LOSSES[loss][1]
    responses = {
        "single": st.integers(1, 1),
        "preference": st.integers(2, 2),
        "contrast": st.integers(2, 5),
        "samples": st.integers(2, 6),
    }[kind]
    length = st.integers(1, 20)
    group = responses.flatmap(lambda k: st.tuples(st.integers(1, 12), st.tuples(*[length] * k)))
    groups = draw(st.lists(group, min_size=1, max_size=8 if kind == "single" else 4))
    return RandomCase(
        ranks=ranks,
        layout=draw(st.sampled_from(fitting)),
        model=model,
        loss=loss,
        groups=tuple(groups),
        budget=draw(st.one_of(st.just(1), st.integers(16, 200))),
        packing=draw(st.booleans()),
        recompute=draw(st.sampled_from(("none", "selective", "full"))),
        chunk_tokens=draw(st.sampled_from((None, 5))),
        aux=draw(st.sampled_from((0.0, 0.03))) if model["model_type"] in EXPERTS else 0.0,
        seed=draw(st.integers(0, 10**6)),
    )


@st.composite
def random_model(draw: Callable[..., Any]) -> dict[str, Any]:
    """Draw a family and the sizes of a small model of it."""
    family = draw(st.sampled_from(("llama", "mistral", "qwen2", "qwen3", *EXPERTS)))
    kv_heads, share, head_dim = (
        draw(st.sampled_from((2, 4))),
        draw(st.sampled_from((1, 2))),
        draw(st.sampled_from((4, 6))),
    )
    num_layers = draw(st.integers(2, 6))
    fields: dict[str, Any] = {
        "model_type": family,
        "vocab_size": draw(st.integers(90, 140)),
        "hidden_size": kv_heads * share * head_dim,
        "intermediate_size": draw(st.sampled_from((16, 24, 40))),
        "num_hidden_layers": num_layers,
        "num_attention_heads": kv_heads * share,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 64,
        "tie_word_embeddings": draw(st.booleans()),
        "pad_token_id": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0},
    }
    if family == "llama" and draw(st.booleans()):
        fields |= {"rope_parameters": LLAMA3_ROPE, "attention_bias": True, "mlp_bias": draw(st.booleans())}
    if family == "mistral":
        fields["sliding_window"] = draw(st.integers(3, 30))
    if family in ("mistral", "qwen3", "qwen3_moe"):
        fields["head_dim"] = draw(st.sampled_from((4, 10)))
    if family in EXPERTS:
        experts = draw(st.sampled_from((4, 8)))
        fields |= {"num_experts_per_tok": draw(st.integers(2, 3))}
        fields |= {"num_local_experts": experts} if family == "mixtral" else {"num_experts": experts}
    if family in ("qwen2_moe", "qwen3_moe"):
        fields |= {"moe_intermediate_size": draw(st.sampled_from((12, 20))), "norm_topk_prob": draw(st.booleans())}
        fields["mlp_only_layers"] = sorted(draw(st.sets(st.integers(0, num_layers - 1), max_size=num_layers - 1)))
    if family == "qwen2_moe":
        fields["shared_expert_intermediate_size"] = 16
    return fields


def describe(model: dict[str, Any]) -> ModelConfig:
    """The model as the project reads it."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(model | {"architectures": [_architecture(model)]}))
        return read_model_config(Path(folder))


def _config(model: dict[str, Any]) -> Any:
    from transformers import AutoConfig

    return AutoConfig.for_model(**model)


def _architecture(model: dict[str, Any]) -> str:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return str(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model["model_type"]])


def layouts(model: ModelConfig, ranks: int) -> list[Layout]:
    """Every cut of so many ranks that works for the model."""
    factors = [size for size in (1, 2, 4) if size <= ranks]
    every = [
        Layout(tensor, pipeline, virtual, context, expert, sequence)
        for tensor in factors
        for pipeline in factors
        for virtual in (1, 2, 3)
        for context in factors
        for expert in factors
        for sequence in (False, True)
        if tensor * pipeline * context <= ranks
    ]
    return [one for one in every if problem(one, model, ranks) is None]


def sequences_of(case: RandomCase) -> list[TokenSequence]:
    """The step's global batch, with some tokens that are not scored."""
    draw = torch.Generator().manual_seed(case.seed)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(case.model["vocab_size"], (count,), generator=draw).tolist())

    roles = {"single": ("response",), "preference": ("chosen", "rejected"), "contrast": ("positive", "strong")}
    kind, sequences = LOSSES[case.loss][1], []
    for group, (prompt_length, lengths) in enumerate(case.groups):
        prompt = ids(prompt_length)
        teacher = -3.0 + group / 4 if kind == "single" else None
        names = (*roles.get(kind, ("response",)), *["weak" if kind == "contrast" else "response"] * len(lengths))
        for place, length in enumerate(lengths):
            some = torch.rand(length, generator=draw) < 0.8
            scored = tuple(some.tolist()) if some.any() and len(sequences) % 3 == 1 else None
            reward = float(torch.randint(10, (), generator=draw)) / 4
            response = Response(ids(length), reward=reward, scored=scored)
            sequences.append(TokenSequence(group, group, names[place], prompt, response, teacher))
    return sequences


def write_case(case: RandomCase, folder: Path) -> dict[str, float]:
    """Write the model and the known scores; the float64 loss, gradient norm, and the size of the loss's terms."""
    import transformers

    sequences = sequences_of(case)
    draw = torch.Generator().manual_seed(case.seed)
    model = transformers.AutoModelForCausalLM.from_config(_config(case.model))
    for _ in range(100):
        fill_randomly(model, draw)
        model.save_pretrained(folder / "hf")
        slow = load_float64(folder / "hf")
        layers: list[Tensor] = []
        if case.model["model_type"] in EXPERTS:
            layers = router_logits(slow, sequences)
        if all(_margin(layer, case.model["num_experts_per_tok"]) > MARGIN for layer in layers):
            break
    else:
        raise RuntimeError(f"no weights with clear choices of experts: {case}")
    policy = [token_scores(scored_rows(slow, sequence))[0] for sequence in sequences]

    def near(scale: float) -> list[Tensor]:
        noise = [torch.randn(len(logp), generator=draw, dtype=torch.float64) for logp in policy]
        # As the engine gets them, in float32.
        return [(logp.detach() + scale * one).float() for logp, one in zip(policy, noise, strict=True)]

    known = {"reference": near(0.1), "old": near(0.02)}
    torch.save(known, folder / "known.pt")
    value = slow_loss(
        LOSSES[case.loss][0], sequences, policy, *([one.double() for one in logp] for logp in known.values())
    )
    if case.aux:
        value = value + case.aux * aux_loss(layers, top_k=case.model["num_experts_per_tok"])
    # Layers behind the last one that matters have no gradient, nor has a model whose loss is constant here.
    gradients = torch.autograd.grad(value, [*policy, *slow.parameters()], retain_graph=True, allow_unused=True)
    norm = sum(float(one.pow(2).sum()) for one in gradients[len(policy) :] if one is not None) ** 0.5
    pulls = zip(policy, gradients, strict=False)
    terms = sum(float((logp.detach() * one).abs().sum()) for logp, one in pulls if one is not None)
    return {"loss": float(value.detach()), "norm": norm, "terms": terms}


def _margin(logits_TE: Tensor, top_k: int) -> float:
    highest = logits_TE.sort(dim=-1, descending=True).values
    return float((highest[:, top_k - 1] - highest[:, top_k]).min())


def run_world(folder: Path, cases: Sequence[tuple[int, RandomCase]]) -> None:
    """The job of one world size: every case's step; rank 0 leaves a file a case."""
    from megalign.runtime.distributed import process_group
    from megalign.runtime.quiet import quiet_libraries

    quiet_libraries()
    with process_group(timeout_s=120) as world:
        groups, made = None, None
        for number, case in sorted(cases, key=lambda one: repr(one[1].layout)):
            from megalign.engines.megatron.groups import make_groups

            if case.layout != made:
                groups, made = make_groups(case.layout, timeout_s=120), case.layout
            found = _step(case, folder / str(number), groups, world)
            if world.is_main:
                (folder / str(number) / "found.json").write_text(json.dumps(found))


def _step(case: RandomCase, folder: Path, groups: Any, world: Any) -> dict[str, Any]:
    import torch.distributed as dist

    from megalign.data.packing import Packing
    from megalign.engines.megatron.engine import AdamW, MegatronEngine
    from megalign.engines.megatron.shard import EngineOptions
    from megalign.engines.scoring import Scored
    from megalign.engines.step import StepBatch, accumulate
    from megalign.losses import choose_loss

    engine = MegatronEngine(
        read_model_config(folder / "hf"),
        groups,
        EngineOptions(
            dtype=torch.float32,
            device=world.device,
            recompute=case.recompute,
            chunk_tokens=case.chunk_tokens,
            aux_loss_coefficient=case.aux,
        ),
        adamw=AdamW(eps=EPS),
    )
    engine.load_weights(folder / "hf")
    loss, known = choose_loss(LOSSES[case.loss][0]), torch.load(folder / "known.pt")
    scored = {
        name: [Scored(float(logp.double().sum()), logp) for logp in found]
        for name, found in known.items()
        if getattr(loss.traits(), name)
    }
    batch = StepBatch(sequences_of(case), len(case.groups), **scored)
    result = accumulate(engine, batch, loss, packing=Packing(case.budget, pack=case.packing))
    everyone: list[Any] = [None] * world.size
    dist.all_gather_object(everyone, (result.loss, result.policy_S.tolist(), result.coefficient_S.tolist()))
    assert all(one == everyone[0] for one in everyone), f"ranks disagree: {case}"
    return {"loss": result.loss, "norm": engine.update(0.0), "mode": result.pass_mode}


def failure(found: dict[str, Any], right: dict[str, float]) -> str | None:
    """Name the first wrong number of a step; the loss is held against the terms that it is a difference of."""
    size = max(abs(right["loss"]), right["terms"])
    wrong = {
        "loss": (abs(found["loss"] - right["loss"]), MOST_LOSS_ERROR * size),
        "norm": (abs(found["norm"] - right["norm"]), MOST_NORM_ERROR * right["norm"] + 1e-9),
    }
    told = [
        f"{what} {found[what]:.9g} for {right[what]:.9g}, off by {off:.1e}, allowed {allowed:.1e}"
        for what, (off, allowed) in wrong.items()
        if not off <= allowed
    ]
    return "; ".join(told) or None
