"""Proxies: what a forward computes with while it is traced. They record it, or refuse what cannot be recorded."""

from __future__ import annotations

import builtins
import operator
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import fx, nn
from torch.fx.proxy import Proxy, TracerBase

from ..ops import inplace

Kind = Literal["tensor", "number", "sizes"]
"""What a value is: a tensor, a number, or the sizes of a tensor."""


class UnrecordedError(Exception):
    """A forward does something that a graph does not record."""


class RecordingProxy(Proxy):
    """A proxy that is more faithful than fx's own.

    - In-place operators are recorded. Python would otherwise turn `x += y` into `x = x + y`.
    - Assigning an attribute (`x.data = ...`) is refused, since it would change only the proxy.
    - A number is refused as a key of a dict or a member of a set, where it would never be found.
    """

    tracer: Any

    def __init__(self, tracer: TracerBase, node: fx.Node | None = None, of: tuple[RecordingProxy, str] | None = None):
        """A proxy for a node; or for an attribute `of` another proxy, whose node is made when it is asked for."""
        vars(self).update(tracer=tracer, _node=node, _of=of)

    @property
    def node(self) -> fx.Node:  # type: ignore[override]  # a plain attribute there
        state = vars(self)
        if state["_node"] is None:
            state["_node"] = self.tracer.create_proxy("call_function", getattr, state["_of"], {}).node
        found: fx.Node = state["_node"]
        return found

    def __getattr__(self, name: str) -> Any:
        return RecordingProxy(self.tracer, of=(self, name))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if vars(self)["_of"] is None:
            return Proxy.__call__(self, *args, **kwargs)
        owner, name = vars(self)["_of"]
        return self.tracer.create_proxy("call_method", name, (owner, *args), kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        raise UnrecordedError(f"it assigns the attribute '{name}' of a tensor, which fx does not record")

    def __setitem__(self, index: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, index, value), {})

    def __hash__(self) -> int:
        if self.tracer.kind(self.node) == "number":
            raise UnrecordedError(f"it looks up {self.node.name}, which is known only at a call, in a dict or set")
        return object.__hash__(self)


@contextmanager
def answered_isinstance() -> Iterator[None]:
    """In this context, `isinstance` gives the right answer for a proxy, or refuses to if that is not known.

    The builtin itself is replaced. A proxy cannot answer by its `__class__`, since the C++ code of torch, too, would
    then take it for a tensor.
    """
    original = builtins.isinstance

    def answer(value: Any, classes: Any) -> bool:
        if type(value) is not RecordingProxy or original(value, classes):
            return original(value, classes)
        asking = sys._getframe(1).f_globals.get("__name__", "")
        if asking.startswith(("torch.fx.", "torch.nn.parameter", "fxstream.")):
            return False  # they ask whether it is a proxy
        kind = value.tracer.kind(value.node)
        if kind is not None:
            return issubclass({"tensor": torch.Tensor, "number": int, "sizes": torch.Size}[kind], classes)
        if asking.startswith("torch."):
            return False
        raise UnrecordedError(f"it asks for the type of {value.node.name}, which is not known while it is traced")

    builtins.isinstance = answer
    try:
        yield
    finally:
        builtins.isinstance = original


def _inplace(name: str) -> Callable[[RecordingProxy, Any], Proxy]:
    function = inplace.FUNCTIONS[name]
    return lambda self, other: self.tracer.create_proxy("call_function", function, (self, other), {})


for _name in inplace.NAMES:
    setattr(RecordingProxy, f"__{_name}__", _inplace(_name))


_NUMBERS = set(
    """
    size dim ndim ndimension numel nelement stride storage_offset element_size itemsize nbytes is_floating_point
    is_complex is_contiguous get_device item is_cuda is_cpu is_meta requires_grad is_leaf data_ptr
""".split()
)
"""Attributes and methods of a tensor that are numbers or flags."""
_TENSORS = set("T mT H mH data real imag".split())
"""Attributes of a tensor that are tensors."""
_SEVERAL = set(
    """
    chunk split split_with_sizes tensor_split hsplit vsplit dsplit unbind unsafe_chunk unsafe_split max min median
    nanmedian mode topk sort kthvalue cummax cummin aminmax var_mean std_mean meshgrid broadcast_tensors frexp slogdet
    qr svd eig eigh lu unique unique_consecutive nonzero where tolist block_diag atleast_1d atleast_2d atleast_3d
    multi_head_attention_forward
""".split()
)
"""Functions and methods that may return several tensors, or a list."""
_ARITHMETIC = ("_operator", inplace.__name__)


def kind_of(node: fx.Node, sources: list[Kind | None], module: nn.Module | None) -> Kind | None:
    """What the value of a node is; None if that is not known while the model is traced.

    `sources` are the kinds of `node.all_input_nodes`; `module` is what the node calls, if it calls a module.
    """
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    if node.op == "placeholder":
        return None if node.args else "tensor"  # an argument with a default may be anything
    if node.op == "get_attr":
        return "number" if name.endswith("training") else "tensor"
    if module is not None:
        return "tensor" if _returns_tensor(module) else None
    if node.op == "call_method":
        if name == "size" and len(node.args) + len(node.kwargs) == 1:
            return "sizes"
        if name in _NUMBERS:
            return "number"
        return "tensor" if sources[:1] == ["tensor"] and name not in _SEVERAL else None
    if node.target is getattr:
        attribute = str(node.args[1])
        if attribute == "shape":
            return "sizes"
        if attribute in _NUMBERS:
            return "number"
        return "tensor" if attribute in _TENSORS and sources == ["tensor"] else None
    if node.target is operator.getitem:
        if sources[:1] == ["sizes"]:
            return "sizes" if isinstance(node.args[1], slice) else "number"
        return "tensor" if sources[:1] == ["tensor"] else None
    if getattr(node.target, "__module__", None) in _ARITHMETIC:
        return _of_arithmetic(sources)
    library = (getattr(node.target, "__module__", None) or "torch").partition(".")[0]
    return "tensor" if library == "torch" and name not in _SEVERAL else None


def _of_arithmetic(sources: list[Kind | None]) -> Kind | None:
    if "tensor" in sources:
        return "tensor"
    return "number" if sources and all(kind == "number" for kind in sources) else None


def _returns_tensor(module: nn.Module) -> bool:
    """Whether a module of torch returns one tensor if it is given one."""
    several = (nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention, nn.AdaptiveLogSoftmaxWithLoss, nn.Identity)
    own = type(module).__module__.startswith("torch.nn.")
    return own and not isinstance(module, several) and not getattr(module, "return_indices", False)
