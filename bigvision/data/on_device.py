"""``data.decode: cuda``: workers leave JPEGs as they are, and the rank decodes, crops and resizes them on its device.

What is random was drawn in the worker, as a function of (seed, epoch, index). Files that a device cannot take were decoded
there too. A file that the device cannot decode after all is made by the rank as a worker would have made it, stand-in included.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg

from bigvision.data.order import generators_kept
from bigvision.errors import UserError, one_line

if TYPE_CHECKING:
    from bigvision.data.transforms import Begun, Rectangle, Steps


class Encoded(NamedTuple):
    """A sample whose pixels are still to be made."""

    size: int
    """Bytes of the file."""
    data: np.ndarray | None
    """The file, uint8; None where it lies in the memory of the sample's image."""
    whole: tuple[int, int]
    """Height and width of the image, as its header says."""
    rectangle: Rectangle
    flipped: tuple[int, ...]
    """Dimensions along which it is flipped."""
    generator: np.ndarray | None
    """torch's state for the steps after the crop."""


def leave_encoded(begun: Begun, buffer: Tensor) -> Encoded | None:
    """*begun* as it is, in its *buffer*, uint8 (C, H, W), where there is enough of that; None where it is for the CPU."""
    file = begun.file
    if file is None or begun.picture.channels != len(buffer):
        return None
    data, memory = np.frombuffer(file, np.uint8).copy(), flat(buffer)
    fits = len(data) <= len(memory)
    if fits:
        memory[: len(data)] = torch.from_numpy(data)
    generator = None if begun.generator is None else begun.generator.numpy()
    whole = begun.picture.height, begun.picture.width
    return Encoded(len(data), None if fits else data, whole, begun.rectangle, begun.flipped, generator)


def flat(buffer: Tensor) -> Tensor:
    """The memory of an image, which lies pixel by pixel."""
    return buffer.permute(1, 2, 0).view(-1)


def decode_files(files: Sequence[Tensor], device: torch.device) -> list[Tensor | None]:
    """Each of the JPEGs *files* as uint8 (3, H, W) on *device*; None for those that cannot be decoded there."""
    try:
        return list(_decoded(files, device))
    except RuntimeError:  # which of them it is, is not said
        found: list[Tensor | None] = []
        for file in files:
            try:
                found += _decoded([file], device)
            except RuntimeError:
                found.append(None)
        return found


def _decoded(files: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    with warnings.catch_warnings():
        # torchvision 0.29 announces that its decoders will move to another package.
        warnings.simplefilter("ignore")
        found = decode_jpeg(list(files), ImageReadMode.RGB, device=device)
    assert isinstance(found, list)
    return found


def check_decoder(device: torch.device) -> None:
    """Raise `UserError` where *device* is no GPU, or torchvision does not decode on it."""
    if device.type != "cuda":
        raise UserError("data.decode: cuda needs a GPU, but this run is on the CPU: use cpu")
    file = io.BytesIO()
    Image.new("RGB", (16, 16)).save(file, "JPEG")
    try:
        _decoded([torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8)], device)
    except RuntimeError as error:
        raise UserError(
            f"data.decode: cuda, but torchvision does not decode JPEGs on {device} ({one_line(error)}): use cpu"
        ) from error


def finish(
    images: Tensor, encoded: Sequence[Encoded | None], steps: Steps, device: torch.device, again: Callable[[int, Tensor], None]
) -> Tensor:
    """*images*, uint8 (B, C, H, W) on the CPU, on *device*, with those that are still *encoded* decoded.

    *again* makes one, given its place, on the CPU, as a worker would have.
    """
    places = [place for place, one in enumerate(encoded) if one is not None]
    files = []
    for place in places:
        one = encoded[place]
        assert one is not None
        files.append(flat(images[place])[: one.size] if one.data is None else torch.from_numpy(one.data))
    pixels = dict(zip(places, decode_files(files, device))) if files else {}
    made: dict[int, Tensor] = {}
    for place in places:
        one, whole = encoded[place], pixels[place]
        assert one is not None
        # A decoder may make another image of an odd file than its header says.
        if whole is None or tuple(whole.shape[1:]) != one.whole or whole.shape[0] != images.shape[1]:
            again(place, images[place])
            continue
        made[place] = whole
    result = torch.empty_like(images, device=device)
    if len(made) < len(images):
        result.copy_(images, non_blocking=True)
    with generators_kept():
        for place, whole in made.items():
            one = encoded[place]
            assert one is not None
            steps.fill_from(result[place], whole, one.rectangle)
            generator = None if one.generator is None else torch.from_numpy(one.generator)
            steps.finish(result[place], one.flipped, generator)
    return result
