"""The run configuration: dataclasses, filled from a YAML recipe, then from flags. Nothing in a recipe names code."""

from bigvision.config.checks import WHOLE, check_batches, micro_batch
from bigvision.config.ds_file import DsFile, deepspeed_settings, read_ds_file
from bigvision.config.resolve import Overrides, describe, load_config, resolve
from bigvision.config.schema import (
    ONE_STAGE,
    SPLIT_BACKWARD,
    CheckpointConfig,
    Config,
    DataConfig,
    FaultsConfig,
    LimitsConfig,
    ModelConfig,
    MonitorConfig,
    OptimConfig,
    ParallelConfig,
    TaskConfig,
    TrainConfig,
)
from bigvision.config.values import leaves, parse_size

__all__ = [
    "ONE_STAGE",
    "SPLIT_BACKWARD",
    "WHOLE",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "DsFile",
    "FaultsConfig",
    "LimitsConfig",
    "ModelConfig",
    "MonitorConfig",
    "OptimConfig",
    "Overrides",
    "ParallelConfig",
    "TaskConfig",
    "TrainConfig",
    "check_batches",
    "deepspeed_settings",
    "describe",
    "leaves",
    "load_config",
    "micro_batch",
    "parse_size",
    "read_ds_file",
    "resolve",
]
