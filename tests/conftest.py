"""Every test starts from the same seed, on one thread: the machine has few cores and the tests run side by side."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
