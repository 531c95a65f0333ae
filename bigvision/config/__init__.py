"""The run configuration: dataclasses, filled from a YAML recipe, then from flags. Nothing in a recipe names code.

In come a recipe, keywords, flags, what a launcher's environment asks for, and a DeepSpeed file; out comes a checked `Config`,
in which every value has the type of its field.

Read ``schema.py`` first: every key and its help. ``resolve.py`` puts the sources together, ``values.py`` reads and checks
single values, ``checks.py`` those that exclude each other. ``ds_file.py`` reads and writes DeepSpeed's files by the table
``ds_keys.py``.
"""

from bigvision.config.checks import (
    AUTO_KEYS,
    WHOLE,
    Size,
    admitted,
    auto_keys,
    check_batches,
    micro_batch,
    other_sizes,
    pair,
    peak_rate,
    recompute_budget,
    stage_end,
    train_size,
    without_auto,
)
from bigvision.config.ds_file import deepspeed_settings, read_ds_file
from bigvision.config.resolve import describe, load_config, resolve
from bigvision.config.schema import (
    ONE_STAGE,
    SPLIT_BACKWARD,
    CheckpointConfig,
    Config,
    DataConfig,
    EmaConfig,
    FaultsConfig,
    GroupConfig,
    LimitsConfig,
    LoraConfig,
    ModelConfig,
    MonitorConfig,
    OptimConfig,
    ParallelConfig,
    ResizeConfig,
    TaskConfig,
    TrainConfig,
)
from bigvision.config.values import leaves, parse_size, with_values, with_variables

__all__ = [
    "AUTO_KEYS",
    "ONE_STAGE",
    "SPLIT_BACKWARD",
    "WHOLE",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "EmaConfig",
    "FaultsConfig",
    "GroupConfig",
    "LimitsConfig",
    "LoraConfig",
    "ModelConfig",
    "MonitorConfig",
    "OptimConfig",
    "ParallelConfig",
    "ResizeConfig",
    "Size",
    "TaskConfig",
    "TrainConfig",
    "admitted",
    "auto_keys",
    "check_batches",
    "deepspeed_settings",
    "describe",
    "leaves",
    "load_config",
    "micro_batch",
    "other_sizes",
    "pair",
    "parse_size",
    "peak_rate",
    "read_ds_file",
    "recompute_budget",
    "resolve",
    "stage_end",
    "train_size",
    "with_values",
    "with_variables",
    "without_auto",
]
