"""Runs of a model on a small image, on twins of the model: what they leave, and how the model itself is left alone."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.fx.immutable_collections import immutable_dict, immutable_list
from torch.nn.modules import module as torch_modules
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from ..graph.mirror import cloned, twin_of
from ..graph.snapshot import RandomState, Snapshot
from .description import Description, of_modules, of_value
from .images import Arguments

Gradients = dict[str, torch.Tensor | None]


class StrayError(Exception):
    """A run on a twin reaches the model itself."""


@dataclass
class Outcome:
    """What a run leaves."""

    output: Description
    gradients: Gradients
    state: Description
    random: RandomState
    drew: bool
    """Whether random numbers were drawn."""
    undifferentiable: str = ""
    """Why the backward pass failed, which leaves no gradients; empty if it did not."""


class Bench:
    """Runs a model on twins, all of which have the same numbers, draw the same random numbers and run no hooks.

    Parameters that are constant, as those of a branch that is initialised to zero, are made random in the twins, since
    they hide differences.
    """

    def __init__(self, model: nn.Module, frozen: set[str]):
        """`frozen` are the paths of batch norms that use their running statistics in every mode."""
        self.model = model
        self.frozen = frozen
        self._snapshot = Snapshot(model)
        self._random = RandomState()
        self._originals = {id(module): path for path, module in model.named_modules()}
        named = (*model.named_parameters(), *model.named_buffers())
        self._tensors = {name: (tensor, tensor.detach(), _version(tensor)) for name, tensor in named}
        self._buffers = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}

    def run(
        self,
        function: Callable[[nn.Module, Arguments], Any],
        arguments: Arguments,
        *,
        image: str,
        extras: Mapping[str, torch.Tensor] | None = None,
        backward: bool = True,
    ) -> Outcome:
        """Call `function` with a twin of the model and copies of the arguments, and differentiate what it returns.

        Args:
            function: what is run.
            arguments: of the model's forward, by name.
            image: the name of the argument whose gradient is computed besides those of all parameters.
            extras: further tensors that the twin gets as attributes.
            backward: False where nothing is to be differentiated.

        Raises:
            StrayError: the run has called the model itself, or changed its tensors.
            Exception: whatever the function raises in its forward pass.
        """
        with self._restored(), torch.inference_mode(False), torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            twin = self._twin()
            extras = {name: cloned(tensor) for name, tensor in (extras or {}).items()}
            vars(twin).update(extras)
            with self._watched():
                outcome = self._outcome(lambda given: function(twin, given), twin, arguments, image, backward)
            for name, tensor in extras.items():
                if tensor._version:
                    outcome.state[f"{name}, which forward makes once and overwrites,"] = tensor
                outcome.state.pop(name, None)
        return outcome

    def _outcome(
        self, function: Callable[[Arguments], Any], twin: nn.Module, arguments: Arguments, image: str, backward: bool
    ) -> Outcome:
        given = {name: _detached(value) for name, value in arguments.items()}
        wanted: dict[str, torch.Tensor] = {name: one for name, one in twin.named_parameters() if one.requires_grad}
        if isinstance(given.get(image), torch.Tensor) and given[image].is_floating_point():
            wanted = {"the image": given[image].requires_grad_(), **wanted}
            # A forward may overwrite its input, which must then be no leaf.
            given[image] = given[image].clone()
        output = of_value("the output", function(given))
        gradients: Gradients = {}
        problem = ""
        if backward:
            try:
                gradients = _gradients(output, wanted)
            except RuntimeError as error:
                problem = str(error)
        output.update(of_value("the image afterwards", given.get(image)))
        state = of_modules(twin)
        return Outcome(output, gradients, state, RandomState(), self._random.has_changed(), problem)

    def _twin(self) -> nn.Module:
        generator = torch.Generator().manual_seed(1)
        twin = twin_of(self.model, lambda leaf: _randomised(leaf, cloned(leaf), generator))
        for path, module in twin.named_modules():
            for registry in _HOOKS:
                hooks = vars(module).get(registry, {})
                for key in [key for key, hook in hooks.items() if not isinstance(hook, _COMPUTING)]:
                    del hooks[key]
            if path in self.frozen:
                module.eval()
        return twin

    @contextmanager
    def _restored(self) -> Iterator[None]:
        """Whatever happens inside, the model and the random generators are afterwards what they were before."""
        self._random.restore()
        try:
            yield
        finally:
            self._snapshot.restore()
            self._random.restore()
            changed = [
                name for name, (tensor, data, version) in self._tensors.items() if _changed(tensor, data, version)
            ]
            for name in changed:
                tensor, data, _ = self._tensors[name]
                if name in self._buffers:
                    data.copy_(self._buffers[name])
                tensor.data = data
        if changed:
            raise StrayError(f"a copy of it changes {changed[0]} of the model itself")

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """No global hook runs, and a call of one of the model's own modules raises StrayError."""

        def refuse(module: nn.Module, inputs: Any) -> None:
            if id(module) in self._originals:
                path = self._originals[id(module)] or "the root"
                raise StrayError(f"a copy of it calls {path} of the model itself")

        registries = [registry for name, registry in vars(torch_modules).items() if name in _GLOBAL_HOOKS]
        saved = [registry.copy() for registry in registries]
        for registry in registries:
            registry.clear()
        handle = torch_modules.register_module_forward_pre_hook(refuse)
        try:
            yield
        finally:
            handle.remove()
            for registry, hooks in zip(registries, saved, strict=True):
                registry.update(hooks)


_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_GLOBAL_HOOKS = [f"_global{name}" for name in _HOOKS]
_COMPUTING = (BasePruningMethod, SpectralNorm, WeightNorm)
"""Hooks that compute a weight, and do nothing else."""


class GraphRun(fx.Interpreter):
    """Runs a traced graph as ordinary PyTorch, with the modules of a twin.

    Attributes:
        current: the node that runs.
    """

    def __init__(self, twin: nn.Module, graph: fx.Graph, arguments: Mapping[str, Any], inlined: dict[str, fx.Graph]):
        """`inlined` are the graphs of submodules that the twin does not have."""
        super().__init__(twin, graph=graph)
        self.extra_traceback = False
        self.arguments = arguments
        self.inlined = inlined
        self.current: fx.Node | None = None

    def run_node(self, n: fx.Node) -> Any:
        self.current = n
        return super().run_node(n)

    def fetch_args_kwargs_from_env(self, n: fx.Node) -> Any:
        # As in the code of the graph: fx's own lists and dicts are of other types than those of the user.
        args, kwargs = super().fetch_args_kwargs_from_env(n)
        return _ordinary(args), _ordinary(kwargs)

    def placeholder(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target in self.arguments or args:
            return self.arguments.get(target, *args)
        return {} if target.startswith("**") else ()

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        found = super().call_function(target, args, kwargs)
        # In a streamed graph, what reads the overwritten value reads this node.
        return args[0] if target is operator.setitem else found

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target not in self.inlined:
            return super().call_module(target, args, kwargs)
        graph = self.inlined[target]
        names = [str(node.target) for node in graph.nodes if node.op == "placeholder"]
        return GraphRun(self.module, graph, dict(zip(names, args, strict=True)), {}).run()


def _ordinary(value: Any) -> Any:
    """An argument of a node, with lists and dicts in place of fx's own ones; what a node has computed stays itself."""
    if type(value) is immutable_list:
        return [_ordinary(part) for part in value]
    if type(value) is immutable_dict:
        return {key: _ordinary(part) for key, part in value.items()}
    return tuple(map(_ordinary, value)) if type(value) is tuple else value


def _detached(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, torch.Tensor) else value


def _gradients(output: Description, wanted: dict[str, torch.Tensor]) -> Gradients:
    """Gradients for random gradients of all outputs."""
    # Not each tensor once: an operation that does nothing may return its operand or a copy of it.
    roots = [value for value in output.values() if isinstance(value, torch.Tensor) and value.requires_grad]
    if not roots or not wanted:
        return dict.fromkeys(wanted)
    generator = torch.Generator().manual_seed(2)
    upstream = [torch.randn(root.shape, generator=generator, device="cpu").to(root) for root in roots]
    found = torch.autograd.grad(roots, list(wanted.values()), upstream, allow_unused=True)
    return dict(zip(wanted, found, strict=True))


def _randomised(original: Any, twin: Any, generator: torch.Generator) -> Any:
    """A twin; if it is a constant parameter, its numbers are made random."""
    if not isinstance(original, nn.Parameter) or not original.is_floating_point() or not original.numel():
        return twin
    first, last = (original.detach()[(index,) * original.dim()] for index in (0, -1))
    if first != last:
        return twin
    low, high = torch.aminmax(original.detach())
    if low != high:
        return twin
    # Their sign stays, since it may be the scale of something or its logarithm.
    factors = torch.rand(original.shape, generator=generator, device="cpu").to(original.dtype)
    with torch.no_grad():
        twin.copy_(low * (factors.to(low.device) + 0.5) if abs(low) > _TINY else 0.1 + 0.5 * factors)
    return twin


_TINY = 0.05


def _version(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _changed(tensor: torch.Tensor, data: torch.Tensor, version: int) -> bool:
    return _version(tensor) != version or tensor.data_ptr() != data.data_ptr()
