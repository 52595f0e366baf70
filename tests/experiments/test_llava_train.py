"""Instruction tuning of a small LLaVA: data, losses, several processes, resuming, and the recorded gradients."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from llava_tuning import write_data, write_model
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoProcessor, CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import crossget

pytest.importorskip("accelerate")

import test_authors_llava as reference
import tyro
from accelerate.state import AcceleratorState

from experiments.lib.data import BadData
from experiments.lib.files import ROOT
from experiments.llava import make_mix67k, train
from experiments.llava.conversation import Encoder
from experiments.llava.data import Collator, Conversations, GroupedSampler, read_samples, square

reference_folder = reference.folder

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*(torch.load|pin_memory|weights_only).*"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:nothing is learnt"),
]


@pytest.fixture(autouse=True)
def own_state(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Accelerate keeps its settings per process."""
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a model and data."""
    folder = tmp_path_factory.mktemp("llava")
    write_model(folder / "model")
    write_data(folder / "data")
    return folder


def options(home: Path, out: Path, **changes: Any) -> train.Options:
    small: dict[str, Any] = {
        "model": str(home / "model"), "data": home / "data/mix.json", "images": home / "data", "out": out, "r": 2,
        "batch": 4, "precision": "no", "workers": 0, "limit": 200, "lr": 1e-3, "alignment": 100.0, "save_steps": 2,
        "loggers": (),
    }  # fmt: skip
    return dataclasses.replace(train.PRESETS["7b"][1], **{**small, **changes})


def weights(folder: Path) -> dict[str, Tensor]:
    return {**load_file(folder / "model.safetensors"), **load_file(folder / "crossget.safetensors")}


def data_of(home: Path, file: Path | None = None, **changes: Any) -> Conversations:
    processor = AutoProcessor.from_pretrained(home / "model")
    image = processor.tokenizer.convert_tokens_to_ids("<image>")
    given: dict[str, Any] = {
        "samples": read_samples(file or home / "data/mix.json"), "images": home / "data",
        "encoder": Encoder(processor.tokenizer, image, 200), "image_processor": processor.image_processor,
        "placeholders": 16, "features": 10,
    }  # fmt: skip
    return Conversations(**{**given, **changes})


# The recorded gradients ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("forwards", [1, 2])
def test_gradients_are_those_of_the_reference(
    reference_folder: Path, tmp_path: Path, forwards: int, checkpointing: bool
) -> None:
    """Through the trainer's own step; in two forwards, each has a row of the batch."""
    golden = reference.LLAVA
    model = reference.build()
    attached = crossget.load_reference(model, reference_folder, crossget.CrossGET(golden["r"]))
    attached.register_parameters(model)
    objective = train.Objective(model, attached)
    wanted = dataclasses.replace(
        train.PRESETS["7b"][1], model="", data=tmp_path, images=tmp_path, out=tmp_path, precision="no", batch=1,
        accumulate=forwards, checkpointing=checkpointing, loggers=(),
    )  # fmt: skip
    trainer = train.InstructionTrainer(golden["alignment_weight"], model=model, args=train.arguments(wanted, 100))
    batch = {**reference.inputs(), "labels": reference.expanded(golden["labels"], -100)}
    rows = golden["batch"] // forwards
    parts = [{key: value[i * rows : (i + 1) * rows] for key, value in batch.items()} for i in range(forwards)]
    if checkpointing:
        name = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
        enable = getattr(model, f"{name}_checkpointing_enable")
        enable(**{f"{name}_checkpointing_kwargs": {"use_reentrant": False}})
    _, totals = trainer.get_batch_samples(iter(parts), forwards, *[torch.device("cpu")] * _newer(trainer))
    losses = [float(trainer.training_step(model, part, totals)) for part in parts]
    assert sum(losses) == pytest.approx(golden["train_loss"], rel=2e-6)
    reference.assert_gradient(attached.cross_tokens["visual"].grad, "grad.cross_image")
    reference.assert_gradient(attached.cross_tokens["text"].grad, "grad.cross_text")
    objective.remove()


def _newer(trainer: Any) -> int:
    """Whether the trainer wants to know the device."""
    import inspect

    from transformers import Trainer

    return int("device" in inspect.signature(Trainer.get_batch_samples).parameters)


def test_the_presets_are_the_references() -> None:
    small, large = (train.PRESETS[size][1] for size in ("7b", "13b"))
    assert small == dataclasses.replace(large, model="llava-hf/llava-1.5-7b-hf", alignment=0.001)
    assert large.alignment == 0.1
    assert (small.r, small.batch, small.lr, small.weight_decay, small.warmup, small.epochs, small.limit) == (
        13, 16, 2e-5, 0.0, 0.03, 1.0, 2048
    )  # fmt: skip
    words = ["13b", "--data", "a.json", "--images", "b", "--out", "c", "--skip-bad"]
    parsed = tyro.extras.overridable_config_cli(train.PRESETS, args=words)
    assert parsed == dataclasses.replace(large, data=Path("a.json"), images=Path("b"), out=Path("c"), skip_bad=True)


def test_tokens_of_an_image() -> None:
    """LLaVA-1.5's sizes."""
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=24, num_attention_heads=1, image_size=336, patch_size=14
    )
    text = LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1, vocab_size=20)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=19)
    attached = train.prepare(LlavaForConditionalGeneration(config), 13)
    assert attached.image_tokens == (576, 278)


# Training -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole_run(home: Path) -> train.InstructionTrainer:
    """In one process, with two forwards per step."""
    return train.main(options(home, home / "whole", batch=2, accumulate=2, epochs=2.0, loggers=("tensorboard",)))


def history(folder: Path) -> list[dict[str, float]]:
    """What was logged, up to the last checkpoint."""
    last = max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    found = json.loads((last / "trainer_state.json").read_text())["log_history"]
    return [{name: entry[name] for name in ("loss", "language_loss", "alignment_loss")} for entry in found]


def launched(options: train.Options, processes: int) -> None:
    names = (
        "model", "data", "images", "out", "r", "batch", "precision", "workers", "limit", "lr", "alignment", "epochs",
        "save_steps",
    )  # fmt: skip
    words = [word for name in names for word in (f"--{name.replace('_', '-')}", str(getattr(options, name)))]
    launcher = ["-m", "accelerate.commands.launch", "--config_file", str(ROOT / "experiments/configs/ddp.yaml")]
    launcher += ["--num_processes", str(processes), "--main_process_port", "0"]
    command = [sys.executable, *launcher, "-m", "experiments.llava.train", "7b", *words, "--loggers", "none"]
    # With --cpu, accelerate starts one process whatever it is told; the processes themselves have to know.
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
        "TOKENIZERS_PARALLELISM": "false",
    }
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.slow
def test_two_processes_are_one_with_the_same_batch(
    home: Path, whole_run: train.InstructionTrainer, tmp_path: Path
) -> None:
    """Also two forwards of one process are. With cross tokens that have learnt."""
    launched(options(home, tmp_path / "two", batch=2, epochs=2.0), 2)
    train.main(options(home, tmp_path / "one", batch=4, epochs=2.0))
    one, two, parts = (history(folder) for folder in (tmp_path / "one", tmp_path / "two", home / "whole"))
    assert len(one) == len(two) == len(parts) == 8
    for entries in zip(one, two, parts, strict=True):
        assert entries[1] == pytest.approx(entries[0], rel=1e-4)
        assert entries[2] == pytest.approx(entries[0], rel=1e-4)
    expected = weights(tmp_path / "one")
    assert all(float(expected[tower].abs().min(0).values.max()) > 1e-4 for tower in ("visual", "text"))
    for folder in (tmp_path / "two", home / "whole"):
        for name, value in weights(folder).items():
            torch.testing.assert_close(value, expected[name], rtol=0, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_a_stopped_run_goes_on_as_if_it_had_not_been(
    home: Path, whole_run: train.InstructionTrainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stops in the middle of an epoch, in the second forward of the fourth step."""
    wanted = options(home, tmp_path / "out", batch=2, accumulate=2, epochs=2.0)
    compute, calls = train.InstructionTrainer.compute_loss, []

    def dies(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(0)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return compute(self, *args, **kwargs)

    monkeypatch.setattr(train.InstructionTrainer, "compute_loss", dies)
    with pytest.raises(KeyboardInterrupt):
        train.main(wanted)
    monkeypatch.undo()
    assert [path.name for path in wanted.out.glob("checkpoint-*")] == ["checkpoint-2"]
    assert not (wanted.out / "crossget.safetensors").exists()
    train.main(wanted)
    assert history(wanted.out) == history(home / "whole")
    expected = weights(home / "whole")
    for name, value in weights(wanted.out).items():
        assert torch.equal(value, expected[name]), name


def test_a_checkpoint_that_was_being_written_is_ignored(tmp_path: Path) -> None:
    assert train.last_checkpoint(tmp_path) is None
    for name in ("checkpoint-8", "checkpoint-10", "checkpoint-12", "checkpoint-best"):
        (tmp_path / name).mkdir()
        if name != "checkpoint-12":
            (tmp_path / name / "trainer_state.json").write_text("{}")
    assert train.last_checkpoint(tmp_path) == tmp_path / "checkpoint-10"


def test_what_is_trained(home: Path, whole_run: train.InstructionTrainer) -> None:
    before, after = load_file(home / "model/model.safetensors"), load_file(home / "whole/model.safetensors")
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert torch.equal(value, after[name]) == ("vision_tower" in name), name


def test_what_is_left(home: Path, whole_run: train.InstructionTrainer) -> None:
    """A model for transformers, which crossget attaches to, and a processor."""
    processor = AutoProcessor.from_pretrained(home / "whole")
    model: Any = LlavaForConditionalGeneration.from_pretrained(home / "whole")
    attached = crossget.load(model, home / "whole")
    assert attached.reducers["visual"].r == 2
    trained = whole_run.accelerator.unwrap_model(whole_run.model_wrapped).crossget
    for tower, value in attached.cross_tokens.items():
        assert torch.equal(value, getattr(trained, tower))
    image = Image.new("RGB", (32, 32))
    inputs = processor(text="USER: <image>\nWhat is it? ASSISTANT:", images=image, return_tensors="pt")
    assert model.generate(**inputs, max_new_tokens=3).shape[1] > inputs["input_ids"].shape[1]


def test_tensorboard_reads_the_logs(home: Path, whole_run: train.InstructionTrainer) -> None:
    loading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    (folder,) = (home / "whole/runs").iterdir()
    events = loading.EventAccumulator(str(folder)).Reload()
    names = ("train/loss", "train/language_loss", "train/alignment_loss")
    total, language, alignment = ([event.value for event in events.Scalars(name)] for name in names)
    assert len(total) == 8
    assert total == pytest.approx([a + 100 * b for a, b in zip(language, alignment, strict=True)], rel=1e-3)


def test_half_precision(home: Path, tmp_path: Path) -> None:
    plain = train.main(options(home, tmp_path / "plain", max_steps=2)).state.log_history
    AcceleratorState._reset_state(True)
    half = train.main(options(home, tmp_path / "half", max_steps=2, precision="bf16")).state.log_history
    for i in range(2):
        assert half[i]["language_loss"] == pytest.approx(plain[i]["language_loss"], rel=1e-2)
        assert half[i]["language_loss"] != plain[i]["language_loss"]


def test_too_few_samples(home: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="18 samples in .*mix.json .*10 x 2 on 1 "):
        train.main(options(home, tmp_path, batch=10, accumulate=2))


# Data ---------------------------------------------------------------------------------------------------------------


def test_every_tenth(tmp_path: Path) -> None:
    source, out = tmp_path / "665k.json", tmp_path / "67k.json"
    source.write_text(json.dumps([{"id": i} for i in range(25)]))
    make_mix67k.main(make_mix67k.Options(source, out))
    assert [sample["id"] for sample in json.loads(out.read_text())] == [0, 10, 20]


def test_images_are_filled_up_to_squares() -> None:
    image = Image.fromarray(np.arange(3 * 7 * 3, dtype=np.uint8).reshape(3, 7, 3))
    for given_, axis in ((image, 0), (image.transpose(Image.Transpose.TRANSPOSE), 1)):
        found = np.asarray(square(given_, (1, 2, 3)))
        assert found.shape == (7, 7, 3)
        inside = np.take(found, range(2, 5), axis)
        assert np.array_equal(inside, np.asarray(given_))
        outside = np.take(found, [0, 1, 5, 6], axis)
        assert np.array_equal(outside, np.broadcast_to([1, 2, 3], outside.shape))


def test_a_sample_with_an_image(home: Path) -> None:
    data = data_of(home)
    sample, ids = data[1], data.encoder(data.samples[1]["conversations"], True).ids
    place = ids.index(data.encoder.image)
    assert sample["input_ids"].tolist() == ids[:place] + 16 * [data.encoder.image] + ids[place + 1 :]
    assert (sample["labels"][place : place + 16] == -100).all()
    learnt = sample["labels"] != -100
    assert torch.equal(sample["labels"][learnt], sample["input_ids"][learnt])
    assert sample["pixel_values"].shape == (3, 32, 32)
    # The mean colour that it was filled up with is zero, but for rounding.
    assert float(sample["pixel_values"][:, 0].abs().max()) < 0.02


def test_images_of_samples_without_one_change_nothing_but_the_alignment(home: Path) -> None:
    data = data_of(home)
    model: Any = LlavaForConditionalGeneration.from_pretrained(home / "model")
    attached = train.prepare(model, 2)
    objective = train.Objective(model, attached)
    batch = Collator(0)([data[i] for i in range(12, 16)])
    assert float(batch["pixel_values"].abs().max()) == 0
    out = model(**batch)
    other = model(**{**batch, "pixel_values": torch.randn_like(batch["pixel_values"])})
    assert torch.equal(out["language"], other["language"])
    assert not torch.equal(out["alignment"], other["alignment"])
    (gradient,) = torch.autograd.grad(out["language"], [attached.cross_tokens["visual"]])
    assert float(gradient.abs().max()) == 0
    objective.remove()
    # As if there were no image at all.
    expected = torch.tensor(0.0)
    for sample in data.samples[12:16]:
        ids, labels = (torch.tensor([values]) for values in data.encoder(sample["conversations"], False))
        with torch.no_grad():
            expected += model(input_ids=ids, labels=labels).loss * (labels[:, 1:] != -100).sum()
    torch.testing.assert_close(out["language"].detach(), expected)


@pytest.mark.parametrize("index", [1, 13])
def test_the_limit_counts_what_reaches_the_language_model(home: Path, index: int) -> None:
    """Of an image, 10 of its 16 tokens do."""
    whole = data_of(home)
    ids = whole.encoder(whole.samples[index]["conversations"], index == 1).ids
    limit = (len(ids) - 1 + 10 if index == 1 else len(ids)) - 3
    cut = data_of(home, encoder=dataclasses.replace(whole.encoder, limit=limit))[index]
    assert len(cut["input_ids"]) == len(cut["labels"]) == len(whole[index]["input_ids"]) - 3
    assert torch.equal(cut["input_ids"][: limit - 10], whole[index]["input_ids"][: limit - 10])


def test_batches_are_filled_up_on_the_right() -> None:
    rows = [
        {"input_ids": torch.arange(1, n), "labels": torch.arange(1, n), "pixel_values": torch.ones(1)} for n in (3, 5)
    ]
    batch = Collator(9)(rows)
    assert batch["input_ids"].tolist() == [[1, 2, 9, 9], [1, 2, 3, 4]]
    assert batch["labels"].tolist() == [[1, 2, -100, -100], [1, 2, 3, 4]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]


@given(
    st.lists(st.integers(1, 50), max_size=40), st.lists(st.integers(1, 50), max_size=40), st.sampled_from([1, 2, 3, 4]),
    st.sampled_from([1, 2, 3]), st.integers(0, 3),
)  # fmt: skip
@settings(max_examples=100, deadline=None)
def test_the_order_of_the_data(images: list[int], texts: list[int], batch: int, batches: int, epoch: int) -> None:
    lengths = images + [-length for length in texts]
    step = batch * batches

    def steps(batch: int, batches: int) -> list[list[int]]:
        sampler = GroupedSampler(lengths, batch, batches, seed=1)
        sampler.set_epoch(epoch)
        order = list(sampler)
        assert len(order) == len(sampler) == len(lengths) // step * step
        return [order[i : i + step] for i in range(0, len(order), step)]

    found = steps(batch, batches)
    seen = [index for indices in found for index in indices]
    assert len(set(seen)) == len(seen)
    mixed = [i for i, indices in enumerate(found) if len({lengths[index] > 0 for index in indices}) == 2]
    assert mixed in ([], [0])
    # The same steps, whoever gets what.
    assert [sorted(indices) for indices in steps(step, 1)] == [sorted(indices) for indices in found]
    if batch == 1:
        return
    for indices in found:
        sums = [sum(abs(lengths[i]) for i in indices[k : k + batch]) for k in range(0, step, batch)]
        assert max(sums) - min(sums) <= 50 * batch


def test_lengths_are_words_and_negative_without_image(home: Path) -> None:
    data = data_of(home)
    lengths = data.lengths()
    assert [length > 0 for length in lengths] == [True] * 12 + [False] * 6
    turns = data.samples[13]["conversations"]
    assert lengths[13] == -len(" ".join(turn["value"] for turn in turns).split(" "))


def test_epochs_have_orders_of_their_own() -> None:
    sampler = GroupedSampler([1] * 20, 2, 2, seed=0)
    first = list(sampler)
    sampler.set_epoch(1)
    assert sorted(sampler) == sorted(first)
    assert list(sampler) != first


# Bad data -----------------------------------------------------------------------------------------------------------


def bad(home: Path, tmp_path: Path, change: Any) -> tuple[Path, Path]:
    """The data with its sample 1 changed; returns the file and the folder of the images."""
    file = write_data(tmp_path / "bad")
    samples = json.loads(file.read_text())
    change(samples[1], tmp_path / "bad/images/1.png")
    file.write_text(json.dumps(samples))
    return file, tmp_path / "bad"


def _truncate(sample: Any, image: Path) -> None:
    image.write_bytes(image.read_bytes()[:900])


BAD = {
    "missing": (lambda sample, image: image.unlink(), r"images/1\.png: the image cannot be read \(FileNotFoundError"),
    "truncated": (_truncate, r"images/1\.png: the image cannot be read \(OSError"),
    "no image": (lambda sample, image: image.write_text("hello"), r"images/1\.png: .*UnidentifiedImageError"),
    "unmentioned": (
        lambda sample, image: sample["conversations"][0].update(value="Why?"),
        r"sample 1 with the image .*images/1\.png: expected <image> once, in one of its turns; it stands there 0 times",
    ),
    "twice": (
        lambda sample, image: sample["conversations"][2].update(value="And <image>?"),
        r"images/1\.png: expected <image> once.*2 times",
    ),
    "too late": (
        lambda sample, image: sample["conversations"][0].update(value="Why? " * 200)
        or sample["conversations"][2].update(value="And <image>?"),
        r"images/1\.png: expected <image> once.*behind the longest text",
    ),
    "roles": (lambda sample, image: sample["conversations"].pop(1), r"images/1\.png: turn 1 is from 'human'"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_bad_samples_are_named_and_skipped_if_asked(home: Path, tmp_path: Path, kind: str) -> None:
    change, message = BAD[kind]
    file, images = bad(home, tmp_path, change)
    with pytest.raises(BadData, match=f"{message}.*--skip-bad"):
        data_of(home, file, images=images)[1]
    skipping = data_of(home, file, images=images, skip_bad=True)
    with pytest.warns(UserWarning, match=f"skipped: .*{message}"):
        replaced = skipping[1]
    assert torch.equal(replaced["input_ids"], skipping[2]["input_ids"])


@pytest.mark.parametrize("sample", [
    {"id": 7}, [], {"conversations": [{"from": "human"}]}, {"conversations": [{"from": 1, "value": ""}]},
    {"conversations": [], "image": ["a", "b"]},
])  # fmt: skip
def test_what_is_no_sample(tmp_path: Path, sample: Any) -> None:
    file = tmp_path / "mix.json"
    file.write_text(json.dumps([{"id": 0, "conversations": []}, sample]))
    with pytest.raises(BadData, match=r"mix.json, sample 1: .*conversations.*--skip-bad"):
        read_samples(file)
    with pytest.warns(UserWarning, match="skipped: .*mix.json, sample 1"):
        assert len(read_samples(file, skip_bad=True)) == 1


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no file .*a.json"):
        read_samples(tmp_path / "a.json")
    (tmp_path / "b.json").write_text("[{")
    with pytest.raises(ValueError, match="b.json is not JSON"):
        read_samples(tmp_path / "b.json")
    (tmp_path / "c.json").write_text("{}")
    with pytest.raises(ValueError, match="c.json: .*list.*dict"):
        read_samples(tmp_path / "c.json")


def test_one_object_per_line(tmp_path: Path) -> None:
    file = tmp_path / "mix.jsonl"
    talk = {"conversations": [{"from": "human", "value": "a\u2028b"}]}
    file.write_text("".join(json.dumps(talk, ensure_ascii=False) + "\n" for _ in range(2)), encoding="utf-8")
    assert read_samples(file) == [talk, talk]
