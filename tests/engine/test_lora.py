"""LoRA: the same numbers under every strategy, resumed and averaged; merged and alone in exports; peft is the oracle."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from bigvision.checkpoint import reader
from bigvision.config import LoraConfig, ModelConfig, load_config
from bigvision.errors import UserError
from bigvision.models import Blueprint, blueprint, find_blocks
from bigvision.models.tracing import named_tensors
from bigvision.optim import freeze
from tests.checkpoint.real import command, refused
from tests.checkpoint.real import write as write_checkpoint
from tests.distributed import run_ranks
from tests.recipes import MODELS, digests, lines, losses, recipe, run, write

LONG = pytest.mark.long
LORA = {"rank": 4, "alpha": 8.0}
LINEAR_MLP = {"options": MODELS["convnext"]["options"] | {"conv_mlp": False}}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "ddp1": (1, {"strategy": "ddp"}),
    "fsdp2": (2, {"strategy": "fsdp"}),
    "fsdp3": (3, {"strategy": "fsdp", "recompute": "blocks"}),
    "hybrid": (4, {"strategy": "fsdp", "replicas": 2}),
    "zero1": (2, {"strategy": "zero1"}),
    "zero2": (2, {"strategy": "zero2"}),
    "zero3": (2, {"strategy": "zero3"}),
    "pipeline": (2, {"strategy": "pipeline"}),
}


def made(out: Path, layout: str = "ddp1", model: str = "vit", lora: dict[str, Any] = LORA, **sections: Any) -> dict[str, Any]:
    more = {"trainable": sections.pop("trainable")} if "trainable" in sections else {}
    sections["parallel"] = LAYOUTS[layout][1] | sections.get("parallel", {})
    plain = recipe(out, model, **sections)
    more |= LINEAR_MLP if model == "convnext" else {}
    return plain | {"model": plain["model"] | {"lora": lora} | more}


@pytest.mark.parametrize("layout", ["fsdp2", *(pytest.param(name, marks=LONG) for name in LAYOUTS if name != "fsdp2")])
def test_a_run_resumes_bit_for_bit_and_under_other_strategies(tmp_path: Path, layout: str) -> None:
    ranks = LAYOUTS[layout][0]

    def plain(name: str, layout: str, resume: str = "auto") -> dict[str, Any]:
        checkpoint = {"every": 3, "keep": 9, "resume": resume}
        return made(tmp_path / name, layout, train={"steps": 6, "micro_batch": 6}, ema={"decay": 0.5}, checkpoint=checkpoint)

    run_ranks(run, ranks, plain("whole", layout))
    middle, last = (tmp_path / "whole" / f"step-{step:08}" for step in (3, 6))
    written = digests(last)
    run_ranks(run, ranks, plain("on", layout, str(middle)))
    assert losses(tmp_path / "on") == losses(tmp_path / "whole")[3:] and digests(tmp_path / "on" / last.name) == written
    for other in ("ddp1", "fsdp3", "zero3", "pipeline") if layout != "fsdp2" else ("ddp1",):
        run_ranks(run, LAYOUTS[other][0], plain(other, other, str(last)))
        assert digests(tmp_path / other / last.name) == written, f"{layout} resumed as {other}"
    stepped = {name.partition("/")[0] for name in load_file(last / "optimizer.safetensors")}
    assert stepped == load_file(last / "ema.safetensors").keys(), "what is frozen has no average"
    first, weights = dict(plan().tensors(0)), load_file(last / "model.safetensors")
    assert {name for name, value in weights.items() if not torch.equal(value, first[name])} == stepped
    assert all(name.endswith(("lora_A.weight", "lora_B.weight")) or name.startswith("head.") for name in stepped)


@pytest.mark.long
@pytest.mark.parametrize(
    ("model", "parallel"),
    [("vit", {"compile": True}), ("vit", {"recompute": "blocks"}), ("vit", {"precision": "bf16"}), ("swin", {}),
     ("eva02", {"precision": "bf16"}), ("coat", {}), ("convnext", {"precision": "amp_bf16"})],
)  # fmt: skip
def test_losses_of_other_models_and_forms(tmp_path: Path, model: str, parallel: dict[str, Any]) -> None:
    """Compiled, recomputed, in half precision; layers whose weight timm reads by itself (EVA) or that are shared (CoaT)."""
    plain = made(tmp_path / "one", model=model, train={"steps": 6})
    half = "precision" in parallel
    reference = run_ranks(run, 1, plain)[0]
    for layout in ("ddp1", "fsdp2", "zero3") if half else ("ddp1", "fsdp2"):
        name = f"{layout}-{half}"
        other = made(tmp_path / name, layout, model, train={"steps": 6}, parallel=parallel)
        found = run_ranks(run, LAYOUTS[layout][0], other)[0]
        assert found == pytest.approx(reference, rel=2e-2 if half else 1e-5) and len(set(found)) == 6


def plan(kind: str = "vit", lora: dict[str, Any] | None = LORA, **keys: Any) -> Blueprint:
    more = LINEAR_MLP if kind == "convnext" else {}
    config = load_config({"model": MODELS[kind] | more | {"lora": lora} | keys}).model
    return blueprint(config, 10)


def values(plan: Blueprint, seed: int = 0) -> nn.Module:
    """The model of *plan* with its first values, in memory."""
    module = plan.module.to_empty(device="cpu")
    named = dict(named_tensors(module))
    with torch.no_grad():
        for name, value in plan.tensors(seed):
            named[name].copy_(value)
    plan.fill_attributes(module, "cpu")
    return module.eval()


@pytest.mark.parametrize("name", ["vit", *(pytest.param(name, marks=LONG) for name in ("swin", "eva02", "convnext", "coat"))])
def test_it_begins_as_the_model_without_adapters(name: str) -> None:
    """A is uniform within He's bound for each layer by itself, and B zero; both are functions of the seed and their names."""
    adapted, plain = plan(name), plan(name, None)
    first, base = dict(adapted.tensors(3)), dict(plain.tensors(3))
    added = first.keys() - base.keys()
    assert added == adapted.adapters.keys() and all(torch.equal(first[one], value) for one, value in base.items())
    downs = {one: first[one] for one in added if one.endswith("lora_A.weight")}
    for one, value in downs.items():
        assert 0.5 < float(value.abs().max()) * math.sqrt(value.shape[1]) <= 1 and value.shape[0] == 4
        assert not first[one.replace("lora_A", "lora_B")].any()
        assert torch.equal(dict(adapted.tensors(3, {one}))[one], value) and not torch.equal(
            value, dict(adapted.tensors(4))[one]
        )
    assert len({value.flatten()[0].item() for value in downs.values()}) > 4
    images = torch.randn(2, 3, *adapted.image_size, generator=torch.Generator().manual_seed(0))
    one, other = values(adapted, 3), values(plain, 3)
    with torch.no_grad():
        before = other(images)
        assert torch.allclose(one(images), before, rtol=1e-5, atol=1e-7)
        for part in one.modules():
            if hasattr(part, "lora_B"):
                part.lora_B.weight.normal_(std=1e5)  # layer scale may be 1e-6
        assert (one(images) - before).abs().max() > 0.1 * before.abs().max()


@pytest.mark.parametrize(
    ("lora", "more", "words"),
    [
        ({"rank": 0}, {}, ["model.lora.rank: 0", "at least 1"]),
        ({"alpha": 0}, {}, ["model.lora.alpha: 0"]),
        ({"alpha": math.inf}, {}, ["model.lora.alpha: inf"]),
        ({"targets": []}, {}, ["model.lora.targets: []"]),
        ({"targets": ["*.qvk"]}, {}, ["'*.qvk' matches no module", "blocks.*.attn.qkv"]),
        ({"targets": ["*.qkv", "*.fc3"]}, {}, ["'*.fc3' matches no module", "blocks.*.mlp.fc"]),
        ({"targets": ["*.norm1"]}, {}, ["'*.norm1' matches blocks.0.norm1, a LayerNorm", "linear layers", "blocks.*.attn.qkv"]),
        ({"targets": ["*.proj"]}, {}, ["'*.proj' matches patch_embed.proj, a Conv2d", "not for convolutions"]),
        ({"targets": ["head"]}, {}, ["'head' matches head, the classifier, which is trained whole"]),
        ({"rank": 64}, {}, ["null finds no linear layer wider than the rank, 64"]),
        ({}, MODELS["resnet"], ["null finds no linear layer", "convolutions have no adapters", "model.trainable"]),
        ({}, MODELS["convnext"], ["convolutions have no adapters"]),
        ({"targets": ["*.fc1"]}, MODELS["convnext"], ["mlp.fc1, a Conv2d"]),
        ({}, {"trainable": ["*.nrom1"]}, ["model.trainable: '*.nrom1'", "blocks.*.norm1"]),
        ({"rnak": 3}, {}, ["model.lora: unknown key 'rnak'", "'rank'"]),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line(lora: dict[str, Any], more: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UserError) as said:
        made = plan("vit", lora, **more)
        freeze(made.module, more.get("trainable", "all"), made.adapters)
    assert all(word in str(said.value) for word in words) and "\n" not in str(said.value), said.value


@pytest.mark.parametrize(
    ("trainable", "beside"),
    [("all", {"head.weight", "head.bias"}), ("head", {"head.weight", "head.bias"}), ((), set()),
     (("norm",), {"norm.weight", "norm.bias"})],
)  # fmt: skip
def test_what_is_trained_beside_the_adapters(trainable: Any, beside: set[str]) -> None:
    made = plan(lora={"targets": ["blocks.1.attn", "*.fc2"]}, trainable=trainable)
    freeze(made.module, trainable, made.adapters)
    layers = {name.rpartition(".lora_")[0] for name in made.adapters}
    assert layers == {"blocks.1.attn.qkv", "blocks.1.attn.proj", *(f"blocks.{n}.mlp.fc2" for n in range(3))}
    trained = {name for name, one in made.module.named_parameters() if one.requires_grad}
    assert trained == made.adapters.keys() | beside
    with_adapters, without = (find_blocks(plan(lora=lora).module, 32) for lora in (LORA, None))
    assert [block.path for block in with_adapters] == [block.path for block in without]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("lora") / "out"
    run_ranks(run, 2, made(out, "fsdp2", train={"steps": 4}, ema={"decay": 0.5}, optim={"lr": 1e-2}))
    return out / "step-00000004"


def engine_logits(folder: Path, images: Tensor, group: str = "model") -> Tensor:
    """What the model with adapters computes from a checkpoint."""
    module = values(plan())
    state = load_file(folder / "model.safetensors") | load_file(folder / f"{group}.safetensors")
    module.load_state_dict(state)
    with torch.no_grad():
        return module(images)


IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("group", ["model", "ema"])
def test_an_export_is_merged(tmp_path: Path, trained: Path, group: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """timm opens it; each weight is W + alpha / rank B A, also where parts of it end inside rows."""
    flags = ["--ema"] if group == "ema" else []
    assert command("export", trained, tmp_path / "folder", *flags)[0] == 0
    model = timm.create_model(f"local-dir:{tmp_path / 'folder'}", pretrained=True).eval()
    expected = engine_logits(trained, IMAGES, group)
    with torch.no_grad():
        assert torch.allclose(model(IMAGES), expected, atol=1e-5)
    state = load_file(trained / "model.safetensors") | load_file(trained / f"{group}.safetensors")
    found = load_file(tmp_path / "folder" / "model.safetensors")
    assert found.keys() == timm.create_model("vit_tiny_patch16_224", depth=3).state_dict().keys()
    for name, value in found.items():
        layer = name.removesuffix(".weight")
        if f"{layer}.lora_A.weight" in state:
            added = state[f"{layer}.lora_B.weight"].double() @ state[f"{layer}.lora_A.weight"].double()
            assert torch.equal(value, (state[name].double() + 2.0 * added).float()) and not torch.equal(value, state[name])
        else:
            assert torch.equal(value, state[name]), name
    monkeypatch.setattr(reader, "PART", 1000)
    assert command("export", trained, tmp_path / "parts.safetensors", *flags)[0] == 0
    assert (tmp_path / "parts.safetensors").read_bytes() == (tmp_path / "folder" / "model.safetensors").read_bytes()


def test_adapters_alone_have_the_names_of_peft(tmp_path: Path, trained: Path) -> None:
    """Names as peft 0.21 wrote them for this model; `test_peft_agrees` compares them with what is installed."""
    code, said, _ = command("export", trained, tmp_path / "adapter", "--adapter")
    assert code == 0 and 'peft.PeftModel.from_pretrained(timm.create_model("vit_tiny_patch16_224", num_classes=10' in said
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    state, found = load_file(trained / "model.safetensors"), load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    layers = [f"blocks.{n}.{layer}" for n in range(3) for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]
    names = {f"base_model.model.{layer}.lora_{one}.weight" for layer in layers for one in "AB"}
    assert found.keys() == names | {"base_model.model.head.weight", "base_model.model.head.bias"}
    assert all(torch.equal(value, state[name.removeprefix("base_model.model.")]) for name, value in found.items())
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["modules_to_save"]) == (4, 8.0, ["head"])
    assert sorted(config["target_modules"]) == sorted(layers)
    assert command("export", trained, tmp_path / "adapter", "--adapter", "--ema", "--force")[0] == 0
    averaged = load_file(trained / "ema.safetensors")
    again = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert all(torch.equal(value, averaged[name.removeprefix("base_model.model.")]) for name, value in again.items())


def test_what_cannot_be_exported_or_begun_is_one_line(tmp_path: Path, trained: Path) -> None:
    run_ranks(run, 1, recipe(tmp_path / "plain", train={"steps": 1}))
    run_ranks(run, 1, made(tmp_path / "more", trainable=["head", "pos_embed"], train={"steps": 1}))
    assert "has no adapters" in refused("export", tmp_path / "plain" / "step-00000001", tmp_path / "x", "--adapter")
    assert "pos_embed was trained too" in refused("export", tmp_path / "more" / "step-00000001", tmp_path / "x", "--adapter")
    assert "peft opens a folder" in refused("export", trained, tmp_path / "x.safetensors", "--adapter")
    assert "leave --shard-size out" in refused("export", trained, tmp_path / "x", "--adapter", "--shard-size", "1MB")
    own = {"a.weight": torch.ones(2, 3), "a.lora_A.weight": torch.ones(1, 3)}  # of a module of the user's
    documents = {"config.json": {"architecture": "made", "model_args": {}}, "progress.json": {}}
    folder = write_checkpoint(tmp_path / "own", 1, {"model": own}, documents)
    assert command("export", folder, tmp_path / "own.safetensors")[0] == 0
    assert load_file(tmp_path / "own.safetensors").keys() == own.keys()
    with pytest.raises(UserError, match=r"lora_.*bigvision export"):
        plan(lora=None, weights=str(trained))
    other = made(tmp_path / "alpha", lora=LORA | {"alpha": 4.0}, checkpoint={"resume": str(trained)})
    code, _, said = command("train", write(tmp_path, other))
    assert code == 2 and said.startswith("error: model.lora.alpha: 4, but") and said.count("\n") == 1, said


def test_peft_agrees(tmp_path: Path, trained: Path) -> None:
    """peft opens the adapters over the timm model that the run began with, computes the same, and writes the same names."""
    peft = pytest.importorskip("peft", reason="pip install 'bigvision[dev]'")
    assert command("export", trained, tmp_path / "adapter", "--adapter")[0] == 0
    base = values(plan(lora=None))
    model = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    expected = engine_logits(trained, IMAGES)
    with torch.no_grad():
        assert torch.allclose(model(IMAGES), expected, atol=1e-5)
        with model.disable_adapter():
            assert not torch.allclose(model(IMAGES), expected, atol=1e-2)
        model.save_pretrained(tmp_path / "again")
        ours, theirs = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("adapter", "again"))
        assert ours.keys() == theirs.keys() and all(torch.equal(value, theirs[name]) for name, value in ours.items())
        assert torch.allclose(model.merge_and_unload()(IMAGES), expected, atol=1e-5)


def held_by_fsdp(name: str, ranks: int) -> dict[str, dict[str, int]]:
    """Bytes of each kind that the first of *ranks* holds under fsdp, by the layout of fully_shard on meta."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from bigvision.engine.parallelize import shard

    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    try:
        runtime: Any = SimpleNamespace(
            mesh={"shard": init_device_mesh("cpu", (ranks,), mesh_dim_names=("shard",))}, shard=(0, ranks), replica=(0, 1),
            data_rank=0, data_ranks=ranks, rank=0, pipeline_ranks=1,
        )  # fmt: skip
        found = {}
        for kind, (made, config) in seven_billion(name).items():
            blocks = [block.module for block in find_blocks(made.module, made.image_size)]
            spread = shard(made.module, [made.module], blocks, config, torch.float32, runtime)
            found[kind] = table([(spread.locate(p)[0].numel(), p.requires_grad) for p in spread.held().values()])
        return found
    finally:
        dist.destroy_process_group()


def seven_billion(name: str) -> dict[str, tuple[Blueprint, Any]]:
    """The model on meta with adapters, and as it is trained whole."""
    kinds = {}
    for kind, lora in (("lora", LoraConfig()), ("full", None)):
        made = blueprint(ModelConfig(name, lora=lora), 1000)
        freeze(made.module, "all", made.adapters)
        kinds[kind] = made, load_config({"parallel": {"strategy": "fsdp"}})
    return kinds


def table(sizes: list[tuple[int, bool]]) -> dict[str, int]:
    """Bytes in fp32 of (values, whether they are trained): AdamW has two moments of what is trained."""
    trained = sum(size for size, is_trained in sizes if is_trained)
    return {"weights": 4 * sum(size for size, _ in sizes), "gradients": 4 * trained, "optimizer": 8 * trained}


SEVEN = "vit_7b_patch16_dinov3"


@pytest.mark.long
def test_the_state_of_a_7b_run_is_what_the_docs_say() -> None:
    from bigvision.engine.zero import ZeroStep

    found = {f"fsdp {kind}": held for kind, held in run_ranks(held_by_fsdp, 1, SEVEN, 8)[0].items()}
    for kind, (made, _) in seven_billion(SEVEN).items():
        step: Any = SimpleNamespace(runtime=SimpleNamespace(world_size=8, rank=0))
        sizes = [(ZeroStep._share(step, one)[1], one.requires_grad) for one in made.module.parameters()]
        found[f"zero3 {kind}"] = table(sizes)
    page = Path(__file__).parents[2].joinpath("docs", "models.md").read_text()
    for name, held in found.items():
        strategy, kind = name.split()
        cells = [f"{held[key] / 1e9:.3f}" for key in ("weights", "gradients", "optimizer")]
        label = "LoRA, rank 8" if kind == "lora" else "everything"
        assert f"| {label} | `{strategy}` | {' | '.join(cells)} | {sum(held.values()) / 1e9:.3f} |" in page, (name, cells, held)


@pytest.mark.long
def test_lora_learns_more_than_the_head_on_random_features(tmp_path: Path) -> None:
    """The classifier of a random ViT on digits, alone and with adapters: the same steps, rates and batches."""

    def plain(name: str, **model: Any) -> dict[str, Any]:
        made = recipe(
            tmp_path / name, data={"train": "digits", "val": "digits", "augment": False}, optim={"lr": 3e-3},
            train={"steps": 200, "global_batch": 64, "micro_batch": None, "eval_every": 200}, parallel={"strategy": "fsdp"},
        )  # fmt: skip
        return made | {"model": made["model"] | model}

    for name, model in (("head", {"trainable": "head"}), ("lora", {"lora": {"rank": 8, "alpha": 16}})):
        run_ranks(run, 2, plain(name, **model))
    head, lora = (lines(tmp_path / name)[-1]["val_top1"] for name in ("head", "lora"))
    print(f"top1: head {head:.3f}, LoRA {lora:.3f}")
    assert lora > head + 0.25


class Encoder(nn.Module):
    """torch's own layers, whose evaluation reads weights without calling the layers that hold them."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(24, 2, 48, batch_first=True), 2)
        self.layers = nn.ModuleList([nn.ModuleDict({"mlp": nn.Linear(24, 24)})])
        self.head = nn.Linear(24, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.layers[0]["mlp"](self.encoder(images.mean(1)[:, :, :24])).mean(1))


def test_a_layer_that_is_not_called_gets_no_adapter() -> None:
    def made(targets: list[str] | None) -> Blueprint:
        config = load_config({"model": {"image_size": 32, "lora": {"rank": 4, "targets": targets}}}).model
        return blueprint(config, 10, Encoder())

    found = made(None)
    assert {name.partition(".lora_")[0] for name in found.adapters} == {"layers.0.mlp"}
    assert "no adapter for encoder.layers.0.self_attn.out_proj (2 such)" in (found.note or "")
    with pytest.raises(UserError, match=r"encoder.layers.0.linear1 is not called by the model"):
        made(["*.linear1"])
    with pytest.raises(UserError, match=r"model.trainable: head needs timm's get_classifier"):
        freeze(found.module, "all", found.adapters)
    freeze(found.module, ["head"], found.adapters)
