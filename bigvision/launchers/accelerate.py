"""What ``accelerate launch`` asks for through the environment, as our configuration (`overrides`).

Each setting is honoured (it has a key of ours), neutral (it changes nothing here, and the reason stands beside it) or refused
by name, also where `RULES` does not know it. A launch without FSDP and DeepSpeed asks for no strategy, and "no" is the
precision of every launch for which nobody chose one: both leave the recipe's values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from bigvision.config import read_ds_file
from bigvision.errors import UserError, nearest

Overrides = dict[str, tuple[object, str]]

YES, NO = ("true", "1", "yes", "on", "y", "t"), ("false", "0", "no", "off", "n", "f")
ANY = None
# FSDP1's strategies, by name and by torch's number, as values of parallel.reshard.
SHARDING = {"full_shard": "forward", "1": "forward", "shard_grad_op": "never", "2": "never"}
# Those that shard inside each host only, and the one that does not shard.
HYBRID = {"hybrid_shard": "forward", "4": "forward", "hybrid_shard_zero2": "never", "5": "never"}
UNSHARDED = {"no_shard": None, "3": None}


OFFLOAD = ("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE")


class Rule(NamedTuple):
    accepts: Mapping[str, Any] | tuple[str, ...] | None
    """Values that are accepted, in lower case. A mapping gives our value (None: no change)."""
    note: str
    """Why any value is neutral; or, for a value that is not accepted, the reason and the fix."""
    key: str = ""
    """Our key that a mapped value sets."""
    usual: tuple[str, ...] = ()
    """For a setting with any value: the values of which nobody expects anything. Another one gets a line with the note."""


def each(names: str, rule: Rule) -> dict[str, Rule]:
    """The same rule for several names."""
    return dict.fromkeys(names.split(), rule)


YES_NO = "use true or false"
RULES: dict[str, Rule] = {
    # How the ranks were launched.
    "ACCELERATE_USE_DEEPSPEED": Rule(YES + NO, YES_NO),
    "ACCELERATE_USE_MEGATRON_LM": Rule(NO, "Megatron-LM is not for vision backbones; use distributed_type: FSDP"),
    "ACCELERATE_USE_SAGEMAKER": Rule(NO, "start the ranks with compute_environment: LOCAL_MACHINE"),
    "ACCELERATE_USE_FSDP": Rule(dict.fromkeys(YES, "fsdp") | dict.fromkeys(NO), YES_NO, "parallel.strategy"),
    "ACCELERATE_USE_PARALLELISM_CONFIG": Rule(YES + NO, "only shows that PARALLELISM_CONFIG_* are there"),
    "ACCELERATE_USE_CPU": Rule(dict.fromkeys(YES, "cpu") | dict.fromkeys(NO), YES_NO, "parallel.device"),
    **each("ACCELERATE_USE_IPEX ACCELERATE_USE_XPU", Rule(NO, "bigvision runs on CUDA and on CPUs without IPEX; use false")),
    "ACCELERATE_CPU_AFFINITY": Rule(ANY, "bigvision does not bind ranks to cores", usual=NO),
    "ACCELERATE_DOWNCAST_BF16": Rule(ANY, "is for TPUs", usual=NO),
    # Numbers.
    "ACCELERATE_MIXED_PRECISION": Rule(
        {"no": "fp32", "bf16": "bf16", "fp16": "fp16"}, "use mixed_precision: no, bf16 or fp16", "parallel.precision"),
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": Rule(
        ("1", "auto"), "accumulation follows from train.global_batch and train.micro_batch; drop gradient_accumulation_steps"),
    # torch.compile. "NO" is set by every launch, so it leaves the recipe's choice.
    "ACCELERATE_DYNAMO_BACKEND": Rule(
        {"no": None, "inductor": True}, "bigvision compiles with inductor; use dynamo_backend: INDUCTOR or NO",
        "parallel.compile"),
    "ACCELERATE_DYNAMO_MODE": Rule(ANY, "bigvision compiles in the default mode", usual=("default",)),
    "ACCELERATE_DYNAMO_USE_DYNAMIC": Rule(ANY, "bigvision compiles for the shapes it meets", usual=NO),
    "ACCELERATE_DYNAMO_USE_FULLGRAPH": Rule(ANY, "a block may have graph breaks", usual=NO),
    "ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION": Rule(YES + NO, "bigvision always compiles block by block"),
    # DeepSpeed: which kind of ZeRO.
    "ACCELERATE_DEEPSPEED_ZERO_STAGE": Rule(
        {"0": "ddp", "1": "zero1", "2": "zero2", "3": "zero3"}, "use zero_stage: 0, 1, 2 or 3", "parallel.strategy"),
    **dict.fromkeys(OFFLOAD, Rule(("cpu",), "bigvision offloads to CPU memory; use cpu or none")),
    **each(
        "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_NVME_PATH ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_NVME_PATH",
        Rule((), "bigvision offloads to CPU memory; drop it")),
    "ACCELERATE_DEEPSPEED_MOE_LAYER_CLS_NAMES": Rule((), "bigvision has no mixtures of experts; drop it"),
    # FSDP: how the model is sharded.
    "FSDP_VERSION": Rule(("1", "2"), "use fsdp_version: 2. Both give the same shards and numbers; bigvision uses fully_shard"),
    "FSDP_SHARDING_STRATEGY": Rule(
        SHARDING | HYBRID | UNSHARDED, "use FULL_SHARD, SHARD_GRAD_OP, HYBRID_SHARD, HYBRID_SHARD_ZERO2 or NO_SHARD",
        "parallel.reshard"),
    "FSDP_RESHARD_AFTER_FORWARD": Rule(
        SHARDING | HYBRID | dict.fromkeys(YES, "forward") | dict.fromkeys(NO, "never"), YES_NO, "parallel.reshard"),
    "FSDP_AUTO_WRAP_POLICY": Rule(ANY, "bigvision shards each block of the model", usual=("transformer_based_wrap",)),
    **each(
        "FSDP_TRANSFORMER_CLS_TO_WRAP FSDP_TRANSFORMER_LAYER_CLS_TO_WRAP",
        Rule(ANY, "bigvision finds the blocks of the model itself", usual=("none",))),
    "FSDP_IGNORED_MODULES": Rule((), "bigvision shards every parameter; drop fsdp_ignored_modules"),
    "FSDP_OFFLOAD_PARAMS": Rule(NO, "bigvision keeps parameters on the device; use fsdp_offload_params: false"),
    # FSDP: memory and overlap.
    # Every launch sets it to false when nothing was asked for, so that leaves the recipe's choice.
    "FSDP_ACTIVATION_CHECKPOINTING": Rule(dict.fromkeys(YES, "blocks") | dict.fromkeys(NO), YES_NO, "parallel.recompute"),
    "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD": Rule(
        dict.fromkeys(YES, "activations") | dict.fromkeys(NO), YES_NO, "parallel.offload"),
    **each(
        "FSDP_BACKWARD_PREFETCH FSDP_BACKWARD_PREFETCH_POLICY",
        Rule(ANY, "the next block is gathered before one has run", usual=("backward_pre", "1"))),
    # Every launch sets it to false when nothing was asked for.
    "FSDP_FORWARD_PREFETCH": Rule(YES + NO, "the next block is always gathered while one runs"),
    # The mesh.
    "PARALLELISM_CONFIG_TP_SIZE": Rule(("1",), "bigvision has no tensor parallelism; use parallelism_config_tp_size: 1"),
    "PARALLELISM_CONFIG_CP_SIZE": Rule(("1",), "bigvision has no context parallelism; use parallelism_config_cp_size: 1"),
    "PARALLELISM_CONFIG_SP_SIZE": Rule(("1",), "bigvision has no sequence parallelism; use parallelism_config_sp_size: 1"),
    # Any value changes nothing, and nobody expects that it does.
    **each(
        "ACCELERATE_ENABLE_RICH ACCELERATE_DISABLE_RICH ACCELERATE_LOG_LEVEL ACCELERATE_CONFIG_FILE ACCELERATE_DEBUG_MODE "
        "ACCELERATE_BYPASS_DEVICE_MAP ACCELERATE_DEBUG_RDV_FILE", Rule(ANY, "accelerate itself reads it")),
    **each("ACCELERATE_DEEPSPEED_CONFIG_FILE ACCELERATE_CONFIG_DS_FIELDS ACCELERATE_GRADIENT_CLIPPING",
           Rule(ANY, "read together, in _deepspeed")),
    **each("PARALLELISM_CONFIG_DP_REPLICATE_SIZE PARALLELISM_CONFIG_DP_SHARD_SIZE", Rule(ANY, "read together, in _mesh")),
    **each("ACCELERATE_DEEPSPEED_ZERO3_INIT FSDP_CPU_RAM_EFFICIENT_LOADING",
           Rule(ANY, "no rank ever builds more than its share and one tensor")),
    **each("ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL FSDP_STATE_DICT_TYPE",
           Rule(ANY, "a checkpoint has one form, which does not depend on the sharding")),
    "FSDP_USE_ORIG_PARAMS": Rule(ANY, "parameters always keep their names and shapes"),
    "FSDP_SYNC_MODULE_STATES": Rule(ANY, "every rank starts from the same numbers, nothing has to be sent"),
    "FSDP_MIN_NUM_PARAMS": Rule(ANY, "read by SIZE_BASED_WRAP only; bigvision shards each block"),
    **each("PARALLELISM_CONFIG_CP_BACKEND PARALLELISM_CONFIG_CP_COMM_STRATEGY PARALLELISM_CONFIG_SP_BACKEND",
           Rule(ANY, "sequence and context parallelism are off")),
}  # fmt: skip

DEEPSPEED = ("ACCELERATE_DEEPSPEED_", "ACCELERATE_CONFIG_DS_FIELDS", "ACCELERATE_GRADIENT_CLIPPING")
DEEPSPEED_VALUES = (
    "ACCELERATE_DEEPSPEED_CONFIG_FILE", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "ACCELERATE_GRADIENT_CLIPPING", *OFFLOAD,
)  # fmt: skip


def overrides(environ: Mapping[str, str], say: Callable[[str], None] = lambda text: None) -> Overrides:
    """Our keys that ``accelerate launch`` decides: ``{"parallel.precision": ("bf16", "ACCELERATE_MIXED_PRECISION")}``.

    Empty without accelerate. The launcher always sets ACCELERATE_MIXED_PRECISION; a user may set ACCELERATE_USE_* by hand.
    *say* gets a line for each setting from which somebody may expect more than it does here.
    """
    if not any(name == "ACCELERATE_MIXED_PRECISION" or name.startswith("ACCELERATE_USE_") for name in environ):
        return {}
    # For several CPU processes without FSDP or MPI, accelerate sets MASTER_ADDR, starts one process and reports nothing.
    started = {"RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "MV2_COMM_WORLD_RANK"}
    if _is_on(environ, "ACCELERATE_USE_CPU") and "MASTER_ADDR" in environ and not started & set(environ):
        raise UserError(
            f"MASTER_ADDR={environ['MASTER_ADDR']} is refused without RANK: accelerate starts one process where several on "
            "the CPU are asked for; use launch/accelerate/fsdp_cpu.yaml for several, or unset MASTER_ADDR for one"
        )
    # Accelerate reads the other families only when the first one switches them on, too.
    uses_fsdp, uses_deepspeed = _is_on(environ, "ACCELERATE_USE_FSDP"), _is_on(environ, "ACCELERATE_USE_DEEPSPEED")
    families = ["ACCELERATE_", *(["FSDP_"] if uses_fsdp else [])]
    families += ["PARALLELISM_CONFIG_"] if _is_on(environ, "ACCELERATE_USE_PARALLELISM_CONFIG") else []
    unread = () if uses_deepspeed else DEEPSPEED
    # In the table's order, so that the broadest mistake is reported first; then the names that it does not have.
    order = [*RULES, *sorted(set(environ) - set(RULES))]

    asked, settled = _deepspeed(environ) if uses_deepspeed else ({}, set[str]())
    if not uses_fsdp and not uses_deepspeed and environ.get("ACCELERATE_MIXED_PRECISION", "").strip().lower() == "no":
        settled.add("ACCELERATE_MIXED_PRECISION")
    settled |= _of_another_fsdp_version(environ) if uses_fsdp else set()
    for name in order:
        text = environ.get(name, "")
        value = text.strip().lower()
        if not name.startswith(tuple(families)) or name.startswith(unread) or name in settled or value in ("", "none"):
            continue
        rule = RULES.get(name)
        if rule is None:
            raise UserError(
                f"{name}={text}: bigvision does not know this setting of accelerate{nearest(name, RULES)}; unset it"
            )
        if rule.accepts is not None and value not in rule.accepts:
            raise UserError(f"{name}={text} is refused: {rule.note}")
        if isinstance(rule.accepts, Mapping) and rule.accepts[value] is not None:
            asked[rule.key] = (rule.accepts[value], name)
        if rule.usual and value not in rule.usual:
            say(f"{name}={text} has no meaning here: {rule.note}")
        if name in ("FSDP_SHARDING_STRATEGY", "FSDP_RESHARD_AFTER_FORWARD"):
            asked |= _sharded_over(environ, name, value)
    return asked | _mesh(environ)


def _sharded_over(environ: Mapping[str, str], name: str, sharding: str) -> Overrides:
    """What FSDP1's strategy asks for beside resharding: a copy of the model on each host, or on each rank."""
    if sharding in UNSHARDED:
        return {"parallel.strategy": ("ddp", name)}
    if sharding not in HYBRID:
        return {}
    ranks, local = environ.get("WORLD_SIZE", "1"), environ.get("LOCAL_WORLD_SIZE", environ.get("WORLD_SIZE", "1"))
    if not ranks.isdecimal() or not local.isdecimal() or not int(local) or int(ranks) % int(local):
        raise UserError(
            f"{name}={environ[name]}: WORLD_SIZE={ranks} is no multiple of LOCAL_WORLD_SIZE={local}: use FULL_SHARD"
        )
    return {"parallel.replicas": (int(ranks) // int(local), name)}


def _is_on(environ: Mapping[str, str], name: str) -> bool:
    return environ.get(name, "").strip().lower() in YES


def _of_another_fsdp_version(environ: Mapping[str, str]) -> set[str]:
    """The setting that needs no more reading, since accelerate reads it with another version of FSDP than the launch has.

    FSDP_SHARDING_STRATEGY counts with version 1 and FSDP_RESHARD_AFTER_FORWARD with version 2; the launcher always sets both.
    """
    second = environ.get("FSDP_VERSION", "").strip() == "2"
    unread = "FSDP_SHARDING_STRATEGY" if second else "FSDP_RESHARD_AFTER_FORWARD"
    text = environ.get(unread, "")
    wanted = (RULES[unread].accepts or {}).get(text.strip().lower())  # type: ignore[union-attr]
    if wanted == "never":
        version, fix = (2, "fsdp_reshard_after_forward: false") if second else (1, "fsdp_sharding_strategy: SHARD_GRAD_OP")
        raise UserError(f"{unread}={text} is refused: accelerate does not read it with fsdp_version: {version}; use {fix}")
    return {unread} if wanted else set()


def _deepspeed(environ: Mapping[str, str]) -> tuple[Overrides, set[str]]:
    """What a DeepSpeed launch asks for beside the table, and the names that need no more reading.

    A mixed precision of "no" is also what the launcher writes when nobody chose one. It then gives way to a DeepSpeed file
    that has its precision; where the file leaves it open, "no" is fp32 as with every launch.
    """
    if _is_on(environ, "ACCELERATE_USE_FSDP"):
        raise UserError("ACCELERATE_USE_DEEPSPEED=true is refused beside ACCELERATE_USE_FSDP=true: choose one of the two")
    # Accelerate's stage where none is named.
    asked: Overrides = {"parallel.strategy": ("zero2", "ACCELERATE_USE_DEEPSPEED")}
    settled = {"ACCELERATE_USE_FSDP"}
    given = {name: text for name in DEEPSPEED_VALUES if (text := environ.get(name, "").strip()).lower() not in ("", "auto")}
    file = given.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if file.lower() != "none":
        asked = {"parallel.deepspeed": (file, "ACCELERATE_DEEPSPEED_CONFIG_FILE")}
        content = read_ds_file(file)
        if given.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS") == str(content.accumulation):
            settled.add("ACCELERATE_GRADIENT_ACCUMULATION_STEPS")
        unset = "mixed_precision" not in environ.get("ACCELERATE_CONFIG_DS_FIELDS", "").split(",")
        unset = unset and environ.get("ACCELERATE_MIXED_PRECISION", "").lower() == "no"
        if unset and "parallel.precision" in content.asked:
            settled.add("ACCELERATE_MIXED_PRECISION")
    clip = given.get("ACCELERATE_GRADIENT_CLIPPING", "none")
    if clip.lower() != "none":
        try:
            norm = float(clip)
        except ValueError:
            norm = -1.0
        if not 0 <= norm < math.inf:
            raise UserError(f"ACCELERATE_GRADIENT_CLIPPING={clip} is refused: use a number, or 0 for none")
        asked["optim.clip"] = (norm or None, "ACCELERATE_GRADIENT_CLIPPING")
    optimizer, param = (given.get(name, "").lower() for name in OFFLOAD)
    if param == "cpu" and optimizer != "cpu":
        raise UserError(
            f"{OFFLOAD[1]}=cpu is refused: parameters are offloaded only together with the optimizer; set both to cpu"
        )
    if optimizer or param:
        offload = "all" if param == "cpu" else "optimizer" if optimizer == "cpu" else "none"
        asked["parallel.offload"] = (offload, OFFLOAD[1] if param == "cpu" or not optimizer else OFFLOAD[0])
    return asked, settled


def _mesh(environ: Mapping[str, str]) -> Overrides:
    """Replicas from accelerate's (replicate, shard) sizes, which must be those of all ranks."""
    if not _is_on(environ, "ACCELERATE_USE_PARALLELISM_CONFIG"):
        return {}
    names = ("PARALLELISM_CONFIG_DP_REPLICATE_SIZE", "PARALLELISM_CONFIG_DP_SHARD_SIZE", "WORLD_SIZE")
    texts = [environ.get(name, "1") for name in names]
    if not all(text.isdecimal() for text in texts) or int(texts[0]) * int(texts[1]) != int(texts[2]):
        given = ", ".join(f"{name}={text}" for name, text in zip(names, texts))
        raise UserError(f"{given} is refused: replicate size times shard size must be the number of ranks")
    return {"parallel.replicas": (int(texts[0]), names[0])}
