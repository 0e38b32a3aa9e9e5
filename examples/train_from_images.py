"""Train from images in blobs, stop in the middle of an epoch, and resume without a difference.

    python examples/train_from_images.py

The script starts an emulator of Blob Storage (Azurite) and creates small images: PPM files, which need no library to
decode. One checkpoint holds the model, the optimizer and the position in the data.
"""

from __future__ import annotations

import random
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.stateful import Stateful
from torch.utils.data import DataLoader

from azure_torch_ckpt import AzureBlobReader, AzureBlobWriter, Blob, BlobIO, BlobListing, IterableBlobDataset
from azure_torch_ckpt.emulator import Azurite

IMAGES = 96
SIZE = 16
BATCH = 8
EPOCHS = 2
STOPPED_AT = 17  # steps; this is in the second epoch
HEADER = f"P6 {SIZE} {SIZE} 255\n".encode()


def upload_images(url: str) -> None:
    """Upload reddish images of class 0 and bluish images of class 1."""
    source = random.Random(0)
    for number in range(IMAGES):
        label = number % 2
        pixels = bytearray(source.randbytes(SIZE * SIZE * 3))
        pixels[2 * label :: 3] = bytes(value // 2 + 127 for value in pixels[2 * label :: 3])
        with BlobIO(f"{url}/train/{label}/{number:04}.ppm", "wb", content_type="image/x-portable-pixmap") as file:
            file.write(HEADER + pixels)


def decode(blob: Blob) -> tuple[Tensor, int]:
    pixels = bytearray(blob.read()[len(HEADER) :])
    image = torch.frombuffer(pixels, dtype=torch.uint8).view(SIZE, SIZE, 3).permute(2, 0, 1) / 255 - 0.5
    return image, int(blob.blob_name.split("/")[1])


class Training(Stateful):
    """Everything that a checkpoint contains."""

    def __init__(self, listing: BlobListing) -> None:
        torch.manual_seed(0)
        self.dataset = IterableBlobDataset(listing, transform=decode, shuffle=True, seed=1, batch_size=BATCH)
        self.model = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2)
        )
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.2, momentum=0.9)
        self.epoch = 0
        self.batches = 0  # of this epoch, since it began or was resumed
        self.losses: list[float] = []

    def state_dict(self) -> dict[str, Any]:
        momenta = {
            str(number): self.optimizer.state[parameter].get("momentum_buffer", torch.zeros_like(parameter))
            for number, parameter in enumerate(self.model.parameters())
        }
        return {
            "model": self.model.state_dict(),
            "momenta": momenta,
            "epoch": self.epoch,
            # The workers read ahead of the training, so only the training knows how many samples it has used.
            "data": self.dataset.state_at(self.batches * BATCH),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.model.load_state_dict(state_dict["model"])
        for number, parameter in enumerate(self.model.parameters()):
            self.optimizer.state[parameter]["momentum_buffer"] = state_dict["momenta"][str(number)]
        self.epoch = state_dict["epoch"]
        self.dataset.load_state_dict(state_dict["data"])

    def run(self, stop_at: int | None = None) -> None:
        loader = DataLoader(self.dataset, batch_size=BATCH, num_workers=2)
        for epoch in range(self.epoch, EPOCHS):
            self.epoch = epoch
            self.dataset.set_epoch(epoch)
            self.batches = 0
            for images, labels in loader:
                loss = F.cross_entropy(self.model(images), labels)
                self.optimizer.zero_grad()
                loss.backward()
                self.optimizer.step()
                self.losses.append(loss.item())
                self.batches += 1
                if len(self.losses) == stop_at:
                    return


def main() -> None:
    with Azurite() as azurite:
        url = azurite.create_container("images")
        checkpoint = azurite.create_container("checkpoints") + "/run-1"
        upload_images(url)
        listing = BlobListing.from_container_url(url, prefix="train/", suffix=".ppm")
        print(listing)

        uninterrupted = Training(listing)
        uninterrupted.run()

        first = Training(listing)
        first.run(stop_at=STOPPED_AT)
        dcp.save({"training": first}, storage_writer=AzureBlobWriter(checkpoint), no_dist=True)
        print(f"stopped after {len(first.losses)} of {len(uninterrupted.losses)} steps, loss {first.losses[-1]:.4f}")

        second = Training(listing)
        dcp.load({"training": second}, storage_reader=AzureBlobReader(checkpoint), no_dist=True)
        second.run()
        print(f"resumed for {len(second.losses)} more steps, loss {second.losses[-1]:.4f}")

        assert first.losses + second.losses == uninterrupted.losses, "the resumed run differs"
        print("every step's loss equals the uninterrupted run's")


if __name__ == "__main__":
    main()
