"""The merge map shows exactly what was merged; the sheet holds what it is given."""

import sys
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from torch import Tensor

from crossget.demo import figures
from crossget.demo.figures import Curve, Panel, Summary, colour_of, draw_summary, merge_map, patch_grid

CELL = 16
WHITE = torch.ones(3)


def photograph(h: int, w: int) -> Tensor:
    return torch.rand(h * CELL, w * CELL, 3) * 0.8  # nowhere as bright as a line


def cell(image: Tensor, row: int, column: int, margin: int = 2) -> Tensor:
    """A patch of the drawn image, without the lines at its sides."""
    inside = slice(margin, CELL - margin)
    return image[row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL][inside, inside]


def on_line(image: Tensor, y: int, x: int) -> bool:
    return bool(torch.equal(image[y, x], WHITE))


class TestMergeMap:
    def test_single_patches_are_left_as_they_are(self) -> None:
        image = photograph(2, 3)
        assert torch.equal(merge_map(image, torch.arange(7), (2, 3), prefix=1), image)

    def test_a_group_has_its_mean_colour_and_the_rest_is_left(self) -> None:
        image = photograph(2, 3)
        source = torch.tensor([0, 1, 1, 2, 3, 4, 4])  # one prefix token, then (0,0)+(0,1), (0,2), (1,0), (1,1)+(1,2)
        drawn = merge_map(image, source, (2, 3), prefix=1)
        mean = image[:CELL, : 2 * CELL].mean((0, 1))
        for column in (0, 1):
            torch.testing.assert_close(cell(drawn, 0, column), mean.expand(12, 12, 3))
        assert torch.equal(cell(drawn, 0, 2), cell(image, 0, 2))
        assert torch.equal(cell(drawn, 1, 0), cell(image, 1, 0))

    def test_lines_run_around_groups_and_not_through_them(self) -> None:
        source = torch.tensor([0, 0, 1, 2])
        drawn = merge_map(photograph(1, 4), source, (1, 4), prefix=0)
        assert not on_line(drawn, 8, CELL - 1)  # inside the group
        assert on_line(drawn, 8, 2 * CELL - 1)
        assert on_line(drawn, 8, 2 * CELL)  # between the group and a single patch, two pixels wide
        assert not on_line(drawn, 8, 3 * CELL)  # between two single patches

    def test_patches_of_one_token_need_not_touch(self) -> None:
        image = photograph(1, 3)
        drawn = merge_map(image, torch.tensor([0, 1, 0]), (1, 3), prefix=0)
        assert torch.equal(cell(drawn, 0, 0), cell(drawn, 0, 2))
        assert torch.equal(cell(drawn, 0, 1), cell(image, 0, 1))

    def test_dropped_patches_are_darkened_and_are_no_group(self) -> None:
        image = photograph(1, 3)
        drawn = merge_map(image, torch.tensor([-1, 0, -1]), (1, 3), prefix=0)
        torch.testing.assert_close(cell(drawn, 0, 0), cell(image, 0, 0) * figures.PRUNED_BRIGHTNESS)
        assert not torch.equal(cell(drawn, 0, 0), cell(drawn, 0, 2))
        assert torch.equal(cell(drawn, 0, 1), cell(image, 0, 1))

    def test_an_image_that_the_grid_does_not_divide_is_fitted(self) -> None:
        assert merge_map(torch.rand(50, 70, 3), torch.zeros(15), (3, 5), prefix=0).shape == (51, 85, 3)

    def test_small_patches_are_enlarged(self) -> None:
        assert merge_map(torch.rand(32, 32, 3), torch.arange(64), (8, 8), prefix=0).shape == (8 * CELL, 8 * CELL, 3)

    def test_the_line_has_the_colour_and_width_asked_for(self) -> None:
        drawn = merge_map(photograph(1, 3), torch.tensor([0, 0, 1]), (1, 3), 0, outline="#ff0000", line=6)
        red = (drawn == torch.tensor([1.0, 0.0, 0.0])).all(-1)
        assert red[8].nonzero().flatten().tolist() == list(range(2 * CELL - 3, 2 * CELL + 3))

    def test_the_inputs_stay_as_they_were(self) -> None:
        image, source = photograph(1, 2), torch.zeros(2, dtype=torch.long)
        before = image.clone()
        merge_map(image, source, (1, 2), 0)
        assert torch.equal(image, before)

    @hypothesis.given(
        st.integers(1, 4), st.integers(1, 4), st.integers(0, 3), st.lists(st.integers(0, 5), min_size=19, max_size=19)
    )
    def test_merging_keeps_the_mean_colour_of_the_image(self, h: int, w: int, prefix: int, tokens: list[int]) -> None:
        image = photograph(h, w)
        drawn = merge_map(image, torch.tensor(tokens[: prefix + h * w]), (h, w), prefix, line=0)
        torch.testing.assert_close(drawn.mean((0, 1)), image.mean((0, 1)))

    def test_a_source_map_of_another_grid_is_refused(self) -> None:
        with pytest.raises(ValueError, match=r"\[10\] less 1 .*2x3"):
            merge_map(photograph(2, 3), torch.arange(10), (2, 3), prefix=1)

    def test_an_image_with_channels_first_is_refused(self) -> None:
        with pytest.raises(ValueError, match=r"\[H, W, 3\].*\[3, 32, 32\]"):
            merge_map(torch.rand(3, 32, 32), torch.arange(4), (2, 2), prefix=0)


@pytest.mark.parametrize(
    ("patches", "height", "width", "grid"),
    [
        (196, 224, 224, (14, 14)),
        (1, 8, 8, (1, 1)),
        (98, 112, 224, (7, 14)),
        (576, 336, 336, (24, 24)),
        (6, 20, 30, (2, 3)),
    ],
)
def test_patch_grid(patches: int, height: int, width: int, grid: tuple[int, int]) -> None:
    assert patch_grid(patches, height, width) == grid


@pytest.mark.parametrize(("patches", "height", "width"), [(197, 224, 224), (0, 32, 32), (12, 32, 32)])
def test_patch_grid_refuses_what_is_no_grid(patches: int, height: int, width: int) -> None:
    with pytest.raises(ValueError, match=f"{patches} tokens do not tile an image of {height}x{width} pixels"):
        patch_grid(patches, height, width)


def test_colours_are_distinct_and_steady() -> None:
    assert len({colour_of(name) for name in ("dense", "ToMe-style", "CrossGET")}) == 3
    assert colour_of("mine") == colour_of("mine")
    assert colour_of("mine") not in figures.COLOURS.values()


CURVES = [
    Curve("dense", [17] * 4, 2.0, 1.0, 1.0),
    Curve("ToMe-style", [17, 15, 13, 11], 1.5, 0.9, 1.25),
    Curve("CrossGET", [18, 16, 14, 12], 1.6, 0.95, None),
]


def texts(summary: Summary) -> str:
    figure = draw_summary(summary)
    here = [t.get_text() for t in figure.texts]
    for axes in figure.axes:
        here += [axes.get_title(), axes.get_title(loc="left"), *(t.get_text() for t in axes.texts)]
    return "\n".join(here)


class TestSummary:
    def test_says_what_it_is_given(self) -> None:
        said = texts(Summary("the title", "the subtitle", CURVES, item="image-caption pair", footer=["a credit"]))
        for part in ("the title", "the subtitle", "a credit", "image-caption pair", "1.5  (-25%)", "1.25x", "0.950"):
            assert part in said
        assert "not measured" in said  # CrossGET's speed is None

    def test_draws_the_tokens(self) -> None:
        axes = draw_summary(Summary("", "", CURVES)).axes[0]
        assert [list(line.get_ydata()) for line in axes.get_lines()] == [c.tokens for c in CURVES]

    @pytest.mark.parametrize(("photographs", "columns"), [(0, 0), (1, 3), (4, 5)])
    def test_writes_a_picture_that_holds_every_panel(self, photographs: int, columns: int, tmp_path: Path) -> None:
        rows = [[Panel(torch.rand(32, 32, 3), "caption", "#0072b2")] * columns] * photographs
        figure = draw_summary(Summary("title", "subtitle", CURVES, rows))
        assert len(figure.axes) == 4 + photographs * columns
        for axes in figure.axes:
            box = axes.get_position()
            assert box.x0 >= 0
            assert box.y0 >= 0
            assert box.x1 <= 1
            assert box.y1 <= 1
        figure.savefig(tmp_path / "sheet.png")
        assert (tmp_path / "sheet.png").read_bytes().startswith(b"\x89PNG")

    def test_leaves_no_figure_behind_in_pyplot(self) -> None:
        draw_summary(Summary("", "", CURVES))
        pyplot = sys.modules.get("matplotlib.pyplot")
        assert pyplot is None or not pyplot.get_fignums()

    def test_says_how_to_get_matplotlib(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
        with pytest.raises(RuntimeError, match=r'pip install "crossget\[demo\]"'):
            draw_summary(Summary("", "", CURVES))
