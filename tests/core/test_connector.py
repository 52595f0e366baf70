"""The reduction of the features of one image, without a model."""

from __future__ import annotations

from types import SimpleNamespace

import torch

import crossget
from crossget.core.connector import FACTS, Connector, reduce_features


def test_determinantal_keeps_more_tokens_than_there_are_channels() -> None:
    generator = torch.Generator().manual_seed(0)
    features, text = torch.randn(60, 4, generator=generator), torch.randn(4, generator=generator)
    reducer = crossget.Determinantal(crossget.Keep(0.5)).resolved(FACTS)
    unit = reduce_features(reducer, features, 30, text=text)
    assert len(unit.kept.unique()) == 30
    assert torch.equal(unit.tokens, features[unit.kept])


def test_features_for_layers_alone() -> None:
    layers = [(2, [torch.ones(3, 4), torch.zeros(2, 4)]), (5, [torch.full((3, 4), 2.0), torch.zeros(2, 4)])]
    connector = Connector(None, None, {"image": 9}, field="deepstack_features")
    out = SimpleNamespace(deepstack_features=layers)
    assert [len(entry) for entry in connector.features(out)] == [3, 2]
    new = connector.replaced(out, torch.ones(3, 4), [layer[[0, 1, 3]] for layer in connector.layers(out)], [2, 1])
    assert [number for number, _ in new.deepstack_features] == [2, 5]
    assert [len(part) for part in new.deepstack_features[1][1]] == [2, 1]
    assert out.deepstack_features is layers
    assert len(layers[0][1][0]) == 3


def test_a_tensor_keeps_its_axes() -> None:
    connector = Connector(None, None, {"image": 9})
    out = SimpleNamespace(pooler_output=torch.zeros(3, 2, 4, 8), deepstack_features=None)
    assert [len(entry) for entry in connector.features(out)] == [8] * 3
    assert connector.replaced(out, torch.zeros(12, 8), [], [6, 6]).pooler_output.shape == (2, 2, 3, 8)
    assert connector.replaced(out, torch.zeros(11, 8), [], [6, 5]).pooler_output.shape == (1, 11, 8)
