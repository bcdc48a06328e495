"""Words for the nodes of an fx graph: what a node calls, what the user calls it, and what nested arguments hold."""

from __future__ import annotations

import inspect
import operator
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..ops import Rule, inplace, rule_for, rule_for_module
from .rebuild import only_makes

_KNOWN = ("torch", "torchvision", "_operator", "builtins", "math")
_ASSIGNING = {*inplace.FUNCTIONS.values(), *(getattr(operator, name) for name in inplace.NAMES), operator.setitem}

_MODULES_OF_NEW = {f"torch.nn.modules.{name}" for name in ("activation", "batchnorm", "instancenorm", "normalization")}
_NEW = set(
    """
    layer_norm group_norm instance_norm batch_norm rms_norm linear bilinear matmul mm bmm softmax log_softmax gelu silu
    sigmoid tanh relu relu6 elu selu leaky_relu hardswish hardsigmoid mish softplus exp log sqrt rsqrt square mean var
    std scaled_dot_product_attention
""".split()
)
"""Functions and methods of torch that make new memory for their result, unless they are told to work in place."""
_FACTS = ("shape", "dtype", "device", "ndim", "size", "dim", "numel")
"""Attributes and methods of a tensor that are not tensors."""


def label(node: fx.Node) -> str:
    """How a node is named to the user: by the path of the module that it calls, or else of the module that it is in."""
    if node.op == "call_module":
        return str(node.target)
    path = next(reversed(modules_around(node)), "")
    return f"{path}: {node.name}" if path else node.name


def modules_around(node: fx.Node) -> list[str]:
    """The paths of the modules in whose forward a node was traced, the innermost last."""
    return [path for path, _ in (node.meta.get("nn_module_stack") or {}).values()]


def operation(node: fx.Node, module: nn.Module | None) -> str:
    """The operation of a node in the user's words: "BatchNorm2d", "torch.relu", ".view()"."""
    if module is not None:
        return type(module).__name__
    if node.op == "call_method":
        return f".{node.target}()"
    name = getattr(node.target, "__name__", str(node.target))
    if node.target in inplace.FUNCTIONS.values():
        return f"operator.{name}"
    return f"{(getattr(node.target, '__module__', None) or 'torch').lstrip('_')}.{name}"


def rule_of(node: fx.Node, module: nn.Module | None) -> Rule | None:
    """The rule of a node's operation, if there is one; `module` is what the node calls, if it calls a module."""
    return rule_for(node.target) if module is None else rule_for_module(module)


def spatial_axes(node: fx.Node, module: nn.Module | None) -> int | None:
    """The number of spatial axes that a node's operation is made for; None if it takes any, as element-wise ones do."""
    rule = rule_of(node, module)
    return None if rule is None else rule.spatial


def overwrites(node: fx.Node, module: nn.Module | None) -> bool:
    """Whether an operation may write into its arguments: torch's names tell, and a user's code always may."""
    if only_makes(node.target):
        return False
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        return True
    if isinstance(node.target, torch._ops.OpOverload):
        return bool(node.target._schema.is_mutable)
    if is_own_code(node, module):
        return True
    if module is not None:
        return any(getattr(part, "inplace", False) for part in module.modules())
    name = str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")
    by_name = name.endswith("_") and not name.endswith("__")
    given = _arguments(node)
    by_argument = bool(given.get("inplace")) or given.get("out") is not None
    return by_name or by_argument or node.target in _ASSIGNING


def is_own_code(node: fx.Node, module: nn.Module | None) -> bool:
    """Whether an operation is a user's or a library's own code without a rule, whose name tells nothing."""
    if module is not None:
        return rule_for_module(module) is None and not type(module).__module__.startswith("torch.nn.")
    return node.op == "call_function" and _library(node) not in _KNOWN and node.target not in _ASSIGNING


def _library(node: fx.Node) -> str:
    """The package of the function that a node calls; functions and methods written in C++ are torch's."""
    return (getattr(node.target, "__module__", None) or "torch").partition(".")[0]


def _arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of a node by name, as far as the names are known: those of torch's C++ functions are not."""
    if isinstance(node.target, FunctionType):
        try:
            return inspect.signature(node.target).bind(*node.args, **node.kwargs).arguments
        except TypeError:  # the call itself will fail
            return dict(node.kwargs)
    return dict(node.kwargs)


def is_new(node: fx.Node, module: nn.Module | None) -> bool:
    """Whether it is certain that the result of an operation shares no memory with what the operation reads."""
    if overwrites(node, module):
        return False
    if spatial_axes(node, module) is not None:
        return True
    if module is not None:
        return type(module) is nn.Linear or type(module).__module__ in _MODULES_OF_NEW
    if node.target is getattr:
        return node.args[1] in _FACTS
    name = str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")
    return name in (*_NEW, *_FACTS) and _library(node) == "torch"


def keeps_shape(node: fx.Node, module: nn.Module | None) -> bool:
    """Whether an operation is one of those that give a tensor of the same shape and dtype, element by element."""
    if module is not None:
        if isinstance(module, _BatchNorm):
            return rule_for_module(module) is not None
        name = type(module).__module__.removeprefix("torch.nn.modules.")
        return name in ("activation", "dropout") and not isinstance(module, (nn.GLU, nn.MultiheadAttention))
    return node.target in _KEEPING


_KEEPING = {F.batch_norm, F.dropout, F.relu, F.relu6, F.silu, F.gelu, F.hardswish, F.leaky_relu, torch.sigmoid}


def leaves(nested: Any) -> list[Any]:
    """What nested tuples, lists, dicts and slices hold, in order."""
    found: list[Any] = []
    fx.node.map_aggregate(nested, found.append)
    return found


def output_nodes(graph: fx.Graph) -> list[fx.Node]:
    """The nodes whose values a streamed graph returns: one, or a tuple of them."""
    (output,) = graph.output_node().args
    return [output] if isinstance(output, fx.Node) else list(output)  # type: ignore[arg-type]  # a tuple of nodes
