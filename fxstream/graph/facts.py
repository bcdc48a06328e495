"""Facts: what an example of its arguments tells about the values of a model that is being traced.

The nodes recorded so far are computed on the meta device, where tensors have shapes and dtypes, but no memory; under
autocast with fake tensors. They are computed only if the forward asks something.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from .arguments import Form, Question, Unspecified
from .nodes import leaves
from .snapshot import Snapshot

_OF_FORM = set("ndim dim ndimension is_floating_point is_complex element_size itemsize".split())
"""Attributes and methods of a tensor, and functions of torch, whose results do not depend on its sizes."""
_OF_SHAPE = set("shape size numel nelement nbytes broadcast_shapes".split())
"""The same, whose results depend on nothing but sizes and dtypes."""
_OF_DEVICE = {f"is_{kind}": kind for kind in ("cpu", "cuda", "meta", "mps", "xpu", "mtia")}
"""Attributes that tell whether a tensor is on a device -> the type of the device."""
_MOVING = {"cpu": "cpu", "cuda": "cuda"}
"""Methods that move a tensor -> the device."""
_META = torch.device("meta")


class UnknownFactError(Exception):
    """The example does not tell what was asked."""


class NotAcceptedError(UnknownFactError):
    """The model fails on the example."""


class Facts:
    """What is known of the values of a graph that is being recorded."""

    def __init__(self, modules: Mapping[str, nn.Module], forms: Mapping[str, Any]):
        """`forms` are those of the arguments, by the names of their placeholders."""
        self._modules, self._forms = modules, forms
        self._values: dict[fx.Node, Any] = {}
        self._types: dict[fx.Node, type] = {}
        """Of tensors that are attributes, which may be Parameters."""
        self._devices: dict[fx.Node, set[torch.device]] = {}
        self._questions: dict[fx.Node, Question] = {}
        self._default_device = torch.get_default_device()
        # Autocast regions are of a device, and the meta device has none. Fake tensors keep their device, but it takes a
        # second to import what they need.
        autocast = any(torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda"))
        self._mode = FakeTensorMode(allow_non_fake_inputs=True) if autocast else None
        self._squeezed = False
        self.question = Question.NOTHING
        """How much has been asked."""
        self.computing = False
        """Whether modules are running now, which must not be recorded."""

    def computes(self, node: fx.Node) -> bool:
        """Compute a node, all before which have been computed; whether that was possible."""
        found = self._values[node] = self._computed(node)
        return not isinstance(found, UnknownFactError)

    def takes_over(self, node: fx.Node, source: fx.Node) -> bool:
        """Take the value of a node for that of another one, which has been computed; whether that is known."""
        self._values[node] = self._values[source]
        self._questions[node], self._devices[node] = self._questions[source], self._devices[source]
        return not isinstance(self._values[node], UnknownFactError)

    def type_of(self, node: fx.Node) -> type:
        """The type of a value."""
        found = self._value(node)
        self._note(Question.FORM)
        if node in self._types:
            return self._types[node]
        return torch.Tensor if isinstance(found, torch.Tensor) else type(found)

    def value(self, node: fx.Node) -> Any:
        """A value that is no tensor: a number, a flag, a text, sizes."""
        found = self._value(node)
        if any(isinstance(leaf, torch.Tensor) for leaf in leaves(found)):
            raise UnknownFactError("what is in a tensor is known only at a call")
        self._note(self._questions[node])
        return found

    def dtype(self, node: fx.Node) -> torch.dtype:
        """The dtype of a tensor."""
        found: torch.dtype = self._tensor(node).dtype
        self._note(Question.FORM)
        return found

    def device(self, node: fx.Node) -> torch.device:
        """The device of a tensor."""
        self._tensor(node)
        found = self._device(node)
        self._note(Question.FORM)
        return found

    def length(self, node: fx.Node) -> int:
        """The number of parts of a value: of sizes, of a tuple or list, or of a tensor along its first dimension."""
        found = self._value(node)
        try:
            length = len(found)
        except TypeError as error:
            raise UnknownFactError(str(error)) from None
        self._note(Question.FORM if isinstance(found, torch.Size) else Question.SHAPE)
        return length

    def holds_for_shape(self) -> None:
        """Note that the graph holds for no other shape than that of the example."""
        self.question = Question.SHAPE

    def is_number(self, node: fx.Node) -> bool:
        """Whether a value is known, and holds no tensor."""
        found = self._values.get(node)
        unknown = found is None or isinstance(found, UnknownFactError)
        return not unknown and not any(isinstance(leaf, torch.Tensor) for leaf in leaves(found))

    def _note(self, question: Question) -> None:
        # squeeze() drops the dimensions of size 1, so that even the number of dimensions depends on sizes.
        self.question = max(self.question, Question.SHAPE if question and self._squeezed else question)

    def _device(self, node: fx.Node) -> torch.device:
        if self._mode is not None:
            self._devices[node] = {self._values[node].device}
        if len(self._devices[node]) != 1:
            raise UnknownFactError("its device is not known")
        return next(iter(self._devices[node]))

    def _tensor(self, node: fx.Node) -> Any:
        found = self._value(node)
        if not isinstance(found, torch.Tensor):
            raise UnknownFactError(f"it is no tensor, but {type(found).__name__}")
        return found

    def _value(self, node: fx.Node) -> Any:
        # All of them in order, since an operation in place may change what an earlier one has made.
        for recorded in node.graph.nodes:
            if recorded not in self._values:
                self._values[recorded] = self._computed(recorded)
        found = self._values[node]
        if isinstance(found, UnknownFactError):
            raise found
        return found

    def _computed(self, node: fx.Node) -> Any:
        """The value of a node; an UnknownFactError in place of what is not known."""
        sources = node.all_input_nodes
        self._questions[node] = max((self._questions[source] for source in sources), default=Question.NOTHING)
        self._devices[node] = set().union(*(self._devices[source] for source in sources))
        if unknown := [found for source in sources if isinstance(found := self._values[source], UnknownFactError)]:
            return unknown[0]
        self.computing = True
        try:
            with torch.no_grad(), torch.inference_mode(False), self._mode or torch.device(_META):
                return self._run(node)
        except UnknownFactError as error:
            return error
        except Exception as error:  # whatever torch or a user's function may raise on the meta device
            return NotAcceptedError(f"{type(error).__name__}: {error}")
        finally:
            self.computing = False

    def _run(self, node: fx.Node) -> Any:
        if node.op == "placeholder":
            return self._argument(node)
        if node.op == "get_attr":
            return self._attribute(node)
        args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), self._values.__getitem__)
        if node.op == "call_module":
            return self._of_module(node, args, kwargs)
        kind = _OF_DEVICE.get(str(args[1])) if node.target is getattr else None
        if kind is not None and isinstance(args[0], torch.Tensor):
            self._questions[node] = Question.FORM
            return self._device(node.all_input_nodes[0]).type == kind
        name = str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")
        args, kwargs = self._without_devices(node, name, args, kwargs)
        if node.op == "call_method":
            found = getattr(args[0], name)(*args[1:], **kwargs)
        else:
            found = node.target(*args, **kwargs)  # type: ignore[operator]  # a call_function's target
        self._squeezed |= name == "squeeze" and len(args) + len(kwargs) == 1
        self._weigh(node, str(node.args[1]) if node.target is getattr else name, found)
        return found

    def _weigh(self, node: fx.Node, name: str, found: Any) -> None:
        """Note what the result of a call depends on. Raises UnknownFactError if an example does not tell it."""
        if any(isinstance(leaf, torch.Tensor) for leaf in leaves(found)):
            self._questions[node] = Question.NOTHING
        elif not any(isinstance(self._values[source], torch.Tensor) for source in node.all_input_nodes):
            return  # arithmetic with what has been weighed
        elif name in _OF_FORM:
            self._questions[node] = Question.FORM
        elif name in _OF_SHAPE:
            self._questions[node] = Question.SHAPE
        else:
            raise UnknownFactError(f"'{name}' of a tensor is known only at a call")

    def _argument(self, node: fx.Node) -> Any:
        form = self._forms.get(str(node.target), Unspecified())
        if isinstance(form, Unspecified):
            raise UnknownFactError(f"nothing is known of the argument '{node.target}'")
        if not isinstance(form, Form):
            return form
        self._devices[node] = {form.device}
        return self._stand_in(form)

    def _attribute(self, node: fx.Node) -> Any:
        path, _, name = str(node.target).rpartition(".")
        found = getattr(self._modules[path], name)
        if not isinstance(found, torch.Tensor):
            return found
        self._types[node], self._devices[node] = type(found), {found.device}
        return self._stand_in(found)

    def _stand_in(self, tensor: torch.Tensor | Form) -> torch.Tensor:
        device = tensor.device if self._mode is not None else _META
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=device)

    def _of_module(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        module = self._modules[str(node.target)]
        state = {name: self._stand_in(tensor) for name, tensor in tensors_of(module).items()}
        if state:
            self._devices[node] = {tensor.device for tensor in (*module.parameters(), *module.buffers())}
        self._questions[node] = Question.NOTHING
        snapshot = Snapshot(module)
        try:
            return torch.func.functional_call(module, state, args, kwargs)
        finally:
            snapshot.restore()

    def _without_devices(self, node: fx.Node, name: str, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """The arguments of a call with the meta device in place of any other, which is noted as the result's."""
        if self._mode is not None:
            return args, kwargs
        named: list[torch.device] = []

        def on_meta(leaf: Any) -> Any:
            if not isinstance(leaf, torch.device):
                return leaf
            named.append(leaf)
            return _META

        if node.op == "call_method" and name in _MOVING:
            self._devices[node] = {torch.device(_MOVING[name])}
            return (args[0].clone(),), {}
        if node.op == "call_method" and name == "to":
            args = tuple(torch.device(arg) if isinstance(arg, str) else arg for arg in args)
            if len(node.all_input_nodes) == 2:
                self._devices[node] = self._devices[node.all_input_nodes[1]]
        if isinstance(kwargs.get("device"), (str, int)):
            kwargs = {**kwargs, "device": torch.device(kwargs["device"])}
        if any(isinstance(leaf, torch.device) for leaf in leaves((args, kwargs))):
            # Only then, since fx makes plain tuples of a torch.Size.
            args, kwargs = fx.node.map_aggregate((args, kwargs), on_meta)
        if named:
            self._devices[node] = set(named)
        elif not self._devices[node]:
            self._devices[node] = {self._default_device}
        return args, kwargs


def tensors_of(module: nn.Module) -> dict[str, torch.Tensor]:
    """The parameters and buffers of a module, by name."""
    return {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }
