"""The right answer, slowly: Hugging Face's model in float64 on one process, one sequence at a time, and plain loops.

Nothing here uses megalign's losses, packing or operators. `transformers` drops to float32 inside even where a model is
float64 (norms, rotary tables, the softmax of eager attention), so those parts are replaced.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from types import MethodType
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from megalign.data.group import TokenSequence


def load_float64(folder: Path) -> nn.Module:
    """The checkpoint as a float64 model that computes in float64 throughout."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="sdpa", experts_implementation="eager"
    )
    model.double().eval()
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = MethodType(_norm, module)
        elif type(module).__name__.endswith("RotaryEmbedding"):
            module.forward = MethodType(_rotary_tables, module)
        elif type(module).__name__.endswith("TopKRouter"):
            module.forward = MethodType(_router, module)
    return model


def _norm(self: Any, x: Tensor) -> Tensor:
    return self.weight * x * (x.square().mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()


def _rotary_tables(self: Any, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
    angle = position_ids[..., None].to(x.dtype) * self.inv_freq.to(x.dtype)
    angle = torch.cat((angle, angle), dim=-1)
    return angle.cos() * self.attention_scaling, angle.sin() * self.attention_scaling


def _router(self: Any, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(logits, shares of the chosen experts, which they are); Mixtral's shares always sum to one."""
    logits = hidden.reshape(-1, self.hidden_dim) @ self.weight.T
    top, chosen = logits.softmax(dim=-1).topk(self.top_k, dim=-1)
    return logits, top / top.sum(-1, keepdim=True) if getattr(self, "norm_topk_prob", True) else top, chosen


def router_logits(model: nn.Module, sequences: Sequence[TokenSequence]) -> list[Tensor]:
    """Logits [tokens of all sequences, experts] of each layer that routes."""
    by_sequence = []
    for sequence in sequences:
        ids = torch.tensor([list(sequence.prompt_ids + sequence.response.ids)])
        by_sequence.append(model(ids, use_cache=False, output_router_logits=True).router_logits)
    return [torch.cat(layer) for layer in zip(*by_sequence, strict=True)]


def aux_loss(layers: Sequence[Tensor], *, top_k: int) -> Tensor:
    """Sum over layers of E x sum_e f_e P_e, token by token."""
    total = torch.zeros((), dtype=torch.float64)
    for logits in layers:
        num_tokens, num_experts = logits.shape
        sent = [0] * num_experts
        for row in logits.tolist():
            for expert in sorted(range(num_experts), key=lambda one: -row[one])[:top_k]:
                sent[expert] += 1
        for expert, share in enumerate(sent):
            mean = logits.softmax(dim=-1)[:, expert].sum() / num_tokens
            total = total + num_experts * share / (num_tokens * top_k) * mean
    return total


def as_stored(model: nn.Module, named: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by their names in the checkpoint, where experts are apart."""
    mixtral = model.config.model_type == "mixtral"
    gate, up, down = ("w1", "w3", "w2") if mixtral else ("gate_proj", "up_proj", "down_proj")
    stored = {}
    for name, tensor in named.items():
        name = name.replace(".mlp.", ".block_sparse_moe.") if mixtral else name
        home, _, stacked = name.rpartition(".")
        if stacked == "gate_up_proj":
            for expert, both in enumerate(tensor):
                stored[f"{home}.{expert}.{gate}.weight"], stored[f"{home}.{expert}.{up}.weight"] = both.chunk(2)
        elif stacked == "down_proj":
            stored |= {f"{home}.{expert}.{down}.weight": one for expert, one in enumerate(tensor)}
        else:
            stored[name] = tensor
    return stored


def scored_rows(model: nn.Module, sequence: TokenSequence) -> list[tuple[int, Tensor]]:
    """(token, the logits that predict it) of the scored response tokens, float64, differentiable."""
    prompt, response = list(sequence.prompt_ids), list(sequence.response.ids)
    logits = model(torch.tensor([prompt + response]), use_cache=False).logits[0]
    scored = sequence.response.scored or [True] * len(response)
    return [(token, logits[len(prompt) + place - 1]) for place, token in enumerate(response) if scored[place]]


def capped(row: Tensor, *, scale: float, cap: float) -> Tensor:
    """Logits of a head that scales and softly bounds them."""
    return cap * torch.tanh(scale * row / cap)


def entropy_and_hits(rows: Sequence[tuple[int, Tensor]]) -> tuple[float, float]:
    """Means over tokens: entropy in nats, and how often no token is likelier than the right one."""
    entropy = hits = 0.0
    for token, row in rows:
        probability = [math.exp(value) for value in (row - torch.logsumexp(row, dim=0)).tolist()]
        entropy -= sum(p * math.log(p) for p in probability if p)
        hits += probability[token] == max(probability)
    return entropy / len(rows), hits / len(rows)


def token_scores(rows: Sequence[tuple[int, Tensor]]) -> tuple[Tensor, Tensor]:
    """(log-probs, log-sum-exps of the logits) of the scored response tokens."""
    logp, lse = [], []
    for token, row in rows:
        lse.append(torch.logsumexp(row, dim=0))
        logp.append(row[token] - lse[-1])
    return torch.stack(logp), torch.stack(lse)


FOCAL = "tests.support.my_losses:focal"


def slow_loss(
    raw: dict[str, Any],
    sequences: Sequence[TokenSequence],
    policy: Sequence[Tensor],
    reference: Sequence[Tensor],
    old: Sequence[Tensor],
) -> Tensor:
    """The step's loss from the token log-probs of each sequence."""
    form = raw.get("variant", raw["name"])
    num_groups = 1 + max(sequence.group for sequence in sequences)
    if form in ("sft", "dapo", FOCAL):
        token_losses = [
            token_loss
            for group in range(num_groups)
            for each in _group_token_losses(raw, sequences, policy, reference, old, group)
            for token_loss in each
        ]
        return sum(token_losses) / len(token_losses)
    total = torch.zeros((), dtype=torch.float64)
    for group in range(num_groups):
        places = [place for place, sequence in enumerate(sequences) if sequence.group == group]
        if form in ("grpo", "dr_grpo"):
            for each in _group_token_losses(raw, sequences, policy, reference, old, group):
                total = total + sum(each) / raw.get("max_response_length", len(each)) / len(places)
        else:
            members = [sequences[place] for place in places]
            columns = [[column[place] for place in places] for column in (policy, reference, old)]
            total = total + SEQUENCE_LOSSES[form](raw, members, *columns)
    return total / num_groups


def _poft(raw: Any, members: Any, policy: Any, reference: Any, old: Any) -> Tensor:
    (mean,) = (logp.mean() for logp in policy)
    gap = raw.get("beta", 1.0) * (mean - members[0].teacher_score) - raw.get("gamma", 0.0)
    return torch.log1p(torch.exp(-gap))


def _dpo(raw: Any, members: Any, policy: Any, reference: Any, old: Any) -> Tensor:
    ratio = {one.role: mine.sum() - theirs.sum() for one, mine, theirs in zip(members, policy, reference, strict=True)}
    return torch.log1p(torch.exp(-raw.get("beta", 0.1) * (ratio["chosen"] - ratio["rejected"])))


def _ipo(raw: Any, members: Any, policy: Any, reference: Any, old: Any) -> Tensor:
    ratio = {one.role: (mine - theirs).mean() for one, mine, theirs in zip(members, policy, reference, strict=True)}
    return (ratio["chosen"] - ratio["rejected"] - 1 / (2 * raw.get("beta", 0.1))) ** 2


def _means(members: Any, policy: Any) -> tuple[Tensor, Tensor]:
    mean = {member.role: logp.mean() for member, logp in zip(members, policy, strict=True)}
    return mean["chosen"], mean["rejected"]


def _simpo(raw: Any, members: Any, policy: Any, reference: Any, old: Any) -> Tensor:
    chosen, rejected = _means(members, policy)
    return torch.log1p(torch.exp(raw.get("gamma", 1.0) - raw.get("beta", 2.0) * (chosen - rejected)))


def _orpo(raw: Any, members: Any, policy: Any, reference: Any, old: Any) -> Tensor:
    chosen, rejected = _means(members, policy)
    ratio = rejected.exp() * (1 - chosen.exp()) / (chosen.exp() * (1 - rejected.exp()))
    return -chosen + raw.get("lambda", 0.1) * torch.log1p(ratio)


def _margin(raw: Any, members: Any, policy: Any, reference: Any, old: Any) -> Tensor:
    chosen, rejected = _means(members, policy)
    return (raw["margin"] - (chosen - rejected)).clamp(min=0) ** 2


def _epa(raw: Any, members: Any, policy: Any, reference: Any, old: Any) -> Tensor:
    energy = [
        torch.exp(raw.get("beta", 0.1) * (mine.sum() - theirs.sum()))
        for mine, theirs in zip(policy, reference, strict=True)
    ]
    (positive,) = (one for one, member in zip(energy, members, strict=True) if member.role == "positive")
    return -torch.log(positive / sum(energy))


def _gvpo(raw: Any, members: Any, policy: Any, reference: Any, old: Any) -> Tensor:
    implicit = [
        raw.get("beta", 0.1) * (mine.sum() - theirs.sum()) for mine, theirs in zip(policy, reference, strict=True)
    ]
    rewards = [member.response.reward for member in members]
    k = len(members)
    gaps = [(r - sum(implicit) / k) - (true - sum(rewards) / k) for r, true in zip(implicit, rewards, strict=True)]
    return sum(0.5 * gap**2 for gap in gaps) / (k - 1)


def _rloo(raw: Any, members: Any, policy: Any, reference: Any, old: Any) -> Tensor:
    rewards = [
        member.response.reward - raw.get("beta", 0.05) * float(before.sum() - theirs.sum())
        for member, before, theirs in zip(members, old, reference, strict=True)
    ]
    total = 0.0
    for place, reward in enumerate(rewards):
        others = rewards[:place] + rewards[place + 1 :]
        ratio = torch.exp(policy[place].sum() - old[place].sum())
        total = total + _clipped(ratio, reward - sum(others) / len(others), low=0.2, high=0.2)
    return total / len(rewards)


SEQUENCE_LOSSES = {
    "poft": _poft,
    "dpo": _dpo,
    "ipo": _ipo,
    "simpo": _simpo,
    "orpo": _orpo,
    "epa": _epa,
    "gvpo": _gvpo,
    "rloo": _rloo,
    "tests.support.my_losses:margin": _margin,
}


def _group_token_losses(
    raw: Any, sequences: Any, policy: Any, reference: Any, old: Any, group: int
) -> list[list[Tensor]]:
    """By sequence of the group, by token: the loss before any mean."""
    places = [place for place, sequence in enumerate(sequences) if sequence.group == group]
    if raw["name"] == "sft":
        return [[-logp for logp in policy[place]] for place in places]
    if raw["name"] == FOCAL:
        return [
            [
                -((1 - mine.exp()) ** raw["gamma"]) * mine + raw["pull"] * (mine - theirs) ** 2
                for mine, theirs in zip(policy[place], reference[place], strict=True)
            ]
            for place in places
        ]
    rewards = [sequences[place].response.reward for place in places]
    mean = sum(rewards) / len(rewards)
    deviation = math.sqrt(sum((reward - mean) ** 2 for reward in rewards) / (len(rewards) - 1))
    losses = []
    for place, reward in zip(places, rewards, strict=True):
        advantage = reward - mean
        if raw.get("variant") != "dr_grpo":
            advantage /= deviation + 1e-4
        losses.append([])
        for mine, before, theirs in zip(policy[place], old[place], reference[place], strict=True):
            high = 0.28 if raw.get("variant") == "dapo" else 0.2
            surrogate = _clipped(torch.exp(mine - before), advantage, low=0.2, high=high)
            k3 = torch.exp(theirs - mine) - (theirs - mine) - 1
            losses[-1].append(surrogate + raw.get("beta", 0.0) * k3)
    return losses


def _clipped(ratio: Tensor, advantage: float, *, low: float, high: float) -> Tensor:
    plain, bounded = ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage
    return -(plain if plain < bounded else bounded)


class SlowAdamW:
    """AdamW (betas 0.9 and 0.95) in float64; decay for parameters of two or more dimensions only."""

    def __init__(self, parameters: dict[str, Tensor], *, eps: float, weight_decay: float) -> None:
        self.parameters, self.eps, self.weight_decay, self.count = parameters, eps, weight_decay, 0
        self.first = {name: torch.zeros_like(value) for name, value in parameters.items()}
        self.second = {name: torch.zeros_like(value) for name, value in parameters.items()}

    def step(self, gradient: dict[str, Tensor], *, lr: float, clip_norm: float) -> float:
        """Move the parameters; the gradient's norm before clipping."""
        norm = math.sqrt(sum(float(value.square().sum()) for value in gradient.values()))
        self.count += 1
        for name, parameter in self.parameters.items():
            clipped = gradient[name] * min(1.0, clip_norm / (norm + 1e-6))
            self.first[name] = 0.9 * self.first[name] + 0.1 * clipped
            self.second[name] = 0.95 * self.second[name] + 0.05 * clipped**2
            mean = self.first[name] / (1 - 0.9**self.count)
            deviation = (self.second[name] / (1 - 0.95**self.count)).sqrt()
            decay = self.weight_decay if parameter.dim() >= 2 else 0.0
            with torch.no_grad():
                parameter -= lr * (mean / (deviation + self.eps) + decay * parameter)
        return norm
