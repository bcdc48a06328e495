"""Train a streamed resnet18 to tell photographs of textures apart, in a plain PyTorch loop.

    python examples/train_plain.py

`fxstream.convert` is the only line that has to do with streaming. train_lightning.py trains the same model with
Lightning, and train_ddp.py in several processes; both end with the same weights as this program.
"""

from __future__ import annotations

import torch
from textures import BATCH, Textures, arguments, network
from torch import nn
from torch.utils.data import DataLoader

import fxstream


def main() -> None:
    options = arguments(__doc__)
    loader = DataLoader(Textures(options.steps * BATCH, options.size), batch_size=BATCH)
    model = network()
    model = fxstream.convert(model, tile_shape=options.tile, freeze_batchnorm=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    for step, (images, targets) in enumerate(loader, start=1):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images), targets)
        loss.backward()
        optimizer.step()
        print(f"step {step}: loss {loss.item():.4f}")
    if options.save:
        torch.save(model.state_dict(), options.save)


if __name__ == "__main__":
    main()
