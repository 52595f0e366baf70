"""The tables of published models: RESULTS.md has all rows with their intervals."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from experiments.ablation.presets import TRAINED
from experiments.lib.files import Json, measured_on, unpack
from experiments.lib.statistics import Interval, Values, paired_bootstrap, paired_ratio
from experiments.lib.study import Page
from experiments.lib.tables import INTERVALS, markdown, provenance, show
from experiments.real import precision, presets, saliency
from experiments.real.clip import HALVES, RESULTS

PICTURE = "figures/saliency.png"
BASE = "tome"
T = TypeVar("T")
ROUNDINGS = {
    "none": "all channels, float32",
    "vectors": "vectors in bfloat16",
    "similarities": "vectors and similarities in bfloat16",
}


@dataclass(frozen=True)
class Classified:
    """One row: values per photograph, of one set of texts after the other.

    Attributes:
        correct: [sets, n] whether each photograph is classified rightly.
        divergence: [sets, n] KL from the dense model's distribution.
        share: of the dense model's multiply-adds.
    """

    correct: Values
    divergence: Values
    share: float

    @property
    def top1(self) -> list[float]:
        """In %, of each set."""
        return [100 * float(row.mean()) for row in self.correct]


def of_task(results: Sequence[Json], task: str) -> list[Json]:
    """Return the results of one study.

    Raises:
        ValueError: they come from different photographs, texts or weights.
    """
    own = [content for content in results if content["run"]["task"] == task]
    for name in ("data", "texts", "weights", "n", "trained_on", "measured_on"):
        by_tower: dict[Any, Any] = {}
        for content in own:
            run = content["run"]
            if run.get(name) != by_tower.setdefault(run.get("tower"), run.get(name)):
                raise ValueError(f"the results of {task!r} differ in {name!r}: run them again with --overwrite")
    return own


def share_of(result: Json) -> float:
    """Return the share of the dense model's multiply-adds."""
    return float(result["gflops"]["reduced"] / result["gflops"]["dense"])


def read(results: Sequence[Json]) -> Classified:
    """Return the row of one result, or of several on different photographs."""
    sets = [content["result"]["sets"] for content in results]
    correct = [[[float(mark) for mark in one["correct"]] for one in found.values()] for found in sets]
    divergence = [[unpack(one["divergences"]) for one in found.values()] for found in sets]
    return Classified(
        np.concatenate([np.array(part) for part in correct], 1),
        np.concatenate([np.array(part) for part in divergence], 1),
        share_of(results[0]["result"]),
    )


def zero_shot_rows(results: Sequence[Json]) -> dict[tuple[str, int], Classified]:
    """Return the rows by (preset, budget), over the halves of the photographs that all rows have."""
    found: dict[tuple[str, int], dict[str, Json]] = {}
    for content in of_task(results, "zero-shot"):
        run = content["run"]
        found.setdefault((run["preset"], run["budget"]), {})[run["half"]] = content
    halves = [half for half in HALVES if all(half in row for row in found.values())]
    rows = {key: read([row[half] for half in halves]) for key, row in found.items() if halves}
    return mildest_first(rows, presets.ROWS)


def mildest_first(found: Mapping[Any, T], *names: Iterable[str]) -> dict[Any, T]:
    """Return rows by a key whose last part is the budget, sorted by it, then as the names of the other parts are."""
    places = [list(one) for one in names]

    def place(key: tuple[Any, ...]) -> tuple[int, ...]:
        return (-key[-1], *(one.index(name) for one, name in zip(places, key[:-1], strict=True)))

    return {key: found[key] for key in sorted(found, key=place)}


def percent(interval: Interval) -> str:
    """Return a ratio as text, in %."""
    low, high = interval.times(100).low, interval.times(100).high
    return f"{100 * interval.mean:.0f} [{low:.0f}, {high:.0f}]"


def zero_shot(results: Sequence[Json]) -> Iterator[str]:
    """Yield the paragraphs of classification without training."""
    rows = zero_shot_rows(results)
    if not rows:
        return
    own = of_task(results, "zero-shot")
    names = own[0]["run"]["texts"]["sets"]
    dense, lines = rows.get(("dense", 100)), []
    for (name, budget), row in rows.items():
        cells: list[Any] = [f"{100 * row.share:.1f}", presets.ROWS[name].label]
        for i, _ in enumerate(names):
            base = rows.get((BASE, budget))
            cells += [
                f"{row.divergence[i].mean():.3f}",
                percent(paired_ratio(row.divergence[i], base.divergence[i])) if base and name != BASE else "",
                f"{row.top1[i]:.1f}",
                show(paired_bootstrap(row.correct[i], dense.correct[i]).times(100))
                if dense and name != "dense"
                else "",
            ]
        lines.append(cells)
    columns = [c for name in names for c in (f"KL, {name}", "in % of ToMe's", "top-1", "minus dense, points")]
    count = next(iter(rows.values())).correct.shape[1]
    yield f"## Zero-shot, {own[0]['run']['model']}"
    yield f"{count} photographs. {provenance(own, 'open_clip_torch')}"
    yield markdown(lines, ["FLOPs, %", "method", *columns], 2)


TEXT_METHODS = {"crossget": "CrossGET without cross token", "ward": "Ward by class attention"}
TEXTS = {
    "none": "none", "true": "of the true class", "wrong": "of a wrong class", "predicted": "of the predicted class",
}  # fmt: skip
"""Importance by a text was removed: its result files stay, and their commit has the program."""


def text_rows(results: Sequence[Json]) -> dict[tuple[str, str, int], Json]:
    """Return the results by (method, text, budget), the mildest first."""
    found = {
        (c["run"]["preset"], c["run"]["target"], c["run"]["budget"]): c["result"] for c in of_task(results, "text")
    }
    return mildest_first(found, TEXT_METHODS, TEXTS)


def texts(results: Sequence[Json]) -> Iterator[str]:
    """Yield the paragraphs of merging that knows a text."""
    rows, own = text_rows(results), of_task(results, "text")
    if not rows:
        return
    yield f"## A text known while merging, {own[0]['run']['model']}"
    yield (
        f"{own[0]['run']['n']} photographs. {provenance(own, 'open_clip_torch')} The text known and the texts compared "
        f"are of the set {own[0]['run']['texts']['sets'][0]}. Cross-entropy is that of the true class. The option "
        '`importance="text"` was removed for this result; the commit named has it.'
    )
    lines = []
    for (name, target, budget), row in rows.items():
        base, wrong = rows.get((name, "none", budget)), rows.get((name, "wrong", budget))
        first = next(iter(row["sets"].values()))
        losses = [
            show(paired_bootstrap(unpack(row["losses"]), unpack(other["losses"])), 3)
            if other is not None and other is not row else ""
            for other in (base, wrong)
        ]  # fmt: skip
        lines.append([
            f"{100 * share_of(row):.1f}", TEXT_METHODS[name], TEXTS[target], f"{first['divergence']:.3f}",
            f"{first['top1']:.1f}", f"{row['loss']:.3f}", *losses,
        ])  # fmt: skip
    headers = ["FLOPs, %", "method", "text", "KL", "top-1", "cross-entropy", "minus no text's", "minus a wrong text's"]
    yield markdown(lines, headers, 3)


def saliency_rows(results: Sequence[Json]) -> dict[tuple[str, int], Json]:
    """Return the results by (method, budget), the mildest first."""
    found = {(c["run"]["preset"], c["run"]["budget"]): c["result"] for c in of_task(results, "saliency")}
    return mildest_first(found, saliency.ROWS)


def maps(results: Sequence[Json]) -> Iterator[str]:
    """Yield the paragraphs of saliency maps."""
    rows, own = saliency_rows(results), of_task(results, "saliency")
    if not rows:
        return
    yield "## Saliency maps, DINOv2 ViT-S/14"
    yield f"![Saliency maps of three photographs, dense and reduced]({PICTURE})"
    yield (
        f"{own[0]['result']['n']} photographs. {provenance(own, 'transformers')} MAE and intersection over union are "
        "with the dense model's maps, the latter of what is above 0.5."
    )
    lines = []
    for (name, budget), row in rows.items():
        base = rows.get((BASE, budget))
        beside = [""] * 2
        if base is not None and name != BASE:
            beside = [
                percent(paired_ratio(unpack(row["maes"]), unpack(base["maes"]))),
                show(paired_bootstrap(unpack(row["ious"]), unpack(base["ious"])).times(100)),
            ]
        lines.append([
            f"{100 * share_of(row):.1f}", saliency.ROWS[name].label, f"{row['mae']:.4f}", beside[0],
            f"{row['iou']:.1f}", beside[1],
        ])  # fmt: skip
    headers = ["FLOPs, %", "method", "MAE", "in % of ToMe's", "IoU, %", "minus ToMe's, points"]
    yield markdown(lines, headers, 2)


OF_ONE_RUN = {"seed", "workers", "save_every"}
"""What of a recipe may differ between the rows of one table."""


def trained_rows(results: Sequence[Json]) -> dict[tuple[str, int, int | None], Json]:
    """Return the results by (row, r, seed), in the order of `TRAINED`.

    Raises:
        ValueError: they are trained by different recipes.
    """
    order = list(TRAINED)
    own = sorted(of_task(results, "trained"), key=lambda c: (c["run"]["r"], order.index(c["run"]["preset"])))
    recipes = [c["result"]["recipe"] for c in own if "recipe" in c["result"]]
    for name in sorted(set().union(*recipes) - OF_ONE_RUN):
        values = {json.dumps(recipe.get(name)) for recipe in recipes}
        if len(values) > 1:
            raise ValueError(f"rows are trained with {name} {sorted(values)}: run them again with --overwrite")
    return {(c["run"]["preset"], c["run"]["r"], c["run"]["seed"]): c for c in own}


def trained(results: Sequence[Json]) -> Iterator[str]:
    """Yield the paragraphs of distillation."""
    rows, own = trained_rows(results), of_task(results, "trained")
    if not rows:
        return
    run = own[0]["run"]
    yield f"## Trained by distillation, {run['model']}"
    yield (
        f"{run['trained_on']} photographs to train on, {run['measured_on']} to measure on, and centroids of classes. "
        f"{provenance(own, 'open_clip_torch', 'timm')}"
    )
    lines = []
    for (name, r, seed), content in rows.items():
        row = read([content])
        result, base = content["result"], rows.get((BASE, r, seed))
        beside = show(paired_bootstrap(row.divergence[0], read([base]).divergence[0]), 3) if base else ""
        centroids = result.get("centroids")
        lines.append([
            f"{100 * row.share:.1f}", TRAINED[name].label, "" if seed is None else seed, f"{result['cosine']:.4f}",
            f"{row.divergence[0].mean():.3f}", "" if name == BASE else beside, *(f"{one:.1f}" for one in row.top1),
            f"{centroids['top1']:.1f}" if centroids else "",
        ])  # fmt: skip
    names = run["texts"]["sets"]
    headers = ["FLOPs, %", "row", "seed", "cosine", f"KL, {names[0]}", "minus ToMe's, trained"]
    yield markdown(lines, [*headers, *(f"top-1, {name}" for name in names), "centroids, top-1"], 2)


def budgets(results: Sequence[Json]) -> Iterator[str]:
    """Yield the paragraphs of fitted schedules."""
    own = of_task(results, "budgets")
    if not own:
        return
    yield "## Fitted schedules"
    by_flops = [content for content in own if content["run"]["budget"] == "flops"]
    run = (by_flops or own)[0]["run"]
    yield (
        f"Fitted on {run['fitted_on']} photographs, measured on {run['measured_on']} others. "
        f"{provenance(own, 'open_clip_torch', 'transformers')} The distance is of the output from the dense model's, "
        "squared, over its squared norm."
    )
    by_key = {tuple(c["run"][key] for key in ("tower", "preset", "distribution", "share")): c for c in by_flops}
    lines = []
    for (tower, name, distribution, share), content in by_key.items():
        result, base = content["result"], by_key.get((tower, name, presets.ROWS[name].distribution, share))
        assert isinstance(result, dict)
        ratio = ""
        if base is not None and base is not content:
            ratio = percent(paired_ratio(unpack(result["distances"]), unpack(base["result"]["distances"])))
        kept = "" if result["used"] == distribution else f" (kept {result['used']})"
        lines.append([
            content["run"]["model"], presets.ROWS[name].label, f"{distribution}{kept}", f"{100 * result['asked']:.0f}",
            f"{100 * result['predicted']:.2f}", f"{100 * share_of(result):.2f}", f"{result['distance']:.4f}", ratio,
        ])  # fmt: skip
    headers = ["model", "method", "distribution", "FLOPs asked, %", "predicted", "counted", "distance"]
    if lines:
        yield markdown(lines, [*headers, "in % of the method's own distribution"], 3)
    yield from times([content for content in own if content["run"]["budget"] == "latency"])


def times(own: Sequence[Json]) -> Iterator[str]:
    """Yield the paragraphs of budgets of time."""
    if not own:
        return
    lines = []
    for content in own:
        run, result = content["run"], content["result"]
        cells = [run["model"], run["fitted_on"], presets.ROWS[run["preset"]].label, run["share"]]
        if "refused" in result:
            lines.append([*cells, "refused", "", ""])
            continue
        low, high = (f"{100 * value:.0f}" for value in result["spread"])
        measured = f"{100 * result['measured']:.1f} [{low}, {high}]"
        lines.append([*cells, f"{100 * result['predicted']:.1f}", measured, f"{100 * share_of(result):.1f}"])
    where = " and ".join(sorted({measured_on(content["environment"]) for content in own}))
    yield (
        f"Budgets of time ({where}). Brackets are quartiles of the measured calls. A budget that no schedule of the "
        "method keeps is refused."
    )
    yield markdown(lines, ["model", "batch", "method", "time asked, %", "predicted", "measured", "FLOPs, %"], 3)


def precision_rows(results: Sequence[Json]) -> dict[tuple[str, str, int | None], Json]:
    """Return the results by (method, rounding, channels), in the order of the grid."""
    found = {
        (c["run"]["preset"], c["run"]["rounding"], c["run"]["channels"]): c["result"]
        for c in of_task(results, "precision")
    }
    order = [
        (name, rounding, channels)
        for name, (_, numbers) in precision.METHODS.items()
        for rounding, channels in [*((r, None) for r in ROUNDINGS), *(("none", n) for n in numbers)]
    ]
    return {key: found[key] for key in order if key in found}


def precise(results: Sequence[Json]) -> Iterator[str]:
    """Yield the paragraphs of coarse comparisons."""
    rows, own = precision_rows(results), of_task(results, "precision")
    if not rows:
        return
    run = own[0]["run"]
    yield f"## Coarse comparisons, {run['model']}"
    yield (
        f"{run['n']} photographs, at {run['budget']} % of the FLOPs; KL of the set {run['texts']['sets'][0]}. "
        f"{provenance(own, 'open_clip_torch')}"
    )
    lines = []
    for (name, rounding, channels), result in rows.items():
        exact = rows.get((name, "none", None))
        ratio = percent(paired_ratio(kl(result), kl(exact))) if exact not in (None, result) else ""
        what = f"{channels} channels" if channels else ROUNDINGS[rounding]
        lines.append([
            presets.ROWS[name].label, what, f"{result['shared']:.1f}", f"{kl(result).mean():.3f}", ratio,
        ])  # fmt: skip
    yield markdown(lines, ["method", "compared", "pairs kept, %", "KL", "in % of the exact"], 2)


def kl(result: Json) -> Values:
    """KL of the first set of texts, by photograph."""
    return unpack(next(iter(result["sets"].values()))["divergences"])


def speeds(results: Sequence[Json]) -> Iterator[str]:
    """Yield the paragraphs of measured speed."""
    own = sorted(of_task(results, "speed"), key=lambda content: (content["run"]["images"], -content["run"]["budget"]))
    if not own:
        return
    yield f"## Speed, {own[0]['run']['model']}"
    yield (
        f"The methods of one budget take turns, {own[0]['run']['rounds']} rounds; medians and quartiles. "
        f"{provenance(own, 'open_clip_torch')}"
    )
    lines = []
    for content in own:
        for row in content["result"]["rows"]:
            dense = row["method"] == "dense"
            low, high = row["quartiles"]
            lines.append([
                f"{100 / row['promised']:.1f}", presets.ROWS[row["method"]].label, content["run"]["images"],
                f"{1e3 * row['seconds']:.0f}", "1.00x" if dense else f"{row['speed']:.2f}x [{low:.2f}, {high:.2f}]",
                "" if dense else f"{row['promised']:.2f}x",
            ])  # fmt: skip
    yield markdown(lines, ["FLOPs, %", "method", "photographs per call", "ms", "speed", "by FLOPs"], 2)


CHAPTERS: tuple[Callable[[Sequence[Json]], Iterator[str]], ...] = (
    zero_shot, speeds, maps, texts, precise, budgets, trained,
)  # fmt: skip


def generated(results: Sequence[Json]) -> str:
    """Return the generated part."""
    return "\n\n".join([INTERVALS, *(paragraph for chapter in CHAPTERS for paragraph in chapter(results))])


PAGE = Page(Path(__file__).parent / "RESULTS.md", RESULTS, generated)
