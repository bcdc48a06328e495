"""The streamed submodule, and the autograd contract around its two scans.

The contract is that of `torch.utils.checkpoint`. Its rules:

1. The streamed call is one differentiable operation. Its inputs are the image and every tensor that it uses, and it
   returns gradients for all of them. Optimizers, gradient accumulation, DDP and hooks on parameters see nothing else.
2. Parameters and buffers are read from their modules at every call, never kept from the conversion or an earlier call.
3. Whether there will be a backward pass is decided before `Function.apply`: inside it, grad mode is always off.
4. What the backward pass needs is saved by `save_for_backward`, so that autograd releases it, and raises its own errors
   for a tensor that was changed in place meanwhile, or for a second backward pass.
5. The tiles are computed with detached leaves that share the parameters' memory. With the Parameters themselves, their
   hooks would fire once per tile.
6. Computing a tile again finds the random numbers, the autocast regions and the modes of the forward pass.
7. Gradients that this backward pass does not ask for are not computed.
8. A second derivative is refused.
"""

from __future__ import annotations

from collections import deque
from contextlib import nullcontext
from dataclasses import replace
from itertools import chain, islice
from typing import Any

import torch
from torch import fx, nn

from ..errors import DoubleBackwardError, StreamingError
from ..graph.serialize import dump_graph, load_graph
from ..graph.trace import Assumptions, traced_again
from ..memory.fit import Fit, fitted
from ..scan.call import Call, Programs, new_call
from ..scan.checks import (
    check_attributes,
    check_hooks,
    check_image,
    check_transforms,
    check_whole,
    in_modes,
    mode_error,
)
from ..scan.noise import restored_on_failure
from ..scan.settings import Settings
from ..scan.sums import detached_leaves
from ..scan.tiles import Scan
from .older import upgraded

MOST_FITS = 256
"""For how many kinds of calls the use of the memory budget is remembered."""
MOST_MODES = 32
"""In how many other combinations of modes a graph is remembered to be the same."""


class Streamed(nn.Module):
    """The streamed part of a converted model.

    It registers no modules or parameters of its own: at every call it finds them in the converted model. Called with
    the image (N, C, *spatial) and the other values that its graph takes, it returns what its graph returns. Raises
    StreamingError and its subclasses, see `fxstream.convert`.
    """

    def __init__(self, graph: fx.Graph, settings: Settings, assumptions: Assumptions):
        super().__init__()
        self.graph = graph
        self.settings = settings
        self.assumptions = assumptions
        self._owner: tuple[nn.Module, ...] = ()
        """The converted model, in a tuple, since nn.Module would register it as a submodule. Empty in a copy of this
        module alone."""
        self._fits: dict[str, Fit] = {}
        self._programs = Programs()
        self._other_modes: deque[Assumptions] = deque(maxlen=MOST_MODES)
        """What holds in other modes in which the model's graph has been found to be the same, the latest last."""

    def bind(self, owner: nn.Module) -> None:
        """Use the modules of `owner`, the converted model."""
        self._owner = (owner,)

    # As torch.compiler.disable, which would import torch._dynamo at once.
    @torch._disable_dynamo  # type: ignore[attr-defined]  # torch itself uses it so
    def forward(self, image: torch.Tensor, *inputs: Any) -> Any:
        call, tensors = self.checked_call(image, *inputs)
        check_transforms(tensors)
        differentiable = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
        scan = Scan(call, tensors)
        with restored_on_failure() if scan.random else nullcontext():
            if differentiable:
                outputs = _StreamedFunction.apply(scan, *map(_with_node, tensors))
            else:
                outputs = scan.forward(keep=False).outputs
        returned = scan.filled(outputs)
        return returned[0] if isinstance(self.graph.output_node().args[0], fx.Node) else returned

    def checked_call(self, image: torch.Tensor, *inputs: Any) -> tuple[Call, list[torch.Tensor]]:
        """The call that `forward` makes, and its tensors. Raises what `forward` raises before it computes."""
        if not self._owner:
            raise StreamingError(
                "the streamed part does not work without its model, whose modules it uses. "
                "Way out: copy or pickle the converted model as a whole"
            )
        (owner,) = self._owner
        called = (str(node.target) for node in self.graph.nodes if node.op == "call_module")
        modules = {path: owner.get_submodule(path) for path in dict.fromkeys(called)}
        names = [node.name for node in self.graph.nodes if node.op == "placeholder"]
        check_image(image, self.settings)
        check_whole(modules, dict(zip(names[1:], inputs, strict=True)))
        check_hooks(modules, {path: owner.get_submodule(path) for path in self.assumptions.entered})
        check_attributes(owner, self._holding(owner).attributes)
        call, tensors = new_call(self.graph, self.settings, modules, image, inputs, self._programs)
        if self.settings.memory_budget:
            call = replace(call, **self._fitted(call, tensors)._asdict())
        return call, tensors

    def _holding(self, owner: Any) -> Assumptions:
        """The assumptions that hold in the present modes of `owner`. Raises ModeError if its graph is another one."""
        for known in (self.assumptions, *self._other_modes):
            if in_modes(owner, known.modes):
                return known
        original = owner._as_original()
        found = original and traced_again(original, self.assumptions, self.settings.freeze_batchnorm)
        if found is None:
            raise mode_error(owner, self.assumptions.modes)
        self._other_modes.append(found)
        return found

    def _fitted(self, call: Call, tensors: list[torch.Tensor]) -> Fit:
        """How a call uses the memory budget; found once for all calls that are alike in what matters to memory."""
        trained = torch.is_grad_enabled() and [tensor.requires_grad for tensor in tensors]
        forms = [(tensor.shape, tensor.dtype) for tensor in tensors]
        modes = [part.training for module in call.modules.values() for part in module.modules()]
        key = repr((call.shape, forms, trained, modes, call.autocast, self.settings))
        if key not in self._fits:
            if len(self._fits) == MOST_FITS:
                del self._fits[next(iter(self._fits))]
            self._fits[key] = fitted(call, tensors)
        return self._fits[key]

    def extra_repr(self) -> str:
        return f"tile_shape={self.settings.tile_shape}"

    def __getstate__(self) -> dict[str, Any]:
        # Whoever owns the copy binds itself to it.
        state = {name: value for name, value in vars(self).items() if name != "_programs"}
        return {**state, "graph": dump_graph(self.graph), "_owner": ()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = upgraded(state)
        state = {"_other_modes": deque(maxlen=MOST_MODES), "_programs": Programs(), **state}
        super().__setstate__({**state, "graph": load_graph(state["graph"])})  # type: ignore[no-untyped-call]  # torch has no types for it


class _StreamedFunction(torch.autograd.Function):
    """The streamed call as one node of the autograd graph."""

    @staticmethod
    def forward(ctx: Any, scan: Scan, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        outputs, states, records, recorded, results = scan.forward(keep=True)
        ctx.call, ctx.recorded, ctx.results = scan.call, recorded, results  # not the scan, which holds tensors
        ctx.keys = list(records)
        ctx.states = [len(state) for state in states]
        ctx.save_for_backward(*tensors, *records.values(), *chain(*states))
        ctx.set_materialize_grads(False)
        constant = [
            tensor
            for output, tensor in zip(scan.outputs, outputs, strict=True)
            if not scan.differentiable(output.value, tensor)
        ]
        ctx.mark_non_differentiable(*constant)
        return outputs

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        saved = iter(ctx.saved_tensors)
        tensors = list(islice(saved, len(ctx.needs_input_grad) - 1))
        records = dict(zip(ctx.keys, islice(saved, len(ctx.keys)), strict=True))
        states = [tuple(islice(saved, size)) for size in ctx.states]
        scan = Scan(ctx.call, detached_leaves(tensors, _asked_for(ctx)))
        try:
            with torch.no_grad():
                found = scan.backward(states, records, ctx.recorded, ctx.results, gradients)
        finally:
            # They serve once. After a failure, what is left would stay as long as the outputs do.
            ctx.recorded.clear()
            ctx.results.clear()
        if torch.is_grad_enabled():
            # It depends on the given gradients, too: `autograd.functional.jvp` differentiates with respect to them.
            reached = (*tensors, *(gradient for gradient in gradients if gradient is not None))
            found = [None if gradient is None else _RefuseSecond.apply(gradient, *reached) for gradient in found]
        return (None, *found)


def _with_node(tensor: torch.Tensor) -> torch.Tensor:
    """A view of a leaf; another tensor as it is.

    `_will_engine_execute_node` cannot be asked about leaves, but it can be asked about the node of a view.
    """
    return tensor.view_as(tensor) if tensor.requires_grad and tensor.is_leaf else tensor


def _asked_for(ctx: Any) -> list[bool]:
    """For each tensor, whether this backward pass wants its gradient: `torch.autograd.grad` may ask for a few only."""
    edges = zip(ctx.needs_input_grad[1:], ctx.next_functions, strict=True)
    return [needed and torch._C._will_engine_execute_node(node) for needed, (node, _) in edges]


class _RefuseSecond(torch.autograd.Function):
    """Passes a first derivative on, and refuses to be differentiated itself."""

    @staticmethod
    def forward(ctx: Any, gradient: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
        return gradient.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        raise DoubleBackwardError(
            "the streamed part of a converted model cannot be differentiated twice. "
            "Way out: compute second derivatives (gradient penalties, Hessians) with the plain model."
        )
