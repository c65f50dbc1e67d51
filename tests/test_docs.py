"""Links of the documentation exist, quoted messages are the program's, and commands use its flags."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import pytest

from tests.helpers import ROOT, run

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SOURCES = ["main.py", "engine.py", "benchmark.py", "models", "datasets", "util", "tools"]


def by_name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=by_name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)|src=\"([^\"]+)\"", page.read_text()):
        target = target[0] or target[1]
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        assert file.exists(), target
        if anchor:
            assert anchor in {
                _anchor(heading) for heading in re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
            }, target


def _anchor(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_messages_of_the_troubleshooting_page_are_the_programs():
    known = _texts()
    rows = re.findall(
        r"^\| `([^`]+)` "
        r"(\(PyTorch's\) )?\|",
        (ROOT / "docs/troubleshooting.md").read_text(),
        re.MULTILINE,
    )
    assert len(rows) > 25
    for message, of_others in rows:
        parts = [part.strip() for part in message.split("…") if part.strip(" ;,().")]
        if not of_others:
            assert any(_in_order(parts, text) for text in known), message


def _in_order(parts: list[str], text: str) -> bool:
    place = 0
    for part in parts:
        place = text.find(part, place)
        if place < 0:
            return False
        place += len(part)
    return True


def _texts() -> list[str]:
    """Every text in the program; … stands for the values of an f-string."""
    files = [file for name in SOURCES for file in sorted((ROOT / name).rglob("*.py")) or [ROOT / name]]
    texts = [(ROOT / "tools/dev/env.sh").read_text()]
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
            elif isinstance(node, ast.JoinedStr):
                texts.append("…".join(part.value for part in node.values if isinstance(part, ast.Constant)))
    return texts


@pytest.mark.parametrize("page", PAGES, ids=by_name)
def test_flags_in_commands_are_flags_of_their_programs(page):
    """Also for commands in running text. Whether commands in blocks work is tested by tests.run_docs."""
    program_names = r"-m datasets\.\w+|tools/explain\.py \w+|(?:tools/\w+|main|benchmark)\.py"
    for command in commands(page) + re.findall(r"`([^`\n]+ --[^`\n]+)`", page.read_text()):
        # after `--` begins another command, or main.py's flags
        first, *others = command.split(" -- ")
        for part in (first, *(f"python main.py {other}" if other[:2] == "--" else other for other in others)):
            program = re.search(rf"python ({program_names})|\./configs/", part)
            if program:
                flags = re.findall(r" --([\w-]+)", part[program.end() :])
                assert {flag.replace("-", "_") for flag in flags} <= _flags(program[1] or "main.py"), command


@functools.cache
def _flags(program: str) -> set[str]:
    """All flags of a program, spelled with underscores."""
    result = run("python", *program.split(), "--help")
    assert result.returncode == 0, result.stderr
    return {flag.replace("-", "_") for flag in re.findall(r"--([\w-]+)", result.stdout)}


def commands(page: Path) -> list[str]:
    """The commands of a page's ```bash blocks, continued lines joined, comments left out."""
    lines = (
        re.sub(r"(^|\s+)#.*$", "", line)
        for line in "\n".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
    )
    return [" ".join(line.split()) for line in lines if line.strip()]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
