"""What every test of exactness relies on: a converted model against the plain one, in float64."""

from __future__ import annotations

import copy
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_flatten

import fxstream
from fxstream.stream import Streamed


def relative_error(got: torch.Tensor | None, expected: torch.Tensor | None) -> float:
    """Relative L2 distance; 0 if both are zero everywhere. Fails where shapes or types differ, or only one is None."""
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
    converted = fxstream.convert(model, tile_shape, **convert_kwargs)
    if last is not None:
        handed = handed_over(converted)
        assert handed == ([last] if isinstance(last, str) else list(last)), f"the head gets {handed}"
    else:
        left = not_streamed(converted)
        assert not left, f"not streamed: {left}"
    if convert_kwargs.get("freeze_batchnorm"):
        freeze_batchnorms(plain, converted)
    compare(plain, converted, image, tolerance)
    return converted


def compare(model: nn.Module, converted: nn.Module, image: torch.Tensor, tolerance: float = 1e-10) -> None:
    """Run both on the same image, with the same gradients of the outputs."""
    image = image.detach().double()
    expected, structure, expected_gradients, upstream = run(model, image)
    got, got_structure, got_gradients, _ = run(converted, image, upstream)
    assert got_structure == structure
    for index, (one, other) in enumerate(zip(got, expected, strict=True)):
        if not isinstance(other, torch.Tensor):
            assert one == other, f"output {index}"
            continue
        assert one.requires_grad == other.requires_grad, f"output {index}: requires_grad={one.requires_grad}"
        _assert_close(one, other, f"output {index}", tolerance)
    assert got_gradients.keys() == expected_gradients.keys()
    for name, gradient in expected_gradients.items():
        _assert_close(got_gradients[name], gradient, f"gradient of {name}", tolerance)
    buffers = dict(converted.named_buffers())
    for name, buffer in model.named_buffers():
        _assert_close(buffers[name], buffer, f"buffer {name}", tolerance)


def _assert_close(got: torch.Tensor | None, expected: torch.Tensor | None, what: str, tolerance: float) -> None:
    try:
        error = relative_error(got, expected)
    except AssertionError as failure:
        raise AssertionError(f"{what}: {failure}") from None
    assert error <= tolerance, f"{what}: relative error {error:.2e}"


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


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def handed_over(converted: fx.GraphModule) -> list[str]:
    """The names of the nodes whose values the streamed part hands to the head."""
    return [node.name for node in _output(converted, _call(converted)).all_input_nodes]


def not_streamed(converted: fx.GraphModule) -> list[str]:
    """The names of the nodes that depend on the image and are neither the streamed call, nor unpack it, nor return."""
    call = _call(converted)
    image = call.all_input_nodes[0]
    several = isinstance(_output(converted, call).args[0], tuple)
    streamed = {image, call, *(user for user in call.users if several and user.target is operator.getitem)}
    depending = {image}
    for node in converted.graph.nodes:
        if depending.intersection(node.all_input_nodes):
            depending.add(node)
    return [
        node.name
        for node in converted.graph.nodes
        if node in depending and node not in streamed and node.op != "output"
    ]


def _call(converted: fx.GraphModule) -> fx.Node:
    """The streamed call."""
    modules = dict(converted.named_modules())
    called = (node for node in converted.graph.nodes if node.op == "call_module")
    (call,) = (node for node in called if type(modules[str(node.target)]) is Streamed)
    return call


def _output(converted: fx.GraphModule, call: fx.Node) -> fx.Node:
    """The output node of the streamed graph."""
    return next(node for node in reversed(converted.get_submodule(str(call.target)).graph.nodes) if node.op == "output")


def freeze_batchnorms(model: nn.Module, converted: fx.GraphModule) -> None:
    """Put those batch norms into eval mode that `converted` streams, as `freeze_batchnorm=True` has it."""
    streamed = converted.get_submodule(str(_call(converted).target))
    for node in streamed.graph.nodes:
        if node.op == "call_module":
            module = model.get_submodule(str(node.target))
            module.train(module.training and not isinstance(module, _BatchNorm))


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
