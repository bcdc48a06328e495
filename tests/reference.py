"""Helpers that several test files share.

Models to convert, the comparison of a converted model with the plain one, and counting of operations and memory.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import product
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fxstream
from fxstream.memory.flops import Flops
from fxstream.model.streamed import Streamed
from fxstream.testing import compare, head, relative_error

# Models and images.


class Body(nn.Module):
    """A network whose forward is a function of the network itself and the image.

    `parts` are set as attributes: modules, parameters, buffers (`nn.Buffer`) or plain values.
    """

    def __init__(self, body: Callable[[Any, torch.Tensor], Any], **parts: Any) -> None:
        super().__init__()
        self.body = body
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: torch.Tensor) -> Any:
        return self.body(self, x)


def each_once(**values: Iterable[Any]) -> pytest.MarkDecorator:
    """A test of all combinations of the values of some parameters. Those that only repeat values are slow tests."""
    lists = [list(one) for one in values.values()]
    first = {tuple(index % len(one) for one in lists) for index in range(max(map(len, lists)))}
    combinations = [
        pytest.param(
            *(one[index] for one, index in zip(lists, indices, strict=True)),
            marks=() if indices in first else pytest.mark.slow,
        )
        for indices in product(*(range(len(one)) for one in lists))
    ]
    return pytest.mark.parametrize(tuple(values), combinations, ids=_short)


def _short(value: Any) -> str:
    return str(getattr(value, "__name__", value))


def pair(model: nn.Module, tile_shape: Any, **convert_kwargs: Any) -> tuple[nn.Module, Any]:
    """The model, and a converted copy of it that has parameters and buffers of its own."""
    return model, fxstream.convert(copy.deepcopy(model), tile_shape, **{"prove": False, **convert_kwargs})


def image(height: int = 26, width: int = 21, batch: int = 2, seed: int = 1) -> torch.Tensor:
    """Random images of three channels in float64; the same ones at every call with the same arguments."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, height, width, dtype=torch.double, generator=generator)


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter and every running statistic a value that matters, of about the initial scale."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 1.0 if parameter.dim() < 2 else parameter[0].numel() ** -0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
        for module in model.modules():
            if isinstance(module, _BatchNorm) and module.running_mean is not None and module.running_var is not None:
                shape = module.running_mean.shape
                module.running_mean.copy_(torch.randn(shape, generator=generator))
                module.running_var.copy_(torch.rand(shape, generator=generator) + 0.5)
    return model


class Replayed(nn.Module):
    """Takes the place of a dropout: scales by given factors, which are 0 where one has dropped; another set a call."""

    def __init__(self, factors: Sequence[torch.Tensor]):
        super().__init__()
        self.factors = iter(factors)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * next(self.factors)


# The converted model against the plain one.


def assert_exact(
    model: nn.Module,
    shape_or_image: Sequence[int] | torch.Tensor,
    tile_shape: int | Sequence[int | None],
    *,
    last: str | Sequence[str] | None = None,
    whole: bool = False,
    tolerance: float = 1e-10,
    **convert_kwargs: Any,
) -> fx.GraphModule:
    """Convert `model` and compare with it: outputs, gradients of the image and of every parameter, buffers.

    Args:
        model: is copied, and compared in float64.
        shape_or_image: the image, or the shape of a random one.
        tile_shape: as `fxstream.convert` takes it.
        last: what must be streamed: up to these nodes, by name and in order, whose values are handed to the head.
        whole: everything must be streamed, instead of `last`.
        tolerance: the greatest relative error.
        convert_kwargs: further arguments of `fxstream.convert`.

    Returns:
        The converted model.
    """
    assert (last is not None) != whole, "say what must be streamed: last=..., or whole=True"
    # Two copies, since the plain run may change buffers.
    plain, model = copy.deepcopy(model).double(), copy.deepcopy(model).double()
    image = shape_or_image if isinstance(shape_or_image, torch.Tensor) else torch.randn(*shape_or_image)
    converted = fxstream.convert(model, tile_shape, **{"prove": False, **convert_kwargs})
    if last is not None:
        handed = handed_over(converted)
        assert handed == ([last] if isinstance(last, str) else list(last)), f"the head gets {handed}"
    else:
        left = head(converted)
        assert not left, f"not streamed: {left}"
    if convert_kwargs.get("freeze_batchnorm"):
        freeze_batchnorms(plain)
    compare(plain, converted, image, tolerance)
    return converted


def handed_over(converted: fx.GraphModule) -> list[str]:
    """The names of the nodes whose values the streamed part hands to the head."""
    return [node.name for node in _output(converted, _call(converted)).all_input_nodes]


def _call(converted: fx.GraphModule) -> fx.Node:
    """The streamed call."""
    modules = dict(converted.named_modules())
    called = (node for node in converted.graph.nodes if node.op == "call_module")
    (call,) = (node for node in called if type(modules[str(node.target)]) is Streamed)
    return call


def _output(converted: fx.GraphModule, call: fx.Node) -> fx.Node:
    """The output node of the streamed graph."""
    return next(node for node in reversed(converted.get_submodule(str(call.target)).graph.nodes) if node.op == "output")


def freeze_batchnorms(model: nn.Module) -> None:
    """Put all batch norms into eval mode, as `freeze_batchnorm=True` has it."""
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.eval()


def gradients(model: nn.Module) -> dict[str, torch.Tensor | None]:
    """The accumulated gradient of every parameter, by name; these are the tensors themselves and not copies."""
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_close(
    got: Mapping[str, torch.Tensor | None], expected: Mapping[str, torch.Tensor | None], tolerance: float = 1e-10
) -> None:
    """Check that the tensors of two mappings agree by name, and that they are not all zero or None.

    `tolerance` is the greatest relative L2 error of each tensor. With 0, they are equal bit by bit, but for signs of 0.
    """
    assert got.keys() == expected.keys()
    assert any(tensor is not None and tensor.any() for tensor in expected.values()), "nothing is expected but zeros"
    for name, tensor in expected.items():
        error = relative_error(got[name], tensor)
        assert error <= tolerance, f"{name}: {error:.1e}"


# Counting.


class Operations(TorchDispatchMode):
    """Counts how often operations of a name run, in forward and backward; not on the meta device, where none runs."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        result = func(*args, **(kwargs or {}))
        if not any(isinstance(leaf, torch.Tensor) and leaf.is_meta for leaf in tree_leaves(result)):
            self.counts[name] = self.counts.get(name, 0) + 1
        return result


def counts(model: nn.Module, *inputs: Any) -> dict[str, int]:
    """How often each operation runs in a forward and, where gradients are on, a backward pass."""
    with Operations() as operations:
        output = model(*inputs)
        if torch.is_grad_enabled():
            output.sum().backward()
    return operations.counts


class Shapes(TorchDispatchMode):
    """Records the shape of the first argument at each call of an operation, such as `torch.ops.aten.convolution`.

    Attributes:
        shapes: in the order of the calls.
    """

    def __init__(self, operation: Any) -> None:
        super().__init__()
        self.operation = operation
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket is self.operation:
            self.shapes.append(tuple(args[0].shape))
        return func(*args, **(kwargs or {}))


class Allocations(TorchDispatchMode):
    """Records the tensors that operations make, views of their arguments aside.

    Attributes:
        largest: bytes of the largest storage of a tensor, by the tensor's shape.
    """

    def __init__(self) -> None:
        super().__init__()
        self.largest: dict[tuple[int, ...], int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in given:
                shape, nbytes = tuple(tensor.shape), tensor.untyped_storage().nbytes()
                self.largest[shape] = max(self.largest.get(shape, 0), nbytes)
        return result


def flops(function: Callable[[], Any]) -> int:
    """Floating-point operations of a call."""
    with Flops() as counter:
        function()
    return counter.total


def live_bytes() -> int:
    """Bytes of all tensors that Python can reach, each storage once."""
    gc.collect()
    # Exactly these: what torch.compile leaves behind has no memory.
    tensors = [thing for thing in gc.get_objects() if type(thing) in (torch.Tensor, nn.Parameter)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())
