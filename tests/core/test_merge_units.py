"""Merging inside packed towers by merge units, against a tower that keeps every unit and copies the merged ones."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import pytest
import torch
import transformers
from hf_models import VERSION
from torch import Tensor

import crossget

pytestmark = pytest.mark.skipif(VERSION < (5, 0), reason="the towers' blocks take other arguments before 5.0")

TEXT = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 60, "pad_token_id": 0,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
}  # fmt: skip
IDS = {"image_token_id": 50, "video_token_id": 51, "vision_start_token_id": 52, "vision_end_token_id": 53}
VISION = {"depth": 4, "num_heads": 4, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}
OWN: dict[str, dict[str, Any]] = {
    "Qwen2VL": {"embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2},
    "Qwen2_5_VL": {
        "hidden_size": 32, "intermediate_size": 64, "out_hidden_size": 32, "window_size": 16,
        "fullatt_block_indexes": [0, 1, 2, 3],
    },
    "Qwen3VL": {
        "hidden_size": 32, "intermediate_size": 64, "out_hidden_size": 32, "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0, 2],
    },
}  # fmt: skip
GRID = torch.tensor([[1, 8, 12], [1, 4, 8], [1, 8, 8]])


def model(family: str, **vision: Any) -> Any:
    config = getattr(transformers, f"{family}Config")(
        vision_config={**VISION, **OWN[family], **vision}, text_config=TEXT, **IDS
    )
    torch.manual_seed(0)
    made = getattr(transformers, f"{family}ForConditionalGeneration")(config).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(parameter + 0.1 * torch.randn_like(parameter))
    return made


def images(grid: Tensor = GRID) -> dict[str, Tensor]:
    count = int(grid.prod(1).sum())
    pixels = torch.randn(count, 3 * 2 * 4 * 4, generator=torch.Generator().manual_seed(1))
    return {"pixel_values": pixels, "image_grid_thw": grid}


def features(made: Any, grid: Tensor = GRID) -> list[Tensor]:
    """[n, C] per image, and those of deepstack."""
    with torch.no_grad():
        out = made.get_image_features(**images(grid), return_dict=True)
    return [*out.pooler_output, *itertools.chain(*(getattr(out, "deepstack_features", None) or []))]


class Copies:
    """Hooks that keep all units: after each block, the members of a merged unit become copies of it."""

    def __init__(self, tower: Any, reducer: Any, r: Callable[[int, int], int]) -> None:
        self.reducer, self.r = reducer, r
        self.place: list[Tensor] = []  # per image [U] the unit that each one is part of
        for layer, block in enumerate(tower.blocks):
            block.register_forward_pre_hook(self.before, with_kwargs=True)
            if layer < len(tower.blocks) - 1:
                block.register_forward_hook(partial(self.after, layer))

    def before(self, _: Any, args: Any, kwargs: Any) -> Any:
        if not self.place:
            return None
        rows = torch.cat([place + at for place, at in zip(self.place, self.starts(), strict=True)])
        rows = (rows[:, None] * 4 + torch.arange(4)).flatten()
        return args, {**kwargs, "position_embeddings": tuple(t[rows] for t in kwargs["position_embeddings"])}

    def starts(self) -> list[int]:
        return [0, *itertools.accumulate(len(place) for place in self.place)][:-1]

    def after(self, layer: int, _: Any, args: Any, out: Tensor) -> Tensor:
        counts = [int(n) // 4 for n in GRID.prod(1)]
        self.place = self.place or [torch.arange(n) for n in counts]
        parts = []
        for number, units in enumerate(out.view(-1, 4 * out.shape[1]).split(counts)):
            place = self.place[number]
            heads, sizes = place.unique(return_counts=True)
            tokens = units[heads][None]
            view = crossget.methods.reducers.View(
                tokens, tokens[:, None], tokens[:, None], None, sizes[None].float(),
                torch.zeros(1, len(heads), dtype=torch.bool), 0,
            )  # fmt: skip
            new, _, plan = self.reducer.reduce(view, self.r(layer, len(heads)))
            into = plan.index[0][torch.searchsorted(heads, place)]
            self.place[number] = heads[plan.kept[0]][into]
            parts.append(new[0][into])
        return torch.cat(parts).view_as(out)


@pytest.mark.parametrize(
    "method", [crossget.Ward, partial(crossget.ToMe, keys="tokens"), partial(crossget.Random, seed=3)]
)
@pytest.mark.parametrize("family", OWN)
def test_equals_copies_of_the_merged_units(family: str, method: Any) -> None:
    """Attention over copies is attention with log(size), and rotary tables follow the destination."""
    made = model(family)
    with crossget.attach(made, method(crossget.Ratio(0.3))) as attached:
        found, tokens = features(made), attached.tokens["visual"]
    Copies(made.model.visual, attached.reducer, lambda layer, count: int(0.3 * count))
    expected = features(made)
    assert tokens == [48, 35, 26, 20]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("windows", [True, False])
def test_an_image_alone_equals_it_in_a_batch(windows: bool) -> None:
    made = model("Qwen2_5_VL", fullatt_block_indexes=[1, 3] if windows else [0, 1, 2, 3])
    sizes = GRID.prod(1).tolist()
    with crossget.attach(made, crossget.Ward(crossget.Ratio(0.25))):
        together = features(made)
        pixels = images()["pixel_values"].split(sizes)
        for one, grid, expected in zip(pixels, GRID, together, strict=True):
            with torch.no_grad():
                out = made.get_image_features(pixel_values=one, image_grid_thw=grid[None], return_dict=True)
            torch.testing.assert_close(out.pooler_output[0], expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("family", OWN)
def test_nothing_removed_is_the_dense_tower(family: str) -> None:
    made = model(family, **({"fullatt_block_indexes": [1, 3]} if family == "Qwen2_5_VL" else {}))
    dense = features(made)
    with crossget.attach(made, crossget.Ward(0)) as attached:
        assert all(map(torch.equal, features(made), dense))
        assert "merge units of 4 patches: Ward(0" in str(attached)
        with pytest.raises(ValueError, match="already attached"):
            crossget.attach(made, crossget.Ward(0))
    assert all(map(torch.equal, features(made), dense))
    assert not any("forward" in module.__dict__ for module in made.modules())


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class Keys(crossget.ToMe):
    """ToMe that keeps the keys [H, U, S * D] of every call."""

    seen: ClassVar[list[Tensor]] = []

    def reduce(self, view: Any, r: int) -> Any:
        self.seen.append(view.keys[0])
        return super().reduce(view, r)


@pytest.mark.parametrize("family", OWN)
def test_units_are_compared_by_the_keys_of_their_patches(family: str) -> None:
    made = model(family)
    block, given = made.model.visual.blocks[0], {}
    hooks = [
        block.attn.qkv.register_forward_hook(lambda _, __, out: given.update(qkv=out)),
        block.register_forward_pre_hook(lambda _, args, kwargs: given.update(kwargs), with_kwargs=True),
    ]
    features(made)
    for hook in hooks:
        hook.remove()
    keys = given["qkv"].unflatten(-1, (3, 4, -1))[:, 1]  # [N, H, D]
    half = keys.shape[-1] // 2
    cos, sin = (table[:, None] for table in given["position_embeddings"])
    keys = keys * cos + torch.cat([-keys[..., half:], keys[..., :half]], -1) * sin
    expected = keys.unflatten(0, (-1, 4)).permute(2, 0, 1, 3).flatten(2)
    Keys.seen.clear()
    with crossget.attach(made, Keys(crossget.Ratio(0.25))) as attached:
        by_keys = features(made)
        assert attached.reducers["visual"].keys == "mean_heads"  # type: ignore[attr-defined]
        torch.testing.assert_close(torch.cat(Keys.seen[:3], 1), expected, atol=1e-6, rtol=1e-5)
        assert [one.shape[0] for one in Keys.seen] == [4] * 9  # heads, in three blocks that merge
        attached.reducer = crossget.ToMe(crossget.Ratio(0.25), keys="tokens")
        by_tokens = features(made)
    assert not torch.equal(by_keys[0], by_tokens[0])


def test_gradients_and_dropped_units() -> None:
    made = model("Qwen2VL")
    with crossget.attach(made, crossget.MaxMin(crossget.Ratio(0.2))):
        sum(one.sum() for one in made.get_image_features(**images(), return_dict=True).pooler_output).backward()
    assert all(block.attn.qkv.weight.grad.abs().sum() > 0 for block in made.model.visual.blocks)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # transformers' own, on how it checkpoints
def test_gradient_checkpointing_is_refused() -> None:
    made = model("Qwen2VL")
    made.gradient_checkpointing_enable()
    with crossget.attach(made.train(), crossget.Ward(2)):
        with pytest.raises(RuntimeError, match="cannot be trained with gradient checkpointing"):
            made.get_image_features(**images(), return_dict=True)
        made.eval().get_image_features(**images(), return_dict=True)


@pytest.mark.parametrize("family", ["Qwen2VL", "Qwen3VL"])
def test_with_the_connector(family: str) -> None:
    """Units that were merged in the tower are one feature behind the connector, with their size."""
    made = model(family)
    visual = crossget.Ward(crossget.Ratio(0.25))
    counts = [int(n) // 4 for n in GRID.prod(1)]
    ids = torch.tensor([[1, *itertools.chain(*([52, *[50] * n, 53] for n in counts)), 7, 8]])
    inputs = {"input_ids": ids, "mm_token_type_ids": (ids == 50).long(), **images()}
    with torch.no_grad(), crossget.attach(made, visual):
        merged = made.get_image_features(**images(), return_dict=True).pooler_output
    for behind, wanted in ((crossget.Keep(1.0), [11, 4, 7]), (crossget.Keep(6), [6, 4, 6])):
        reducers = {"visual": visual, "connector": crossget.Ward(behind)}
        with torch.no_grad(), crossget.attach(made, reducers) as attached:
            with attached.recording():
                logits = made(**inputs).logits
            records = attached.records["connector"]
            answer = made.generate(**inputs, max_new_tokens=2, do_sample=False)
        assert attached.tokens["connector"] == list(zip(counts, wanted, strict=True))
        assert logits.shape[1] == ids.shape[1] - sum(counts) + sum(wanted)
        assert torch.equal(answer[:, :-2], ids)
        for record, features in zip(records, merged, strict=True):
            assert record.sizes.sum() == len(features)
            assert record.weights is not None
            total = torch.zeros_like(record.features[0]).index_add_(
                0, record.source[0], record.weights[0][:, None] * features
            )
            torch.testing.assert_close(total, record.features[0])


@pytest.mark.parametrize(
    ("reducer", "words"),
    [
        (crossget.CrossGET(4), "has a cross token"),
        (crossget.TopK(4, importance="attention"), "scores tokens by attention"),
        (crossget.ToMe(4, norm_correction=True), "no block is corrected"),
        (crossget.Ward(crossget.Keep(4)), "Keep is for image features"),
        ({"visual": crossget.Ward(4), "text": crossget.Ward(4)}, r"\['text'\].*has \['connector', 'visual'\]"),
    ],
)
def test_what_merge_units_do_not_take(reducer: Any, words: str) -> None:
    made = model("Qwen2VL")
    with pytest.raises(ValueError, match=words):
        crossget.attach(made, reducer)
    assert not any("forward" in module.__dict__ for module in made.modules())
