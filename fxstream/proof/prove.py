"""The proof itself: the plain model and the graph on the same small random image, and what they leave compared.

What runs for the graph is ordinary PyTorch: the two graphs of the partition, the streamed one on the whole small image.
It therefore computes what the plain model computes, bit by bit, and draws the same random numbers. The scan in tiles
has tests of its own; it runs here, too, if the prefix has an operation with a rule of a user's own.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from ..errors import ProofError, RuleError, StreamingError
from ..graph.answers import locals_of
from ..graph.arguments import Parameters
from ..graph.nodes import label, operation, rule_of
from ..graph.partition import Partition
from ..graph.prefix import Prefix
from ..graph.trace import LOCK
from ..ops import Noise
from .description import difference, gradient_difference
from .images import Arguments, call, candidates
from .parting import Recording, Step, parting, place_in_code
from .run import Bench, GraphRun, Outcome, StrayError

Tiled = Callable[[nn.Module, tuple[int, ...]], nn.Module]
"""Makes the converted model of a twin, with tiles of some size along the streamed axes."""

WAY_OUT = "write it so that torch.fx sees it, register a rule, or use fxstream.compile, which captures Python"


def find_proof(
    prefix: Prefix, parts: Partition, name: str, channels: int | None, example_input: Any, tiled: Tiled
) -> str:
    """Prove that the graphs of a partition do what the model does.

    The model is left as it was, whatever happens.

    Args:
        prefix: of the traced model.
        parts: the two graphs.
        name: of the streamed submodule, which the outer graph calls.
        channels: the image's number of channels, if that is known.
        example_input: an image whose shape is tried first, or a tuple of all arguments of forward.
        tiled: makes a converted model, which runs in tiles if the prefix has a rule of a user's own.

    Returns:
        Why the model is not proved; empty if it is, or if it is on the meta device.

    Raises:
        ProofError: the plain model and the graph differ.
        RuleError: the `run` of a rule of a user's own closes over a tensor.
    """
    with LOCK:  # while another thread traces, modules are of other classes
        return _Proof(prefix, parts, name, tiled).run(channels, example_input)


class _Proof:
    def __init__(self, prefix: Prefix, parts: Partition, name: str, tiled: Tiled):
        self.prefix = prefix
        self.parts = parts
        self.name = name
        self.tiled = tiled
        self.model = prefix.trace.root
        self.image = str(prefix.image.target)
        self.parameters = Parameters.of(type(self.model))

    def run(self, channels: int | None, example_input: Any) -> str:
        tensors = [*self.model.parameters(), *self.model.buffers()]
        if any(tensor.is_meta or isinstance(tensor, torch._subclasses.FakeTensor) for tensor in tensors):
            return ""
        if any(map(is_lazy, tensors)):
            return "some parameters are not initialised yet. Way out: call the model before the conversion"
        self.bench = Bench(self.model, self._frozen())
        problem = ""
        for arguments in candidates(self.prefix, channels, example_input):
            try:
                plain = self._plain(arguments)
            except StrayError as error:
                return f"{error}. Way out: let it use what is registered in the model"
            except Exception as error:  # whatever the model raises
                problem = problem or f"{type(error).__name__}: {_first_line(error)}"
                continue
            return self._compare(arguments, plain)
        return (
            f"its forward accepts none of the small random images that were tried ({problem}). "
            "Way out: give an example_input, which may be a tuple of all arguments of forward"
        )

    def _frozen(self) -> set[str]:
        """The paths of batch norms that the converted model uses as if in eval mode."""
        if not self.prefix.freeze_batchnorm:
            return set()
        return {path for path, module in self.model.named_modules() if isinstance(module, _BatchNorm)}

    # Runs.

    def _call(self, model: nn.Module, given: Arguments) -> Any:
        return call(model, self.prefix.trace.assumptions.given.forms, self.parameters, given)

    def _plain(self, arguments: Arguments) -> Outcome:
        return self.bench.run(lambda twin, given: self._call(twin, given), arguments, image=self.image)

    def _graph(self, arguments: Arguments, plain: Outcome) -> Outcome:
        # The partition runs what is streamed before the head, which changes who draws which random numbers.
        traced = self.prefix.trace.graph
        outer, inlined = (traced, {}) if plain.drew else (self.parts.outer, {self.name: self.parts.streamed})
        return self.bench.run(
            lambda twin, given: GraphRun(twin, outer, given, inlined).run(),
            arguments,
            image=self.image,
            extras=self.prefix.trace.constants,
        )

    # Comparison.

    def _compare(self, arguments: Arguments, plain: Outcome) -> str:
        tolerance = 0.0 if _on_cpu(plain) else _rounding(plain)
        graph = self._graph_or_error(arguments, plain)
        problem = _difference(plain, graph, tolerance)
        if problem:
            again = self._plain(arguments)
            if unsteady := _difference(plain, again, tolerance):
                # Sums in an order that changes, or something that is drawn elsewhere.
                tolerance = _rounding(plain)
                problem = _difference(plain, graph, tolerance)
                if problem and _difference(plain, again, tolerance):
                    return f"two runs of the plain model differ: {unsteady}"
        if problem:
            raise self._error(arguments, plain, problem)
        self._compare_tiles(arguments, plain)
        return ""

    def _graph_or_error(self, arguments: Arguments, plain: Outcome) -> Outcome:
        try:
            graph = self._graph(arguments, plain)
        except Exception as error:
            problem = f"the graph fails, and the plain model does not ({type(error).__name__}: {_first_line(error)})"
            raise self._error(arguments, plain, problem) from error
        if graph.undifferentiable and not plain.undifferentiable:
            problem = f"the graph's backward pass fails, and the plain model's does not ({graph.undifferentiable})"
            raise self._error(arguments, plain, problem)
        return graph

    def _compare_tiles(self, arguments: Arguments, plain: Outcome) -> None:
        """Run the converted model in tiles, if the prefix has operations with rules of a user's own."""
        own = [node for node in self.prefix.nodes if self._has_own_rule(node)]
        if not own or self._is_random():
            return
        image = arguments[self.image]
        sizes = tuple(math.ceil(image.shape[self.prefix.names.index(axis)] / 2) for axis in self.prefix.axes)
        try:
            tiled = self.bench.run(
                lambda twin, given: self._call(self.tiled(twin, sizes), given),
                arguments,
                image=self.image,
            )
        except RuleError:
            raise
        except StreamingError:
            return  # a call raises it, too: nothing is silent
        except Exception as error:
            problem: str | None = f"it fails ({type(error).__name__}: {_first_line(error)})"
        else:
            problem = difference(plain.output, tiled.output, _rounding(plain))
            problem = problem or gradient_difference(plain.gradients, tiled.gradients, _rounding(plain))
        if problem:
            named = ", ".join(f"{label(node)} ({operation(node, self.prefix.trace.module_of(node))})" for node in own)
            raise ProofError(
                f"the converted model differs from {type(self.model).__name__} in tiles of {sizes}: {problem}. "
                f"The prefix has operations with rules of your own: {named}. "
                "Way out: fxstream.testing.check_op shows where a rule is wrong"
            )

    def _has_own_rule(self, node: fx.Node) -> bool:
        rule = rule_of(node, self.prefix.trace.module_of(node)) if node.op.startswith("call") else None
        return rule is not None and _written(rule.function).__module__.partition(".")[0] != "fxstream"

    def _is_random(self) -> bool:
        streamed = set(self.prefix.nodes)
        answers = (f.answer for f in self.prefix.findings if f.node in streamed and f.answer is not None)
        operands = (operand for answer in answers for one in locals_of(answer) for operand in one.operands)
        return any(isinstance(operand, Noise) for operand in operands)

    # Explanation.

    def _error(self, arguments: Arguments, plain: Outcome, problem: str) -> ProofError:
        where = self._parting(arguments) or f"See {_forward_of(self.model)}"
        return ProofError(
            f"the graph that torch.fx has traced does not do what {type(self.model).__name__} does on a small random "
            f"image: {problem}. {where}. Way out: {WAY_OUT}"
        )

    def _parting(self, arguments: Arguments) -> str | None:
        """Where the operations of the plain model and those of the traced graph part, both in the order of forward."""
        plain, graph = self._record(self._steps_of_plain, arguments), self._record(self._steps_of_graph, arguments)
        return parting(plain, graph)

    def _record(self, run: Callable[[nn.Module, Arguments, list[Step]], None], arguments: Arguments) -> list[Step]:
        steps: list[Step] = []
        extras = self.prefix.trace.constants
        try:
            self.bench.run(
                lambda twin, given: run(twin, given, steps), arguments, image=self.image, extras=extras, backward=False
            )
        except Exception:  # what has run until then tells enough
            return steps
        return steps

    def _steps_of_plain(self, twin: nn.Module, given: Arguments, steps: list[Step]) -> None:
        paths = {id(module): path for path, module in twin.named_modules()}
        with Recording(steps, lambda: place_in_code(paths)):
            self._call(twin, given)

    def _steps_of_graph(self, twin: nn.Module, given: Arguments, steps: list[Step]) -> None:
        run = GraphRun(twin, self.prefix.trace.graph, given, {})
        with Recording(steps, lambda: label(run.current) if run.current else ""):
            run.run()


def _written(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function itself, of which there may be a partial one."""
    while isinstance(function, partial):
        function = function.func
    return function


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]


def _difference(plain: Outcome, graph: Outcome, tolerance: float) -> str | None:
    if problem := difference(plain.output, graph.output, tolerance):
        return problem
    if plain.random.differs_from(graph.random):
        return "they draw different random numbers"
    if problem := difference(plain.state, graph.state, tolerance):
        return f"after the call, {problem}"
    return gradient_difference(plain.gradients, graph.gradients, _rounding(plain))


def _rounding(outcome: Outcome) -> float:
    """The greatest relative error that another order of sums may cause."""
    tensors = [value for value in (*outcome.output.values(), *outcome.gradients.values()) if value is not None]
    floating = [one.dtype for one in tensors if isinstance(one, torch.Tensor) and one.is_floating_point()]
    return max((torch.finfo(dtype).eps ** 0.5 for dtype in floating), default=0.0)


def _on_cpu(outcome: Outcome) -> bool:
    values = (*outcome.output.values(), *outcome.state.values())
    return all(value.device.type == "cpu" for value in values if isinstance(value, torch.Tensor))


def _forward_of(model: nn.Module) -> str:
    """Where the forward of a model is written."""
    forward = inspect.unwrap(type(model).forward)
    code = getattr(forward, "__code__", None)
    return f"{type(model).__qualname__}.forward ({code.co_filename}:{code.co_firstlineno})" if code else "its forward"
