"""Sources, decoding, transforms and the loader."""

from bigvision.data.batch import Batch, Mixer, StepBatch, normalize
from bigvision.data.loader import Batches, eval_batches, train_batches
from bigvision.data.order import Stream
from bigvision.data.reading import BadSample
from bigvision.data.sources import DATASETS, check_source, open_both, open_source
from bigvision.data.sources.base import Sample, Source, Style, UnreadableSample
from bigvision.data.sources.custom import MapStyle
from bigvision.data.transforms import Transform, transform

__all__ = [
    "DATASETS",
    "BadSample",
    "Batch",
    "Batches",
    "MapStyle",
    "Mixer",
    "Sample",
    "Source",
    "StepBatch",
    "Stream",
    "Style",
    "Transform",
    "UnreadableSample",
    "check_source",
    "eval_batches",
    "normalize",
    "open_both",
    "open_source",
    "train_batches",
    "transform",
]
