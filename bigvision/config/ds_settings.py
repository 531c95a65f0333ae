"""The configuration in DeepSpeed's words, with the knobs of the user's file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bigvision.config.ds_file import read_ds_file
from bigvision.config.schema import Config

Settings = dict[str, Any]


def deepspeed_settings(config: Config, ranks: int, device: str, parameters: int, largest: int) -> Settings:
    """The configuration for ``deepspeed.initialize``; what the file leaves open, or calls "auto", is decided here.

    Args:
        device: "cuda" or "cpu".
        parameters: of the whole model.
        largest: parameters of the largest block.
    """
    parallel = config.parallel
    share = config.train.global_batch // ranks
    zero: Settings = {
        "overlap_comm": device == "cuda",
        "contiguous_gradients": True,
        "reduce_scatter": True,
        # DeepSpeed allocates this many elements in every step, so keep it small.
        "reduce_bucket_size": max(1, min(parameters, 50_000_000)),
        "allgather_bucket_size": 500_000_000,
    }
    if parallel.strategy == "zero3":
        # Two blocks at a time; what is smaller than a thousandth of the model is kept whole on every rank.
        zero |= {
            "stage3_prefetch_bucket_size": largest,
            "stage3_max_live_parameters": 2 * largest,
            "stage3_max_reuse_distance": largest,
            "stage3_param_persistence_threshold": min(parameters // 1000, 100_000),
        }
    settings: Settings = {
        "zero_optimization": zero,
        # As in LossScale, so that a run may change its strategy.
        "fp16": {"initial_scale_power": 16, "loss_scale_window": 2000, "hysteresis": 1},
        "bf16": {},
        # It would wait for the device at every step.
        "timers": {"throughput": {"enabled": False}},
    }
    if parallel.deepspeed:
        settings = _merge(settings, read_ds_file(parallel.deepspeed).knobs)
    zero = settings["zero_optimization"]
    for section, wanted in (("offload_optimizer", parallel.offload != "none"), ("offload_param", parallel.offload == "all")):
        given = {"pin_memory": True} | zero.pop(section, {})
        if wanted:
            zero[section] = given | {"device": "cpu", "pin_memory": given["pin_memory"] and device == "cuda"}
    zero["stage"] = int(parallel.strategy[-1])
    for precision in ("fp16", "bf16"):
        settings[precision]["enabled"] = parallel.precision.endswith(precision)
    return settings | {
        # The engine says which micro-batch is a step's last, since the last one may be short.
        "train_batch_size": share * ranks,
        "train_micro_batch_size_per_gpu": share,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.optim.clip or 0.0,
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": settings.get("steps_per_print"),
    }


def _merge(ours: Settings, knobs: Mapping[str, Any]) -> Settings:
    """*ours* with the file's *knobs* over it. DeepSpeed reads some names with and without ``stage3_``."""
    merged = dict(ours)
    for name, value in knobs.items():
        twin = name.removeprefix("stage3_") if name.startswith("stage3_") else f"stage3_{name}"
        merged.pop(twin, None)
        merged[name] = _merge(merged.get(name, {}), value) if isinstance(value, dict) else value
    return merged
