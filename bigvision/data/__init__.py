"""Sources, decoding, transforms and the loader.

In come a dataset's name or object and a position (samples consumed so far); out come micro-batches of uint8 images with their
targets, the same for any number of ranks and workers.

Read ``loader.py`` first, then what it calls: ``order.py`` (which samples), ``reading.py`` (a worker), ``transforms.py`` and
``decode.py`` (pixels), ``batch.py`` (what arrives, and its arithmetic on the device). ``sources`` has a file for each format.
``labels.py``, ``layouts.py``, ``splits.py`` and ``report.py`` find out what a dataset holds, when it is opened.
"""

from bigvision import importing

with importing():
    from bigvision.data.batch import Batch, Mixer, StepBatch, normalize
    from bigvision.data.loader import Batches, eval_batches, train_batches
    from bigvision.data.order import Stream
    from bigvision.data.reading import BadSample
    from bigvision.data.sources import DATASETS, check_source, open_both, open_source
    from bigvision.data.sources.base import Sample, Source, Style, UnreadableSample
    from bigvision.data.sources.custom import MapStyle
    from bigvision.data.transforms import Transform, transform

__all__ = [
    "DATASETS", "BadSample", "Batch", "Batches", "MapStyle", "Mixer", "Sample", "Source", "StepBatch", "Stream", "Style",
    "Transform", "UnreadableSample", "check_source", "eval_batches", "normalize", "open_both", "open_source", "train_batches",
    "transform",
]  # fmt: skip
