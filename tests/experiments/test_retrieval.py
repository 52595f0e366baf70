"""Retrieval: data, recalls, and the program end to end on a tiny CLIP, in one process and in two."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.fsdp
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.nn import functional as F

pytest.importorskip("accelerate")
pytest.importorskip("open_clip")

import crossget
from crossget.core.training import parameter_groups
from experiments.lib.data import BadData, read_image
from experiments.lib.files import unpack
from experiments.retrieval import data, evaluate, models, run
from experiments.retrieval.presets import FIRST, PARTS, PRESETS, SETTINGS
from experiments.retrieval.task import RetrievalTask

ROOT = Path(__file__).parents[2]
WORDS = ["a", "red", "dog", "runs", "cat", "over", "green", "grass", "ball", "child"]


def caption(seed: int) -> str:
    chance = np.random.default_rng(seed)
    return " ".join(chance.choice(WORDS, 4))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of 16 training and 6 validation photographs in Karpathy's layout, COCO's variant."""
    path = tmp_path_factory.mktemp("karpathy")
    entries = []
    for i in range(22):
        split = "val" if i >= 16 else ("train", "restval")[i % 2]
        part = "val2014" if i % 2 else "train2014"
        (path / part).mkdir(exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 256, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path / part / f"{i}.jpg")
        sentences = [{"raw": caption(10 * i + j)} for j in range(2 + i % 2)]
        entries.append({"filepath": part, "filename": f"{i}.jpg", "split": split, "sentences": sentences})
    (path / "dataset.json").write_text(json.dumps({"images": entries, "dataset": "tiny"}))
    return path


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny transformers CLIP as `from_pretrained` reads it, and its weights as a state dict."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("clip")
    words = {word: i for i, word in enumerate(["<unk>", *WORDS, "<sos>", "<eos>"])}
    tokenizer = Tokenizer(models.WordLevel(words, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [("<sos>", words["<sos>"]), ("<eos>", words["<eos>"])]
    tokenizer.post_processor = processors.TemplateProcessing("<sos> $A <eos>", special_tokens=ends)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<unk>", eos_token="<eos>").save_pretrained(path)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": len(words), "max_position_embeddings": 8, "eos_token_id": words["<eos>"]}
    config = CLIPConfig(text_config=text, vision_config={**sizes, "image_size": 32, "patch_size": 8}, projection_dim=16)
    torch.manual_seed(0)
    model = CLIPModel(config)
    model.save_pretrained(path)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(path)
    torch.save(model.state_dict(), path / "dense.pt")
    return path


def options(folder: Path, clip_folder: Path, out: Path, **changes: Any) -> run.Options:
    given: dict[str, Any] = {
        "presets": FIRST, "r": (4,), "seeds": (0,), "batch": 4, "epochs": 2, "model": f"hf:{clip_folder}", **changes,
    }  # fmt: skip
    return run.Options(
        "flickr8k", folder / "dataset.json", folder, clip_folder / "dense.pt", work=out / "work",
        results=out / "results", **given,
    )  # fmt: skip


def result(out: Path, name: str) -> Any:
    return json.loads((out / "results" / "flickr8k" / f"{name}.json").read_text())


# Data ---------------------------------------------------------------------------------------------------------------


def test_karpathys_layout(folder: Path) -> None:
    train = data.read_karpathy(folder / "dataset.json", folder, "train")
    val = data.read_karpathy(folder / "dataset.json", folder, "val")
    assert [len(train), len(val)] == [16, 6]
    assert train[3].file == folder / "val2014" / "3.jpg"
    assert train[3].captions == tuple(caption(30 + j) for j in range(3))
    assert data.fingerprint(train)["photos"] == 16
    assert data.fingerprint(train) != data.fingerprint(train[::-1])


def edited(folder: Path, tmp_path: Path, **changes: Any) -> Path:
    content = json.loads((folder / "dataset.json").read_text())
    content["images"][2].update(changes)
    (tmp_path / "edited.json").write_text(json.dumps(content))
    return tmp_path / "edited.json"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"filename": "gone.jpg"}, r"gone\.jpg is named in .*edited\.json and is not there"),
        ({"sentences": [{"raw": "a dog"}, {"raw": "  "}]}, r"2\.jpg has an empty caption in .*edited\.json"),
        ({"sentences": []}, r"2\.jpg has an empty caption"),
    ],
)
def test_a_bad_photograph_is_named_and_left_out_only_if_asked(
    folder: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    file = edited(folder, tmp_path, **change)
    with pytest.raises(BadData, match=message):
        data.read_karpathy(file, folder, "train")
    assert len(data.read_karpathy(file, folder, "train", skip_bad=True)) == 15


def test_a_file_that_is_no_caption_file_is_named(folder: Path, tmp_path: Path) -> None:
    for text in ('["dog"]', "{", '{"pictures": []}'):
        (tmp_path / "other.json").write_text(text)
        with pytest.raises(ValueError, match=r"other\.json .*Karpathy's layout"):
            data.read_karpathy(tmp_path / "other.json", folder, "train")
    (tmp_path / "other.json").write_text('{"images": [{"filename": "1.jpg", "split": "train"}]}')
    with pytest.raises(ValueError, match=r"other\.json: image 0 has no \['sentences'\]"):
        data.read_karpathy(tmp_path / "other.json", folder, "train")
    with pytest.raises(ValueError, match=r"no photograph of the split 'test'.* splits \['restval', 'train', 'val'\]"):
        data.read_karpathy(folder / "dataset.json", folder, "test")


def test_a_truncated_photograph_is_named(tmp_path: Path) -> None:
    file = tmp_path / "half.jpg"
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file)
    file.write_bytes(file.read_bytes()[:900])
    with pytest.raises(BadData, match=r"half\.jpg: the image cannot be read"):
        read_image(file, lambda image: torch.zeros(1))


def test_pairs_are_every_caption_or_one_of_each_photograph(folder: Path) -> None:
    photos = data.read_karpathy(folder / "dataset.json", folder, "train")
    transform = models.load_clip("small").transform(train=True)
    every = data.Pairs(photos, transform, "all", 0)
    assert len(every) == sum(len(photo.captions) for photo in photos)
    assert [every[0, i][1] for i in range(5)] == [*photos[0].captions, *photos[1].captions]
    one = data.Pairs(photos, transform, "one", 0)
    assert len(one) == 16
    assert {one[epoch, 1][1] for epoch in range(20)} == set(photos[1].captions)
    for pairs in (every, one):
        same, other = pairs[3, 5], pairs[4, 5]
        torch.testing.assert_close(pairs[3, 5][0], same[0], rtol=0, atol=0)
        assert not torch.equal(same[0], other[0])
        assert same[2] == other[2]
    state = torch.random.get_rng_state()
    one[0, 0]
    assert torch.equal(torch.random.get_rng_state(), state)


# Losses and recalls --------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(which=st.lists(st.integers(0, 3), min_size=1, max_size=6), seed=st.integers(0, 100))
def test_every_pair_of_a_photograph_is_right(which: list[int], seed: int) -> None:
    chance = torch.Generator().manual_seed(seed)
    size = len(which)
    image, text = (F.normalize(torch.randn(size, 8, generator=chance, dtype=torch.float64), dim=-1) for _ in range(2))
    expected = 0.0
    for a, b in ((image, text), (text, image)):
        for i in range(size):
            logits = torch.stack([7.0 * (a[i] * b[j]).sum() for j in range(size)]).log_softmax(0)
            right = [j for j in range(size) if which[j] == which[i]]
            expected -= float(sum(logits[j] for j in right)) / len(right) / size / 2
    found = models.contrastive_loss(image, text, torch.tensor(7.0, dtype=torch.float64), torch.tensor(which))
    assert float(found) == pytest.approx(expected)


@settings(max_examples=50, deadline=None)
@given(counts=st.lists(st.integers(1, 3), min_size=1, max_size=5), seed=st.integers(0, 100), ties=st.booleans())
def test_places_are_those_of_a_sorted_list(counts: list[int], seed: int, ties: bool) -> None:
    chance = torch.Generator().manual_seed(seed)
    owner = torch.tensor([i for i, count in enumerate(counts) for _ in range(count)])
    images, texts = torch.randn(len(counts), 4, generator=chance), torch.randn(len(owner), 4, generator=chance)
    if ties:
        images, texts = images.sign(), texts.sign()
    to_text, to_image = evaluate.ranks(images, texts, owner)
    similarity = (images.double() @ texts.double().T).tolist()
    for i, row in enumerate(similarity):
        # Of what is equally near, the wrong ones come first.
        order = sorted(range(len(row)), key=lambda j: (-row[j], int(owner[j]) == i))
        assert to_text[i] == next(place for place, j in enumerate(order) if int(owner[j]) == i)
    for j, own in enumerate(owner.tolist()):
        order = sorted(range(len(counts)), key=lambda i: (-similarity[i][j], i == own))
        assert to_image[j] == order.index(own)


def test_recalls_in_percent() -> None:
    assert evaluate.recalls(np.array([0, 3, 5, 50])) == {"r@1": 25.0, "r@5": 50.0, "r@10": 75.0}


# Models --------------------------------------------------------------------------------------------------------------


def test_the_small_model_takes_a_tower_of_timm_and_its_own_weights(tmp_path: Path) -> None:
    import timm
    from safetensors.torch import save_file

    torch.manual_seed(1)
    tower = timm.create_model("vit_tiny_patch16_224")
    save_file({name: value.half() for name, value in tower.state_dict().items()}, tmp_path / "tower.safetensors")
    clip = models.load_clip("small", tmp_path / "tower.safetensors")
    block = clip.model.visual.trunk.blocks[3].mlp.fc1.weight
    torch.testing.assert_close(block.detach(), tower.blocks[3].mlp.fc1.weight.detach().half().float())
    assert clip.model.visual.trunk.pos_embed.shape[1] == 50
    run.save_weights(clip, tmp_path / "whole.safetensors")
    torch.manual_seed(2)
    again = models.load_clip("small", tmp_path / "whole.safetensors")
    pixels, ids = torch.randn(1, 3, 112, 112), clip.tokenize(["a dog"])
    assert ids.shape == (1, 24)
    for one in (clip, again):
        one.model.eval()
    torch.testing.assert_close(again.encode_image(pixels), clip.encode_image(pixels), rtol=0, atol=0)
    torch.testing.assert_close(again.encode_text(ids), clip.encode_text(ids), rtol=0, atol=0)


@pytest.mark.parametrize("name", PRESETS)
def test_every_row_trains_what_it_says(name: str, clip_folder: Path) -> None:
    preset = PRESETS[name]
    clip = models.load_clip(f"hf:{clip_folder}", clip_folder / "dense.pt")
    reducers = preset.make(3, 2)
    attached = None if reducers is None else crossget.attach(clip.model, reducers)
    if attached is not None:
        attached.register_parameters(clip.model)
    task = RetrievalTask(clip, attached, weight=preset.weight, divergence=preset.divergence).train()
    assert task._no_split_modules == ["CLIPEncoderLayer"], "what FSDP2 shards one by one"
    groups = parameter_groups(clip.model, attached, train=preset.train or "all")
    chance = torch.Generator().manual_seed(0)
    batch = torch.randn(4, 3, 32, 32, generator=chance), clip.tokenize([caption(i) for i in range(4)])
    losses = task(*batch, torch.arange(4))
    losses["loss"].backward()
    cross = {} if attached is None else attached.cross_tokens
    assert set(cross) == ({"visual", "text"} if "alignment" in losses else set())
    assert ("alignment" in losses) == (name not in {"dense", "control", "tome", "tome_untrained", "no_cross_token"})
    for tower, parameter in cross.items():
        assert parameter.grad is not None, "every parameter takes part: DDP insists"
        if preset.weight or tower == "visual":
            assert float(parameter.grad.abs().sum()) > 0
    weight = clip.model.vision_model.encoder.layers[0].mlp.fc1.weight
    assert (weight.grad is None) == (preset.train == "cross_tokens")
    assert set(groups) <= {"cross_tokens", "weights"}
    if attached is not None and preset.swept:
        assert attached.tokens["visual"][-1] < attached.tokens["visual"][0] or name == "text"


def test_the_settings_of_the_reference() -> None:
    for name in ("flickr30k", "coco"):
        recipe = SETTINGS[name].recipe
        assert (recipe.epochs, recipe.batch, recipe.lr, recipe.weight_decay) == (12, 512, 1e-5, 0.05)
        assert SETTINGS[name].captions == "all"
        assert SETTINGS[name].r == {16: 6}
    made = PRESETS["both"].make(16, 6)
    assert made == {"visual": crossget.CrossGET(16), "text": crossget.CrossGET(6)}
    assert PRESETS["text"].make(16, 6) == {"visual": crossget.CrossGET(0), "text": crossget.CrossGET(6)}


# The program ---------------------------------------------------------------------------------------------------------


def test_the_queue_runs_every_row_at_the_first_strength_first(folder: Path, clip_folder: Path, tmp_path: Path) -> None:
    runs = run.grid(options(folder, clip_folder, tmp_path, r=(4, 2), seeds=(0, 1)))
    assert [one.slug.split("/")[1] for one in runs] == [
        "dense", "control_seed0", "tome_r4_seed0", "crossget_r4_seed0", "control_seed1", "tome_r4_seed1",
        "crossget_r4_seed1", "tome_r2_seed0", "crossget_r2_seed0", "tome_r2_seed1", "crossget_r2_seed1",
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"unknown presets \['tomee'\]"):
        run.grid(options(folder, clip_folder, tmp_path, presets=("tomee",)))
    with pytest.raises(ValueError, match=r"r \[7\]: flickr8k has \[2, 3, 4\]"):
        run.grid(options(folder, clip_folder, tmp_path, r=(7,)))


def test_end_to_end(folder: Path, clip_folder: Path, tmp_path: Path) -> None:
    wanted = options(folder, clip_folder, tmp_path)
    assert run.STUDY.run(wanted) == 4
    assert run.STUDY.run(wanted) == 0
    dense, control, made = (result(tmp_path, name) for name in ("dense", "control_seed0", "crossget_r4_seed0"))
    assert "history" not in dense["result"]
    assert len(made["result"]["history"]) == 2
    assert made["result"]["history"][0]["loss"] != control["result"]["history"][0]["loss"]
    assert made["result"]["tokens"]["visual"] == [18, 14]
    assert (
        made["result"]["gflops"]["reduced"] < made["result"]["gflops"]["dense"] == dense["result"]["gflops"]["reduced"]
    )
    assert made["result"]["parameters"]["cross_tokens"] == 2 * 2 * 32
    assert control["result"]["parameters"]["model"] == made["result"]["parameters"]["model"]
    places = unpack(made["result"]["places"]["text_to_image"])
    assert made["result"]["text_to_image"]["r@1"] == pytest.approx(100 * float((places < 1).mean()))
    assert made["run"]["data"]["train"]["photos"] == 16
    assert "--presets crossget --r 4 --seeds 0" in made["command"]
    assert str(tmp_path) not in json.dumps(made)
    saved = crossget.load(models.load_clip(f"hf:{clip_folder}").model, tmp_path / "work/flickr8k/crossget_r4_seed0")
    assert float(saved.cross_tokens["visual"].detach().abs().sum()) > 0


def test_a_stopped_run_goes_on(
    folder: Path, clip_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings_ = {"presets": ("crossget",), "save_every": 1}
    run.STUDY.run(options(folder, clip_folder, tmp_path / "whole", **settings_))
    forward, calls = RetrievalTask.forward, []

    def dies(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(0)
        if len(calls) == 6:  # in the second epoch
            raise KeyboardInterrupt
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(RetrievalTask, "forward", dies)
    with pytest.raises(KeyboardInterrupt):
        run.STUDY.run(options(folder, clip_folder, tmp_path / "stopped", **settings_))
    monkeypatch.undo()
    assert run.STUDY.run(options(folder, clip_folder, tmp_path / "stopped", **settings_)) == 1
    whole, stopped = (result(tmp_path / name, "crossget_r4_seed0")["result"] for name in ("whole", "stopped"))
    assert stopped["history"] == whole["history"]
    assert stopped["places"] == whole["places"]
    weights = [
        models.load_clip(f"hf:{clip_folder}", tmp_path / name / "work/flickr8k/crossget_r4_seed0/model.safetensors")
        for name in ("whole", "stopped")
    ]
    for one, other in zip(*(clip.model.parameters() for clip in weights), strict=True):
        assert torch.equal(one, other)


# Accelerate shards on GPUs only; where it would on this launch, this has it do so on CPUs.
ON_CPUS = """
import accelerate.state as state
from experiments.retrieval import run
import torch
import tyro

usual = state.AcceleratorState.__init__

def sharding(self, *args, **given):
    usual(self, *args, **given)
    if given.get("fsdp_plugin") is not None:
        self.fsdp_plugin = given["fsdp_plugin"]
        self.distributed_type = state.PartialState._shared_state["distributed_type"] = state.DistributedType.FSDP

state.AcceleratorState.__init__ = sharding
run.STUDY.run(tyro.cli(run.Options))
assert state.AcceleratorState().distributed_type == state.DistributedType.FSDP
assert not torch.distributed.is_initialized()
"""


def launched(arguments: list[str], processes: int, config: str, folder: Path) -> None:
    file = str(ROOT / "experiments/configs" / config)
    launcher = ["-m", "accelerate.commands.launch", "--config_file", file, "--num_processes", str(processes)]
    launcher += ["--main_process_port", "0"]  # any: others may train beside this
    program = ["-m", "experiments.run", "retrieval"]
    if config == "fsdp2.yaml":
        (folder / "program.py").write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{ON_CPUS}")
        program = [str(folder / "program.py")]
    words = [sys.executable, *launcher, *program, *arguments]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
        "TOKENIZERS_PARALLELISM": "false",
    }
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-4000:]


FSDP2 = hasattr(torch.distributed.fsdp, "fully_shard")  # public from torch 2.6 on


@pytest.mark.slow  # tests/core/test_sharding.py has two processes in the default run
@pytest.mark.parametrize("config", ["ddp.yaml", *["fsdp2.yaml"] * FSDP2])
def test_two_processes_are_one_with_the_same_batch(
    folder: Path, clip_folder: Path, tmp_path: Path, config: str
) -> None:
    wanted = options(folder, clip_folder, tmp_path / "one", presets=("dense", "control", "crossget"), gather=True)
    run.STUDY.run(wanted)
    arguments = [
        "--setting", "flickr8k", "--annotations", str(wanted.annotations), "--images", str(wanted.images), "--weights",
        str(wanted.weights), "--presets", "dense", "control", "crossget", "--r", "4", "--seeds", "0", "--batch", "4",
        "--epochs", "2", "--model", str(wanted.model), "--gather", "--work", str(tmp_path / "two/work"), "--results",
        str(tmp_path / "two/results"),
    ]  # fmt: skip
    launched(arguments, 2, config, tmp_path)
    for row in ("control_seed0", "crossget_r4_seed0"):
        one, two = (result(tmp_path / name, row)["result"] for name in ("one", "two"))
        assert (one["processes"], two["processes"]) == (1, 2)
        for ours, theirs in zip(one["history"], two["history"], strict=True):
            assert theirs == pytest.approx(ours, rel=1e-4)
    assert (
        result(tmp_path / "two", "dense")["result"]["places"] == result(tmp_path / "one", "dense")["result"]["places"]
    )
    clips = [models.load_clip(f"hf:{clip_folder}").model for _ in range(2)]
    cross = [
        crossget.load(clip, tmp_path / name / "work/flickr8k/crossget_r4_seed0").cross_tokens
        for clip, name in zip(clips, ("one", "two"), strict=True)
    ]
    for tower in ("visual", "text"):
        assert float(cross[0][tower].detach().abs().min(0).values.max()) > 0
        torch.testing.assert_close(cross[1][tower], cross[0][tower], rtol=1e-2, atol=2e-6)
    (tmp_path / "two/results/flickr8k/crossget_r4_seed0.json").unlink()
    launched(arguments, 2, config, tmp_path)  # from its last checkpoint: nothing is left to be trained
    again = result(tmp_path / "two", "crossget_r4_seed0")["result"]
    assert (again["history"], again["places"]) == (two["history"], two["places"])


def test_the_parts_are_rows() -> None:
    assert set(PARTS) | set(FIRST) <= set(PRESETS)
    recipe = replace(options(Path(), Path(), Path()), batch=None, epochs=None).applied(SETTINGS["flickr8k"].recipe, 3)
    assert recipe == replace(SETTINGS["flickr8k"].recipe, seed=3)
