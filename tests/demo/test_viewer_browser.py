"""The page of `crossget show` in a real browser: keys, pointer, numbers on the screen, and that nothing is loaded.

Needs a Chromium on the path (or in CROSSGET_BROWSER) and playwright, which drives it.
"""

import json
import os
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
from PIL import Image
from small_clip import registered

from crossget.demo.viewer import ViewerOptions, ViewerReport, run

pytestmark = pytest.mark.slow

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
SWITCHES = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
]
LAPTOP, PHONE = {"width": 1280, "height": 800}, {"width": 390, "height": 844}
TINY_CLIP = "tiny-clip-to-browse"
CONFIG = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 64, "layers": 4, "width": 64, "head_width": 32, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}
NASTY = (
    "</script><script>window.broken = 1</script><img src=x onerror='window.broken = 1'> a_very_long_word_" + 40 * "w"
)
SIDE, DEPTH = 8, 4
MINUS = "\u2212"


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ViewerReport]:
    """Two methods that merge and one that drops, and two texts, one of them nasty."""
    folder = tmp_path_factory.mktemp("show")
    image = folder / "<i>photo.png"
    Image.effect_noise((80, 70), 90).convert("RGB").save(image)
    methods = ("crossget", "tome", "topk")
    with registered(TINY_CLIP, CONFIG, folder):
        yield run(
            ViewerOptions(image, TINY_CLIP, 9, methods, ("a cat", NASTY), pretrained="none", out=folder / "page.html"),
            pytest.fail,
        )


@pytest.fixture(scope="module")
def data(report: ViewerReport) -> dict[str, Any]:
    return json.loads(json.dumps(report.data()))


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    found = os.environ.get("CROSSGET_BROWSER") or next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.fail(f"no browser: looked for {', '.join(BROWSERS)}; install Chromium, or name one in CROSSGET_BROWSER")
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=found, args=SWITCHES)
        yield browser
        browser.close()


class Opened:
    """A page that is open, with what it asked for and complained about."""

    def __init__(self, browser: Any, report: ViewerReport, viewport: dict[str, int] = LAPTOP, **settings: Any) -> None:
        self.context = browser.new_context(viewport=viewport, **settings)
        self.page = self.context.new_page()
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(report.options.out.resolve().as_uri())

    def panel(self, name: str) -> Any:
        return self.page.get_by_role("region", name=name, exact=True)

    def slider(self, name: str) -> Any:
        return self.page.get_by_role("slider", name=f"{name}: block", exact=True)

    def where(self) -> list[str]:
        return [self.panel(name).locator("output").inner_text() for name in ("CrossGET", "ToMe-style", "TopK")]

    def info(self, name: str) -> str:
        return self.panel(name).locator(".info").inner_text()

    def tokens(self, name: str) -> str:
        return self.panel(name).locator(".facts strong").first.inner_text()

    def fills(self, name: str) -> list[str]:
        return (
            self.panel(name)
            .locator("svg rect")
            .evaluate_all("rects => rects.filter(r => !r.closest('defs')).map(r => r.getAttribute('fill'))")
        )

    def point(self, name: str, patch: int) -> None:
        self.panel(name).locator("svg").scroll_into_view_if_needed()
        box = self.panel(name).locator("svg").bounding_box()
        cell = box["width"] / SIDE
        self.page.mouse.move(box["x"] + (patch % SIDE + 0.5) * cell, box["y"] + (patch // SIDE + 0.5) * cell)

    def tab_to(self, target: Any) -> None:
        """With the key alone."""
        for _ in range(40):
            self.page.keyboard.press("Tab")
            if target.evaluate("element => element === document.activeElement"):
                return
        pytest.fail("Tab does not lead there")


@pytest.fixture
def opened(browser: Any, report: ViewerReport) -> Iterator[Opened]:
    opened = Opened(browser, report)
    yield opened
    assert opened.complaints == []
    assert opened.requests == [report.options.out.resolve().as_uri()]
    opened.context.close()


def expected_info(data: dict[str, Any], method: int, layer: int, patch: int) -> list[str]:
    """What the page has to say about a patch after a block, from the numbers."""
    block = data["methods"][method]["blocks"][layer]
    said = [f"Row {patch // SIDE + 1}, column {patch % SIDE + 1}."]
    if block["group"][patch] >= 0:
        said.append(f"(size {block['size'][patch]}")
    if block["score"] is not None and block["score"][patch] is not None:
        said.append(f"Importance in block {layer + 1}: {block['score'][patch]:.3f}".replace("-", MINUS))
    return said


class TestSliders:
    def test_a_key_moves_all_panels(self, opened: Opened, data: dict[str, Any]) -> None:
        assert opened.where() == ["after block 2 of 4"] * 3
        opened.tab_to(opened.slider("CrossGET"))
        opened.page.keyboard.press("ArrowRight")
        assert opened.where() == ["after block 3 of 4"] * 3
        for name, method in zip(("CrossGET", "ToMe-style", "TopK"), data["methods"], strict=True):
            tokens = method["tokens"][3]
            assert opened.tokens(name) == str(tokens)
            said = opened.slider(name).get_attribute("aria-valuetext")
            assert said.startswith(f"after block 3 of 4, {tokens} tokens, ")
            assert said.endswith(f"{method['gflops'][2]:.3f} GFLOPs in it")
        opened.page.keyboard.press("Home")
        assert opened.where() == ["before the first block"] * 3
        opened.page.keyboard.press("End")
        assert opened.where() == ["after block 4 of 4"] * 3

    def test_unlinked_it_moves_its_own(self, opened: Opened) -> None:
        box = opened.page.get_by_role("checkbox", name="One slider moves all")
        opened.tab_to(box)
        opened.page.keyboard.press("Space")
        opened.tab_to(opened.slider("ToMe-style"))
        opened.page.keyboard.press("ArrowRight")
        assert opened.where() == ["after block 2 of 4", "after block 3 of 4", "after block 2 of 4"]
        box.check()
        assert opened.where() == ["after block 2 of 4"] * 3


class TestPatches:
    def test_groups_have_their_colours_in_every_block(self, opened: Opened, data: dict[str, Any]) -> None:
        opened.slider("CrossGET").focus()
        opened.page.keyboard.press("Home")
        for name in ("CrossGET", "ToMe-style", "TopK"):
            assert opened.fills(name) == ["none"] * SIDE**2
        for layer in range(DEPTH):
            opened.page.keyboard.press("ArrowRight")
            for name, method in zip(("CrossGET", "ToMe-style", "TopK"), data["methods"], strict=True):
                group = method["blocks"][layer]["group"]
                expected = [
                    "url(#hatch-3)" if g < 0 else data["palette"][method["colours"][str(g)]] if group.count(g) > 1
                    else "none" for g in group
                ]  # fmt: skip
                assert opened.fills(name) == expected

    def test_the_pointer_tells_size_and_importance_everywhere(self, opened: Opened, data: dict[str, Any]) -> None:
        for patch in (0, 19, 63):
            opened.point("ToMe-style", patch)
            for method, name in enumerate(("CrossGET", "ToMe-style", "TopK")):
                for part in expected_info(data, method, 1, patch):
                    assert part in opened.info(name)
            assert "not scored by this method" in opened.info("ToMe-style")
        opened.page.mouse.move(5, 5)
        assert "Point at a patch" in opened.info("CrossGET")

    def test_keys_go_from_patch_to_patch(self, opened: Opened, data: dict[str, Any]) -> None:
        picture = opened.panel("CrossGET").get_by_role("application")
        opened.tab_to(picture)
        patch = SIDE // 2 * SIDE + SIDE // 2
        assert (
            picture.evaluate("p => getComputedStyle(p).outlineStyle + parseFloat(getComputedStyle(p).outlineWidth)")
            == "solid3"
        )
        moves = {"ArrowLeft": -1, "ArrowUp": -SIDE, "ArrowRight": 1, "ArrowDown": SIDE, "Home": -4, "End": 7}
        for key, by in [(None, 0), *moves.items()]:
            if key is not None:
                opened.page.keyboard.press(key)
            patch += by
            for part in expected_info(data, 0, 1, patch):
                assert part in opened.info("CrossGET")
            assert expected_info(data, 1, 1, patch)[0] in opened.info("ToMe-style")
        assert picture.get_attribute("aria-describedby") == opened.panel("CrossGET").locator(".info").get_attribute(
            "id"
        )
        assert opened.panel("CrossGET").locator(".info").get_attribute("aria-live") == "polite"
        group = data["methods"][0]["blocks"][1]["group"]
        firsts = sorted({group.index(g) for g in group if group.count(g) > 1})
        own = group.index(group[patch])
        after = next((p for p in firsts if p > own), firsts[0])
        opened.page.keyboard.press("PageDown")
        assert expected_info(data, 0, 1, after)[0] in opened.info("CrossGET")
        opened.page.keyboard.press(".")
        assert opened.where() == ["after block 3 of 4"] * 3
        opened.page.keyboard.press("Escape")
        assert "Point at a patch" in opened.info("CrossGET")

    def test_the_rest_is_dimmed_and_the_group_is_lit(self, opened: Opened, data: dict[str, Any]) -> None:
        """So that no colour is needed to see what belongs together."""
        group = data["methods"][0]["blocks"][1]["group"]
        patch = next(p for p, g in enumerate(group) if group.count(g) > 1)
        opened.point("CrossGET", patch)
        dim = opened.panel("CrossGET").locator("svg > path").last.get_attribute("d")
        assert dim.count("M") == SIDE**2 - group.count(group[patch])

    def test_every_part_of_a_group_has_its_number(self, opened: Opened, data: dict[str, Any]) -> None:
        method = data["methods"][1]
        group = method["blocks"][1]["group"]
        many = {g for g in group if group.count(g) > 1}
        shown = opened.panel("ToMe-style").locator("svg text").all_text_contents()
        assert {int(number) for number in shown} == {method["labels"][str(g)] for g in many}
        opened.page.get_by_role("checkbox", name="Group numbers").uncheck()
        assert not opened.panel("ToMe-style").locator("svg text").first.is_visible()


class TestTexts:
    def test_relevance_is_told_and_drawn(self, opened: Opened, data: dict[str, Any]) -> None:
        opened.page.get_by_role("combobox", name="Colour patches by").select_option("text0")
        opened.point("CrossGET", 20)
        block = data["methods"][0]["blocks"][1]
        assert f"Relevance to “a cat”: {block['relevance'][0][20]:.3f}".replace("-", MINUS) in opened.info("CrossGET")
        dense = f"dense, after block 2: {data['dense']['relevance'][1][0][20]:.3f}".replace("-", MINUS)
        assert dense in opened.info("Photograph")
        agreement = f"{block['dense_correlation'][0]:.2f}".replace("-", MINUS)
        assert (
            f"correlation with the dense model's map: {agreement}"
            in opened.panel("CrossGET").locator(".legend").inner_text()
        )
        fills = opened.fills("CrossGET")
        by_group: dict[int, set[str]] = {}
        for fill, group in zip(fills, block["group"], strict=True):
            by_group.setdefault(group, set()).add(fill)
        assert all(len(found) == 1 for found in by_group.values())
        assert len({fill for found in by_group.values() for fill in found}) > 5

    def test_importance_of_a_method_that_scores_nothing(self, opened: Opened) -> None:
        opened.page.get_by_role("combobox", name="Colour patches by").select_option("importance")
        assert opened.panel("ToMe-style").locator(".legend").inner_text() == "not scored"
        assert opened.fills("ToMe-style") == ["none"] * 64
        assert "none" not in opened.fills("CrossGET")


def test_numbers_and_warnings_are_on_the_page(opened: Opened, data: dict[str, Any]) -> None:
    assert "Random weights." in opened.page.get_by_role("note").inner_text()
    assert opened.page.title() == "<i>photo, tiny-clip-to-browse: crossget show"
    assert opened.page.get_by_role("heading", level=1).inner_text().startswith("<i>photo:")
    opened.page.get_by_text("All numbers, block by block").click()
    cells = opened.page.locator("#table tbody tr").nth(2).locator("td").all_inner_texts()
    dense, *methods = [data["dense"], *data["methods"]]
    assert cells == [text for one in (dense, *methods) for text in (str(one["tokens"][2]), f"{one['gflops'][2]:.4f}")]
    assert opened.page.evaluate("window.broken") is None
    assert opened.page.locator("#texts tbody tr").nth(0).locator("td").first.inner_text() == (
        f"{data['dense']['similarity'][0]:.4f}".replace("-", MINUS)
    )


def test_everything_has_a_name(opened: Opened) -> None:
    tree = opened.page.locator("body").aria_snapshot()
    for method in ("CrossGET", "ToMe-style", "TopK"):
        assert f'region "{method}"' in tree
        assert f'slider "{method}: block"' in tree
        assert f'application "{method}: 8 rows of 8 patches; arrow keys go from patch to patch"' in tree
    for role, name in (
        ("combobox", "Colour patches by"), ("checkbox", "One slider moves all"), ("checkbox", "Group numbers"),
    ):  # fmt: skip
        assert f'{role} "{name}"' in tree
    assert 'img "Tokens: dense from 65 to 65; CrossGET from 66 to' in tree


@pytest.mark.parametrize("width", [320, 390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_fits_and_is_legible(browser: Any, report: ViewerReport, width: int, scheme: str) -> None:
    opened = Opened(browser, report, {"width": width, "height": 844}, color_scheme=scheme)
    opened.page.get_by_role("combobox", name="Colour patches by").select_option("text1")
    opened.point("CrossGET", 20)
    for summary in opened.page.locator("summary").all():
        summary.click()
    assert opened.page.evaluate("document.documentElement.scrollWidth") <= width
    worst = opened.page.evaluate(CONTRAST)
    assert worst[0] >= 4.5, worst
    assert opened.complaints == []
    opened.context.close()


# The least contrast of any text with what lies behind it, as WCAG 2 counts it.
CONTRAST = """() => {
  const parse = colour => (colour.match(/[\\d.]+/g) || []).map(Number);
  const linear = v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const light = colour => colour.slice(0, 3).map(v => linear(v / 255))
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = node => { for (; node; node = node.parentElement) {
    const colour = parse(getComputedStyle(node).backgroundColor);
    if (colour.length === 3 || colour[3] === 1) return colour; } return [255, 255, 255]; };
  let worst = [99, ''];
  for (const node of document.querySelectorAll('body *')) {
    const own = [...node.childNodes].some(child => child.nodeType === 3 && child.textContent.trim());
    if (!own || node.closest('svg, script, style, noscript, select') || !node.checkVisibility()) continue;
    const [a, b] = [light(parse(getComputedStyle(node).color)), light(behind(node))].sort((x, y) => y - x);
    const contrast = (a + 0.05) / (b + 0.05);
    if (contrast < worst[0]) worst = [contrast, node.className + ' ' + node.textContent.slice(0, 40)];
  }
  return worst; }"""


def test_on_a_phone_a_tap_chooses_a_patch(browser: Any, report: ViewerReport, data: dict[str, Any]) -> None:
    opened = Opened(browser, report, PHONE, has_touch=True, is_mobile=True)
    picture = opened.panel("CrossGET").locator("svg")
    picture.scroll_into_view_if_needed()
    box = picture.bounding_box()
    assert box["width"] > 330  # a patch of a usual grid is large enough for a finger's tip
    opened.page.touchscreen.tap(box["x"] + 2.5 * box["width"] / SIDE, box["y"] + 3.5 * box["width"] / SIDE)
    for part in expected_info(data, 0, 1, 3 * SIDE + 2):
        assert part in opened.info("CrossGET")
    assert opened.complaints == []
    opened.context.close()


def test_nothing_can_be_loaded(browser: Any, report: ViewerReport) -> None:
    """The page's own policy forbids it, whatever gets into the page."""
    opened = Opened(browser, report)
    refused = opened.page.evaluate(
        """async () => {
          const seen = [];
          document.addEventListener('securitypolicyviolation', event => seen.push(event.effectiveDirective));
          document.body.insertAdjacentHTML('beforeend', '<img src="http://127.0.0.1:9/x.png">');
          document.body.append(Object.assign(document.createElement('script'), { textContent: 'window.broken = 1' }));
          await fetch('http://127.0.0.1:9/').catch(() => null);
          await new Promise(resolve => setTimeout(resolve, 200));
          return seen;
        }"""
    )
    assert {"img-src", "connect-src"} <= set(refused)
    assert any(directive.startswith("script-src") for directive in refused)
    assert opened.page.evaluate("window.broken") is None
    opened.context.close()


def test_without_javascript_it_says_so(browser: Any, report: ViewerReport) -> None:
    opened = Opened(browser, report, java_script_enabled=False)
    assert "draws its pictures with JavaScript, which is switched off" in opened.page.locator("body").inner_text()
    opened.context.close()
