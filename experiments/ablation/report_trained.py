"""The page of the trained ablation: tables, and the questions they answer."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from experiments.ablation.presets import RECIPE_NOTES, TRAINED
from experiments.ablation.report import Row, check_same, join
from experiments.ablation.settings import SETTINGS
from experiments.ablation.train import RESULTS
from experiments.lib.files import Json
from experiments.lib.statistics import Interval, Values, paired_bootstrap
from experiments.lib.study import Page
from experiments.lib.tables import markdown, provenance, show

Key = tuple[str, int]


@dataclass(frozen=True)
class Rows:
    """All rows of a setting.

    Attributes:
        joined: by preset and r, all seeds together.
        seeds: by preset and r, the result of each seed, by seed.
        recipe: of all rows that are trained.
        sources: what was trained on and measured on, from a result file.
    """

    joined: dict[Key, Row]
    seeds: dict[Key, dict[int, Json]]
    recipe: Json
    sources: Json

    def key(self, preset: str, r: int) -> Key | None:
        """Return where a preset's row is; one that does not depend on r is the same at all of them."""
        key = preset, r if TRAINED[preset].preset.swept else 0
        return key if key in self.joined else None

    @property
    def reductions(self) -> list[int]:
        """All r, ascending."""
        return sorted({r for preset, r in self.joined if TRAINED[preset].preset.swept})

    def shared_seeds(self, keys: list[Key]) -> list[int]:
        """Return the seeds that all of these have, so that what is compared was trained in the same orders.

        Rows that are not trained have one result for all seeds; if no other is among them, that one's seed.
        """
        trained = [set(self.seeds[key]) for key in keys if TRAINED[key[0]].train is not None]
        return sorted(set.intersection(*(trained or [set(self.seeds[keys[0]])])))

    def of_seed(self, key: Key, seed: int) -> Json:
        """Return the result of one seed."""
        seeds = self.seeds[key]
        return seeds[seed] if TRAINED[key[0]].train is not None else next(iter(seeds.values()))

    def correct(self, key: Key, seeds: list[int]) -> Values:
        """Return [n], the share of these seeds that classify each image rightly."""
        marks = [[float(mark) for mark in self.of_seed(key, seed)["correct"]] for seed in seeds]
        return np.asarray(np.mean(marks, 0), dtype=np.float64)


def gather(results: list[Json]) -> dict[str, Rows]:
    """Return the rows of each setting.

    Raises:
        ValueError: results of one setting come from different images, weights or recipes.
    """
    tables = {}
    for setting in SETTINGS:
        of_setting = [result for result in results if result["run"]["setting"] == setting]
        if not of_setting:
            continue
        check_same(setting, of_setting)
        recipes = [
            {**result["result"]["recipe"], "seed": None} for result in of_setting if "recipe" in result["result"]
        ]
        if any(recipe != recipes[0] for recipe in recipes):
            raise ValueError(f"the results of {setting} differ in their recipes: run them again with --overwrite")
        groups: dict[Key, list[Json]] = {}
        for result in of_setting:
            groups.setdefault((result["run"]["preset"], result["run"]["r"]), []).append(result)
        tables[setting] = Rows(
            {key: join(group) for key, group in groups.items()},
            {key: {result["run"]["seed"]: result["result"] for result in group} for key, group in groups.items()},
            recipes[0] if recipes else {},
            of_setting[0]["run"]["data"],
        )
    return tables


@dataclass(frozen=True)
class Question:
    """What is asked, and which rows answer: right answers of `rows` minus those of `bases`, each summed.

    Attributes:
        text: the question, to be answered by yes or no.
        rows, bases: as many of the one as of the other, names of `presets.TRAINED`.
    """

    text: str
    rows: tuple[str, ...]
    bases: tuple[str, ...]

    @property
    def compared(self) -> str:
        """The difference as text."""
        sides = [" + ".join(f"`{name}`" for name in names) for names in (self.rows, self.bases)]
        return " - ".join(f"({side})" if " + " in side else side for side in sides)


QUESTIONS = (
    Question("Does complete-graph matching beat bipartite, without a guide?", ("complete_graph",), ("bipartite",)),
    Question("Does complete-graph matching beat bipartite, in CrossGET?", ("crossget",), ("full_bipartite",)),
    Question(
        "Does the guided ensemble beat the size-weighted, without a cross token?",
        ("guided_ensemble",),
        ("complete_graph",),
    ),
    Question("Does the guided ensemble beat the size-weighted, in CrossGET?", ("crossget",), ("full_size",)),
    Question("Does guided matching help with trained cross tokens?", ("crossget",), ("cross_token",)),
    Question("Is CrossGET better than the same without cross tokens?", ("crossget",), ("full_no_cross_token",)),
    Question("Is CrossGET better than ToMe, trained alike?", ("crossget",), ("tome",)),
    Question("Does training on help the dense model?", ("control",), ("dense",)),
    Question("Does training on help ToMe?", ("tome",), ("tome_untrained",)),
    Question("Does training on help CrossGET?", ("crossget",), ("crossget_untrained",)),
    Question(
        "Does CrossGET gain more by training on than the dense model?",
        ("crossget", "dense"),
        ("crossget_untrained", "control"),
    ),
    Question(
        "Does CrossGET gain more by training on than ToMe?",
        ("crossget", "tome_untrained"),
        ("crossget_untrained", "tome"),
    ),
)


@dataclass(frozen=True)
class Verdict:
    """What one question's rows say.

    Attributes:
        setting: of which model.
        question: what was asked.
        reductions: at which r; of several the mean.
        points: the difference of top-1 in points, with the interval over images; the mean of the seeds that all have.
        by_seed: the same difference for each of these seeds.
        loss_by_seed: that of the mean cross-entropy, where less is better.
    """

    setting: str
    question: Question
    reductions: tuple[int, ...]
    points: Interval
    by_seed: list[float]
    loss_by_seed: list[float]

    @property
    def word(self) -> str:
        """The answer that the interval allows."""
        if not self.points.excludes_zero:
            return "not decided"
        return "yes" if self.points.mean > 0 else "no: it hurts" if len(self.question.rows) == 1 else "no: less"


def verdicts(results: list[Json]) -> list[Verdict]:
    """Return the answer to each question at each r, and at all of them together."""
    found = []
    for setting, rows in gather(results).items():
        for question in QUESTIONS:
            swept = any(TRAINED[name].preset.swept for name in (*question.rows, *question.bases))
            single = [(r,) for r in rows.reductions] if swept else [(0,)]
            together = [tuple(rows.reductions)] if len(single) > 1 else []
            answers = (answer(setting, rows, question, reductions) for reductions in (*single, *together))
            found += [verdict for verdict in answers if verdict is not None]
    return found


def answer(setting: str, rows: Rows, question: Question, reductions: tuple[int, ...]) -> Verdict | None:
    """Return what the rows say at these r; None where one of them was not run."""
    sides = [[rows.key(name, r) for r in reductions for name in names] for names in (question.rows, question.bases)]
    plus, minus = ([key for key in side if key is not None] for side in sides)
    if len(plus) < len(sides[0]) or len(minus) < len(sides[1]):
        return None
    seeds = rows.shared_seeds([*plus, *minus])
    if not seeds:
        return None
    summed = [np.sum([rows.correct(key, seeds) for key in side], 0) for side in (plus, minus)]
    interval = paired_bootstrap(summed[0], summed[1]).times(100 / len(reductions))
    by_seed, loss_by_seed = (
        [
            (sum(rows.of_seed(key, seed)[what] for key in plus) - sum(rows.of_seed(key, seed)[what] for key in minus))
            / len(reductions)
            for seed in seeds
        ]
        for what in ("top1", "loss")
    )
    return Verdict(setting, question, reductions, interval, by_seed, loss_by_seed)


def chapter(results: list[Json]) -> list[str]:
    """Return the paragraphs about all trained runs: what was done, the answers, and a table for each r."""
    paragraphs = []
    answers = verdicts(results)
    for setting, rows in gather(results).items():
        paragraphs += [
            f"## {SETTINGS[setting].title}",
            introduction(setting, rows),
            answer_table([verdict for verdict in answers if verdict.setting == setting]),
        ]
        for r in rows.reductions:
            paragraphs += [f"### r = {r}", row_table(rows, r)]
    return paragraphs


def introduction(setting: str, rows: Rows) -> str:
    """Return how the rows came about, and how to read them."""
    recipe, train, test = rows.recipe, rows.sources["train"], rows.sources["test"]
    how = "Nothing was trained."
    if recipe:
        faster = recipe["lr_factors"].get("model.crossget", 1)
        how = (
            "All rows start from one dense checkpoint, and all but those called not trained on are trained by the same "
            f"recipe: {recipe['epochs']} epochs on {train['n']} images, {recipe['optimizer']}, batch "
            f"{recipe['batch']}, learning rate {recipe['lr']:g}, that of cross tokens {faster:g} times as high, "
            f"{recipe['schedule']} schedule, crops and mirroring. "
            f"{RECIPE_NOTES[setting]}"
        )
    return (
        f"{how} Top-1 is measured on {test['n']} other images. A single tower has nothing to align cross tokens with: "
        "they are trained by cross-entropy alone. Seeds change the order and augmentation of images. Brackets are "
        "95 % paired bootstrap intervals over images of the seeds' mean, bold where they exclude zero. They do not "
        "cover the chance in training, which the differences seed by seed show, and about one in twenty excludes zero "
        "by chance. The loss is the mean cross-entropy on the same images, which sees smaller differences; less is "
        "better."
    )


def answer_table(answers: list[Verdict]) -> str:
    """Return one line for each question and r."""
    headers = ["question", "rows", "r", "points", "by seed", "loss, by seed", "answer"]
    lines = []
    for verdict in answers:
        r = " ".join(str(r) for r in verdict.reductions) if verdict.reductions != (0,) else "any"
        cells = [verdict.question.text, verdict.question.compared, r, show(verdict.points)]
        cells += [" ".join(f"{points:+.1f}" for points in verdict.by_seed)]
        cells += [" ".join(f"{loss:+.3f}" for loss in verdict.loss_by_seed)]
        lines.append([*cells, verdict.word])
    return markdown(lines, headers)


def row_table(rows: Rows, r: int) -> str:
    """Return one line for each row at one r."""
    headers = ["row", "", "FLOPs, % of dense", "top-1, %", "sd", "loss", "seeds", "against the control", "against ToMe"]
    return markdown(list(row_lines(rows, r)), headers)


def row_lines(rows: Rows, r: int) -> Iterator[list[str]]:
    """Yield the cells of the rows at one r."""
    for name, trained in TRAINED.items():
        key = rows.key(name, r)
        if key is None:
            continue
        row, seeds = rows.joined[key], rows.seeds[key].values()
        cells = [f"`{name}`", trained.label, f"{100 * row.ratio:.0f}", f"{row.top1:.1f}"]
        cells += [f"{np.std([seed['top1'] for seed in seeds], ddof=1):.1f}" if len(seeds) > 1 else ""]
        cells += [f"{np.mean([seed['loss'] for seed in seeds]):.3f}", str(len(seeds))]
        for base in ("control", "tome"):
            other = rows.key(base, r)
            shared = [] if other is None else rows.shared_seeds([key, other])
            if other is None or name == base or not shared:
                cells.append("")
            else:
                one, two = (rows.correct(side, shared) for side in (key, other))
                cells.append(show(paired_bootstrap(one, two).times(100)))
        yield cells


def generated(results: list[Json]) -> str:
    """Return the generated part."""
    return "\n\n".join([provenance(results, "timm"), *chapter(results)])


PAGE = Page(Path(__file__).parent / "RESULTS_TRAINED.md", RESULTS, generated)
