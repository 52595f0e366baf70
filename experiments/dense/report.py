"""The tables of patch features."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from experiments.ablation.settings import SETTINGS
from experiments.dense.run import BASE, RESULTS, ROWS
from experiments.lib import tables
from experiments.lib.files import Json, unpack
from experiments.lib.statistics import paired_bootstrap
from experiments.lib.study import Page


def generated(contents: Sequence[Json]) -> str:
    """The tables of the page, from the result files alone."""
    parts = []
    for name in SETTINGS:
        found = {(c["run"]["method"], c["run"]["r"]): c["result"] for c in contents if c["run"]["setting"] == name}
        if not found:
            continue
        strengths = sorted({r for _, r in found})
        methods = [method for method in ROWS if any(method == found_method for found_method, _ in found)]
        parts.append(f"### {SETTINGS[name].title}, {next(iter(found.values()))['n']} images\n")
        for key, unit in (("cosine", "mean cosine with the dense feature"), ("within", "% nearest to their own place")):
            rows = []
            for method in methods:
                cells = []
                for r in strengths:
                    one, base = found.get((method, r)), found.get((BASE, r))
                    cells.append("" if one is None else _cell(one, base if method != BASE else None, key))
                rows.append([ROWS[method].label, *cells])
            parts.append(tables.markdown(rows, [unit, *[f"r = {r}" for r in strengths]]) + "\n")
        share = [[ROWS[method].label, *[_share(found.get((method, r))) for r in strengths]] for method in methods]
        parts.append(tables.markdown(share, ["FLOPs, % of dense", *[f"r = {r}" for r in strengths]]) + "\n")
    return "\n".join(parts).strip()


def _share(one: Json | None) -> str:
    return "" if one is None else f"{100 * one['gflops']['reduced'] / one['gflops']['dense']:.0f}"


def _cell(one: Json, base: Json | None, key: str) -> str:
    digits = 3 if key == "cosine" else 1
    text = f"{one[key]:.{digits}f}"
    if base is None:
        return text
    scale = 100 if key == "within" else 1
    mine, other = (scale * np.asarray(unpack(result[key + "s"])) for result in (one, base))
    return f"{text} ({tables.show(paired_bootstrap(mine, other), digits)})"


PAGE = Page(Path(__file__).parent / "README.md", RESULTS, generated)
