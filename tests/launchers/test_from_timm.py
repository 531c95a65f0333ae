"""``bigvision recipe from-timm``: timm's options as a recipe, and a line for each that has no place there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from bigvision.config import load_config
from tests.checkpoint.real import command, refused

PLAIN: dict[str, Any] = {
    "model": "vit_base_patch16_224", "data_dir": "pets", "opt": "adamw", "lr": 5e-5, "sched_on_updates": True,
    "color_jitter": 0.0,
}  # fmt: skip
"""With which nothing has to be reported, on a known number of ranks."""
DEFAULTS: dict[str, Any] = {
    "aa": None, "amp": False, "aug_repeats": 0, "batch_size": 128, "bce_loss": False, "bn_eps": None, "clip_grad": None,
    "crop_pct": None, "decay_milestones": [90, 180, 270], "drop": 0.0, "drop_path": None, "epochs": 300, "experiment": "",
    "hflip": 0.5, "input_size": None, "interpolation": "", "log_interval": 50, "lr": None, "lr_base": 0.1, "lr_base_size": 256,
    "lr_base_scale": "", "mean": None, "min_lr": 0, "mixup": 0.0, "model_ema": False, "model_kwargs": {}, "num_classes": None,
    "opt": "sgd", "opt_betas": None, "pin_mem": False, "ratio": [0.75, 4 / 3], "remode": "pixel", "scale": [0.08, 1.0],
    "seed": 42, "smoothing": 0.1, "std": None, "torchcompile": None, "train_interpolation": "random", "warmup_epochs": 5,
    "warmup_lr": 1e-5, "weight_decay": 2e-5, "workers": 4,
}  # fmt: skip


def taken_over(folder: Path, *flags: object, **options: Any) -> tuple[dict[str, Any], list[str]]:
    """The recipe for timm's *options*, which bigvision parses, and the lines on standard error."""
    (folder / "args.yaml").write_text(yaml.safe_dump(options))
    code, out, err = command("recipe", "from-timm", folder / "args.yaml", *flags)
    assert code == 0, err
    recipe = yaml.safe_load(out)
    load_config(recipe)
    return recipe, err.splitlines()


def test_what_has_a_key_is_taken_over(tmp_path: Path) -> None:
    recipe, notes = taken_over(
        tmp_path, "--ranks", 4,
        **PLAIN | {
            "pretrained": True, "num_classes": 37, "input_size": [3, 224, 192], "batch_size": 64, "grad_accum_steps": 2,
            "weight_decay": 0.05, "opt_betas": [0.9, 0.95], "min_lr": 1e-6, "warmup_epochs": 5, "epochs": 100, "smoothing": 0.0,
            "bce_loss": True,
            "mixup": 0.8, "cutmix": 1.0, "mixup_mode": "batch", "reprob": 0.25, "aa": "3a", "color_jitter": 0.3,
            "scale": [0.3, 1],
            "drop_path": 0.2, "drop": 0.1, "clip_grad": 1.0, "layer_decay": 0.75, "model_ema": True, "model_ema_decay": 0.9999,
            "model_ema_warmup": True, "amp": True, "amp_dtype": "bfloat16", "seed": 7, "aug_repeats": 3, "workers": 8,
            "hflip": 0.0, "vflip": 0.5,
            "output": "runs", "experiment": "job", "sync_bn": True, "channels_last": True, "grad_checkpointing": True,
            "torchcompile": "inductor", "model_kwargs": {"patch_size": 8}, "eval_metric": "loss",
        },
    )  # fmt: skip
    data = {
        "workers": 8,
        "train": "imagefolder:pets",
        "val": "imagefolder:pets",
        "crop_scale": [0.3, 1.0],
        "hflip": 0.0,
        "vflip": 0.5,
    }
    assert recipe == {
        "out": "runs/job",
        "seed": 7,
        "model": {
            "name": "vit_base_patch16_224", "pretrained": True, "image_size": [224, 192], "num_classes": 37, "drop_path": 0.2,
            "sync_batchnorm": True, "options": {"patch_size": 8, "drop_rate": 0.1},
        },
        "task": {"loss": "bce", "label_smoothing": 0.0, "mixup": 0.8, "cutmix": 1.0, "mix_each": "batch"},
        "data": data | {"policy": "three-augment", "jitter": 0.3, "erase": 0.25, "repeats": 3},
        "optim": {
            "name": "adamw", "lr": 5e-5, "weight_decay": 0.05, "betas": [0.9, 0.95], "clip": 1.0, "layer_decay": 0.75,
            "warmup": 0.05, "schedule": "cosine", "min_lr": 1e-6,
        },
        "ema": {"decay": 0.9999, "warmup": True},
        "parallel": {
            "strategy": "ddp", "precision": "amp_bf16", "channels_last": "always", "recompute": "blocks", "compile": True,
        },
        "train": {"epochs": 100, "global_batch": 512, "micro_batch": 64},
        "checkpoint": {"keep_best": "loss"},
    }  # fmt: skip
    assert len(notes) == 1 and "changes the hue too" in notes[0]


def test_timms_defaults(tmp_path: Path) -> None:
    """They are not ours: no clipping, smoothing, colours, a rate that scales with the batch."""
    recipe, notes = taken_over(tmp_path, **DEFAULTS | {"model": "resnet50", "data_dir": "pets"})
    assert recipe["optim"] == {
        "name": "sgd", "lr": 0.1, "lr_base_size": 256, "lr_base_scale": "linear", "weight_decay": 2e-5, "momentum": 0.9,
        "clip": None, "warmup": 0.016666667, "schedule": "cosine", "min_lr": 0.0,
    }  # fmt: skip
    assert (recipe["task"], recipe["data"]["jitter"]) == ({"label_smoothing": 0.1}, 0.4)
    assert recipe["train"] == {"epochs": 300, "global_batch": 128, "micro_batch": 128} and recipe["seed"] == 42
    assert [note.partition(":")[0] for note in notes] == ["color_jitter", "sched_on_updates", "batch_size"]
    assert "--ranks" in notes[2]
    lamb, _ = taken_over(tmp_path, opt="lamb", **{k: v for k, v in DEFAULTS.items() if k != "opt"}, model="resnet50")
    assert (lamb["optim"]["lr_base_scale"], lamb["optim"]["clip"]) == ("sqrt", 1.0)


@pytest.mark.parametrize(
    ("options", "keys"),
    [
        ({"sched": "step", "decay_epochs": 30, "decay_rate": 0.2, "epochs": 90}, {"milestones": [0.333333333, 0.666666667]}),
        ({"sched": "multistep", "decay_milestones": [50, 400], "epochs": 100}, {"milestones": [0.5], "gamma": 0.1}),
        ({"sched": "poly", "decay_rate": 0.9}, {"schedule": "poly", "power": 0.9}),
        ({"sched": "none", "warmup_epochs": 0}, {"schedule": "constant", "warmup": 0.0}),
        ({"opt": "muon", "momentum": 0.95}, {"name": "muon", "momentum": 0.95}),
        ({"lr": "1e-3", "opt": "fusedlamb", "clip_grad": 2}, {"lr": 1e-3, "name": "lamb", "clip": 2.0}),
    ],
)
def test_schedules_and_optimizers(tmp_path: Path, options: dict[str, Any], keys: dict[str, Any]) -> None:
    recipe, notes = taken_over(tmp_path, "--ranks", 2, **PLAIN | options)
    assert keys.items() <= recipe["optim"].items() and not notes


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"bce_loss": True, "bce_target_thresh": 0.2}, "bce_target_thresh: 0.2 is not taken over"),
        ({"crop_pct": 0.95}, "crop_pct: 0.95 is not taken over: images are cropped as the model's card says"),
        ({"mean": [0.5, 0.5, 0.5]}, "mean: [0.5, 0.5, 0.5] is not taken over"),
        ({"head_init_scale": 0.001}, "head_init_scale: 0.001 is not taken over"),
        ({"sched": "plateau"}, "sched: 'plateau' becomes optim.schedule: cosine"),
        ({"opt": "adopt"}, "opt: 'adopt' becomes optim.name: adamw: there are adamw, sgd, lion, lamb, adafactor, muon"),
        ({"clip_grad": 0.1, "clip_mode": "agc"}, "clip_mode: 'agc' is not taken over"),
        ({"aa": "augmix-m5"}, "aa: 'augmix-m5' is not taken over"),
        ({"aa": "rand-m9-mstd0.5-inc1"}, "aa: 'rand-m9-mstd0.5-inc1' becomes data.policy: randaugment"),
        ({"mixup": 0.2, "mixup_mode": "elem"}, "mixup_mode: 'elem' becomes task.mix_each: pair"),
        ({"amp": True}, "amp_dtype: 'float16' becomes parallel.precision: fp16"),
        ({"dataset": "hfds/food101"}, "dataset: 'hfds/food101' is not taken over: write data.train and data.val"),
        ({"data_dir": None}, "data_dir: it names no images"),
        ({"warmup_epochs": 9, "epochs": 9}, "warmup_epochs: 9 of 9 epochs is not taken over"),
        ({"eval_metric": "auc"}, "eval_metric: 'auc' is not taken over"),
        ({"resume": "last.pth.tar"}, "resume: 'last.pth.tar' is not taken over"),
        ({"from_a_fork": 3}, "from_a_fork: 3 is not taken over: it is no option of timm's train.py that is known here"),
        ({"kd_model_name": "regnety_160"}, "kd_model_name: 'regnety_160' is not taken over: there is no teacher"),
    ],
)
def test_what_has_no_key_is_reported(tmp_path: Path, options: dict[str, Any], said: str) -> None:
    _, notes = taken_over(tmp_path, "--ranks", 2, **PLAIN | options)
    assert len(notes) == 1 and notes[0].startswith(said)


def test_the_recipe_goes_to_a_new_file(tmp_path: Path) -> None:
    (tmp_path / "args.yaml").write_text(yaml.safe_dump(PLAIN))
    arguments = ("recipe", "from-timm", tmp_path / "args.yaml", "--ranks", 8, "--out", tmp_path / "job.yaml")
    assert command(*arguments) == (0, "", "")
    assert load_config(tmp_path / "job.yaml").train.global_batch == 1024
    assert "is there already" in refused(*arguments)
    assert "there is from-timm" in refused("recipe", "from-tim") and command("recipe")[0] == 0


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is no file of timm's options"),
        ("- a\n- b", "is no file of timm's options"),
        ("lr: 0.1", "is no file of timm's options"),
        ("model: [1", "not valid YAML"),
        ("model: !!python/object/apply:os.getcwd []", "not valid YAML"),
        ("model: resnet50\nlr: fast", "lr: 'fast' is not a number"),
        ("model: resnet50\nbatch_size: 12.5", "batch_size: 12.5 is not a whole number"),
        ("model: resnet50\nbatch_size: 0", "batch_size: 0 and grad_accum_steps: 1 must be at least 1"),
        ("model: resnet50\nepochs: 0", "epochs: 0 must be above 0"),
        ("model: resnet50\namp: maybe", "amp: 'maybe' is not true or false"),
        ("model: resnet50\ninput_size: [224, 224]", "input_size: [224, 224] is not a list of channels, height and width"),
        ("model: resnet50\nscale: 0.5", "scale: 0.5 is not a list of numbers"),
        ("model: resnet50\nlr: 0.1\nmin_lr: 0.5", "it makes a recipe that cannot run: optim.min_lr: 0.5 is above the peak"),
        ("model: resnet50\nmodel_kwargs: 3", "model_kwargs: 3 is not a mapping"),
        (b"\xff\xfe\x00", "is no text"),
        (None, "cannot be read (No such file or directory)"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line(tmp_path: Path, text: str | bytes | None, said: str) -> None:
    if text is not None:
        (tmp_path / "args.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    assert said in refused("recipe", "from-timm", tmp_path / "args.yaml")
