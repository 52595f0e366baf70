"""Prompt learning: CoOp's data and sampler, prompts, losses, Dassl's files, and the program on a tiny CLIP."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

pytest.importorskip("accelerate")
pytest.importorskip("open_clip")

import open_clip

import crossget
from crossget.core.training import parameter_groups
from experiments.coop import datasets, prompts, report, run
from experiments.coop.datasets import SOURCES, Photo
from experiments.coop.presets import PRESETS, SETTINGS, recipe_of
from experiments.coop.prompts import PromptLearner
from experiments.coop.task import CoopTask
from experiments.lib.data import BadData, Labelled
from experiments.lib.files import file_digest, read_results
from experiments.retrieval.models import Clip, load_clip

ROOT = Path(__file__).parents[2]
NAMES = ("face", "water_lilly", "dragonfly")
TINY = {
    "embed_dim": 16,
    "vision_cfg": {"layers": 2, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 32},
    "text_cfg": {"context_length": 14, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
    "quick_gelu": True,
}


@pytest.fixture(scope="module", autouse=True)
def configs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """open_clip's models "tiny" (CLIP) and "tiny-custom" (CustomTextCLIP)."""
    from open_clip import factory

    folder = tmp_path_factory.mktemp("configs")
    (folder / "tiny.json").write_text(json.dumps(TINY))
    (folder / "tiny-custom.json").write_text(json.dumps({**TINY, "custom_text": True}))
    open_clip.add_model_config(folder)
    yield folder
    factory._MODEL_CONFIG_PATHS.remove(folder)
    factory._rescan_model_configs()


def tiny(name: str = "tiny", seed: int = 0) -> Clip:
    torch.manual_seed(seed)
    clip = load_clip(name)
    clip.model.eval()
    return clip


def attach(clip: Clip, r: int = 3, seed: int = 1) -> crossget.Attachment:
    """Attach CrossGET, with cross tokens that are not zero."""
    attached = crossget.attach(clip.model, {"visual": crossget.CrossGET(r), "text": crossget.CrossGET(0)})
    torch.manual_seed(seed)
    for parameter in attached.parameters():
        nn.init.normal_(parameter, std=0.1)
    return attached


def pixels(count: int = 4) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(0))


# Data ---------------------------------------------------------------------------------------------------------------


def image(file: Path, seed: int = 0, size: tuple[int, int] = (40, 36)) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(values).save(file)


def in_coops_layout(name: str, root: Path) -> None:
    """Two classes, with three photographs to train on, two to validate, one to test on."""
    source = SOURCES[name]
    folder, counts = root / source.folder, {"train": 3, "val": 2, "test": 1}
    files = {split: [(f"c{k}/{split}{i}.jpg", k, f"class_{k}") for k in (0, 1) for i in range(count)]
             for split, count in counts.items()}  # fmt: skip
    if name == "imagenet":
        files = {split: [(f"{split}/n{k}/{i}.JPEG", k, f"class {k}") for k in (0, 1) for i in range(3)]
                 for split in ("train", "val")}  # fmt: skip
        folder.mkdir()
        (folder / "classnames.txt").write_text("n1 class 1\nn0 class 0\nn7 class 7\n")
    elif name == "fgvc_aircraft":
        files = {split: [(f"{split}{i}{k}.jpg", k, f"class {k}") for k in (0, 1) for i in range(count)]
                 for split, count in counts.items()}  # fmt: skip
        folder.mkdir()
        (folder / "variants.txt").write_text("class 0\nclass 1\n")
        for split, some in files.items():
            lines = [f"{path.removesuffix('.jpg')} {called}" for path, _, called in some]
            (folder / f"images_variant_{split}.txt").write_text("\n".join(lines) + "\n")
    else:
        folder.mkdir()
        (folder / f"split_zhou_{source.title}.json").write_text(json.dumps(files))
    for path, _, _ in (entry for some in files.values() for entry in some):
        image(folder / source.images / path)


FOLDERS = {
    "imagenet": "imagenet/images/train/n0/0.JPEG",
    "caltech101": "caltech-101/101_ObjectCategories/c0/train0.jpg",
    "oxford_pets": "oxford_pets/images/c0/train0.jpg",
    "stanford_cars": "stanford_cars/c0/train0.jpg",
    "oxford_flowers": "oxford_flowers/jpg/c0/train0.jpg",
    "food101": "food-101/images/c0/train0.jpg",
    "fgvc_aircraft": "fgvc_aircraft/images/train00.jpg",
    "sun397": "sun397/SUN397/c0/train0.jpg",
    "dtd": "dtd/images/c0/train0.jpg",
    "eurosat": "eurosat/2750/c0/train0.jpg",
    "ucf101": "ucf101/UCF-101-midframes/c0/train0.jpg",
}


@pytest.mark.parametrize("name", SOURCES)
def test_the_eleven_sets(name: str, tmp_path: Path) -> None:
    in_coops_layout(name, tmp_path)
    data = datasets.read(name, tmp_path)
    assert data.splits["train"][0] == Photo(tmp_path / FOLDERS[name], 0)
    assert [name.replace("_", " ") for name in data.names] == ["class 0", "class 1"]
    counts = {"train": 6, "val": 6, "test": 6} if name == "imagenet" else {"train": 6, "val": 4, "test": 2}
    for split, count in counts.items():
        photos = datasets.existing(data.splits[split])
        assert [photo.label for photo in photos] == sorted([0, 1] * (count // 2))
    assert len(SOURCES) == 11
    assert data.template.format("x").count("x") == 1 + ("texture" in data.template)


def test_folders_of_images(tmp_path: Path) -> None:
    for split in ("train", "test"):
        for name in ("Faces", "water_lilly", "airplanes"):
            image(tmp_path / split / name / "b.jpg")
            image(tmp_path / split / name / "a.png")
            (tmp_path / split / name / "notes.txt").write_text("")
    data = datasets.read("caltech101", tmp_path)
    assert data.names == ("face", "airplane", "water_lilly"), "by folder, under CoOp's names"
    assert [photo.file.name for photo in data.splits["train"][:3]] == ["a.png", "b.jpg", "a.png"]
    assert "val" not in data.splits
    assert datasets.few_shot(data, 1, 0)["val"] == []
    image(tmp_path / "test" / "anchor" / "a.jpg")
    with pytest.raises(ValueError, match=r"test has classes that .*train has not: \['anchor'\]"):
        datasets.read("caltech101", tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"split_zhou_DescribableTextures\.json .*not there.*README"),
        ({"train": [["a.jpg", 0, "a"]], "val": []}, r"DescribableTextures\.json is not a split of CoOp's.*'test'"),
        ({"train": [["a.jpg", 0]], "val": [], "test": []}, "is not a split of CoOp's"),
        ({"train": [["a.jpg", 0, "a"], ["b.jpg", 0, "b"]], "val": [], "test": []}, "label 0 is 'a' and 'b'"),
        ({"train": [["a.jpg", 0, "a"], ["b.jpg", 2, "b"]], "val": [], "test": []}, "2 labels are used.* not 0 to 1"),
    ],
)
def test_a_split_that_is_none(content: Any, message: str, tmp_path: Path) -> None:
    (tmp_path / "dtd").mkdir()
    if content is not None:
        (tmp_path / "dtd" / "split_zhou_DescribableTextures.json").write_text(json.dumps(content))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        datasets.read("dtd", tmp_path)


def test_a_folder_without_the_set(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"has neither a folder 'food-101' .* nor folders 'train' and 'test'"):
        datasets.read("food101", tmp_path)
    in_coops_layout("fgvc_aircraft", tmp_path)
    (tmp_path / "fgvc_aircraft" / "images_variant_val.txt").write_text("0034309 Concorde\n")
    with pytest.raises(ValueError, match=r"images_variant_val\.txt: '0034309 Concorde'.* 2 classes"):
        datasets.read("fgvc_aircraft", tmp_path)
    in_coops_layout("imagenet", tmp_path)
    (tmp_path / "imagenet" / "classnames.txt").write_text("n0 class 0\n")
    with pytest.raises(ValueError, match=r"classnames\.txt.*\['n1'\]"):
        datasets.read("imagenet", tmp_path)


def test_a_missing_photograph_is_named_and_left_out_only_if_asked(tmp_path: Path) -> None:
    in_coops_layout("dtd", tmp_path)
    photos = datasets.read("dtd", tmp_path).splits["train"]
    photos[2].file.unlink()
    with pytest.raises(BadData, match=r"c0/train2\.jpg .*--skip-bad"):
        datasets.existing(photos)
    assert datasets.existing(photos, skip_bad=True) == [photo for i, photo in enumerate(photos) if i != 2]
    with pytest.raises(BadData, match="none of 1 photographs is there"):
        datasets.existing(photos[2:3], skip_bad=True)


def listed(counts: list[int], order: int) -> datasets.Data:
    photos = [Photo(Path(f"{label}/{i}.jpg"), label) for label, count in enumerate(counts) for i in range(count)]
    random.Random(order).shuffle(photos)
    return datasets.Data(tuple(map(str, range(len(counts)))), {"train": photos, "val": photos[::-1]}, "{}")


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("shots", [1, 2, 16])
def test_the_few_shots_are_coops(seed: int, shots: int) -> None:
    """As Dassl and CoOp do it with the global source of chance, once seeded."""
    data = listed([20, 16, 3, 7], seed)
    state = random.getstate()
    random.seed(seed)
    expected: dict[str, list[Photo]] = {}
    for split, number in (("train", shots), ("val", min(shots, 4))):
        by_label: dict[int, list[Photo]] = {}
        for item in data.splits[split]:
            by_label[item.label] = [*by_label.get(item.label, []), item]
        expected[split] = []
        for items in by_label.values():
            if len(items) >= number:
                expected[split] += random.sample(items, number)
            else:
                expected[split] += random.choices(items, k=number)
    random.setstate(state)
    assert datasets.few_shot(data, shots, seed) == expected
    assert random.getstate() == state
    assert datasets.few_shot(data, shots, seed + 1) != expected


def test_no_shots_are_all_photographs() -> None:
    data = listed([3, 2], 0)
    assert datasets.few_shot(data, 0, 1)["train"] == data.splits["train"]
    with pytest.raises(ValueError, match="shots=-1"):
        datasets.few_shot(data, -1, 1)


def test_what_a_sample_looks_like_depends_on_epoch_and_index_alone(tmp_path: Path) -> None:
    image(tmp_path / "a.jpg", size=(64, 48))
    look = datasets.transform(32, (0.5,) * 3, (0.5,) * 3, 0.08)
    data = Labelled([tmp_path / "a.jpg"], [2], look, 0)
    state = torch.random.get_rng_state()
    first, label = data[0, 0]
    assert label == 2
    assert first.shape == (3, 32, 32)
    assert torch.equal(data[0, 0][0], first)
    assert not torch.equal(data[1, 0][0], first)
    assert torch.equal(torch.random.get_rng_state(), state)
    middle = datasets.transform(32, (0.0,) * 3, (1.0,) * 3)(Image.new("RGB", (64, 48), (255, 0, 0)))
    assert middle.shape == (3, 32, 32)
    (tmp_path / "a.jpg").write_bytes((tmp_path / "a.jpg").read_bytes()[:300])
    with pytest.raises(BadData, match=r"a\.jpg: the image cannot be read"):
        data[0, 0]


# Prompts ------------------------------------------------------------------------------------------------------------


def naive(model: Any, learner: PromptLearner, cross: Tensor | None = None) -> Tensor:
    """Text features from embeddings laid down by hand, token by token, through the tower's own blocks.

    Args:
        model: dense.
        learner: of the context.
        cross: [L, C] cross tokens.
    """
    text = getattr(model, "text", model)
    tokenizer, features = open_clip.SimpleTokenizer(context_length=14), []
    for k, name in enumerate(NAMES):
        context = learner.ctx[k] if learner.ctx.dim() == 3 else learner.ctx
        words = torch.tensor([*tokenizer.encode(name.replace("_", " ") + "."), 49407])
        sos, rest = text.token_embedding(torch.tensor([49406])), text.token_embedding(words)
        eot = len(context) + len(words)
        padding = text.token_embedding(torch.zeros(14 - 1 - eot, dtype=torch.long))
        x = torch.cat([sos, context, rest, padding])[None] + text.positional_embedding
        if cross is not None:
            x = torch.cat([x, x[:, eot : eot + 1]], 1)
        mask = torch.full((x.shape[1],) * 2, -torch.inf).triu(1)
        for layer, block in enumerate(text.transformer.resblocks):
            if cross is not None:
                x = torch.cat([x[:, :-1], (x[:, eot].detach() + cross[layer])[:, None]], 1)
            x = block(x, attn_mask=mask)
        features.append(text.ln_final(x)[0, eot] @ text.text_projection)
    return torch.stack(features)


@pytest.mark.parametrize("reduced", [False, True])
@pytest.mark.parametrize("class_specific", [False, True])
@pytest.mark.parametrize("name", ["tiny", "tiny-custom"])
def test_prompts_are_what_they_would_be_by_hand(name: str, class_specific: bool, reduced: bool) -> None:
    clip = tiny(name)
    learner = PromptLearner(clip, NAMES, 4, class_specific=class_specific, seed=3)
    assert learner.ctx.shape == ((3, 4, 32) if class_specific else (4, 32))
    with torch.no_grad():
        learner.ctx.mul_(20)  # so that it matters
    expected = naive(clip.model, learner)
    if reduced:  # what nobody sees changes nothing
        attach(clip)
    found = learner()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(1))
    gradients = [torch.autograd.grad((side * weights).sum(), learner.ctx)[0] for side in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)
    assert float(gradients[0].abs().min(-1).values.max()) > 0


def test_cross_tokens_behind_prompts_are_what_they_would_be_by_hand() -> None:
    clip = tiny()
    learner = PromptLearner(clip, NAMES, 4)
    attached = attach(clip)
    learner()
    recorded = attached._towers["text"].last_record.cross_tokens
    with attached.paused():
        blocks, seen = clip.model.transformer.resblocks, []
        handles = [block.register_forward_pre_hook(lambda m, args: seen.append(args[0][:, -1])) for block in blocks]
        naive(clip.model, learner, attached.cross_tokens["text"])
        for handle in handles:
            handle.remove()
    for layer in range(2):
        torch.testing.assert_close(recorded[layer], torch.cat(seen[layer::2]), rtol=1e-4, atol=1e-5)


def test_prompts_leave_no_trace() -> None:
    clip = tiny()
    learner = PromptLearner(clip, NAMES, 4)
    keys, ids = list(clip.model.state_dict()), clip.tokenize(["a dog"])
    before = clip.encode_text(ids)
    learner()
    assert not clip.model.token_embedding._forward_hooks
    torch.testing.assert_close(clip.encode_text(ids), before, rtol=0, atol=0)
    assert list(clip.model.state_dict()) == keys
    assert list(learner.state_dict()) == ["ctx"]

    def broken(ids: Tensor) -> Tensor:
        clip.model.token_embedding(ids)
        raise KeyboardInterrupt

    learner.clip = replace(clip, encode_text=broken)
    with pytest.raises(KeyboardInterrupt):
        learner()
    assert not clip.model.token_embedding._forward_hooks


def test_the_ids_are_coops() -> None:
    """CoOp writes an X for each context token."""
    tokenizer = open_clip.SimpleTokenizer(context_length=77)
    for name in (*NAMES, "brontosaurus", "McDonnell Douglas MD-80"):
        ids, start = prompts.placeholders(lambda texts: tokenizer(texts, 77), [name], 16)
        assert start == 1
        assert torch.equal(ids, tokenizer(["X " * 16 + name.replace("_", " ") + "."], 77))


def test_a_tokenizer_that_pads_with_the_end_or_has_no_start() -> None:
    def bare(texts: list[str]) -> Tensor:
        return torch.tensor([([5 + len(w) for w in text.rstrip(".").split()] + [1] * 6)[:6] for text in texts])

    def padded(texts: list[str]) -> Tensor:
        return torch.tensor([([9, *(20 + len(w) for w in t.rstrip(".").split())] + [99] * 6)[:6] for t in texts])

    assert [value.tolist() if isinstance(value, Tensor) else value for value in prompts.placeholders(bare, ["aa b"], 3)]
    assert prompts.placeholders(bare, ["aa b"], 3)[0].tolist() == [[6, 6, 6, 7, 6, 1]]
    assert prompts.placeholders(bare, ["aa b"], 3)[1] == 0
    assert prompts.placeholders(padded, ["aa b"], 2)[0].tolist() == [[9, 21, 21, 22, 21, 99]]
    with pytest.raises(ValueError, match="3 context tokens do not fit.*Choose 1 to 2"):
        prompts.placeholders(padded, ["aa b"], 3)


def test_prompts_that_do_not_fit_say_what_would() -> None:
    with pytest.raises(ValueError, match=r"16 context tokens.*'water_lilly' .* 5 more.* 14 in all"):
        PromptLearner(tiny(), ("water_lilly", "face"), 16)
    PromptLearner(tiny(), NAMES, 9)
    with pytest.raises(ValueError, match="0 context tokens"):
        PromptLearner(tiny(), NAMES, 0)


# The loss -----------------------------------------------------------------------------------------------------------


def test_the_loss_is_the_references() -> None:
    clip, labels = tiny(), torch.tensor([2, 0, 2, 1])
    attached = attach(clip)
    attached.register_parameters(clip.model)
    learner = PromptLearner(clip, NAMES, 4)
    groups = parameter_groups(clip.model, attached, train="prompts", prompts=[learner.ctx])
    assert list(groups) == ["cross_tokens", "prompts"]
    losses = CoopTask(learner, attached).train()(pixels(), labels)
    losses["loss"].backward()
    image = F.normalize(clip.encode_image(pixels()), dim=-1)
    text = F.normalize(learner(), dim=-1)
    found = clip.model.logit_scale.exp() * image @ text.T
    entropy = sum(-found[i].log_softmax(0)[label] for i, label in enumerate(labels.tolist())) / 4
    # As many texts as images, so that nothing has to be picked: the classes' prompts, some of them repeated.
    repeated = PromptLearner(clip, [NAMES[label] for label in labels], 4)
    with torch.no_grad():
        repeated.ctx.copy_(learner.ctx)
    clip.encode_image(pixels())
    repeated()
    alignment = attached.alignment_loss()
    torch.testing.assert_close(losses["alignment"], alignment)
    torch.testing.assert_close(losses["loss"].detach(), ((entropy + 10 * alignment) / 2).detach())
    assert float(losses["accuracy"]) == float((found.argmax(1) == labels).float().mean())
    trained = {id(p) for parameters in groups.values() for p in parameters}
    for parameter in (learner.ctx, *clip.model.parameters()):
        assert (parameter.grad is not None) == (id(parameter) in trained)
        if parameter.grad is not None:
            assert float(parameter.grad.abs().sum()) > 0


def test_rows_without_cross_tokens_take_steps_of_the_same_size() -> None:
    learner, labels = PromptLearner(tiny(), NAMES, 4), torch.tensor([2, 0, 2, 1])
    losses = CoopTask(learner)(pixels(), labels)
    assert set(losses) == {"cross_entropy", "loss", "accuracy"}
    torch.testing.assert_close(losses["loss"], losses["cross_entropy"] / 2)


# Dassl's files ------------------------------------------------------------------------------------------------------


class Warmup(torch.optim.lr_scheduler.LRScheduler):
    """Like Dassl's, it keeps the scheduler that follows, with its optimiser."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.successor = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 200.0)
        super().__init__(optimizer)

    def get_lr(self) -> list[float]:
        return [1e-5 for _ in self.base_lrs]


def dassl_file(path: Path, clip: Clip, whole: bool = True, **changes: Any) -> Path:
    """A checkpoint as Dassl writes it, `changes` being other tensors or None, by key."""
    context = torch.randn(4, 32, generator=torch.Generator().manual_seed(7)).half()
    embedding = clip.model.token_embedding.weight.detach().half()
    state: dict[str, Any] = {
        "ctx": context,
        "token_prefix": embedding[torch.full((5, 1), 49406)],
        "token_suffix": torch.zeros(5, 9, 32).half(),
    }
    if whole:
        state = {f"prompt_learner.{name}": value for name, value in state.items()}
        chance = torch.Generator().manual_seed(8)
        for name, value in clip.model.state_dict().items():
            other = torch.randn(value.shape, generator=chance).half() * 0.1
            if name.startswith("visual."):
                state[name.replace("visual.", "image_encoder.")] = other
            elif name != "token_embedding.weight":
                state[name if name == "logit_scale" else f"text_encoder.{name}"] = other
        state["image_encoder.transformer.cross_image"] = torch.randn(1, 2, 32, generator=chance)
        state["text_encoder.transformer.cross_text"] = torch.randn(1, 2, 32, generator=chance)
    state = {name: value for name, value in {**state, **changes}.items() if value is not None}
    parameter = nn.Parameter(context.float())
    optimizer = torch.optim.SGD([parameter], lr=0.05, momentum=0.9)
    scheduler = Warmup(optimizer)
    parameter.sum().backward()
    optimizer.step()
    content = {"state_dict": state, "epoch": 200, "optimizer": optimizer.state_dict()}
    torch.save({**content, "scheduler": scheduler.state_dict(), "val_result": None}, path)
    return path


def test_a_whole_checkpoint_of_dassl(tmp_path: Path) -> None:
    clip = tiny()
    file = dassl_file(tmp_path / "model.pth.tar-200", clip)
    state = torch.load(file, weights_only=False)["state_dict"]
    allowed = set(torch.serialization.get_safe_globals())
    learner = PromptLearner(clip, NAMES, 4)
    embedding = clip.model.token_embedding.weight.detach().clone()
    attached = prompts.load_dassl(learner, file, {"visual": crossget.CrossGET(5), "text": crossget.CrossGET(0)})
    assert set(torch.serialization.get_safe_globals()) == allowed
    assert attached is not None
    assert attached.reducers["visual"].r == 5
    own = clip.model.state_dict()
    for name, value in state.items():
        if name.startswith(("image_encoder.", "text_encoder.", "logit_scale")) and "cross_" not in name:
            key = name.replace("image_encoder.", "visual.").replace("text_encoder.", "")
            assert torch.equal(own.pop(key), value.float()), name
    assert list(own) == ["token_embedding.weight"]
    assert torch.equal(clip.model.token_embedding.weight.detach(), embedding)
    assert torch.equal(attached.cross_tokens["text"], state["text_encoder.transformer.cross_text"][0])
    assert torch.equal(attached.cross_tokens["visual"], state["image_encoder.transformer.cross_image"][0])
    assert torch.equal(learner.ctx.detach(), state["prompt_learner.ctx"].float())


def test_coops_own_checkpoint_has_prompts_alone(tmp_path: Path) -> None:
    clip = tiny()
    file = dassl_file(tmp_path / "model.pth.tar-50", clip, whole=False)
    learner = PromptLearner(clip, NAMES, 4)
    assert prompts.load_dassl(learner, file) is None
    expected = torch.randn(4, 32, generator=torch.Generator().manual_seed(7)).half().float()
    assert torch.equal(learner.ctx.detach(), expected)
    with pytest.raises(ValueError, match="has no image_encoder.*'ctx'.*load_dassl"):
        crossget.load_reference(clip.model, file)


@pytest.mark.parametrize(
    ("whole", "changes", "message"),
    [
        (True, {"image_encoder.proj": None}, r"missing: \['visual.proj'\]"),
        (True, {"text_encoder.surplus": torch.zeros(1)}, r"unexpected: \['surplus'\]"),
        (
            True,
            {"image_encoder.proj": torch.zeros(3, 3)},
            r"visual.proj: \[3, 3\], expected \[32, 16\]",
        ),
        (True, {"text_encoder.transformer.cross_text": None}, r"missing: \['transformer.cross_text'\]"),
        (True, {"prompt_learner.ctx": torch.zeros(5, 32)}, r"ctx has shape \[5, 32\], .* needs \[4, 32\]"),
        (False, {"ctx": None}, r"'ctx'.*\['token_prefix', 'token_suffix'\]"),
        (False, {"other": torch.zeros(1)}, r"left over: \['other'\]"),
        (False, {"token_prefix": torch.ones(5, 1, 32)}, "trained with another CLIP"),
    ],
)
def test_checkpoints_that_do_not_fit(whole: bool, changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    clip = tiny()
    file = dassl_file(tmp_path / "model.pth.tar-1", clip, whole, **changes)
    learner = PromptLearner(clip, NAMES, 4)
    before = {name: value.clone() for name, value in clip.model.state_dict().items()}
    context = learner.ctx.detach().clone()
    with pytest.raises(ValueError, match=message):
        prompts.load_dassl(learner, file)
    assert torch.equal(learner.ctx.detach(), context)
    assert all(torch.equal(value, before[name]) for name, value in clip.model.state_dict().items())
    with pytest.raises(ValueError, match="not attached"):
        crossget.attachment(clip.model)


class Evil:
    def __reduce__(self) -> Any:
        return os.system, ("exit 1",)


def test_other_objects_are_not_read(tmp_path: Path) -> None:
    torch.save({"state_dict": {}, "scheduler": Evil()}, tmp_path / "evil.tar")
    with pytest.raises(ValueError, match=r"more than tensors.*weights_only"):
        prompts.load_dassl(PromptLearner(tiny(), NAMES, 4), tmp_path / "evil.tar")
    torch.save({"weights": {}}, tmp_path / "other.tar")
    with pytest.raises(ValueError, match=r"not a file of Dassl's.*\['weights'\]"):
        prompts.load_dassl(PromptLearner(tiny(), NAMES, 4), tmp_path / "other.tar")


# Presets ------------------------------------------------------------------------------------------------------------


def test_the_settings_of_the_reference() -> None:
    setting = SETTINGS["reference"]
    assert setting.r == {80: 8, 69: 12, 58: 16}
    assert PRESETS["crossget"].make(16) == {"visual": crossget.CrossGET(16), "text": crossget.CrossGET(0)}
    assert (PRESETS["crossget"].share, PRESETS["crossget"].alignment) == (0.5, 10)
    recipe = recipe_of(setting, "dtd", PRESETS["crossget"])
    assert (recipe.optimizer, recipe.lr, recipe.epochs, recipe.batch) == ("sgd", 0.05, 200, 32)
    assert (recipe.warmup, recipe.warmup_lr, recipe.schedule) == (1, 1e-5, "cosine_by_epoch")
    assert recipe_of(setting, "imagenet", PRESETS["crossget"]).lr == 0.02
    assert recipe_of(setting, "imagenet", PRESETS["crossget"]).epochs == 50
    base = recipe_of(setting, "imagenet", PRESETS["coop"])
    assert (base.lr, base.epochs) == (0.002, 50)
    options = run.Options("reference", Path("data"))
    assert (options.shots, options.context, options.class_specific) == (16, 16, False)


@pytest.mark.slow
def test_the_small_settings_strengths_are_what_they_are_called() -> None:
    clip = load_clip("small")
    clip.model.eval()
    for percent, r in SETTINGS["caltech101_small"].r.items():
        with crossget.attach(clip.model.visual, crossget.CrossGET(r)):
            assert crossget.count_flops(clip.model.visual, torch.zeros(1, 3, 112, 112)).ratio == pytest.approx(
                percent / 100, abs=0.01
            )
    assert PromptLearner(clip, ("brontosaurus", "water_lilly"), 16).ids.shape == (2, 24)


# The program --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of four photographs to train on and two to test on, in CoOp's layout of DTD."""
    root = tmp_path_factory.mktemp("photos")
    split: dict[str, list[Any]] = {"train": [], "val": [], "test": []}
    for label, name in enumerate(NAMES):
        for i in range(6):
            image(root / "dtd" / "images" / name / f"{i}.jpg", 10 * label + i)
            split["train" if i < 4 else "test"].append([f"{name}/{i}.jpg", label, name])
    (root / "dtd" / "split_zhou_DescribableTextures.json").write_text(json.dumps(split))
    torch.manual_seed(0)
    torch.save(load_clip("tiny").model.state_dict(), root / "dense.pt")
    return root


def options(photos: Path, out: Path, **changes: Any) -> run.Options:
    given: dict[str, Any] = {
        "presets": ("coop", "coop_control", "crossget"), "seeds": (0,), "percent": (58,), "shots": 4, "context": 4,
        "batch": 4, "epochs": 2, "model": "tiny", "weights": photos / "dense.pt", "dataset": "dtd", **changes,
    }  # fmt: skip
    return run.Options("caltech101_small", photos, work=out / "work", results=out / "results", **given)


def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the setting's strengths fit two blocks."""
    setting = replace(SETTINGS["caltech101_small"], r={80: 2, 58: 4})
    monkeypatch.setitem(SETTINGS, "caltech101_small", setting)


def result(out: Path, name: str) -> Any:
    return json.loads((out / "results" / "caltech101_small" / "dtd" / f"{name}.json").read_text())


def test_the_queue_begins_with_the_prompts_that_others_start_from(photos: Path, tmp_path: Path) -> None:
    def names(**changes: Any) -> list[str]:
        return [one.slug.split("/")[2] for one in run.grid(options(photos, tmp_path, **changes))]

    assert names(presets=("zero_shot", "tome"), percent=(), seeds=(0, 1)) == [
        "zero_shot", "coop_seed0", "tome_58_seed0", "coop_seed1", "tome_58_seed1", "tome_69_seed0", "tome_69_seed1",
        "tome_80_seed0", "tome_80_seed1",
    ]  # fmt: skip
    assert names(presets=("crossget", "coop")) == ["coop_seed0", "crossget_58_seed0"]
    run.save_prompts(torch.zeros(4, 32), tmp_path / "work/caltech101_small/dtd/coop_seed0/prompts.safetensors")
    assert names(presets=("crossget",)) == ["crossget_58_seed0"]
    with pytest.raises(ValueError, match=r"unknown presets \['cocoop'\]"):
        names(presets=("cocoop",))
    with pytest.raises(ValueError, match=r"percent \[57\]: caltech101_small has \[58, 69, 80\]"):
        names(percent=(57,))


def test_end_to_end(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch)
    wanted = options(photos, tmp_path, presets=tuple(PRESETS))
    assert run.STUDY.run(wanted) == len(PRESETS)
    assert run.STUDY.run(wanted) == 0
    base, made = result(tmp_path, "coop_seed0"), result(tmp_path, "crossget_58_seed0")
    assert len(made["result"]["correct"]) == 6
    assert made["result"]["top1"] == pytest.approx(100 * made["result"]["correct"].count("1") / 6)
    assert made["result"]["tokens"] == {"visual": [18, 14], "text": [15, 15]}
    assert made["result"]["parameters"] == {"prompts": 4 * 32, "cross_tokens": 2 * 2 * 32}
    image = made["result"]["gflops"]["image"]
    assert image["reduced"] < image["dense"] == base["result"]["gflops"]["image"]["reduced"]
    assert made["run"]["data"]["train"] == base["run"]["data"]["train"]
    assert made["run"]["data"]["train"]["photos"] == 12
    assert "alignment" in made["result"]["history"][1]
    assert "--presets crossget --percent 58 --seeds 0" in made["command"]
    assert str(tmp_path) not in json.dumps(made)
    work = tmp_path / "work/caltech101_small/dtd"
    assert made["run"]["prompts_sha256"] == file_digest(work / "coop_seed0/prompts.safetensors")
    saved = crossget.load(load_clip("tiny").model, work / "crossget_58_seed0")
    assert all(float(parameter.detach().abs().sum()) > 0 for parameter in saved.cross_tokens.values())
    (work / "coop_seed0/prompts.safetensors").unlink()
    assert run.STUDY.run(wanted) == 1, "what others start from is made again"
    with pytest.raises(ValueError, match=r"\[4, 32\].*\[5, 32\]"):
        run.STUDY.run(options(photos, tmp_path, context=5, overwrite=True, presets=("tome",)))
    chapter = "\n".join(report.chapter(read_results(tmp_path / "results")))
    for preset in PRESETS.values():
        assert f"| {preset.label} " in chapter
    assert "3 classes, 4 photographs of each to train on, 6 to evaluate on; 4 context tokens, shared" in chapter


@pytest.mark.slow  # the engine does it, which retrieval shows in the default run
def test_a_stopped_run_goes_on(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch)
    run.STUDY.run(options(photos, tmp_path / "whole", save_every=1))
    forward, calls = CoopTask.forward, []

    def dies(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(0)
        if len(calls) == 3 * 2 * 2 + 5:  # in the third row's second epoch
            raise KeyboardInterrupt
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(CoopTask, "forward", dies)
    with pytest.raises(KeyboardInterrupt):
        run.STUDY.run(options(photos, tmp_path / "stopped", save_every=1))
    monkeypatch.setattr(CoopTask, "forward", forward)
    assert run.STUDY.run(options(photos, tmp_path / "stopped", save_every=1)) == 1
    whole, stopped = (result(tmp_path / name, "crossget_58_seed0")["result"] for name in ("whole", "stopped"))
    assert stopped["history"] == whole["history"]
    assert stopped["correct"] == whole["correct"]


def test_bad_photographs_stop_the_program_unless_they_are_to_be_skipped(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    small(monkeypatch)
    shutil.copytree(photos, tmp_path / "data")
    half = tmp_path / "data/dtd/images/face/4.jpg"
    half.write_bytes(half.read_bytes()[:300])
    (tmp_path / "data/dtd/images/face/5.jpg").unlink()
    wanted = options(tmp_path / "data", tmp_path, presets=("zero_shot",))
    with pytest.raises(BadData, match=r"face/5\.jpg .*not there"):
        run.STUDY.run(wanted)
    with pytest.warns(UserWarning, match=r"skipped: .*face/4\.jpg: the image cannot be read"):
        run.STUDY.run(replace(wanted, skip_bad=True))
    assert len(result(tmp_path, "zero_shot")["result"]["correct"]) == 4


@pytest.mark.slow  # tests/core/test_sharding.py has two processes in the default run
def test_two_processes_are_one_with_the_same_batch(
    photos: Path, tmp_path: Path, configs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stage two, too, which on every process starts from what the main one has written."""
    small(monkeypatch)
    wanted = options(photos, tmp_path / "one")
    run.STUDY.run(wanted)
    (tmp_path / "program.py").write_text(
        "import sys\nfrom dataclasses import replace\nfrom pathlib import Path\nimport open_clip\nimport torch\n"
        "from experiments.coop import run\nfrom experiments.coop.presets import SETTINGS\n"
        "torch.set_num_threads(1)\nopen_clip.add_model_config(sys.argv[1])\n"
        "SETTINGS['caltech101_small'] = replace(SETTINGS['caltech101_small'], r={80: 2, 58: 4})\n"
        "photos, out = map(Path, sys.argv[2:])\n"
        "run.STUDY.run(run.Options('caltech101_small', photos, work=out / 'work', results=out / 'results',\n"
        "    dataset='dtd',\n"
        "    presets=('zero_shot', 'coop', 'coop_control', 'crossget'), seeds=(0,), percent=(58,), shots=4,\n"
        "    context=4, batch=4,\n"
        "    epochs=2, model='tiny', weights=photos / 'dense.pt'))\n"
        "assert not torch.distributed.is_initialized()\n"
    )
    config = str(ROOT / "experiments/configs/ddp.yaml")
    words = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config, "--num_processes", "2"]
    words += ["--main_process_port", "0"]  # any: others may train beside this
    words += [str(tmp_path / "program.py"), str(configs), str(photos), str(tmp_path / "two")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-4000:]
    for name in ("coop_seed0", "coop_control_seed0", "crossget_58_seed0"):
        one, two = (result(tmp_path / folder, name)["result"] for folder in ("one", "two"))
        assert (one["processes"], two["processes"]) == (1, 2)
        for ours, theirs in zip(one["history"], two["history"], strict=True):
            assert theirs == pytest.approx(ours, rel=1e-4)
