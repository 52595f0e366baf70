"""Which models of transformers can be reduced: a tiny random model of every family, in a process of its own.

    python -m crossget.demo.transformers_models experiments/models/transformers.md

writes the page again. Only systems with the start method "forkserver" can do it: Linux and macOS.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import re
import sys
import warnings
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

import crossget
from crossget.core.adapters import FAMILIES, has_adapter
from crossget.core.proofs import prove_model
from crossget.demo import tiny_inputs, tiny_transformers
from crossget.demo.isolated import examined, text_of
from crossget.integrations import transformers
from crossget.integrations._support import SupportRow

WAYS = 3  # of calling a model, until one shows a tower


@dataclass(frozen=True)
class Row:
    """One class of transformers.

    Attributes:
        family: its name in transformers.models.
        name: of the class; empty if the family's models cannot be imported.
        built: whether a tiny model could be made.
        called: the way in which it was called; empty if none was found.
        towers: what was found, as text, and why the proof of it failed; no text: it is proved.
        refused: path of a module that looks like a tower, and why it is none.
        cause: why nothing was found.
    """

    family: str
    name: str
    built: bool = False
    called: str = ""
    towers: dict[str, str] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    cause: str = "it was not built"

    @property
    def proved(self) -> tuple[str, ...]:
        """The towers that are proved."""
        return tuple(tower for tower, failed in self.towers.items() if not failed)

    @property
    def done(self) -> bool:
        """Whether a tower is proved."""
        return bool(self.proved)

    @property
    def reason(self) -> str:
        """Why no tower can be reduced, in one line; empty if one can."""
        if self.proved:
            return ""
        failed = "; ".join(f"{tower}: {reason}" for tower, reason in self.towers.items())
        refused = "; ".join(f"{path}: {reason}" for path, reason in self.refused.items())
        return " ".join((failed or refused or self.cause).split())

    def support(self) -> SupportRow:
        """As a row of `crossget models`."""
        return SupportRow(self.name or self.family, self.name, bool(self.proved), self.proved, short(self.reason))

    def _rank(self) -> tuple[bool, bool, bool, bool]:
        return bool(self.proved), bool(self.towers), bool(self.called), self.built


def support_matrix(
    pattern: str | None = None, only: Sequence[str] | None = None, without: Collection[str] = ()
) -> Iterator[Row]:
    """One row for each class of configurations of a family, as the models are done. Takes seconds for each.

    Args:
        pattern: of the classes' names, as in fnmatch.
        only: families; all of them, if not given.
        without: names of classes to leave out.

    Raises:
        RuntimeError: the system has no start method "forkserver".
    """
    waiting = (row for row in _names(pattern or "*", only) if row.name not in without)
    return examined(waiting, examine, __name__)


def with_adapters_first(adapted: Iterable[SupportRow], pattern: str | None) -> Iterator[SupportRow]:
    """The rows of classes with an adapter, and then of the others, whose names match a pattern."""
    names = set()
    for row in adapted:
        names.add(row.name)
        yield row
    for other in support_matrix(pattern, without=names):
        yield other.support()


def _names(pattern: str, only: Sequence[str] | None) -> Iterator[Row]:
    """Rows with families and names alone."""
    for family, source in tiny_transformers.families().items():
        if only is None or family in only:
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # the library's own
                    names = list(tiny_transformers.classes(family, source, pattern))
            except ImportError as error:
                yield Row(family, "", cause=text_of(error))
            else:
                yield from (Row(family, name) for name in names)


def examine(row: Row) -> Iterator[Row]:
    """Build the class of a row, call it and look for its towers; yields a row whenever more is known than before."""
    family, name = row.family, row.name
    best: Row | None = None
    for build in tiny_transformers.builders(getattr(tiny_transformers.module(family), name)):
        for row in _attempts(Row(family, name), build):
            if best is None or row._rank() > best._rank():
                best = row
                yield row
        if best is not None and best.called:  # other sizes would show no more
            return


def _attempts(row: Row, build: Any) -> Iterator[Row]:
    """Rows of a model: built, and called in up to `WAYS` ways."""
    try:
        model = build()
    except Exception as error:
        yield dataclasses.replace(row, cause=f"it was not built: {text_of(error)}")
        return
    row = dataclasses.replace(row, built=True)
    errors: list[str] = []
    done: set[str] = set()
    for way in tiny_inputs.ways(model):
        if way.method in done:  # another layout of the same argument
            continue
        try:
            with torch.no_grad():
                way.call()
        except Exception as error:
            errors.append(f"{way}: {text_of(error)}")
            continue
        done.add(way.method)
        found = _found(row, model, way)
        yield found
        if found.proved or len(done) == WAYS:
            return
    if not done:
        yield dataclasses.replace(row, cause=f"it was not called: {'; '.join(errors[:3]) or 'unknown arguments'}")


def _found(row: Row, model: nn.Module, way: tiny_inputs.Way) -> Row:
    """The row with the towers that this way of calling the model shows."""
    row = dataclasses.replace(row, called=str(way), cause="")
    try:
        towers = crossget.find_towers(model, way.call)
    except TypeError as error:
        # The first line names the class and the last one gives advice; those between are the reasons.
        return dataclasses.replace(row, cause="; ".join(str(error).splitlines()[1:-1]) or str(error))
    except Exception as error:
        return dataclasses.replace(row, cause=f"find_towers failed: {text_of(error)}")
    reducible = [tower for tower in towers if tower.reducible]
    try:
        # Towers that no adapter lists are proved when they are found.
        failed = prove_model(model, way.call, reducible) if has_adapter(model) else {}
    except Exception as error:
        failed = {tower.name: f"the proof failed: {text_of(error)}" for tower in reducible}
    lines = {_without_depth(str(tower)): failed.get(tower.name, "") for tower in reducible}
    return dataclasses.replace(row, towers=lines, refused=towers.refused)


def _without_depth(tower: str) -> str:
    """The text of a tower without its number of blocks, which is of the tiny model."""
    return re.sub(r"\b\d+ blocks", "blocks", tower)


# ---------------------------------------------------------------------------------------------------------------------
# The page


_PAGE = """\
# Models of transformers

One class for each class of configurations in the families that take images or audio, or have a text encoder. The models
are tiny and random: configurations have few layers and small widths, and all parameters are changed by noise. A class
is supported if a tower is found and proved for the whole model with two different inputs: with `ToMe(r=0)` the output
is the dense model's, bit for bit, with `ToMe(r=2)` it has the same shape and the planned number of tokens is reached,
and detaching is exact. A class that is not supported here may be so with other inputs: its row says how it was called.

This page is generated, without weights or network, on two cores in about half an hour:

```sh
python -m crossget.demo.transformers_models experiments/models/transformers.md
```

`crossget models --host transformers --filter '*Dino*'` prints rows of it for the version that you have. How models
with an adapter behave is in [docs/backbones.md](../../docs/backbones.md).

Versions: transformers {transformers}, torch {torch}, crossget {crossget}.
"""
_ADAPTED = """\
Every class with an adapter, built on the meta device from the default values of its configuration.
"""


def markdown(rows: Sequence[Row], adapted: Sequence[SupportRow]) -> str:
    """The page.

    Args:
        rows: of the tiny models.
        adapted: of the classes with an adapter, at their default sizes.
    """
    rows = sorted(rows, key=lambda row: (row.family, row.name))
    version = importlib.metadata.version("transformers")
    head = _PAGE.format(transformers=version, torch=torch.__version__, crossget=crossget.__version__)
    supported, others = [row for row in rows if row.proved], [row for row in rows if not row.proved]
    count = f"{len(supported)} of {len(rows)} classes can be reduced, in {len(_families(supported))} of"
    parts = [head, f"{count} {len(_families(rows))} families.", "## Supported", _supported(supported)]
    parts += ["## Not supported", _not_supported(others), "## With an adapter", _ADAPTED, _adapted(adapted)]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def listed(page: str) -> tuple[str, list[tuple[str, str]]]:
    """The version of transformers that a page is about, and the families and classes that it lists as supported."""
    version = re.search("^Versions: transformers ([^,]+),", page, re.MULTILINE)
    if version is None:
        raise ValueError("the page names no version of transformers: write it again")
    table = page.partition("## Supported")[2].partition("## Not supported")[0]
    return version[1], re.findall(r"^\| (\w+) \| `(\w+)` \|", table, re.MULTILINE)


def _families(rows: Sequence[Row]) -> set[str]:
    return {row.family for row in rows}


def _supported(rows: Sequence[Row]) -> str:
    cells = [[r.family, f"`{r.name}`", "adapter" if r.family in FAMILIES else "", "; ".join(r.proved)] for r in rows]
    return table(["family", "class", "", "towers"], cells)


def _not_supported(rows: Sequence[Row]) -> str:
    cells = [[r.family, f"`{r.name}`" if r.name else "", r.called, short(r.reason)] for r in rows]
    return table(["family", "class", "called", "reason"], cells)


def _adapted(rows: Sequence[SupportRow]) -> str:
    return table(["class", "towers"], [[f"`{r.name}`", "; ".join(r.towers) or r.reason] for r in rows])


def short(reason: str) -> str:
    """A reason that fits into a table."""
    return reason if len(reason) < 240 else reason[:240] + " ..."


def table(head: list[str], lines: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    rule = ["---"] * len(head)
    return "\n".join("| " + " | ".join(cell.replace("|", "/") for cell in line) + " |" for line in [head, rule, *lines])


def main(path: Path) -> None:
    """Write the page."""
    from tqdm import tqdm

    rows = list(tqdm(support_matrix(), desc="transformers", unit=" models"))
    new = path.with_suffix(".new")
    new.write_text(markdown(rows, list(transformers.support_matrix())), encoding="utf-8")
    new.replace(path)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
