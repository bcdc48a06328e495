"""The second door on whole networks: torchvision's families, and networks that are drawn at random."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, given, seed, settings
from hypothesis import strategies as st
from reference import Body, randomise
from test_random_networks import Network, _may_misread, _well_conditioned, networks, tile_shapes
from test_second_door import Prefixes, prefixes
from torch import nn
from torch.utils._pytree import tree_leaves

import fxstream
from fxstream.testing import compare, run

__all__ = ["prefixes"]
torchvision = pytest.importorskip("torchvision")
EXAMPLES = int(os.environ.get("FXSTREAM_EXAMPLES", "200"))


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


CLASSIFICATION = """
    alexnet vgg11_bn resnet18 resnext50_32x4d densenet121 googlenet inception_v3 squeezenet1_1 mobilenet_v2
    mobilenet_v3_small mnasnet0_5 shufflenet_v2_x0_5 efficientnet_b0 efficientnet_v2_s regnet_y_400mf convnext_tiny
    swin_t swin_v2_t vit_b_16 maxvit_t
""".split()
SEGMENTATION = "fcn_resnet50 deeplabv3_mobilenet_v3_large lraspp_mobilenet_v3_large".split()
FIXED = {"vit_b_16": 224, "maxvit_t": 224, "inception_v3": 96, "alexnet": 96}
"""Sides of images that a network wants, or that are the least that it takes."""
NOTHING = {"vit_b_16"}
"""Networks whose first operations merge the spatial axes."""
STATIC = {"maxvit_t"}
"""Networks that torch itself takes many minutes to capture for sizes that are not known, under any backend."""


def built(name: str) -> nn.Module:
    if name in SEGMENTATION:
        model = torchvision.models.get_model(name, weights=None, weights_backbone=None, num_classes=3)
    else:
        options: dict[str, Any] = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
        model = torchvision.models.get_model(name, weights=None, num_classes=3, **options)
    return randomise(model.double()).eval()


def assert_exact(name: str, prefixes: Prefixes, tile: Any) -> None:
    model = built(name)
    side = FIXED.get(name, 64)
    picture = torch.randn(1, 3, side, side if name in FIXED else side + 5)
    compiled = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "streaming ends", fxstream.StreamingWarning)
        if name in STATIC:
            compiled.compile(backend=fxstream.backend(tile), dynamic=False)
        else:
            fxstream.compile(compiled, tile, strict=True)
        compare(model, compiled, picture, 1e-9)
        assert len(prefixes) == 1
        converted = fxstream.convert(copy.deepcopy(model), tile, example_input=picture, prove=False)
    # What this door streams is what the other one streams.
    called = (node.target for node in converted.get_submodule("streamed").graph.nodes if node.op == "call_module")
    expected = sum(isinstance(converted.get_submodule(path), nn.Conv2d) for path in called)
    assert sum(node.target is torch.conv2d for node in prefixes[0].nodes) == expected


def test_a_network_of_torchvision(prefixes: Prefixes) -> None:
    assert_exact("squeezenet1_1", prefixes, 32)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in (*CLASSIFICATION, *SEGMENTATION) if name not in NOTHING])
def test_torchvision(name: str, prefixes: Prefixes) -> None:
    assert_exact(name, prefixes, 32)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:streaming ends:fxstream.StreamingWarning")
@pytest.mark.parametrize(("name", "streams_whole"), [("vit_b_16", False), ("swin_t", False), ("efficientnet_b0", True)])
def test_torchvision_along_the_batch(name: str, streams_whole: bool, prefixes: Prefixes) -> None:
    model = built(name)
    compiled = fxstream.compile(copy.deepcopy(model), (2, None, None, None), strict=True)
    compare(model, compiled, torch.randn(3, 3, FIXED.get(name, 64), FIXED.get(name, 64)), 1e-9)
    assert ([finding.node.op for finding in prefixes[0].head] == ["output"]) is streams_whole


# Random networks.


def body(network: Network) -> Any:
    """The forward of a drawn network as a function, which TorchDynamo can capture, unlike `exec`."""
    lines = [f"    {line}" for line in (*network.forward, f"return {network.result}")]
    names: dict[str, Any] = {"torch": torch, "F": torch.nn.functional, "nn": nn}
    exec("\n".join(["def body(self, x):", *lines]), names)
    return names["body"]


@st.composite
def cases(draw: Any) -> tuple[Network, Any, bool | None]:
    network = draw(networks())
    assume(not network.fails)
    return network, draw(tile_shapes(network)), draw(st.sampled_from([None, True]))


def check(network: Network, tile_shape: Any, dynamic: bool | None) -> None:
    torch._dynamo.reset()
    drawn = network.build().eval()
    model = Body(body(network)).double().eval()
    for registry in ("_modules", "_parameters", "_buffers"):
        getattr(model, registry).update(getattr(drawn, registry))
    torch.manual_seed(0)
    picture = torch.randn(network.shape, dtype=torch.double)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            outputs, _, gradients, _ = run(model, picture)
        except RuntimeError as error:
            assume("modified by an inplace operation" not in str(error) and "view" not in str(error))
            raise
        leaves = [*tree_leaves(outputs), *gradients.values()]
        assume(all(leaf is None or (leaf.isfinite().all() and leaf.abs().max() < 1e6) for leaf in leaves))
        compiled = copy.deepcopy(model)
        compiled.compile(backend=fxstream.backend(tile_shape), dynamic=dynamic)
        try:
            compare(model, compiled, picture)
        except fxstream.NothingToStreamError:
            assert network.may_stop
        except AssertionError:
            assert not _well_conditioned(model, picture) or _may_misread(model, picture)


def explore(start: int, examples: int) -> None:
    options = settings(
        max_examples=examples,
        deadline=None,
        derandomize=False,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.explicit, Phase.generate],
    )
    print(f"seed {start}")
    seed(start)(options(given(cases())(lambda case: check(*case))))()


def test_a_few_random_networks() -> None:
    explore(0, 6)


@pytest.mark.slow
def test_random_networks() -> None:
    explore(int.from_bytes(os.urandom(4), "little"), EXAMPLES)
