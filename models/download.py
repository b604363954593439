"""Download published weights into PyTorch's cache."""

from pathlib import Path

import torch

from inputs import UserError

# Teachers for CIFAR-100 by Yaofo Chen (github.com/chenyaofo/pytorch-cifar-models, BSD 3-Clause). Their published top-1
# accuracies are 68.83, 70.16, 71.63 and 72.63. A name ends in the first eight digits of the file's sha256.
_RELEASE = "https://github.com/chenyaofo/pytorch-cifar-models/releases/download/resnet/cifar100_"
HUB = {
    "resnet20": f"{_RELEASE}resnet20-23dac2f1.pt",
    "resnet32": f"{_RELEASE}resnet32-84213ce6.pt",
    "resnet44": f"{_RELEASE}resnet44-ffe32858.pt",
    "resnet56": f"{_RELEASE}resnet56-f2eff4c8.pt",
}


def fetch(url: str) -> Path:
    """Return the file at a URL, downloaded once; its name must end in the first digits of its sha256.

    Raises:
        OSError, HTTPException: it cannot be downloaded.
        RuntimeError: the downloaded file has another hash; it is not kept.
    """
    file = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(file), file.stem.rpartition("-")[2], progress=True)
    return file


def fetch_hub(name: str) -> Path:
    """Return the file with public CIFAR-100 weights of a network; see `HUB` and `fetch`.

    Raises:
        UserError: there are none for this network.
        OSError, RuntimeError, HTTPException: as `fetch`.
    """
    if name not in HUB:
        raise UserError(f"the hub has no CIFAR-100 weights of {name}, only of {', '.join(HUB)}: train it, or give a"
                        " file as --path-t")  # fmt: skip
    return fetch(HUB[name])
