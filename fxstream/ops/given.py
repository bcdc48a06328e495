"""What a rule gets in place of a tensor: its shape and dtype, and nothing to compute with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NoReturn

import torch
from torch._subclasses import DynamicOutputShapeException, FakeTensorMode
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves, tree_map

from ..errors import RuleError
from ..geometry.axes import Value

_ASKED = set(
    """
    shape dtype device layout ndim requires_grad is_leaf is_cuda is_cpu is_meta is_sparse is_quantized itemsize nbytes
    size dim ndimension numel nelement stride element_size is_floating_point is_complex is_contiguous storage_offset
    get_device __len__
""".split()
)
"""Attributes and functions of a tensor that do not depend on the numbers in it."""


@dataclass(frozen=True, eq=False)
class Typed:
    """A tensor that is made when a tile is computed: of sizes, of other tensors, and of the type of a value.

    One that is made of the type of a value, such as `y.new_tensor(2.0)`, has a dtype and a device that are not known
    before a block of that value is there. What is made may also be the dtype or the device itself.
    """

    of: Value | None
    """The value that has the dtype and the device; None if it is made without."""
    make: Callable[..., Any]
    """`make(block, *tensors)` makes it, given a block of the value, or None, and the tensors."""
    tensors: tuple[Given, ...] = ()
    """The tensors of which it is made: those of the call, and others that are made."""

    @cached_property
    def shape(self) -> torch.Size:
        """The shape of the tensor."""
        shape: torch.Size = facts_of(self.make, self.tensors).shape
        return shape

    def dim(self) -> int:
        """The number of dimensions of the tensor."""
        return len(self.shape)

    def size(self, dim: int) -> int:
        """The size of one of its dimensions."""
        return self.shape[dim]


class Given(torch.Tensor):
    """What a rule gets in place of a tensor: a parameter, a buffer, or another tensor that the operation reads.

    It answers what does not depend on the numbers in the tensor: shape, strides, dtype, device, requires_grad. It
    refuses everything else: a rule lists it among the operands of its `Local`, and `run` gets the tensor.
    """

    reader: str
    """The operation whose rule has been given it, in the user's words."""
    slot: int | None
    """The place of the tensor among those of the call; None at conversion, and for one that a `recipe` makes."""
    recipe: Typed | None
    """How the tensor is made, if it is none of those of the call."""

    @staticmethod
    def __new__(
        cls,
        tensor: torch.Tensor,
        reader: str = "",
        slot: int | None = None,
        recipe: Typed | None = None,
        requires_grad: bool | None = None,
        device: torch.device | None = None,
    ) -> Given:
        given: Given = torch.Tensor._make_wrapper_subclass(
            cls,
            tensor.shape,
            strides=tensor.stride() if tensor.layout is torch.strided else None,
            dtype=tensor.dtype,
            layout=tensor.layout,
            device=tensor.device if device is None else device,
            requires_grad=tensor.requires_grad if requires_grad is None else requires_grad,
        )
        given.reader, given.slot, given.recipe = reader, slot, recipe
        return given

    @property
    def is_of_sizes(self) -> bool:
        """Whether it is made of nothing but sizes, so that its numbers are known."""
        return self.recipe is not None and all(one.is_of_sizes for one in self.recipe.tensors)

    def made(self) -> torch.Tensor:
        """The tensor itself, if it is made of nothing but sizes."""
        assert self.recipe is not None
        tensor: torch.Tensor = self.recipe.make(None, *(one.made() for one in self.recipe.tensors))
        return tensor

    def __repr__(self) -> str:  # type: ignore[override]  # without tensor_contents
        return f"Given({tuple(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = _name(func)
        if name not in _ASKED:
            _refuse(name, (args, kwargs))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> NoReturn:  # type: ignore[override]  # torch's own has no classmethod
        _refuse(_name(func), (args, kwargs))


def _name(func: Any) -> str:
    """The name of a function of torch; for the getter of an attribute of tensors, that of the attribute."""
    described = func.__self__ if getattr(func, "__name__", "") == "__get__" else func
    return str(getattr(described, "__name__", func))


def _refuse(name: str, arguments: Any) -> NoReturn:
    reader = next((leaf.reader for leaf in tree_leaves(arguments) if isinstance(leaf, Given)), "")
    raise RuleError(
        f"the streaming rule of {reader} computes with a tensor itself ({name}), in its body or in a `run` that closes "
        "over the tensor. The tensor would get no gradient. "
        "Way out: list the tensor among the operands of the Local, and compute with what `run` is given for it"
    )


def named(values: Any, reader: str) -> Any:
    """Nested values as the rule of the operation `reader` is given them: with a `Given` in place of every tensor."""

    def name(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor) or is_lazy(leaf):
            return leaf
        known = (leaf.slot, leaf.recipe) if isinstance(leaf, Given) else ()
        return Given(leaf, reader, *known)

    return tree_map(name, values)


def facts_of(make: Callable[..., Any], tensors: Sequence[Given]) -> Any:
    """What `Typed.make` returns, computed without the numbers in the tensors: its shape and dtype are right.

    Raises RuleError where these follow from the numbers.
    """
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with torch.no_grad(), fake:
        given = [torch.empty_strided(one.shape, one.stride(), dtype=one.dtype, device=one.device) for one in tensors]
        try:
            return make(torch.empty(0), *given)
        except (DynamicOutputShapeException, DataDependentOutputException) as error:
            reader = next((one.reader for one in tensors), "an operation")
            raise RuleError(f"{reader} makes a tensor whose size follows from the numbers in another one") from error


def made_of_tensors(make: Callable[..., Any], found: Any, tensors: Sequence[Given]) -> Any:
    """What `make(None, *tensors)` returns, with a `Given` in place of each tensor; `found` tells the facts about it."""
    trained = any(one.requires_grad for one in tensors)
    index = iter(range(len(tree_leaves(found))))

    def stand_in(leaf: Any) -> Any:
        at = next(index)
        if not isinstance(leaf, torch.Tensor):
            return leaf
        recipe = Typed(None, lambda like, *given: tree_leaves(make(like, *given))[at], tuple(tensors))
        return Given(leaf, recipe=recipe, requires_grad=trained and (leaf.is_floating_point() or leaf.is_complex()))

    return tree_map(stand_in, found)
