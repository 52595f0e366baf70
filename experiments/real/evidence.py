"""docs/evidence.md: a short table for each study of published models; RESULTS.md has all rows with intervals."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from experiments.ablation.presets import TRAINED
from experiments.lib.files import ROOT, Json, short_name
from experiments.lib.statistics import Values, paired_ratio
from experiments.lib.study import Page
from experiments.lib.tables import markdown
from experiments.real import presets, report, saliency
from experiments.real.clip import RESULTS
from experiments.real.report import BASE, Classified, percent, share_of

CROSSGET = "crossget"
PARTS = ("full_", "cross_token")
"""Beginnings of the names of rows with one part of CrossGET exchanged, or trained alone."""
SHORT = ("tome", "complete_graph", "guided_ensemble", "crossget", "ward", "ward_reading", "topk")
"""The rows of classification that the short table has."""


def machine(own: Sequence[Json]) -> str:
    """Return what results were made on."""
    return " and ".join(sorted({short_name(content["environment"]) for content in own}))


def budgets_of(rows: Any) -> list[int]:
    """Return the budgets of rows by (name, budget), the mildest first."""
    return sorted({budget for _, budget in rows} - {100}, reverse=True)


def zero_shot(results: Sequence[Json]) -> Iterator[str]:
    """Yield classification without training: means over the sets of texts."""
    rows = report.zero_shot_rows(results)
    lines, budgets = [], budgets_of(rows)
    if not budgets:
        return
    yield "### Zero-shot classification, nothing trained"
    if ("dense", 100) in rows:
        row = rows["dense", 100]
        yield (
            f"CLIP ViT-B/16, {row.correct.shape[1]} ImageNet photographs, mean of {len(row.correct)} sets of texts, "
            f"float32. Dense: {np.mean(row.top1):.1f} %. Columns: FLOPs. Cells: KL from the dense model, top-1 in %."
        )
    for name in SHORT:
        cells = []
        for budget in budgets:
            found = rows.get((name, budget))
            cells.append(f"{found.divergence.mean():.3f}, {np.mean(found.top1):.1f}" if found else "")
        if any(cells):
            lines.append([presets.ROWS[name].label, *cells])
    yield markdown(lines, ["method", *(f"{budget} %" for budget in budgets)])


def maps(results: Sequence[Json]) -> Iterator[str]:
    """Yield saliency maps."""
    rows, own = report.saliency_rows(results), report.of_task(results, "saliency")
    if not rows:
        return
    yield "### Dense prediction: saliency maps"
    yield (
        f"DINOv2 ViT-S/14, {own[0]['result']['n']} photographs. "
        f"Cells: mean absolute error and IoU in % with the dense map "
        f"([picture](../experiments/real/{report.PICTURE})). TopK's dropped patches get the mean of the others."
    )
    budgets, lines = budgets_of(rows), []
    for name, row in saliency.ROWS.items():
        found = [rows.get((name, budget)) for budget in budgets]
        lines.append([row.label, *(f"{one['mae']:.4f}, {one['iou']:.1f}" if one else "" for one in found)])
    yield markdown(lines, ["method", *(f"{budget} %" for budget in budgets)])


def budgets(results: Sequence[Json]) -> Iterator[str]:
    """Yield fitted schedules: the distance of each distribution."""
    own = [c for c in report.of_task(results, "budgets") if c["run"]["budget"] == "flops"]
    if not own:
        return
    run = own[0]["run"]
    largest = max(abs(c["result"]["predicted"] - share_of(c["result"])) for c in own)
    yield "### Fitted schedules"
    yield (
        f"Fitted on {run['fitted_on']} photographs, measured on {run['measured_on']} others. Cells: "
        "squared distance of the output from the dense model's, over its squared norm. Counted FLOPs: within "
        f"{100 * largest:.2f} points of the predicted."
    )
    kinds = ("constant", "ramped", "measured")
    lines = []
    for tower, name, share in dict.fromkeys(tuple(c["run"][key] for key in ("tower", "preset", "share")) for c in own):
        found = {c["run"]["distribution"]: c for c in own
                 if (c["run"]["tower"], c["run"]["preset"], c["run"]["share"]) == (tower, name, share)}  # fmt: skip
        title = next(iter(found.values()))["run"]["model"]
        cells = [f"{found[kind]['result']['distance']:.4f}" if kind in found else "" for kind in kinds]
        lines.append([f"{title}, {presets.ROWS[name].label}, {share} %", *cells])
    yield markdown(lines, ["model, method, FLOPs", *kinds])
    timed = [c["result"] for c in report.of_task(results, "budgets") if c["run"]["budget"] == "latency"]
    kept = [one for one in timed if "refused" not in one]
    if kept:
        off = 100 * max(abs(one["predicted"] - one["measured"]) for one in kept)
        yield (
            f"Budgets of time: {len(kept)} of {len(timed)} can be kept; predicted and measured time differ by at most "
            f"{off:.1f} points."
        )


def trained(results: Sequence[Json]) -> Iterator[str]:
    """Yield distillation: means over the seeds."""
    rows, own = report.trained_rows(results), report.of_task(results, "trained")
    if not rows:
        return
    run = own[0]["run"]
    recipe = next(c["result"]["recipe"] for c in own if "recipe" in c["result"])
    precision = "" if recipe["precision"] == "no" else f", autocast to {recipe['precision']}"
    reductions = " and ".join(str(r) for r in sorted({r for _, r, _ in rows} - {0}, reverse=True))
    yield "### Trained by distillation"
    yield (
        f"The same CLIP at r = {reductions}. Trained: {recipe['epochs']} pass over {run['trained_on']} photographs "
        f"without labels, in batches of {recipe['batch']}{precision}. Measured: {run['measured_on']} ImageNet "
        "photographs; nearest class centroids of Caltech-101."
    )
    lines, parts = [], []
    for name, r in sorted(dict.fromkeys((name, r) for name, r, _ in rows), key=lambda one: (one[1] > 0, -one[1])):
        found = {s: report.read([content]) for (*key, s), content in rows.items() if key == [name, r]}
        base = CROSSGET if name.startswith(PARTS) else BASE
        shared = [s for s in found if (base, r, s) in rows]
        ratio = ""
        if shared and name != base:
            other = (report.read([rows[base, r, s]]) for s in shared)
            ratio = percent(paired_ratio(divergence(found[s] for s in shared), divergence(other)))
        label = TRAINED[name].label
        if base == CROSSGET:
            parts.append(f"{label.partition(', ')[2]} {ratio}")
            continue
        centroids = [rows[name, r, s]["result"].get("centroids") for s in found]
        right = f"{np.mean([one['top1'] for one in centroids]):.1f}" if all(centroids) else ""
        lines.append([
            f"{label}, {len(found)} seeds" if len(found) > 1 else label,
            f"{100 * next(iter(found.values())).share:.0f}", f"{divergence(found.values()).mean():.3f}", ratio,
            f"{np.mean([row.top1 for row in found.values()]):.1f}", right,
        ])  # fmt: skip
    yield markdown(lines, ["row", "FLOPs, %", "KL", "in % of trained ToMe's", "top-1, %", "centroids, %"])
    if parts:
        yield f"KL of parts in % of CrossGET's: {'; '.join(parts)}."


def divergence(rows: Iterable[Classified]) -> Values:
    """Return the KL [n] of every photograph, the mean over sets of texts and over seeds."""
    mean: Values = np.mean([row.divergence.mean(0) for row in rows], 0)
    return mean


CHAPTERS: tuple[Callable[[Sequence[Json]], Iterator[str]], ...] = (zero_shot, maps, budgets, trained)


def generated(results: Sequence[Json]) -> str:
    """Return the generated part."""
    where = f"Device: {machine(results)}."
    return "\n\n".join([where, *(paragraph for chapter in CHAPTERS for paragraph in chapter(results))])


PAGE = Page(ROOT / "docs" / "evidence.md", RESULTS, generated)
