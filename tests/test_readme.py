"""The Python code that README.md and docs/ print is run, as printed, from top to bottom of each page."""

import os
import re
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import ModuleType

import pytest
from packaging.version import Version

from crossget.core.adapters import _adapters, unregister

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LINKING = [*PAGES, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "experiments").rglob("*.md"))]
LONG = ("beyond.md", "measuring.md", "quickstart.md")  # ten seconds and more
MOST_NOT_RUN = 4  # over all pages; a page of code that nobody runs is soon wrong

FENCE = re.compile(r"^(?P<indent> *)```(?P<language>[\w+-]*)[^\n`]*\n(?P<code>.*?)^(?P=indent)```", re.M | re.S)
LINK = re.compile(r"\]\((?!\w+:)([^)\s#]*)#?([^)\s]*)\)")  # to a file of the repository: (file, heading)
NOT_RUN = re.compile(r"<!-- *not run:(?P<reason>[^\n]*?)-->\s*\Z")
NEEDS = re.compile(r"<!-- *needs (?P<package>\w+) (?P<version>[\d.]+) *-->\s*\Z")


@dataclass(frozen=True)
class Block:
    language: str
    code: str
    line: int  # of the first line of code in its page, from 1
    not_run: str | None  # the reason, or None
    needs: tuple[str, str] | None = None  # a package and its first version, or None

    @property
    def runs(self) -> bool:
        if self.needs is None:
            return self.not_run is None
        package, first = self.needs
        try:
            return Version(metadata.version(package)) >= Version(first)
        except metadata.PackageNotFoundError:
            if package in os.environ.get("CROSSGET_REQUIRE", "").split(","):  # as in .ci/run
                raise
            return False


def blocks(text: str) -> list[Block]:
    found = []
    for match in FENCE.finditer(text):
        not_run, needs = NOT_RUN.search(text, 0, match.start()), NEEDS.search(text, 0, match.start())
        found.append(
            Block(
                language=match["language"].lower(),
                code=textwrap.dedent(match["code"]),
                line=text.count("\n", 0, match.start("code")) + 1,
                not_run=not_run["reason"].strip() if not_run else None,
                needs=(needs["package"], needs["version"]) if needs else None,
            )
        )
    return found


def headings(page: Path) -> list[str]:
    """The names under which links find a page's headings, as GitHub makes them."""
    found = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.M)
    return [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in found]


def python_blocks(page: Path) -> list[Block]:
    return [block for block in blocks(page.read_text(encoding="utf-8")) if block.language == "python"]


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """What a page's code runs in. A real module: dataclasses and pickle look their classes up in sys.modules."""
    module = ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", module)
    yield module
    # The adapters that a page writes as an example are not there for the tests after it.
    for backbone in [backbone for backbone, adapter in _adapters.items() if adapter.__module__ == "page"]:
        unregister(backbone)


@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=[pytest.mark.slow] * (page.name in LONG)) for page in PAGES],
    ids=lambda page: page.name,
)
def test_code_runs_as_printed(page: Path, module: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # what the code writes is not left in the checkout
    for block in python_blocks(page):
        if block.runs:
            # The empty lines make a traceback point at the line of the page.
            code = "\n" * (block.line - 1) + block.code
            exec(compile(code, str(page), "exec"), module.__dict__)


def test_readme_begins_with_code_that_runs() -> None:
    first = python_blocks(ROOT / "README.md")[0]
    assert first.not_run is None
    assert first.line < 15


def test_pages_stay_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 120
    assert sum(len(page.read_text(encoding="utf-8").split()) for page in PAGES[1:]) <= 15_000


@pytest.mark.parametrize("page", LINKING, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(page: Path) -> None:
    for file, heading in LINK.findall(page.read_text(encoding="utf-8")):
        target = page.parent / file if file else page
        assert target.exists(), f"{file} is not there"
        if heading and target.is_file():
            assert heading in headings(target), f"{target.name} has no heading #{heading}"


def test_what_is_not_run_is_little_and_says_why() -> None:
    not_run = [block.not_run for page in PAGES for block in python_blocks(page) if block.not_run is not None]
    assert len(not_run) <= MOST_NOT_RUN
    assert all(not_run), "write the reason: <!-- not run: reason -->"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_python_hides_behind_another_name(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert {block.language for block in blocks(text)}.isdisjoint({"py", "python3", "pycon", "ipython"})
    # As many fences as the parser has taken in pairs: none was overlooked.
    assert len(re.findall(r"^\s*(?:```|~~~)", text, re.M)) == 2 * len(blocks(text))


def test_readme_names_one_test_command() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (marked,) = re.findall(r"<!-- test-command -->(.*?)<!-- /test-command -->", text, re.S)
    (block,) = blocks(marked)
    assert len(block.code.strip().splitlines()) == 1  # .ci/run runs this very line


class TestParser:
    PAGE = textwrap.dedent("""\
        # Title
        ```python
        x = 1
        ```
        text
        <!-- not run: downloads a model -->
        ```python
        1 / 0
        ```
        1. in a list

           ```python
           y = x
           ```
        ```bash
        ls
        ```
        """)

    def test_finds_language_code_and_line(self) -> None:
        found = blocks(self.PAGE)
        assert [block.language for block in found] == ["python", "python", "python", "bash"]
        assert [block.code for block in found] == ["x = 1\n", "1 / 0\n", "y = x\n", "ls\n"]
        assert [block.line for block in found] == [3, 8, 13, 16]

    def test_reads_the_reason_right_above_only(self) -> None:
        assert [block.not_run for block in blocks(self.PAGE)] == [None, "downloads a model", None, None]
        assert blocks("<!-- not run: -->\n```python\n```\n")[0].not_run == ""
        assert blocks("<!-- not run: no -->\ntext\n```python\n```\n")[0].not_run is None
        assert not blocks("<!-- needs torch 99.0 -->\n```python\n```\n")[0].runs
        assert blocks("<!-- needs torch 2.4 -->\n```python\n```\n")[0].runs

    def test_a_package_that_is_not_there_is_missed_where_it_is_required(self, monkeypatch: pytest.MonkeyPatch) -> None:
        (block,) = blocks("<!-- needs nosuchpackage 1 -->\n```python\n```\n")
        assert not block.runs
        monkeypatch.setenv("CROSSGET_REQUIRE", "lmms_eval,nosuchpackage")
        with pytest.raises(metadata.PackageNotFoundError):
            block.runs  # noqa: B018

    def test_reason_of_an_earlier_block_does_not_reach_over(self) -> None:
        text = "<!-- not run: a -->\n```python\n```\n<!-- other -->\n```python\n```\n"
        assert [block.not_run for block in blocks(text)] == ["a", None]
