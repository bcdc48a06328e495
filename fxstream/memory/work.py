"""How the work of a model is divided between the streamed part and the head, counted on the meta device."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from ..graph.arguments import Form, Question
from ..graph.facts import Facts
from ..graph.hooks import remove_hooks
from ..graph.mirror import on_meta, tensor_on_meta
from ..graph.nodes import keeps_shape
from ..graph.prefix import Prefix
from ..graph.snapshot import RandomState
from .flops import Flops

LARGE = 1024
"""FLOPs are counted for an image of so many pixels along each axis, if the model takes one: it is large images that
people stream, and the share of a classifier behind a global pooling is less than in a small one."""

MOST_BEHIND = 0.05
"""The share of a model's FLOPs that may stay behind the streamed part without a word."""


@dataclass(frozen=True)
class Work:
    """The FLOPs of a forward pass, without those of values that do not depend on the image."""

    shape: tuple[int, ...]
    """The image's shape."""
    streamed: int
    behind: int
    """The FLOPs of the head, as far as they are known."""
    unknown: tuple[fx.Node, ...]
    """What the head computes and cannot be counted."""

    @property
    def share(self) -> float:
        """The share of the FLOPs that stays behind; at least that if something is unknown."""
        return self.behind / max(1, self.streamed + self.behind)

    def __str__(self) -> str:
        """The share that streams, for the middle of a sentence."""
        most = "at most " if self.unknown else ""
        shape = " x ".join(map(str, self.shape))
        return f"{most}{1 - self.share:.1%} of the FLOPs of a forward pass (of an image of {shape})"


def work_of(prefix: Prefix) -> Work | None:
    """How the FLOPs of a model are divided; None if they cannot be counted, or there are none."""
    found = None
    for form in _forms(prefix):
        work = _counted(prefix, form)
        if found is None or len(work.unknown) < len(found.unknown):
            found = work
        if not found.unknown:
            break
    return found if found is not None and found.streamed + found.behind else None


def _forms(prefix: Prefix) -> Iterator[Form]:
    """Images to count with: a large one, and if not everything is known for it, the one that the model was traced
    with."""
    given = prefix.trace.assumptions.given
    form = given.form_of(str(prefix.image.target))
    if isinstance(form, Form):
        if given.question is not Question.SHAPE:
            yield replace(form, shape=(*form.shape[:2], *[LARGE] * len(form.shape[2:])))
        yield form


def _counted(prefix: Prefix, form: Form) -> Work:
    """Count with a copy of the model that has no hooks, since they are the user's and nobody has called the model."""
    trace = prefix.trace
    twin = on_meta(trace.root)
    vars(twin).update({name: tensor_on_meta(tensor) for name, tensor in trace.constants.items()})
    for module in twin.modules():
        remove_hooks(module)
    forms: dict[str, Any] = {slot.name: given for slot, given in trace.assumptions.given.forms.items()}
    facts = Facts(dict(twin.named_modules(remove_duplicate=False)), {**forms, str(prefix.image.target): form})
    streamed, counts, unknown = set(prefix.nodes), {True: 0, False: 0}, []
    drawn = RandomState()
    for finding in prefix.findings:
        node = finding.node
        with Flops() as flops:
            # On the meta device, torch's batch norm takes as long as ten convolutions.
            like = node.args[0] if node.args and keeps_shape(node, trace.module_of(node)) else None
            known = facts.takes_over(node, like) if isinstance(like, fx.Node) else facts.computes(node)
        if finding.status != "constant":
            counts[node in streamed] += flops.total
        if finding.in_head and not known and node.op != "output":
            unknown.append(node)
    drawn.restore()
    return Work(form.shape, counts[True], counts[False], tuple(unknown))
