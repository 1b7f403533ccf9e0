"""The command line: help and version, and the nearest of what a mistyped word could have been."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from megalign import __version__
from megalign.__main__ import COMMANDS, main
from megalign.config.sections import SECTIONS


def test_every_command_exists_and_is_listed(capsys):
    for command in COMMANDS.values():
        assert callable(command.load())
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    shown = capsys.readouterr().out
    assert ended.value.code == 0 and all(f"  {name} " in shown for name in COMMANDS)


def test_version(capsys):
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"megalign {__version__}\n"


@pytest.mark.parametrize("command", ["train", "rollout"])
def test_help_of_a_job_lists_the_sections(command, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    shown = capsys.readouterr().out
    assert all(f"  {name} " in shown for name in SECTIONS)
    assert "keys SECTION" in shown and "example" in shown


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["trian"], ["command is 'trian'; did you mean train?", "must be one of train, rollout, launch"]),
        (["lanuch", "2", "job.yaml"], ["did you mean launch?"]),
        (["--verbose", "train", "job.yaml"], ["unrecognized arguments: --verbose job.yaml; must be: "]),
        (["check-loss"], ["required: name; must be: "]),
        (["nothing"], ["command is 'nothing'; must be one of"]),
        ([], ["command is missing; must be one of train, rollout, launch"]),
        (["check-loss"], ["required: name; must be"]),
        (["keys", "sede"], ["key or section is 'sede'"]),
        (["train", "job.yaml", "--run.epochs=3"], ["--run.epochs=3; keys are set without --, as run.epochs=VALUE"]),
        (["example", "gvop"], ["example is 'gvop'; did you mean gvpo?"]),
        (["keys", "--markdwon"], ["did you mean --markdown?"]),
        (["convert", "a", "b", "--wrokers", "2"], ["did you mean --workers?"]),
        (["train", "job.yaml", "--lr", "1"], ["unrecognized arguments: --lr 1; must be: ", "[key.sub=value ...]"]),
        (["launch", "two", "job.yaml"], ["N: 'two' is not a whole number >= 1"]),
        (["launch", "0", "job.yaml"], ["N: '0' is not a whole number >= 1"]),
        (["launch", "2"], ["required: CONFIG.yaml"]),
    ],
)
def test_mistyped_words_are_one_line(arguments, parts, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        code = main(arguments)
    except SystemExit as ended:  # a tool's parser ends the process itself
        code = ended.code
    out, err = capsys.readouterr()
    assert code == 2 and out == "" and err.count("\n") == 1 and err.startswith("megalign: error: command line: ")
    assert [part for part in parts if part not in err] == [], err


@pytest.mark.parametrize("arguments", [["keys"], ["example", "gvpo"], ["check-loss", "sft"]])
def test_a_reader_that_has_seen_enough_ends_the_output_without_a_word(arguments):
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "megalign", *arguments], stdout=writing, stderr=subprocess.PIPE, text=True, timeout=60
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")
