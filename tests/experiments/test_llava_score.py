"""The scorers of LLaVA's answer files, on small files whose scores are worked out by hand."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from experiments.lib.files import ROOT, file_digest
from experiments.llava import score

FOLDER = Path(score.__file__).parent
ENDING = "\nAnswer the question using a single word or phrase."

# Per category (label, answer): what is said to a question, in the order of the labels.
POPE = {
    "random": [("yes", "Yes"), ("yes", "No"), ("no", "Yes"), ("no", "No, it is not.")],
    "popular": [("yes", "Yes"), ("yes", "Yes, there is."), ("yes", "no"), ("no", "No"), ("no", "There is not.")],
    "adversarial": [("yes", "No"), ("no", "No"), ("no", "No")],
}
# Sub-task -> (image, question) whose answer is wrong, and what it is; all other answers are right.
MME = {
    "existence": {("b.jpg", 1): "Yes, it is"},
    "count": {("a.jpg", 0): "No", ("b.jpg", 0): "No"},
    "code_reasoning": {("a.jpg", 0): "Maybe", ("a.jpg", 1): "Yes", ("b.jpg", 0): "no", ("b.jpg", 1): "yes"},
}
# Id -> number of choices, right choice, has an image, answer.
SCIENCEQA = {
    "1": (2, 0, False, "A"),
    "2": (3, 2, True, "C. because it is"),
    "3": (2, 1, True, "The answer is A."),
    "4": (2, 1, False, "C"),
    "5": (4, 3, True, "So the answer is clear. The answer is D."),
}


def write(file: Path, *records: object) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


@pytest.fixture
def pope(tmp_path: Path) -> score.Pope:
    """Questions of all categories mixed, answers in another order than questions, ids that no label has."""
    questions, answers = [], []
    for category, pairs in POPE.items():
        labels = []
        for i, (label, text) in enumerate(pairs):
            number, image, question = 1000 * len(category) + i, f"{i // 2}.jpg", f"Is there a thing {i} in the image?"
            labels.append({"question_id": i + 1, "image": image, "text": question, "label": label})
            questions.append(
                (i, {"question_id": number, "image": image, "text": question + ENDING, "category": category})
            )
            answers.append({"question_id": number, "prompt": question + ENDING, "text": text})
        write(tmp_path / f"labels/coco_pope_{category}.json", *labels)
    write(tmp_path / "questions.jsonl", *(row for _, row in sorted(questions, key=lambda pair: pair[0])))
    write(tmp_path / "answers.jsonl", *reversed(answers))
    return score.Pope(tmp_path / "answers.jsonl", tmp_path / "questions.jsonl", tmp_path / "labels")


@pytest.fixture
def mme(tmp_path: Path) -> score.Mme:
    """Two images per sub-task; answers come as a/0, b/0, a/1, b/1, so that neighbours are about different images."""
    answers = []
    for subtask in score.PERCEPTION + score.COGNITION:
        lines = []
        for image in ("a.jpg", "b.jpg"):
            # Some of MME's questions have two blanks before their ending.
            lines.append(f"{image}\tIs it so? Please answer yes or no.\tYes\n")
            lines.append(f"{image}\tIs it not so?  Please answer yes or no.\tNo\n")
        (tmp_path / "truth").mkdir(exist_ok=True)
        (tmp_path / f"truth/{subtask}.txt").write_text("".join(lines), encoding="utf-8")
        folder = f"{subtask}/images" if subtask in ("artwork", "celebrity") else subtask
        for i, question in enumerate(["Is it so?", "Is it not so?"]):
            for image in ("a.jpg", "b.jpg"):
                text = MME.get(subtask, {}).get((image, i), ["Yes", "No"][i])
                answers.append({"question_id": f"{folder}/{image}", "prompt": question + ENDING, "text": text})
    write(tmp_path / "answers.jsonl", *answers)
    return score.Mme(tmp_path / "answers.jsonl", tmp_path / "truth")


@pytest.fixture
def scienceqa(tmp_path: Path) -> score.ScienceQA:
    problems = {
        key: {"question": "?", "choices": ["x"] * n, "answer": right, "image": "image.png" if image else None}
        for key, (n, right, image, _) in SCIENCEQA.items()
    }
    problems["6"] = {**problems["1"], "image": "image.png"}
    (tmp_path / "problems.json").write_text(json.dumps(problems), encoding="utf-8")
    (tmp_path / "splits.json").write_text(json.dumps({"test": list(SCIENCEQA), "train": ["6"]}), encoding="utf-8")
    write(tmp_path / "answers.jsonl", *({"question_id": key, "text": row[3]} for key, row in SCIENCEQA.items()))
    return score.ScienceQA(tmp_path / "answers.jsonl", tmp_path / "problems.json", tmp_path / "splits.json")


def close(result: Any) -> Any:
    """The numbers of a dictionary as pytest compares them."""
    return {name: close(part) if isinstance(part, dict) else pytest.approx(part) for name, part in result.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Scores


def test_pope_counts_each_category_by_itself(pope):
    assert pope.score() == close(
        {
            "f1": 130 / 3,
            "categories": {
                "random": {"n": 4, "accuracy": 50, "precision": 50, "recall": 50, "f1": 50, "yes": 50},
                "popular": {"n": 5, "accuracy": 80, "precision": 100, "recall": 200 / 3, "f1": 80, "yes": 40},
                "adversarial": {"n": 3, "accuracy": 200 / 3, "precision": 0, "recall": 0, "f1": 0, "yes": 0},
            },
        }
    )


def test_mme_counts_questions_and_images(mme):
    result = mme.score()
    right = {"images": 2, "accuracy": 100, "accuracy_plus": 100, "score": 200, "other": 0}
    expected = dict.fromkeys(score.PERCEPTION + score.COGNITION, right)
    expected["existence"] = {"images": 2, "accuracy": 75, "accuracy_plus": 50, "score": 125, "other": 0}
    # By lines instead of images one of the pairs were right.
    expected["count"] = {"images": 2, "accuracy": 50, "accuracy_plus": 0, "score": 50, "other": 0}
    expected["code_reasoning"] = {"images": 2, "accuracy": 0, "accuracy_plus": 0, "score": 0, "other": 1}
    assert result == close({"perception": 8 * 200 + 125 + 50, "cognition": 3 * 200, "subtasks": expected})


def test_scienceqa_counts_all_questions_and_those_with_an_image(scienceqa):
    expected = {"all": {"n": 5, "accuracy": 60}, "image": {"n": 3, "accuracy": 200 / 3}, "unread": 1}
    assert scienceqa.score() == close(expected)


def test_scienceqa_without_images_has_no_score_for_them(scienceqa):
    change(scienceqa.questions, "image.png", "")
    assert scienceqa.score()["image"] == {"n": 0, "accuracy": None}


@pytest.mark.parametrize("name", ["pope", "mme", "scienceqa"])
def test_the_order_of_answers_does_not_matter(name, request):
    options = request.getfixturevalue(name)
    before = options.score()
    lines = options.answers.read_text(encoding="utf-8").splitlines(keepends=True)
    options.answers.write_text("".join(reversed(lines)), encoding="utf-8")
    assert options.score() == before


# ---------------------------------------------------------------------------------------------------------------------
# How an answer is read


@pytest.mark.parametrize(
    ("text", "yes"),
    [
        ("Yes", True),
        ("No", False),
        ("no", False),
        ("No, there is one.", False),
        ("There is not a dog.", False),
        ("There is, no, a dog", False),
        ("Yes. No.", True),
        ("No. Yes.", False),
        ("Nothing", True),
        ("Not at all", True),
        ("NO", True),
        ("No!", True),
        ("", True),
    ],
)
def test_an_answer_to_pope(text, yes):
    assert score.says_yes(text) is yes


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("Yes", "yes"),
        ("YES.", "yes"),
        ("yes, no", "yes"),
        ("No", "no"),
        ("no.", "no"),
        ("Not", "no"),
        ("None", "no"),
        ("Know", "no"),
        (" \nYes", "yes"),
        ("A yes", "other"),
        ("a no", "no"),
        ("The answer is no", "other"),
        ("Church", "other"),
        ("Y", "other"),
        ("", "other"),
    ],
)
def test_an_answer_to_mme(text, word):
    assert score.yes_or_no(text) == word


@pytest.mark.parametrize(
    ("text", "index"),
    [
        ("A", 0),
        ("E", 4),
        ("B. because", 1),
        ("B. two\nlines", 1),
        ("The answer is C.", 2),
        ("I think so. The answer is D. Really.", 3),
        ("The answer is Because", 1),
        ("The answer is G.", 6),
        ("The answer is C", None),
        ("The answer is A. The answer is B.", None),
        ("the answer is C.", None),
        ("B.", None),
        ("b", None),
        ("F", None),
        ("A or B", None),
        (" A", None),
        ("", None),
    ],
)
def test_an_answer_to_scienceqa(text, index):
    assert score.option(text) == index


@pytest.mark.parametrize(
    "question",
    [
        "Is it so? Please answer yes or no.",
        "Is it so?  Please answer yes or no.",
        "Is it so?\nAnswer the question using a single word or phrase.",
        "Is it  so?",
    ],
)
def test_a_question_of_mme_is_known_by_its_words(question):
    assert score.bare(question) == "Is it so?"


def test_an_answer_may_hold_any_character(pope):
    change(pope.answers, '"Yes"', '"Yes\u2028\x85\u00e9"')
    assert "\u2028" in pope.answers.read_text(encoding="utf-8")
    assert pope.score()["f1"] == pytest.approx(130 / 3)


# ---------------------------------------------------------------------------------------------------------------------
# Errors


def change(file: Path, old: str, new: str) -> None:
    text = file.read_text(encoding="utf-8")
    assert old in text
    file.write_text(text.replace(old, new), encoding="utf-8")


def drop(file: Path, line: int) -> None:
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    del lines[line - 1]
    file.write_text("".join(lines), encoding="utf-8")


def double(file: Path, line: int) -> None:
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    file.write_text("".join([*lines, lines[line - 1]]), encoding="utf-8")


def add(file: Path, record: object) -> None:
    with file.open("a", encoding="utf-8") as out:
        out.write(json.dumps(record) + "\n")


def message(options: score.Options, tmp_path: Path) -> str:
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        options.score()
    return str(caught.value).replace(f"{tmp_path}/", "")


Breakage = Callable[[Path], object]


@pytest.mark.parametrize(
    ("breakage", "expected"),
    [
        (lambda at: (at / "answers.jsonl").unlink(), "there is no file answers.jsonl"),
        (lambda at: (at / "questions.jsonl").unlink(), "there is no file questions.jsonl"),
        (
            lambda at: (at / "labels/coco_pope_popular.json").unlink(),
            "there is no file labels/coco_pope_popular.json",
        ),
        (lambda at: shutil.rmtree(at / "labels"), "there is no file labels/coco_pope_random.json"),
        (lambda at: (at / "answers.jsonl").write_text(""), "answers.jsonl, line 1: this is not JSON: ''"),
        (
            lambda at: (at / "answers.jsonl").write_text('{"question_id": 1, "text": "No"}\n{"question_id"\n'),
            "answers.jsonl, line 2: this is not JSON: '{\"question_id\"'",
        ),
        (
            lambda at: (at / "answers.jsonl").write_text('{"question_id": 1, "text": "No"}\n\n'),
            "answers.jsonl, line 2: this is not JSON: ''",
        ),
        (
            lambda at: write(at / "answers.jsonl", {"question_id": 1, "text": "No"}, ["No"]),
            "answers.jsonl, line 2: expected an object with the texts ['question_id', 'text'], "
            "['question_id', 'text'] are none: '[\"No\"]'",
        ),
        (
            lambda at: write(at / "answers.jsonl", {"question_id": 1, "text": None}),
            "answers.jsonl, line 1: expected an object with the texts ['question_id', 'text'], "
            "['text'] are none: '{\"question_id\": 1, \"text\": null}'",
        ),
        (
            lambda at: write(at / "answers.jsonl", {"question_id": True, "text": "No"}),
            "answers.jsonl, line 1: expected an object with the texts ['question_id', 'text'], "
            '[\'question_id\'] are none: \'{"question_id": true, "text": "No"}\'',
        ),
        (lambda at: double(at / "answers.jsonl", 1), "answers.jsonl: '11002' is there twice"),
        (lambda at: double(at / "questions.jsonl", 1), "questions.jsonl: '6000' is there twice"),
        (
            lambda at: add(at / "answers.jsonl", {"question_id": 7, "text": "No"}),
            "answers.jsonl: 1 of 13 answers are to unknown questions: '7', ...",
        ),
        (
            lambda at: drop(at / "answers.jsonl", 3),
            "answers.jsonl: 1 of 12 questions have no answer: '11000', ...",
        ),
        (
            lambda at: change(at / "questions.jsonl", '"popular"', '"unpopular"'),
            "questions.jsonl: unknown categories ['unpopular']; there are ['random', 'popular', 'adversarial']",
        ),
        (
            lambda at: change(at / "questions.jsonl", '"popular"', '"random"'),
            "labels/coco_pope_random.json has 4 labels, questions.jsonl has 9 questions for them",
        ),
        (
            lambda at: drop(at / "labels/coco_pope_popular.json", 5),
            "labels/coco_pope_popular.json has 4 labels, questions.jsonl has 5 questions for them",
        ),
        (
            lambda at: change(at / "labels/coco_pope_popular.json", "thing 1", "other 1"),
            "labels/coco_pope_popular.json, line 2 is not about question '7001': {'image': '0.jpg', "
            "'text': 'Is there a other 1 in the image?', 'label': 'yes'}",
        ),
        (
            lambda at: change(at / "labels/coco_pope_popular.json", "2.jpg", "3.jpg"),
            "labels/coco_pope_popular.json, line 5 is not about question '7004': {'image': '3.jpg', "
            "'text': 'Is there a thing 4 in the image?', 'label': 'no'}",
        ),
        (
            lambda at: change(at / "labels/coco_pope_random.json", '"no"', '"No"'),
            "labels/coco_pope_random.json, line 3: expected the label yes or no, got 'No'",
        ),
    ],
)
def test_pope_says_what_is_wrong(pope, tmp_path, breakage: Breakage, expected):
    breakage(tmp_path)
    assert message(pope, tmp_path) == expected


@pytest.mark.parametrize(
    ("breakage", "expected"),
    [
        (lambda at: (at / "answers.jsonl").unlink(), "there is no file answers.jsonl"),
        (lambda at: (at / "truth/OCR.txt").unlink(), "there is no file truth/OCR.txt"),
        (
            lambda at: write(at / "answers.jsonl", {"question_id": "count/a.jpg", "text": "No"}),
            "answers.jsonl, line 1: expected an object with the texts ['question_id', 'prompt', 'text'], "
            '[\'prompt\'] are none: \'{"question_id": "count/a.jpg", "text": "No"}\'',
        ),
        (
            lambda at: change(at / "truth/color.txt", "\tNo", " No"),
            "truth/color.txt, line 2: expected image, question and Yes or No, with tabs between, "
            "got 'a.jpg\\tIs it not so?  Please answer yes or no. No'",
        ),
        (
            lambda at: change(at / "truth/color.txt", "\tNo", "\tMaybe"),
            "truth/color.txt, line 2: expected image, question and Yes or No, with tabs between, "
            "got 'a.jpg\\tIs it not so?  Please answer yes or no.\\tMaybe'",
        ),
        (
            lambda at: change(at / "truth/color.txt", "\tNo", "\tNo\tNo"),
            "truth/color.txt, line 2: expected image, question and Yes or No, with tabs between, "
            "got 'a.jpg\\tIs it not so?  Please answer yes or no.\\tNo\\tNo'",
        ),
        (lambda at: double(at / "truth/scene.txt", 1), "truth: ('scene', 'a.jpg', 'Is it so?') is there twice"),
        (
            lambda at: double(at / "answers.jsonl", 1),
            "answers.jsonl: ('existence', 'a.jpg', 'Is it so?') is there twice",
        ),
        (
            lambda at: [drop(at / "answers.jsonl", 5) for _ in range(4)],
            "answers.jsonl has no answer for the sub-tasks ['count']",
        ),
        (
            lambda at: drop(at / "answers.jsonl", 6),
            "answers.jsonl: 1 of 56 questions have no answer: ('count', 'b.jpg', 'Is it so?'), ...",
        ),
        (
            lambda at: add(at / "answers.jsonl", {"question_id": "count/a.jpg", "prompt": "Why?", "text": "No"}),
            "answers.jsonl: 1 of 57 answers are to unknown questions: ('count', 'a.jpg', 'Why?'), ...",
        ),
        (
            lambda at: add(at / "answers.jsonl", {"question_id": "taste", "prompt": "Is it so?", "text": "No"}),
            "answers.jsonl: 1 of 57 answers are to unknown questions: ('taste', 'taste', 'Is it so?'), ...",
        ),
        (
            lambda at: (drop(at / "truth/count.txt", 1), drop(at / "answers.jsonl", 5)),
            "truth, count: expected two questions per image, not so 'a.jpg'",
        ),
    ],
)
def test_mme_says_what_is_wrong(mme, tmp_path, breakage: Breakage, expected):
    breakage(tmp_path)
    assert message(mme, tmp_path) == expected


@pytest.mark.parametrize(
    ("breakage", "expected"),
    [
        (lambda at: (at / "answers.jsonl").unlink(), "there is no file answers.jsonl"),
        (lambda at: (at / "problems.json").unlink(), "there is no file problems.json"),
        (lambda at: (at / "splits.json").unlink(), "there is no file splits.json"),
        (
            lambda at: (at / "problems.json").write_text("{"),
            "problems.json is not JSON: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)",
        ),
        (lambda at: (at / "splits.json").write_text("[]"), "splits.json: expected a JSON object, got a list"),
        (
            lambda at: change(at / "splits.json", '"test"', '"minitest"'),
            "splits.json has no split 'test'; there are ['minitest', 'train']",
        ),
        (lambda at: change(at / "splits.json", '"2"', '"1"'), "splits.json: '1' is there twice"),
        (lambda at: double(at / "answers.jsonl", 5), "answers.jsonl: '5' is there twice"),
        (lambda at: drop(at / "answers.jsonl", 5), "answers.jsonl: 1 of 5 questions have no answer: '5', ..."),
        (
            lambda at: add(at / "answers.jsonl", {"question_id": "6", "text": "A"}),
            "answers.jsonl: 1 of 6 answers are to unknown questions: '6', ...",
        ),
        (
            lambda at: change(at / "problems.json", '"3": {', '"33": {'),
            "problems.json: question '3' is missing, or lacks choices, answer or image",
        ),
        (
            lambda at: change(at / "problems.json", '"choices"', '"options"'),
            "problems.json: question '1' is missing, or lacks choices, answer or image",
        ),
        (
            lambda at: change(at / "problems.json", '"answer": 2', '"answer": 3'),
            "problems.json: question '2' has 3 choices, but answer 3",
        ),
        (
            lambda at: change(at / "problems.json", '"answer": 2', '"answer": "C"'),
            "problems.json: question '2' has 3 choices, but answer 'C'",
        ),
    ],
)
def test_scienceqa_says_what_is_wrong(scienceqa, tmp_path, breakage: Breakage, expected):
    breakage(tmp_path)
    assert message(scienceqa, tmp_path) == expected


# ---------------------------------------------------------------------------------------------------------------------
# The program


def program(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "experiments.llava.score", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_the_program_prints_a_table_and_writes_what_it_came_from(pope, tmp_path):
    out = tmp_path / "out" / "pope.json"
    files = ["--answers", pope.answers, "--questions", pope.questions, "--labels", pope.labels]
    done = program("pope", *files, "--json", out)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert lines[0] == ["POPE", "n", "accuracy", "precision", "recall", "F1", "yes"]
    assert lines[2:] == [
        ["random", "4", "50.0", "50.0", "50.0", "50.0", "50.0"],
        ["popular", "5", "80.0", "100.0", "66.7", "80.0", "40.0"],
        ["adversarial", "3", "66.7", "0.0", "0.0", "0.0", "0.0"],
        ["mean", "43.3"],
    ]
    text = out.read_text(encoding="utf-8")
    assert str(tmp_path) not in text
    content = json.loads(text)
    assert list(content) == ["run", "command", "environment", "result", "seconds"]
    assert content["run"] == {
        "benchmark": "pope",
        "sha256": {
            "answers": {"answers.jsonl": file_digest(pope.answers)},
            "questions": {"questions.jsonl": file_digest(pope.questions)},
            "labels": {
                f"coco_pope_{category}.json": file_digest(pope.labels / f"coco_pope_{category}.json")
                for category in ("random", "popular", "adversarial")
            },
        },
    }
    assert content["command"] == (
        "python -m experiments.llava.score pope --answers answers.jsonl --questions questions.jsonl --labels labels"
    )
    assert {"commit", "dirty", "source_sha256", "python"} <= set(content["environment"])
    assert content["result"] == pope.score()


def test_the_program_scores_mme(mme):
    done = program("mme", "--answers", mme.answers, "--ground-truth", mme.ground_truth)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert len(lines) == 2 + 14 + 2
    assert lines[2] == ["existence", "2", "75.0", "50.0", "125.0", "0"]
    assert lines[-2:] == [["perception", "1775.0"], ["cognition", "600.0"]]


def test_the_program_scores_a_split_of_scienceqa(scienceqa):
    write(scienceqa.answers, {"question_id": "6", "text": "B"})
    files = ["--answers", scienceqa.answers, "--questions", scienceqa.questions, "--splits", scienceqa.splits]
    done = program("scienceqa", *files, "--split", "train")
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert lines[2:] == [["all", "1", "0.0"], ["image", "1", "0.0"], ["no", "option", "named", "0"]]
    wrong = program("scienceqa", *files)
    assert wrong.returncode != 0
    assert "answers are to unknown questions: '6'" in wrong.stderr


def test_result_files_of_every_benchmark_name_their_inputs(mme, tmp_path):
    out = tmp_path / "mme.json"
    score.main(score.Mme(mme.answers, mme.ground_truth, out))
    content = json.loads(out.read_text(encoding="utf-8"))
    assert list(content["run"]["sha256"]["ground_truth"]) == [
        f"{name}.txt" for name in score.PERCEPTION + score.COGNITION
    ]
    assert content["command"] == ("python -m experiments.llava.score mme --answers answers.jsonl --ground-truth truth")
    assert content["result"] == mme.score()


def test_scienceqa_keeps_the_split(scienceqa):
    run, command = score.run_of(scienceqa)
    assert run["split"] == "test"
    assert list(run["sha256"]) == ["answers", "questions", "splits"]
    assert command.endswith("--answers answers.jsonl --questions problems.json --splits splits.json --split test")


# ---------------------------------------------------------------------------------------------------------------------
# The committed results


def test_the_readme_has_the_numbers_of_the_result_files():
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    results = {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in (FOLDER / "results").glob("*.json")}
    assert sorted(results) == ["llava-1.5-13b_recorded_mme", "llava-1.5-13b_recorded_pope"]
    pope = results["llava-1.5-13b_recorded_pope"]["result"]
    f1 = [pope["categories"][category]["f1"] for category in score.CATEGORIES]
    assert " / ".join(f"{value:.1f}" for value in f1) + f", mean {pope['f1']:.1f}" in readme
    mme = results["llava-1.5-13b_recorded_mme"]["result"]
    assert f"perception {mme['perception']:.1f}, cognition {mme['cognition']:.1f}" in readme
    for name, content in results.items():
        assert f"results/{name}.json" in readme
        assert content["run"]["benchmark"] in name
