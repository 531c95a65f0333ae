"""What an export for Hugging Face's hub and one in ONNX have beyond the weights: documents, a graph, facts about the images."""

from __future__ import annotations

import json
import logging
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bigvision.disk import FILE_MODE
from bigvision.errors import UserError, how_to_install, one_line

if TYPE_CHECKING:
    import onnxruntime

ONNX_FILE_LIMIT = 1_900_000_000
"""Bytes of weights in one ONNX file; protobuf ends at 2 GiB."""
MARK = "<!-- written by bigvision export -->"
IMAGE_FACTS = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")
"""How images are prepared, by timm's names."""
INPUT = "images"
"""The name of an ONNX graph's input."""
TALKERS = ("onnxscript", "onnx_ir", "torch.onnx")
"""Loggers with a line for each constant that is not folded."""


def check_onnx() -> None:
    """`UserError` where a library is missing."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(f"--format onnx needs onnx, onnxscript and onnxruntime ({error}); {how_to_install('onnx')}") from None


def hub_config(card: Mapping[str, Any]) -> dict[str, Any]:
    """config.json as timm writes it for the hub, which transformers' TimmWrapper opens too."""
    config = dict(card)
    # transformers gives timm the number of classes beside model_args, not in it.
    config["model_args"] = {name: value for name, value in card.get("model_args", {}).items() if name != "num_classes"}
    names = config.get("label_names")
    if names and (described := _descriptions(names)):
        config["label_descriptions"] = described
    return config


def _descriptions(names: list[str]) -> dict[str, str] | None:
    """What ImageNet's synsets mean, by name; None where *names* are something else."""
    from timm.data import ImageNetInfo

    info = ImageNetInfo("imagenet22k")
    known = set(info.label_names())
    return {name: info.label_name_to_description(name) for name in names} if known.issuperset(names) else None


def readme(card: Mapping[str, Any], progress: Mapping[str, Any], weights: str) -> str:
    """README.md, the hub's card: facts of the run, and what the *weights* are. Class names are not in it: it is Markdown."""
    data, names, config = card["pretrained_cfg"], card.get("label_names"), progress.get("config", {})
    model, task = config.get("model") or {}, (config.get("task") or {}).get("name", "classify")
    metrics = {name: value for name, value in progress.get("metrics", {}).items() if isinstance(value, (int, float))}
    found = ", ".join(f"{name} {value:.6g}" for name, value in metrics.items())
    begin = f"timm's weights of `{model['name']}`" if model.get("pretrained") else "another run's or file's weights"
    rows = {
        "Architecture": f"`{card['architecture']}` (timm)",
        "Classes": f"{card['num_classes']}{', named in `config.json`' if names else ''}",
        "Images": f"{' x '.join(map(str, data['input_size']))}, mean {data['mean']}, standard deviation {data['std']}",
        "Resized with": f"{data.get('interpolation')}, of which {data.get('crop_pct')} is kept ({data.get('crop_mode')})",
        "Trained": f"{progress.get('step')} steps, {progress.get('samples')} samples",
        "Began with": begin if model.get("pretrained") or model.get("weights") else "random weights",
        "Evaluated": f"after {progress.get('evaluated')} steps: {found}" if found else "no",
        "Weights": weights,
    }
    tags = ["timm", "transformers", *(["image-classification"] if task == "classify" else [])]
    pipeline = ["pipeline_tag: image-classification"] if task == "classify" else []
    head = "\n".join(["---", "library_name: timm", *pipeline, "tags:", *(f"- {tag}" for tag in tags), "---"])
    table = "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])
    usage = 'import timm\n\nmodel = timm.create_model("hf-hub:USER/NAME", pretrained=True)  # or "local-dir:FOLDER"'
    return f"{head}\n{MARK}\n\n# {card['architecture']}\n\n{table}\n\n```python\n{usage}\n```\n"


def write_onnx(
    module: nn.Module, images: Tensor, path: Path, facts: Mapping[str, Any], beside: bool
) -> None:  # fmt: skip
    """Write *module* as an ONNX graph for any number of images like *images*, with *facts* as metadata, as JSON but for texts.

    *beside*: the weights become a file of their own, whose name ends with ".data".
    """
    levels = {name: logging.getLogger(name).level for name in TALKERS}
    for name in TALKERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    batch = ({0: torch.export.Dim("batch")},)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                module, (images,), dynamo=True, input_names=[INPUT], dynamic_shapes=batch, verbose=False
            )  # fmt: skip
    except Exception as error:
        raise UserError(f"--format onnx: torch cannot export {facts['architecture']} ({one_line(error):.300})") from error
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
    assert program is not None
    for name, value in facts.items():
        program.model.metadata_props[name] = value if isinstance(value, str) else json.dumps(value)
    program.save(path, external_data=beside)
    for written in (path, path.with_name(f"{path.name}.data")):
        if written.exists():
            written.chmod(FILE_MODE)
            descriptor = os.open(written, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def onnx_facts(card: Mapping[str, Any], progress: Mapping[str, Any], weights: str) -> dict[str, Any]:
    """What travels in an ONNX file beside the graph: how images are prepared, the classes, what the *weights* are."""
    data, names = card.get("pretrained_cfg", {}), card.get("label_names")
    return {
        "architecture": card["architecture"],
        **{name: data[name] for name in IMAGE_FACTS if name in data},
        **({"class_names": names} if names else {}),
        "step": progress.get("step"),
        "weights": weights,
    }


def run_onnx(path: Path, images: Tensor) -> list[Tensor]:
    """What onnxruntime returns for *images* on the CPU."""
    import onnxruntime

    session: onnxruntime.InferenceSession = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return [torch.from_numpy(output) for output in session.run(None, {INPUT: images.numpy()})]
