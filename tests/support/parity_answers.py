"""The float64 answers to every case, each computed when it is first asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tests.support.loss_cases import LOSSES
from tests.support.oracle import (
    SlowAdamW,
    as_stored,
    aux_loss,
    capped,
    entropy_and_hits,
    load_float64,
    router_logits,
    scored_rows,
    slow_loss,
    token_scores,
)
from tests.support.parity_cases import ADAM_STEPS, AUX, CLIP, DECAY, EPS, LR, step_sequences
from tests.support.parity_layouts import EXPERTS


class Answers:
    """Models and scores are kept, because many cases share them."""

    def __init__(self, folder: Path, *, aux: float = AUX) -> None:
        self.folder, self.aux = folder, aux
        self.models: dict[str, nn.Module] = {}
        self.policies: dict[str, tuple[list[Tensor], list[Tensor]]] = {}
        self.means: dict[str, tuple[float, float]] = {}
        self.steps: dict[str, dict[str, Any]] = {}
        self.known: dict[str, list[Tensor]] = {}
        self.trajectories: dict[str, dict[str, Any]] = {}

    def model(self, name: str) -> nn.Module:
        """The policy; its parameters stay as they are."""
        if name not in self.models:
            self.models[name] = load_float64(self.folder / name / "policy")
        return self.models[name]

    def score_known(self, name: str, kinds: list[str]) -> None:
        """Reference and old log-probs by token, which the engine gets as data."""
        for checkpoint in ("reference", "old"):
            model = load_float64(self.folder / name / checkpoint)
            for kind in kinds:
                with torch.no_grad():
                    scores = [token_scores(scored_rows(model, sequence))[0] for sequence in step_sequences(kind)]
                self.known[f"{name} {kind} {checkpoint}"] = scores

    def policy(self, name: str, kind: str) -> tuple[list[Tensor], list[Tensor]]:
        """(log-probs, lse) by sequence under the policy, with their graph."""
        if f"{name} {kind}" not in self.policies:
            rows = [scored_rows(self.model(name), sequence) for sequence in step_sequences(kind)]
            scored = [token_scores(one) for one in rows]
            self.means[f"{name} {kind}"] = entropy_and_hits([pair for one in rows for pair in one])
            self.policies[f"{name} {kind}"] = [logp for logp, _ in scored], [lse for _, lse in scored]
        return self.policies[f"{name} {kind}"]

    def loss(self, name: str, loss: str, policy: list[Tensor], model: nn.Module | None = None) -> Tensor:
        """The step's loss, that of the experts included."""
        raw, kind = LOSSES[loss]
        known = [self.known[f"{name} {kind} {checkpoint}"] for checkpoint in ("reference", "old")]
        value = slow_loss(raw, step_sequences(kind), policy, *known)
        if name in EXPERTS and self.aux:
            model = model or self.model(name)
            layers = router_logits(model, step_sequences(kind))
            value = value + self.aux * aux_loss(layers, top_k=model.config.num_experts_per_tok)
        return value

    def step(self, name: str, loss: str) -> dict[str, Any]:
        """Loss, gradient and its norm, and dL/ds of each sequence."""
        if f"{name} {loss}" not in self.steps:
            parameters = dict(self.model(name).named_parameters())
            policy, _ = self.policy(name, LOSSES[loss][1])
            value = self.loss(name, loss, policy)
            gradients = torch.autograd.grad(value, [*policy, *parameters.values()], retain_graph=True)
            by_name = dict(zip(parameters, gradients[len(policy) :], strict=True))
            self.steps[f"{name} {loss}"] = {
                "loss": float(value.detach()),
                "grad_norm": torch.cat([gradient.flatten() for gradient in by_name.values()]).norm().item(),
                "gradients": as_stored(self.model(name), by_name),
                "coefficient_S": torch.stack([gradient.mean() for gradient in gradients[: len(policy)]]),
                "means": self.means[f"{name} {LOSSES[loss][1]}"],
                "policy_S": torch.stack([logp.detach().sum() for logp in policy]),
            }
        return self.steps[f"{name} {loss}"]

    def capped_step(self, name: str, loss: str, **cap: float) -> dict[str, Any]:
        """Loss and gradient of a model whose logits are scaled and softly bounded."""
        parameters = dict(self.model(name).named_parameters())
        policy = []
        for sequence in step_sequences(LOSSES[loss][1]):
            rows = [(token, capped(row, **cap)) for token, row in scored_rows(self.model(name), sequence)]
            policy.append(token_scores(rows)[0])
        value = self.loss(name, loss, policy)
        gradient = torch.autograd.grad(value, list(parameters.values()))
        return {"loss": float(value.detach()), "gradients": dict(zip(parameters, gradient, strict=True))}

    def trajectory(self, name: str, loss: str) -> dict[str, Any]:
        """AdamW steps on the same global batch, from the policy's weights."""
        if f"{name} {loss}" not in self.trajectories:
            self.trajectories[f"{name} {loss}"] = self._trajectory(name, loss)
        return self.trajectories[f"{name} {loss}"]

    def _trajectory(self, name: str, loss: str) -> dict[str, Any]:
        model = load_float64(self.folder / name / "policy")
        parameters = dict(model.named_parameters())
        adamw, steps = SlowAdamW(parameters, eps=EPS, weight_decay=DECAY), []
        for _ in range(ADAM_STEPS):
            policy = [token_scores(scored_rows(model, sequence))[0] for sequence in step_sequences(LOSSES[loss][1])]
            value = self.loss(name, loss, policy, model)
            gradient = dict(zip(parameters, torch.autograd.grad(value, list(parameters.values())), strict=True))
            steps.append((float(value.detach()), adamw.step(gradient, lr=LR, clip_norm=CLIP)))
        weights = as_stored(model, {key: parameter.detach() for key, parameter in parameters.items()})
        return {"steps": steps, "weights": weights}
