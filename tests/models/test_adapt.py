"""timm's adaptation, recorded, gives what timm gives, and leaves in the file what it leaves as it is."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

from bigvision.errors import UserError
from bigvision.models import blueprint, model_card, weights
from bigvision.models.exact_init import first_values
from bigvision.models.exact_init.trace import ReplayDiffers
from bigvision.models.weights import Adapted, capture
from bigvision.models.weights_file import WeightsFile
from tests.models.configs import Model
from tests.models.zoo import ZOO

State = dict[str, Tensor]
VIT = {"depth": 2, "embed_dim": 48, "num_heads": 3}
CONVNEXT = {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)}
SHALLOW = {"depths": (1, 1, 1, 1)}


def renamed(*pairs: tuple[str, str]) -> Callable[[State], State]:
    def rename(state: State) -> State:
        for old, new in pairs:
            state = {re.sub(old, new, name): tensor for name, tensor in state.items()}
        return state

    return rename


def same(state: State) -> State:
    return state


def openai_clip(state: State) -> State:
    swaps = (r"^patch_embed\.proj", "conv1"), ("norm_pre", "ln_pre"), (r"^norm\.", "ln_post."), (r"\.norm", ".ln_")
    more = (r"qkv\.", "in_proj_"), (r"attn\.proj", "attn.out_proj"), (r"mlp\.fc1", "mlp.c_fc"), (r"mlp\.fc2", "mlp.c_proj")
    state = renamed(*swaps, *more, ("^blocks", "transformer.resblocks"))(state)
    state["positional_embedding"] = state.pop("pos_embed")[0]
    state["class_embedding"] = state.pop("cls_token")[0, 0]
    state["proj"] = state.pop("head.weight").t()
    del state["head.bias"]
    return {f"visual.{name}": tensor for name, tensor in state.items()}


def dinov2(state: State) -> State:
    registers, positions = state.pop("reg_token"), state.pop("pos_embed")
    whole = torch.cat([torch.randn(1, 1, 48), positions], 1)
    return {**state, "mask_token": torch.zeros(1, 48), "register_tokens": registers, "pos_embed": whole}


def beit3(state: State) -> State:
    found: State = {"beit3.vision_embed.mask_token": torch.zeros(1)}
    for name, tensor in state.items():
        if match := re.fullmatch(r"blocks\.(\d+)\.attn\.qkv\.(weight|bias)", name):
            for which, part in zip("qkv", tensor.chunk(3)):
                found[f"beit3.encoder.layers.{match[1]}.self_attn.{which}_proj.A.{match[2]}"] = part
        elif name == "pos_embed":
            found["beit3.encoder.embed_positions.A.weight"] = torch.cat([tensor[0, :2], tensor[0]])
        else:
            found[f"beit3.{name}"] = tensor
    return found


def dinov3(state: State) -> State:
    found: State = {"mask_token": torch.zeros(1, 48), "rope_embed.periods": torch.zeros(4)}
    for name, tensor in state.items():
        name = name.replace("gamma_1", "ls1.gamma").replace("gamma_2", "ls2.gamma").replace("reg_token", "storage_tokens")
        if name.endswith("q_bias"):
            found[name.replace("q_bias", "qkv.bias")] = torch.randn(3 * tensor.numel())
        elif not name.endswith("v_bias"):
            found[name] = tensor
    return found


def facebook(state: State) -> State:
    state = renamed(
        (r"^stem\.", "downsample_layers.0."), (r"stages\.(\d)\.blocks\.(\d+)", r"stages.\1.\2"),
        (r"stages\.(\d)\.downsample\.", r"downsample_layers.\1."), ("conv_dw", "dwconv"), (r"mlp\.fc", "pwconv"),
        (r"head\.fc\.", "head."), (r"head\.norm", "norm"),
    )(state)  # fmt: skip
    return {name: tensor.flatten(1) if "pwconv" in name and tensor.ndim == 4 else tensor for name, tensor in state.items()}


def taus(state: State) -> State:
    state = {name: tensor.exp().reciprocal() if "logit_scale" in name else tensor for name, tensor in state.items()}
    return renamed(("logit_scale", "tau"), (r"head\.fc\.", "head."))(state)


def fused(state: State) -> State:
    state = dict(state)
    for name in [name for name in state if re.fullmatch(r"cls_attn_blocks\.\d+\.attn\.q\.(weight|bias)", name)]:
        parts = [state.pop(name.replace(".q.", f".{which}.")) for which in "qkv"]
        state[name.replace(".q.", ".qkv.")] = torch.cat(parts)
    return state


def two_frames(state: State) -> State:
    kernel, positions = state.pop("encoder.patch_embed.proj.weight"), state.pop("encoder.pos_embed")
    frames = torch.stack([kernel, kernel / 2], 2).bfloat16()
    return {**state, "encoder.patch_embed.proj.weight": frames, "encoder.pos_embed.weight": positions[0]}


Case = tuple[str, str, dict[str, Any], Callable[[State], State], dict[str, Any], set[str]]
"""What is tried, a model, the file's options, how the file is written, the model's options, what is computed."""
KERNEL, POSITIONS = "patch_embed.proj.weight", "pos_embed"
CASES: list[Case] = [
    ("other size", "vit_tiny_patch16_224", {**VIT, "img_size": 32}, same, {"img_size": 64}, {POSITIONS}),
    ("other patch", "vit_tiny_patch16_224", {**VIT, "img_size": 32}, same, {"patch_size": 8}, {KERNEL, POSITIONS}),
    ("flexivit", "flexivit_small", VIT, same, {"patch_size": 8, "img_size": 64}, {KERNEL, POSITIONS}),
    ("one channel", "vit_tiny_patch16_224", VIT, same, {"in_chans": 1}, {KERNEL}),
    ("five channels", "convnextv2_atto", CONVNEXT, same, {"in_chans": 5}, {"stem.0.weight"}),
    ("clip", "vit_base_patch16_clip_224", VIT, openai_clip, {}, {"head.weight", "head.bias"}),
    ("dinov2", "vit_base_patch14_reg4_dinov2", {**VIT, "img_size": 56}, dinov2, {"img_size": 112}, {"cls_token", POSITIONS}),
    ("beit3", "vit_base_patch16_224", VIT, beit3, {}, {f"blocks.{n}.attn.qkv.{w}" for n in (0, 1) for w in ("weight", "bias")}),
    ("dinov3", "vit_small_patch16_dinov3_qkvb", VIT, dinov3, {"img_size": 96}, set()),
    ("dinov3 without bias", "vit_small_patch16_dinov3", VIT, dinov3, {}, set()),
    ("eva02", "eva02_tiny_patch14_224", VIT, same, {"img_size": 128, "patch_size": 16}, {KERNEL, POSITIONS}),
    ("beit", "beit_base_patch16_224", VIT, same, {"img_size": 96}, {"tables"}),
    ("facebook's convnext", "convnext_atto", CONVNEXT, facebook, {}, set()),
    ("swin's window", "swin_tiny_patch4_window7_224", SHALLOW, same, {"img_size": 128, "window_size": 4}, {"tables"}),
    ("cls attention", "xcit_nano_12_p16_224", {"depth": 1}, fused, {}, set()),
    ("two frames", "qwen3_vit_306m", {"depth": 1}, two_frames, {}, {"encoder.patch_embed.proj.weight"}),
]
MORE: list[Case] = [
    ("deit3", "deit3_small_patch16_224", VIT, renamed((r"ls([12])\.gamma", r"gamma_\1")), {"img_size": 64}, {POSITIONS}),
    ("swin's patch", "swin_tiny_patch4_window7_224", SHALLOW, same, {"patch_size": 8}, {KERNEL, "tables"}),
    ("swinv2", "swinv2_tiny_window16_256", SHALLOW, same, {"img_size": 128, "window_size": 8}, set()),
    ("swinv2 cr", "swinv2_cr_tiny_224", SHALLOW, taus, {"img_size": 192}, {"scales"}),
    ("mvitv2", "mvitv2_tiny", {}, same, {"img_size": 192}, {"rel_pos"}),
    ("tnt", "tnt_s_legacy_patch16_224", {"depth": 2}, same, {"img_size": 192}, {"patch_pos"}),
    ("tiny_vit", "tiny_vit_11m_224", {}, same, {"window_sizes": (7, 7, 7, 7)}, {"biases"}),
    ("efficientvit", "efficientvit_m0", {}, same, {"img_size": 192}, {"biases"}),
    ("maxvit", "maxvit_tiny_tf_224", {}, same, {"img_size": 256}, {"tables"}),
    ("resnet", "resnet18", {"layers": (1, 1, 1, 1)}, same, {"in_chans": 1}, {"conv1.weight"}),
]
KINDS = {"tables": "relative_position_bias_table", "scales": "logit_scale", "rel_pos": "rel_pos_", "biases": "attention_biases"}


@pytest.mark.parametrize("case", [*CASES, *(pytest.param(case, marks=pytest.mark.long) for case in MORE)], ids=lambda c: c[0])
def test_every_value_is_timms(case: Case, tmp_path):
    _, name, theirs, rewrite, ours, computed = case
    file = str(tmp_path / "weights.safetensors")
    torch.manual_seed(1)
    state = timm.create_model(name, num_classes=10, **theirs).state_dict()
    save_file({name: tensor.clone().contiguous() for name, tensor in rewrite(state).items()}, file)
    options = {key: value for key, value in {**theirs, **ours}.items() if key != "img_size"}
    size = {**theirs, **ours}.get("img_size")
    plan = blueprint(Model(name, weights=file, image_size=size, options=options), 10)
    assert plan.note is None
    card = {"file": file, "num_classes": 10, "label_offset": 0}
    arguments = {key: value for key, value in plan.arguments.items() if key != "pretrained"}
    reference = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=card, **arguments).state_dict()
    values = dict(plan.tensors(0))
    assert all(torch.equal(values[name], tensor) for name, tensor in reference.items())
    left = reference.keys() - set(plan.runs())
    assert {next((kind for kind, part in KINDS.items() if part in name), name) for name in left} == computed


WIDE = (32, 64)
SMALL = VIT | {"patch_size": 8}
FLAT = {"vit": ("vit_tiny_patch16_224", SMALL), "eva02": ("eva02_tiny_patch14_224", SMALL)}
REFUSED = {"beit": ("beit_base_patch16_224", SMALL), "cait": ("cait_xxs24_224", {"depth": 1, "patch_size": 8})}


def of_wide_images(folder: Path, name: str, options: dict[str, Any]) -> None:
    """Save a model for images of `WIDE` pixels as timm does, with its config.json."""
    torch.manual_seed(1)
    module = timm.create_model(name, num_classes=10, img_size=WIDE, **options)
    save_file({key: tensor.clone().contiguous() for key, tensor in module.state_dict().items()}, folder / "model.safetensors")
    card = model_card(module, image_size=WIDE, mean=(0.5,) * 3, std=(0.5,) * 3)
    (folder / "config.json").write_text(json.dumps(card))


@pytest.mark.parametrize("kind", FLAT)
def test_positions_on_a_grid_that_is_no_square_are_fitted_as_timm_does(kind: str, tmp_path: Path) -> None:
    """Also to the same number of places in another form, where nothing but the file's card tells that they are others."""
    name, options = FLAT[kind]
    of_wide_images(tmp_path, name, options)
    for size in (WIDE, (64, 32), (48, 48)):
        plan = blueprint(Model(name, weights=str(tmp_path), image_size=size, options=options), 10)
        reference = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, img_size=size).state_dict()
        values = dict(plan.tensors(0))
        assert plan.note is None and all(torch.equal(values[key], tensor) for key, tensor in reference.items())
        assert (POSITIONS in plan.runs()) == (size == WIDE)


@pytest.mark.parametrize("kind", REFUSED)
def test_a_grid_that_timm_cannot_fit_is_refused(kind: str, tmp_path: Path) -> None:
    name, options = REFUSED[kind]
    of_wide_images(tmp_path, name, options)
    assert blueprint(Model(name, weights=str(tmp_path), image_size=WIDE, options=options), 10).note is None
    for size in ((64, 32), (48, 48)):
        with pytest.raises(UserError, match=r"^model\.weights: .* at 32 x 64 pixels.*use model\.image_size: \[32, 64\]$"):
            blueprint(Model(name, weights=str(tmp_path), image_size=size, options=options), 10)


@pytest.mark.long
@pytest.mark.parametrize("entry", ZOO, ids=lambda entry: entry.module)
def test_every_module_of_timm_streams_its_own_files(entry, tmp_path):
    file = str(tmp_path / "weights.safetensors")
    torch.manual_seed(1)
    state = timm.create_model(entry.name, num_classes=10, **entry.options).state_dict()
    save_file({name: tensor.clone().contiguous() for name, tensor in state.items()}, file)
    plan = blueprint(Model(entry.name, options=entry.options, weights=file), 10)
    assert plan.note is None and set(plan.runs()) == set(state)
    values = dict(plan.tensors(0))
    assert all(torch.equal(values[name], tensor) for name, tensor in state.items())


def test_labels_that_timm_cuts_off_are_left_in_the_file(vit):
    """A card may say that the first of the file's classes is a background class."""
    file, state = vit
    with capture() as loading, torch.device("meta"):
        module = timm.create_model("vit_tiny_patch16_224", pretrained=True, num_classes=9, **VIT)
    card = {**loading["pretrained_cfg"], "num_classes": 9, "label_offset": 1}
    adapted = Adapted(WeightsFile(file, "model.weights"), module, {**loading, "pretrained_cfg": card})
    assert set(adapted.runs()) == set(state)
    part = torch.empty(50)
    adapted.read("head.weight", 100, part)
    assert torch.equal(part, state["head.weight"][1:].reshape(-1)[100:150])


@pytest.fixture
def vit(tmp_path) -> tuple[str, State]:
    torch.manual_seed(3)
    state = timm.create_model("vit_tiny_patch16_224", num_classes=10, **VIT).state_dict()
    save_file(state, tmp_path / "vit.safetensors")
    return str(tmp_path / "vit.safetensors"), state


def filtered(monkeypatch, file: str, change: Callable[[State, torch.nn.Module], State]):
    """The plan of a model whose filter is *change*."""
    load = weights._load
    monkeypatch.setattr(weights, "_load", lambda module, loading, state: load(module, {**loading, "filter_fn": change}, state))
    return blueprint(Model(options=VIT, weights=file), 10)


def test_a_filter_that_cannot_be_recorded_is_run_on_the_mapped_file_and_said(vit, monkeypatch):
    file, state = vit

    def through_numpy(state: State, model: torch.nn.Module) -> State:
        return {**state, "norm.bias": torch.from_numpy(state["norm.weight"].numpy() * 3)}

    plan = filtered(monkeypatch, file, through_numpy)
    assert "not recorded" in plan.note and not plan.runs()
    values = dict(plan.tensors(0))
    assert torch.equal(values.pop("norm.bias"), state["norm.weight"] * 3)
    assert all(torch.equal(value, state[name]) for name, value in values.items())


def test_a_filter_may_look_at_values_change_them_and_split_them(vit, monkeypatch):
    file, state = vit

    def change(state: State, model: torch.nn.Module) -> State:
        if state["norm.weight"].sum() > 0:
            state["norm.bias"].add_(2)
        shape = model.state_dict()["norm.weight"].shape
        state["norm.weight"] = state["norm.weight"].view(2, -1).reshape(shape)
        state["cls_token"], state["head.bias"] = state["blocks.0.mlp.fc1.bias"][None, None, 48:96], torch.zeros(10)
        return state

    plan = filtered(monkeypatch, file, change)
    values = dict(plan.tensors(0))
    assert plan.note is None and {"norm.weight", "cls_token"} < set(plan.runs())
    assert torch.equal(values["norm.bias"], state["norm.bias"] + 2) and not values["head.bias"].any()
    assert torch.equal(values["cls_token"].view(-1), state["blocks.0.mlp.fc1.bias"][48:96])


def test_a_replay_that_would_not_be_exact_is_done_normally(vit, monkeypatch):
    file, _ = vit
    exact = dict(blueprint(Model(image_size=64, options=VIT, weights=file), 10).tensors(0))

    def differs(*_args):
        raise ReplayDiffers("for this test")
        yield

    plan = blueprint(Model(image_size=64, options=VIT, weights=file), 10)
    monkeypatch.setattr(first_values, "replay", differs)
    plan.module.to_empty(device="cpu")  # by then the module may be anything
    assert all(torch.equal(value, exact[name]) for name, value in plan.tensors(0))


def test_a_filter_that_fails_is_a_mistake_of_the_configuration(vit, monkeypatch):
    def fails(state: State, model: torch.nn.Module) -> State:
        raise KeyError("encoder")

    with pytest.raises(UserError, match=r"^model\.weights: .*does not fit this model \('encoder'\); check model\.name"):
        filtered(monkeypatch, vit[0], fails)
