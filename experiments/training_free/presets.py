"""The rows of the comparison, each a reducer of one strength that is then fitted to a budget of multiply-adds."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from crossget import CrossGET, PerLayer, Ratio, Rising, ToMe, Ward
from crossget.reducers import Reducer
from crossget.schedule import Schedule

BUDGETS = (80, 69, 58, 50)
"""Multiply-adds to spend, in % of the dense model's."""


def constant(r: float, depth: int) -> Schedule:
    """Return r tokens in every block where r need not be whole: blocks of floor(r) and ceil(r), evenly mixed."""
    return PerLayer(tuple(round((layer + 1) * r) - round(layer * r) for layer in range(depth)))


def rising(share: float, depth: int) -> Schedule:
    """Return `crossget.Rising`."""
    return Rising(share)


def ratio(share: float, depth: int) -> Schedule:
    """Return `crossget.Ratio`."""
    return Ratio(share)


@dataclass(frozen=True)
class Preset:
    """One row.

    Attributes:
        label: how tables and legends call it.
        method: what is attached, at r = 0; None: nothing.
        schedule: (strength, depth) -> the schedule.
        strongest: the largest strength that is tried; None: half of the tokens.
        like: the row whose fitted schedule this one takes; None: it is fitted itself. So a part that is exchanged is
            compared on the same tokens; what its own matching costs is not made up for.
    """

    label: str
    method: Reducer | None
    schedule: Callable[[float, int], Schedule] = constant
    strongest: float | None = None
    like: str | None = None

    def make(self, strength: float, depth: int) -> Reducer:
        """Return the reducer of this strength.

        Raises:
            ValueError: the row is the dense model.
        """
        if self.method is None:
            raise ValueError("the dense model has no strength")
        return replace(self.method, r=self.schedule(strength, depth))


WARD = Ward(r=0)
BY_SIZE = replace(WARD, importance="attention", guided_matching=False, ensemble="size")
TOME = ToMe(r=0)

METHODS: dict[str, Preset] = {
    "dense": Preset("dense", None),
    "tome": Preset("ToMe", TOME),
    "tome_rising": Preset("ToMe, Rising", TOME, rising, 1.0),
    "crossget": Preset("CrossGET, untrained", CrossGET(r=0)),
    "ward_constant": Preset("Ward, constant r", WARD),
    "ward": Preset("Ward, Rising", WARD, rising, 1.0),
    "ward_size_constant": Preset("Ward by size, constant r", BY_SIZE),
    "ward_size": Preset("Ward by size, Rising", BY_SIZE, rising, 1.0),
}

# Each idea by itself, put into ToMe.
ALONE: dict[str, Preset] = {
    "tome_rising": METHODS["tome_rising"],
    "tome_tokens": Preset("+ tokens compared, not keys", replace(TOME, keys="tokens"), like="ward_constant"),
    "tome_ward": Preset("+ Ward's criterion, by size", replace(TOME, matching="ward"), like="ward_constant"),
    "tome_tokens_ward": Preset(
        "+ both: tokens, Ward's criterion", replace(TOME, keys="tokens", matching="ward"), like="ward_constant"
    ),
    "tome_reading": Preset(
        "+ ensemble by class attention",
        replace(TOME, importance="class_attention", ensemble="normalized"),
        like="ward_constant",
    ),
}

# Each idea taken away, or exchanged, in the whole.
AWAY: dict[str, Preset] = {
    "ward_constant": METHODS["ward_constant"],
    "ward_ratio": Preset("Ratio instead of Rising", WARD, ratio, 0.5),
    "ward_two_sets": Preset(
        "two sets, all channels, instead of a graph, half of them",
        replace(WARD, matching="ward", keys="tokens"),
        rising,
        1.0,
    ),
    "ward_all_channels": Preset("all channels instead of half", replace(WARD, keys="tokens"), rising, 1.0),
    "ward_cosine": Preset(
        "cosines instead of Ward's criterion",
        replace(WARD, matching="complete_graph", guided_matching=False),
        like="ward",
    ),
    "ward_keys": Preset("keys instead of tokens", replace(WARD, keys="all_heads"), like="ward"),
    "ward_size": METHODS["ward_size"],
    "ward_size_ensemble": Preset("mass in the matching alone", replace(WARD, ensemble="size"), like="ward"),
    "ward_size_matching": Preset("mass in the ensemble alone", replace(WARD, guided_matching=False), like="ward"),
}

PRESETS: dict[str, Preset] = {**METHODS, **ALONE, **AWAY}
