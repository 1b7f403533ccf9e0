"""What the command `rollout` writes is training data, at the temperature it was sampled at."""

import pytest

from tests.support.tiny_jobs import (
    CHARACTERS,
    main,
    metrics,
    numbers,
    read_lines,
    round_sections,
    status,
    train,
    write_config,
    write_lines,
    write_model,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """`rollout.jsonl` of two temperatures, from prompts that are text, ids and messages, with fields of their own."""
    folder = tmp_path_factory.mktemp("file")
    write_model(folder / "model", tokenizer=True)
    sections = round_sections(folder, rounds=1, prompts_per_round=3, updates_per_round=1)
    prompts = [
        {"prompt": "1+1=", "bonus": 0, "responses": "mine", "temperature": "hot", "weak": "tea", "level": {"of": [1]}},
        {"prompt_ids": [9, 10], "bonus": 1, "messages": "none"},
        {"prompt": [{"role": "user", "content": "2+2="}], "bonus": 2},
    ]
    write_lines(folder / "prompts.jsonl", prompts)
    config = write_config(folder, **sections)
    for name, temperature in (("warm", 0.7), ("plain", 1.0)):
        more = [f"run.dir={folder}/{name}", f"rollout.temperature={temperature}"]
        assert main(["rollout", str(config), *more]) == 0
    return folder


def config_of(folder, tmp_path, *files, loss):
    lines = [line for file in files for line in read_lines(folder / file / "rollout.jsonl")]
    path = write_lines(tmp_path / "samples.jsonl", lines)
    return write_config(
        tmp_path, model={"path": str(folder / "model")}, data={"path": str(path)}, loss={"name": loss}, run={"steps": 2}
    )


def test_the_file_holds_texts_and_the_records_own_fields(folder):
    lines = read_lines(folder / "warm" / "rollout.jsonl")
    prompts = read_lines(folder / "prompts.jsonl")
    assert sorted(line["record"]["bonus"] for line in lines) == [0, 1, 2]
    for line in lines:
        assert line["record"] == prompts[line["record"]["bonus"]] and line["temperature"] == 0.7
        if isinstance(line["record"].get("prompt"), str):
            assert line["prompt_text"] == line["record"]["prompt"]
        for response in line["responses"]:
            assert response["finished"] == (response["response_ids"][-1] == 0)
            characters = [token for token in response["response_ids"] if 4 <= token < 4 + len(CHARACTERS)]
            assert response["response_text"] == "".join(CHARACTERS[token - 4] for token in characters)


@pytest.mark.parametrize("loss", ["gvpo", "epa", "dpo", "grpo", "rloo"])
def test_every_loss_of_rewards_trains_on_it(loss, folder, tmp_path):
    assert train(config_of(folder, tmp_path, "plain", loss=loss)) == 0
    assert len(metrics(tmp_path / "run")) == 2
    if loss in ("grpo", "rloo"):
        assert metrics(tmp_path / "run")[0]["clip_fraction"] == 0.0


@pytest.mark.parametrize("loss", ["grpo", "rloo"])
def test_samples_of_another_temperature_are_refused_where_their_log_probs_count(loss, folder, tmp_path):
    config = config_of(folder, tmp_path, "plain", "warm", loss=loss)
    assert train(config) == 2
    told = status(tmp_path / "run")["reason"]
    assert "samples.jsonl:4: field temperature is 0.7; must be 1, the training temperature" in told
    assert "responses[0].logp" in told
    assert train(config, "data.on_bad_record=skip", f"run.dir={tmp_path}/some") == 0
    assert "3 of 6 records kept; skipped: temperature 3" in (tmp_path / "some" / "log.txt").read_text()


def test_samples_of_another_temperature_train_where_old_is_scored(folder, tmp_path):
    """GVPO reads no log-probs of the sampler, and GRPO none where the records have none."""
    assert train(config_of(folder, tmp_path, "warm", loss="gvpo")) == 0
    config = config_of(folder, tmp_path, "warm", loss="grpo")
    lines = read_lines(tmp_path / "samples.jsonl")
    for response in (response for line in lines for response in line["responses"]):
        del response["logp"]
    write_lines(tmp_path / "samples.jsonl", lines)
    assert train(config, f"run.dir={tmp_path}/grpo") == 0
    assert metrics(tmp_path / "grpo")[0]["clip_fraction"] == 0.0


def test_log_probs_without_a_temperature_are_said_to_be_of_one(folder, tmp_path):
    config = config_of(folder, tmp_path, "plain", loss="grpo")
    assert train(config) == 0
    with_temperature = numbers(metrics(tmp_path / "run"))
    lines = read_lines(tmp_path / "samples.jsonl")
    write_lines(tmp_path / "samples.jsonl", [{k: v for k, v in line.items() if k != "temperature"} for line in lines])
    assert train(config, f"run.dir={tmp_path}/silent") == 0
    assert numbers(metrics(tmp_path / "silent")) == with_temperature
    said = "3 have logp without temperature, which is assumed to be 1"
    assert said in (tmp_path / "silent" / "log.txt").read_text()


@pytest.mark.parametrize("value", [0, -1, "1", True, None, float("nan")])
def test_a_temperature_that_is_none(value, folder, tmp_path):
    config = config_of(folder, tmp_path, "plain", loss="gvpo")
    lines = read_lines(tmp_path / "samples.jsonl")
    write_lines(tmp_path / "samples.jsonl", [lines[0], {**lines[1], "temperature": value}])
    assert train(config) == 2
    assert "samples.jsonl:2: field temperature is " in status(tmp_path / "run")["reason"]
