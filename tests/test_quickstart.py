"""The quickstart's data: nothing held out is trained on, the noise is as large as said, the tokenizer loses nothing."""

import pytest

from launch.quickstart import make
from megalign.rollout.rewards import choose_reward


@pytest.fixture(scope="module")
def parts():
    return make.split(make.draw_sums())


def numbers(record):
    return frozenset(map(int, record["prompt"].rstrip("=").split("+")))


def test_no_held_out_problem_is_trained_on_in_either_order(parts):
    train, held_out = parts
    assert len(held_out) >= 200 and len(train) > 5000
    assert len({record["prompt"] for record in train + held_out}) == len(train) + len(held_out)
    assert not {numbers(record) for record in train} & {numbers(record) for record in held_out}


def test_answers_are_right_and_scored_so(parts):
    score = choose_reward("reasoning_gym")
    for record in parts[1]:
        a, b = map(int, record["prompt"].rstrip("=").split("+"))
        assert record["answer"] == str(a + b)
        assert score(record["prompt"], str(a + b), record, "here") == 1
        assert score(record["prompt"], str(a + b + 1), record, "here") < 1


def test_noise_is_as_large_as_said(parts):
    clean = make.completions(parts[0], wrong_share=0)
    noisy = make.completions(parts[0], wrong_share=0.4)
    assert [record["completion"] for record in clean] == [record["answer"] for record in parts[0]]
    wrong = sum(one["completion"] != other["completion"] for one, other in zip(clean, noisy)) / len(clean)
    assert wrong == pytest.approx(0.4, abs=0.02)  # three standard deviations of 7000 draws


def test_tokenizer_round_trip():
    tokenizer = make.make_tokenizer()
    ids = tokenizer("07+95=102", add_special_tokens=False)["input_ids"]
    assert len(ids) == 9 and tokenizer.unk_token_id not in ids
    assert tokenizer.decode([*ids, tokenizer.eos_token_id], skip_special_tokens=True) == "07+95=102"
