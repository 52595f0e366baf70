"""`crossget show --keep`: the picture of the features behind the connector."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import hf_models
import pytest
import torch
from PIL import Image
from torch import Tensor

import crossget
from crossget.cli import main
from crossget.demo import connector_view, figures
from crossget.demo.compare import Photograph
from crossget.demo.connector_view import ConnectorOptions

pytestmark = pytest.mark.skipif(hf_models.VERSION < (5, 19), reason="connectors are reduced from transformers 5.19 on")

WORDS = ["<pad>", "<s>", "</s>", "<unk>", "?", "<image>", "what", "is", "it"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny LLaVA whose images have 8 x 8 features, and its processor."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    made: Path = tmp_path_factory.mktemp("llava")
    torch.manual_seed(0)
    vision = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 64,
        "patch_size": 8,
    }  # fmt: skip
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**vision),
        text_config=transformers.LlamaConfig(**{**hf_models.TEXT, "vocab_size": 60}),
        image_token_index=5,
    )
    transformers.LlavaForConditionalGeneration(config).save_pretrained(made)
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>",
        additional_special_tokens=["<image>"], model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip
    transformers.LlavaProcessor(
        image_processor=transformers.CLIPImageProcessor(size={"shortest_edge": 64}, crop_size=64), tokenizer=tokenizer,
        patch_size=8, num_additional_image_tokens=1, vision_feature_select_strategy="default",
    ).save_pretrained(made)  # fmt: skip
    return made


def image(path: Path) -> Path:
    """Four areas, each of one colour."""
    pixels = torch.tensor([[[250, 0, 0], [0, 250, 0]], [[0, 0, 250], [250, 250, 0]]], dtype=torch.uint8)
    Image.fromarray(pixels.repeat_interleave(40, 0).repeat_interleave(40, 1).numpy()).save(path)
    return path


def test_the_features_are_drawn_on_the_image(folder: Path, tmp_path: Path) -> None:
    options = ConnectorOptions(
        image(tmp_path / "a.png"), str(folder), crossget.Keep(16), ("ward", "topk"), "what is it ?", tmp_path / "p.png"
    )
    view = connector_view.run(options, log=lambda _: None)
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    assert {name: [len(unit.kept) for unit in units] for name, units in view.units.items()} == {
        "ward": [16],
        "topk": [16],
    }
    (shown,) = view.pictures
    assert shown.shape == (64, 64, 3)
    colours = shown[[16, 16, 48, 48], [16, 48, 16, 48]]  # in the middle of each area
    assert (colours - torch.tensor([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0.0]])).abs().max() < 0.1
    (unit,) = view.units["topk"]
    assert unit.grid == (8, 8)
    figure = view.picture()
    drawn = panels(figure)
    assert len(drawn) == 4  # the image and what is left of it, twice
    dark = drawn[3].reshape(8, drawn[3].shape[0] // 8, 8, -1, 3)[:, 3, :, 3]
    light = drawn[2].reshape(8, drawn[2].shape[0] // 8, 8, -1, 3)[:, 3, :, 3]
    dropped = (unit.source < 0).reshape(8, 8)
    assert torch.equal(dark.sum(-1) < 0.9 * light.sum(-1), dropped)


def panels(figure: Any) -> list[Tensor]:
    """[H, W, 3] each, row by row."""
    return [torch.as_tensor(axes.images[0].get_array()) for axes in figure.axes]


def test_the_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    png = tmp_path / "b.png"
    given = ["show", str(image(tmp_path / "a.png")), "--model", str(folder), "--methods", "topk"]
    assert main([*given, "--keep", "0.25", "--text", "what is it ?", "--png", str(png)]) == 0
    assert capsys.readouterr().out == "topk: 64 to 16 image features\n"
    assert png.exists()
    for more, message in (
        (["--png", str(png), "--r", "4"], "--r is for a model of open_clip or timm"),
        ([], "--keep draws a picture: give --png FILE"),
        (["--png", str(tmp_path / "a.png")], "it exists, and crossget did not write it"),
        (["--png", str(png), "--text", "one", "two"], "one question as --text at most"),
    ):
        assert main([*given, "--keep", "0.25", *more]) == 2
        assert message in capsys.readouterr().err
    assert main(["show", "--keep", "4", "--png", str(png)]) == 2
    assert "give a folder or hub id" in capsys.readouterr().err


def test_a_unit_without_a_grid_cannot_be_drawn() -> None:
    from crossget.core.connector import FACTS, reduce_features

    unit = reduce_features(crossget.Ward(1).resolved(FACTS), torch.randn(7, 4), 3)
    with pytest.raises(ValueError, match="7 image features lies on no known grid"):
        connector_view._grid(unit)
    with pytest.raises(ValueError, match="each of the 3 units shows is not known"):
        connector_view._pictures(None, {"pixel_values": torch.zeros(48, 12)}, None, 3)  # type: ignore[arg-type]
    packed = {"pixel_values": torch.zeros(48, 12)}
    photograph = Photograph("a", "", "", Image.new("RGB", (6, 4), (255, 0, 0)))
    (whole,) = connector_view._pictures(None, packed, photograph, 1)
    assert torch.equal(whole, torch.tensor([1.0, 0, 0]).expand(4, 6, 3))
    assert figures.draw_rows("a", "b", [("c", [figures.Panel(torch.zeros(4, 4, 3))])], []).axes
