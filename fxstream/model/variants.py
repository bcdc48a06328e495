"""Variants: the graphs of a converted model for calls that the graph of the conversion does not serve.

A graph takes the constants among the arguments for granted, and what the forward has asked about its tensors. A call
with other ones gets a graph of its own, traced when it is first needed. The latest ones are kept.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

from torch import fx, nn

from ..errors import NothingToStreamError, TraceError
from ..graph.arguments import Given, Slot, form_of
from ..graph.example import rejection
from ..graph.partition import Partition, partition
from ..graph.prefix import Prefix, find_prefix, image_node
from ..graph.reasons import reasons
from ..graph.trace import Trace, trace
from ..scan.settings import Settings
from .streamed import Streamed

Prove = Callable[[Prefix, Partition, str, Settings], None]
"""Proves that a partition does what the model does, whose streamed submodule has a name. Raises ProofError."""

MOST = 16
"""So many variants are kept."""


def rewrite(traced: Trace, image: str | None, settings: Settings, name: str) -> tuple[Prefix, Partition]:
    """Find the prefix of a traced model, and partition the graph so that this is one call of the submodule `name`.

    Raises NothingToStreamError if no operation at its front is local.
    """
    node = image_node(traced.graph, image)
    prefix = find_prefix(traced, node, settings.names, settings.axes, settings.freeze_batchnorm)
    if not prefix.nodes:
        why = reasons(prefix) or "  the head uses the image itself"
        raise NothingToStreamError(
            f"nothing at the front of the model can be streamed along {', '.join(prefix.axes)}:\n{why}"
        )
    return prefix, partition(prefix, name)


class Variant(NamedTuple):
    """A graph for some calls of a converted model."""

    given: Given
    """The calls that it serves."""
    forward: Callable[..., Any]
    """The graph's code, a function of `seen` and of the arguments in the order of `given`."""
    seen: Any
    """The converted model as this code sees it."""


class Variants:
    """The latest variants of a converted model."""

    def __init__(self) -> None:
        self._found: deque[Variant] = deque(maxlen=MOST)

    def serving(
        self, arguments: Mapping[Slot, Any], surroundings: Callable[[], Any], make: Callable[[list[Given]], Variant]
    ) -> Variant:
        """A variant that serves a call in its surroundings, made if there is none.

        `make` gets what the variants take for granted that there are.
        """
        for variant in self._found:
            if variant.given.holds(arguments, surroundings):
                return variant
        found = make([variant.given for variant in self._found])
        self._found.appendleft(found)
        return found


def new_variant(
    owner: nn.Module,
    plain: nn.Module,
    arguments: Mapping[Slot, Any],
    image: str,
    name: str,
    settings: Settings,
    prove: Prove | None,
    proved: Collection[Given],
) -> Variant:
    """A graph for a call of a converted model.

    Args:
        owner: the converted model.
        plain: a plain model with its modules and tensors, which is traced.
        arguments: of the call.
        image: the name of the argument that is streamed.
        name: of the streamed submodule.
        settings: of the converted model.
        prove: proves a partition, as the conversion does.
        proved: what has been proved. With other sizes of the same arguments, a forward is not proved again.

    Raises:
        What `fxstream.convert` raises, and what the model itself raises for such arguments.
    """
    forms = {slot: form_of(value) for slot, value in arguments.items()}
    try:
        traced = trace(plain, forms, {}, settings.freeze_batchnorm)
    except TraceError as error:
        # What the model itself refuses, it refuses in its own words.
        raise rejection(plain, forms, error) or error from None
    prefix, parts = rewrite(traced, image, settings, name)
    given = prefix.trace.assumptions.given
    if prove is not None and all(given.constants != other.constants for other in proved):
        prove(prefix, parts, name, settings)
    streamed = Streamed(parts.streamed, settings, prefix.trace.assumptions)
    streamed.bind(owner)
    code = fx.GraphModule({}, fx.Graph())
    code.graph = parts.outer
    seen = _Seen(owner, {name: streamed, **prefix.trace.constants})
    return Variant(given, type(code).forward, seen)


class _Seen:
    """A converted model with other values for some attributes."""

    def __init__(self, owner: nn.Module, own: Mapping[str, Any]):
        vars(self).update(_owner=owner, **own)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._owner, name)
