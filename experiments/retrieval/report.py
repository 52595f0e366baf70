"""The page of retrieval: tables and a figure."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from experiments.lib.files import Json, unpack
from experiments.lib.statistics import Seeds, Values
from experiments.lib.study import Page
from experiments.lib.tables import INTERVALS, answers, difference, markdown, provenance
from experiments.retrieval.presets import PARTS, PRESETS, SETTINGS
from experiments.retrieval.run import RESULTS

FIGURE = "figures/mean_recall_over_flops.png"
KS = (1, 5, 10)
WAYS = ("image_to_text", "text_to_image")

# question -> (what is compared, with what, at the same r)
QUESTIONS: dict[str, list[tuple[str, str]]] = {
    "How much of the gain is just training?": [
        ("control", "dense"), ("tome", "tome_untrained"), ("crossget", "crossget_untrained"),
    ],
    "What does reducing the image tower cost, trained equally long?": [("tome", "control"), ("crossget", "control")],
    "Is CrossGET better than ToMe?": [("crossget", "tome"), ("crossget_untrained", "tome_untrained")],
    "Does complete-graph matching beat bipartite matching?": [("crossget", "bipartite")],
    "Does the guided ensemble add anything?": [("crossget", "size")],
    "Does guided matching help once the cross tokens are trained?": [("crossget", "unguided")],
    "Do the cross token and its alignment loss help?": [
        ("crossget", "no_cross_token"), ("crossget", "no_alignment"), ("crossget", "jensen_shannon"),
    ],
    "Is it enough to train the cross tokens alone?": [
        ("cross_tokens", "crossget_untrained"), ("cross_tokens", "crossget"),
    ],
    "What does reducing texts cost?": [("text", "control"), ("both", "crossget")],
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One row at one r, all seeds together.

    Attributes:
        recalls: by "image_to_text" and "text_to_image", recall@1, 5 and 10 in %, the mean over seeds.
        photos: by seed [N], for each photograph the mean of its six recalls (of its texts, both ways).
        spread: standard deviation over seeds of the mean recall, in points; None with one seed.
        seeds: how many.
        ratio: of multiply-adds of a photograph with a caption, reduced by dense.
    """

    recalls: dict[str, list[float]]
    photos: Seeds
    spread: float | None
    seeds: int
    ratio: float

    @property
    def mean(self) -> float:
        """The mean of the six recalls, in %, photographs weighing the same however many captions they have."""
        return float(100 * np.mean(list(self.photos.values())))


def per_photo(result: Json) -> Values:
    """Return for each photograph [N] the mean of recall@1, 5 and 10 both ways."""
    to_text, to_image = (unpack(result["places"][way]) for way in WAYS)
    owner = np.repeat(np.arange(len(result["captions"])), result["captions"])
    total = np.zeros(len(to_text))
    for k in KS:
        total += to_text < k
        total += np.bincount(owner, to_image < k) / np.asarray(result["captions"])
    return total / (2 * len(KS))


def join(entries: Sequence[Json]) -> Row:
    """Return the row that the seeds' results make together."""
    results = [entry["result"] for entry in entries]
    photos = {
        None if PRESETS[entry["run"]["preset"]].train is None else entry["run"]["seed"]: per_photo(entry["result"])
        for entry in entries
    }
    means = [float(100 * values.mean()) for values in photos.values()]
    flops = results[0]["gflops"]
    return Row(
        {way: [float(np.mean([one[way][f"r@{k}"] for one in results])) for k in KS] for way in WAYS},
        photos,
        float(np.std(means, ddof=1)) if len(results) > 1 else None,
        len(results),
        flops["reduced"] / flops["dense"],
    )


def gather(results: Sequence[Json]) -> dict[str, dict[tuple[str, int], Row]]:
    """Return the rows of each setting by (preset, r).

    Raises:
        ValueError: rows of one setting come from other data, another dense model or another recipe.
    """
    tables: dict[str, dict[tuple[str, int], Row]] = {}
    for setting in SETTINGS:
        groups: dict[tuple[str, int], list[Json]] = {}
        origins = set()
        for entry in results:
            run = entry["run"]
            if run["setting"] != setting or run["preset"] == "pretrain":
                continue
            groups.setdefault((run["preset"], run["r"]), []).append(entry)
            recipe = {key: value for key, value in entry["result"].get("recipe", {}).items() if key != "seed"}
            origins.add(repr((run["data"], run["weights"], run["split"], run["model"])))
            origins |= {repr(("recipe", recipe))} if recipe else set()
        if sum(not origin.startswith("('recipe'") for origin in origins) > 1 or len(origins) > 2:
            raise ValueError(f"the results of {setting} differ in data, weights or recipe: run them anew")
        if groups:
            tables[setting] = {key: join(group) for key, group in groups.items()}
    return tables


def find(table: dict[tuple[str, int], Row], preset: str, r: int) -> Row | None:
    """Return the row of a preset at r; one that does not depend on r is the same at all of them."""
    return table.get((preset, r if PRESETS[preset].swept else 0))


def rows_at(table: dict[tuple[str, int], Row], r: int) -> str:
    """Return all rows at one r."""
    headers = ["row", "% of FLOPs", *(f"{way} @{k}" for way in ("I→T", "T→I") for k in KS), "mean", "± seeds"]
    headers += ["against the control"]
    control = find(table, "control", r)
    lines = []
    for name, preset in PRESETS.items():
        row = find(table, name, r)
        if row is None:
            continue
        label = f"CrossGET, {preset.label}" if name in PARTS else preset.label
        cells = [f"{value:.1f}" for way in WAYS for value in row.recalls[way]]
        spread = "" if row.spread is None else f"{row.spread:.1f} ({row.seeds})"
        against = "" if control is None or name == "control" else difference(row.photos, control.photos)
        lines.append([label, f"{100 * row.ratio:.0f}", *cells, f"{row.mean:.1f}", spread, against])
    return markdown(lines, headers)


def answered(table: dict[tuple[str, int], Row], reductions: Sequence[int]) -> str:
    """Return each question with what the data say."""

    def strengths(one: str, other: str) -> list[tuple[int, str]]:
        swept = PRESETS[one].swept or PRESETS[other].swept
        return [(r, f"r = {r}") for r in reductions] if swept else [(reductions[0], "")]

    def photos(preset: str, r: int) -> Seeds | None:
        row = find(table, preset, r)
        return None if row is None else row.photos

    return answers(QUESTIONS, strengths, photos, lambda name: PRESETS[name].label, ("", "mean recall, points"))


def chapter(results: Sequence[Json]) -> list[str]:
    """Return the paragraphs about retrieval."""
    paragraphs = []
    for setting, table in gather(results).items():
        reductions = sorted({r for preset, r in table if PRESETS[preset].swept}, reverse=True)
        mine = [entry for entry in results if entry["run"]["setting"] == setting]
        paragraphs += [f"## {SETTINGS[setting].title}", introduction(setting, mine)]
        for r in reductions:
            removed = f"{r} tokens are removed in each block of the image tower"
            text = f"; in the text tower, where it is reduced, {SETTINGS[setting].r[r]}"
            paragraphs += [f"**r = {r}**: {removed}{text}.", rows_at(table, r)]
        paragraphs += ["**What the data say**", answered(table, reductions), absent(setting, mine)]
    return paragraphs


def absent(setting: str, results: Sequence[Json], seeds: Sequence[int] = (0, 1, 2)) -> str:
    """Return which of the planned runs have no result: every row at every r, trained ones with every seed."""
    done = {
        (entry["run"]["preset"], entry["run"]["r"], entry["run"]["seed"]) for entry in results if "r" in entry["run"]
    }
    lacking = []
    for name, preset in PRESETS.items():
        for r in SETTINGS[setting].r if preset.swept else (0,):
            open_seeds = [seed for seed in (seeds if preset.train else seeds[:1]) if (name, r, seed) not in done]
            if open_seeds:
                which = f", seeds {' '.join(map(str, open_seeds))}" if preset.train else ""
                lacking.append(f"`{name}`{f' at r = {r}' if preset.swept else ''}{which}")
    return f"Planned and not run: {'; '.join(lacking)}." if lacking else ""


def introduction(setting: str, results: Sequence[Json]) -> str:
    """Return what was done, from the files."""
    rows = [entry for entry in results if entry["run"]["preset"] != "pretrain"]
    data = rows[0]["run"]["data"]
    recipe: dict[str, Any] = next((entry["result"]["recipe"] for entry in rows if "recipe" in entry["result"]), {})
    trained = sum("recipe" in entry["result"] for entry in rows)
    text = f"{data['train']['photos']} photographs to train on, {data['eval']['photos']} to evaluate on. "
    before = next((entry["result"] for entry in results if entry["run"]["preset"] == "pretrain"), None)
    if before is not None:
        text += f"The dense model was trained here for {before['recipe']['epochs']} epochs. "
    if recipe:
        text += (
            f"From it, each row was trained for {recipe['epochs']} more epochs (batch {recipe['batch']}, learning rate "
            f"{recipe['lr']:g}), except those that say they were not: {trained} runs, "
            f"{sum(entry['seconds'] for entry in rows) / 3600:.1f} hours. "
        )
    return text + (
        "FLOPs are multiply-adds of one photograph with one caption. The mean is that of the six recalls; "
        "“± seeds” is its standard deviation over seeds (how many in parentheses). "
        "Differences are over the seeds that both rows have."
    )


def draw(results: list[Json], file: Path) -> None:
    """Draw the mean recall over multiply-adds, a panel per setting."""
    from matplotlib.figure import Figure

    tables = gather(results)
    lines = {
        "tome": ("#000000", "o"), "tome_untrained": ("#888888", "o"), "crossget": ("#D55E00", "^"),
        "crossget_untrained": ("#E69F00", "^"), "both": ("#0072B2", "s"),
    }  # fmt: skip
    figure = Figure(figsize=(6.4 * len(tables), 4.4), layout="constrained")
    for axes, (setting, table) in zip(figure.subplots(1, len(tables), squeeze=False)[0], tables.items(), strict=True):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#dddddd", linewidth=0.6)
        for name, (color, marker) in lines.items():
            rows = [row for (preset, _), row in sorted(table.items()) if preset == name]
            if not rows:
                continue
            spreads = [row.spread or 0.0 for row in rows]
            axes.errorbar(
                [100 * row.ratio for row in rows], [row.mean for row in rows], spreads, color=color, marker=marker,
                markersize=5, linewidth=1.4, capsize=3, label=PRESETS[name].label,
                linestyle="--" if name.endswith("untrained") else "-",
            )  # fmt: skip
        for name, style in (("control", "-"), ("dense", (0, (4, 3)))):
            row = find(table, name, 0)
            if row is not None:
                axes.axhline(row.mean, color="#555555", linestyle=style, linewidth=1, label=PRESETS[name].label)
        axes.set_xlabel("FLOPs of a photograph with a caption, % of the dense model")
        axes.set_ylabel("mean of the six recalls, %")
        axes.set_title(SETTINGS[setting].title, fontsize=11, loc="left")
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(file, format="png", dpi=160)


def generated(results: list[Json]) -> str:
    """Return the generated part."""
    paragraphs = [f"![Mean recall over FLOPs]({FIGURE})", f"{provenance(results, 'open_clip_torch')} {INTERVALS}"]
    return "\n\n".join(paragraph for paragraph in [*paragraphs, *chapter(results)] if paragraph)


PAGE = Page(Path(__file__).parent / "RESULTS.md", RESULTS, generated, {FIGURE: draw})
