"""The authors' LLaVA checkpoints, converted or loaded into a model, compute what the reference computed."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden_inputs import GOLDEN, array
from original_llava import (
    CLIP,
    CONFIG,
    CROSS_IMAGE,
    CROSS_TEXT,
    IMAGE,
    LANGUAGE,
    LLAVA,
    PAD,
    ROWS,
    TOWER,
    VISION,
    WEIGHTS,
    State,
    hollow,
    language_shapes,
    tower_of,
    write_clip,
    write_original,
    write_tokenizer,
    write_weights,
)
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

import crossget
from crossget import cli
from crossget.checkpoints import convert as module
from crossget.checkpoints.convert import plan_conversion
from crossget.core import saving

OUTPUTS = np.load(GOLDEN / "llava.npz")

SHARD = "pytorch_model-00002-of-00003.bin"
NORM, UP = "model.norm.weight", "model.layers.0.mlp.up_proj.weight"


# What comes out ------------------------------------------------------------------------------------------------------


def inputs(image: int = IMAGE) -> dict[str, Tensor]:
    size, patches = VISION["image_size"], (VISION["image_size"] // VISION["patch_size"]) ** 2
    rows = [[t for i in row for t in ([image] * patches if i == -200 else [i])] for row in LLAVA["input_ids"]]
    ids = torch.tensor(rows)
    pixels = array("images", (LLAVA["batch"], 3, size, size), LLAVA["seed"])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


def check_logits(model: Any, image: int = IMAGE) -> None:
    with torch.no_grad():
        logits = model(**inputs(image)).logits[..., :ROWS]
    torch.testing.assert_close(logits, torch.from_numpy(OUTPUTS["logits"]), rtol=0, atol=2e-5)


def convert(folder: Path, out: Path, *options: str) -> int:
    return cli.main(["convert", str(folder), str(out), "--r", str(LLAVA["r"]), *options])


def loaded(out: Path) -> Any:
    model, info = LlavaForConditionalGeneration.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


def written(out: Path) -> State:
    state: State = {}
    for path in out.glob("model*.safetensors"):
        state.update(load_file(path))
    return state


LAYOUTS: dict[str, dict[str, Any]] = {
    "shards": {"tokenizer": True},
    "safetensors": {"kind": "safetensors", "prefix": "base_model.model."},
    "one file": {"files": 1, "cross": "inside"},
    "one safetensors": {"kind": "safetensors", "files": 1, "cross": "inside", "prefix": "module.", "inside": False},
    "no tower": {"inside": False, "tokenizer": True, "prefix": "module."},
    "old pickles": {"old": True, "files": 2},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_converted_computes_what_the_reference_did(layout: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert convert(write_original(tmp_path / "original", **LAYOUTS[layout]), out) == 0
    model = loaded(out)
    attached = crossget.load(model, out)
    assert {name: reducer.r for name, reducer in attached.reducers.items()} == {"visual": LLAVA["r"], "text": 0}
    check_logits(model)
    with torch.no_grad():
        answer = model.generate(**inputs(), max_new_tokens=6, max_length=None, do_sample=False, eos_token_id=None)
    assert answer[:, -6:].tolist() == [row[-6:] for row in LLAVA["generated"]]
    assert (out / "processor_config.json").exists() == LAYOUTS[layout].get("tokenizer", False)


def test_crossget_s_own_file_is_what_save_writes(tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert(write_original(tmp_path / "original"), out)
    crossget.load(loaded(out), out).save(tmp_path / "again")
    assert (out / saving.FILE).read_bytes() == (tmp_path / "again" / saving.FILE).read_bytes()
    # r is the reference's unless told otherwise.
    cli.main(["convert", str(tmp_path / "original"), str(tmp_path / "default")])
    assert saving.read(tmp_path / "default")[0]["visual"].r == 13


def test_it_says_what_it_did(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = tmp_path / "original", tmp_path / "out"
    convert(write_original(folder, inside=False), out)
    names = [name for name in WEIGHTS if not name.endswith((".inv_freq", CROSS_TEXT, CROSS_IMAGE))]
    count = sum(WEIGHTS[name].numel() for name in names) + 2 * 32 * LANGUAGE["hidden_size"]
    assert capsys.readouterr().out.splitlines() == [
        f"{out}: LLaVA with 6 language and 4 image blocks, {count:,} parameters in float32, 1 file of weights",
        f"vision tower: {tmp_path / 'clip'}",
        "vocabulary: 160 tokens, then <image> (160) and <pad> (161), filled up to 192",
        f"cross tokens: {folder / 'cross_tokens.bin'}; r = 5",
        f"processor: left out, {folder} has no tokenizer.json and no tokenizer.model",
    ]
    write_tokenizer(folder)
    convert(folder, out, "--overwrite", "--no-cross-tokens", "--max-shard-size", "1MB")
    cross, images = capsys.readouterr().out.splitlines()[-2:]
    assert cross == "cross tokens: none, the dense model alone"
    assert "the original pads them (image_aspect_ratio)" in images
    edit(image_aspect_ratio="square")(folder)
    convert(folder, out, "--overwrite")
    assert capsys.readouterr().out.splitlines()[-1] == "processor: crops images to a square"


def test_the_processor_fits_the_model(tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert(write_original(tmp_path / "original", tokenizer=True), out)
    model, processor = loaded(out), AutoProcessor.from_pretrained(out)
    assert (processor.tokenizer.pad_token_id, model.config.pad_token_id) == (PAD, PAD)
    assert (processor.tokenizer.convert_tokens_to_ids("<image>"), model.config.image_token_index) == (IMAGE, IMAGE)
    turn = {"role": "user", "content": [{"type": "text", "text": "w7 w8"}, {"type": "image"}]}
    prompt = processor.apply_chat_template([turn], add_generation_prompt=True)
    assert prompt == (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions. USER: <image>\nw7 w8 ASSISTANT:"
    )
    system = {"role": "system", "content": "w9"}
    said = {"role": "assistant", "content": [{"type": "text", "text": "w10"}]}
    prompt = processor.apply_chat_template([system, turn, said, {"role": "user", "content": "w11"}])
    assert prompt == "w9 USER: <image>\nw7 w8 ASSISTANT: w10</s>USER: w11 "
    size = VISION["image_size"]
    picture = np.zeros((2 * size, size, 3), dtype="uint8")
    batch = processor(images=[picture] * 2, text=["USER: <image> w7", "<image>"], padding=True, return_tensors="pt")
    assert batch["pixel_values"].shape == (2, 3, size, size)
    assert batch["input_ids"].tolist() == [[3, 4, *[IMAGE] * 49, 7], [PAD, PAD, PAD, *[IMAGE] * 49]]
    crossget.load(model, out)
    with torch.no_grad():
        assert model.generate(**batch, max_new_tokens=2, max_length=None, do_sample=False).shape[0] == 2


def test_a_sentencepiece_model_alone(tmp_path: Path) -> None:
    """What the published folders have. Every version has to find the same tokens in the result, without the package."""
    sentencepiece = pytest.importorskip("sentencepiece")
    words = ["USER", "ASSISTANT", "what", "is", "in", "the", "picture", "cat", "on", "a", "mat", ":", "?"]
    lines = iter([" ".join(words[i % 13 :] + words[: i % 13]) for i in range(100)])
    folder, out = tmp_path / "original", tmp_path / "out"
    longer = {name: torch.cat([WEIGHTS[name]] * 2) for name in ("model.embed_tokens.weight", "lm_head.weight")}
    write_original(folder, changes=longer, config={"vocab_size": 2 * ROWS})
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines, model_prefix=str(folder / "tokenizer"), vocab_size=2 * ROWS, model_type="bpe",
        byte_fallback=True, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    size = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model")).vocab_size()
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "special_tokens_map.json").write_text(json.dumps({**special, "pad_token": "<unk>"}))
    settings = {"tokenizer_class": "LlamaTokenizer", "legacy": False, "add_bos_token": True, **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    convert(folder, out)
    assert (out / "tokenizer.model").read_bytes() == (folder / "tokenizer.model").read_bytes()
    tokenizer = AutoProcessor.from_pretrained(out).tokenizer
    found = tokenizer.tokenize("USER: <image>\nwhat is it", add_special_tokens=True)
    assert found == ["<s>", "▁USER", ":", "▁", "<image>", "<0x0A>", "wh", "at", "▁is", "▁i", "t"]
    assert tokenizer.convert_tokens_to_ids(["<image>", "<pad>"]) == [size, size + 1]


def test_new_rows_are_the_mean_of_the_old_ones(tmp_path: Path) -> None:
    convert(write_original(tmp_path / "original"), tmp_path / "out")
    state = written(tmp_path / "out")
    for new, old in (
        ("language_model.model.embed_tokens.weight", WEIGHTS["model.embed_tokens.weight"]),
        ("language_model.lm_head.weight", WEIGHTS["lm_head.weight"]),
    ):
        assert torch.equal(state[new][:ROWS], old)
        torch.testing.assert_close(state[new][ROWS:], old.mean(0).expand(32, -1), rtol=0, atol=1e-7)


def test_files_hold_no_more_than_they_may(tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert(write_original(tmp_path / "original"), out, "--max-shard-size", "100KB")
    files = sorted(out.glob("model-*.safetensors"))
    assert [path.name for path in files] == [
        f"model-{i + 1:05}-of-{len(files):05}.safetensors" for i in range(len(files))
    ]
    assert all(sum(t.nbytes for t in load_file(path).values()) <= 100_000 for path in files)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {name: path.name for path in files for name in load_file(path)}
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in written(out).values())
    check_logits_after_load(out)


def check_logits_after_load(out: Path) -> None:
    model = loaded(out)
    crossget.load(model, out)
    check_logits(model)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_numbers_are_kept_or_made(dtype: str, tmp_path: Path) -> None:
    convert(write_original(tmp_path / "original", inside=False), tmp_path / "made", "--dtype", dtype)
    half = {
        name: value.to(getattr(torch, dtype)) if value.is_floating_point() else value for name, value in WEIGHTS.items()
    }
    folder = write_original(tmp_path / "half", inside=False, changes=half, config={"torch_dtype": dtype})
    convert(folder, tmp_path / "kept")  # the tower is float32 where it comes from
    made, kept = written(tmp_path / "made"), written(tmp_path / "kept")
    assert {value.dtype for value in made.values()} == {getattr(torch, dtype)}
    assert all(
        torch.equal(kept[name], value)
        for name, value in made.items()
        if not name.endswith(("_tokens.weight", "head.weight"))
    )
    assert {value.dtype for value in kept.values()} == {getattr(torch, dtype)}
    assert {value.dtype for value in load_file(tmp_path / "made" / "crossget.safetensors").values()} == {
        getattr(torch, dtype)
    }
    for name in ("made", "kept"):
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert (config["torch_dtype"], config["text_config"]["torch_dtype"]) == (dtype, dtype)
        model = loaded(tmp_path / name)
        with crossget.load(model, tmp_path / name), torch.no_grad():
            model(**{k: v.to(model.dtype) if k == "pixel_values" else v for k, v in inputs().items()})


def test_a_mixture_of_numbers_stays_aligned(tmp_path: Path) -> None:
    odd = {name: value.half() if "layers.1." in name else value for name, value in WEIGHTS.items()}
    odd[TOWER + "pre_layrnorm.bias"] = WEIGHTS[TOWER + "pre_layrnorm.bias"].double()
    convert(write_original(tmp_path / "original", changes=odd), tmp_path / "out")
    state = written(tmp_path / "out")
    assert {value.dtype for value in state.values()} == {torch.float16, torch.float32, torch.float64}
    name = "vision_tower.vision_model.encoder.layers.1.mlp.fc1.weight"
    assert torch.equal(state[name], odd[TOWER + "encoder.layers.1.mlp.fc1.weight"])
    loaded(tmp_path / "out")


def test_rope_and_generation_settings_are_carried_over(tmp_path: Path) -> None:
    folder = write_original(tmp_path / "original", config={"rope_theta": 20000.0, "eos_token_id": 3})
    convert(folder, tmp_path / "out")
    text = loaded(tmp_path / "out").config.text_config
    assert (getattr(text, "rope_theta", None) or text.rope_parameters["rope_theta"]) == 20000.0
    found = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert found == {"bos_token_id": 1, "eos_token_id": 3, "max_length": 4096, "pad_token_id": PAD}


def test_a_dense_llava_on_demand(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert convert(write_original(tmp_path / "original", cross="nowhere"), out, "--no-cross-tokens") == 0
    assert not (out / saving.FILE).exists()
    loaded(out)


# The vision tower ----------------------------------------------------------------------------------------------------


def test_a_vision_tower_by_option(tmp_path: Path) -> None:
    """As transformers saves a tower alone; the weights inside a folder come first."""
    tower = CLIPVisionModel(CLIPVisionConfig(**CLIP))
    tower.save_pretrained(tmp_path / "tower")
    for inside in (True, False):
        folder = write_original(tmp_path / f"inside {inside}", inside=inside, config={"mm_vision_tower": "/not/here"})
        out = tmp_path / f"out {inside}"
        assert convert(folder, out, "--vision-tower", str(tmp_path / "tower")) == 0
        loaded(out)
        bias = written(out)["vision_tower.vision_model.pre_layrnorm.bias"]
        assert torch.equal(bias, WEIGHTS[TOWER + "pre_layrnorm.bias"] if inside else torch.zeros(64))


def test_a_vision_tower_from_the_hub_s_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    home = tmp_path / "hub" / "models--openai--clip-vit-large-patch14-336"
    commit = "0" * 40
    write_clip(home / "snapshots" / commit)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text(commit)
    config = {"mm_vision_tower": "openai/clip-vit-large-patch14-336"}
    folder = write_original(tmp_path / "original", inside=False, config=config)
    convert(folder, tmp_path / "out")
    check_logits_after_load(tmp_path / "out")
    (home / "snapshots" / commit / "pytorch_model.bin").unlink()
    assert convert(folder, tmp_path / "another") == 2
    assert "--vision-tower FOLDER" in capsys.readouterr().err


# The real sizes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "inner", "depth"), [(4096, 11008, 32), (5120, 13824, 40)], ids=["7B", "13B"])
def test_the_published_models_are_understood(width: int, inner: int, depth: int, tmp_path: Path) -> None:
    cross = {CROSS_TEXT: torch.zeros(1, depth, width), CROSS_IMAGE: torch.zeros(1, 24, 1024)}
    torch.save(cross, tmp_path / "cross_tokens.bin")
    config = {
        "hidden_size": width, "intermediate_size": inner, "num_hidden_layers": depth, "vocab_size": 32000,
        "num_attention_heads": width // 128, "num_key_value_heads": width // 128, "torch_dtype": "float16",
        "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "mm_vision_tower": "openai/clip-vit-large-patch14-336",
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, **config}))
    state = hollow(width, inner, depth)
    write_weights(tmp_path, state)
    plan = plan_conversion(tmp_path)
    assert (plan.vocabulary.image, plan.vocabulary.pad) == (32000, 32001)
    assert plan.config["text_config"]["vocab_size"] == 32064
    assert plan.config["image_seq_length"] == 576
    assert plan.reducers["visual"].r == 13
    assert plan.bytes == 2 * (sum(value.numel() for value in state.values()) + 2 * 64 * width)
    assert all(sum(one.bytes for one in shard) <= 4 * 10**9 for shard in plan.files.values())


# Memory --------------------------------------------------------------------------------------------------------------

# The high-water mark of all resident pages, the mapped pages of the file that is read among them (a stricter count than
# anonymous memory alone: the kernel could take those back). Not ru_maxrss: a child inherits its parent's across exec.
# What was there before is counted after a conversion of a tiny folder, which has imported all there is to import.
MEASURE = """
import contextlib, pathlib, sys, torch
from crossget import cli
from crossget.checkpoints import llava_format

def pages(kind):
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(kind))

how, tiny, folder, out = sys.argv[1:]
torch.set_num_threads(1)
assert cli.main(["convert", tiny, out + "/small"]) == 0
before = pages("VmRSS")
with contextlib.suppress(OSError):  # where this is not allowed, the mark may be too high, not too low
    pathlib.Path("/proc/self/clear_refs").write_text("5")
if how == "at once":
    stored = llava_format.inspect_folder(pathlib.Path(folder)).stored
    every = [tensor.clone() for tensor in llava_format.load_tensors(stored.values())]
else:
    assert cli.main(["convert", folder, out + "/big", "--max-shard-size", "60MB", "--dtype", "float16"]) == 0
print(pages("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the measurement is Linux's")
@pytest.mark.parametrize(
    ("how", "layout"),
    [
        ("converted", {}),
        pytest.param("converted", {"kind": "safetensors"}, marks=pytest.mark.slow),
        pytest.param("converted", {"old": True}, marks=pytest.mark.slow),
        pytest.param("at once", {}, marks=pytest.mark.slow),  # that the measurement can fail
    ],
    ids=["bin", "safetensors", "old pickles", "at once"],
)
def test_memory_stays_below_twice_the_largest_file(how: str, layout: dict[str, Any], tmp_path: Path) -> None:
    width, inner, depth = 512, 1408, 8
    config = {"hidden_size": width, "intermediate_size": inner, "num_hidden_layers": depth}
    large = {name: torch.ones(shape) for name, shape in language_shapes(ROWS, width, inner, depth, 64).items()}
    changes = {**dict.fromkeys(WEIGHTS), **tower_of(WEIGHTS), **large}
    changes |= {CROSS_TEXT: torch.zeros(1, depth, width), CROSS_IMAGE: WEIGHTS[CROSS_IMAGE]}
    tiny, folder = (tmp_path / name / "original" for name in ("tiny", "large"))
    write_original(tiny)
    write_original(folder, changes=changes, config=config, files=4, **layout)
    largest = max(path.stat().st_size for path in folder.iterdir())
    assert 20e6 < largest < 40e6
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, how, str(tiny), str(folder), str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    grown = int(done.stdout.splitlines()[-1])
    assert (grown < 2 * largest) == (how == "converted"), (grown, largest)


# What is refused -----------------------------------------------------------------------------------------------------


class Evil:
    def __reduce__(self) -> Any:
        return (print, ("code ran",))


def edit(**changes: Any) -> Callable[[Path], None]:
    """Of config.json."""

    def change(folder: Path) -> None:
        config = {**json.loads((folder / "config.json").read_text()), **changes}
        (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))

    return change


def put(name: str, content: Any = None) -> Callable[[Path], None]:
    """A file, of a state dict or of bytes."""

    def change(folder: Path) -> None:
        if isinstance(content, bytes | None):
            (folder / name).write_bytes(content or b"")
        else:
            torch.save(content, folder / name)

    return change


def cut(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).write_bytes((folder / name).read_bytes()[:-200])

    return change


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def quantise(folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # newer versions of torch deprecate such tensors
        put(SHARD, {NORM: torch.quantize_per_tensor(torch.ones(48), 0.1, 0, torch.qint8)})(folder)


def squeeze(name: str) -> Callable[[Path], None]:
    """Zeros that take little room when they are compressed."""

    def change(folder: Path) -> None:
        torch.save({NORM: torch.zeros(10**6)}, folder / name)
        with zipfile.ZipFile(folder / name) as archive:
            parts = {item.filename: archive.read(item) for item in archive.infolist()}
        with zipfile.ZipFile(folder / name, "w", zipfile.ZIP_DEFLATED) as archive:
            for part, content in parts.items():
                archive.writestr(part, content)

    return change


def index(name: Any) -> Callable[[Path], None]:
    """A file that the index names in place of the first one."""

    def change(folder: Path) -> None:
        path = folder / "pytorch_model.bin.index.json"
        content = json.loads(path.read_text())
        content["weight_map"][NORM] = name
        path.write_text(json.dumps(content))

    return change


def linked(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).symlink_to(folder.parent / "clip" / "pytorch_model.bin")
        index(name)(folder)

    return change


CROSS = {CROSS_TEXT: WEIGHTS[CROSS_TEXT], CROSS_IMAGE: WEIGHTS[CROSS_IMAGE]}
LAYERS = {name: None for name in WEIGHTS if name.startswith("model.layers.") and not name.endswith("inv_freq")}
# What is wrong -> how the folder is written, what is changed in it then, and parts of the message (F is the folder).
WRONG: dict[str, tuple[dict[str, Any], Callable[[Path], None] | None, tuple[str, ...]]] = {
    "missing": ({"changes": {NORM: None}}, None, ("missing: ['model.norm.weight']", "Nothing was written")),
    "no embeddings": (
        {"changes": {"model.embed_tokens.weight": None}, "config": {"torch_dtype": None}},
        None,
        ("missing: ['model.embed_tokens.weight']",),
    ),
    "unexpected": (
        {"changes": {"model.image_newline": torch.ones(3)}},
        None,
        ("missing: none", "unexpected: ['model.image_newline']"),
    ),
    "wrong shape": (
        {"changes": {UP: torch.ones(2, 2), NORM: torch.ones(48, 1)}},
        None,
        (f"'{UP}: [2, 2], expected [96, 48]'", "'model.norm.weight: [48, 1], expected [48]'"),
    ),
    "a vocabulary of another size": (
        {"changes": {"lm_head.weight": torch.ones(161, 48)}},
        None,
        ("'lm_head.weight: [161, 48], expected [160, 48]'",),
    ),
    "many missing": ({"changes": LAYERS}, None, ("'model.layers.1.input_layernorm.weight'", "and 44 more")),
    "no number": (
        {"changes": {UP: torch.ones(96, 48, dtype=torch.uint8)}},
        None,
        ("quantised?", f"['{UP}: torch.uint8"),
    ),
    "no cross tokens": ({"cross": "nowhere"}, None, ("cross_tokens.bin", "--no-cross-tokens")),
    "one cross token": ({"changes": {CROSS_TEXT: None}}, None, ("F/cross_tokens.bin", "['model.cross_text']")),
    "one cross token inside": ({"changes": {CROSS_IMAGE: None}, "cross": "inside"}, None, ("F;", f"['{CROSS_IMAGE}']")),
    "more than cross tokens": (
        {},
        put("cross_tokens.bin", {**CROSS, "lm_head.weight": torch.ones(2)}),
        ("F/cross_tokens.bin", "['lm_head.weight']", f"['model.cross_text', '{CROSS_IMAGE}']"),
    ),
    "cross tokens twice": (
        {},
        put("cross_tokens.bin", {**CROSS, "module.model.cross_text": torch.ones(2)}),
        ("'text'", "['model.cross_text', 'module.model.cross_text']"),
    ),
    "cross tokens of another model": (
        {"changes": {CROSS_TEXT: torch.ones(1, 5, 48)}},
        None,
        ("F/cross_tokens.bin", "model.cross_text", "(1, 5, 48)", "(1, 6, 48)"),
    ),
    "code": ({}, put(SHARD, {"x": Evil()}), (f"F/{SHARD}", "weights_only=True")),
    "no state dict": ({}, put(SHARD, [1]), (f"F/{SHARD}", "expected only tensors", "list")),
    "more than tensors": ({}, put(SHARD, {"step": 3}), ("expected only tensors", "['step']")),
    "an empty file": ({}, put(SHARD), (f"F/{SHARD}", "truncated")),
    "a truncated file": ({}, cut(SHARD), (f"F/{SHARD}", "truncated")),
    "a truncated safetensors file": (
        {"kind": "safetensors"},
        cut("model-00001-of-00003.safetensors"),
        ("F/model-00001-of-00003.safetensors", "truncated"),
    ),
    "a shard missing": ({}, remove(SHARD), (f"['{SHARD}']", "pytorch_model.bin.index.json")),
    "a key in two files": (
        {"files": 1},
        put("pytorch_model_2.bin", {NORM: torch.ones(48)}),
        ("F/pytorch_model_2.bin", "['model.norm.weight']"),
    ),
    "no weights": ({"files": 1}, remove("pytorch_model.bin"), ("F has no weights", "model*.safetensors")),
    "LoRA": ({}, put("adapter_config.json", b"{}"), ("['adapter_config.json']", "merge_lora_weights.py")),
    "what LoRA trained beside": ({}, put("non_lora_trainables.bin"), ("['non_lora_trainables.bin']", "merge")),
    "no config": ({}, remove("config.json"), ("F has no config.json",)),
    "transformers' layout": ({}, edit(text_config={}), ("transformers' layout", "from_pretrained")),
    "another family": ({}, edit(model_type="llava_mpt"), ("F/config.json", "'llava_mpt'", "'llava_llama'")),
    "sizes missing": ({}, edit(hidden_size=None, vocab_size=None), ("F/config.json", "hidden_size, vocab_size")),
    "another projector": ({}, edit(mm_projector_type="linear"), ("F/config.json", "'linear'", "'mlp2x_gelu'")),
    "tokens around images": ({}, edit(mm_use_im_start_end=True), ("F/config.json", "mm_use_im_start_end")),
    "another feature": ({}, edit(mm_vision_select_feature="cls"), ("'cls'", "'patch'")),
    "no vision tower": (
        {"inside": False, "config": {"mm_vision_tower": "openai/clip-vit-large-patch14-336"}},
        None,
        ("'openai/clip-vit-large-patch14-336'", "has no vision tower inside", "--vision-tower FOLDER"),
    ),
    "an unknown vision tower": (
        {"config": {"mm_vision_tower": "/data/my_tower"}},
        None,
        ("'/data/my_tower'", "does not say how it is built", "--vision-tower FOLDER"),
    ),
    "no name of a vision tower": (
        {"inside": False, "config": {"mm_vision_tower": None}},
        None,
        ("'None'", "--vision-tower FOLDER"),
    ),
    "a vision tower of another kind": (
        {},
        lambda folder: (folder.parent / "clip" / "config.json").write_text('{"model_type": "siglip"}') and None,
        ("'siglip'", "expected 'clip'"),
    ),
    "a vision tower without configuration": (
        {},
        lambda folder: (folder.parent / "clip" / "config.json").unlink(),
        ("clip has no config.json", "expected a CLIP"),
    ),
    "NaN": ({"changes": {UP: torch.full((96, 48), torch.nan)}}, None, (f"{UP} is not finite", "F/pytorch_model-")),
    "NaN in cross tokens": (
        {"changes": {CROSS_TEXT: torch.full((1, 6, 48), torch.inf)}},
        None,
        ("F/cross_tokens.bin: model.cross_text is not finite",),
    ),
    "sparse": ({}, put(SHARD, {NORM: torch.ones(48).to_sparse()}), (f"F/{SHARD}", f"{NORM}: sparse")),
    "no numbers": ({}, put(SHARD, {NORM: torch.ones(48, device="meta")}), (f"F/{SHARD}", f"{NORM}: on the meta")),
    "quantised": (
        {},
        quantise,
        (f"F/{SHARD}", f"{NORM}: torch.qint8"),
    ),
    "much in little": ({}, squeeze(SHARD), (f"F/{SHARD}", "expands from", "torch.load if you trust it")),
    "keys that are no names": ({}, put(SHARD, {1: torch.ones(2)}), (f"F/{SHARD}", "not a state dict")),
    "an index with a way out": ({}, index("../clip/pytorch_model.bin"), ("index.json names ['../clip", "no links")),
    "an index with an absolute path": ({}, index("/etc/passwd"), ("index.json names ['/etc/passwd']",)),
    "an index with a link": ({}, linked("pytorch_model-link.bin"), ("names ['pytorch_model-link.bin']",)),
    "an index of numbers": ({}, index(3), ("pytorch_model.bin.index.json has no weight_map",)),
    "an index that is a list": ({}, put("pytorch_model.bin.index.json", b"[]"), ("index.json contains a list",)),
    "an index that is no JSON": ({}, put("pytorch_model.bin.index.json", b"\xff{"), ("index.json is not JSON",)),
    "a configuration that is no JSON": ({}, put("config.json", b"{,"), ("F/config.json is not JSON",)),
    "a layer that is not there": (
        {},
        edit(mm_vision_select_layer=999),
        ("F/config.json has mm_vision_select_layer 999", "4 blocks, so expected -5 to 4"),
    ),
    "a layer in words": ({}, edit(mm_vision_select_layer="-2"), ("mm_vision_select_layer '-2': expected a whole",)),
    "negative heads": ({}, edit(num_attention_heads=-4), ("num_attention_heads -4: expected a whole number from 1",)),
    "heads that do not divide": ({}, edit(num_attention_heads=7), ("num_attention_heads 7", "divide")),
    "heads in a fraction": ({}, edit(num_key_value_heads=2.0), ("num_key_value_heads 2.0",)),
    "a million blocks": ({}, edit(num_hidden_layers=10**6), ("F/config.json: 1000004 blocks",)),
    "text for a truth value": ({}, edit(mm_use_im_start_end="false"), ("mm_use_im_start_end 'false': expected true",)),
    "an infinite epsilon": ({}, edit(rms_norm_eps=float("inf")), ("rms_norm_eps inf: expected a number above 0",)),
    "a feature in a list": ({}, edit(mm_vision_select_feature=["patch"]), ("mm_vision_select_feature ['patch']",)),
    "a dtype of its own": ({}, edit(torch_dtype="float3"), ("torch_dtype 'float3': expected a dtype",)),
    "an unknown activation": ({}, edit(hidden_act="magic"), ("F/config.json: transformers cannot make this model",)),
    "a generation setting that is no object": (
        {},
        put("generation_config.json", b"3"),
        ("F/generation_config.json contains a int",),
    ),
    "a damaged tokenizer": ({}, put("tokenizer.json", b"{}"), ("F/tokenizer.json is not a tokenizer",)),
    "a damaged setting of the tokenizer": (
        {"tokenizer": True},
        put("tokenizer_config.json", b"x"),
        ("F/tokenizer_config.json is not JSON",),
    ),
    "a vision tower with negative heads": (
        {},
        lambda folder: (
            (folder.parent / "clip" / "config.json").write_text(
                '{"model_type": "clip", "vision_config": {"num_attention_heads": -4}}'
            )
            and None
        ),
        ("clip/config.json has num_attention_heads -4",),
    ),
    "a larger tokenizer": ({}, lambda folder: write_tokenizer(folder, ROWS + 2), ("160", "['w160', 'w161']")),
    "a tokenizer that cannot be loaded": (
        {},
        put("tokenizer.model", b"x"),
        ("F has a tokenizer.model", "pip install sentencepiece protobuf"),
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_wrong_is_said_and_nothing_written(
    wrong: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    layout, change, parts = WRONG[wrong]
    folder, out = write_original(tmp_path / "original", **layout), tmp_path / "out"
    if change is not None:
        change(folder)
    assert convert(folder, out) == 2
    captured = capsys.readouterr()
    for part in parts:
        assert part in captured.err.replace(str(folder), "F")
    assert captured.out == ""
    assert not out.exists()


def test_where_it_goes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = write_original(tmp_path / "original", tokenizer=True, files=1), tmp_path / "out"
    assert convert(folder, out, "--max-shard-size", "100KB") == 0
    (out / "notes.txt").write_text("mine")
    assert convert(folder, out) == 2
    told = capsys.readouterr().err
    assert f"{out} is not empty: give another folder, or --overwrite to replace an earlier conversion" in told
    assert convert(folder, out, "--overwrite", "--no-cross-tokens") == 0
    assert [path.name for path in out.glob("model*")] == ["model.safetensors"]
    assert not (out / saving.FILE).exists()
    assert (out / "notes.txt").read_text() == "mine"
    for home in (folder, tmp_path / "clip"):
        before = {path.name: path.read_bytes() for path in home.iterdir()}
        assert convert(folder, home, "--overwrite") == 2
        assert f"{home} is one of the folders to read from" in capsys.readouterr().err
        assert {path.name: path.read_bytes() for path in home.iterdir()} == before
    assert convert(folder, out / "notes.txt") == 2
    assert "notes.txt is a file: give a folder" in capsys.readouterr().err
    assert convert(tmp_path / "nowhere", tmp_path / "new") == 2
    assert "nowhere is not a folder" in capsys.readouterr().err


def contents(folder: Path) -> dict[str, bytes]:
    """Of all files below a folder, hidden ones included."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_only_what_a_conversion_wrote_is_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = write_original(tmp_path / "original", tokenizer=True), tmp_path / "out"
    assert convert(folder, out, "--max-shard-size", "100KB") == 0
    mine = ("model-00001-of-00099.safetensors", "model_backup.safetensors", "tokenizer.model", "deep/notes.txt")
    for name in mine:
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text("mine")
    assert convert(folder, out, "--overwrite") == 0
    assert {name: content for name, content in contents(out).items() if content == b"mine"}.keys() == set(mine)
    assert sorted(path.name for path in out.glob("model-*")) == [mine[0]]
    check_logits_after_load(out)
    # A file in the way that no conversion wrote.
    (out / "crossget_manifest.json").unlink()
    before = contents(tmp_path)
    capsys.readouterr()
    assert convert(folder, out, "--overwrite") == 2
    told = capsys.readouterr().err
    assert f"{out} has files that no conversion wrote there: [" in told
    assert "'config.json'" in told
    assert contents(tmp_path) == before


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("old", [True, False])
def test_what_stops_in_the_middle_changes_nothing(
    error: BaseException, old: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, out = write_original(tmp_path / "original", tokenizer=True), tmp_path / "out"
    if old:
        assert convert(folder, out) == 0
    before = contents(tmp_path)

    def stop(*_: Any) -> None:
        raise error

    for where in ("crossget.checkpoints.processor.write_processor", "crossget.core.files.os.fsync"):
        monkeypatch.setattr(where, stop)
        assert convert(folder, out, "--overwrite", "--dtype", "float16") == (2 if isinstance(error, OSError) else 130)
        assert contents(tmp_path) == before
        monkeypatch.undo()
    assert out.exists() == old
    assert convert(folder, out, "--overwrite") == 0
    check_logits_after_load(out)


@pytest.mark.parametrize("limit", [*(pytest.param(n, marks=pytest.mark.slow) for n in (200, 2_000, 200_000)), 20_000])
def test_a_full_disk_changes_nothing(limit: int, tmp_path: Path) -> None:
    """At any file: no file of the process may grow beyond the limit, in bytes."""
    folder, out = write_original(tmp_path / "original", tokenizer=True), tmp_path / "out"
    assert convert(folder, out) == 0
    assert max(path.stat().st_size for path in out.iterdir()) > 200_000
    before = contents(tmp_path)
    code = (
        "import resource, sys\nfrom crossget import cli\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\nsys.exit(cli.main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, "convert", str(folder), str(out), "--overwrite"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 2, done.stderr
    assert "File too large" in done.stderr
    assert "Traceback" not in done.stderr
    assert contents(tmp_path) == before


def test_what_is_written_is_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = module._write_safetensors

    def damage(path: Path, *rest: Any) -> None:
        write(path, *rest)
        path.write_bytes(path.read_bytes()[:-4])

    monkeypatch.setattr(module, "_write_safetensors", damage)
    assert convert(write_original(tmp_path / "original"), tmp_path / "out") == 2
    assert not (tmp_path / "out").exists()


def test_arguments_that_say_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_original(tmp_path / "original")
    assert convert(folder, tmp_path / "out", "--max-shard-size", "large") == 2
    error = capsys.readouterr().err
    assert "--max-shard-size" in error
    assert "'large'" in error
    assert "GB" in error
    assert convert(folder, tmp_path / "out", "--r", "1,2") == 2
    assert "r lists 2 layers but the tower has 4 blocks" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_command_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        cli.main(["convert", "--help"])
    assert left.value.code == 0
    told = capsys.readouterr().out
    assert "usage: crossget convert" in told
    assert 'crossget.load(model, "OUT")' in told


# Into a model that is there already ----------------------------------------------------------------------------------


def dense(rows: int = ROWS, **settings: Any) -> Any:
    """A LLaVA of the golden sizes with other weights; of the settings, those with "text_" are the language model's."""
    text = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 6, "num_attention_heads": 4}
    text |= {"num_key_value_heads": 4, "rms_norm_eps": 1e-6, "vocab_size": rows, "pad_token_id": 0}
    text |= {name.removeprefix("text_"): settings.pop(name) for name in list(settings) if name.startswith("text_")}
    chosen = {"vision_feature_layer": -2, "vision_feature_select_strategy": "default", "image_token_index": 7}
    parts = {"vision_config": CLIPVisionConfig(**CLIP), "text_config": LlamaConfig(**text)}
    torch.manual_seed(1)
    return LlavaForConditionalGeneration(LlavaConfig(**parts, **{**chosen, **settings})).eval()


def state_of(model: nn.Module) -> State:
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_model_with_the_checkpoint_computes_what_the_reference_did(layout: str, tmp_path: Path) -> None:
    model = dense()
    if not LAYOUTS[layout].get("inside", True):  # then the model's own stays
        crossget.load_reference(model, write_original(tmp_path / "first")).detach()
    folder = write_original(tmp_path / "original", **LAYOUTS[layout])
    attached = crossget.load_reference(model, folder, crossget.CrossGET(LLAVA["r"]))
    assert crossget.attachment(model) is attached
    check_logits(model, image=7)
    converted = tmp_path / "out"
    convert(folder, converted)
    state = load_file(converted / "crossget.safetensors")
    assert all(torch.equal(value, state[name]) for name, value in attached.cross_tokens.items())


def test_r_is_the_reference_s_unless_attached(tmp_path: Path) -> None:
    folder = write_original(tmp_path / "original")
    attached = crossget.load_reference(dense(), str(folder))
    assert {name: reducer.r for name, reducer in attached.reducers.items()} == {"visual": 13, "text": 0}
    model = dense()
    attached = crossget.attach(model, crossget.CrossGET(LLAVA["r"]))
    assert crossget.load_reference(model, folder) is attached
    check_logits(model, image=7)
    with pytest.raises(ValueError, match="attached.*`reducer`"):
        crossget.load_reference(model, folder, crossget.CrossGET(3))


def test_a_larger_vocabulary_keeps_its_other_rows(tmp_path: Path) -> None:
    model = dense(rows=192)
    before = [model.get_input_embeddings().weight.clone(), model.get_output_embeddings().weight.clone()]
    crossget.load_reference(model, write_original(tmp_path / "original"), crossget.CrossGET(LLAVA["r"]))
    after = [model.get_input_embeddings().weight, model.get_output_embeddings().weight]
    assert all(torch.equal(a[ROWS:], b[ROWS:]) for a, b in zip(after, before, strict=True))
    check_logits(model, image=7)


def test_a_model_of_other_numbers(tmp_path: Path) -> None:
    model = dense().bfloat16()
    attached = crossget.load_reference(model, write_original(tmp_path / "original"))
    assert {value.dtype for value in [*model.parameters(), *attached.parameters()]} == {torch.bfloat16}


# What does not fit -> how the folder is written, the model's settings, and parts of the message (F is the folder).
MISFITS: dict[str, tuple[dict[str, Any], dict[str, Any], tuple[str, ...]]] = {
    "missing": ({"changes": {NORM: None}}, {}, ("F", "missing: ['model.norm.weight'", "Nothing was loaded")),
    "unexpected": ({"changes": {"x": torch.ones(1)}}, {}, ("unexpected: ['x']", "Nothing was loaded")),
    "wrong shape": ({"changes": {UP: torch.ones(2, 2)}}, {}, (f"'{UP}: [2, 2], expected [96, 48]'",)),
    "a smaller vocabulary": (
        {},
        {"rows": 128},
        ("embed_tokens.weight: [160, 48], expected [128, 48]", "lm_head.weight: [160, 48], expected [128, 48]"),
    ),
    "no cross tokens": ({"cross": "nowhere"}, {}, ("F has no cross_tokens.bin", "crossget.attach")),
    "cross tokens": (
        {"changes": {CROSS_IMAGE: torch.ones(4, 64)}},
        {},
        (f"F/cross_tokens.bin: {CROSS_IMAGE}", "(4, 64)", "(1, 4, 64)"),
    ),
    "heads": (
        {},
        {"text_num_attention_heads": 8, "text_num_key_value_heads": 8},
        ("num_attention_heads is 8, expected 4", "num_key_value_heads is 8, expected 4"),
    ),
    "layers": ({}, {"vision_feature_layer": -1}, ("vision_feature_layer is -1, expected -2", "Nothing was loaded")),
    "rope": ({"config": {"rope_theta": 5e5}}, {}, ("rope_theta is 10000.0, expected 500000.0",)),
    "NaN": ({"changes": {UP: torch.full((96, 48), torch.nan)}}, {}, (f"{UP} is not finite",)),
    "NaN in cross tokens": ({"changes": {CROSS_TEXT: torch.full((1, 6, 48), torch.nan)}}, {}, ("is not finite",)),
    "a layer that is not there": (
        {"config": {"mm_vision_select_layer": 999}},
        {"vision_feature_layer": 999},
        ("F/config.json has mm_vision_select_layer 999",),
    ),
    "a tied head": (
        {},
        {"tie_word_embeddings": True, "text_tie_word_embeddings": True},
        ("ties its head", "tie_word_embeddings=False"),
    ),
    "a tower more than the reducer": ({}, {"reducer": {"visual": crossget.CrossGET(3)}}, ("'visual'", "['text']")),
    "a reducer that cannot work": ({}, {"reducer": crossget.CrossGET((1, 2))}, ("2 layers", "4 blocks")),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_a_model_that_does_not_fit_stays_as_it_is(misfit: str, tmp_path: Path) -> None:
    layout, settings, parts = MISFITS[misfit]
    settings = dict(settings)
    reducer = settings.pop("reducer", None)
    model, folder = dense(**settings), write_original(tmp_path / "original", **layout)
    before = state_of(model)
    with pytest.raises(ValueError) as refused:  # noqa: PT011 (the message is compared below)
        crossget.load_reference(model, folder, reducer)
    for part in parts:
        assert part in str(refused.value).replace(str(folder), "F")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(ValueError, match="is not attached"):
        crossget.attachment(model)


def test_files_that_cannot_be_read_leave_the_model(tmp_path: Path) -> None:
    folder = write_original(tmp_path / "original")
    put(SHARD, {"x": Evil()})(folder)
    model = dense()
    before = state_of(model)
    with pytest.raises(ValueError, match="weights_only=True") as refused:
        crossget.load_reference(model, folder)
    assert isinstance(refused.value.__cause__, pickle.UnpicklingError)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_neither_model_nor_checkpoint(tmp_path: Path) -> None:
    folder = write_original(tmp_path / "original")
    with pytest.raises(TypeError, match=r"Linear.*open_clip\.CLIP"):
        crossget.load_reference(nn.Linear(2, 2), folder)
    with pytest.raises(ValueError, match=r"cross_tokens\.bin is a file.*give the folder"):
        crossget.load_reference(dense(), folder / "cross_tokens.bin")
    with pytest.raises(FileNotFoundError, match="nowhere is neither a file .* nor a folder"):
        crossget.load_reference(dense(), tmp_path / "nowhere")
    open_clip = pytest.importorskip("open_clip.model")
    vision = open_clip.CLIPVisionCfg(layers=1, width=64, head_width=32, patch_size=8, image_size=16)
    text = open_clip.CLIPTextCfg(context_length=8, vocab_size=50, width=64, heads=2, layers=1)
    with pytest.raises(ValueError, match="original is a folder.*give the checkpoint file"):
        crossget.load_reference(open_clip.CLIP(16, vision, text), folder)
