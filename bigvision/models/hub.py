"""timm's pretrained weights from the cache or the network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bigvision.errors import UserError
from bigvision.models.weights_file import shards_of

OTHERWISE_CALLED = {"open_clip_pytorch_model.safetensors": "open_clip_model.safetensors"}


def timm_file(name: str, card: dict[str, Any]) -> str:
    """timm's weights of the model *name*, whose card is *card*: a safetensors file, or an index with its shards beside it.

    Raises:
        UserError: they are not published as safetensors, or neither cached nor reachable.
    """
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    pickled = card.get("hf_hub_filename") or "pytorch_model.bin"
    file = str(Path(card.get("hf_hub_filename") or "model").with_suffix(".safetensors"))
    file = OTHERWISE_CALLED.get(file, file)
    if local := card.get("file"):
        return str(local)
    repository, _, revision = (card.get("hf_hub_id") or "").partition("@")
    # timm's hub repositories hold native files; "hf" marks those in a format of their own.
    if not repository or card.get("custom_load") == "hf":
        raise UserError(
            f"model.pretrained: timm's weights of {name} are not published as safetensors; "
            "convert them (bigvision convert IN.pth OUT.safetensors) and set model.weights, or use false"
        )
    try:
        return _download(repository, revision or None, file)
    except UserError:
        raise
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        # Not found locally is a kind of not found, and means that nobody could be asked.
        if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            raise UserError(
                f"model.pretrained: {repository} has no {file}, only pickled files; fetch one, "
                f"convert it (bigvision convert {pickled} {file}) and set model.weights"
            ) from error
        raise UserError(
            f"model.pretrained: timm's weights of {name} are neither cached nor reachable ({reason}); "
            f"get {file} of {repository} and set model.weights to it, or use false"
        ) from error


def _download(repository: str, revision: str | None, file: str) -> str:
    """Fetch *file*, or where there is only its index, all shards of that; return the path of the one or the other."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        return hf_hub_download(repository, file, revision=revision)
    except EntryNotFoundError as absent:
        try:
            index = hf_hub_download(repository, f"{file}.index.json", revision=revision)
        except EntryNotFoundError:
            raise absent from None
    try:
        shards = sorted(shards_of(Path(index)))
    except ValueError as error:
        raise UserError(f"model.pretrained: {index} of {repository} is not an index of weights ({error}); use false") from error
    for shard in shards:
        hf_hub_download(repository, shard, revision=revision)
    return index
