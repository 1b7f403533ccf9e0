"""Read README.md and docs/: fenced blocks, commands, links, headings, and names in backticks."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@dataclass(frozen=True)
class Block:
    """A fenced block: the line of its first line in the page, its language and its text."""

    line: int
    language: str
    text: str


def blocks(page: Path) -> list[Block]:
    """Return the page's fenced blocks in order."""
    found: list[Block] = []
    start, language, lines = 0, "", list[str]()
    for number, line in enumerate(page.read_text().splitlines(), start=1):
        if not line.startswith("```"):
            lines.append(line)
        elif start:
            found.append(Block(start, language, "\n".join(lines)))
            start = 0
        else:
            start, language, lines = number + 1, line[3:].strip(), []
    assert not start, f"{page.name}:{start}: block without an end"
    return found


def prose(page: Path) -> str:
    """Return the page without its fenced blocks."""
    return "".join(page.read_text().split("```")[::2])


def commands(page: Path) -> list[tuple[str, list[str]]]:
    """Return (page:line, words) of each command in the page's blocks of bash."""
    found = []
    for block in blocks(page):
        if block.language not in ("bash", "sh"):
            continue
        joined = re.sub(r"\\\n", "  ", block.text)
        for line in joined.splitlines():
            if words := shlex.split(line, comments=True):
                found.append((f"{page.name}:{block.line}", words))
    return found


def anchors(page: Path) -> set[str]:
    """Return the anchors of the page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", prose(page), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", title.strip().lower()).replace(" ", "-") for title in titles}


def links(page: Path) -> list[str]:
    """Return the targets of the page's links and pictures, those of link definitions included."""
    text = re.sub(r"`[^`\n]*`", "", prose(page))
    return re.findall(r"\]\(([^)\s]+)\)", prose(page)) + re.findall(r"^\[[\w-]+\]: (\S+)$", text, flags=re.M)


def quoted(page: Path) -> list[str]:
    """Return what stands in single backticks."""
    return re.findall(r"`([^`\n]+)`", prose(page))


def table_names(text: str) -> list[str]:
    """Return the names in backticks that fill the first cell of a table's row."""
    return re.findall(r"^\| `(\w+)` \|", text, flags=re.M)
