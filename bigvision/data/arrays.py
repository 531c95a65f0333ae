"""Datasets that fit in memory, and made-up ones."""

from __future__ import annotations

import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from bigvision.data.sample import Sample, Source, Split, Style
from bigvision.errors import UserError
from bigvision.seeds import seed_from

DEFAULT_ROOT = "data"
TORCHVISION = ("mnist", "fashion-mnist", "cifar10", "cifar100")


class ArraySource(Source):
    """Images in one tensor, which worker processes share rather than copy."""

    def __init__(self, name: str, style: Style, classes: Sequence[str], images: Tensor, labels: Tensor) -> None:
        """Args: *images* uint8 (N, 1 or 3, H, W); *labels* int64 (N,)."""
        self.name = name
        self.style: Style = style
        self.classes = list(classes)
        self._images, self._labels = images, labels

    def __len__(self) -> int:
        return len(self._labels)

    def read(self, index: int) -> Sample:
        return Sample(self._images[index].expand(3, -1, -1), self.label(index))

    def label(self, index: int) -> int:
        return int(self._labels[index])


class Synthetic(Source):
    """Noise with ten classes, for tests and benchmarks. The pixels are a function of the index alone."""

    def __init__(self, samples: int = 1024, size: int = 224) -> None:
        self.name = f"synthetic:{samples}x{size}"
        self.classes = [str(label) for label in range(10)]
        self._samples, self._size = samples, size

    def __len__(self) -> int:
        return self._samples

    def read(self, index: int) -> Sample:
        generator = torch.Generator().manual_seed(seed_from("synthetic", index))
        shape = (3, self._size, self._size)
        return Sample(torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator), self.label(index))

    def label(self, index: int) -> int:
        return index % 10


def open_digits(split: Split) -> ArraySource:
    """Open scikit-learn's digits: 1797 images of 8x8, four fifths for training, a fixed fifth for validation."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, target = load_digits(return_X_y=True)
    rows = range(len(target))
    train, val = train_test_split(rows, test_size=0.2, random_state=0, stratify=target)
    chosen = torch.tensor(sorted(train if split == "train" else val))
    images = torch.from_numpy(pixels).mul(255 / 16).round().to(torch.uint8).view(-1, 1, 8, 8)
    labels = torch.from_numpy(target).to(torch.int64)
    return ArraySource("digits", "digit", [str(label) for label in range(10)], images[chosen], labels[chosen])


def open_arrays(argument: str, split: Split, *, key: str, shared: bool) -> ArraySource:
    raise NotImplementedError


def open_torchvision(name: str, split: Split, *, key: str, root: str | None, download: bool) -> ArraySource:
    """Open torchvision's dataset *name* in the folder *root*, with *download* after fetching what is missing.

    Raises:
        UserError: it is not there, damaged, or cannot be downloaded; the message names the folder for the files.
    """
    from torchvision import datasets

    opener, style = {
        "mnist": (datasets.MNIST, "digit"),
        "fashion-mnist": (datasets.FashionMNIST, "tiny"),
        "cifar10": (datasets.CIFAR10, "tiny"),
        "cifar100": (datasets.CIFAR100, "tiny"),
    }[name]
    base = Path(root or DEFAULT_ROOT).expanduser()
    folder = base / opener.base_folder if name.startswith("cifar") else base / opener.__name__ / "raw"
    train = split == "train"
    try:
        dataset = opener(base, train=train)
    except RuntimeError as missing:
        # torchvision says "not found" and "corrupted" alike, and mends both by downloading.
        if not download:
            raise UserError(f"{key}: {name} is not complete in {str(folder)!r}; put its files there") from missing
        try:
            with _timeout(30):
                dataset = opener(base, train=train, download=True)
        except Exception as error:
            raise UserError(
                f"{key}: {name} could not be downloaded ({_line(error)}); put its files in {str(folder)!r}"
            ) from error
    except Exception as error:
        raise UserError(
            f"{key}: the files of {name} in {str(folder)!r} are damaged ({_line(error)}); delete and fetch them again"
        ) from error
    images = torch.as_tensor(dataset.data)
    images = images.unsqueeze(1) if images.ndim == 3 else images.permute(0, 3, 1, 2).contiguous()
    return ArraySource(name, style, dataset.classes, images, torch.as_tensor(dataset.targets, dtype=torch.int64))


@contextmanager
def _timeout(seconds: float) -> Iterator[None]:
    """Bound each wait for the network: torchvision sets no bound, and behind a firewall that drops packets all would hang."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
