"""Runs the command check-loss: checks one loss function and prints a table of the checks.

Run: python -m megalign check-loss NAME [key=value ...]
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from textwrap import fill
from typing import TYPE_CHECKING, Any

from megalign.runtime.command_line import Parser, program
from megalign.runtime.exit_codes import BAD_INPUT, DONE
from megalign.runtime.status import guarded

if TYPE_CHECKING:
    from megalign.losses import LossConfig
    from megalign.losses.check import Result

WIDTH = 110  # of the table


def main(arguments: Sequence[str]) -> int:
    """Run the command; exit code 0, or 2 for bad input and where a check failed."""
    return guarded(lambda: _run(arguments))


def _run(arguments: Sequence[str]) -> int:
    parser = Parser(
        prog=f"{program()} check-loss",
        description="check a loss of one's own on small random scores",
        allow_abbrev=False,
    )
    parser.add_argument("name", help="module:function, or a built-in loss")
    parser.add_argument("fields", nargs="*", default=[], metavar="key=value", help="its settings")
    args = parser.parse_args(arguments)
    return check(args.name, args.fields)


def check(name: str, fields: Sequence[str]) -> int:
    """Check a loss with the given `key=value` settings and print the table; exit code 0, or 2 where a check failed."""
    from megalign.losses.check import check_loss  # it imports torch, which --help does not need

    cfg = chosen(name, fields)
    results = check_loss(cfg)
    print(table(cfg, results), flush=True)
    return BAD_INPUT if any(result.problem for result in results) else DONE


def chosen(name: str, fields: Sequence[str]) -> LossConfig:
    """Read a loss's settings as a job's configuration would; `loss.` before a key may be left out."""
    from megalign.config.job import is_text_key  # imported late for the same reason
    from megalign.config.yaml_file import apply_overrides
    from megalign.losses import choose_loss

    tree: dict[str, Any] = {"loss": {"name": name}}
    overrides = [f"loss.{field.removeprefix('loss.')}" for field in fields]
    apply_overrides(tree, overrides, partial(is_text_key, overrides), set())
    return choose_loss(tree["loss"])


def table(cfg: LossConfig, results: Sequence[Result]) -> str:
    """Return one row for each check, with advice under failed ones, and a summary line."""
    settings = {key: value for key, value in cfg.model_dump(mode="json", by_alias=True).items() if key != "name"}
    shown = ", ".join(f"{key}={value}" for key, value in settings.items())
    lines = [f"loss {cfg.name}" + (f" with {shown}" if shown else "")]
    for result in results:
        lines.append(f"{'fail' if result.problem else 'ok':<6}{result.name:<11}{result.about}")
        if result.problem:
            lines.append(fill(result.problem, WIDTH, initial_indent=" " * 17, subsequent_indent=" " * 17))
    failed = sum(bool(result.problem) for result in results)
    lines.append(f"{failed} of {len(results)} checks failed" if failed else f"all {len(results)} checks passed")
    return "\n".join(lines)
