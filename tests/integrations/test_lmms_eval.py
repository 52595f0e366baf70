"""lmms-eval's `--model llava_crossget`: its arguments without lmms-eval, and all of it with the real one."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import hf_models
import numpy as np
import pytest
import torch
from PIL import Image

import crossget
from crossget.core import saving

NEEDED = ("lmms_eval", "decord")
MISSING = [name for name in NEEDED if importlib.util.find_spec(name) is None]
# Where CROSSGET_REQUIRE names it, as in .ci/run, its tests run, and fail if it is not there.
REQUIRED = "lmms_eval" in os.environ.get("CROSSGET_REQUIRE", "").split(",")
with_lmms_eval = pytest.mark.skipif(
    bool(MISSING) and not REQUIRED, reason=f'no {" and no ".join(MISSING)}: pip install "crossget[lmms-eval]"'
)

R = 13  # what is taken where nothing is said
SAVED_R = 3
WORDS = [
    "<pad>",
    "<s>",
    "</s>",
    "<unk>",
    "?",
    "<image>",
    ":",
    "USER",
    "ASSISTANT",
    "what",
    "which",
    "colour",
    "is",
    "it",
]
WORDS += [f"w{i}" for i in range(hf_models.TEXT["vocab_size"] - len(WORDS))]  # type: ignore[operator]


def llava() -> Any:
    """A LLaVA whose images have 64 features, behind four blocks that can lose 13 tokens each."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(**{**hf_models.VISION, "image_size": 64, "num_hidden_layers": 5}, projection_dim=16)
    config = LlavaConfig(
        vision_config=vision,
        text_config=LlamaConfig(**hf_models.TEXT),
        image_token_index=hf_models.IMAGE,
        image_seq_length=64,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # the usual 0.02 makes all images, and all answers, alike
            if parameter.ndim > 1:
                sharp = 3 if "q_proj" in name or "k_proj" in name else 1
                parameter.normal_(0, sharp * parameter[0].numel() ** -0.5)
        model.get_output_embeddings().weight[: WORDS.index("ASSISTANT") + 1] = 0  # an answer has words only
    return model


def give_cross_tokens(attached: crossget.Attachment) -> crossget.Attachment:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in attached.parameters():
            parameter.normal_(0, 0.3, generator=generator)
    return attached


def save_trained(folder: Path) -> None:
    """A model with trained cross tokens beside it, as `crossget convert` leaves it."""
    model = llava()
    model.save_pretrained(folder)
    with crossget.attach(model, crossget.CrossGET(r=SAVED_R)) as attached:
        give_cross_tokens(attached).save(folder)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    llava().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    save_trained(folder)
    return folder


# Arguments, on a stand-in for lmms-eval's class ----------------------------------------------------------------------


class Processor:
    """What LlavaCrossget uses of transformers' LlavaProcessor: it shows what it gets."""

    def __init__(self) -> None:
        self.image_processor = type("ImageProcessor", (), {"image_mean": [0.5, 0.25, 0.0]})()
        self.tokenizer = "the tokenizer"

    def __call__(self, **given: Any) -> dict[str, Any]:
        return given


class StandIn:
    """What LlavaCrossget uses of lmms-eval's chat LlavaHf."""

    is_simple = False

    def __init__(self, pretrained: str, revision: str, device: str, device_map: str, batch_size: int, **more: Any):
        assert more.keys() <= {"use_cache"}, f"Unexpected kwargs: {more}"
        self.given = {"revision": revision, "device": device, "device_map": device_map, **more}
        self.model = self.load(pretrained)
        self._image_processor: Any = Processor()

    def load(self, pretrained: str) -> Any:
        from transformers import LlavaForConditionalGeneration

        return LlavaForConditionalGeneration.from_pretrained(pretrained)

    def generate_until(self, requests: list[dict[str, Any]]) -> list[str]:
        return [self.answer(request) for request in requests]

    def answer(self, request: dict[str, Any]) -> str:
        try:
            return str(self.model.generate(**request, max_new_tokens=2, pad_token_id=0).shape[1])
        except Exception:
            return ""


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """crossget.integrations.lmms_eval_llava, where lmms-eval is the stand-in, installed or not."""
    fakes: dict[str, Any] = {
        name: ModuleType(name)
        for name in (
            "lmms_eval",
            "lmms_eval.models",
            "lmms_eval.models.chat",
            "lmms_eval.models.chat.llava_hf",
            "loguru",
        )
    }
    fakes["lmms_eval.models.chat.llava_hf"].LlavaHf = StandIn
    fakes["loguru"].logger = logging.getLogger("stand-in for loguru")
    for name, fake in fakes.items():
        monkeypatch.setitem(sys.modules, name, fake)
    name = "crossget.integrations.lmms_eval_llava"
    monkeypatch.delitem(sys.modules, name, raising=False)
    yield importlib.import_module(name)
    sys.modules.pop(name, None)


def test_the_manifest_names_the_class(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from crossget.integrations.lmms_eval import manifest

    registry: Any = ModuleType("lmms_eval.models.registry_v2")
    registry.ModelManifest = dict
    monkeypatch.setitem(sys.modules, registry.__name__, registry)
    home = "crossget.integrations.lmms_eval"
    assert manifest() == [
        {"model_id": "llava_crossget", "chat_class_path": f"{module.__name__}.{module.LlavaCrossget.__name__}"},
        {"model_id": "crossget", "chat_class_path": f"{home}_connector.ConnectorCrossget"},
    ]
    assert module.LlavaCrossget.is_simple is False


def test_without_r_it_is_the_references(module: Any, plain: Path) -> None:
    attached = module.LlavaCrossget(str(plain)).attached
    assert isinstance(attached.reducers["visual"], crossget.CrossGET)
    assert {name: reducer.r for name, reducer in attached.reducers.items()} == {"visual": R, "text": 0}
    assert all((p == 0).all() for p in attached.parameters())


@pytest.mark.parametrize(("method", "kind"), [("crossget", crossget.CrossGET), ("tome", crossget.ToMe)])
def test_r_and_method(module: Any, plain: Path, method: str, kind: type) -> None:
    reducer = module.LlavaCrossget(str(plain), r=5, method=method).attached.reducers["visual"]
    assert (type(reducer), reducer.r) == (kind, 5)


@pytest.mark.parametrize(("given", "r"), [({}, SAVED_R), ({"r": 5}, 5)], ids=["saved r", "r"])
def test_saved_cross_tokens(module: Any, trained: Path, given: dict[str, int], r: int) -> None:
    attached = module.LlavaCrossget(str(trained), **given).attached
    assert {name: reducer.r for name, reducer in attached.reducers.items()} == {"visual": r, "text": 0}
    with give_cross_tokens(crossget.attach(llava(), crossget.CrossGET(r=r))) as expected:
        assert attached.reducers == expected.reducers
        assert attached.cross_tokens.keys() == {"visual", "text"}
        for name, tokens in expected.cross_tokens.items():
            assert torch.equal(attached.cross_tokens[name], tokens)


def test_a_saved_r_of_zero_keeps_the_cross_tokens(module: Any, tmp_path: Path) -> None:
    save_trained(tmp_path)
    reducers, tokens, _ = saving.read(tmp_path)
    saving.write(tmp_path, {**reducers, "visual": dataclasses.replace(reducers["visual"], r=0)}, tokens)
    attached = module.LlavaCrossget(str(tmp_path)).attached
    assert attached.reducers["visual"].r == 0
    assert (attached.cross_tokens["visual"] != 0).any()


@pytest.mark.parametrize("method", ["crossget", "tome"])
def test_r_of_zero_is_the_dense_model(module: Any, trained: Path, method: str) -> None:
    lm = module.LlavaCrossget(str(trained), r=0, method=method)
    assert lm.attached is None
    with pytest.raises(ValueError, match="not attached"):
        crossget.attachment(lm.model)


def test_tome_has_no_use_for_saved_cross_tokens(module: Any, trained: Path) -> None:
    attached = module.LlavaCrossget(str(trained), method="tome").attached
    assert (attached.reducers["visual"].r, attached.cross_tokens) == (R, {})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"r": -1.0}, "r=-1.0: .*r=13, or no r"),
        ({"r": -1}, "r=-1: expected"),
        ({"r": 13.0}, "r=13.0: expected"),
        ({"r": True}, "r=True: expected"),
        ({"r": "None"}, "r='None': expected"),
        ({"method": "pitome"}, "method='pitome': .*crossget, tome"),
        ({"image_aspect_ratio": "anyres"}, "image_aspect_ratio='anyres': .*pad or crop"),
        ({"batch_size": 8}, "batch_size 8: .*one question at a time, --batch_size 1"),
        ({"batch_size": "auto"}, "batch_size auto: "),
        ({"pretrained": "/nowhere/at/all"}, "pretrained=/nowhere/at/all: .*folder.*id"),
    ],
)  # fmt: skip
def test_bad_values(
    module: Any, monkeypatch: pytest.MonkeyPatch, plain: Path, given: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr(StandIn, "load", lambda *_: pytest.fail("weights were loaded before the arguments were read"))
    with pytest.raises(ValueError, match=message):
        module.LlavaCrossget(**{"pretrained": str(plain), **given})


def test_everything_else_is_for_lmms_evals_class(module: Any, plain: Path) -> None:
    lm = module.LlavaCrossget(str(plain), batch_size="1", use_cache=False, revision="v1")
    assert lm.given["use_cache"] is False
    assert lm.given["revision"] == "v1"
    with pytest.raises(AssertionError, match="Unexpected kwargs: {'max_batch_size': 4}"):
        module.LlavaCrossget(str(plain), max_batch_size=4)


@pytest.mark.parametrize(
    ("world", "given", "device_map"),
    [("1", {}, "cpu"), ("1", {"device_map": "auto"}, "auto"), ("2", {}, ""), ("2", {"device_map": "auto"}, "auto")],
)
def test_device_map(
    module: Any, monkeypatch: pytest.MonkeyPatch, plain: Path, world: str, given: dict[str, str], device_map: str
) -> None:
    monkeypatch.setenv("WORLD_SIZE", world)
    assert module.LlavaCrossget(str(plain), r=0, device="cpu", **given).given["device_map"] == device_map


def test_images_are_filled_up_to_squares(module: Any, plain: Path) -> None:
    """As LLaVA-1.5's own evaluation does it: the image in the middle, the mean colour around it."""
    processor = module.LlavaCrossget(str(plain), r=0)._image_processor
    assert processor.tokenizer == "the tokenizer"
    wide, high = Image.new("RGB", (7, 4), (9, 8, 7)), Image.new("L", (3, 6), 200)
    found = processor(images=[wide, high], text="what", videos=None)
    assert (found["text"], found["videos"]) == ("what", None)
    a, b = (np.asarray(image) for image in found["images"])
    expected = np.full((7, 7, 3), (127, 63, 0))
    expected[1:5] = (9, 8, 7)
    assert (a == expected).all()
    expected = np.full((6, 6, 3), (127, 63, 0))
    expected[:, 1:4] = 200
    assert (b == expected).all()
    assert processor(text="no image")["images"] is None


def test_images_are_left_to_the_processor(module: Any, plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(module.LlavaCrossget(str(plain), r=0, image_aspect_ratio="crop")._image_processor, Processor)
    other = llava()
    other.config.model_type = "llava_next"
    monkeypatch.setattr(StandIn, "load", lambda self, _: other)
    assert isinstance(module.LlavaCrossget(str(plain), r=0)._image_processor, Processor)


@pytest.mark.parametrize("r", [0, 5])
def test_a_failure_ends_the_run(module: Any, plain: Path, r: int) -> None:
    lm = module.LlavaCrossget(str(plain), r=r)
    before = lm.model.__dict__.get("generate")
    ids = torch.tensor([[1, *[hf_models.IMAGE] * 64, 20]])
    good, bad = ({"input_ids": i, "pixel_values": torch.zeros(1, 3, 64, 64)} for i in (ids, ids[:, :-2]))
    assert lm.generate_until([good]) == ["68"]
    with pytest.raises(RuntimeError, match="llava_crossget could not answer: .*image") as caught:
        lm.generate_until([good, bad, good])
    assert isinstance(caught.value.__cause__, ValueError)
    assert lm.model.__dict__.get("generate") is before
    assert lm.generate_until([good]) == ["68"]


def test_loglikelihood_is_refused(module: Any, plain: Path) -> None:
    with pytest.raises(NotImplementedError, match="output_type generate_until"):
        module.LlavaCrossget(str(plain), r=0).loglikelihood([])


# From the hub --------------------------------------------------------------------------------------------------------

REPO, COMMIT = "someone/llava", "0" * 40


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: Any) -> Path:
    """The folder of REPO in a cache of its own; the hub is out of reach, as in all tests."""
    for name in ("hf_hub_download", "try_to_load_from_cache"):
        monkeypatch.setattr(module, name, partial(getattr(module, name), cache_dir=tmp_path))
    folder = tmp_path / "models--someone--llava"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(COMMIT)
    return folder


def test_cross_tokens_from_the_hub(module: Any, cache: Path, trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = cache / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (snapshot / saving.FILE).write_bytes((trained / saving.FILE).read_bytes())
    monkeypatch.setattr(StandIn, "load", lambda self, _: llava())
    attached = module.LlavaCrossget(REPO).attached
    assert attached.reducers["visual"].r == SAVED_R
    assert (attached.cross_tokens["visual"] != 0).any()


def test_the_hub_is_known_to_have_none(
    module: Any, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    nothing = cache / ".no_exist" / COMMIT
    nothing.mkdir(parents=True)
    (nothing / saving.FILE).touch()
    monkeypatch.setattr(StandIn, "load", lambda self, _: llava())
    assert module.LlavaCrossget(REPO).attached.reducers["visual"].r == R
    assert not caplog.records


def test_the_hub_is_out_of_reach(
    module: Any, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(StandIn, "load", lambda self, _: llava())
    assert module.LlavaCrossget(REPO).attached.reducers["visual"].r == R
    assert "cannot be asked whether someone/llava has a crossget.safetensors" in caplog.text


def test_the_hub_has_none(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*_: Any, **__: Any) -> str:
        raise module.EntryNotFoundError("404")

    monkeypatch.setattr(module, "hf_hub_download", download)
    assert module._saved(REPO, "main") is None


# With lmms-eval ------------------------------------------------------------------------------------------------------

TEMPLATE = (  # of llava-hf/llava-1.5-7b-hf, without its {% generation %} marks
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
TASK = """\
task: tiny_vqa
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.doc_to_visual
doc_to_text: "{{{{question}}}} ?"
doc_to_target: answer
generation_kwargs:
  max_new_tokens: 6
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""
UTILS = """\
from PIL import Image


def doc_to_visual(doc):
    return [Image.open(path).convert("RGB") for path in doc["images"]]
"""
QUESTIONS = ["what is it", "which colour is it", "what colour is it", "which is it"]
COUNTS = [1, 1, 2, 1, 1, 2, 1, 1]  # images of a question


def save_processor(folder: Path, **settings: Any) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        model_input_names=["input_ids", "attention_mask"],  # 4.57 gives token_type_ids otherwise, which LLaVA refuses
        additional_special_tokens=["<image>"],
    )
    layout = {"patch_size": 8, "num_additional_image_tokens": 1, "vision_feature_select_strategy": "default"}
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessor(size={"shortest_edge": 64}, crop_size=64),
        tokenizer=tokenizer,
        chat_template=TEMPLATE,
        **{**layout, **settings},
    )
    processor.save_pretrained(folder)


def save_task(folder: Path, counts: list[int], answers: list[str]) -> list[list[Any]]:
    """Noise and questions about it; returns the images."""
    import numpy as np
    from PIL import Image

    folder.mkdir()
    rng = np.random.default_rng(0)
    rows, images = [], []
    for i, count in enumerate(counts):
        images.append([Image.fromarray(rng.integers(0, 256, (72, 80, 3), dtype=np.uint8)) for _ in range(count)])
        paths = [folder / f"{i}_{j}.png" for j in range(count)]
        for image, path in zip(images[-1], paths, strict=True):
            image.save(path)
        rows.append({"images": [*map(str, paths)], "question": QUESTIONS[i % len(QUESTIONS)], "answer": answers[i]})
    (folder / "test.json").write_text("\n".join(map(json.dumps, rows)))
    (folder / "tiny_vqa.yaml").write_text(TASK.format(data=folder / "test.json"))
    (folder / "utils.py").write_text(UTILS)
    return images


def filled_up(picture: Any, means: list[float]) -> Any:
    """The picture, wider than high, in the middle of a square."""
    pixels = np.asarray(picture)
    above = (pixels.shape[1] - pixels.shape[0]) // 2
    square = np.empty((pixels.shape[1], pixels.shape[1], 3), np.uint8)
    square[:] = [int(255 * mean) for mean in means]
    square[above : above + len(pixels)] = pixels
    return Image.fromarray(square)


def answers_of(folder: Path, images: list[list[Any]], attach: Any, crop: bool = False) -> list[str]:
    """What is to be said, by transformers and crossget alone."""
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration.from_pretrained(folder).eval()
    processor = AutoProcessor.from_pretrained(folder)
    attach(model)
    said = []
    for i, pictures in enumerate(images):
        content = [{"type": "image"} for _ in pictures]
        content += [{"type": "text", "text": f"{QUESTIONS[i % len(QUESTIONS)]} ?"}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        if not crop:
            pictures = [filled_up(picture, processor.image_processor.image_mean) for picture in pictures]
        inputs = processor(images=pictures, text=text, return_tensors="pt")
        with torch.inference_mode():
            out = model.generate(**inputs, do_sample=False, max_new_tokens=6)
        answer = out[0, inputs["input_ids"].shape[1] :]
        said.append(processor.tokenizer.decode(answer, skip_special_tokens=True).strip())
    return said


def python(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own and another folder than the checkout, whose crossget.egg-info may be an old one."""
    environment = {**os.environ, "HF_HOME": str(folder / "hf"), "OMP_NUM_THREADS": "1"}
    for name in ("HF_TOKEN", "HF_DATASETS_CACHE", "WORLD_SIZE", "LMMS_EVAL_PLUGINS", "PYTHONPATH"):
        environment.pop(name, None)
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=600
    )


def lmms_eval(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    # DEBUG: otherwise lmms-eval ends with status 0 whatever happens.
    return python(folder, "-m", "lmms_eval", *arguments, "--verbosity", "DEBUG")


@with_lmms_eval
def test_the_entry_point_is_there(tmp_path: Path) -> None:
    done = python(
        tmp_path,
        "-c",
        "from importlib.metadata import entry_points\n"
        "(point,) = entry_points(group='lmms_eval.models', name='llava_crossget')\n"
        "module = __import__('sys').modules[point.load().__module__]\n"
        "print(module.__file__, *(one.model_id for one in point.load()()), sep='\\n')",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    file, *names = done.stdout.splitlines()[-3:]
    assert names == ["llava_crossget", "crossget"]
    assert Path(file).resolve() == Path(crossget.__file__).parent.joinpath("integrations/lmms_eval.py").resolve()


def attach_trained(r: int) -> Any:
    return lambda model: give_cross_tokens(crossget.attach(model, crossget.CrossGET(r=r)))


RUNS = {  # name -> (folder, arguments, what they mean)
    "dense": ("plain", "r=0", lambda model: None),
    "default": ("plain", "", lambda model: crossget.attach(model, crossget.CrossGET(r=R))),
    "r": ("plain", "r=2", lambda model: crossget.attach(model, crossget.CrossGET(r=2))),
    "tome": ("plain", "r=2,method=tome", lambda model: crossget.attach(model, crossget.ToMe(r=2))),
    "trained": ("trained", "", attach_trained(SAVED_R)),
    "trained_r": ("trained", "r=5", attach_trained(5)),
    "trained_dense": ("trained", "r=0", lambda model: None),
    "crop": ("plain", "r=0,image_aspect_ratio=crop", lambda model: None),
}


@pytest.mark.slow
@with_lmms_eval
def test_answers_and_scores(tmp_path: Path, plain: Path, trained: Path) -> None:
    import yaml

    folders = {"plain": plain, "trained": trained}
    for folder in folders.values():
        save_processor(folder)
    images = save_task(tmp_path / "draft", COUNTS, [""] * len(COUNTS))
    expected = {
        name: answers_of(folders[which], images, attach, crop=name == "crop")
        for name, (which, _, attach) in RUNS.items()
    }
    expected["own"] = expected["crop"]
    assert all(all(said) for said in expected.values())
    ways = set(map(tuple, expected.values()))
    assert len(ways) == len(expected) - 2  # each answers in its own way, but the dense ones that see the same
    right = [*expected["r"][:4], *["never"] * 4]
    save_task(tmp_path / "task", COUNTS, right)

    runs = [
        {
            "model": "llava_crossget",
            "model_args": ",".join(filter(None, [f"pretrained={folders[which]}", given])),
            "output_path": str(tmp_path / name),
        }
        for name, (which, given, _) in RUNS.items()
    ]
    own = f"pretrained={plain},device_map=cpu"
    runs.append({"model": "llava_hf", "model_args": own, "output_path": str(tmp_path / "own")})
    common = {"tasks": "tiny_vqa", "include_path": str(tmp_path / "task"), "device": "cpu", "log_samples": True}
    (tmp_path / "runs.yaml").write_text(yaml.safe_dump([{**run, **common} for run in runs]))
    done = lmms_eval(tmp_path, "--config", "runs.yaml")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]

    for name, said in expected.items():
        (results,) = tmp_path.joinpath(name).glob("*/*_results.json")
        (samples,) = tmp_path.joinpath(name).glob("*/*_samples_tiny_vqa.jsonl")
        found = json.loads(results.read_text())
        backend = "crossget.integrations.lmms_eval_llava.LlavaCrossget" if name in RUNS else "lmms_eval.models.chat"
        assert found["config"]["model_backend"].startswith(backend)
        rows = sorted(map(json.loads, samples.read_text().splitlines()), key=lambda row: row["doc_id"])
        assert [row["filtered_resps"] for row in rows] == said, name
        score = sum(a == b for a, b in zip(said, right, strict=True)) / len(right)
        assert found["results"]["tiny_vqa"]["exact_match,none"] == score
    assert score < 0.5  # which is that of "r"
    log = done.stdout + done.stderr
    assert "llava_crossget: the dense model" in log
    assert "llava_crossget: Attachment(visual: " in log
    assert f": CrossGET({SAVED_R}" in log


@pytest.mark.slow
@with_lmms_eval
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("r=-1", "r=-1.0: expected a whole number from 0 on"),
        ("r=2", "llava_crossget could not answer: the prompts have"),
    ],
    ids=["bad value", "generate fails"],
)
def test_errors_end_the_run(tmp_path: Path, given: str, message: str) -> None:
    llava().save_pretrained(tmp_path / "model")
    save_processor(tmp_path / "model", num_additional_image_tokens=0)  # a processor that does not fit: 63 features
    save_task(tmp_path / "task", [1], ["w1"])
    arguments = ["--model", "llava_crossget", "--model_args", f"pretrained={tmp_path / 'model'},{given}"]
    task = ["--tasks", "tiny_vqa", "--include_path", str(tmp_path / "task"), "--device", "cpu"]
    done = lmms_eval(tmp_path, *arguments, *task)
    assert done.returncode == 1
    assert message in done.stderr


# Other models, with their connector attached --------------------------------------------------------------------------

SPECIAL = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>", "<image>", "<video>"]
VLM_WORDS = ["<pad>", "<s>", "</s>", "<unk>", *SPECIAL, *WORDS[6:]]
VLM_TEMPLATE = (
    "{{% for message in messages %}}{{% for content in message['content'] %}}"
    "{{% if content['type'] == 'image' %}}{image}{{% elif content['type'] == 'text' %}}{{{{ content['text'] + ' ' }}}}"
    "{{% endif %}}{{% endfor %}}{{% endfor %}}{{% if add_generation_prompt %}}{{{{ 'ASSISTANT:' }}}}{{% endif %}}"
)


def vlm_tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VLM_WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>",
        additional_special_tokens=SPECIAL,
    )  # fmt: skip


def spread(model: Any) -> Any:
    """The model with weights that tell images apart, and answers of words only."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                scale = 3 if "q_proj" in name or "k_proj" in name else 1
                parameter.normal_(0, scale * parameter[0].numel() ** -0.5, generator=generator)
        model.get_output_embeddings().weight[: len(VLM_WORDS) - 40] = 0
    return model.eval()


def save_qwen(folder: Path) -> None:
    import transformers

    vision = {
        "hidden_size": 32, "intermediate_size": 64, "depth": 2, "num_heads": 4, "patch_size": 14, "window_size": 112,
        "fullatt_block_indexes": [1], "out_hidden_size": 32,
    }  # fmt: skip
    text = {**hf_models.TEXT, "vocab_size": len(VLM_WORDS), "tie_word_embeddings": False}
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    ids = {f"{name}_token_id": VLM_WORDS.index(f"<|{name}_pad|>") for name in ("image", "video")}
    ids |= {f"vision_{name}_token_id": VLM_WORDS.index(f"<|vision_{name}|>") for name in ("start", "end")}
    config = transformers.Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, tie_word_embeddings=False, **ids
    )  # fmt: skip
    spread(transformers.Qwen2_5_VLForConditionalGeneration(config)).save_pretrained(folder)
    transformers.Qwen2_5_VLProcessor(
        image_processor=transformers.Qwen2VLImageProcessor(),
        tokenizer=vlm_tokenizer(),
        video_processor=transformers.Qwen2VLVideoProcessor(),
        chat_template=VLM_TEMPLATE.format(image="<|vision_start|><|image_pad|><|vision_end|>"),
    ).save_pretrained(folder)


def save_onevision(folder: Path) -> None:
    import transformers

    vision = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "image_size": 32, "patch_size": 8, "vision_use_head": False,
    }  # fmt: skip
    text = {**hf_models.TEXT, "vocab_size": len(VLM_WORDS)}
    config = transformers.LlavaOnevisionConfig(
        vision_config=transformers.SiglipVisionConfig(**vision),
        text_config=transformers.Qwen2Config(**text),
        image_token_index=VLM_WORDS.index("<image>"), video_token_index=VLM_WORDS.index("<video>"),
        image_grid_pinpoints=[[32, 64], [64, 32], [64, 64]], vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )  # fmt: skip
    spread(transformers.LlavaOnevisionForConditionalGeneration(config)).save_pretrained(folder)
    transformers.LlavaOnevisionProcessor(
        image_processor=transformers.LlavaOnevisionImageProcessor(
            size={"height": 32, "width": 32}, image_grid_pinpoints=config.image_grid_pinpoints
        ),
        tokenizer=vlm_tokenizer(),
        video_processor=transformers.LlavaOnevisionVideoProcessor(size={"height": 32, "width": 32}),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        chat_template=VLM_TEMPLATE.format(image="<image>"),
    ).save_pretrained(folder)


CONNECTED = {  # name -> (model, how it is saved, its arguments, batch sizes)
    "qwen": ("qwen2_5_vl", save_qwen, "device_map=cpu,min_pixels=3136,max_pixels=12544", (1, 2)),
    "onevision": ("llava_hf", save_onevision, "device_map=cpu", (1,)),
}


@pytest.mark.slow
@with_lmms_eval
@pytest.mark.skipif(hf_models.VERSION < (5, 19), reason="connectors are reduced from transformers 5.19 on")
@pytest.mark.parametrize("name", CONNECTED)
def test_a_model_with_its_connector(tmp_path: Path, name: str) -> None:
    import yaml

    model, save, given, batches = CONNECTED[name]
    save(tmp_path / "model")
    save_task(tmp_path / "task", COUNTS, ["w1"] * len(COUNTS))
    given = f"pretrained={tmp_path / 'model'},{given}"
    common = {"tasks": "tiny_vqa", "include_path": str(tmp_path / "task"), "device": "cpu", "log_samples": True}
    runs = {"own": {"model": model, "model_args": given, "batch_size": "1"}}
    for batch in batches:
        arguments = f"model={model},method=Ward,keep=0.25,{given}"
        runs[f"reduced{batch}"] = {"model": "crossget", "model_args": arguments, "batch_size": str(batch)}
    arguments = f"model={model},keep=1.0,{given}"
    runs["whole"] = {"model": "crossget", "model_args": arguments, "batch_size": "1"}
    written = [{**run, **common, "output_path": str(tmp_path / key)} for key, run in runs.items()]
    (tmp_path / "runs.yaml").write_text(yaml.safe_dump(written))
    done = lmms_eval(tmp_path, "--config", "runs.yaml")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    said = {}
    for key in runs:
        (samples,) = tmp_path.joinpath(key).glob("*/*_samples_tiny_vqa.jsonl")
        rows = sorted(map(json.loads, samples.read_text().splitlines()), key=lambda row: row["doc_id"])
        said[key] = [row["filtered_resps"] for row in rows]
    assert all(said["own"])
    assert said["whole"] == said["own"]
    assert said["reduced1"] != said["own"]
    assert all(said[f"reduced{batch}"] == said["reduced1"] for batch in batches)
    assert "crossget: Attachment(connector: Ward(Keep(0.25" in done.stdout + done.stderr


@pytest.mark.slow
@with_lmms_eval
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("model=qwen2_5_vl,method=Wart", "method=Wart: expected a method of crossget"),
        ("model=qwen2_5_vl,keep=0", "Keep(0): at least one token stays"),
        ("model=crossget", "model=crossget: expected a chat model of lmms-eval"),
    ],
)
def test_wrong_arguments_of_the_wrapper(tmp_path: Path, given: str, message: str) -> None:
    save_task(tmp_path / "task", [1], ["w1"])
    task = ["--tasks", "tiny_vqa", "--include_path", str(tmp_path / "task"), "--device", "cpu"]
    done = lmms_eval(tmp_path, "--model", "crossget", "--model_args", f"{given},pretrained={tmp_path}", *task)
    assert done.returncode == 1
    assert message in done.stderr
