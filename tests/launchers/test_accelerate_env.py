"""Every setting of accelerate's launcher is honoured, neutral or refused by name."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import pytest

from bigvision.config import resolve
from bigvision.errors import UserError
from bigvision.launchers.accelerate import RULES, overrides

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
# And for launch/accelerate/deepspeed_zero2_cpu.yaml with zero_stage: 2 in place of the file.
ZERO = {name: FSDP[name] for name in ("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE")} | {
    "ACCELERATE_CONFIG_DS_FIELDS": "zero_stage",
    "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2",
    "ACCELERATE_MIXED_PRECISION": "no",
    "ACCELERATE_USE_DEEPSPEED": "true",
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
        "parallel.reshard": ("forward", "FSDP_RESHARD_AFTER_FORWARD"),
    }


def test_a_plain_launch_leaves_the_recipes_values() -> None:
    """It always sets a precision of "no", also when nobody chose one."""
    assert overrides(DDP) == {}
    assert overrides(DDP | {"FSDP_OFFLOAD_PARAMS": "true"}) == {}, "accelerate does not read FSDP_* then"
    assert overrides(DDP | {"ACCELERATE_USE_FSDP": "false"}) == {}
    asked = overrides(DDP | {"ACCELERATE_MIXED_PRECISION": "bf16", "ACCELERATE_DOWNCAST_BF16": "no"})
    assert asked == {"parallel.precision": ("bf16", "ACCELERATE_MIXED_PRECISION")}
    said: list[str] = []
    recipe = {"parallel": {"strategy": "zero2", "precision": "fp16"}}
    config, _ = resolve(recipe | {"out": "x"}, [], asked, say=said.append)
    assert (config.parallel.strategy, config.parallel.precision) == ("zero2", "bf16")
    assert said == [
        "parallel.precision: bf16 (ACCELERATE_MIXED_PRECISION) takes the place of fp16 (the given mapping)"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "value", "key", "ours"),
    [
        ("ACCELERATE_MIXED_PRECISION", "bf16", "parallel.precision", "bf16"),
        ("ACCELERATE_MIXED_PRECISION", "fp16", "parallel.precision", "fp16"),
        ("FSDP_ACTIVATION_CHECKPOINTING", "True", "parallel.recompute", "blocks"),
        ("FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD", "True", "parallel.offload", "activations"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "parallel.compile", True),
        ("ACCELERATE_USE_CPU", "True", "parallel.device", "cpu"),
        ("FSDP_RESHARD_AFTER_FORWARD", "false", "parallel.reshard", "never"),
        ("FSDP_RESHARD_AFTER_FORWARD", "FULL_SHARD", "parallel.reshard", "forward"),
        ("FSDP_RESHARD_AFTER_FORWARD", "SHARD_GRAD_OP", "parallel.reshard", "never"),
        ("FSDP_RESHARD_AFTER_FORWARD", "HYBRID_SHARD", "parallel.replicas", 1),
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
        ("FSDP_FORWARD_PREFETCH", "true"),
        ("FSDP_IGNORED_MODULES", "None"),
        ("FSDP_SHARDING_STRATEGY", "1"),
        ("FSDP_STATE_DICT_TYPE", "FULL_STATE_DICT"),
        # Of earlier versions, and of users' shells.
        ("ACCELERATE_USE_IPEX", "false"),
        ("ACCELERATE_USE_XPU", "false"),
        ("ACCELERATE_CONFIG_FILE", "/home/me/default_config.yaml"),
        ("ACCELERATE_BYPASS_DEVICE_MAP", "true"),
        ("FSDP_BACKWARD_PREFETCH_POLICY", "BACKWARD_PRE"),
    ],
)
def test_neutral(name: str, value: str) -> None:
    assert overrides(FSDP | {name: value}) == overrides(FSDP)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ACCELERATE_CPU_AFFINITY", "1"),
        ("ACCELERATE_DYNAMO_MODE", "max-autotune"),
        ("ACCELERATE_DYNAMO_USE_DYNAMIC", "True"),
        ("ACCELERATE_DYNAMO_USE_FULLGRAPH", "True"),
        ("FSDP_AUTO_WRAP_POLICY", "NO_WRAP"),
        ("FSDP_AUTO_WRAP_POLICY", "SIZE_BASED_WRAP"),
        ("FSDP_BACKWARD_PREFETCH", "BACKWARD_POST"),
        ("FSDP_BACKWARD_PREFETCH", "NO_PREFETCH"),
        ("FSDP_TRANSFORMER_CLS_TO_WRAP", "Block,PatchEmbed"),
        ("FSDP_TRANSFORMER_LAYER_CLS_TO_WRAP", "Block"),
    ],
)
def test_neutral_with_a_line_that_says_so(name: str, value: str) -> None:
    said: list[str] = []
    assert overrides(FSDP | {name: value}, said.append) == overrides(FSDP)
    (line,) = said
    assert line.startswith(f"{name}={value} has no meaning here: ")
    said.clear()
    assert overrides(FSDP, said.append) and not said


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ACCELERATE_DYNAMO_BACKEND", "CUDAGRAPHS"),
        ("ACCELERATE_FP8_BACKEND", "TE"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4"),
        ("ACCELERATE_MIXED_PRECISION", "fp8"),
        ("ACCELERATE_USE_FSDP", "perhaps"),
        ("ACCELERATE_USE_MEGATRON_LM", "true"),
        ("ACCELERATE_USE_SAGEMAKER", "true"),
        ("FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD", "perhaps"),
        ("FSDP_IGNORED_MODULES", "head.*"),
        ("FSDP_OFFLOAD_PARAMS", "true"),
        ("FSDP_RESHARD_AFTER_FORWARD", "NO_SHARD"),
        ("FSDP_SHARDING_STRATEGY", "SHARD_GRAD_OP"),
        ("FSDP_SOMETHING_NEW", "true"),
        ("FSDP_VERSION", "3"),
    ],
)
def test_refused_by_name_in_one_line(name: str, value: str) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(f'{name}={value}')}") as error:
        overrides((DDP if name == "ACCELERATE_USE_FSDP" else FSDP) | {name: value})
    assert "\n" not in str(error.value) and len(str(error.value)) > len(name) + 20


def test_each_fsdp_version_has_its_own_name_for_resharding() -> None:
    """Accelerate reads FSDP_SHARDING_STRATEGY with version 1 alone, FSDP_RESHARD_AFTER_FORWARD with 2; it always sets both."""
    first, sharding = FSDP | {"FSDP_VERSION": "1"}, "FSDP_SHARDING_STRATEGY"
    assert overrides(first)["parallel.reshard"] == ("forward", sharding)
    for value in ("SHARD_GRAD_OP", "2"):
        asked = overrides(first | {sharding: value})
        assert asked["parallel.reshard"] == ("never", sharding)
        assert resolve(overrides=asked)[0].parallel.reshard == "never"
    hosts = {"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}
    asked = overrides(first | hosts | {sharding: "HYBRID_SHARD_ZERO2"})
    assert (asked["parallel.replicas"], asked["parallel.reshard"]) == ((2, sharding), ("never", sharding))
    assert overrides(first | {sharding: "NO_SHARD"})["parallel.strategy"] == ("ddp", sharding)
    with pytest.raises(UserError, match=r"WORLD_SIZE=8 is no multiple of LOCAL_WORLD_SIZE=3"):
        overrides(first | hosts | {sharding: "4", "LOCAL_WORLD_SIZE": "3"})
    by_hand = {"ACCELERATE_USE_FSDP": "true"}
    assert "parallel.reshard" not in overrides(by_hand), "the recipe's value stays"
    assert overrides(by_hand | {sharding: "SHARD_GRAD_OP"})["parallel.reshard"][0] == "never", "version 1 by default"
    with pytest.raises(UserError, match=r"^FSDP_SHARDING_STRATEGY=SHARD_GRAD_OP is .*fsdp_version: 2.*after_forward: false$"):
        overrides(FSDP | {sharding: "SHARD_GRAD_OP"})
    with pytest.raises(UserError, match=r"^FSDP_RESHARD_AFTER_FORWARD=false is refused.*fsdp_version: 1.*SHARD_GRAD_OP$"):
        overrides(first | {"FSDP_RESHARD_AFTER_FORWARD": "false"})


def test_the_deepspeed_launch() -> None:
    fp32 = {"parallel.precision": ("fp32", "ACCELERATE_MIXED_PRECISION")}
    stage = "ACCELERATE_DEEPSPEED_ZERO_STAGE"
    assert overrides(ZERO) == fp32 | {"parallel.strategy": ("zero2", stage)}
    assert overrides(ZERO | {stage: "3"})["parallel.strategy"] == ("zero3", stage)
    assert overrides(ZERO | {stage: "0"})["parallel.strategy"] == ("ddp", stage)
    unset = {name: value for name, value in ZERO.items() if name != stage}
    assert overrides(unset)["parallel.strategy"] == ("zero2", "ACCELERATE_USE_DEEPSPEED"), "accelerate's own default"
    off = ZERO | {"ACCELERATE_USE_DEEPSPEED": "false", "ACCELERATE_GRADIENT_CLIPPING": "1.0"}
    assert overrides(off) == {}, "accelerate does not read the rest"


OPTIMIZER, PARAM = (f"ACCELERATE_DEEPSPEED_OFFLOAD_{name}_DEVICE" for name in ("OPTIMIZER", "PARAM"))


@pytest.mark.parametrize(
    ("environ", "key", "ours"),
    [
        ({OPTIMIZER: "cpu"}, "parallel.offload", ("optimizer", OPTIMIZER)),
        ({OPTIMIZER: "cpu", PARAM: "none"}, "parallel.offload", ("optimizer", OPTIMIZER)),
        ({OPTIMIZER: "cpu", PARAM: "cpu"}, "parallel.offload", ("all", PARAM)),
        ({OPTIMIZER: "none", PARAM: "none"}, "parallel.offload", ("none", OPTIMIZER)),
        ({"ACCELERATE_GRADIENT_CLIPPING": "0.5"}, "optim.clip", (0.5, "ACCELERATE_GRADIENT_CLIPPING")),
        ({"ACCELERATE_GRADIENT_CLIPPING": "0.0"}, "optim.clip", (None, "ACCELERATE_GRADIENT_CLIPPING")),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, "parallel.precision", ("bf16", "ACCELERATE_MIXED_PRECISION")),
    ],
)
def test_deepspeed_settings_that_are_honoured(environ: dict[str, str], key: str, ours: tuple) -> None:
    assert overrides(ZERO | environ) == overrides(ZERO) | {key: ours}
    offload_all = {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"} if ours[0] == "all" else {}
    assert resolve(overrides=overrides(ZERO | environ | offload_all))[1][key] == ours[1]


@pytest.mark.parametrize(("optimizer", "both"), [("none", "activations"), ("cpu", "optimizer+activations")])
def test_activations_of_which_accelerate_says_nothing(optimizer: str, both: str) -> None:
    recipe = {"parallel": {"offload": "activations"}}
    assert resolve(recipe, overrides=overrides(ZERO | {OPTIMIZER: optimizer}))[0].parallel.offload == both


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none"),
        ("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_NVME_PATH", "none"),
        ("ACCELERATE_DEEPSPEED_ZERO3_INIT", "true"),
        ("ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL", "true"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "auto"),
        ("ACCELERATE_GRADIENT_CLIPPING", "auto"),
        ("ACCELERATE_GRADIENT_CLIPPING", "none"),
        ("ACCELERATE_USE_FSDP", "false"),
        ("FSDP_OFFLOAD_PARAMS", "true"),
    ],
)
def test_deepspeed_settings_that_are_neutral(name: str, value: str) -> None:
    assert overrides(ZERO | {name: value}) == overrides(ZERO)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ACCELERATE_DEEPSPEED_MOE_LAYER_CLS_NAMES", "Block"),
        ("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "nvme"),
        ("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_NVME_PATH", "/disk"),
        ("ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE", "cpu"),
        ("ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_NVME_PATH", "/disk"),
        ("ACCELERATE_DEEPSPEED_SOMETHING_NEW", "true"),
        ("ACCELERATE_DEEPSPEED_ZERO_STAGE", "4"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4"),
        ("ACCELERATE_GRADIENT_CLIPPING", "nan"),
        ("ACCELERATE_GRADIENT_CLIPPING", "much"),
        ("ACCELERATE_USE_DEEPSPEED", "perhaps"),
    ],
)
def test_deepspeed_settings_that_are_refused(name: str, value: str) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(f'{name}={value}')}") as error:
        overrides(ZERO | {name: value})
    assert "\n" not in str(error.value) and len(str(error.value)) > len(name) + 20


def test_fsdp_and_deepspeed_together_are_refused() -> None:
    with pytest.raises(UserError, match=r"ACCELERATE_USE_DEEPSPEED=true .* ACCELERATE_USE_FSDP=true"):
        overrides(ZERO | {"ACCELERATE_USE_FSDP": "true"})


def test_a_deepspeed_file(tmp_path: Path) -> None:
    def launch(text: str, **environ: str) -> dict[str, tuple[object, str]]:
        (tmp_path / "ds.json").write_text(text)
        given = {name: value for name, value in ZERO.items() if name != "ACCELERATE_DEEPSPEED_ZERO_STAGE"}
        given |= {"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(tmp_path / "ds.json")}
        given |= {"ACCELERATE_CONFIG_DS_FIELDS": "deepspeed_config_file"}
        return overrides(given | {f"ACCELERATE_{name}": value for name, value in environ.items()})

    open_file = '{"zero_optimization": {"stage": 3}, "bf16": {"enabled": "auto"}}'
    bf16_file = '{"zero_optimization": {"stage": 3}, "bf16": {"enabled": true}, "gradient_accumulation_steps": 4}'
    asked = {"parallel.deepspeed": (str(tmp_path / "ds.json"), "ACCELERATE_DEEPSPEED_CONFIG_FILE")}
    fp32 = {"parallel.precision": ("fp32", "ACCELERATE_MIXED_PRECISION")}
    assert launch(open_file) == asked | fp32, '"no" is fp32, as with every launch'
    assert launch(bf16_file) == asked, 'a "no" that nobody chose gives way'
    config, origins = resolve({"parallel": {"strategy": "fsdp"}}, [], launch(bf16_file))
    assert (config.parallel.strategy, config.parallel.precision) == ("zero3", "bf16")
    assert origins["parallel.strategy"] == origins["parallel.precision"] == str(tmp_path / "ds.json")
    with pytest.raises(UserError, match=r"bf16.enabled: true contradicts parallel.precision: fp32 \(ACCELERATE_MIXED"):
        resolve(None, [], launch(bf16_file, CONFIG_DS_FIELDS="deepspeed_config_file,mixed_precision"))
    with pytest.raises(UserError, match=r"stage: 3 contradicts parallel.strategy: zero2 \(ACCELERATE_DEEPSPEED_ZERO_STAGE\)"):
        resolve(None, [], launch(bf16_file, DEEPSPEED_ZERO_STAGE="2"))
    assert launch(bf16_file, GRADIENT_ACCUMULATION_STEPS="4") == asked
    for text, steps in ((bf16_file, "2"), (open_file, "4")):
        with pytest.raises(UserError, match=f"^ACCELERATE_GRADIENT_ACCUMULATION_STEPS={steps} is refused"):
            launch(text, GRADIENT_ACCUMULATION_STEPS=steps)
    with pytest.raises(UserError, match=r"ds\.json: not valid JSON"):
        launch("{")


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
        | {"FSDP_ACTIVATION_CHECKPOINTING": "true", "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD": "true"}
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


def test_the_installed_deepspeed_launcher_sets_nothing_unknown() -> None:
    commands = pytest.importorskip("accelerate.commands.launch")
    launch = pytest.importorskip("accelerate.utils.launch")
    args: argparse.Namespace = commands.launch_command_parser().parse_args(["--use_deepspeed", "--num_processes", "2", "x.py"])
    vars(args).update(num_machines=1, main_process_port=0, mixed_precision="no", debug=True, enable_cpu_affinity=True)
    vars(args).update(deepspeed_fields_from_accelerate_config="", zero_stage=2, gradient_accumulation_steps=1)
    vars(args).update(gradient_clipping=1.0, offload_optimizer_device="cpu", offload_param_device="cpu", zero3_init_flag=True)
    vars(args).update(zero3_save_16bit_model=True, deepspeed_config_file="x", deepspeed_moe_layer_cls_names="x")
    names = {name for name in launch.prepare_deepspeed_cmd_env(args)[1] if name.startswith("ACCELERATE_")}
    assert "ACCELERATE_DEEPSPEED_MOE_LAYER_CLS_NAMES" in names and names <= set(RULES)
