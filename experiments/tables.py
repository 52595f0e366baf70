"""How the reports show numbers: Markdown tables, intervals, and questions with the answers that intervals allow."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tabulate import tabulate

from experiments import common

Comparisons = Mapping[str, Sequence[tuple[str, str]]]
"""By question: which rows are compared with which."""


def markdown(rows: list[list[Any]], headers: list[str]) -> str:
    """Return a Markdown table whose first column is text and whose others are aligned right."""
    align = ["left"] + ["right"] * (len(headers) - 1)
    return tabulate(rows, headers, tablefmt="github", colalign=align, disable_numparse=True)


def show(interval: common.Interval, digits: int = 1) -> str:
    """Return an interval as text, bold where it excludes zero."""
    text = f"{interval.mean:+.{digits}f} [{interval.low:+.{digits}f}, {interval.high:+.{digits}f}]"
    return f"**{text}**" if interval.excludes_zero else text


def difference(one: common.Seeds, other: common.Seeds) -> str:
    """Return the difference of two rows of shares in points, with its interval; nothing where no seed is shared."""
    interval = common.compare(one, other)
    return "" if interval is None else show(interval.times(100))


def answers(
    questions: Comparisons,
    strengths: Callable[[str, str], Sequence[Any]],
    find: Callable[[str, Any], common.Seeds | None],
    label: Callable[[str], str],
    columns: tuple[str, str],
) -> str:
    """Return each question with what the data say; a comparison that was not run is left out.

    Args:
        questions: see `Comparisons`.
        strengths: at which two rows are compared, each with the text that says so in the table.
        find: a row's shares per item at a strength; None where it was not run.
        label: what a row is called.
        columns: the headers of strengths and of differences.
    """
    lines = []
    for question, pairs in questions.items():
        for one, other in pairs:
            for strength, text in strengths(one, other):
                row, base = find(one, strength), find(other, strength)
                interval = None if row is None or base is None else common.compare(row, base)
                if interval is not None:
                    points = interval.times(100)
                    lines.append([question, f"{label(one)} minus {label(other)}", text, show(points), verdict(points)])
                    question = ""
    return markdown(lines, ["question", "compared", *columns, "difference"])


def verdict(interval: common.Interval) -> str:
    """Return in a word what an interval says."""
    if not interval.excludes_zero:
        return "not decided"
    return "better" if interval.mean > 0 else "worse"


def all_of(results: Sequence[common.Json], name: str) -> str:
    """Return what the results' environments say of something, each value once."""
    return " and ".join(sorted({str(result["environment"].get(name)) for result in results}))
