"""Check that every key has a description, and that help and documentation are made from it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field, PositiveInt

from megalign.__main__ import main
from megalign.config.job import JobConfig
from megalign.config.keys import all_sections, find_sections, type_text
from megalign.config.sections import SECTIONS
from megalign.losses import LOSSES
from megalign.schema import PathText, UserError

ROOT = Path(__file__).resolve().parents[2]


def test_every_key_has_a_sentence():
    sections = all_sections()
    assert [section.title for section in sections if " " not in section.title] == list(JobConfig.model_fields)
    assert {section.title for section in sections} >= {f"loss {name}" for name in LOSSES}
    keys = [key for section in sections for key in section.keys]
    assert len(keys) > 80
    assert [key.name for key in keys if len(key.about.split()) < 4] == []
    assert [key.name for key in keys if not key.about.endswith(".") and key.name not in SECTIONS] == []
    assert [section.title for section in sections if not section.about] == []


def test_the_page_is_up_to_date(capsys):
    assert main(["keys", "--markdown"]) == 0
    assert (ROOT / "docs/configuration.md").read_text() == capsys.readouterr().out, (
        "python -m megalign keys --markdown > docs/configuration.md"
    )


@pytest.mark.parametrize(
    ("annotation", "text"),
    [
        (PositiveInt, "whole number > 0"),
        (PathText | None, "path | none"),
        (Annotated[float, Field(ge=0, lt=1)], "number >= 0 and < 1"),
        (Literal["bf16", "fp32"], "bf16 | fp32"),
        (PositiveInt | Literal["auto"], "whole number > 0 | auto"),
        (list[PositiveInt], "list of whole number > 0"),
        (dict[str, int], "settings"),
        (bool, "true | false"),
    ],
)
def test_types_in_words(annotation, text):
    assert type_text(annotation) == text


@pytest.mark.parametrize(
    ("word", "first"),
    [
        ("optimizer.schedule", "optimizer.schedule.name"),
        ("teachers", "teachers[].name"),
        ("data.sources", "data.sources[].path"),
        ("teachers[].path", "teachers[].path"),
        ("gvpo", "loss.beta"),
        ("loss", "loss.name"),
        ("tests.support.my_losses:margin", "loss.margin"),
    ],
)
def test_a_word_names_keys(word, first):
    assert find_sections(word)[0].keys[0].name == first


@pytest.mark.parametrize(
    ("word", "guess"), [("optimiser", "optimizer"), ("run.sed", "run.seed"), ("gvop", "gvpo"), ("lr", "optimizer.lr")]
)
def test_a_word_that_names_none_gets_the_nearest(word, guess):
    with pytest.raises(UserError, match=f"section is '{word}'; did you mean {guess}\\?"):
        find_sections(word)


def test_plain_lines_hold_type_default_and_sentence(capsys):
    assert main(["keys", "run.seed"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("# run: ")
    assert second.startswith("run.seed  (whole number >= 0; 0)  Seed of ")


IMPORTED = """
import json, sys
from megalign.__main__ import main
try:
    code = main(sys.argv[1:])
except SystemExit as error:
    code = error.code
heavy = [name for name in ("torch", "transformers", "megatron", "datasets") if name in sys.modules]
print(json.dumps([code, heavy]))
"""


@pytest.mark.parametrize(
    ("arguments", "code", "heavy"),
    [
        (["--help"], 0, []),
        (["--version"], 0, []),
        (["trian"], 2, []),
        (["train", "--help"], 0, []),
        (["train"], 2, ["torch"]),
        (["keys", "--help"], 0, []),
        (["keys", "run"], 0, ["torch"]),
        (["train", "job.yaml", "run.sed=1"], 2, ["torch"]),
    ],
    ids=str,
)
def test_answers_do_not_wait_for_imports(arguments, code, heavy, tmp_path):
    (tmp_path / "job.yaml").write_text("run: {dir: run}\n")
    done = subprocess.run(
        [sys.executable, "-c", IMPORTED, *arguments],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout.splitlines()[-1]) == [code, heavy], done.stderr
