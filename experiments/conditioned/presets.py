"""The rows: which method, and which text its importance is the nearness to."""

from dataclasses import dataclass, replace
from typing import Literal

from crossget import CrossGET, ToMe, Ward
from crossget.methods.reducers import Reducer

Target = Literal["none", "own", "other", "all"]


@dataclass(frozen=True)
class Preset:
    """One row.

    Attributes:
        label: how tables call it.
        method: what is attached to the image tower, at r = 0; None: nothing.
        target: what a photograph's patches are compared with while it is scored against a text. "own": that text, so
            that every pair of photograph and text is a forward of its own; "other": another text of the set, to
            show what any importance of this kind would give; "all": the mean of all texts, one forward per photograph;
            "none": nothing, likewise.
    """

    label: str
    method: Reducer | None
    target: Target = "none"


def by_text(label: str, method: Reducer) -> dict[str, Preset]:
    """Return a method whose importance is the nearness to a text, with each kind of text."""
    guided = replace(method, importance="text")  # type: ignore[call-arg]  # a field of all that merge
    return {
        f"{label}_own": Preset(f"{label}, by the pair's own text", guided, "own"),
        f"{label}_other": Preset(f"{label}, by another text", guided, "other"),
        f"{label}_all": Preset(f"{label}, by the mean of all texts", guided, "all"),
    }


CROSSGET, WARD = CrossGET(0, cross_token=False), Ward(0, norm_correction=False, class_token_only=False)
PRESETS: dict[str, Preset] = {
    "dense": Preset("dense", None),
    "tome": Preset("ToMe", ToMe(0)),
    "crossget": Preset("crossget, by the class token", CROSSGET),
    **by_text("crossget", CROSSGET),
    "ward": Preset("ward, by the class token's attention", replace(WARD, importance="class_attention")),
    **by_text("ward", WARD),
}

QUESTIONS: dict[str, tuple[tuple[str, str], ...]] = {
    "Does the pair's own text help more than another?": (
        ("crossget_own", "crossget_other"),
        ("ward_own", "ward_other"),
    ),
    "And more than no text?": (("crossget_own", "crossget"), ("ward_own", "ward")),
    "Does one text for all help, at the cost of none?": (("crossget_all", "crossget"), ("ward_all", "ward")),
    "Is the best of it better than ToMe?": (("crossget_own", "tome"), ("ward_own", "tome")),
}
"""Which rows are compared with which."""
