"""Save a model to a blob and load it, with one import and one URL.

    python examples/save_and_load_model.py [https://ACCOUNT.blob.core.windows.net/CONTAINER/model.pt]

Without a URL, Blob Storage is an emulator (Azurite) that this script starts.
"""

from __future__ import annotations

import contextlib
import sys

import torch
from torch import nn

from azure_torch_ckpt import BlobIO
from azure_torch_ckpt.emulator import Azurite


def make_model() -> nn.Module:
    return nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 10))


def main() -> None:
    with contextlib.ExitStack() as stack:
        if len(sys.argv) > 1:
            url = sys.argv[1]
        else:
            url = stack.enter_context(Azurite()).create_container("models") + "/model.pt"

        model = make_model()
        with BlobIO(url, "wb") as file:
            torch.save(model.state_dict(), file)
        print(f"saved {url}")

        # An exception inside `with` leaves the existing blob unchanged.
        with contextlib.suppress(RuntimeError), BlobIO(url, "wb") as file:
            file.write(b"half of a")
            raise RuntimeError("the job is killed")

        loaded = make_model()
        with BlobIO(url, "rb") as file:
            loaded.load_state_dict(torch.load(file))
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, loaded.state_dict()[name]), name
        print(f"loaded {sum(tensor.numel() for tensor in loaded.parameters())} parameters, all equal")


if __name__ == "__main__":
    main()
