"""Checks against the dense model: of a converted model, and of the streaming rule of a single operation."""

from __future__ import annotations

import operator
import random
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.utils._pytree import tree_flatten

from .conversion import convert
from .errors import StreamingWarning
from .geometry.axes import SPATIAL_NAMES, axis_names
from .graph.example import traced_with_example
from .graph.findings import Finding
from .graph.prefix import find_prefix, image_node
from .model.converted import Converted
from .model.streamed import Streamed
from .ops import rule_for
from .scan.settings import parse_tile_shape

__all__ = ["check_op", "compare", "head", "relative_error"]


def check_op(
    op: nn.Module | Callable[..., Any],
    shape: Sequence[int],
    *,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    axes: str | None = None,
    trials: int = 20,
    seed: int = 0,
    tolerance: float = 1e-10,
) -> None:
    """Check the streaming rule of an operation against the dense one, in float64, on many images and tile shapes.

    The operation must be streamed, whichever of `axes` are. Outputs, the gradient of the image and those of parameters
    must agree, and an image on which the dense operation fails must be refused.

    Args:
        op: a module, a registered function, or any function that torch.fx can trace; called as `op(image, *args,
            **kwargs)`. A module is put into float64.
        shape: (N, C, *spatial), the greatest size of an image to try. N and C stay.
        args: further arguments.
        kwargs: further arguments by keyword.
        axes: letters of the axes to stream, such as "HW" or "N"; each trial streams some of them. By default all
            spatial axes and the batch.
        trials: number of random images and tile shapes.
        seed: of their choice.
        tolerance: the greatest relative L2 error.

    Raises:
        AssertionError: naming the image's shape and the tile shape, which reproduce it; also where the rule computes
            with a tensor that it was given, instead of listing it among the operands.
    """
    names = ("N", "C", *SPATIAL_NAMES[len(shape) - 2])
    streamed = [index for index, name in enumerate(names) if name in (axes or names) and name != "C"]
    model = _Scaled(_as_module(op, args, dict(kwargs or {})), shape[1], len(shape) - 2).double()
    choose = random.Random(seed)
    # Conversions by the axes that they stream: converting takes longer than a trial.
    conversions: dict[tuple[int, ...], Converted] = {}
    for trial in range(trials):
        size = tuple(shape) if trial == 0 else (*shape[:2], *(choose.randint(1, most) for most in shape[2:]))
        if trial % 2 == 0:  # two images at least for each conversion
            chosen = tuple(sorted(choose.sample(streamed, choose.randint(1, len(streamed)))))
        tile = tuple(choose.randint(1, size[index]) if index in chosen else None for index in range(len(shape)))
        image = torch.randn(size, dtype=torch.double, generator=torch.Generator().manual_seed(seed + trial))
        try:
            if chosen not in conversions:
                conversions[chosen] = _converted(model, tile, image)
            conversions[chosen].tile_shape = tile
            _check(model, conversions[chosen], image, tolerance)
        except Exception as error:
            name = getattr(op, "__qualname__", op)
            raise AssertionError(f"{name} on an image of {size} with tile_shape={tile}: {error}") from error


class _Scaled(nn.Module):
    """An operation behind another one, so that it reads blocks and not the image."""

    def __init__(self, op: nn.Module, channels: int, axes: int):
        super().__init__()
        self.op = op
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, channels).view(-1, *(1,) * axes))

    def forward(self, image: torch.Tensor) -> Any:
        return self.op(image * self.scale)


def _as_module(op: nn.Module | Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> nn.Module:
    """The call of an operation, as one node of a graph where a rule is there for it."""
    root, graph = nn.Module(), fx.Graph()
    image = graph.placeholder("image")

    def attribute(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        name = f"tensor{len(list(root.parameters())) + len(list(root.buffers()))}"
        register = root.register_parameter if isinstance(value, nn.Parameter) else root.register_buffer
        register(name, value)  # type: ignore[arg-type]  # a Parameter where it must be one
        return graph.get_attr(name)

    if isinstance(op, nn.Module) or rule_for(op) is not None:
        args, kwargs = fx.node.map_aggregate((tuple(args), kwargs), attribute)
    if isinstance(op, nn.Module):
        root.op = op
        graph.output(graph.call_module("op", (image, *args), kwargs))
    elif rule_for(op) is not None:
        graph.output(graph.call_function(op, (image, *args), kwargs))
    else:
        return _Traced(op, args, kwargs)
    return fx.GraphModule(root, graph)


class _Traced(nn.Module):
    def __init__(self, function: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]):
        super().__init__()
        self.function, self.args, self.kwargs = function, args, kwargs

    def forward(self, image: torch.Tensor) -> Any:
        return self.function(image, *self.args, **self.kwargs)


def _converted(model: nn.Module, tile: tuple[int | None, ...], image: torch.Tensor) -> Converted:
    """The converted model. Raises AssertionError, with the reasons, if any operation is left to the head."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", StreamingWarning)
        converted = convert(model, tile, example_input=image, prove=False)
    assert isinstance(converted, Converted)
    if left := head(converted):
        spatial = image.dim() - 2
        axes = parse_tile_shape(tile, axis_names(spatial)).axes
        reasons = "; ".join(stop.reason for stop in stops_along(model, axes, spatial))
        raise AssertionError(f"{', '.join(left)} not streamed: {reasons}")
    return converted


def stops_along(model: nn.Module, axes: tuple[str, ...], spatial: int = 2) -> list[Finding]:
    """Where streaming along these axes ends; `fxstream.analyze` would stream all spatial axes, and not the batch."""
    traced = traced_with_example(model, None, None, freeze_batchnorm=False)
    image = image_node(traced.graph, None)
    return find_prefix(traced, image, axis_names(spatial), axes, freeze_batchnorm=False).stops


def _check(model: nn.Module, converted: fx.GraphModule, image: torch.Tensor, tolerance: float) -> None:
    try:
        model(image)
    except (RuntimeError, ValueError, IndexError) as error:
        _assert_refused(converted, image, error)
    else:
        compare(model, converted, image, tolerance)


def _assert_refused(converted: nn.Module, image: torch.Tensor, reason: Exception) -> None:
    try:
        converted(image)
    except RuntimeError:
        return
    raise AssertionError(f"accepted, while the dense operation fails: {reason}") from reason


def head(converted: fx.GraphModule) -> list[str]:
    """The nodes of a converted model that depend on the image and are not streamed, by name and in order."""
    modules = dict(converted.named_modules())
    calls = (node for node in converted.graph.nodes if node.op == "call_module")
    (call,) = (node for node in calls if isinstance(modules[str(node.target)], Streamed))
    several = isinstance(modules[str(call.target)].graph.output_node().args[0], tuple)
    depending = {call.all_input_nodes[0]}
    for node in converted.graph.nodes:
        if depending.intersection(node.all_input_nodes):
            depending.add(node)
    results = {node for node in call.users if several and node.target is operator.getitem}
    outside = [node for node in converted.graph.nodes if node in depending - results - {call}]
    return [node.name for node in outside if node.op not in ("placeholder", "output")]


def compare(model: nn.Module, converted: nn.Module, image: torch.Tensor, tolerance: float = 1e-10) -> None:
    """Check that two models agree on an image: outputs, gradients of the image and of all parameters, buffers.

    Both are run on a float64 copy of the image, with the same random gradients of the outputs. Raises AssertionError,
    naming what differs by more than `tolerance`, the relative L2 error.
    """
    image = image.detach().double()
    expected, structure, expected_gradients, upstream = run(model, image)
    got, got_structure, got_gradients, _ = run(converted, image, upstream)
    assert got_structure == structure, f"outputs are nested as {got_structure}, expected {structure}"
    for index, (one, other) in enumerate(zip(got, expected, strict=True)):
        if not isinstance(other, torch.Tensor):
            assert one == other, f"output {index} is {one}, expected {other}"
            continue
        assert one.requires_grad == other.requires_grad, f"output {index}: requires_grad={one.requires_grad}"
        _assert_close(one, other, f"output {index}", tolerance)
    assert got_gradients.keys() == expected_gradients.keys(), "the models have different parameters"
    for name, gradient in expected_gradients.items():
        _assert_close(got_gradients[name], gradient, f"gradient of {name}", tolerance)
    buffers = dict(converted.named_buffers())
    for name, buffer in model.named_buffers():
        _assert_close(buffers[name], buffer, f"buffer {name}", tolerance)


def run(
    model: nn.Module, image: torch.Tensor, upstream: Sequence[torch.Tensor] | None = None
) -> tuple[list[Any], Any, dict[str, torch.Tensor | None], list[torch.Tensor]]:
    """Outputs, their structure, the gradients of the image and of the parameters, and those given for the outputs."""
    image = image.detach().clone().requires_grad_()
    leaves, structure = tree_flatten(model(image))
    # Taken before the backward pass: nothing may change them afterwards.
    outputs = [
        leaf.detach().clone().requires_grad_(leaf.requires_grad) if _is_tensor(leaf) else leaf for leaf in leaves
    ]
    roots = [leaf for leaf in leaves if _is_tensor(leaf) and leaf.requires_grad]
    if upstream is None:
        upstream = [torch.randn_like(root) for root in roots]
    assert len(upstream) == len(roots), f"{len(roots)} outputs require a gradient, expected {len(upstream)}"
    named = {"the image": image, **{n: p for n, p in model.named_parameters() if p.requires_grad}}
    if not roots:
        return outputs, structure, dict.fromkeys(named), []
    found = torch.autograd.grad(roots, list(named.values()), list(upstream), allow_unused=True)
    return outputs, structure, dict(zip(named, found, strict=True)), list(upstream)


def relative_error(got: torch.Tensor | None, expected: torch.Tensor | None) -> float:
    """Relative L2 distance; 0 if both are zero everywhere, or None.

    Raises AssertionError where shapes, types or what is not finite differ, or only one is None.
    """
    if got is None or expected is None:
        assert got is None, "there is a tensor, and none is expected"
        assert expected is None, "there is no tensor, and one is expected"
        return 0.0
    assert got.shape == expected.shape, f"shape {tuple(got.shape)}, expected {tuple(expected.shape)}"
    assert got.dtype == expected.dtype, f"{got.dtype}, expected {expected.dtype}"
    got, expected = got.detach(), expected.detach()
    if not expected.is_floating_point():
        got, expected = got.double(), expected.double()
    assert torch.equal(got.isfinite(), expected.isfinite()), "one is finite where the other is not"
    finite = expected.isfinite()
    assert torch.equal(got[~finite].nan_to_num(), expected[~finite].nan_to_num()), "another infinity"
    distance, scale = (got - expected)[finite].norm().item(), expected[finite].norm().item()
    return distance / scale if scale else float(distance > 0)


def _assert_close(got: torch.Tensor | None, expected: torch.Tensor | None, what: str, tolerance: float) -> None:
    try:
        error = relative_error(got, expected)
    except AssertionError as failure:
        raise AssertionError(f"{what}: {failure}") from None
    assert error <= tolerance, f"{what}: relative error {error:.2e}"


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)
