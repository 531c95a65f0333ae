"""A user's mistake: one line on one rank, exit code 2, nothing trained."""

from __future__ import annotations

import contextlib
import io
import json
import os
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from bigvision.tasks import Classify
from tests.distributed import run_ranks
from tests.recipes import recipe, run, write_recipe


def command(arguments: list[str], environment: dict[str, str | None] | None = None) -> tuple[int, str, str]:
    """Run the command line on this rank; return the exit code, standard output and standard error."""
    from bigvision import cli

    cli.GRACE = 0.0
    before = dict(os.environ)
    try:
        for name, value in (environment or {}).items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
        with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
            try:
                code = cli.main(arguments)
            except SystemExit as stop:
                code = int(stop.code or 0)
        return code, out.getvalue(), err.getvalue()
    finally:
        os.environ.clear()
        os.environ.update(before)


def refused(arguments: list[str], *words: str, ranks: int = 1) -> None:
    results = run_ranks(command, ranks, arguments)
    assert [code for code, _, _ in results] == [2] * ranks, results
    message = results[0][2]
    assert message.startswith("error: ") and message.count("\n") == 1, message
    assert all(word in message for word in words), message
    assert all(err == "" for _, _, err in results[1:]), "one rank says it"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--model.name", "vit_tiny_patch16_225"], ["model.name", "vit_tiny_patch16_224"]),
        (["--data.train", "digit"], ["data.train", "'digits'"]),
        (["--data.val", "cifar11"], ["data.val", "cifar10"]),
        (["--data.train", "imagefolder:/no/such/folder"], ["data.train", "/no/such/folder"]),
        (["--train.stpes", "3"], ["--train.stpes", "'--train.steps'"]),
        (["--parallel.strategy", "zero9"], ["parallel.strategy", "ddp, fsdp"]),
        (["--model.options", "{dpeth: 3}"], ["model.options.dpeth", "depth"]),
        (
            ["--model.options", "{depth: 3, embed_dim: 48, num_heads: 3, in_chans: 1}"],
            ["in_chans", "3 channels"],
        ),
        (["--optim.betas", "[0.9, 2]"], ["optim.betas", "[0.9, 2"]),
        (["--train.epochs", ".inf"], ["train.epochs"]),
        (["--checkpoint.shard_size", "infGB"], ["checkpoint.shard_size"]),
        (["--seed", "99999999999999999999999"], ["seed"]),
        (["--model.num_classes", "3"], ["model.num_classes", "10 classes"]),
        (["--model.weights", "/no/such.safetensors"], ["model.weights"]),
        (["--checkpoint.resume", "/no/such/step-00000001"], ["checkpoint.resume", "/no/such/step-00000001"]),
        (["--resume", "/no/such/step-00000001"], ["checkpoint.resume", "/no/such/step-00000001"]),
        (["--resume=/no/such/step-00000001"], ["checkpoint.resume", "/no/such/step-00000001"]),
        (["--parallel.strategy", "fsdp", "--parallel.replicas", "2"], ["parallel.replicas: 2", "1 ranks"]),
    ],
)
def test_a_mistake_is_one_line_with_the_key_and_the_fix(tmp_path: Path, flags: list[str], words: list[str]) -> None:
    refused([*["train", write_recipe(tmp_path)], *flags], *words)
    assert not list(tmp_path.glob("out/step-*"))


def test_the_recipes_own_mistakes(tmp_path: Path) -> None:
    path = write_recipe(tmp_path)
    Path(path).write_text(Path(path).read_text().replace("global_batch", "globl_batch"))
    refused(["train", path], "train.globl_batch", "'train.global_batch'", path)
    refused(["train", str(tmp_path / "missing.yaml")], "missing.yaml", "No such file")
    refused(["train", path, "--ranks", "0"], "--ranks: '0' must be a whole number from 1 on")
    refused(["train", "--restarts=3"], "--restarts: ", " started this rank", "leave --restarts out", ranks=2)
    refused(["trian"], "'trian'", "'train'")
    refused(["eval"], "step folder")
    refused(["eval", str(tmp_path)], str(tmp_path))
    refused(["export", str(tmp_path), str(tmp_path / "x.safetensors")], str(tmp_path), "not a step folder", ranks=2)
    refused(["checkpoint", "verify", str(tmp_path)], str(tmp_path), "neither a step folder")


def test_a_global_batch_that_cannot_be_divided(tmp_path: Path) -> None:
    path = write_recipe(tmp_path)
    refused(
        ["train", path, "--train.global_batch", "25"], "train.global_batch: 25", "3 data-parallel ranks", "24 or 27", ranks=3
    )
    refused(["train", path, "--train.global_batch", "2"], "train.global_batch: 2", "use 3", ranks=3)


def test_empty_image_folder(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    refused(
        ["train", write_recipe(tmp_path), "--data.train", f"imagefolder:{tmp_path / 'images'}"], "data.train", "images", ranks=2
    )


def test_class_count_that_does_not_fit_the_weights(tmp_path: Path) -> None:
    import timm

    options = recipe(tmp_path)["model"]["options"]
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=7, **options)
    save_file(model.state_dict(), tmp_path / "seven.safetensors")
    path = write_recipe(tmp_path)
    flags = ["--model.weights", str(tmp_path / "seven.safetensors"), "--model.num_classes", "10"]
    refused(["train", path, *flags], "model.num_classes", "7", "10", ranks=2)


def test_a_checkpoint_of_another_model(tmp_path: Path) -> None:
    run_ranks(run, 2, recipe(tmp_path / "first", train={"steps": 1}))
    path = write_recipe(tmp_path, train={"steps": 2})
    resume = ["--checkpoint.resume", str(tmp_path / "first" / "step-00000001")]
    other = ["--model.options", "{patch_size: 8, depth: 3, embed_dim: 96, num_heads: 3}"]
    refused(["train", path, *resume, *other], "checkpoint.resume", "another model", "96]", ranks=2)
    refused(["train", path, *resume, "--model.name", "convnext_atto", "--model.options", "{}"], "another model", ranks=2)
    refused(["train", path, *resume, "--optim.name", "sgd"], "checkpoint.resume", "another optimizer", ranks=2)
    refused(["train", path, *resume, "--optim.name", "sgd", "--optim.momentum", "0"], "another optimizer", ranks=2)
    run_ranks(run, 2, recipe(tmp_path / "out", train={"steps": 3}))
    refused(["train", path, *resume], "checkpoint.resume", "step 1", "step-00000003", "--out", ranks=2)
    refused(["train", path, *resume, "--out", str(tmp_path / "new"), "--train.steps", "0"], "train.steps", "step 1", ranks=2)
    refused(["eval", str(tmp_path / "first" / "step-00000001"), *other], "another model", ranks=2)


@pytest.mark.parametrize("out", ["/proc/bigvision", "FILE/out", "/dev/null"])
def test_an_output_folder_that_cannot_be_made(tmp_path: Path, out: str) -> None:
    (tmp_path / "FILE").write_text("")
    refused(["train", write_recipe(tmp_path), "--out", out.replace("FILE", str(tmp_path / "FILE"))], "out:", "--out", ranks=2)


def test_half_set_environments(tmp_path: Path) -> None:
    path = write_recipe(tmp_path)
    for missing in ("LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT"):
        code, _, message = run_ranks(command, 1, ["train", path], {missing: None})[0]
        assert code == 2 and f"without {missing}" in message and message.count("\n") == 1
    code, _, message = run_ranks(command, 1, ["train", path], {"RANK": "1", "WORLD_SIZE": None})[0]
    assert code == 2 and "without WORLD_SIZE" in message, "also said when no rank is 0"
    code, _, message = run_ranks(command, 1, ["train", path], {"RANK": "5"})[0]
    assert code == 2 and "RANK=5" in message


def test_never_into_a_folder_with_checkpoints(tmp_path: Path) -> None:
    path = write_recipe(tmp_path, train={"steps": 1})
    assert run_ranks(command, 1, ["train", path])[0][0] == 0
    refused(["train", path, "--checkpoint.resume", "never"], "checkpoint.resume: never", "--out", ranks=2)


def test_accelerate_settings_that_are_refused(tmp_path: Path) -> None:
    path = write_recipe(tmp_path)
    accelerate = {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_USE_FSDP": "true", "FSDP_OFFLOAD_PARAMS": "true"}
    code, _, message = run_ranks(command, 1, ["train", path], accelerate)[0]
    assert code == 2 and "FSDP_OFFLOAD_PARAMS=true" in message and message.count("\n") == 1


def test_a_deepspeed_file_in_its_three_spellings(tmp_path: Path) -> None:
    path = write_recipe(tmp_path)
    file = tmp_path / "ds.json"
    file.write_text('{"zero_optimization": {"stage": 2}, "gradient_accumulation_steps": 2, "elastic": 1}')
    for flags in (["--deepspeed", str(file)], [f"--deepspeed={file}"], ["--deepspeed", "--deepspeed_config", str(file)]):
        code, _, message = command(["train", path, *flags])
        assert code == 2 and message.count("\n") == 1 and f"{file}: unknown key 'elastic'" in message
    refused(["train", path, "--parallel.deepspeed", str(file)], str(file), "unknown key 'elastic'", ranks=2)
    file.write_text('{"zero_optimization": {"stage": 2}, "train_batch_size": 7}')
    refused(["train", path, "--deepspeed", str(file)], "train_batch_size: 7", "train.global_batch: ", path)
    refused(["train", path, "--deepspeed", str(tmp_path / "no.json")], "no.json", "No such file")
    assert command(["train", path, "--deepspeed"])[0] == 2
    file.write_text('{"zero_optimization": {"stage": 2}}')
    refused(["train", path, "--deepspeed", str(file), "--parallel.strategy", "fsdp"], "stage: 2", "parallel.strategy: fsdp")
    code, out, err = command(["train", path, "--deepspeed", "--deepspeed_config", str(file), "--print-config"])
    assert code == 0 and f"strategy: zero2 # {file}" in " ".join(out.split()), err
    for arguments in (["--help"], ["train", "--help"]):
        assert "--deepspeed FILE" in " ".join(command(arguments)[1].split())
        assert "--resume X" in " ".join(command(arguments)[1].split())


def test_an_evaluation_does_not_need_the_file_that_the_run_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import bigvision.training

    configs = []
    monkeypatch.setattr(bigvision.training, "evaluate_checkpoint", lambda folder, config, *rest: configs.append(config) or {})
    saved = {"parallel": {"deepspeed": str(tmp_path / "gone.json"), "strategy": "zero2"}}
    (tmp_path / "progress.json").write_text(json.dumps({"config": saved}))
    assert command(["eval", str(tmp_path)])[0] == 0
    assert (configs[0].parallel.deepspeed, configs[0].parallel.strategy) == (None, "zero2")
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"stage": 3}}')
    assert command(["eval", str(tmp_path), "--deepspeed", str(tmp_path / "ds.json")])[0] == 0
    assert configs[1].parallel.strategy == "zero3"
    code, _, message = command(["eval", str(tmp_path), "--deepspeed", str(tmp_path / "gone.json")])
    assert code == 2 and "gone.json" in message


def test_a_plain_model_is_evaluated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the weights of a run it has the metrics of the run's checkpoint, on any number of ranks."""
    run_ranks(run, 1, recipe(tmp_path / "out", train={"steps": 2}))
    folder, made = str(tmp_path / "out" / "step-00000002"), recipe(tmp_path)["model"]
    fp32 = ["--parallel.precision", "fp32", "--parallel.device", "cpu", "--data.workers", "0"]
    flags = ["--data.val", "synthetic:53x32", "--model.image_size", "32", "--model.options", json.dumps(made["options"]), *fp32]
    code, out, err = command(["eval", folder])
    assert code == 0, err
    weights = ["--model.weights", folder, "--model.num_classes", "10"]
    for ranks in (1, 2):
        code, again, err = run_ranks(command, ranks, ["eval", made["name"], *flags, *weights])[0]
        assert code == 0 and json.loads(again) == pytest.approx(json.loads(out), rel=1e-5), err
    code, out, err = command(["eval", "vit_tiny_patch16_224_in21k", *flags, "--model.pretrained", "false"])
    assert code == 0 and set(json.loads(out)) == set(Classify.metrics)
    assert "vit_tiny_patch16_224_in21k is called vit_tiny_patch16_224.augreg_in21k" in err
    refused(["eval", made["name"]], "vit_tiny_patch16_224 on which images", "--data.val", ranks=2)
    refused(["eval", made["name"], *flags], "data.val: 10 classes", "1000 outputs", "data.classes")
    refused(["eval", "resnet18.a9", "--data.val", "digits"], "timm has no weights 'resnet18.a9'", "resnet18.a")
    refused(["eval", "resnet81", "--data.val", "digits"], "resnet81 is not a step folder of a run, and not a timm model")


def test_a_right_command_trains_evaluates_and_prints_its_configuration(tmp_path: Path) -> None:
    path = write_recipe(tmp_path, train={"steps": 2})
    for spelling in (["--local_rank=0"], ["--local-rank=0"], ["--local_rank", "0"], ["--local-rank", "0"]):
        code, out, _ = run_ranks(command, 1, ["train", *spelling, path, "--print-config"])[0]
        assert code == 0 and "steps: 2" in out and path in out
    code, out, err = run_ranks(command, 2, ["train", path])[0]
    assert code == 0, err
    folder = tmp_path / "out" / "step-00000002"
    assert str(folder) in out and "resume" in out and f"bigvision eval {folder}" in out and "timm.create_model" in out
    results = [run_ranks(command, ranks, ["eval", str(folder), *flags])[0] for ranks, flags in (
        (1, []), (2, []), (3, ["--train.global_batch", "25"]), (2, ["--parallel.strategy", "fsdp"]),
    )]  # fmt: skip
    metrics = [yaml.safe_load(out) for _, out, _ in results]
    assert [code for code, _, _ in results] == [0] * 4 and all(m == pytest.approx(metrics[0], rel=1e-5) for m in metrics)
    assert set(metrics[0]) == set(Classify.metrics)
    replicated = [*["train", path], "--out", str(tmp_path / "two"), "--parallel.strategy", "fsdp", "--parallel.replicas", "2"]
    assert run_ranks(command, 4, replicated)[0][0] == 0
    code, again, err = run_ranks(command, 1, ["eval", str(tmp_path / "two" / "step-00000002")])[0]
    assert code == 0 and yaml.safe_load(again) == pytest.approx(metrics[0], rel=1e-5), err
    code, out, _ = run_ranks(command, 1, ["--help"])[0]
    assert code == 0 and all(name in out for name in ("train", "eval", "export", "checkpoint", "--resume X"))
    code, out, _ = run_ranks(command, 1, ["train", "--help"])[0]
    assert code == 0 and "--train.global_batch" in out
    assert torch.get_num_threads() >= 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["train", "RECIPE", "--resume", "OUT"],
            "checkpoint.resume: OUT is the folder of a run: name one of its steps, such as STEP",
        ),
        (["train", "RECIPE", "--resume", "OUT/latest"], "checkpoint.resume: OUT/latest is not a folder; name a step folder"),
        (["train", "RECIPE", "--resume", "Never"], "checkpoint.resume: Never is not a folder; did you mean 'never'?"),
        (["train", "RECIPE", "--out", "STEP"], "out: STEP is a step folder: name the folder of a run"),
        (["eval", "OUT"], "eval: OUT is the folder of a run: name one of its steps, such as STEP"),
        (["eval", "Resnet_18", "--data.val", "digits"], "not a timm model; did you mean 'resnet18'?"),
    ],
)
def test_folders_that_are_taken_for_others(tmp_path, arguments, words):
    """Nothing is written into a step folder: with it a run in there would be pruned."""
    places = {"RECIPE": write_recipe(tmp_path), "OUT": str(tmp_path / "run"), "STEP": str(tmp_path / "run" / "step-00000003")}
    (tmp_path / "run" / "step-00000003").mkdir(parents=True)

    def real(text):
        for name, path in places.items():
            text = text.replace(name, path)
        return text

    refused([real(argument) for argument in arguments], real(words))
    assert not list((tmp_path / "run" / "step-00000003").iterdir())


@pytest.mark.parametrize(
    ("flags", "ranks", "words"),
    [
        (["--train.micro_batch", "3", "--train.global_batch", "16"], 1, ["train.micro_batch: 3 cuts the 16", "use 2 or 4"]),
        (["--train.micro_batch", "1", "--train.global_batch", "9"], 1, ["train.micro_batch: 1 cuts the 9 samples", "use 3"]),
        (["--train.global_batch", "2"], 2, ["train.global_batch: 2 gives each of 2", "use at least 4"]),
        (
            ["--parallel.strategy", "pipeline", "--parallel.microbatches", "8", "--train.global_batch", "8"], 2,
            ["parallel.microbatches: 8 cuts the 8 samples", "use at most 4"],
        ),
        (["--train.micro_batch", "6", "--train.global_batch", "13", "--model.name", "resnetv2_50"], 1, ["one is alone"]),
        (
            ["--train.micro_batch", "1", "--model.image_size", "64", "--data.resize_schedule", "[{until: 9, image_size: 32}]"],
            1, ["train.micro_batch: 1"],
        ),
    ],
)  # fmt: skip
def test_a_micro_batch_of_one_sample_for_batchnorm(tmp_path, flags, ranks, words):
    path = write_recipe(tmp_path, model="resnet")
    flags = ["--model.name", "resnet10t", "--model.options", "{}", "--train.micro_batch", "null", *flags]
    refused(["train", path, *flags], *words, "a single value of each channel", ranks=ranks)
    assert not list((tmp_path / "out").glob("step-*"))


@pytest.mark.parametrize(("name", "size"), [("vit_tiny_patch16_224", 32), ("resnet10t", 64)])
def test_one_sample_is_enough_where_norms_see_more_of_it(name, size):
    """LayerNorm, and BatchNorm over several places of an image."""
    from bigvision.config import ModelConfig
    from bigvision.models import blueprint
    from bigvision.training.build import refusing_norm

    plan = blueprint(ModelConfig(name=name, image_size=size), 10)
    modes = [part.training for part in plan.module.modules()]
    assert refusing_norm(plan.module, (3, size, size)) is None
    assert [part.training for part in plan.module.modules()] == modes
    assert not any(part._forward_pre_hooks for part in plan.module.modules())
