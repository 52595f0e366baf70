"""Score POPE, MME and ScienceQA from LLaVA's answer files: `python -m experiments.llava.score --help`.

An answer file has one JSON object per line: `question_id`, `prompt`, `text`. An answer is read as it was for the
published numbers, odd corners included; comments name them. What belongs together is not left to the order of lines:
answers, questions and ground truth are matched by what they name, and a question without an answer, an answer without a
question, or either of them twice is an error.
"""

import dataclasses
import json
import re
import shlex
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from tabulate import tabulate

from experiments.lib.files import Json, environment, file_digest, write_json

CATEGORIES = ("random", "popular", "adversarial")
PERCEPTION = ("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR")
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
# The end of a question: what MME asks for, and what LLaVA puts in its place.
ENDINGS = ("Please answer yes or no.", "Answer the question using a single word or phrase.")
LETTERS = "ABCDE"

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


def read(file: Path) -> str:
    """Return a file's text."""
    if not file.is_file():
        raise FileNotFoundError(f"there is no file {file}")
    return file.read_text(encoding="utf-8")


def read_lines(file: Path) -> Iterator[tuple[str, str]]:
    """Yield (where, line): file and line number, for messages, and the line."""
    # Not splitlines: an answer may hold one of the rarer characters at which that splits, too.
    for number, line in enumerate(read(file).removesuffix("\n").split("\n"), 1):
        yield f"{file}, line {number}", line


def read_records(file: Path, *fields: str) -> list[dict[str, str]]:
    """Return the fields of every line's JSON object; all are text but `question_id`, which may be a number, too."""
    records = []
    for where, line in read_lines(file):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}: this is not JSON: {line[:80]!r}") from error
        found = record if isinstance(record, dict) else {}
        if type(found.get("question_id")) is int:
            found["question_id"] = str(found["question_id"])
        wrong = [field for field in fields if not isinstance(found.get(field), str)]
        if wrong:
            raise ValueError(
                f"{where}: expected an object with the texts {list(fields)}, {wrong} are none: {line[:80]!r}"
            )
        records.append({field: found[field] for field in fields})
    return records


def read_object(file: Path) -> dict[str, Any]:
    """Return the one JSON object that a file holds."""
    try:
        content = json.loads(read(file))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file}: expected a JSON object, got a {type(content).__name__}")
    return content


def unique(pairs: Iterable[tuple[Key, Value]], file: Path) -> dict[Key, Value]:
    """Return the pairs as a dictionary; one key twice is an error."""
    found: dict[Key, Value] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"{file}: {key!r} is there twice")
        found[key] = value
    return found


def read_answers(file: Path) -> dict[str, str]:
    """Return question id -> answer."""
    return unique(((row["question_id"], row["text"]) for row in read_records(file, "question_id", "text")), file)


def check_complete(answers: Collection[Key], questions: Collection[Key], file: Path) -> None:
    """Refuse answers to questions that were not asked, and questions that were not answered."""
    unknown = [key for key in answers if key not in questions]
    if unknown:
        raise ValueError(
            f"{file}: {len(unknown)} of {len(answers)} answers are to unknown questions: {unknown[0]!r}, ..."
        )
    missing = [key for key in questions if key not in answers]
    if missing:
        raise ValueError(f"{file}: {len(missing)} of {len(questions)} questions have no answer: {missing[0]!r}, ...")


def percent(part: float, whole: float) -> float:
    """Return 100 part / whole; 0 of 0 is 0, as where precision is asked of a model that never says yes."""
    return 100 * part / whole if whole else 0.0


def says_yes(text: str) -> bool:
    """Read an answer to POPE: no if its first sentence, without commas, has the word No, no or not; yes otherwise."""
    # That is POPE's rule. "Not", "NO" and "No!" are none of these words, so they mean yes, and so does an empty answer.
    return {"No", "no", "not"}.isdisjoint(text.partition(".")[0].replace(",", "").split(" "))


@dataclass(frozen=True)
class Pope:
    """POPE: is an object in the image? The published number is the mean F1 of three categories."""

    name: ClassVar[str] = "pope"
    answers: Path
    """Answer file."""
    questions: Path
    """LLaVA's llava_pope_test.jsonl."""
    labels: Path
    """Folder with POPE's coco_pope_random.json, coco_pope_popular.json and coco_pope_adversarial.json."""
    json: Path | None = None
    """Write a result file here."""

    def files(self) -> dict[str, list[Path]]:
        """Return what is read, option by option."""
        labels = [self.labels / f"coco_pope_{category}.json" for category in CATEGORIES]
        return {"answers": [self.answers], "questions": [self.questions], "labels": labels}

    def score(self) -> Json:
        """Return accuracy, precision, recall, F1 and share of yes of each category, in %, and the mean F1."""
        rows = read_records(self.questions, "question_id", "image", "text", "category")
        questions = unique(((row["question_id"], row) for row in rows), self.questions)
        answers = read_answers(self.answers)
        check_complete(answers, questions, self.answers)
        unknown = {row["category"] for row in rows}.difference(CATEGORIES)
        if unknown:
            raise ValueError(f"{self.questions}: unknown categories {sorted(unknown)}; there are {list(CATEGORIES)}")
        categories = {}
        for category, file in zip(CATEGORIES, self.files()["labels"], strict=True):
            # Line i of the labels belongs to question i of the category: the two files' ids differ. LLaVA's script
            # takes answer i for it, up to the end of the shorter file, without a look at what either is about.
            asked = [row for row in rows if row["category"] == category]
            labels = read_records(file, "image", "text", "label")
            if len(asked) != len(labels):
                raise ValueError(
                    f"{file} has {len(labels)} labels, {self.questions} has {len(asked)} questions for them"
                )
            truth = []
            for number, (row, label) in enumerate(zip(asked, labels, strict=True), 1):
                if row["image"] != label["image"] or not row["text"].startswith(label["text"]):
                    raise ValueError(f"{file}, line {number} is not about question {row['question_id']!r}: {label}")
                if label["label"] not in ("yes", "no"):
                    raise ValueError(f"{file}, line {number}: expected the label yes or no, got {label['label']!r}")
                truth.append(label["label"] == "yes")
            said = [says_yes(answers[row["question_id"]]) for row in asked]
            hits = sum(a and b for a, b in zip(truth, said, strict=True))
            categories[category] = {
                "n": len(truth),
                "accuracy": percent(sum(a == b for a, b in zip(truth, said, strict=True)), len(truth)),
                "precision": percent(hits, sum(said)),
                "recall": percent(hits, sum(truth)),
                "f1": percent(2 * hits, sum(said) + sum(truth)),
                "yes": percent(sum(said), len(said)),
            }
        return {"f1": sum(part["f1"] for part in categories.values()) / len(categories), "categories": categories}

    def table(self, result: Json) -> str:
        """Return the result as text."""
        rows = [[category, *part.values()] for category, part in result["categories"].items()]
        rows.append(["mean", None, None, None, None, result["f1"], None])
        return tabulate(rows, ["POPE", "n", "accuracy", "precision", "recall", "F1", "yes"], floatfmt=".1f")


def yes_or_no(text: str) -> str:
    """Read an answer to MME: yes if that is within its first four characters, else no if that is, else other."""
    # That is MME's rule. "Not" is no, but so are "Know" and "None"; "The answer is no" is other, which is always wrong.
    start = text.strip().lower()[:4]
    return next((word for word in ("yes", "no") if word in start), "other")


def bare(question: str) -> str:
    """Return a question of MME without its ending; the blanks before it differ between files."""
    for ending in ENDINGS:
        question = question.replace(ending, "")
    return " ".join(question.split())


@dataclass(frozen=True)
class Mme:
    """MME: two questions per image in fourteen sub-tasks. The published numbers are sums over ten and over four."""

    name: ClassVar[str] = "mme"
    answers: Path
    """Answer file."""
    ground_truth: Path
    """Folder with a text file per sub-task, of lines with image, question and Yes or No: eval_tool's Your_Results."""
    json: Path | None = None
    """Write a result file here."""

    def files(self) -> dict[str, list[Path]]:
        """Return what is read, option by option."""
        truth = [self.ground_truth / f"{subtask}.txt" for subtask in PERCEPTION + COGNITION]
        return {"answers": [self.answers], "ground_truth": truth}

    def truth(self) -> Iterator[tuple[tuple[str, str, str], str]]:
        """Yield ((sub-task, image, question), yes or no)."""
        for file in self.files()["ground_truth"]:
            for where, line in read_lines(file):
                image, question, answer = [*line.split("\t"), "", ""][:3]
                if line.count("\t") != 2 or answer not in ("Yes", "No"):
                    raise ValueError(
                        f"{where}: expected image, question and Yes or No, with tabs between, got {line!r}"
                    )
                yield (file.stem, image, bare(question)), answer.lower()

    def score(self) -> Json:
        """Return perception, cognition, and each sub-task's accuracy over questions and over images, in %."""
        truth = unique(self.truth(), self.ground_truth)
        rows = read_records(self.answers, "question_id", "prompt", "text")
        # An id is SUBTASK/IMAGE or SUBTASK/images/IMAGE, and stands for both questions of the image.
        paths = [row["question_id"].split("/") for row in rows]
        keys = [(path[0], path[-1], bare(row["prompt"])) for path, row in zip(paths, rows, strict=True)]
        answers = unique(zip(keys, (row["text"] for row in rows), strict=True), self.answers)
        missing = {key[0] for key in truth}.difference(key[0] for key in answers)
        if missing:
            raise ValueError(f"{self.answers} has no answer for the sub-tasks {sorted(missing)}")
        check_complete(answers, truth, self.answers)
        # MME's tool takes lines 2i and 2i + 1 of a sub-task's answers for those of an image, whatever they are about.
        right: dict[str, dict[str, list[bool]]] = {subtask: defaultdict(list) for subtask in PERCEPTION + COGNITION}
        for (subtask, image, question), answer in truth.items():
            right[subtask][image].append(yes_or_no(answers[subtask, image, question]) == answer)
        subtasks = {}
        for subtask, images in right.items():
            odd = [image for image, pair in images.items() if len(pair) != 2]
            if odd:
                raise ValueError(f"{self.ground_truth}, {subtask}: expected two questions per image, not so {odd[0]!r}")
            accuracy = percent(sum(map(sum, images.values())), 2 * len(images))
            plus = percent(sum(map(all, images.values())), len(images))
            said = [yes_or_no(text) for key, text in answers.items() if key[0] == subtask]
            subtasks[subtask] = {
                "images": len(images),
                "accuracy": accuracy,
                "accuracy_plus": plus,
                "score": accuracy + plus,
                "other": said.count("other"),
            }
        sums = {"perception": PERCEPTION, "cognition": COGNITION}
        return {
            **{name: sum(subtasks[subtask]["score"] for subtask in names) for name, names in sums.items()},
            "subtasks": subtasks,
        }

    def table(self, result: Json) -> str:
        """Return the result as text."""
        rows = [[subtask, *part.values()] for subtask, part in result["subtasks"].items()]
        rows += [[name, None, None, None, result[name], None] for name in ("perception", "cognition")]
        return tabulate(rows, ["MME", "images", "accuracy", "accuracy+", "score", "neither yes nor no"], floatfmt=".1f")


def option(text: str) -> int | None:
    """Read an answer to ScienceQA: which option its letter names, or None where it has none."""
    # That is LLaVA's rule. "B" and "B. because ..." are B, but "B." is none. The dot of "The answer is B." may be any
    # character, so "The answer is Because" is B, too; without one, or with these words twice, there is no option.
    short = re.fullmatch(rf"([{LETTERS}])(\. .*)?", text, re.DOTALL)
    long = re.findall(r"The answer is ([A-Z]).", text)
    letter = short[1] if short else long[0] if len(long) == 1 else None
    return None if letter is None else ord(letter) - ord("A")


@dataclass(frozen=True)
class ScienceQA:
    """ScienceQA: multiple choice, scored over all questions, and over those with an image (published as SQA-I)."""

    name: ClassVar[str] = "scienceqa"
    answers: Path
    """Answer file."""
    questions: Path
    """ScienceQA's problems.json."""
    splits: Path
    """ScienceQA's pid_splits.json."""
    split: str = "test"
    """Which of the splits was asked."""
    json: Path | None = None
    """Write a result file here."""

    def files(self) -> dict[str, list[Path]]:
        """Return what is read, option by option."""
        return {"answers": [self.answers], "questions": [self.questions], "splits": [self.splits]}

    def score(self) -> Json:
        """Return the accuracy over all questions, and over those with an image, in %."""
        problems, splits = read_object(self.questions), read_object(self.splits)
        if self.split not in splits:
            raise ValueError(f"{self.splits} has no split {self.split!r}; there are {sorted(splits)}")
        asked = unique(((str(key), None) for key in splits[self.split]), self.splits)
        answers = read_answers(self.answers)
        # LLaVA's script counts a question without an answer as answered wrongly.
        check_complete(answers, asked, self.answers)
        right: dict[str, list[bool]] = {"all": [], "image": []}
        unread = 0
        for key in asked:
            problem = problems.get(key)
            if not isinstance(problem, dict) or not {"choices", "answer", "image"} <= problem.keys():
                raise ValueError(f"{self.questions}: question {key!r} is missing, or lacks choices, answer or image")
            choices, answer = problem["choices"], problem["answer"]
            if answer not in range(len(choices)):
                raise ValueError(
                    f"{self.questions}: question {key!r} has {len(choices)} choices, but answer {answer!r}"
                )
            chosen = option(answers[key])
            unread += chosen not in range(len(choices))
            right["all"].append(chosen == answer)
            if problem["image"]:
                right["image"].append(chosen == answer)
        parts = {
            name: {"n": len(part), "accuracy": percent(sum(part), len(part)) if part else None}
            for name, part in right.items()
        }
        return {**parts, "unread": unread}

    def table(self, result: Json) -> str:
        """Return the result as text."""
        rows = [[name, *result[name].values()] for name in ("all", "image")]
        rows.append(["no option named", result["unread"], None])
        return tabulate(rows, ["ScienceQA", "n", "accuracy"], floatfmt=".1f")


Options = Pope | Mme | ScienceQA


def run_of(options: Options) -> tuple[Json, str]:
    """Return what was scored, with the files' digests, and the command that repeats it; of paths both keep the name."""
    given = {field.name: getattr(options, field.name) for field in dataclasses.fields(options) if field.name != "json"}
    words = ["python", "-m", "experiments.llava.score", options.name]
    for name, value in given.items():
        words += ["--" + name.replace("_", "-"), value.name if isinstance(value, Path) else value]
    settings = {name: value for name, value in given.items() if not isinstance(value, Path)}
    digests = {name: {file.name: file_digest(file) for file in files} for name, files in options.files().items()}
    return {"benchmark": options.name, **settings, "sha256": digests}, shlex.join(words)


def main(options: Options) -> Json:
    """Score, print the table, write the result file if one is asked for, and return the result."""
    start = time.perf_counter()
    result = options.score()
    seconds = round(time.perf_counter() - start, 2)
    print(options.table(result))
    if options.json is not None:
        run, command = run_of(options)
        environment = environment()
        content = {"run": run, "command": command, "environment": environment, "result": result, "seconds": seconds}
        write_json(options.json, content)
    return result


if __name__ == "__main__":
    import tyro

    benchmarks: dict[str, Callable[..., Options]] = {one.name: one for one in (Pope, Mme, ScienceQA)}
    main(tyro.extras.subcommand_cli_from_dict(benchmarks, description=__doc__))
