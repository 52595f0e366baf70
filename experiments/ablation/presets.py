"""The rows of the ablation: every method and every part of CrossGET switched by itself, as `dataclasses.replace`."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from crossget import CrossGET, Random, ToMe, TopK
from crossget.reducers import Reducer

REDUCTIONS = (2, 4, 8, 12, 16)

# The whole method with the host's reference values. Untrained, its cross token is a copy of the class token.
FULL = CrossGET(r=0)
# Without what needs training: no cross token, the class token scores the tokens, and scores do not choose sources.
UNTRAINED = replace(FULL, guided_matching=False, importance="class_token", cross_token=False)


@dataclass(frozen=True)
class Preset:
    """One row.

    Attributes:
        label: how tables and legends call it.
        make: the reducer for a given r and seed; None leaves the model alone.
        seeded: whether chance takes part, so that several seeds are run.
        swept: whether r matters; otherwise it is run at r = 0 only.
    """

    label: str
    make: Callable[[int, int], Reducer | None]
    seeded: bool = False
    swept: bool = True


def part(label: str, base: CrossGET, **fields: object) -> Preset:
    """Return the row of `base` with some of its parts exchanged."""
    method = replace(base, **fields)  # type: ignore[arg-type]
    seeded = method.matching == "random"
    return Preset(label, lambda r, seed: replace(method, r=r, seed=seed if seeded else 0), seeded)


# The baselines, and the way from ToMe to CrossGET, each row adding one part to the row above it.
METHODS: dict[str, Preset] = {
    "dense": Preset("dense", lambda r, seed: None, swept=False),
    "cross_token_alone": Preset("dense with an untrained cross token", lambda r, seed: replace(FULL, r=0), swept=False),
    "random": Preset("Random: random pairs, size-weighted", lambda r, seed: Random(r, seed=seed), seeded=True),
    "topk": Preset("TopK: least important dropped", lambda r, seed: TopK(r)),
    "tome": Preset("ToMe: bipartite, size-weighted", lambda r, seed: ToMe(r)),
    "bipartite": part("+ keys of all heads", UNTRAINED, matching="bipartite", ensemble="size"),
    "complete_graph": part("+ complete graph", UNTRAINED, ensemble="size"),
    "guided_ensemble": part("+ guided ensemble", UNTRAINED),
    "cross_token": part("+ cross token", FULL, guided_matching=False),
    "crossget": part("+ guided matching = CrossGET", FULL),
}

FROM_FULL: dict[str, Preset] = {
    "full_bipartite": part("matching: bipartite", FULL, matching="bipartite"),
    "full_random": part("matching: random", FULL, matching="random"),
    "full_size": part("ensemble: size", FULL, ensemble="size"),
    "full_normalized": part("ensemble: normalized", FULL, ensemble="normalized"),
    "full_attention": part("importance: attention", FULL, importance="attention"),
    "full_class_token": part("importance: class token", FULL, importance="class_token"),
    "full_mean_heads": part("keys: mean over heads", FULL, keys="mean_heads"),
    "full_no_cross_token": part("cross token: off", FULL, cross_token=False, importance="class_token"),
    "full_plain_attention": part("proportional attention: off", FULL, proportional_attention=False),
    "full_stable": part("ties: stable", FULL, ties="stable"),
}

FROM_UNTRAINED: dict[str, Preset] = {
    "untrained_bipartite": part("matching: bipartite", UNTRAINED, matching="bipartite"),
    "untrained_random": part("matching: random", UNTRAINED, matching="random"),
    "untrained_normalized": part("ensemble: normalized", UNTRAINED, ensemble="normalized"),
    "untrained_attention": part("importance: attention", UNTRAINED, importance="attention"),
    "untrained_mean_heads": part("keys: mean over heads", UNTRAINED, keys="mean_heads"),
    "untrained_plain_attention": part("proportional attention: off", UNTRAINED, proportional_attention=False),
    "untrained_stable": part("ties: stable", UNTRAINED, ties="stable"),
}

# Nothing is scored: what the two matchings and the two kinds of keys do by themselves.
FROM_COMPLETE_GRAPH: dict[str, Preset] = {
    "complete_graph_mean_heads": part("keys: mean over heads", UNTRAINED, ensemble="size", keys="mean_heads"),
    "complete_graph_cross_token": part("cross token: on", FULL, guided_matching=False, ensemble="size"),
    "complete_graph_plain_attention": part(
        "proportional attention: off", UNTRAINED, ensemble="size", proportional_attention=False
    ),
}

PRESETS: dict[str, Preset] = {**METHODS, **FROM_FULL, **FROM_UNTRAINED, **FROM_COMPLETE_GRAPH}

# Which row answers for which part: a row of `METHODS` is what some of the exchanges amount to.
COMPARISONS: dict[str, dict[str, str]] = {
    "crossget": {
        **{name: preset.label for name, preset in FROM_FULL.items()},
        "cross_token": "guided matching: off",
    },
    "guided_ensemble": {
        **{name: preset.label for name, preset in FROM_UNTRAINED.items()},
        "complete_graph": "ensemble: size",
        "full_no_cross_token": "guided matching: on",
        "cross_token": "cross token: on",
    },
    "complete_graph": {
        "random": "matching: random",
        "bipartite": "matching: bipartite",
        "tome": "matching: bipartite, keys: mean over heads",
        **{name: preset.label for name, preset in FROM_COMPLETE_GRAPH.items()},
    },
}
