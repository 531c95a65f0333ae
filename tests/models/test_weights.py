"""Values from files, model cards, and what is said about mistakes."""

from __future__ import annotations

import json

import pytest
import timm
import torch
from safetensors.torch import save_file

from bigvision.errors import UserError
from bigvision.models import blueprint, check_model, model_card
from bigvision.models.arguments import current_name
from tests.models.configs import TINY, Model
from tests.models.test_build import materialised


@pytest.fixture(scope="module")
def vit():
    torch.manual_seed(3)
    return timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=10, **TINY)


@pytest.fixture
def file(vit, tmp_path):
    save_file(vit.state_dict(), tmp_path / "vit.safetensors")
    return str(tmp_path / "vit.safetensors")


def model(**changes) -> Model:
    return Model(**{"image_size": 32, "options": dict(TINY), **changes})


def test_values_come_from_the_file(vit, file):
    plan = blueprint(model(weights=file), 10)
    values = dict(plan.tensors(0))
    assert plan.note is None and values.keys() == vit.state_dict().keys()
    assert all(torch.equal(values[name], tensor) for name, tensor in vit.state_dict().items())


def test_a_half_precision_file_gives_full_precision_values(vit, tmp_path):
    save_file({name: tensor.bfloat16() for name, tensor in vit.state_dict().items()}, tmp_path / "half.safetensors")
    values = dict(blueprint(model(weights=str(tmp_path / "half.safetensors")), 10).tensors(0))
    assert all(value.dtype == torch.float32 for value in values.values())


def test_position_embeddings_are_resampled_as_timm_does(file):
    plan = blueprint(model(weights=file, image_size=64), 10)
    overlay = {"file": file, "num_classes": 10}
    options = dict(TINY, img_size=64, num_classes=10)
    theirs = timm.create_model("vit_tiny_patch16_224", pretrained=True, pretrained_cfg_overlay=overlay, **options)
    values = dict(plan.tensors(0))
    assert all(torch.equal(values[name], tensor) for name, tensor in theirs.state_dict().items())


def test_a_head_of_other_size_starts_fresh_unless_it_was_asked_for(file):
    plan = blueprint(model(weights=file), 4)
    values, fresh = dict(plan.tensors(5)), dict(blueprint(model(), 4).tensors(5))
    assert "head.weight" in plan.note and "fresh" in plan.note
    assert torch.equal(values["head.weight"], fresh["head.weight"])
    assert not torch.equal(values["patch_embed.proj.weight"], fresh["patch_embed.proj.weight"])
    with pytest.raises(UserError, match=r"model\.num_classes: 4 does not fit the 10 classes of .*null"):
        blueprint(model(weights=file, num_classes=4), 4)
    assert blueprint(model(weights=file, num_classes=10), 10).note is None


def test_a_classifier_of_another_name_is_left_out_and_nothing_else(vit, tmp_path):
    def plan(names, more=()):
        state = {name.replace("head.", names): tensor.clone() for name, tensor in vit.state_dict().items()} | dict(more)
        save_file(state, tmp_path / "other.safetensors")
        return blueprint(model(weights=str(tmp_path / "other.safetensors")), 10)

    for name in ("fc", "classifier", "heads.out"):
        assert f"{name} of {tmp_path}/other.safetensors, a classifier by its shape, is left out" in plan(f"{name}.").note
    width = vit.state_dict()["norm.weight"].shape[0]
    for names, more in (
        ("fc.", {"blocks.9.norm1.weight": torch.ones(width)}),  # of a deeper model
        ("blocks.9.", {}),
        ("fc.", {"fc.scale": torch.ones(1)}),
        ("head.", {"fc.weight": torch.ones(3, width)}),  # two classifiers
    ):
        with pytest.raises(UserError, match="unknown to the model"):
            plan(names, more)


def test_batch_counters_may_be_missing_and_are_zero(tmp_path):
    state = timm.create_model("test_resnet", num_classes=3).state_dict()
    save_file({name: t for name, t in state.items() if "num_batches" not in name}, tmp_path / "old.safetensors")
    values = dict(blueprint(Model("test_resnet", weights=str(tmp_path / "old.safetensors")), 3).tensors(0))
    assert values["bn1.num_batches_tracked"].item() == 0
    assert torch.equal(values["bn1.weight"], state["bn1.weight"])


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda state: state.pop("norm.weight"), r"lacks norm\.weight \(1 such\)"),
        (lambda state: state.update(extra=torch.zeros(1)), r"has, unknown to the model, extra \(1 such\)"),
        (lambda state: state.update({"norm.bias": torch.zeros(5)}), r"norm\.bias is \(5,\) in .* and \(48,\) in the model"),
    ],
)
def test_a_file_of_another_model_is_refused(vit, tmp_path, change, message):
    state = dict(vit.state_dict())
    change(state)
    save_file(state, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=message):
        blueprint(model(weights=str(tmp_path / "other.safetensors")), 10)


def test_a_normal_build_takes_the_file_too(file, monkeypatch):
    from bigvision.models.exact_init import first_values
    from bigvision.models.exact_init.trace import NotRecordable

    def refuse(recorder, named):
        raise NotRecordable("for this test")

    monkeypatch.setattr(first_values, "_views", refuse)
    plan = blueprint(model(weights=file), 4)
    assert not plan.recorded and "for this test" in plan.note and "fresh" in plan.note
    monkeypatch.undo()
    recorded = dict(blueprint(model(weights=file), 4).tensors(5))
    assert all(torch.equal(recorded[name], value) for name, value in plan.tensors(5))


@pytest.mark.parametrize(
    "config, message",
    [
        (Model("vit_tiny_patch16_244"), r"^model\.name: 'vit_tiny_patch16_244' is not a timm .*mean 'vit_tiny_patch16_"),
        (Model("hf-hub:timm/resnet18"), r"^model\.name: 'hf-hub:timm/resnet18' is not one of timm's repositories"),
        (Model("facebook/dinov2-base"), r"^model\.name: 'facebook/dinov2-base' is not .* model\.weights"),
        (Model("local-dir:/no/such"), r"^model\.name: local-dir:/no/such: write the architecture .* model\.weights: /no/such"),
        (Model("ResNet18"), r"^model\.name: 'ResNet18' is not a timm model; did you mean 'resnet18'"),
        (Model("resnet18.a9_in1k"), r"timm has no weights 'resnet18\.a9_in1k'; did you mean 'resnet18\.a.* or .*\(7 in all"),
        (Model("vit_tiny_patch16_224", pretrained=True, weights="x.safetensors"), "exclude each other; keep one"),
        (Model(drop_path=1.0), r"^model\.drop_path: 1\.0 is not a rate"),
        (Model(image_size=0), r"^model\.image_size: 0 is not a size"),
        (Model(image_size=(32, 0)), r"^model\.image_size: \(32, 0\) is not a size"),
    ],
)
def test_mistakes_seen_before_building(config, message):
    with pytest.raises(UserError, match=message) as caught:
        check_model(config)
    assert "\n" not in str(caught.value)


PREFIXES = ["module.", "model.", "backbone.", "net.encoder.", "module.visual.", "_orig_mod.base_model.", "ema.module."]


@pytest.mark.parametrize("prefix", PREFIXES)
def test_names_with_what_a_training_program_puts_before_them(vit, tmp_path, prefix):
    """Per-block compile in them too, and beside them what is no part of the model."""
    state = {prefix + name.replace("blocks.1.", "blocks.1._orig_mod."): value for name, value in vit.state_dict().items()}
    state |= {"n_averaged": torch.tensor(3), "loss.weight": torch.ones(10)}
    save_file(state, tmp_path / "x.safetensors")
    plan = blueprint(model(weights=str(tmp_path / "x.safetensors"), num_classes=10), 10)
    values = dict(plan.tensors(0))
    assert all(torch.equal(values[name], value) for name, value in vit.state_dict().items())
    begin = prefix.removeprefix("_orig_mod.")
    assert f"whose names begin with {begin}; 2 others are left out, such as" in plan.note
    assert set(plan.runs()) == values.keys(), "read run by run, as without a prefix"


def test_a_student_and_a_teacher(vit, tmp_path):
    path, state = tmp_path / "dino.safetensors", vit.state_dict()
    both = {f"student.backbone.{name}": value for name, value in state.items()}
    both |= {f"teacher.backbone.{name}": value + 1 for name, value in state.items() if not name.startswith("head")}
    save_file(both, path)
    words = r"^model\.weights: .* under student\.backbone\. or teacher\.backbone\.: .*\?prefix=teacher\.backbone\.$"
    with pytest.raises(UserError, match=words):
        blueprint(model(weights=str(path)), 10)
    plan = blueprint(model(weights=f"{path}?prefix=teacher.backbone."), 10)
    assert torch.equal(dict(plan.tensors(0))["norm.weight"], state["norm.weight"] + 1)
    assert "(head.weight) starts fresh" in plan.note and "has none" in plan.note
    with pytest.raises(UserError, match=r"has no tensor whose name begins with tutor\."):
        blueprint(model(weights=f"{path}?prefix=tutor."), 10)
    with pytest.raises(UserError, match=r"check model\.name and model\.options"):
        blueprint(model(weights=f"{path}?prefix="), 10)
    save_file({"student.x": torch.ones(1), "weight": torch.ones(1)}, path)
    with pytest.raises(UserError, match=r"check model\.name and model\.options"):
        blueprint(model(weights=str(path)), 10)


@pytest.mark.parametrize(
    "name, current",
    [
        ("vit_tiny_patch16_224_in21k", "vit_tiny_patch16_224.augreg_in21k"),
        ("tf_efficientnet_b0_ns", "tf_efficientnet_b0.ns_jft_in1k"),
        ("efficientnet_b2a", "efficientnet_b2"),
        ("hf-hub:timm/resnet18.a1_in1k", "resnet18.a1_in1k"),
        ("hf_hub:timm/resnet18.a1_in1k", "resnet18.a1_in1k"),
        ("timm/resnet18.a1_in1k", "resnet18.a1_in1k"),
        ("resnet18", "resnet18"),
    ],
)
def test_older_names_and_those_of_timms_repositories(name, current):
    assert current_name(name)[0] == current and (current_name(name)[1] is None) == (name == current)
    check_model(Model(name, pretrained="b2" not in name))


def test_an_older_name_builds_what_it_is_called_now():
    for old, new in (("vit_tiny_patch16_224_in21k", "vit_tiny_patch16_224.augreg_in21k"),):
        plans = [blueprint(Model(name, image_size=32, options=dict(TINY)), 10) for name in (old, new)]
        assert plans[0].note == f"model.name: {old} is called {new} in timm {timm.__version__}" and plans[1].note is None
        values = [dict(plan.tensors(3)) for plan in plans]
        assert values[0].keys() == values[1].keys() and all(torch.equal(values[0][n], values[1][n]) for n in values[0])
    assert all(current_name(name)[0] == current for name, current in timm.models.get_deprecated_models().items())


@pytest.mark.parametrize(
    "config, message",
    [
        (Model(options={"dept": 3}), r"^model\.options\.dept: .*did you mean 'depth'"),
        (Model(options={"depth": "x"}), r"^model\.options\.depth: .*cannot be built with 'x'"),
        (Model(options={"img_size": 3}), r"^model\.options\.img_size: .*model\.image_size"),
        (Model(options={"checkpoint_path": "x.pth"}), r"^model\.options\.checkpoint_path: "),
        (Model("hrnet_w18_small", options={"dept": 3}), r"^model\.options\.dept: "),
        (Model("vgg11", drop_path=0.1), r"^model\.drop_path: vgg11 has no stochastic depth"),
        (Model(image_size=8), r"^model\.image_size: .*8 x 8 pixels"),
        (Model(image_size=(8, 32)), r"^model\.image_size: .*8 x 32 pixels"),
        (Model("convnext_atto", image_size=(64, 8)), r"^model\.image_size: .*64 x 8 pixels"),
        (Model("convnext_atto", image_size=8), r"^model\.image_size: .*8 x 8 pixels"),
    ],
)
def test_mistakes_seen_while_building(config, message):
    with pytest.raises(UserError, match=message) as caught:
        blueprint(config, 10)
    assert "\n" not in str(caught.value)


def test_good_configurations_pass_the_check(file):
    for config in (Model(), Model("resnet18.a1_in1k"), model(weights=file), Model("resnet18", pretrained=True)):
        check_model(config)


def test_pretrained_reads_the_safetensors_file_of_the_hub(vit, file, monkeypatch):
    import huggingface_hub

    asked = []
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *a, **k: asked.append((a, k)) or file)
    plan = blueprint(model(pretrained=True), 4)
    assert asked[0][0] == ("timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k", "model.safetensors")
    assert "(head.weight) starts fresh: the classes of" in plan.note, (
        "timm drops a classifier of other classes, which the file has"
    )
    assert torch.equal(dict(plan.tensors(0))["norm.weight"], vit.state_dict()["norm.weight"])


def test_pretrained_without_network_says_what_to_do(monkeypatch):
    import huggingface_hub

    def unreachable(*_args, **_kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", unreachable)
    with pytest.raises(UserError, match=r"^model\.pretrained: .*no route to host.*set model\.weights to it"):
        blueprint(model(pretrained=True), 10)


@pytest.mark.parametrize(
    "config",
    [
        model(drop_path=0.1),
        Model("test_resnet", image_size=64),
        Model("swin_tiny_patch4_window7_224", image_size=64, options={"depths": (1, 1, 1, 1)}),
        Model("vit_tiny_patch16_224.augreg_in21k", image_size=48, options={"depth": 2, "in_chans": 1, "patch_size": 8}),
        model(image_size=(64, 32)),
        Model("test_vit.r160_in1k", image_size=(64, 32)),
        Model("convnextv2_nano.fcmae_ft_in22k_in1k_384", image_size=64, options={"depths": (1, 1, 1, 1)}),  # squash
        Model("deepseek_vit_412m.deepseek_v4_flash_vision_exp", image_size=56, options={"depth": 1}),  # border
    ],
    ids=lambda config: f"{config.name} {config.image_size}",
)
def test_timm_opens_what_the_card_describes(config, tmp_path):
    plan = blueprint(config, 7)
    card = model_card(plan.module, image_size=plan.image_size, mean=plan.mean, std=plan.std)
    module = materialised(plan).eval()
    (tmp_path / "config.json").write_text(json.dumps(card))
    save_file(module.state_dict(), tmp_path / "model.safetensors")
    opened = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    images = torch.randn(2, *plan.input_shape)
    with torch.no_grad():
        assert torch.equal(opened(images), module(images))
    data = timm.data.resolve_model_data_config(opened)
    assert data["input_size"] == plan.input_shape
    assert (tuple(data["mean"]), tuple(data["std"])) == (plan.mean, plan.std)
    seen = [data[key] for key in ("interpolation", "crop_pct", "crop_mode")]
    assert seen == [plan.interpolation, plan.crop_pct, plan.crop_mode]
    normal = timm.data.resolve_model_data_config(timm.create_model(config.name, **plan.arguments | {"pretrained": False}))
    assert seen == [normal[key] for key in ("interpolation", "crop_pct", "crop_mode")]


def test_a_tied_tensor_may_be_in_the_file_under_any_of_its_names(tmp_path):
    options = {"embed_dims": [16] * 4, "serial_depths": [1, 1, 1, 1], "parallel_depth": 2}
    torch.manual_seed(3)
    state = timm.create_model("coat_tiny", img_size=32, num_classes=10, **options).state_dict()
    ties = [name for name in state if name.startswith("cpe1.proj")]
    others = [name for name in state if name.endswith((".cpe.proj.weight", ".cpe.proj.bias")) and "blocks1." in name]
    assert len(ties) == 2 and len(others) == 2
    for dropped in (ties, others):
        file = tmp_path / f"{len(list(tmp_path.iterdir()))}.safetensors"
        save_file({name: tensor.clone() for name, tensor in state.items() if name not in dropped}, file)
        plan = blueprint(Model("coat_tiny", image_size=32, options=options, weights=str(file)), 10)
        assert set(plan.runs()) == set(state)
        assert all(torch.equal(value, state[name]) for name, value in plan.tensors(0))
