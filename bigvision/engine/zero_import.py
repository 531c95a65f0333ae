"""DeepSpeed as a library: imported for one device, quiet, and with what it compiles."""

from __future__ import annotations

import logging
import os
import re
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

from bigvision.errors import UserError


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
