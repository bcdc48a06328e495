"""What a forward asks about its tensors while it is traced is answered, for the sizes and dtypes of the call."""

from __future__ import annotations

import copy
import math
import pickle
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from reference import Body, assert_exact, each_once, image, pair
from torch import nn

import fxstream
from fxstream.errors import InputError, TraceError
from fxstream.graph.trace import _Tracer
from fxstream.model.variants import MOST
from fxstream.testing import compare, head

# Bodies of a forward, in which only one question is asked.


def net(body: Callable[[Any, torch.Tensor], Any], **parts: Any) -> Body:
    return Body(body, first=nn.Conv2d(3, 4, 3, padding=1), last=nn.Conv2d(4, 2, 3, padding=1), **parts).double()


def _unless_image(m: Any, x: torch.Tensor) -> torch.Tensor:
    assert x.dim() == 4, "an image"
    assert x.ndim == len(x.shape) == 4, "an image"
    return m.last(m.first(x))


def _unless_rgb(m: Any, x: torch.Tensor) -> torch.Tensor:
    if x.shape[1] != 3:
        raise ValueError(f"{x.shape[1]} channels")
    return m.last(m.first(x))


def _star(m: Any, x: torch.Tensor) -> torch.Tensor:
    y = m.first(x)
    batch, channels, *sizes = y.shape
    return m.last(y.view(batch, channels, *sizes))


def _padded(m: Any, x: torch.Tensor) -> torch.Tensor:
    rows, columns = -x.shape[2] % 8, -x.shape[3] % 8
    if rows or columns:
        x = F.pad(x, (0, columns, 0, rows))
    return m.last(m.first(x))


def _square(m: Any, x: torch.Tensor) -> torch.Tensor:
    most = max(x.shape[2:])
    return m.last(m.first(F.pad(x, (0, most - x.shape[3], 0, most - x.shape[2]))))


def _rounded(m: Any, x: torch.Tensor) -> torch.Tensor:
    rows = math.ceil(x.shape[2] / 4) * 4
    return m.last(F.pad(m.first(x), (0, 0, 0, max(rows - x.shape[2], 0))))


def _resized(m: Any, x: torch.Tensor) -> torch.Tensor:
    y = m.last(m.pool(m.first(x)))
    return F.interpolate(y, size=x.shape[2:]) if y.shape[2:] != x.shape[2:] else y


def _as_often_as_rows(m: Any, x: torch.Tensor) -> torch.Tensor:
    y = m.first(x)
    for _ in range(x.shape[2] // 8):
        y = F.relu(y) * 1.5
    return m.last(y)


def _looked_up(m: Any, x: torch.Tensor) -> torch.Tensor:
    return m.last(m.first(x) * {16: 2.0, 21: 3.0}.get(int(x.shape[2]), 1.0))


def _listed(m: Any, x: torch.Tensor) -> torch.Tensor:
    return m.last(torch.cat(list(m.first(x).chunk(2, 1)), 1))


def _of_dtype(m: Any, x: torch.Tensor) -> torch.Tensor:
    y = m.first(x)
    return m.last(y * 2 if y.dtype is torch.float64 and y.is_floating_point() else y)


def _of_device(m: Any, x: torch.Tensor) -> torch.Tensor:
    y = m.first(x)
    return m.last(y * 2 if str(y.device) == "cpu" and not y.is_cuda and y.device == torch.device("cpu") else y)


def _squeezed(m: Any, x: torch.Tensor) -> torch.Tensor:
    y = m.first(x)
    return m.last(y) * (2 if x.squeeze().dim() == 4 else 3)


def _of_array(m: Any, x: torch.Tensor) -> torch.Tensor:
    return m.last(m.first(x)) * (2 if np.all(np.array(x.shape[2:]) % 8 == 0) else 3)


def _with_numbers_of_numpy(m: Any, x: torch.Tensor) -> torch.Tensor:
    rows = np.int64(int(np.ceil(x.shape[2] / 4)) * 4 - x.shape[2])
    return m.last(F.pad(m.first(x), (0, 0, 0, rows))) * np.float32(0.5)


def _of_elements(m: Any, x: torch.Tensor) -> torch.Tensor:
    return m.last(m.first(x)) * (2 if x.numel() > 1000 else 3)


def _written(m: Any, x: torch.Tensor) -> torch.Tensor:
    y = m.first(x)
    key, other = f"{y.shape[2]}x{y.shape[3]:04d}", f"{y.shape[2]:d}" + str(tuple(y.shape[2:]))
    return m.last(y * {"21x0018": 2.0, "16x0024": 3.0}.get(key, 0.5)) * len(other)


def _said(m: Any, x: torch.Tensor) -> torch.Tensor:
    try:
        if x.shape[2] % 2:
            raise ValueError(f"{x.shape[2]} rows are odd")
    except ValueError as error:
        return m.last(m.first(x)) * int(str(error)[:2])
    return m.last(m.first(x))


def _divided(m: Any, x: torch.Tensor) -> torch.Tensor:
    quotient, rest = divmod(x.shape[2], 4)
    return m.last(m.first(x)) * (quotient + 1 if rest else 2) * divmod(100, x.shape[3])[1]


def _part_of_a_shape(m: Any, x: torch.Tensor) -> torch.Tensor:
    y = m.first(x)
    return m.last(y * 2 if y.shape[2:].numel() > 300 and isinstance(y.shape[2:], torch.Size) else y)


BODIES: list[Callable[[Any, torch.Tensor], torch.Tensor]] = [
    *(_unless_image, _unless_rgb, _star, _padded, _square, _rounded, _resized, _as_often_as_rows, _looked_up, _listed),
    *(_of_dtype, _of_device, _squeezed, _of_elements, _of_array, _with_numbers_of_numpy),
    *(_written, _said, _divided, _part_of_a_shape),
]


def random(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.double)


SHAPES = [(1, 3, 21, 18), (2, 3, 16, 24), (1, 3, 13, 13), (1, 3, 16, 24)]


@each_once(example=[True, False], body=BODIES)
def test_questions_are_answered_for_every_size_and_dtype(body: Callable[..., Any], example: bool) -> None:
    plain, converted = pair(net(body, pool=nn.MaxPool2d(2)), 8, **_example(example))
    for shape in SHAPES:
        compare(plain, converted, torch.randn(shape))
    plain, converted = plain.float(), converted.float()
    for shape in SHAPES:
        x = torch.randn(shape)
        torch.testing.assert_close(converted(x), plain(x))


def test_sizes_that_a_model_returns_are_numbers_and_shapes() -> None:
    def sizes(m: Any, x: torch.Tensor) -> Any:
        y = m.first(x)
        return m.last(y), y.shape, y.shape[2:], y.shape[2], y.shape[3] // 2, {"both": list(y.shape[2:])}

    plain, converted = pair(net(sizes), 8)
    expected, found = plain(random(SHAPES[0]))[1:], converted(random(SHAPES[0]))[1:]
    assert found == expected
    assert [type(value) for value in found] == [type(value) for value in expected]
    assert {type(size) for size in (*found[0], *found[1], found[2], found[3], *found[4]["both"])} == {int}


def _example(given: bool) -> dict[str, Any]:
    return {"example_input": torch.randn(2, 3, 20, 31).double()} if given else {}


@pytest.mark.parametrize(
    "body", [_unless_image, _unless_rgb, _padded, _square, _resized, _of_dtype, _with_numbers_of_numpy]
)
def test_questions_do_not_end_the_streamed_part(body: Callable[..., Any]) -> None:
    assert_exact(net(body, pool=nn.MaxPool2d(2)), (1, 3, 21, 18), 8, whole=True)


class Inside(nn.Module):
    def __init__(self, body: Callable[..., Any]):
        super().__init__()
        self.stem, self.inner = nn.Conv2d(3, 3, 3, padding=1).double(), net(body)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(F.relu(self.stem(x)))


@pytest.mark.parametrize("body", [_unless_rgb, _star, _padded, _rounded, _of_dtype])
def test_a_question_in_a_submodule_is_answered(body: Callable[..., Any]) -> None:
    converted = assert_exact(Inside(body), (1, 3, 21, 18), 8, whole=True)
    assert not head(converted)


# How many traces are made.


@pytest.fixture
def traces(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """The models that have been traced, one entry per trace."""
    found: list[nn.Module] = []
    original = _Tracer.trace

    def counted(self: Any, root: nn.Module, *args: Any) -> Any:
        found.append(root)
        return original(self, root, *args)

    monkeypatch.setattr(_Tracer, "trace", counted)
    return found


def test_a_model_that_asks_nothing_is_traced_once_for_all_sizes_and_dtypes(traces: list[nn.Module]) -> None:
    converted = fxstream.convert(net(lambda m, x: m.last(m.first(x))), 8, example_input=random((1, 3, 20, 20)))
    for shape in SHAPES:
        converted(random(shape))
    converted.float()(image().float())
    assert len(traces) == 1


def test_a_question_about_the_form_is_asked_once_for_all_sizes(traces: list[nn.Module]) -> None:
    converted = fxstream.convert(net(_of_dtype), 8)
    for shape in SHAPES:
        converted(random(shape))
    assert len(traces) == 1
    converted.float()
    for shape in SHAPES:
        converted(random(shape).float())
    assert len(traces) == 2


def test_a_question_about_sizes_is_asked_once_per_shape(traces: list[nn.Module]) -> None:
    converted = fxstream.convert(net(_padded), 8, example_input=random((1, 3, 21, 18)))
    for _ in range(2):
        for shape in SHAPES:
            converted(random(shape))
    assert len(traces) == len({(1, 3, 21, 18), *SHAPES})


def test_only_the_latest_graphs_are_kept() -> None:
    converted = fxstream.convert(net(_padded), 8)
    for columns in range(MOST + 5):
        converted(random((1, 3, 9, 9 + columns)))
    assert len(converted._call_variants._found) == MOST


# What is asked in vain, and what a forward refuses.


def test_what_a_forward_refuses_it_refuses_in_its_own_words() -> None:
    def divisible(m: Any, x: torch.Tensor) -> torch.Tensor:
        if x.shape[2] % 8:
            raise ValueError(f"{x.shape[2]} rows are no multiple of 8")
        return m.last(m.first(x))

    plain, converted = pair(net(divisible), 8)
    compare(plain, converted, torch.randn(1, 3, 24, 17))
    for model in (plain, converted):
        with pytest.raises(ValueError, match=r"^21 rows are no multiple of 8$"):
            model(random((1, 3, 21, 18)))
    with pytest.raises(ValueError, match=r"^21 rows are no multiple of 8$"):
        fxstream.convert(net(divisible), 8, example_input=random((1, 3, 21, 18)))


def test_without_an_example_sizes_are_tried_until_the_forward_accepts_one() -> None:
    def large(m: Any, x: torch.Tensor) -> torch.Tensor:
        assert x.shape[2] == 224, "rows"
        return m.last(m.first(x))

    plain, converted = pair(net(large), 64)
    compare(plain, converted, torch.randn(1, 3, 224, 50))

    def never(m: Any, x: torch.Tensor) -> torch.Tensor:
        assert x.shape[2] == 11, "rows"
        return m.last(m.first(x))

    with pytest.raises(TraceError, match="example_input"):
        fxstream.convert(net(never), 8)
    plain, converted = pair(net(never), 8, example_input=random((1, 3, 11, 9)))
    compare(plain, converted, torch.randn(1, 3, 11, 30))


def test_an_image_of_another_rank_is_refused_at_the_call() -> None:
    converted = fxstream.convert(net(_unless_image), 8)
    with pytest.raises(InputError, match=r"must be \(N, C, H, W\)"):
        converted(torch.randn(3, 20, 20))


# What else several graphs mean.


def test_copies_and_pickles_make_graphs_of_their_own() -> None:
    plain, converted = pair(Padded().double(), 8)
    converted(random(SHAPES[0]))
    for copied in (copy.deepcopy(converted), pickle.loads(pickle.dumps(converted))):
        assert not copied._call_variants._found
        for shape in SHAPES:
            compare(plain, copied, torch.randn(shape))


class Padded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 2, 3, padding=1)

    forward = _padded


def test_a_pickle_without_the_models_class_still_serves_what_its_graph_serves() -> None:
    class Local(Padded):
        pass

    converted = fxstream.convert(Local(), 8, example_input=torch.randn(SHAPES[0]))
    copied = pickle.loads(pickle.dumps(converted))
    x = torch.randn(SHAPES[0])
    assert torch.equal(copied(x), converted(x))
    with pytest.raises(fxstream.StreamingError, match="class of the model was not found"):
        copied(torch.randn(SHAPES[1]))


def test_new_tiles_and_budgets_are_those_of_all_graphs() -> None:
    plain, converted = pair(net(_padded), 8)
    compare(plain, converted, torch.randn(SHAPES[0]))
    converted.tile_shape = 5
    converted.memory_budget = "1 MB"
    compare(plain, converted, torch.randn(SHAPES[0]))
    (variant,) = converted._call_variants._found
    assert variant.seen.streamed.settings.tile_shape == (None, None, 5, 5)
    assert variant.seen.streamed.settings.memory_budget == 10**6


def test_every_graph_follows_modes_hooks_and_new_weights() -> None:
    plain, converted = pair(net(_padded), 8)
    converted(random(SHAPES[0]))
    new = {name: torch.randn_like(value) for name, value in plain.state_dict().items()}
    plain.load_state_dict(new, assign=True)
    converted.load_state_dict(new, assign=True)
    compare(plain, converted, torch.randn(SHAPES[0]))
    converted.first.register_forward_hook(lambda *_: None)
    with pytest.raises(fxstream.StreamingError, match="first has acquired a hook"):
        converted(random(SHAPES[0]))


def test_graphs_are_made_inside_inference_mode_and_serve_training_afterwards() -> None:
    plain, converted = pair(net(_padded), 8)
    with torch.inference_mode():
        converted(random(SHAPES[0]))
    compare(plain, converted, torch.randn(SHAPES[0]))


def test_several_threads_make_graphs_at_a_time() -> None:
    plain, converted = pair(net(_padded), 8)
    found: dict[int, bool] = {}

    def run(columns: int) -> None:
        x = torch.randn(1, 3, 9, columns, dtype=torch.double)
        found[columns] = torch.allclose(converted(x), plain(x))

    threads = [threading.Thread(target=run, args=(columns,)) for columns in range(9, 15)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == dict.fromkeys(range(9, 15), True)


def test_the_graph_holds_only_what_is_computed() -> None:
    converted = fxstream.convert(net(_of_elements), 8)
    assert [node.op for node in converted.graph.nodes] == ["placeholder", "call_module", "output"]


def test_a_dtype_is_that_of_the_autocast_region() -> None:
    def scaled(m: Any, x: torch.Tensor) -> torch.Tensor:
        y = m.first(x)
        y = y * 2 if y.dtype is torch.bfloat16 and y.device.type == "cpu" else y
        return m.last(y * torch.ones(1, dtype=y.dtype))

    model = net(scaled).float()
    converted = fxstream.convert(copy.deepcopy(model), 8)
    x = torch.randn(1, 3, 21, 18)
    for dtype in (None, torch.bfloat16, None, torch.float16):
        with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
            got, expected = converted(x), model(x)
        assert got.dtype == expected.dtype
        torch.testing.assert_close(got, expected)
