"""Runs the command keys: prints type, default and meaning of every configuration key.

Run: python -m megalign keys [SECTION] [--markdown]
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from megalign.runtime.command_line import Parser, program
from megalign.runtime.exit_codes import DONE
from megalign.runtime.status import guarded

if TYPE_CHECKING:
    from megalign.config.keys import Section

PAGE = """# Configuration

A configuration is a YAML file of the sections below; `megalign example` has whole ones. Every key can also be set on
the command line, as `key.sub=value`. Where a key takes text, the value is all that stands behind `=`
(`run.dir=/x/trial #2`); else it is YAML. `null` unsets a key or a section that may be missing, and `~` is the home
directory in every path. Texts may name `{run.dir}`, as in `export.hf_dir: "{run.dir}/hf"`, so that another `run.dir`
moves them too. `[]` marks the keys of each entry of a list. An unknown key is refused, and the line names the nearest
known one.

This page is made by `python -m megalign keys --markdown`, from the sentences at the keys' declarations.
"""


def main(arguments: Sequence[str]) -> int:
    """Print the keys as a table on a terminal, as plain lines else; exit code 0."""
    return guarded(lambda: _run(arguments))


def _run(arguments: Sequence[str]) -> int:
    parser = Parser(prog=f"{program()} keys", description="print type, default and meaning of configuration keys")
    parser.add_argument("section", nargs="?", help="a section, a key, a loss's name, or module:function of your own")
    parser.add_argument("--markdown", action="store_true", help="as docs/configuration.md has them")
    args = parser.parse_args(arguments)

    from megalign.config.keys import all_sections, find_sections  # it imports torch, which --help does not need

    sections = find_sections(args.section) if args.section else all_sections()
    if args.markdown:
        print("\n".join(_markdown(sections)))
    elif sys.stdout.isatty():
        _print_tables(sections)
    else:
        print("\n".join(_lines(sections)))
    return DONE


def _lines(sections: Sequence[Section]) -> Iterator[str]:
    for section in sections:
        yield f"# {section.title}: {section.about}"
        for key in section.keys:
            yield f"{key.name}  ({key.type}; {key.default})  {key.about}"


def _print_tables(sections: Sequence[Section]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    for section in sections:
        table = Table(title=f"{section.title}: {escape(section.about)}", title_justify="left", box=SIMPLE_HEAD)
        for heading in ("key", "type", "default", "meaning"):
            table.add_column(heading)
        for key in section.keys:
            table.add_row(*map(escape, (key.name, key.type, key.default, key.about)))
        console.print(table)


def _markdown(sections: Sequence[Section]) -> Iterator[str]:
    yield PAGE
    for section in sections:
        yield f"## {section.title}\n\n{section.about[:1].upper()}{section.about[1:]}\n"
        if section.keys:
            yield "| key | type | default | meaning |\n|---|---|---|---|"
        for key in section.keys:
            yield f"| `{key.name}` | {_cell(key.type)} | {_cell(key.default)} | {_cell(key.about)} |"
        yield ""


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
