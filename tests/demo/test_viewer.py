"""The page of `crossget show`: its numbers against loops, what it may load, what it escapes, what it refuses."""

import base64
import dataclasses
import hashlib
import json
import os
import re
import shlex
import statistics
import sys
from collections import Counter
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, get_args

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from PIL import Image
from small_clip import registered
from torch import Tensor
from torch.nn import functional as F

import crossget
from crossget import cli
from crossget.demo import figures, viewer
from crossget.demo.figures import GROUP_COLOURS, colour_groups, follow_groups, group_map
from crossget.demo.outputs import save_figure
from crossget.demo.viewer import ViewerOptions, ViewerReport, correlation, run, to_script
from crossget.methods.reducers import Reducer

TINY_CLIP = "tiny-clip-to-show"
CONFIG = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 3, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}
TEXTS = ("a cat", "</script><script>alert('a cup')</script> & {{DATA}}")


@pytest.fixture(scope="module", autouse=True)
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with registered(TINY_CLIP, CONFIG, tmp_path_factory.mktemp("configs")):
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("show")


@pytest.fixture(scope="module")
def told() -> list[str]:
    return []


@pytest.fixture(scope="module")
def vit(folder: Path, told: list[str]) -> ViewerReport:
    """A vision transformer of timm's with random weights, and methods that merge, do not score, and drop."""
    methods = ("crossget", "random", "topk")
    return run(
        ViewerOptions(model="test_vit", r=(4, 0, 4, 4, 4, 4), methods=methods, out=folder / "vit.html"), told.append
    )


@pytest.fixture(scope="module")
def clip(folder: Path) -> ViewerReport:
    """A CLIP and two texts, of which one is nasty, on a photograph whose name is."""
    image = folder / "<b>&amp;{{TITLE}}.png"
    Image.effect_noise((40, 50), 90).convert("RGB").save(image)
    methods = ("crossget", "tome")
    options = ViewerOptions(image, TINY_CLIP, 3, methods, TEXTS, pretrained="none", out=folder / "clip.html")
    return run(options, pytest.fail)


class Parsed(HTMLParser):
    """The elements of a page, and what stands in its scripts and its title."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[int, str] = {}
        self.open = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self.open = True

    def handle_endtag(self, tag: str) -> None:
        self.open = False

    def handle_data(self, data: str) -> None:
        if self.open:
            at = len(self.elements) - 1
            self.texts[at] = self.texts.get(at, "") + data

    def of(self, tag: str) -> list[tuple[dict[str, str | None], str]]:
        return [(attrs, self.texts.get(i, "")) for i, (name, attrs) in enumerate(self.elements) if name == tag]


def parsed(report: ViewerReport) -> Parsed:
    return Parsed(report.options.out.read_text(encoding="utf-8"))


# Groups --------------------------------------------------------------------------------------------------------------


def groups_by_hand(sources: list[list[int]]) -> list[list[int]]:
    """`follow_groups` with dicts and loops."""
    names = list(range(len(sources[0])))
    rows = [names]
    for source in sources:
        new = []
        for patch, token in enumerate(source):
            if token < 0:
                new.append(-1)
                continue
            votes = Counter(names[other] for other, theirs in enumerate(source) if theirs == token)
            new.append(min(votes, key=lambda name: (-votes[name], name)))
            assert names[patch] in votes
        names = new
        rows.append(names)
    return rows


@st.composite
def merges(draw: st.DrawFn) -> list[list[int]]:
    """Source maps of some blocks: tokens join others, or are dropped."""
    patches = draw(st.sampled_from([1, 4, 6, 12]))
    at, maps = list(range(patches)), []
    for _ in range(draw(st.integers(1, 4))):
        tokens = sorted({token for token in at if token >= 0})
        to = {token: draw(st.sampled_from([token, *tokens, -1])) for token in tokens}
        at = [-1 if token < 0 else to[token] for token in at]
        maps.append(list(at))
    return maps


@hypothesis.given(merges())
def test_groups_are_followed_as_by_hand(sources: list[list[int]]) -> None:
    found = follow_groups([torch.tensor(source) for source in sources])
    assert found.tolist() == groups_by_hand(sources)
    for source, names in zip(sources, found[1:].tolist(), strict=True):
        # One name for one token, and the other way round.
        assert len(set(zip(source, names, strict=True))) == len(set(source)) == len(set(names))


@hypothesis.given(merges())
def test_only_groups_have_colours(sources: list[list[int]]) -> None:
    names = follow_groups([torch.tensor(source) for source in sources])
    grid = (2, names.shape[1] // 2) if names.shape[1] > 1 else (1, 1)
    colours = colour_groups(names, grid)
    many = {name for row in names.tolist() for name, n in Counter(row).items() if n > 1 and name >= 0}
    assert set(colours) == many
    assert all(0 <= colour < len(GROUP_COLOURS) for colour in colours.values())


def test_neighbours_differ_and_groups_without_neighbours_take_turns() -> None:
    names = torch.tensor([[0, 0, 2, 2, 4, 4], [6, 6, 8, 8, 10, 10]]).flatten()[None]
    colours = colour_groups(names, (2, 6))
    for a, b in [(0, 2), (2, 4), (6, 8), (8, 10), (0, 6), (2, 8), (4, 10)]:
        assert colours[a] != colours[b]
    apart = torch.tensor([0, 0, 20, 3, 3, 21, 6, 6])[None]
    assert len(set(colour_groups(apart, (1, 8)).values())) == 3


def test_the_map_tints_groups_and_leaves_the_rest() -> None:
    image = torch.rand(16, 64, 3)
    drawn = group_map(image, torch.tensor([0, 0, 2, -1]), {0: 1}, (1, 4))
    paint = figures._rgb(GROUP_COLOURS[1])
    inside, alone, dropped = (slice(4, 12), slice(4, 12)), (slice(None), slice(32, 48)), (slice(None), slice(50, 64))
    torch.testing.assert_close(drawn[inside], (1 - figures.TINT) * image[inside] + figures.TINT * paint)
    assert torch.equal(drawn[alone], image[alone])
    torch.testing.assert_close(drawn[dropped], image[dropped] * figures.PRUNED_BRIGHTNESS)
    assert torch.equal(drawn[8, 31], paint)  # the outline, on the group's own side
    assert not torch.equal(drawn[8, 16], paint)  # and not through it


# Numbers -------------------------------------------------------------------------------------------------------------


def recorded(report: ViewerReport, reducer: Reducer) -> tuple[crossget.Attachment, Tensor]:
    """The same forward once more: what it leaves, and the image's features."""
    image = report.backbone.preprocess(report.photograph.image)[None]
    with crossget.attach(report.backbone.model, {"visual": reducer}) as attached, torch.no_grad(), attached.recording():
        features = report.backbone.image_features(image)[0]
    return attached, features


@pytest.mark.parametrize(
    ("key", "method"), [("crossget", crossget.CrossGET), ("random", crossget.Random), ("topk", crossget.TopK)]
)
def test_blocks_are_those_of_the_forward(key: str, method: Any, vit: ViewerReport) -> None:
    (shown,) = (m for m in vit.data()["methods"] if m["key"] == key)
    attached, features = recorded(vit, method((4, 0, 4, 4, 4, 4)))
    records = attached.records["visual"]
    assert shown["tokens"] == [*attached.tokens["visual"], records[-1].features.shape[1]]
    dense = recorded(vit, crossget.ToMe(0))[1]
    assert shown["cosine"] == pytest.approx(float(F.cosine_similarity(features, dense, dim=0)), abs=1e-4)
    prefix = vit.tower.prefix
    sources = [record.source[0, prefix:].tolist() for record in records]
    expected = groups_by_hand(sources)[1:]
    for layer, (block, record) in enumerate(zip(shown["blocks"], records, strict=True)):
        assert block["group"] == expected[layer]
        counts = Counter(block["group"])
        assert block["size"] == [0 if name < 0 else counts[name] for name in block["group"]]
        if key == "random" or layer == 1:
            assert block["score"] is None
            continue
        assert record.score is not None
        for patch, score in enumerate(block["score"]):
            entered = prefix + patch if layer == 0 else sources[layer - 1][patch]
            if entered < 0:
                assert score is None
            else:
                assert score == pytest.approx(float(record.score[0, entered]), abs=6e-5)


def test_costs_are_those_of_the_meter(vit: ViewerReport) -> None:
    data = vit.data()
    image = vit.backbone.preprocess(vit.photograph.image)[None]
    with crossget.attach(vit.backbone.model, crossget.CrossGET((4, 0, 4, 4, 4, 4))):
        report = crossget.count_flops(vit.backbone.model, image)
    for shown, counted in ((data["dense"], report.dense), (data["methods"][0], report.reduced)):
        assert counted is not None
        assert shown["total"] == round(counted.total / 1e9, 6)
        assert shown["gflops"] == [round(counted.by_module[f"blocks.{i}"] / 1e9, 6) for i in range(6)]
    assert data["dense"]["tokens"] == [101] * 7


def test_relevance_is_the_cosine_of_each_token_with_each_text(clip: ViewerReport) -> None:
    data, model = clip.data(), clip.backbone.model
    assert data["texts"] == list(TEXTS)
    model.requires_grad_(False)
    texts = model.encode_text(clip.backbone.tokenize(TEXTS))
    dense = recorded(clip, crossget.ToMe(0))[0].records["visual"]
    for shown, reducer in zip(data["methods"], (crossget.CrossGET(3), crossget.ToMe(3)), strict=True):
        attached, features = recorded(clip, reducer)
        similar = [float(F.cosine_similarity(features, text, dim=0)) for text in texts]
        assert shown["similarity"] == pytest.approx(similar, abs=1e-4)
        for layer, (block, record) in enumerate(zip(shown["blocks"], attached.records["visual"], strict=True)):
            for t, text in enumerate(texts):
                found, before = [], []
                for patch in range(16):
                    token = record.features[0, int(record.source[0, 1 + patch])]
                    for list_, one in ((found, token), (before, dense[layer].features[0, 1 + patch])):
                        feature = model.visual.ln_post(one) @ model.visual.proj
                        list_.append(float(F.cosine_similarity(feature, text, dim=0)))
                assert block["relevance"][t] == pytest.approx(found, abs=6e-5)
                assert data["dense"]["relevance"][layer][t] == pytest.approx(before, abs=6e-5)
                assert block["dense_correlation"][t] == pytest.approx(statistics.correlation(found, before), abs=2e-3)


def test_groups_keep_their_colour_and_label_from_block_to_block(clip: ViewerReport) -> None:
    for method in clip.data()["methods"]:
        many = {name for block in method["blocks"] for name, n in Counter(block["group"]).items() if n > 1}
        assert {int(name) for name in method["colours"]} == many
        assert sorted(method["labels"].values()) == list(range(1, len(many) + 1))


@hypothesis.given(st.lists(st.tuples(*[st.none() | st.integers(-9, 9)] * 2), max_size=8))
def test_correlation(pairs: list[tuple[int | None, int | None]]) -> None:
    found = correlation([a for a, _ in pairs], [b for _, b in pairs])
    both = [(a, b) for a, b in pairs if a is not None and b is not None]
    a, b = [x for x, _ in both], [y for _, y in both]
    if len(set(a)) < 2 or len(set(b)) < 2:
        assert found is None
    else:
        assert found == pytest.approx(statistics.correlation(a, b), abs=1e-4)


# The page ------------------------------------------------------------------------------------------------------------


class TestPage:
    def test_holds_the_numbers(self, vit: ViewerReport, clip: ViewerReport) -> None:
        for report in (vit, clip):
            (attrs, text), _ = parsed(report).of("script")
            assert attrs == {"type": "application/json", "id": "data"}
            assert json.loads(text) == json.loads(json.dumps(report.data()))

    def test_may_run_its_own_script_and_load_nothing(self, clip: ViewerReport) -> None:
        page = parsed(clip)
        (policy,) = (a["content"] for a, _ in page.of("meta") if a.get("http-equiv") == "Content-Security-Policy")
        _, (attrs, script) = page.of("script")
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        assert attrs == {}
        assert policy is not None
        assert policy.startswith(
            f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
        )
        links = [a.get(name) for _, a in page.elements for name in ("src", "href") if name in a]
        assert links == ["data:,"]
        assert clip.data()["image"]["src"].startswith("data:image/jpeg;base64,")

    def test_what_users_write_stays_text(self, clip: ViewerReport) -> None:
        page = parsed(clip)
        assert [tag for tag, _ in page.elements].count("script") == 2
        ((_, title),) = page.of("title")
        assert title == "<b>&amp;{{TITLE}}, tiny-clip-to-show: crossget show"
        assert "b" not in [tag for tag, _ in page.elements]
        assert json.loads(page.of("script")[0][1])["texts"] == list(TEXTS)

    @hypothesis.settings(max_examples=30)
    @hypothesis.given(st.text())
    def test_any_text_survives_a_script_element(self, text: str) -> None:
        written = to_script({"x": text})
        assert json.loads(written) == {"x": text}
        assert not set("<>&\u2028\u2029") & set(written)

    def test_random_weights_are_told(self, vit: ViewerReport, told: list[str]) -> None:
        (line,) = told
        assert line.endswith("HF_HUB_OFFLINE is set: random weights are used")
        assert vit.data()["model"]["random"] is True
        assert "HF_HUB_OFFLINE" in vit.data()["model"]["random_reason"]

    def test_is_modest_in_size(self, vit: ViewerReport) -> None:
        assert vit.options.out.stat().st_size < 400_000

    def test_the_photograph_is_what_the_model_saw(self, vit: ViewerReport) -> None:
        shown = vit.data()["image"]
        assert (shown["name"], shown["credit"]) == ("chelsea", "Stefan van der Walt, CC0")
        assert (shown["width"], shown["height"]) == (160, 160)
        first = vit.pixels[:16, :16].mean((0, 1))
        colour = [int(shown["patches"][0][i : i + 2], 16) / 255 for i in (1, 3, 5)]
        torch.testing.assert_close(torch.tensor(colour), first, atol=0.003, rtol=0)

    def test_says_how_to_make_it(self, clip: ViewerReport) -> None:
        words = shlex.split(clip.data()["command"])
        options: Any = cli._parse(words[1:])
        assert words[0] == "crossget"
        for name in ("image", "model", "r", "text", "pretrained", "seed"):
            assert getattr(options, name) == getattr(clip.options, name)
        assert tuple(options.methods) == clip.options.methods

    def test_the_template_has_no_leftovers(self, vit: ViewerReport) -> None:
        page = vit.options.out.read_text(encoding="utf-8")
        assert not re.search(r"\{\{[A-Z_]+\}\}", page)
        assert "http://" not in page.replace("http://www.w3.org/2000/svg", "")
        assert "https://" not in page


def test_the_picture_has_every_method(clip: ViewerReport) -> None:
    figure = clip.picture()
    assert len(figure.axes) == 2 + 2 * 3  # photograph and tokens; CrossGET and ToMe-style, 3 blocks each
    words = "\n".join([*(t.get_text() for t in figure.texts), *(a.get_title() for a in figure.axes)])
    assert "random weights" in words
    for one in clip.runs.values():
        assert f"after block 3: {one.tokens[-1]} tokens" in words
    for axes in figure.axes:
        box = axes.get_position()
        assert min(box.x0, box.y0) >= 0
        assert max(box.x1, box.y1) <= 1
    assert "Stefan van der Walt" not in words  # somebody else's photograph


def test_the_model_is_given_back_as_it_was(clip: ViewerReport) -> None:
    with pytest.raises(ValueError, match="is not attached"):
        crossget.attachment(clip.backbone.model)


# Refusals ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"methods": ("pitome",)}, "--methods pitome: choose from ward, crossget"),
        ({"methods": ()}, "--methods: choose at least one of ward, crossget"),
        ({"methods": ("tome", "tome")}, "--methods tome tome"),
        ({"text": ("a", " ")}, "give words such as 'a cat'"),
        ({"text": tuple("abcdefg")}, "--text: 7 given, a page shows at most 6"),
        ({"checkpoint": Path("nowhere")}, "--checkpoint nowhere: no such file"),
        ({"out": Path("nowhere/p.html")}, "--out nowhere/p.html: there is no folder nowhere"),
        ({"png": Path("nowhere/p.png")}, "--png nowhere/p.png: there is no folder nowhere"),
        ({"out": Path("photo.png")}, "--out photo.png: expected a name that ends in .html or .htm"),
        ({"png": Path("page.html")}, "--png page.html: expected a name that ends in .png or .svg or .pdf"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_before_any_work(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        ViewerOptions(**options)


@pytest.mark.parametrize("name", ["out.html", "png.png", "png.svg", "png.pdf"])
def test_only_what_a_command_wrote_is_replaced(name: str, clip: ViewerReport, tmp_path: Path) -> None:
    path = tmp_path / name
    if path.suffix == ".html":
        path.write_text(clip.page(), encoding="utf-8")
    else:
        save_figure(clip.picture(), path)
    ViewerOptions(**{path.stem: path})
    path.write_bytes(b"somebody else's")
    with pytest.raises(ValueError, match=f"--{path.stem} {path}: it exists, and crossget did not write it"):
        ViewerOptions(**{path.stem: path})
    path.write_bytes(b"")  # as mktemp leaves it
    ViewerOptions(**{path.stem: path})
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ValueError, match="it exists, and crossget did not write it"):
        ViewerOptions(**{path.stem: path})


def test_a_page_that_cannot_be_written_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.effect_noise((40, 50), 90).convert("RGB").save(tmp_path / "a.jpg")
    given = ViewerOptions(tmp_path / "a.jpg", "test_vit", methods=("tome",), pretrained="none", out=tmp_path / "p.html")
    (tmp_path / "p.html").write_text("written by crossget before")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("crossget.core.files.os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        run(given, lambda line: None)
    assert (tmp_path / "p.html").read_text() == "written by crossget before"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jpg", "p.html"]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"image": Path("no.jpg")},
            ValueError,
            "no image no.jpg: expected a file, or one of chelsea",
        ),
        ({"model": "vit_nope"}, ValueError, "no model 'vit_nope' in open_clip"),
        ({"model": "test_resnet"}, TypeError, "cannot reduce timm"),
        ({"text": ("a cat",)}, ValueError, "timm test_vit does not have: choose a CLIP"),
        ({"r": (1, 2)}, ValueError, "r lists 2 layers but the tower has 6 blocks"),
    ],
    ids=str,
)
def test_refusals(options: dict[str, Any], error: type[Exception], message: str, tmp_path: Path) -> None:
    given = ViewerOptions(**{"model": "test_vit", "pretrained": "none", "out": tmp_path / "p.html", **options})
    with pytest.raises(error, match=re.escape(message)):
        run(given, pytest.fail)
    assert list(tmp_path.iterdir()) == []


def test_a_clip_that_pools_by_attention_cannot_be_asked_for_a_text(tmp_path: Path) -> None:
    config = {**CONFIG, "vision_cfg": {**CONFIG["vision_cfg"], "attentional_pool": True}}  # type: ignore[dict-item]
    with (
        registered("pools", config, tmp_path),
        pytest.raises(ValueError, match="pools .*attention pool.*ViT-B-16"),
    ):
        run(ViewerOptions(model="pools", pretrained="none", text=("a cat",), out=tmp_path / "p.html"), pytest.fail)


def test_without_matplotlib_nothing_is_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setattr(viewer, "make", lambda *_, **__: pytest.fail("work was begun"))
    with pytest.raises(RuntimeError, match=r'matplotlib.*"crossget\[demo\]"'):
        run(ViewerOptions(png=tmp_path / "p.png", out=tmp_path / "p.html"), pytest.fail)


def test_the_command_offers_every_method() -> None:
    assert set(get_args(viewer.Method)) == set(viewer.METHODS) == set(viewer.NAMES) == set(viewer.ABOUT)


def test_options_name_every_field_in_the_docstring() -> None:
    documented = ViewerOptions.__doc__ or ""
    assert all(field.name in documented for field in dataclasses.fields(ViewerOptions))
