"""Every setting of accelerate's launcher is honoured, neutral or refused by name."""

from __future__ import annotations

import argparse
import re

import pytest

from bigvision.config import resolve
from bigvision.errors import UserError
from bigvision.launching.accelerate import RULES, overrides

# What accelerate 1.15.0 sets for launch/accelerate/fsdp_cpu.yaml, beside torchrun's variables.
FSDP = {
    "ACCELERATE_DYNAMO_BACKEND": "NO",
    "ACCELERATE_DYNAMO_MODE": "default",
    "ACCELERATE_DYNAMO_USE_DYNAMIC": "False",
    "ACCELERATE_DYNAMO_USE_FULLGRAPH": "False",
    "ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION": "False",
    "ACCELERATE_MIXED_PRECISION": "no",
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_ACTIVATION_CHECKPOINTING": "false",
    "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD": "false",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
    "FSDP_FORWARD_PREFETCH": "false",
    "FSDP_MIN_NUM_PARAMS": "100000000",
    "FSDP_OFFLOAD_PARAMS": "false",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_SHARDING_STRATEGY": "FULL_SHARD",
    "FSDP_SYNC_MODULE_STATES": "true",
    "FSDP_USE_ORIG_PARAMS": "true",
    "FSDP_VERSION": "2",
    "LOCAL_RANK": "0",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "41719",
    "RANK": "0",
    "WORLD_SIZE": "2",
}
DDP = {name: value for name, value in FSDP.items() if "FSDP" not in name}
MESH = {f"PARALLELISM_CONFIG_{name}_SIZE": "1" for name in ("DP_REPLICATE", "DP_SHARD", "TP", "CP", "SP")}
MESH |= {"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_CP_BACKEND": "torch"}


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {name: FSDP[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")},
        {"FSDP_OFFLOAD_PARAMS": "true", "ACCELERATE_LOG_LEVEL": "INFO"},
    ],
)
def test_nothing_is_asked_without_accelerate(environ: dict[str, str]) -> None:
    assert overrides(environ) == {}


def test_the_fsdp_launch() -> None:
    assert overrides(FSDP) == {
        "parallel.strategy": ("fsdp", "ACCELERATE_USE_FSDP"),
        "parallel.precision": ("fp32", "ACCELERATE_MIXED_PRECISION"),
    }


def test_a_launch_without_fsdp_is_ddp() -> None:
    asked = overrides(DDP)
    assert asked["parallel.strategy"] == ("ddp", "ACCELERATE_USE_FSDP (not set)")
    assert overrides(DDP | {"FSDP_OFFLOAD_PARAMS": "true"}) == asked, "accelerate does not read FSDP_* then"
    assert overrides(DDP | {"ACCELERATE_USE_FSDP": "false"})["parallel.strategy"][0] == "ddp"


@pytest.mark.parametrize(
    ("name", "value", "key", "ours"),
    [
        ("ACCELERATE_MIXED_PRECISION", "bf16", "parallel.precision", "bf16"),
        ("ACCELERATE_MIXED_PRECISION", "fp16", "parallel.precision", "fp16"),
        ("FSDP_ACTIVATION_CHECKPOINTING", "True", "parallel.recompute", "blocks"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "parallel.compile", True),
        ("ACCELERATE_USE_CPU", "True", "parallel.device", "cpu"),
    ],
)
def test_honoured(name: str, value: str, key: str, ours: object) -> None:
    assert overrides(FSDP | {name: value})[key] == (ours, name)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ACCELERATE_DEBUG_MODE", "true"),
        ("ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION", "True"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1"),
        ("ACCELERATE_USE_CPU", "False"),
        ("FSDP_AUTO_WRAP_POLICY", "TRANSFORMER_BASED_WRAP"),
        ("FSDP_BACKWARD_PREFETCH", "BACKWARD_PRE"),
        ("FSDP_IGNORED_MODULES", "None"),
        ("FSDP_SHARDING_STRATEGY", "1"),
        ("FSDP_STATE_DICT_TYPE", "FULL_STATE_DICT"),
        ("FSDP_VERSION", "1"),
    ],
)
def test_neutral(name: str, value: str) -> None:
    assert overrides(FSDP | {name: value}) == overrides(FSDP)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ACCELERATE_CPU_AFFINITY", "1"),
        ("ACCELERATE_DYNAMO_BACKEND", "CUDAGRAPHS"),
        ("ACCELERATE_DYNAMO_MODE", "max-autotune"),
        ("ACCELERATE_DYNAMO_USE_DYNAMIC", "True"),
        ("ACCELERATE_DYNAMO_USE_FULLGRAPH", "True"),
        ("ACCELERATE_FP8_BACKEND", "TE"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4"),
        ("ACCELERATE_MIXED_PRECISION", "fp8"),
        ("ACCELERATE_USE_DEEPSPEED", "true"),
        ("ACCELERATE_USE_FSDP", "perhaps"),
        ("ACCELERATE_USE_MEGATRON_LM", "true"),
        ("ACCELERATE_USE_SAGEMAKER", "true"),
        ("FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD", "true"),
        ("FSDP_AUTO_WRAP_POLICY", "NO_WRAP"),
        ("FSDP_AUTO_WRAP_POLICY", "SIZE_BASED_WRAP"),
        ("FSDP_BACKWARD_PREFETCH", "BACKWARD_POST"),
        ("FSDP_FORWARD_PREFETCH", "true"),
        ("FSDP_IGNORED_MODULES", "head.*"),
        ("FSDP_OFFLOAD_PARAMS", "true"),
        ("FSDP_RESHARD_AFTER_FORWARD", "false"),
        ("FSDP_SHARDING_STRATEGY", "HYBRID_SHARD"),
        ("FSDP_SHARDING_STRATEGY", "NO_SHARD"),
        ("FSDP_SHARDING_STRATEGY", "SHARD_GRAD_OP"),
        ("FSDP_SOMETHING_NEW", "true"),
        ("FSDP_TRANSFORMER_CLS_TO_WRAP", "Block"),
        ("FSDP_VERSION", "3"),
    ],
)
def test_refused_by_name_in_one_line(name: str, value: str) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(f'{name}={value}')}") as error:
        overrides((DDP if name == "ACCELERATE_USE_FSDP" else FSDP) | {name: value})
    assert "\n" not in str(error.value) and len(str(error.value)) > len(name) + 20


def test_an_unknown_name_gets_the_nearest_one() -> None:
    with pytest.raises(UserError, match="did you mean 'FSDP_OFFLOAD_PARAMS'"):
        overrides(FSDP | {"FSDP_OFFLOAD_PARAM": "true"})


def test_replicas_come_from_the_mesh() -> None:
    sizes = {"PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "2", "PARALLELISM_CONFIG_DP_SHARD_SIZE": "4", "WORLD_SIZE": "8"}
    assert overrides(FSDP | MESH | sizes)["parallel.replicas"] == (2, "PARALLELISM_CONFIG_DP_REPLICATE_SIZE")
    with pytest.raises(UserError, match=r"DP_REPLICATE_SIZE=2, .*DP_SHARD_SIZE=4, WORLD_SIZE=4 is refused"):
        overrides(FSDP | MESH | sizes | {"WORLD_SIZE": "4"})
    for axis in ("TP", "CP", "SP"):
        with pytest.raises(UserError, match=f"^PARALLELISM_CONFIG_{axis}_SIZE=2 is refused"):
            overrides(FSDP | MESH | sizes | {f"PARALLELISM_CONFIG_{axis}_SIZE": "2"})


def test_one_process_where_several_were_asked_for() -> None:
    single = {name: value for name, value in DDP.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")}
    single |= {"ACCELERATE_USE_CPU": "True"}
    assert overrides(single)["parallel.device"] == ("cpu", "ACCELERATE_USE_CPU")
    with pytest.raises(UserError, match=r"MASTER_ADDR=127.0.0.1 is refused without RANK"):
        overrides(single | {"MASTER_ADDR": "127.0.0.1"})


def test_each_key_is_one_of_the_configuration() -> None:
    everything = (
        FSDP
        | MESH
        | {"FSDP_ACTIVATION_CHECKPOINTING": "true"}
        | {"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR", "ACCELERATE_USE_CPU": "1", "WORLD_SIZE": "1"}
    )
    asked = overrides(everything)
    config, origins = resolve(overrides=asked)
    assert {key: origins[key] for key in asked} == {key: origin for key, (_, origin) in asked.items()}
    assert {rule.key for rule in RULES.values() if rule.key} | {"parallel.replicas"} == set(asked)
    assert config.parallel.compile and config.parallel.device == "cpu"


def test_the_installed_launcher_sets_nothing_unknown() -> None:
    """Every name that the installed accelerate gives an FSDP launch has its place in the table."""
    commands = pytest.importorskip("accelerate.commands.launch")
    launch = pytest.importorskip("accelerate.utils.launch")
    parser = commands.launch_command_parser()
    args: argparse.Namespace = parser.parse_args(["--use_fsdp", "--main_process_port", "0", "--num_processes", "2", "x.py"])
    vars(args).update(num_machines=1, mixed_precision="no", dynamo_backend="no", num_cpu_threads_per_process=1)
    vars(args).update(fsdp_auto_wrap_policy="x", fsdp_transformer_layer_cls_to_wrap="x", fsdp_backward_prefetch="x")
    vars(args).update(fsdp_state_dict_type="x", fsdp_ignored_modules="x", debug=True, enable_cpu_affinity=True)
    args.use_parallelism_config = True
    names = set(launch.prepare_multi_gpu_env(args))
    ours = {name for name in names if name.startswith(("ACCELERATE_", "FSDP_", "PARALLELISM_CONFIG_"))}
    assert "FSDP_VERSION" in ours and ours <= set(RULES)
