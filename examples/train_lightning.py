"""Train the model of train_plain.py with Lightning.

    python examples/train_lightning.py

The model is converted; everything else is ordinary Lightning code.
"""

from __future__ import annotations

import lightning
import torch
from textures import BATCH, Textures, arguments, network
from torch import nn
from torch.utils.data import DataLoader

import fxstream


class Classifier(lightning.LightningModule):
    """An ordinary LightningModule, in which nothing refers to streaming."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], index: int) -> torch.Tensor:
        images, targets = batch
        loss = nn.functional.cross_entropy(self.model(images), targets)
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-4)


def main() -> None:
    options = arguments(__doc__)
    loader = DataLoader(Textures(options.steps * BATCH, options.size), batch_size=BATCH)
    model = network()
    model = fxstream.convert(model, tile_shape=options.tile, freeze_batchnorm=True)
    trainer = lightning.Trainer(accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False)
    trainer.fit(Classifier(model), loader)
    if options.save:
        torch.save(model.state_dict(), options.save)


if __name__ == "__main__":
    main()
