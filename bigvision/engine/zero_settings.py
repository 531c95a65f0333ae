"""What DeepSpeed is told: our configuration in its words, and the knobs of the user's file."""

from __future__ import annotations

from typing import Any

import torch

from bigvision.config import Config


def deepspeed_settings(config: Config, ranks: int, device: torch.device, parameters: int, largest: int) -> dict[str, Any]:
    """The configuration for ``deepspeed.initialize``.

    Args:
        parameters: of the whole model.
        largest: parameters of the largest block.
    """
    parallel = config.parallel
    share = config.train.global_batch // ranks
    pinned = device.type == "cuda"
    zero: dict[str, Any] = {
        "stage": int(parallel.strategy[-1]),
        "overlap_comm": device.type == "cuda",
        "contiguous_gradients": True,
        "reduce_scatter": True,
        # A buffer of this many elements is allocated at every step.
        "reduce_bucket_size": max(1, min(parameters, 50_000_000)),
        "allgather_bucket_size": 500_000_000,
    }
    if parallel.strategy == "zero3":
        zero |= {
            # Two blocks at a time, and tensors of less than a thousandth of the model whole on every rank.
            "stage3_prefetch_bucket_size": largest,
            "stage3_max_live_parameters": 2 * largest,
            "stage3_max_reuse_distance": largest,
            "stage3_param_persistence_threshold": min(parameters // 1000, 100_000),
        }
    if parallel.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": pinned}
    if parallel.offload == "all":
        zero["offload_param"] = {"device": "cpu", "pin_memory": pinned}
    settings: dict[str, Any] = {
        # The engine says which micro-batch is a step's last, since the last one may be short.
        "train_batch_size": share * ranks,
        "train_micro_batch_size_per_gpu": share,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.optim.clip or 0.0,
        "zero_optimization": zero,
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
        "timers": {"throughput": {"enabled": False}},
    }
    if parallel.precision == "bf16":
        settings["bf16"] = {"enabled": True}
    if parallel.precision == "fp16":
        settings["fp16"] = {"enabled": True, "initial_scale_power": 16, "loss_scale_window": 2000, "hysteresis": 1}
    return settings
