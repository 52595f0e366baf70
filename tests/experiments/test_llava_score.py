"""The scorer of POPE's answer files, on small files whose scores are computed by hand."""

import json
from pathlib import Path
from typing import Any

import pytest

from experiments.lib.files import file_digest
from experiments.llava import score

FOLDER = Path(score.__file__).parent
ENDING = "\nAnswer the question using a single word or phrase."

# Per category (label, answer): what is said to a question, in the order of the labels.
POPE = {
    "random": [("yes", "Yes"), ("yes", "No"), ("no", "Yes"), ("no", "No, it is not.")],
    "popular": [("yes", "Yes"), ("yes", "Yes, there is."), ("yes", "no"), ("no", "No"), ("no", "There is not.")],
    "adversarial": [("yes", "No"), ("no", "No"), ("no", "No")],
}


def write(file: Path, *records: object) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


@pytest.fixture
def pope(tmp_path: Path) -> score.Options:
    """Questions of all categories mixed, answers in another order than questions, ids that no label has."""
    questions, answers = [], []
    for category, pairs in POPE.items():
        labels = []
        for i, (label, text) in enumerate(pairs):
            number, image, question = 1000 * len(category) + i, f"{i // 2}.jpg", f"Is there a thing {i} in the image?"
            labels.append({"question_id": i + 1, "image": image, "text": question, "label": label})
            row = {"question_id": number, "image": image, "text": question + ENDING, "category": category}
            questions.append((i, row))
            answers.append({"question_id": number, "prompt": question + ENDING, "text": text})
        write(tmp_path / f"labels/coco_pope_{category}.json", *labels)
    write(tmp_path / "questions.jsonl", *(row for _, row in sorted(questions, key=lambda pair: pair[0])))
    write(tmp_path / "answers.jsonl", *reversed(answers))
    return score.Options(tmp_path / "answers.jsonl", tmp_path / "questions.jsonl", tmp_path / "labels")


def test_each_category_is_counted_by_itself(pope: score.Options) -> None:
    result = score.score(pope)
    assert result["f1"] == pytest.approx(130 / 3)
    expected = {
        "random": {"n": 4, "accuracy": 50, "precision": 50, "recall": 50, "f1": 50, "yes": 50},
        "popular": {"n": 5, "accuracy": 80, "precision": 100, "recall": 200 / 3, "f1": 80, "yes": 40},
        "adversarial": {"n": 3, "accuracy": 200 / 3, "precision": 0, "recall": 0, "f1": 0, "yes": 0},
    }
    assert result["categories"] == {name: pytest.approx(part) for name, part in expected.items()}


@pytest.mark.parametrize(
    ("text", "yes"),
    [
        *[(text, False) for text in ("No", "no", "No, there is one.", "There is not a dog.", "There is, no, a dog")],
        *[(text, True) for text in ("Yes", "Yes. No.", "Nothing", "Not at all", "NO", "No!", "")],
    ],
)
def test_an_answer_is_read_by_the_published_rule(text: str, yes: bool) -> None:
    assert score.says_yes(text) is yes


def change(file: Path, old: str, new: str) -> None:
    text = file.read_text(encoding="utf-8")
    assert old in text
    file.write_text(text.replace(old, new), encoding="utf-8")


def test_an_answer_may_hold_any_character(pope: score.Options) -> None:
    change(pope.answers, '"Yes"', '"Yes\u2028\x85\u00e9"')
    assert score.score(pope)["f1"] == pytest.approx(130 / 3)


@pytest.mark.parametrize(
    ("file", "old", "new", "expected"),
    [
        ("answers.jsonl", '"text": "Yes"', '"said": "Yes"', r"answers.jsonl, line \d+: .*'text'"),
        ("answers.jsonl", '"question_id": 6000', '"question_id": 6001', "'6001' is there twice"),
        ("answers.jsonl", '"question_id": 6000', '"question_id": 7', "1 answers.*unknown.*'7'"),
        ("questions.jsonl", '"popular"', '"random"', "has 4 labels, .* has 9 questions"),
        ("labels/coco_pope_popular.json", "thing 1", "other 1", "line 2 is not about question '7001'"),
        ("labels/coco_pope_random.json", '"no"', '"No"', "line 3.*yes or no.*'No'"),
    ],
)
def test_what_does_not_belong_together_is_refused(
    pope: score.Options, file: str, old: str, new: str, expected: str
) -> None:
    change(pope.answers.parent / file, old, new)
    with pytest.raises(ValueError, match=expected):
        score.score(pope)


def test_a_question_without_an_answer_is_refused(pope: score.Options) -> None:
    pope.answers.write_text(pope.answers.read_text(encoding="utf-8").partition("\n")[2], encoding="utf-8")
    with pytest.raises(ValueError, match="1 questions without.*'11002'"):
        score.score(pope)


def test_the_program_prints_a_table_and_writes_a_result_file(
    pope: score.Options, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out" / "pope.json"
    score.main(score.Options(pope.answers, pope.questions, pope.labels, out))
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    assert rows[3] == ["popular", "5", "80.0", "100.0", "66.7", "80.0", "40.0"]
    assert rows[5] == ["mean", "", "", "", "", "43.3", ""]
    text = out.read_text(encoding="utf-8")
    assert str(tmp_path) not in text
    content: dict[str, Any] = json.loads(text)
    assert list(content) == ["run", "command", "environment", "result", "seconds"]
    assert content["run"]["sha256"]["answers"] == {"answers.jsonl": file_digest(pope.answers)}
    assert content["command"].endswith("--answers answers.jsonl --questions questions.jsonl --labels labels")
    assert content["result"] == score.score(pope)


def test_the_readme_has_the_numbers_of_the_result_files() -> None:
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    results = {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in (FOLDER / "results").glob("*.json")}
    pope = results["llava-1.5-13b_recorded_pope"]["result"]
    f1 = [pope["categories"][category]["f1"] for category in score.CATEGORIES]
    assert " / ".join(f"{value:.1f}" for value in f1) + f", mean {pope['f1']:.1f}" in readme
    mme = results["llava-1.5-13b_recorded_mme"]["result"]
    assert f"perception {mme['perception']:.1f}, cognition {mme['cognition']:.1f}" in readme
