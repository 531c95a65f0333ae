"""Every key of a DeepSpeed configuration file, and what becomes of it here.

A key has a key of ours, is passed on to DeepSpeed, changes nothing, or is refused with the reason: only what would change the
training is refused. "auto" is accepted wherever a value of ours or of DeepSpeed can stand in. A key or section that is switched
off (false, null, empty, ``"enabled": false``) asks for nothing, and numbers and switches may stand in quotes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple


class Ours(NamedTuple):
    """Has a key of ours, or is read together with others."""

    kind: str
    key: str = ""
    lowest: float = 0
    highest: float = math.inf


class Choice(NamedTuple):
    """A name for which we have a value (upper and lower case are one)."""

    key: str
    accepts: Mapping[str, str]
    refused: Mapping[str, str]
    fix: str
    null: bool = False
    """Whether null, which is DeepSpeed's default, stands for "auto"."""


class Knob(NamedTuple):
    """Passed on to DeepSpeed: how it works, not what it computes."""

    kind: str
    lowest: float = 0
    highest: float = math.inf


class Only(NamedTuple):
    """Accepted with these values: another one would change the numbers or would do nothing."""

    values: tuple[Any, ...]
    why: str


class Neutral(NamedTuple):
    """Changes nothing here, whatever its value; a line of the run names it, with the reason."""

    why: str
    switch: str = ""
    """Where this is false or left out in a section, no line is due."""


class Refused(NamedTuple):
    why: str
    switch: str = ""
    """A section in which this is false or left out asks for nothing."""


Rule = Ours | Choice | Knob | Only | Neutral | Refused | Mapping[str, "Rule"]


def table(rows: Mapping[str, Any]) -> dict[str, Any]:
    """*rows*, in which a key may be several names with spaces between them, with a row for each name; so are inner tables."""
    return {name: table(row) if isinstance(row, Mapping) else row for names, row in rows.items() for name in names.split()}


# Parts of the table; the whole one is TOP, at the end.
REMOVED = "DeepSpeed has removed it: drop the key"
NVME = Neutral("nothing is offloaded to NVMe")
LEVELS = ("debug", "info", "warning", "error", "critical")
BOOL, COUNT, SIZE = Knob("bool"), Knob("int"), Knob("int", 1)
FLAT = "it needs whole tensors, while ZeRO gives each rank a flat piece of them: use AdamW, Lion or SGD"

OPTIMIZER = {
    "type": Choice(
        "optim.name",
        table({
            "adamw adam fusedadam cpuadam deepspeedcpuadam adamw_torch": "adamw",
            "sgd": "sgd",
            "lion fusedlion deepspeedcpulion": "lion",
        }),
        table({
            "adafactor adalomo came lamb lars muon shampoo soap": FLAT,
            "onebitadam onebitlamb zerooneadam": "DeepSpeed has removed it: use AdamW, Lion or SGD",
        }),
        "optim.name does not offer it: use AdamW, Lion or SGD",
    ),
    "params": {
        "lr": Ours("number", "optim.lr"),
        "weight_decay": Ours("number", "optim.weight_decay"),
        "betas": Ours("betas", "optim.betas"),
        "momentum": Ours("number", "optim.momentum"),
        "nesterov adam_w_mode": Ours("bool"),
        "eps": Only((1e-8,), "bigvision's AdamW has eps 1e-8; drop the key"),
        "dampening": Only((0,), "bigvision's SGD has no dampening; drop the key"),
        "amsgrad": Only((False,), "bigvision has no AMSGrad; drop the key"),
        "bias_correction": Only((True,), "bigvision's AdamW corrects the bias; drop the key"),
        "fp32_optimizer_states": Only((True,), "bigvision keeps the optimizer's state in fp32; drop the key"),
        "torch_adam foreach fused": Neutral("the same numbers by other code"),
        "set_grad_none": Neutral("the engine clears the gradients"),
        "max_grad_norm": Refused("write gradient_clipping instead"),
    },
    "legacy_fusion": Only((False,), "use false: the older code has other numbers"),
}  # fmt: skip
SCHEDULER = {
    "type": Choice(
        "optim.schedule",
        {"warmuplr": "constant", "warmupcosinelr": "cosine", "warmupdecaylr": "linear"},
        {},
        "optim.schedule does not offer it: use WarmupLR (constant), WarmupDecayLR (linear) or WarmupCosineLR (cosine)",
    ),
    "params": {
        "warmup_num_steps": Ours("int", "optim.warmup", 1),
        "warmup_max_lr": Ours("number", "optim.lr"),
        "total_num_steps": Ours("int", "train.steps", 1),
        "warmup_type": Only(("linear",), 'the warm-up is linear; write "linear"'),
        "warmup_min_lr warmup_min_ratio": Only((0,), "the warm-up rises from 0; write 0"),
        "cos_min_ratio": Only((0,), 'the cosine falls to optim.min_lr; write 0, or "auto" for that'),
        "last_batch_iteration": Only((-1,), "checkpoint.resume continues a run; drop the key"),
    },
}
WARMUP = {"warmup_type": '"log"', "warmup_num_steps": "1000"}
NEEDED = {
    "constant": WARMUP,
    "linear": WARMUP | {"total_num_steps": "no value"},
    "cosine": WARMUP | {"cos_min_ratio": "0.0001", "total_num_steps": "no value"},
}
"""optim.schedule → the parameters that must be written, with DeepSpeed's value for each, which is not ours."""
FOREIGN = {
    "adamw": {"momentum", "nesterov", "dampening"},
    "sgd": {"betas", "adam_w_mode", "eps", "amsgrad", "bias_correction", "fp32_optimizer_states", "torch_adam"},
    "lion": {"momentum", "nesterov", "dampening", "adam_w_mode", "eps", "amsgrad", "bias_correction", "torch_adam"},
    "constant": {"total_num_steps", "warmup_min_ratio", "cos_min_ratio"},
    "linear": {"warmup_min_ratio", "cos_min_ratio"},
    "cosine": {"warmup_max_lr", "warmup_min_lr"},
}
"""optim.name or optim.schedule → the parameters that belong to another optimizer or scheduler."""

BF16 = {
    "enabled": Ours("bool"),
    "immediate_grad_update": BOOL,
    "check_grad_overflow": Only((True,), "a step with gradients that are not finite is skipped; write true"),
    "bf16_master_weights_and_grads": Only((False,), "master weights stay fp32; write false"),
    "bf16_optimizer_states": Only((False,), "the optimizer's state stays fp32; write false"),
}
FP16 = {
    "enabled": Ours("bool"),
    "loss_scale": Knob("number"),
    "initial_scale_power hysteresis": COUNT,
    "loss_scale_window min_loss_scale": SIZE,
    "consecutive_hysteresis": BOOL,
    "opt_level fp16_opt_level": Neutral("they are apex's: parallel.precision decides"),
    "auto_cast": Only((False,), "the images are cast where the model needs it; write false"),
    "fp16_master_weights_and_grads": Only((False,), "master weights stay fp32; write false"),
}

OFFLOAD = {"device": Ours("device"), "pin_memory": BOOL, "nvme_path": NVME, "buffer_count": COUNT}
OFFLOAD_PARAM = {**OFFLOAD, "buffer_size max_in_cpu": COUNT}
OFFLOAD_OPTIMIZER = {
    **OFFLOAD,
    "pipeline_read pipeline_write fast_init": BOOL,
    "cpuadam_cores_perc": Knob("number", 0, 1),
    "ratio": Only((1,), "bigvision offloads the whole optimizer state; write 1"),
    "super_offload": Only((False,), "bigvision has no SuperOffload; write false"),
}

# DeepSpeed takes these with and without stage3_ before them.
STAGE3 = table({
    "prefetch_bucket_size param_persistence_threshold model_persistence_threshold max_live_parameters": COUNT,
    "max_reuse_distance module_granularity_threshold": COUNT,
    "use_all_reduce_for_fetch_params allgather_sequential": BOOL,
    "gather_16bit_weights_on_model_save": Neutral("bigvision saves the model itself"),
})  # fmt: skip
ZERO = {
    "stage": Ours("stage", "parallel.strategy"),
    "offload_optimizer": OFFLOAD_OPTIMIZER,
    "offload_param": OFFLOAD_PARAM,
    "contiguous_gradients reduce_scatter use_multi_rank_bucket_allreduce allgather_partitions overlap_comm": BOOL,
    "ignore_unused_parameters parameter_alignment memory_efficient_linear override_module_apply": BOOL,
    "log_trace_cache_warnings enable_sanity_checks": BOOL,
    "reduce_bucket_size": SIZE,
    "allgather_bucket_size sub_group_size": COUNT,
    **STAGE3,
    **{f"stage3_{name}": rule for name, rule in STAGE3.items()},
    "stage3_gather_fp16_weights_on_model_save": Neutral("bigvision saves the model itself"),
    "load_from_fp32_weights pipeline_loading_checkpoint": Neutral("bigvision loads its own checkpoints"),
    "round_robin_gradients": Neutral("gradients are placed in one order: DeepSpeed reports wrongly which rank holds the other"),
    "compute_grad_norm": Only((True,), "bigvision reports and clips the gradient's norm; write true"),
    "elastic_checkpoint": Only((False,), "bigvision's checkpoints fit any number of ranks; write false"),
    "legacy_stage1": Only((False,), "write false"),
    "grad_hooks": Neutral("gradients are always reduced while the backward pass runs"),
    "save_muon_momentum_buffer_in_memory": Only((False,), "Muon needs whole matrices, which ZeRO cuts; write false"),
    "zero_hpz_partition_size": Only((1,), "bigvision has no secondary partition; write 1"),
    "zero_quantized_weights zero_quantized_nontrainable_weights zero_quantized_gradients": Only(
        (False,), "quantized communication changes the numbers; write false"
    ),
    "leaf_module": Neutral("bigvision decides what is gathered together"),
    "zenflow": Refused("ZenFlow steps with old gradients, which changes the numbers; drop the key"),
    "cpu_offload": Refused('an old spelling: write "offload_optimizer": {"device": "cpu"}'),
    "cpu_offload_param cpu_offload_params": Refused('an old spelling: write "offload_param": {"device": "cpu"}'),
    "cpu_offload_use_pin_memory": Refused("an old spelling: write pin_memory in offload_optimizer and offload_param"),
    "mics_shard_size": Only((-1, 0), REMOVED),
    "mics_hierarchical_params_gather zeropp_loco_param": Refused(REMOVED),
}

TOP: dict[str, Rule] = table({
    "zero_optimization": ZERO,
    "train_batch_size": Ours("int", "train.global_batch", 1),
    "train_micro_batch_size_per_gpu": Ours("int", "train.micro_batch", 1),
    "gradient_accumulation_steps": Ours("int", "", 1),
    "gradient_clipping": Ours("number", "optim.clip"),
    "fp16": FP16,
    "bf16 bfloat16": BF16,
    "optimizer": OPTIMIZER,
    "scheduler": SCHEDULER,
    # How DeepSpeed works and what it prints.
    "steps_per_print": Knob("interval", 1),
    "wall_clock_breakdown memory_breakdown dump_state disable_allgather disable_python_gc": BOOL,
    "log_level": Knob("level"),
    "timers": {"throughput": {"enabled": BOOL, "synchronized": BOOL}},
    # Numbers.
    "communication_data_type": Choice(
        "parallel.reduce", {"fp32": "fp32", "bf16": "bf16"}, {}, "gradients are reduced in fp32 or bf16; write one", True
    ),
    "data_types": {
        "grad_accum_dtype": Only(("fp32",), "gradients are accumulated in fp32; write fp32"),
        "param_dtype buffer_dtype keep_in_fp32_modules": Only((), 'parallel.precision decides; write "auto"'),
    },
    "prescale_gradients": Only((False,), "the gradient is the mean over the ranks; write false"),
    "gradient_predivide_factor": Only((1,), "the gradient is the mean over the ranks; write 1"),
    "gradient_allreduce_op": Only(("mean",), "the gradient is the mean over the ranks; write mean"),
    "managed_gradient_accumulation": Only((True,), "accumulation follows from the batch sizes; write true"),
    "torch_autocast": Refused("parallel.precision decides what is computed in; drop the section", "enabled"),
    "weight_quantization": Refused("bigvision does not quantize weights; drop the section"),
    # What bigvision does itself.
    "zero_allow_untested_optimizer": Neutral("bigvision's optimizers are tested"),
    "zero_force_ds_cpu_optimizer": Neutral("the optimizer follows from optim.name and parallel.offload"),
    "dataloader_drop_last": Neutral("DeepSpeed's data loader is not used"),
    "vocabulary_size": Neutral("images have no vocabulary"),
    "activation_checkpointing": Neutral("it is for models that call DeepSpeed's function: use parallel.recompute: blocks"),
    "compile": Neutral("parallel.compile decides what is compiled", "deepcompile"),
    "flops_profiler autotuning comms_logger": Neutral("none of DeepSpeed's tools for measuring is started", "enabled"),
    "tensorboard wandb csv_monitor comet": Neutral("bigvision reports by itself, see monitor.trackers", "enabled"),
    "data_efficiency": Refused("bigvision has its own data order; drop the section", "enabled"),
    "checkpoint datastates_ckpt": Neutral("bigvision writes its own checkpoints, see checkpoint.every and checkpoint.keep"),
    "aio": NVME,
    "hybrid_engine": Refused("it generates text between training steps; drop the section", "enabled"),
    # Other kinds of parallelism.
    "pipeline expert_parallel data_parallel_size": Refused("bigvision is data-parallel; drop the key"),
    "tensor_parallel": {
        "autotp_size tp_size": Only((0, 1), "bigvision has no tensor parallelism; write 1"),
        "enabled": Only((False,), "bigvision has no tensor parallelism; write false"),
    },
    "sequence_parallel_size": Only((1,), "bigvision is data-parallel; write 1"),
    "seq_parallel_communication_data_type": Only(("fp32",), "bigvision is data-parallel; drop the key"),
    "use_data_before_expert_parallelism": Only((False,), "bigvision is data-parallel; write false"),
    # Gone.
    "allgather_size": Refused("an old spelling: write allgather_bucket_size in zero_optimization"),
    "amp": Refused("DeepSpeed has removed it: use parallel.precision and drop the key", "enabled"),
    "compression_training curriculum_learning eigenvalue elasticity graph_harvesting nebula": Refused(REMOVED),
    "progressive_layer_drop quantize_training sparse_attention sparse_gradients": Refused(REMOVED),
})  # fmt: skip
