"""DeepSpeed as a library: imported for one device, with our configuration in its words and the knobs of the user's file."""

from __future__ import annotations

import logging
import os
import re
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from bigvision.config import Config, read_ds_file
from bigvision.errors import UserError

Settings = dict[str, Any]


def deepspeed_settings(config: Config, ranks: int, device: torch.device, parameters: int, largest: int) -> Settings:
    """The configuration for ``deepspeed.initialize``; what the file leaves open, or calls "auto", is decided here.

    Args:
        parameters: of the whole model.
        largest: parameters of the largest block.
    """
    parallel = config.parallel
    share = config.train.global_batch // ranks
    zero: Settings = {
        "overlap_comm": device.type == "cuda",
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
            "stage3_param_persistence_threshold": persistence_threshold(parameters),
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
            zero[section] = given | {"device": "cpu", "pin_memory": given["pin_memory"] and device.type == "cuda"}
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


def persistence_threshold(parameters: int) -> int:
    """The largest parameter that ZeRO-3 keeps whole on every rank, in elements, for a model of *parameters* elements."""
    return min(parameters // 1000, 100_000)


def _merge(ours: Settings, knobs: Mapping[str, Any]) -> Settings:
    """*ours* with the file's *knobs* over it. DeepSpeed reads some names with and without ``stage3_``."""
    merged = dict(ours)
    for name, value in knobs.items():
        twin = name.removeprefix("stage3_") if name.startswith("stage3_") else f"stage3_{name}"
        merged.pop(twin, None)
        merged[name] = _merge(merged.get(name, {}), value) if isinstance(value, dict) else value
    return merged


def load_deepspeed(device: torch.device) -> Any:
    """Import DeepSpeed for *device*, with its log at warnings and without what an earlier run in this process left."""
    os.environ["DS_ACCELERATOR"] = device.type
    # What it says of compilers and CUDA is said by check_cpu_adam, in one line, where it matters.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    import deepspeed
    from deepspeed.accelerator import get_accelerator
    from deepspeed.runtime.zero import parameter_offload
    from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS
    from deepspeed.utils import groups
    from timm.optim import Lion

    accelerator: Any = get_accelerator()
    counted: Any = parameter_offload.DeepSpeedZeRoOffload._register_deepspeed_module

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # DeepSpeed calls them by names that newer releases of torch replace.
    for name in ("all_gather_into_tensor", "reduce_scatter_tensor"):
        warnings.filterwarnings("ignore", rf"`torch\.distributed\.{name}` is deprecated", FutureWarning)
    # It warns of those that it has not tested; tests/engine has.
    ZERO_SUPPORTED_OPTIMIZERS.extend({torch.optim.SGD, Lion} - set(ZERO_SUPPORTED_OPTIMIZERS))
    groups._release_process_group_references()
    deepspeed.comm.comm.cdb = None
    # Ranks compare these counters, and need not have run the same before.
    deepspeed.zero.Init.param_id = 0
    counted.__defaults__[0][0] = 0
    forget_models()
    if device.type == "cpu":
        # It asks for matrix instructions that few processors have; torch computes fp16 on every one.
        accelerator.is_fp16_supported = lambda: True
        # A library for inference that it would else compile first.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(accelerator.communication_backend_name(), dist_init_required=False)
    return deepspeed


def forget_models() -> None:
    """Empty the list in which DeepSpeed keeps every model of stage 3."""
    from deepspeed.runtime.zero import parameter_offload

    parameter_offload.FWD_MODULE_STACK.clear()


def check_cpu_adam(device: torch.device) -> None:
    """Compile DeepSpeed's CPU Adam, or find it compiled (in torch's cache of extensions).

    Raises:
        UserError: there is no working compiler.
    """
    deepspeed = load_deepspeed(device)
    # DeepSpeed requires the package ninja; the folder of its program is on PATH only in an activated environment.
    os.environ["PATH"] = os.pathsep.join((os.environ.get("PATH", os.defpath), str(Path(sys.executable).parent)))
    try:
        deepspeed.ops.op_builder.CPUAdamBuilder().load(verbose=False)
    except (Exception, SystemExit) as error:
        said = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        cause = next((line for line in said if re.search(r"not found|error:|required", line)), said[0])[:200]
        raise UserError(
            "parallel.offload: the optimizer's step on the CPU is compiled once, and here it cannot be "
            f"({cause}): install a C++ compiler (g++) and ninja, or use parallel.offload none"
        ) from None
