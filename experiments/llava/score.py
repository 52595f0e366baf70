"""Score POPE from an answer file of LLaVA: `python -m experiments.llava.score --help`.

lmms-eval asks the benchmarks of a model and scores them; it reads no answer files, and its POPE has other questions and
another rule than the published numbers. Here is what it does not do: the published POPE score, the mean F1 of three
categories over 8,910 questions, from recorded answers.
"""

import json
import shlex
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from experiments.lib.files import Json, environment, file_digest, write_json
from experiments.lib.tables import markdown

CATEGORIES = ("random", "popular", "adversarial")


@dataclass(frozen=True)
class Options:
    """What is scored."""

    answers: Path
    """Answer file: an object with `question_id` and `text` in each line."""
    questions: Path
    """LLaVA's llava_pope_test.jsonl."""
    labels: Path
    """Folder with POPE's coco_pope_random.json, coco_pope_popular.json and coco_pope_adversarial.json."""
    json: Path | None = None
    """Write a result file here."""

    @property
    def label_files(self) -> dict[str, Path]:
        """The file of each category."""
        return {category: self.labels / f"coco_pope_{category}.json" for category in CATEGORIES}


def read_lines(file: Path, *keys: str) -> list[dict[str, str]]:
    """Return these entries of every line's JSON object, as text.

    Raises:
        ValueError: a line is no JSON object, or lacks an entry.
    """
    records = []
    # Not splitlines: it also splits at rarer characters, which an answer may hold.
    for number, line in enumerate(file.read_text(encoding="utf-8").removesuffix("\n").split("\n"), 1):
        try:
            record = json.loads(line)
            records.append({key: str(record[key]) for key in keys})
        except (json.JSONDecodeError, KeyError, TypeError) as error:  # noqa: PERF203
            raise ValueError(
                f"{file}, line {number}: expected a JSON object with {list(keys)}, got {line[:80]!r}"
            ) from error
    return records


def by_id(records: Iterable[dict[str, str]], file: Path) -> dict[str, dict[str, str]]:
    """Return records by their question.

    Raises:
        ValueError: a question occurs twice.
    """
    found: dict[str, dict[str, str]] = {}
    for record in records:
        if record["question_id"] in found:
            raise ValueError(f"{file}: question {record['question_id']!r} is there twice")
        found[record["question_id"]] = record
    return found


def says_yes(text: str) -> bool:
    """Read an answer: no if its first sentence, without commas, has the word No, no or not; yes otherwise."""
    # POPE's rule. "Not", "NO" and "No!" are none of these words, so they mean yes, and so does an empty answer.
    return {"No", "no", "not"}.isdisjoint(text.partition(".")[0].replace(",", "").split(" "))


def score(options: Options) -> Json:
    """Return accuracy, precision, recall, F1 and share of yes of each category, in %, and the mean F1.

    Raises:
        ValueError: answers and questions, or questions and labels, do not belong together.
    """
    questions = by_id(read_lines(options.questions, "question_id", "image", "text", "category"), options.questions)
    answers = by_id(read_lines(options.answers, "question_id", "text"), options.answers)
    for what, keys in (("answers to unknown questions", answers.keys() - questions.keys()),
                       ("questions without an answer", questions.keys() - answers.keys())):  # fmt: skip
        if keys:
            raise ValueError(f"{options.answers}: {len(keys)} {what}, such as {min(keys)!r}")
    categories = {}
    for category, file in options.label_files.items():
        # Line i of the labels belongs to question i of the category: the ids of the two files differ.
        asked = [row for row in questions.values() if row["category"] == category]
        labels = read_lines(file, "image", "text", "label")
        if len(asked) != len(labels):
            raise ValueError(
                f"{file} has {len(labels)} labels, {options.questions} has {len(asked)} questions for them"
            )
        for number, (row, label) in enumerate(zip(asked, labels, strict=True), 1):
            if row["image"] != label["image"] or not row["text"].startswith(label["text"]):
                raise ValueError(f"{file}, line {number} is not about question {row['question_id']!r}: {label}")
            if label["label"] not in ("yes", "no"):
                raise ValueError(f"{file}, line {number}: expected the label yes or no, got {label['label']!r}")
        truth = [label["label"] == "yes" for label in labels]
        categories[category] = rates(truth, [says_yes(answers[row["question_id"]]["text"]) for row in asked])
    return {"f1": sum(part["f1"] for part in categories.values()) / len(categories), "categories": categories}


def rates(truth: list[bool], said: list[bool]) -> Json:
    """Return what answers are worth, in %; 0 of 0 is 0, as for a model that never says yes."""

    def percent(part: float, whole: float) -> float:
        return 100 * part / whole if whole else 0.0

    hits = sum(a and b for a, b in zip(truth, said, strict=True))
    return {
        "n": len(truth),
        "accuracy": percent(sum(a == b for a, b in zip(truth, said, strict=True)), len(truth)),
        "precision": percent(hits, sum(said)),
        "recall": percent(hits, sum(truth)),
        "f1": percent(2 * hits, sum(said) + sum(truth)),
        "yes": percent(sum(said), len(said)),
    }


def main(options: Options) -> Json:
    """Score, print the table, write the result file if one is asked for, and return the result."""
    start = time.perf_counter()
    result = score(options)
    seconds = round(time.perf_counter() - start, 2)
    rows = [
        [name, part["n"], *(f"{part[key]:.1f}" for key in ("accuracy", "precision", "recall", "f1", "yes"))]
        for name, part in result["categories"].items()
    ]
    rows.append(["mean", None, None, None, None, f"{result['f1']:.1f}", None])
    print(markdown(rows, ["POPE", "n", "accuracy", "precision", "recall", "F1", "yes"]))
    if options.json is not None:
        files = {"answers": [options.answers], "questions": [options.questions], "labels": options.label_files.values()}
        digests = {name: {file.name: file_digest(file) for file in some} for name, some in files.items()}
        words = ["python", "-m", "experiments.llava.score"]
        for name in files:
            words += [f"--{name}", getattr(options, name).name]
        content = {"run": {"benchmark": "pope", "sha256": digests}, "command": shlex.join(words)}
        write_json(options.json, {**content, "environment": environment(), "result": result, "seconds": seconds})
    return result


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Options, description=__doc__))
