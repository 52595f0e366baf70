"""The rows of the comparison, each a reducer of one strength that is then fitted to a budget of multiply-adds."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from crossget import CrossGET, RampedRatio, Ratio, ToMe, Ward
from crossget.methods.reducers import Reducer
from crossget.methods.schedules import PerLayer, Schedule

BUDGETS = (80, 69, 58, 50)
"""Multiply-adds to spend, in % of the dense model's."""


def constant(r: float, depth: int) -> Schedule:
    """Return r tokens in every block where r need not be whole: blocks of floor(r) and ceil(r), evenly mixed."""
    return PerLayer(tuple(round((layer + 1) * r) - round(layer * r) for layer in range(depth)))


def rising(share: float, depth: int) -> Schedule:
    """Return `crossget.RampedRatio`."""
    return RampedRatio(share)


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


WARD, TOME = Ward(r=0), ToMe(r=0)
READING = replace(WARD, importance="class_attention")

METHODS: dict[str, Preset] = {
    "dense": Preset("dense", None),
    "tome": Preset("ToMe", TOME),
    "tome_skip": Preset("ToMe, class token only", replace(TOME, class_token_only=True)),
    "tome_all": Preset(
        "ToMe, RampedRatio, class token only, norm correction",
        replace(TOME, class_token_only=True, norm_correction=True),
        rising,
        1.0,
    ),
    "crossget": Preset("CrossGET, untrained", CrossGET(r=0)),
    "ward": Preset("Ward", WARD, rising, 1.0),
    "ward_reading": Preset("Ward by class attention", READING, rising, 1.0),
}

# Each part alone, in ToMe.
ALONE: dict[str, Preset] = {
    "tome_skip": METHODS["tome_skip"],
    "tome_coherence": Preset("+ norm correction", replace(TOME, norm_correction=True)),
    "tome_rising": Preset("+ RampedRatio", TOME, rising, 1.0),
    "tome_tokens": Preset("+ tokens compared, not keys", replace(TOME, keys="tokens")),
    "tome_ward": Preset("+ Ward's criterion", replace(TOME, matching="ward")),
    "tome_tokens_ward": Preset("+ both: tokens, Ward's criterion", replace(TOME, keys="tokens", matching="ward")),
}

# Each part exchanged or left out in Ward.
AWAY: dict[str, Preset] = {
    "ward_unskipped": Preset("last block for all tokens", replace(WARD, class_token_only=False), rising, 1.0),
    "ward_loud": Preset("no norm correction", replace(WARD, norm_correction=False), rising, 1.0),
    "ward_plain": Preset(
        "neither of the two", replace(WARD, class_token_only=False, norm_correction=False), rising, 1.0
    ),
    "ward_constant": Preset("constant r instead of RampedRatio", WARD),
    "ward_reading": METHODS["ward_reading"],
    "ward_reading_ensemble": Preset(
        "class attention in the ensemble alone", replace(READING, guided_matching=False), like="ward_reading"
    ),
    "ward_reading_matching": Preset(
        "class attention in the matching alone", replace(READING, ensemble="size"), like="ward_reading"
    ),
    "ward_ratio": Preset("Ratio instead of RampedRatio", WARD, ratio, 0.5),
    "ward_two_sets": Preset(
        "bipartite, all channels, instead of a graph, half of them",
        replace(WARD, matching="ward", key_stride=1),
        rising,
        1.0,
    ),
    "ward_all_channels": Preset("all channels instead of half", replace(WARD, key_stride=1), rising, 1.0),
    "ward_cosine": Preset("cosines instead of Ward's criterion", replace(WARD, matching="complete_graph"), like="ward"),
    "ward_keys": Preset("keys instead of tokens", replace(WARD, keys="all_heads", key_stride=1), like="ward"),
}

PRESETS: dict[str, Preset] = {**METHODS, **ALONE, **AWAY}
