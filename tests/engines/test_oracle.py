"""What makes the float64 answers trustworthy."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megalign.losses import choose_loss
from tests.support.loss_cases import COUPLED, KINDS, LOSSES
from tests.support.oracle import router_logits, scored_rows, token_scores
from tests.support.parity_cases import ALONE, LARGE, MODELS, SMALL, step_sequences
from tests.support.parity_layouts import EXPERTS


class NoFloat32(TorchDispatchMode):
    """Fails on any operation that makes a float32 tensor."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            assert not (isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float32), func
        return out


@pytest.mark.parametrize("name", MODELS)
def test_nothing_drops_to_float32(answers, name):
    model, sequence = answers.model(name), step_sequences("samples")[3]
    with NoFloat32():
        logp, lse = token_scores(scored_rows(model, sequence))
    assert logp.dtype == lse.dtype == torch.float64
    prompt, response = list(sequence.prompt_ids), list(sequence.response.ids)
    with torch.no_grad():
        rows = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    assert torch.allclose(rows[range(len(response)), response], logp.detach(), rtol=1e-12)


def test_mistral_slides(answers):
    # window 5 and two layers: position 9 hears nothing of position 0, whatever stands there
    model, ids = answers.model("mistral"), torch.arange(10)[None]
    with torch.no_grad():
        logits, changed = model(ids).logits, model(torch.cat((ids[:, :1] + 50, ids[:, 1:]), dim=1)).logits
    assert torch.equal(logits[0, 9], changed[0, 9]) and not torch.allclose(logits[0, 8], changed[0, 8])


@pytest.mark.parametrize("name", ["llama", "llama-tied"])
def test_no_ratio_is_near_a_clip_border_and_some_are_clipped(answers, name):
    # rounding must not decide on which side a token falls
    policy, old = answers.policy(name, "samples")[0], answers.known[f"{name} samples old"]
    ratios = {
        "token": torch.cat([(mine - before).exp() for mine, before in zip(policy, old, strict=True)]),
        "sequence": torch.stack([(mine - before).sum().exp() for mine, before in zip(policy, old, strict=True)]),
    }
    for ratio in ratios.values():
        assert min(float((ratio - border).abs().min().detach()) for border in (0.8, 1.2, 1.28)) > 1e-4
        assert (ratio < 0.8).any() and (ratio > 1.28).any() and ((ratio > 0.8) & (ratio < 1.2)).any()


@pytest.mark.parametrize("kind", KINDS)
def test_steps_are_ragged_and_the_small_budget_splits_them(kind):
    sequences = step_sequences(kind)
    lengths = [len(sequence) for sequence in sequences]
    by_group = [[len(one) for one in sequences if one.group == group] for group in range(1 + sequences[-1].group)]
    assert len({len(sequence.response.ids) for sequence in sequences}) > 4
    assert any(sequence.num_scored < len(sequence.response.ids) for sequence in sequences)
    assert sum(lengths) > 2 * SMALL and min(lengths) > ALONE[0]
    assert kind == "single" or any(sum(sizes) > SMALL for sizes in by_group)
    assert all(len(sizes) * max(sizes) <= LARGE for sizes in by_group)


def test_coupled_losses_are_those_that_look_across_sequences():
    assert [loss for loss, (raw, _) in LOSSES.items() if choose_loss(raw).traits().coupled] == list(COUPLED)


@pytest.mark.parametrize("name", EXPERTS)
def test_no_rounding_can_change_a_routers_choice(answers, name):
    model = answers.model(name)
    top_k = model.config.num_experts_per_tok
    for kind in KINDS:
        with torch.no_grad():
            layers = router_logits(model, step_sequences(kind))
        assert len(layers) == {"mixtral": 4, "qwen2_moe": 4, "qwen3_moe": 2}[name]
        for logits in layers:
            ranked = logits.sort(dim=-1, descending=True).values
            assert float((ranked[:, top_k - 1] - ranked[:, top_k]).min()) > 1e-3
            assert logits.std() > 0.3, "the choice must matter"
