"""Train the model of train_plain.py in several processes with DistributedDataParallel.

    torchrun --nproc-per-node 2 examples/train_ddp.py

Convert first, then wrap. Every process takes its share of each batch, on a GPU of its own if there are GPUs, and
gradients are averaged as they are for any model. The weights at the end are those of one process that trains on the
whole batch. Streaming saves memory within a process, so an image need not be split among processes.
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from textures import BATCH, Textures, arguments, network
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

import fxstream


def main() -> None:
    options = arguments(__doc__)
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo")
    rank, processes = dist.get_rank(), dist.get_world_size()
    if BATCH % processes:
        raise SystemExit(f"{processes} processes cannot share batches of {BATCH} evenly")

    textures = Textures(options.steps * BATCH, options.size)
    sampler = DistributedSampler(textures, shuffle=False)
    loader = DataLoader(textures, batch_size=BATCH // processes, sampler=sampler)
    model = network().to(device)
    model = fxstream.convert(model, tile_shape=options.tile, freeze_batchnorm=True)
    parallel = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(parallel.parameters(), lr=3e-4)
    for step, (images, targets) in enumerate(loader, start=1):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(parallel(images.to(device)), targets.to(device))
        loss.backward()
        optimizer.step()
        if rank == 0:
            print(f"step {step}: loss {loss.item():.4f} in process 0")
    if options.save and rank == 0:
        torch.save(model.state_dict(), options.save)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
