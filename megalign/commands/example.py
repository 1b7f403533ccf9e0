"""Runs the command example: prints a whole example configuration to start from.

Run: python -m megalign example [NAME] > my.yaml
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files

from megalign.runtime.command_line import Parser, program
from megalign.runtime.exit_codes import DONE
from megalign.runtime.status import guarded
from megalign.schema import UserError, did_you_mean


def main(arguments: Sequence[str]) -> int:
    """Print the named example, or a line for each of them; exit code 0."""
    return guarded(lambda: _run(arguments))


def _run(arguments: Sequence[str]) -> int:
    parser = Parser(prog=f"{program()} example", description="print an example configuration, or list them")
    parser.add_argument("name", nargs="?", help="one of those that the command lists without a name")
    name = parser.parse_args(arguments).name
    examples = read_examples()
    if name is None:
        width = max(map(len, examples))
        for known, text in examples.items():
            print(f"{known:<{width}}  {text.splitlines()[0].lstrip('# ')}")
        return DONE
    if name not in examples:
        raise UserError(
            f"command line: example is {name!r}{did_you_mean(name, list(examples))}; must be one of "
            f"{', '.join(examples)}"
        )
    print(examples[name], end="")
    return DONE


def read_examples() -> dict[str, str]:
    """Return {name: text} of the example configurations in the package, by name."""
    examples = [file for file in files("megalign.examples").iterdir() if file.name.endswith(".yaml")]
    return {
        file.name.removesuffix(".yaml"): file.read_text(encoding="utf-8")
        for file in sorted(examples, key=lambda file: file.name)
    }
