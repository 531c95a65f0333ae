"""Images of an evaluation with what was predicted, for the report: a few, spread over the validation data, as small JPEGs."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from bigvision import checkpoint
from bigvision.data import Batch
from bigvision.errors import one_line
from bigvision.monitor.report import EXAMPLES, finite
from bigvision.runtime import Runtime, gather_json
from bigvision.samples import each_tensor
from bigvision.tasks import Task

SIDE = 192
"""Pixels of the longer side of an image on the page."""
QUALITY = 80
FACTS = 8
"""Columns of a prediction that are shown."""
WORDS = 6
"""Labels or numbers of a sample that are shown."""


class Examples:
    """Takes predictions out of the batches of one evaluation. Every rank has one, and calls all of its methods.

    No forward pass is made for it. Rank 0 has the images; in a pipeline the last stage has what is predicted for them.
    """

    def __init__(self, task: Task, classes: list[str], runtime: Runtime, count: int, batches: int) -> None:
        """*count* images, spread over so many *batches* of this rank; 0 takes none."""
        self.task, self.classes, self.runtime = task, classes, runtime
        self.count = count if type(task).predict is not Task.predict and task.learns and runtime.data_rank == 0 else 0
        of_all = min(self.count, batches)
        self.chosen = {round(n * (batches - 1) / max(1, of_all - 1)) for n in range(of_all)}
        self.of_each = -(-self.count // max(1, len(self.chosen)))
        self.number = -1
        self.rows: dict[int, dict[str, Any]] = {}
        """What is predicted, by the samples' ids."""
        self.images: dict[int, tuple[Tensor, Any]] = {}
        """The images and their targets."""
        self.failure = ""

    def take(self, batch: Batch) -> Callable[[Any, Batch], None] | None:
        """What the next batch's outputs are to be given to; None where it is not chosen."""
        self.number += 1
        if self.number not in self.chosen:
            return None
        readable = torch.nonzero(batch.valid)[:, 0].tolist()
        places = readable[:: -(-len(readable) // self.of_each) or 1] if readable else []
        ids = batch.ids.tolist()
        wanted = {ids[place] for place in places}
        if self.runtime.is_main:
            for place in places:
                target = each_tensor(lambda part, place=place: part[place].clone(), batch.targets)
                self.images[ids[place]] = (batch.images[place].to("cpu", copy=True), target)

        def also(outputs: Any, part: Batch) -> None:
            if self.failure:
                return
            try:
                mine = [(place, id) for place, id in enumerate(part.ids.tolist()) if id in wanted]
                if mine:
                    index = torch.tensor([place for place, _ in mine], device=part.ids.device)
                    scores = self.task.scores(each_tensor(lambda tensor: tensor[index], outputs))
                    found = self.task.predict(scores, self.classes, 1)
                    self.rows |= {id: _plain(row) for (_, id), row in zip(mine, found, strict=True)}
            except Exception as error:  # a task of the user's may have outputs of any kind
                self.failure = f"{type(error).__name__}: {one_line(error)}"

        return also

    def write(self, out: Path, step: int, say: Callable[[str], None]) -> None:
        """Write ``OUT/examples.json``."""
        if self.runtime.pipeline_ranks > 1:
            for rows, failure in gather_json([list(self.rows.items()), self.failure]):
                self.rows |= {int(id): row for id, row in rows}
                self.failure = self.failure or failure
        if not self.images:
            return
        try:
            if self.failure:
                raise ValueError(self.failure)
            found = [self._example(id) for id in sorted(self.images) if id in self.rows][: self.count]
            content = json.dumps(finite({"step": step, "images": found}))
            checkpoint.replace(out / EXAMPLES, content.encode())
        except Exception as error:
            say(f"warning: no images of the evaluation in the report: {one_line(error)}")

    def _example(self, id: int) -> dict[str, Any]:
        (image, target), row = self.images[id], dict(self.rows[id])
        image = image[:3] if len(image) >= 3 else image[:1].expand(3, -1, -1)
        found: dict[str, Any] = {"sample": id, "image": _jpeg(image)}
        mask = row.get("prediction")
        if isinstance(mask, dict) and "mask" in mask:
            row["prediction"] = torch.from_numpy(_from_png(mask["mask"]))
        if type(self.task).draw is not Task.draw:
            found["drawn"] = _jpeg(self.task.draw(image, row))
        if self.task.target == "mask":
            found["target"] = _jpeg(self.task.draw(image, {"prediction": torch.as_tensor(target)}))
        else:
            found["truth"] = self._words(target)
        facts = {name: value for name, value in list(row.items())[:FACTS] if isinstance(value, (str, int, float))}
        return found | {"facts": {name: value[:120] if isinstance(value, str) else value for name, value in facts.items()}}

    def _words(self, target: Any) -> str:
        """The truth of a sample, as text; "" where that has no short form."""
        if not isinstance(target, (Tensor, np.ndarray)):
            return ""
        values = torch.as_tensor(target).flatten()
        if self.task.target == "label":
            label = int(values.argmax()) if len(values) > 1 else int(values[0])
            return self.classes[label][:120] if label < len(self.classes) else str(label)
        if self.task.target == "labels":
            named = [self.classes[place] for place in torch.nonzero(values > 0.5)[:, 0].tolist() if place < len(self.classes)]
            return ", ".join(name[:40] for name in named[:WORDS]) + (" …" if len(named) > WORDS else "")
        if self.task.target == "numbers":
            return ", ".join(f"{name[:40]} {value:.4g}" for name, value in list(zip(self.classes, values.tolist()))[:WORDS])
        return ""


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    """*row* as JSON, a mask as a PNG file: rows may have to be sent to another rank."""
    return {
        name: {"mask": _png(value.cpu().numpy())} if isinstance(value, Tensor) and value.ndim == 2 else value
        for name, value in row.items()
    }


def _png(labels: np.ndarray) -> str:
    file = io.BytesIO()
    Image.fromarray(labels.astype(np.uint8 if labels.max(initial=0) < 256 else np.uint16)).save(file, format="PNG")
    return base64.b64encode(file.getvalue()).decode()


def _from_png(text: str) -> np.ndarray:
    with Image.open(io.BytesIO(base64.b64decode(text))) as image:
        return np.array(image).astype(np.int32)


def _jpeg(image: Tensor) -> str:
    """The *image*, uint8 (3, H, W), as the URL of a small JPEG."""
    picture = Image.fromarray(image.permute(1, 2, 0).contiguous().cpu().numpy())
    picture.thumbnail((SIDE, SIDE))
    file = io.BytesIO()
    picture.save(file, format="JPEG", quality=QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
