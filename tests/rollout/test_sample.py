"""Sampling: the right distribution, the same draws however prompts are spread, nothing of the checkpoint's defaults."""

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from megalign.rollout.sampler import SamplingPlan
from megalign.rollout.transformers_sampler import TransformersSampler, pick, uniforms
from tests.support.compare import LOGP_ROUNDING

EOS = 1
PROMPTS = [(5, 6, 7), (8,), (9, 10, 11, 12, 13, 14), (4, 4), (2, 3, 5, 7, 11)]


def tiny_model(vocab_size=23):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
        pad_token_id=None,
        eos_token_id=EOS,
    )
    return LlamaForCausalLM(config)


def draw(model, prompts, *, seeds, k=3, temperature=1.0, max_new_tokens=6, token_budget=65536):
    plan = SamplingPlan(k, temperature, max_new_tokens, token_budget)
    return TransformersSampler(model, (EOS,)).sample(prompts, seeds, plan)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_pick_follows_the_softmax(temperature):
    logits_V = torch.tensor([2.0, -1.0, 0.5, 0.0, 1.0, -torch.inf, -2.0])
    count = 20000
    uniform_B = torch.from_numpy(np.concatenate([uniforms((7, row), 4) for row in range(count // 4)]))
    token_B, logp_B = pick(logits_V.expand(count, -1), uniform_B, temperature)
    expected_V = torch.softmax(logits_V.double() / temperature, dim=0) * count
    seen_V = torch.bincount(token_B, minlength=7).double()
    assert seen_V[5] == 0
    alive = expected_V > 0
    chi_square = ((seen_V - expected_V)[alive].square() / expected_V[alive]).sum().item()
    assert chi_square < 20.5  # 5 degrees of freedom: exceeded with probability 0.001
    torch.testing.assert_close(logp_B, torch.log(expected_V / count)[token_B])


def test_pick_at_the_ends_of_the_unit_interval_has_positive_probability():
    logits_BV = torch.tensor([[-torch.inf, 0.0, 0.0, -torch.inf]]).expand(2, -1)
    token_B, _ = pick(logits_BV, torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64), 1.0)
    assert token_B.tolist() == [1, 2]


def test_draws_do_not_depend_on_batches_or_order():
    model = tiny_model()
    seeds = [(3, 0, place) for place in range(len(PROMPTS))]
    together = draw(model, PROMPTS, seeds=seeds)
    assert draw(model, PROMPTS, seeds=seeds, token_budget=1) == pytest_equal(together)
    for place, prompt in enumerate(PROMPTS):
        assert draw(model, [prompt], seeds=[seeds[place]]) == pytest_equal([together[place]])
    # More samples or tokens only add to what is there.
    more = draw(model, PROMPTS, seeds=seeds, k=5, max_new_tokens=9)
    for fewer_k, more_k in zip(together, more):
        for short, long in zip(fewer_k, more_k):
            assert long.ids[: len(short.ids)] == short.ids


def test_other_rounds_prompts_and_samples_get_other_draws():
    model = tiny_model()
    seeds = [(3, 0, 0), (3, 0, 1), (3, 1, 0), (4, 0, 0)]
    groups = draw(model, [(5, 6, 7)] * 4, seeds=seeds, k=4, max_new_tokens=8)
    assert len({response.ids for group in groups for response in group}) == 16


def test_logp_is_that_of_the_model_under_the_temperature():
    model = tiny_model()
    for temperature in (0.7, 0.0):
        groups = draw(model, PROMPTS, seeds=[(0, i) for i in range(5)], temperature=temperature)
        for prompt, group in zip(PROMPTS, groups):
            for response in group:
                with torch.no_grad():
                    logits_TV = model(torch.tensor([prompt + response.ids])).logits[0, len(prompt) - 1 : -1]
                logp_TV = torch.log_softmax(logits_TV / (temperature or 1.0), dim=-1)
                wanted = [logp_TV[step, token].item() for step, token in enumerate(response.ids)]
                assert response.logp == pytest.approx(wanted, abs=LOGP_ROUNDING)
                if temperature == 0:
                    assert list(response.ids) == logits_TV.argmax(-1).tolist()


def test_responses_end_with_the_end_token_or_at_the_limit():
    groups = draw(tiny_model(), PROMPTS, seeds=[(0, i) for i in range(5)], k=20)
    responses = [response for group in groups for response in group]
    assert {response.finished for response in responses} == {True, False}
    for response in responses:
        assert EOS not in response.ids[:-1]
        assert len(response.ids) == len(response.logp)
        assert response.ids[-1] == EOS if response.finished else len(response.ids) == 6 and EOS not in response.ids


def test_generation_defaults_of_the_checkpoint_are_ignored_and_kept():
    model = tiny_model()
    seeds = [(0, i) for i in range(5)]
    plain = draw(model, PROMPTS, seeds=seeds)
    model.generation_config.repetition_penalty = 5.0
    model.generation_config.top_k = 1
    model.generation_config.min_new_tokens = 6
    model.train()
    assert draw(model, PROMPTS, seeds=seeds) == plain
    assert model.generation_config.repetition_penalty == 5.0
    assert model.training


def pytest_equal(groups):
    """Equal ids and ends; log-probs to float32 rounding, because batches of other shapes add up in another order."""
    return [[_Close(response) for response in group] for group in groups]


class _Close:
    def __init__(self, response):
        self.response = response

    def __eq__(self, other):
        same = (self.response.ids, self.response.finished) == (other.ids, other.finished)
        return same and other.logp == pytest.approx(self.response.logp, abs=LOGP_ROUNDING)

    def __repr__(self):
        return repr(self.response)
