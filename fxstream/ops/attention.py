"""Attention: local along the batch, and along every other dimension that it does not attend over."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..geometry.axes import Symbol, Value
from .products import batch_labels, labelled_product, operand_problem, rank_of
from .registry import Answer, Fact, Local, NotLocal, Unknown, is_tensor, register

_RANDOM = NotLocal("drops attention weights at random in training mode", "call .eval() on it")


@register(F.scaled_dot_product_attention)
def scaled_dot_product_attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Answer:
    if dropout_p > 0:
        return NotLocal("drops attention weights at random", "call it with dropout_p=0")
    operands = (query, key, value, attn_mask)
    if problem := operand_problem(*operands):
        return problem
    inner = (["query", "embedding"], ["key", "embedding"], ["key", "value"], ["query", "key"])
    batches = batch_labels(operands, 2)
    if enable_gqa:  # several heads of the query share one of the keys and values
        batches[1:3] = [[*labels[:-1], "shared heads"] for labels in batches[1:3]]
    if is_causal and isinstance(query, Value) and query.tags([-2]):
        return NotLocal(f"attends to what comes before along the streamed {query.tags([-2])[0]}")
    labels = [[*batch, *own] for batch, own in zip(batches, inner, strict=True)]
    result = [*max(batches, key=len), "query", "value"]
    run = partial(_attention, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa)
    return labelled_product(operands, labels, result, "attends over", run)


def _attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, **options: Any
) -> torch.Tensor:
    return F.scaled_dot_product_attention(query, key, value, mask, **options)


@register(nn.MultiheadAttention)
def multihead_attention(
    m: Any,
    query: Any,
    key: Any,
    value: Any,
    key_padding_mask: Any = None,
    need_weights: bool = True,
    attn_mask: Any = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> Answer:
    operands = (query, key, value, key_padding_mask, attn_mask)
    if problem := operand_problem(*operands):
        return problem
    if m.training and m.dropout > 0:
        return _RANDOM
    if rank_of(attn_mask) == 3:
        return NotLocal("has an attention mask for each head of each sample", "give it one mask for all samples")
    queries, keys = (["sample", "query"], ["sample", "key"])
    if not m.batch_first:
        queries, keys = queries[::-1], keys[::-1]
    if is_causal and isinstance(query, Value) and query.tags([queries.index("query")]):
        return NotLocal("attends to what comes before along a streamed axis")
    labels = [[*queries, "query channel"], [*keys, "key channel"], [*keys, "value channel"]]
    labels += [["sample", "key"], ["query", "key"]]
    sizes = {"channel": m.embed_dim, "head": m.num_heads}
    if m.bias_k is not None or m.add_zero_attn:
        sizes["attended"] = Symbol()

    own = _tensors(m)

    def attention(*tensors: Any, weights: bool) -> torch.Tensor:
        query, key, value, padding, mask, *given = tensors
        module = m.with_tensors(dict(zip(own, given, strict=True)))
        found = module(query, key, value, padding, weights, mask, average_attn_weights, is_causal)
        return found[weights]  # type: ignore[no-any-return]  # a tensor

    def answer(result: list[str], weights: bool) -> Local | NotLocal:
        run = partial(attention, weights=weights)
        return labelled_product(operands, labels, result, "attends over", run, sizes, tuple(own.values()))

    attended = answer([*queries, "channel"], weights=False)
    if isinstance(attended, NotLocal):
        return attended
    if not need_weights:
        return attended, Fact(None)
    heads = [] if average_attn_weights else ["head"]
    # Each result has its own `run`: the attention is computed twice if the model uses both.
    weights = answer(["sample", *heads, "query", "attended" if "attended" in sizes else "key"], weights=True)
    return weights if isinstance(weights, NotLocal) else (attended, weights)


def _tensors(m: Any) -> dict[str, Any]:
    """The parameters and buffers of a module, by name."""
    return {**dict(m.named_parameters()), **dict(m.named_buffers())}


def _sample_by_sample(x: Value, batch: int, run: Callable[..., torch.Tensor], *tensors: Any) -> Answer:
    """An attention that keeps the shape and treats each sample of dimension `batch` by itself.

    `run` gets a block and the tensors.
    """
    if tags := x.tags(index for index in range(x.rank) if index != batch):
        return NotLocal(f"attends over positions along the streamed {' and '.join(tags)}")
    return Local((x, *tensors), x.dims, run)


def _transformer(m: Any, src: Value, mask: Any, padding: Any, is_causal: Any) -> Answer:
    parts = list(m.modules())
    if m.training and any(part.p > 0 for part in parts if isinstance(part, nn.Dropout)):
        return _RANDOM
    if isinstance(mask, (Value, Unknown)) or padding is not None or rank_of(mask) == 3:
        return NotLocal("has a mask that its streaming rule does not cover", "use one mask (L, L) for all samples")
    batch_first = next(part.batch_first for part in parts if isinstance(part, nn.MultiheadAttention))
    own = _tensors(m)

    def run(block: torch.Tensor, mask: torch.Tensor | None, *given: torch.Tensor) -> torch.Tensor:
        module = m.with_tensors(dict(zip(own, given, strict=True)))
        return module(block, mask, is_causal=is_causal)  # type: ignore[no-any-return]  # a tensor

    return _sample_by_sample(src, 0 if batch_first else 1, run, mask, *own.values())


@register(nn.TransformerEncoderLayer)
def transformer_encoder_layer(
    m: Any, src: Value, src_mask: Any = None, src_key_padding_mask: Any = None, is_causal: bool = False
) -> Answer:
    return _transformer(m, src, src_mask, src_key_padding_mask, is_causal)


@register(nn.TransformerEncoder)
def transformer_encoder(
    m: Any, src: Value, mask: Any = None, src_key_padding_mask: Any = None, is_causal: bool | None = None
) -> Answer:
    return _transformer(m, src, mask, src_key_padding_mask, is_causal)


# torchvision's Swin transformers. Their attention windows are shifted cyclically, so they span the whole image.


@register("torchvision.models.swin_transformer.shifted_window_attention")
def shifted_window_attention(
    input: Value,
    *args: Any,
    attention_dropout: float = 0.0,
    dropout: float = 0.0,
    training: bool = True,
    **kwargs: Any,
) -> Answer:
    if training and (attention_dropout > 0 or dropout > 0):
        return _RANDOM
    if any(isinstance(operand, Value) for operand in (*args, *kwargs.values())):
        return NotLocal("has weights that depend on the image")
    tensors = {name: given for name, given in (*enumerate(args), *kwargs.items()) if is_tensor(given)}

    def run(block: torch.Tensor, *given: torch.Tensor) -> torch.Tensor:
        filled: dict[Any, Any] = dict(enumerate(args)) | kwargs | dict(zip(tensors, given, strict=True))
        further = [filled.pop(index) for index in range(len(args))]
        return _swin().shifted_window_attention(block, *further, training=False, **filled)  # type: ignore[no-any-return]  # a tensor

    return _sample_by_sample(input, 0, run, *tensors.values())


@register("torchvision.models.swin_transformer._patch_merging_pad")
def patch_merging(x: Value) -> Answer:
    if tags := x.tags(range(1, x.rank)):
        return NotLocal(f"merges patches along the streamed {' and '.join(tags)}")
    *others, height, width, channels = (dim.known for dim in x.dims)
    sizes = [Symbol() if size is None else -(-size // 2) for size in (height, width)]
    sizes.append(Symbol() if channels is None else 4 * channels)
    dims = x.resized(dict(enumerate(sizes, start=len(others))))
    return Local((x,), dims, lambda block: _swin()._patch_merging_pad(block))


def _swin() -> Any:
    return import_module("torchvision.models.swin_transformer")
