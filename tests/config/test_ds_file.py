"""DeepSpeed's file: every key is ours, passed on, harmless or refused, and the file never overrules in silence."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from bigvision.config import deepspeed_settings, load_config, read_ds_file, resolve
from bigvision.config.ds_keys import TOP
from bigvision.errors import UserError

ROOT = Path(__file__).parent.parent.parent


def write(folder: Path, tree: Mapping[str, Any] | str, stage: Any = 2) -> str:
    """A file with *tree* and, where it names none, a ZeRO stage."""
    if not isinstance(tree, str):
        zero = tree.get("zero_optimization", {})
        tree = json.dumps({**tree, "zero_optimization": {"stage": stage, **zero} if isinstance(zero, dict) else zero})
    (folder / "ds.json").write_text(tree)
    return str(folder / "ds.json")


def refused(folder: Path, tree: Any, *words: str, stage: Any = 2) -> None:
    path = write(folder, tree, stage)
    with pytest.raises(UserError) as caught:
        read_ds_file(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and "\n" not in message, message
    assert all(word in message for word in words), message


@pytest.mark.parametrize("path", sorted(path.name for path in (ROOT / "ds_configs").iterdir()))
def test_the_shipped_files(path: str) -> None:
    config, origins = resolve(None, ["--parallel.deepspeed", str(ROOT / "ds_configs" / path)])
    assert config.parallel.strategy == path[:5] and origins["parallel.strategy"].endswith(path)
    offload = {"zero2_offload": "optimizer", "zero3_offload": "all"}
    assert config.parallel.offload == offload.get(Path(path).stem, "none")
    precision = next((name for name in ("bf16", "fp16") if name in path), None)
    assert precision is None or (config.parallel.precision == precision and "ds_configs" in origins["parallel.precision"])
    file = read_ds_file(ROOT / "ds_configs" / path)
    assert "auto" not in json.dumps(file.knobs) and file.accumulation is None
    assert (file.knobs.get("fp16", {}).get("initial_scale_power") == 16) == ("fp16" in path)


@pytest.mark.parametrize(
    ("tree", "stage", "asked"),
    [
        ({}, 1, {"parallel.strategy": "zero1"}),
        ({}, 3.0, {"parallel.strategy": "zero3"}),
        ({}, "auto", {}),
        ({}, "3", {"parallel.strategy": "zero3"}),
        ({}, 0, {"parallel.strategy": "ddp"}),
        ({"train_batch_size": "256", "gradient_clipping": "0.5"}, 2, {"train.global_batch": 256, "optim.clip": 0.5}),
        ({"bf16": {"enabled": "true"}}, 2, {"parallel.precision": "bf16"}),
        ({"train_batch_size": 256}, 2, {"train.global_batch": 256}),
        ({"train_micro_batch_size_per_gpu": 8}, 2, {"train.micro_batch": 8}),
        ({"gradient_clipping": 0.5}, 2, {"optim.clip": 0.5}),
        ({"gradient_clipping": 0}, 2, {"optim.clip": None}),
        ({"fp16": {"enabled": True}}, 2, {"parallel.precision": "fp16"}),
        ({"bf16": {"enabled": True}, "fp16": {"enabled": False}}, 2, {"parallel.precision": "bf16"}),
        ({"bfloat16": {"enabled": True}}, 2, {"parallel.precision": "bf16"}),
        ({"bf16": {"enabled": False}, "fp16": {"enabled": False, "opt_level": "O1"}}, 2, {"parallel.precision": "fp32"}),
        ({"bf16": {"enabled": "auto"}, "fp16": {"enabled": "auto"}}, 2, {}),
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, 2, {"parallel.offload": "optimizer"}),
        ({"zero_optimization": {"offload_optimizer": {"device": "none"}}}, 2, {"parallel.offload": "none"}),
        ({"zero_optimization": {"offload_optimizer": {"device": "auto"}}}, 2, {}),
        ({"zero_optimization": {"offload_param": {"device": "none"}}}, 3, {"parallel.offload": "none"}),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}},
            3,
            {"parallel.offload": "all"},
        ),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 0.1, "eps": 1e-8}}}, 2, {"optim.name": "adamw", "optim.lr": 0.1}),
        (
            {"optimizer": {"type": "Lion", "params": {"lr": 1e-4, "betas": [0.9, 0.99], "weight_decay": 0.5}}},
            2,
            {"optim.name": "lion", "optim.lr": 1e-4, "optim.betas": [0.9, 0.99], "optim.weight_decay": 0.5},
        ),
        (
            {"optimizer": {"type": "adam", "params": {"betas": [0.9, 0.95], "adam_w_mode": True, "torch_adam": True}}},
            2,
            {"optim.name": "adamw", "optim.betas": [0.9, 0.95]},
        ),
        (
            {"optimizer": {"type": "SGD", "params": {"momentum": 0.8, "nesterov": True, "weight_decay": 0}}},
            2,
            {"optim.name": "sgd", "optim.momentum": 0.8, "optim.weight_decay": 0},
        ),
        (
            {"optimizer": {"type": "FusedAdam", "params": {"lr": "1e-1", "eps": "1e-8"}}},
            2,
            {"optim.name": "adamw", "optim.lr": 0.1},
        ),
        ({"optimizer": {"type": "auto", "params": {"lr": "auto"}}}, 2, {}),
        (
            {"scheduler": {"type": "WarmupLR", "params": {
                "warmup_type": "linear", "warmup_num_steps": 10, "warmup_max_lr": 0.1, "warmup_min_lr": 0}}},
            2,
            {"optim.schedule": "constant", "optim.warmup": 10, "optim.lr": 0.1},
        ),
        (
            {"scheduler": {"type": "WarmupCosineLR", "params": {
                "warmup_type": "auto", "warmup_num_steps": "auto", "cos_min_ratio": 0, "total_num_steps": 90}}},
            2,
            {"optim.schedule": "cosine", "optim.min_lr": 0.0, "train.steps": 90},
        ),
        (
            {"scheduler": {"type": "WarmupDecayLR", "params": {
                "warmup_type": "linear", "warmup_num_steps": 9, "warmup_max_lr": "auto", "total_num_steps": 90}}},
            2,
            {"optim.schedule": "linear", "optim.min_lr": 0.0, "optim.warmup": 9, "train.steps": 90},
        ),
    ],
)  # fmt: skip
def test_what_a_file_asks_of_our_keys(tmp_path: Path, tree: dict, stage: Any, asked: dict) -> None:
    file = read_ds_file(write(tmp_path, tree, stage))
    if stage in (2, 3):
        asked = {"parallel.strategy": f"zero{stage}"} | asked
    assert {key: value for key, (value, _) in file.asked.items()} == asked
    strategy = ["--parallel.strategy", "zero2"] if stage == "auto" else []
    config, origins = resolve(None, ["--parallel.deepspeed", file.path, *strategy])
    assert all(origins[key] == file.path for key in file.asked)
    assert list(config.optim.betas) == file.asked.get("optim.betas", ([0.9, 0.999],))[0]


def test_knobs_are_passed_on_as_they_stand(tmp_path: Path) -> None:
    zero = {"overlap_comm": True, "reduce_bucket_size": 5e8, "allgather_bucket_size": "auto", "prefetch_bucket_size": 7}
    zero |= {"stage3_max_live_parameters": 9, "offload_optimizer": {"device": "cpu", "pin_memory": False}}
    tree = {"zero_optimization": zero, "bfloat16": {"enabled": "auto", "immediate_grad_update": True}, "steps_per_print": 100}
    tree |= {"fp16": {"enabled": "auto", "initial_scale_power": 12}, "gradient_accumulation_steps": 4, "log_level": "error"}
    tree |= {"timers": {"throughput": {"enabled": False}}, "tensorboard": {"enabled": False, "job_name": "x"}}
    tree |= {"zero_allow_untested_optimizer": True, "communication_data_type": "FP32", "compile": {"deepcompile": False}}
    file = read_ds_file(write(tmp_path, tree, 3))
    assert file.knobs == {
        "zero_optimization": {
            "overlap_comm": True,
            "reduce_bucket_size": 500_000_000,
            "prefetch_bucket_size": 7,
            "stage3_max_live_parameters": 9,
            "offload_optimizer": {"pin_memory": False},
        },
        "bf16": {"immediate_grad_update": True},
        "fp16": {"initial_scale_power": 12},
        "steps_per_print": 100,
        "log_level": "error",
        "timers": {"throughput": {"enabled": False}},
    }
    assert file.accumulation == 4 and isinstance(file.knobs["zero_optimization"]["reduce_bucket_size"], int)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", ["not valid JSON", "line 1, column 2"]),
        ('{\n  "a": 1,\n}', ["not valid JSON", "line 3"]),
        ("[1]", ["must hold an object", "[1]"]),
        ("3", ["must hold an object"]),
        ('{"steps_per_print": 1, "steps_per_print": 2}', ["'steps_per_print'", "written twice"]),
        ('{"fp16": {"enabled": true, "enabled": true}}', ["'enabled'", "written twice"]),
        ('{"gradient_clipping": NaN}', ["NaN", "finite"]),
        ('{"gradient_clipping": -Infinity}', ["-Infinity"]),
        ('{"gradient_clipping": 1e999}', ["1e999"]),
        ('{"steps_per_print": ' + "9" * 5000 + "}", ["not valid JSON"]),
        ('{"fp16": ' + "[" * 100_000, ["not valid JSON"]),
        ("// a comment\n{}", ["not valid JSON", "line 1", "no comments"]),
        ('{"fp16": {},  # here\n}', ["line 1", "no comments"]),
        ('{"a": [1, 2,]}', ["line 1", "no comma before"]),
        ("{'a': 1}", ["double quotes"]),
        ('{"fp16": {"enabled": True}}', ["line 1", "true, false"]),
    ],
)
def test_a_file_that_cannot_be_read(tmp_path: Path, text: str, words: list[str]) -> None:
    refused(tmp_path, text, *words)


def test_a_path_that_names_no_file(tmp_path: Path) -> None:
    (tmp_path / "latin.json").write_bytes(b'{"a": "\xe9"}')
    for name, words in {"missing.json": "No such file", ".": "Is a directory", "latin.json": "not UTF-8"}.items():
        with pytest.raises(UserError, match=words) as caught:
            load_config(None, ["--parallel.deepspeed", str(tmp_path / name)])
        assert str(tmp_path / name) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        # Types.
        ({"train_batch_size": 1.5}, ["train_batch_size: 1.5", "whole number"]),
        ({"train_batch_size": 0}, ["train_batch_size: 0", "from 1 on"]),
        ({"train_batch_size": True}, ["train_batch_size: true"]),
        ({"gradient_accumulation_steps": "four"}, ['gradient_accumulation_steps: "four"']),
        ({"train_batch_size": "1e999"}, ["train_batch_size"]),
        ({"gradient_clipping": -1}, ["gradient_clipping: -1"]),
        ({"gradient_clipping": None}, ["gradient_clipping: null"]),
        ({"fp16": True}, ["fp16: true", "section"]),
        ({"fp16": {"enabled": 1}}, ["fp16.enabled: 1", "true or false"]),
        ({"fp16": {"initial_scale_power": 2.5}}, ["fp16.initial_scale_power"]),
        ({"zero_optimization": True}, ["zero_optimization: true", "section"]),
        ({"zero_optimization": {"overlap_comm": "yes"}}, ["zero_optimization.overlap_comm"]),
        ({"zero_optimization": {"reduce_bucket_size": 0}}, ["zero_optimization.reduce_bucket_size: 0"]),
        ({"zero_optimization": {"stage": 4}}, ["zero_optimization.stage: 4"]),
        ({"optimizer": {"type": "AdamW", "params": {"betas": [0.9]}}}, ["optimizer.params.betas: [0.9]", "2 numbers"]),
        ({"optimizer": {"type": "AdamW", "params": []}}, ["optimizer.params: []", "section"]),
        ({"log_level": "loud"}, ['log_level: "loud"', "warning"]),
        # Values that would change numbers.
        ({"communication_data_type": "fp16"}, ["communication_data_type", "fp32 or bf16"]),
        ({"data_types": {"grad_accum_dtype": "bf16"}}, ["data_types.grad_accum_dtype"]),
        ({"prescale_gradients": True}, ["prescale_gradients: true"]),
        ({"gradient_predivide_factor": 2}, ["gradient_predivide_factor: 2"]),
        ({"gradient_allreduce_op": "sum"}, ["gradient_allreduce_op"]),
        ({"bf16": {"bf16_master_weights_and_grads": True}}, ["bf16.bf16_master_weights_and_grads"]),
        ({"fp16": {"auto_cast": True}}, ["fp16.auto_cast"]),
        ({"zero_optimization": {"zero_hpz_partition_size": 2}}, ["zero_hpz_partition_size: 2"]),
        ({"zero_optimization": {"zero_hpz_partition_size": True}}, ["zero_hpz_partition_size: true"]),
        ({"zero_optimization": {"zero_quantized_weights": True}}, ["zero_quantized_weights"]),
        ({"zero_optimization": {"compute_grad_norm": False}}, ["compute_grad_norm"]),
        ({"zero_optimization": {"elastic_checkpoint": True}}, ["elastic_checkpoint"]),
        ({"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}, ['device: "nvme"', "CPU"]),
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu", "ratio": 0.5}}}, ["ratio: 0.5"]),
        # What bigvision does itself, or not at all.
        ({"torch_autocast": {"enabled": True}}, ["parallel.precision"]),
        ({"data_efficiency": {"enabled": True}}, ["data_efficiency"]),
        ({"tensor_parallel": {"autotp_size": 2}}, ["tensor_parallel"]),
        ({"zero_optimization": {"cpu_offload": True}}, ["cpu_offload", "offload_optimizer"]),
        # Removed.
        ({"elasticity": {"enabled": True}}, ["elasticity", "removed", "drop"]),
        ({"curriculum_learning": {"enabled": True}}, ["curriculum_learning", "removed"]),
        ({"compression_training": {"a": {"enabled": False}, "b": {"c": {"enabled": True}}}}, ["compression_training"]),
        ({"pipeline": {"stages": 2}}, ["pipeline"]),
        ({"zero_optimization": {"zenflow": {"topk_ratio": 0.1}}}, ["zenflow"]),
        ({"sparse_gradients": True}, ["sparse_gradients", "removed"]),
        (
            {"train_batch_size": 10, "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 2},
            ["train_batch_size: 10", "train_micro_batch_size_per_gpu: 4", "gradient_accumulation_steps: 2", "ranks"],
        ),
        ({"amp": {"enabled": True}}, ["amp", "removed", "parallel.precision"]),
        ({"zero_optimization": {"mics_shard_size": 4}}, ["mics_shard_size", "removed"]),
        ({"optimizer": {"type": "OneBitAdam"}}, ["OneBitAdam", "removed"]),
        # Unknown.
        ({"train_batchsize": 3}, ["'train_batchsize'", "'train_batch_size'"]),
        ({"zero_optimization": {"overlap_com": True}}, ["'zero_optimization.overlap_com'", "'overlap_comm'"]),
        ({"fp16": {"check_overflow": True}}, ["'fp16.check_overflow'"]),
        # Values that contradict each other.
        ({"fp16": {"enabled": True}, "bf16": {"enabled": True}}, ["fp16.enabled", "bf16.enabled", "choose"]),
        ({"bf16": {"enabled": True}, "bfloat16": {"enabled": True}}, ["bf16", "bfloat16", "one key"]),
        (
            {"zero_optimization": {"prefetch_bucket_size": 1, "stage3_prefetch_bucket_size": 1}},
            ["stage3_prefetch_bucket_size", "one key"],
        ),
        ({"zero_optimization": {"offload_param": {"device": "cpu"}}}, ["offload_param.device", "together with"]),
        (
            {"zero_optimization": {"offload_param": {"device": "cpu"}, "offload_optimizer": {"device": "cpu"}}},
            ["offload_param.device", "stage 3, not 2"],
        ),
        # Optimizers and schedulers.
        ({"optimizer": {"params": {}}}, ["optimizer.type", "missing"]),
        ({"optimizer": {"type": "Lamb", "params": {"max_coeff": 1}}}, ['optimizer.type: "Lamb"', "whole tensors"]),
        ({"optimizer": {"type": "Muon"}}, ["Muon", "whole tensors"]),
        ({"optimizer": {"type": "Adafactor"}}, ["Adafactor", "whole tensors"]),
        ({"optimizer": {"type": "Lion", "params": {"momentum": 0.9}}}, ["momentum", "Lion"]),
        ({"optimizer": {"type": "Lion", "params": {"adam_w_mode": True}}}, ["adam_w_mode", "Lion"]),
        ({"optimizer": {"type": "Adagrad"}}, ["Adagrad", "optim.name"]),
        ({"optimizer": {"type": "Adam", "params": {"adam_w_mode": False}}}, ["adam_w_mode: false", "decoupled"]),
        ({"optimizer": {"type": "AdamW", "params": {"eps": 1e-6}}}, ["optimizer.params.eps: 1e-06"]),
        ({"optimizer": {"type": "AdamW", "params": {"momentum": 0.9}}}, ["momentum", "AdamW"]),
        ({"optimizer": {"type": "AdamW", "params": {"max_grad_norm": 1}}}, ["max_grad_norm", "gradient_clipping"]),
        ({"optimizer": {"type": "SGD", "params": {"lr": 0.1}}}, ["nesterov"]),
        ({"optimizer": {"type": "SGD", "params": {"betas": [0.9, 0.99], "nesterov": True}}}, ["betas", "SGD"]),
        ({"scheduler": {"params": {}}}, ["scheduler.type", "missing"]),
        ({"scheduler": {"type": "OneCycle"}}, ["OneCycle", "WarmupCosineLR"]),
        ({"scheduler": {"type": "LRRangeTest"}}, ["LRRangeTest", "WarmupDecayLR (linear)"]),
        ({"scheduler": {"type": "WarmupDecayLR", "params": {"cos_min_ratio": 0}}}, ["cos_min_ratio", "WarmupDecayLR"]),
        ({"scheduler": {"type": "WarmupLR"}}, ["warmup_type", '"log"', '"linear"']),
        ({"scheduler": {"type": "WarmupLR", "params": {"warmup_type": "log"}}}, ["warmup_type", '"linear"']),
        ({"scheduler": {"type": "WarmupLR", "params": {"warmup_type": "linear"}}}, ["warmup_num_steps", '"auto"']),
        ({"scheduler": {"type": "WarmupLR", "params": {"warmup_min_lr": 0.1}}}, ["warmup_min_lr: 0.1"]),
        ({"scheduler": {"type": "WarmupLR", "params": {"cos_min_ratio": 0}}}, ["cos_min_ratio", "WarmupLR"]),
        (
            {"scheduler": {"type": "WarmupCosineLR", "params": {
                "warmup_type": "linear", "warmup_num_steps": 10, "total_num_steps": 90}}},
            ["cos_min_ratio", "0.0001", '"auto"'],
        ),
        (
            {"optimizer": {"type": "AdamW", "params": {"lr": 0.1}}, "scheduler": {"type": "WarmupLR", "params": {
                "warmup_max_lr": 0.2}}},
            ["optimizer.params.lr", "scheduler.params.warmup_max_lr", "0.1", "0.2"],
        ),
    ],
)  # fmt: skip
def test_refused_in_one_line(tmp_path: Path, tree: dict, words: list[str]) -> None:
    refused(tmp_path, tree, *words)


OFF = {
    "amp": {"enabled": False, "opt_level": "O1"},
    "elasticity": {"enabled": False, "max_train_batch_size": 2000},
    "nebula": {"enabled": False},
    "curriculum_learning": {"enabled": False, "curriculum_type": "seqlen"},
    "compression_training": {"weight_quantization": {"shared_parameters": {"enabled": False}, "different_groups": {}}},
    "eigenvalue": {"enabled": "false"},
    "sparse_gradients": False,
    "pipeline": {},
    "flops_profiler": {"enabled": False, "profile_step": 1},
    "autotuning": {"enabled": False},
    "wandb": {"enabled": False, "project": "x"},
    "csv_monitor": {"output_path": "logs"},
    "activation_checkpointing": {},
    "communication_data_type": None,
    "gradient_predivide_factor": "1.0",
    "zero_optimization": {"cpu_offload": False, "mics_shard_size": -1, "offload_optimizer": {"device": "none"}},
}
UNUSED = {
    "aio": {"block_size": 1048576},
    "activation_checkpointing": {"partition_activations": True},
    "tensorboard": {"enabled": True},
    "flops_profiler": {"enabled": True},
    "comms_logger": {"enabled": True},
    "checkpoint": {"tag_validation": "Warn"},
    "compile": {"deepcompile": True},
    "zero_allow_untested_optimizer": True,
    "zero_optimization": {"round_robin_gradients": True, "offload_optimizer": {"device": "cpu", "nvme_path": "/x"}},
}


@pytest.mark.parametrize(
    "tree",
    [
        {"scheduler": None, "optimizer": {}, "fp16": False, "bf16": "auto"},
        {"zero_optimization": {"stage": 2, "offload_optimizer": None, "offload_param": False}},
        {"fp16": {"enabled": "auto", "opt_level": "O2"}, "amp": {"enabled": "auto", "opt_level": "auto"}},
        {"steps_per_print": None, "tensor_parallel": {"autotp_size": 1}, "_comment": "of ours", "//": {"more": 1}},
        {"steps_per_print": math.inf, "data_efficiency": {"enabled": "auto", "seed": 1234}},
        {"steps_per_print": 0, "zero_optimization": {"stage": 2, "grad_hooks": True, "cpu_offload_params": False}},
    ],
)
def test_what_asks_for_nothing(tmp_path: Path, tree: dict) -> None:
    """As files in the wild have it; the stage alone is asked for."""
    file = read_ds_file(write(tmp_path, tree, 2))
    assert file.asked == {"parallel.strategy": ("zero2", "zero_optimization.stage")}
    assert file.knobs.get("steps_per_print") is None and "zero_optimization" not in file.knobs


def test_what_is_switched_off_or_has_no_meaning_here(tmp_path: Path) -> None:
    """The first asks for nothing; of the second a line tells that it does nothing. Neither reaches DeepSpeed."""
    file = read_ds_file(write(tmp_path, OFF))
    assert file.asked.keys() == {"parallel.strategy", "parallel.offload"} and not file.knobs and not file.notes
    file = read_ds_file(write(tmp_path, UNUSED))
    assert file.asked.keys() == {"parallel.strategy", "parallel.offload"} and not file.knobs
    names = {name for note in file.notes for name in note.partition(": has no meaning here: ")[0].split(", ")}
    zero = {"zero_optimization.round_robin_gradients", "zero_optimization.offload_optimizer.nvme_path"}
    assert names == UNUSED.keys() - {"zero_optimization"} | zero
    said: list[str] = []
    resolve({"parallel": {"deepspeed": file.path, "strategy": "zero1"}, "out": "x"}, say=said.append)
    assert said[0] == f"parallel.strategy: zero2 ({file.path}) takes the place of zero1 (the given mapping)"
    assert said[1:] == [f"{file.path}: {note}" for note in file.notes]


AUTO = {"warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto"}


@pytest.mark.parametrize(
    ("scheduler", "schedule"),
    [
        ({"type": "WarmupLR", "params": AUTO}, "constant"),
        ({"type": "WarmupDecayLR", "params": {**AUTO, "total_num_steps": "auto", "last_batch_iteration": -1}}, "linear"),
        ({"type": "WarmupCosineLR", "params": {"warmup_num_steps": "auto", "total_num_steps": "auto"}}, "cosine"),
    ],
)
def test_a_scheduler_that_leaves_the_warm_up_to_us(tmp_path: Path, scheduler: dict, schedule: str) -> None:
    """As the examples of transformers and accelerate have it: DeepSpeed's shape for what is left out is reported."""
    file = read_ds_file(write(tmp_path, {"scheduler": scheduler}))
    assert file.asked["optim.schedule"][0] == schedule and "optim.warmup" not in file.asked
    (note,) = file.notes
    assert 'warmup_type ("log" in DeepSpeed)' in note and ("cosine" in note) == (schedule == "cosine")


def test_a_file_that_shards_nothing_is_data_parallel(tmp_path: Path) -> None:
    for tree in ("{}", '{"zero_optimization": {"stage": 0}}', '{"zero_optimization": {}, "steps_per_print": 10}'):
        path = write(tmp_path, tree)
        assert load_config(None, ["--parallel.deepspeed", path]).parallel.strategy == "ddp"
        (note,) = read_ds_file(path).notes
        assert "shards nothing" in note
    with pytest.raises(UserError, match=r"stage: 0 contradicts parallel\.strategy: zero2 \(flag\)"):
        load_config(None, ["--parallel.deepspeed", write(tmp_path, {}, 0), "--parallel.strategy", "zero2"])
    path = write(tmp_path, "{}")
    config = load_config(None, ["--parallel.deepspeed", path, "--parallel.strategy", "zero2"])
    assert config.parallel.strategy == "zero2", "a file without a stage leaves it to the flag"


RECIPE = {"optim": {"clip": 1.0}, "parallel": {"strategy": "fsdp"}, "train": {"global_batch": 64, "micro_batch": None}}


def test_the_file_takes_the_place_of_defaults_and_of_the_recipes_strategy(tmp_path: Path) -> None:
    tree = {"gradient_clipping": 1, "train_micro_batch_size_per_gpu": 8, "optimizer": {"type": "SGD", "params": {
        "nesterov": True, "momentum": 0.5}}}  # fmt: skip
    path = write(tmp_path, tree)
    config, origins = resolve(RECIPE | {"parallel": {"strategy": "fsdp", "deepspeed": path}})
    assert (config.parallel.strategy, config.train.micro_batch, config.optim.momentum) == ("zero2", 8, 0.5)
    assert {origins[key] for key in ("parallel.strategy", "train.micro_batch", "optim.name")} == {path}
    assert origins["optim.clip"] == "the given mapping", "1 in the file is 1.0 in the recipe"
    assert load_config(config.to_dict()) == config, "what a run saves is read back"
    assert load_config(RECIPE | {"parallel": {"deepspeed": path}}, ["--parallel.deepspeed", "null"]).parallel.strategy == "auto"
    asked = {"parallel.deepspeed": (path, "ACCELERATE_X")}
    assert resolve(RECIPE, [], asked)[0].parallel.strategy == "zero2"


@pytest.mark.parametrize(
    ("tree", "flags", "words"),
    [
        ({"gradient_clipping": 0.5}, [], ["gradient_clipping: 0.5", "optim.clip: 1.0 (the given mapping)", '"auto"']),
        ({"gradient_clipping": 0}, [], ["gradient_clipping: 0", "optim.clip: 1.0"]),
        ({"train_batch_size": 32}, [], ["train_batch_size: 32", "train.global_batch: 64"]),
        (
            {"train_micro_batch_size_per_gpu": 4},
            ["--train.micro_batch", "8"],
            ["train_micro_batch_size_per_gpu: 4", "train.micro_batch: 8 (flag)"],
        ),
        ({}, ["--parallel.strategy", "fsdp"], ["zero_optimization.stage: 2", "parallel.strategy: fsdp (flag)"]),
        ({}, ["--parallel.strategy", "zero3"], ["zero_optimization.stage: 2", "parallel.strategy: zero3 (flag)"]),
        ({"bf16": {"enabled": True}}, ["--parallel.precision", "fp32"], ["bf16.enabled: true", "parallel.precision: fp32"]),
        ({"fp16": {"enabled": False}}, ["--parallel.precision", "fp16"], ["fp16.enabled: false", "parallel.precision: fp16"]),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}},
            ["--parallel.offload", "none"],
            ['offload_optimizer.device: "cpu"', "parallel.offload: none"],
        ),
        (
            {"scheduler": {"type": "WarmupCosineLR", "params": {
                "warmup_type": "linear", "warmup_num_steps": 10, "total_num_steps": 90, "cos_min_ratio": 0}}},
            ["--train.epochs", "3"],
            ["total_num_steps: 90", "train.epochs: 3.0 (flag)"],
        ),
        (
            {"scheduler": {"type": "WarmupDecayLR", "params": {
                "warmup_type": "linear", "warmup_num_steps": 10, "total_num_steps": 90}}},
            ["--optim.schedule", "linear", "--optim.min_lr", "1e-5"],
            ['scheduler.type: "WarmupDecayLR"', "optim.min_lr: 1.0e-05 (flag)"],
        ),
        (
            {"scheduler": {"type": "WarmupLR", "params": {"warmup_type": "linear", "warmup_num_steps": 10}}},
            ["--train.steps", "90", "--optim.warmup", "0.1", "--optim.schedule", "constant"],
            ["warmup_num_steps: 10", "optim.warmup: 0.1"],
        ),
        ({"zero_optimization": {"stage": "auto"}}, [], ['zero_optimization.stage: "auto"', "parallel.strategy: fsdp"]),
        ({}, ["--parallel.replicas", "2"], ["parallel.replicas: 2", "fsdp"]),
    ],
)  # fmt: skip
def test_a_contradiction_names_both(tmp_path: Path, tree: dict, flags: list[str], words: list[str]) -> None:
    path = write(tmp_path, tree)
    with pytest.raises(UserError) as caught:
        load_config(RECIPE, ["--parallel.deepspeed", path, *flags])
    assert all(word in str(caught.value) for word in words), caught.value
    assert "\n" not in str(caught.value)


def test_an_override_is_as_firm_as_a_flag(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"stage: 2 contradicts parallel.strategy: ddp \(ACCELERATE_USE_FSDP \(not set\)\)"):
        asked = {"parallel.strategy": ("ddp", "ACCELERATE_USE_FSDP (not set)")}
        load_config(None, ["--parallel.deepspeed", write(tmp_path, {})], asked)


def test_a_deepspeed_file_that_agrees_with_flags_is_accepted(tmp_path: Path) -> None:
    schedule = {"warmup_type": "linear", "warmup_num_steps": 9, "total_num_steps": 90, "cos_min_ratio": "auto"}
    tree = {"scheduler": {"type": "WarmupCosineLR", "params": schedule}, "fp16": {"enabled": False}}
    flags = ["--parallel.deepspeed", write(tmp_path, tree), "--train.steps", "90"]
    assert load_config(None, [*flags, "--optim.warmup", "0.1"]).optim.warmup == 0.1
    assert load_config(None, [*flags, "--optim.warmup", "9"]).optim.warmup == 9
    config = load_config(None, [*flags, "--parallel.strategy", "zero2"])
    assert config.optim.warmup == 9 and config.parallel.precision == "bf16", "fp16 that is off leaves the other two"
    auto = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "auto"}}}
    path = write(tmp_path, auto, 3)
    assert load_config(None, ["--parallel.deepspeed", path]).parallel.offload == "optimizer"
    assert load_config(None, ["--parallel.deepspeed", path, "--parallel.offload", "all"]).parallel.offload == "all"


@pytest.mark.parametrize(
    ("device", "ours", "agrees"),
    [("cpu", "optimizer+activations", True), ("none", "activations", True), ("cpu", "activations", False)],
)
def test_activations_of_which_the_file_says_nothing(tmp_path: Path, device: str, ours: str, agrees: bool) -> None:
    path = tmp_path / "file.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": device}}}))
    flags = ["--parallel.deepspeed", str(path), "--parallel.offload", ours]
    if agrees:
        config = load_config(None, flags)
        assert config.parallel.offload == ours
        assert ("offload_optimizer" in deepspeed_settings(config, 2, "cpu", 100, 10)["zero_optimization"]) == (device == "cpu")
    else:
        with pytest.raises(UserError, match=r"offload_optimizer.device: \"cpu\".*parallel.offload: activations"):
            load_config(None, flags)


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"offload": "optimizer", "strategy": "fsdp"}, ["parallel.offload: optimizer", "zero1"]),
        ({"offload": "optimizer", "replicas": 2}, ["strategy: auto", "parallel.offload: optimizer, parallel.replicas: 2"]),
        ({"offload": "all", "strategy": "zero2"}, ["parallel.offload: all", "zero3"]),
    ],
)
def test_offload_needs_zero(section: dict, words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        load_config({"parallel": section})
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize("rate", [0, 1.1, -1, float("nan")])
def test_layer_decay_is_a_factor(rate: float) -> None:
    with pytest.raises(UserError, match=r"optim\.layer_decay"):
        load_config({"optim": {"layer_decay": rate}})
    assert load_config({"optim": {"layer_decay": 1}}).optim.layer_decay == 1


class Asked(dict):
    """Remembers every key that somebody looks for."""

    names: set[str] = set()  # noqa: RUF012

    def get(self, key: str, default: Any = None) -> Any:
        self.names.add(key)
        return super().get(key, default)

    def __contains__(self, key: object) -> bool:
        self.names.add(str(key))
        return super().__contains__(key)

    def __getitem__(self, key: str) -> Any:
        self.names.add(key)
        return super().__getitem__(key)

    def keys(self) -> Any:
        return self


def test_every_key_of_the_installed_deepspeed_is_in_the_table() -> None:
    pytest.importorskip("deepspeed")
    from deepspeed.runtime.config import _REMOVED_TOP_LEVEL_CONFIG_KEYS, _REMOVED_ZERO_CONFIG_KEYS, DeepSpeedConfig
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.offload_config import DeepSpeedZeroOffloadOptimizerConfig, DeepSpeedZeroOffloadParamConfig

    DeepSpeedConfig(copy.copy(Asked(train_batch_size=8)))
    assert {"train_batch_size", "fp16", "zero_optimization", "timers"} <= Asked.names, "the spy sees"
    assert set(TOP) >= Asked.names | set(_REMOVED_TOP_LEVEL_CONFIG_KEYS)
    zero: Any = TOP["zero_optimization"]
    for model, table in (
        (DeepSpeedZeroConfig, zero),
        (DeepSpeedFP16Config, TOP["fp16"]),
        (DeepSpeedBF16Config, TOP["bf16"]),
        (DeepSpeedZeroOffloadOptimizerConfig, zero["offload_optimizer"]),
        (DeepSpeedZeroOffloadParamConfig, zero["offload_param"]),
    ):
        names = set(model.model_fields) | {field.alias for field in model.model_fields.values() if field.alias}
        assert names <= set(table), names - set(table)
    assert set(_REMOVED_ZERO_CONFIG_KEYS) <= set(zero)
