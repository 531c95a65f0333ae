"""``bigvision recipe from-timm ARGS.yaml``: the options of timm's train.py, as it saves them, as a recipe.

What cannot be taken over is listed, a line each, so that nothing is dropped in silence.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from bigvision.checkpoint.commands import Parser
from bigvision.config import load_config
from bigvision.config.values import parse
from bigvision.disk import sync_folder, write_new
from bigvision.errors import UserError, nearest

COMMANDS = ("from-timm",)
UNLIKE: dict[str, tuple[Any, str]] = {
    "aug_splits": (0, "augmentation splits are not there"),
    "bce_pos_weight": (None, "binary cross-entropy is the mean over the classes, with targets as they are"),
    "bce_sum": (False, "binary cross-entropy is the mean over the classes, with targets as they are"),
    "bce_target_thresh": (None, "binary cross-entropy is the mean over the classes, with targets as they are"),
    "bn_eps": (None, "BatchNorm's eps is the model's"),
    "bn_momentum": (None, "BatchNorm's momentum is the model's"),
    "class_map": ("", "write the classes in the order of their labels to a file, one on a line, and name it in data.classes"),
    "color_jitter_prob": (None, "colours of every image change"),
    "cooldown_epochs": (0, "a run ends with its schedule"),
    "crop_pct": (None, "images are cropped as the model's card says"),
    "cutmix_minmax": (None, "CutMix draws its share from a Beta distribution"),
    "epoch_repeats": (0, "raise train.epochs"),
    "gaussian_blur_prob": (None, "only data.policy blurs"),
    "grayscale_prob": (None, "only data.policy makes images grey"),
    "head_init_bias": (None, "the head begins as timm makes it"),
    "head_init_scale": (None, "the head begins as timm makes it"),
    "initial_checkpoint": ("", "rewrite it with bigvision convert, and name the new file in model.weights"),
    "interpolation": ("", "images are resized as the model's card says"),
    "jsd_loss": (False, "the loss is cross-entropy"),
    "kd_model_name": (None, "there is no teacher"),
    "layer_decay_min_scale": (0, "layer decay has no lower end"),
    "layer_decay_no_opt_scale": (None, "every layer is trained"),
    "lr_cycle_limit": (1, "schedules have one cycle"),
    "lr_k_decay": (1.0, "schedules have no k-decay"),
    "lr_noise": (None, "rates have no noise"),
    "mean": (None, "images are normalised as the model's card says"),
    "mixup_off_epoch": (0, "mixing lasts to the end"),
    "mixup_prob": (1.0, "every sample is mixed"),
    "mixup_switch_prob": (0.5, "mixup and CutMix are drawn equally often"),
    "model_dtype": (None, "see parallel.precision: weights stay fp32"),
    "model_ema_force_cpu": (False, "the average is where the weights are"),
    "naflex_loader": (False, "all images of a run have one size"),
    "opt_eps": (None, "each optimizer has its usual eps"),
    "opt_kwargs": ({}, "see the section optim"),
    "pretrained_path": (None, "rewrite it with bigvision convert, and name the new file in model.weights"),
    "ratio": ([3 / 4, 4 / 3], "crops have aspect ratios from 3/4 to 4/3"),
    "recount": (1, "one rectangle is erased"),
    "remode": ("pixel", "erased rectangles are filled with noise"),
    "resume": ("", "a checkpoint of timm's is no run of bigvision's: begin anew"),
    "split_bn": (False, "BatchNorm is not split"),
    "std": (None, "images are normalised as the model's card says"),
    "torchscript": (False, "torch.compile has taken its place: parallel.compile"),
    "train_crop_mode": (None, "training images are random crops (data.crop_scale)"),
    "train_img_sizes": (None, "all training images have the size model.image_size"),
    "train_interpolation": ("random", "training images are resized as the model's card says"),
    "train_split": ("train", "name the folder itself in data.train"),
    "tta": (0, "images are evaluated once"),
    "val_interval": (1, "write train.eval_every, in steps"),
    "val_split": ("validation", "name the folder itself in data.val"),
    "warmup_lr": (1e-5, "the rate rises from 0"),
    "warmup_prefix": (False, "the warm-up is part of train.epochs"),
}  # fmt: skip
"""Options of timm's without a key here: timm's default, with which nothing is reported, and what happens in their place."""
WITHOUT_EFFECT = {
    "checkpoint_hist", "config", "dataset_download", "dataset_trust_remote_code", "decay_epochs", "decay_milestones",
    "decay_rate", "device_modules", "dist_bn", "distill_loss_weight", "fast_norm", "fuser", "input_img_mode", "input_key",
    "kd_distill_type", "kd_loss_type", "kd_student_feature_dim", "kd_teacher_feature_dim", "kd_temperature",
    "kd_token_distill_type", "local_rank", "log_interval", "lr_cycle_decay", "lr_cycle_mul", "lr_noise_pct", "lr_noise_std",
    "naflex_loss_scale", "naflex_max_seq_len", "naflex_patch_size_probs", "naflex_patch_sizes",
    "naflex_patchify_channels_first",
    "naflex_train_seq_lens", "no_ddp_bb", "no_prefetcher", "no_resume_opt", "patience_epochs", "pin_mem", "recovery_interval",
    "resplit", "save_images", "start_epoch", "synchronize_step", "target_key", "task_loss_weight", "torchcompile_mode",
    "train_batch_sizes", "train_batches_per_epoch", "train_num_samples", "train_size_probs", "train_size_random_mix",
    "train_size_schedule", "train_size_schedule_spread", "use_multi_epochs_loader", "val_num_samples", "validation_batch_size",
    "variable_batch_loss_scale", "wandb_project", "wandb_resume_id", "wandb_tags", "worker_seeding",
}  # fmt: skip
"""Those that change how a run is logged or fed and not what it learns, or that only mean something beside another option."""
OPTIMIZERS = {
    "adamw": "adamw", "fusedadamw": "adamw", "sgd": "sgd", "nesterov": "sgd", "fusedsgd": "sgd", "lion": "lion", "lamb": "lamb",
    "lambw": "lamb", "fusedlamb": "lamb", "adafactorbv": "adafactor", "muon": "muon",
}  # fmt: skip
POLICIES = {"original": "autoaugment", "v0": "autoaugment", "3a": "three-augment"}
DATASETS = {"torch/cifar10": "cifar10", "torch/cifar100": "cifar100", "torch/mnist": "mnist", "torch/image_folder": ""}


def run(arguments: list[str]) -> int:
    """``recipe from-timm ARGS.yaml [--ranks N] [--out FILE]``."""
    command, *rest = arguments or ["--help"]
    if command not in (*COMMANDS, "-h", "--help"):
        raise UserError(f"recipe: unknown command {command!r}{nearest(command, COMMANDS)}; there is from-timm")
    parser = Parser(
        "bigvision recipe from-timm",
        "Take over the options of a run of timm's, the args.yaml that its train.py writes into its folder: prints a recipe, "
        "and on standard error a line for each option that it cannot take over.",
    )
    parser.add_argument("file", metavar="ARGS.yaml", type=Path, help="timm's file")
    parser.add_argument("--ranks", metavar="N", type=int, help="GPUs of timm's run, which its file does not tell (default: 1)")
    parser.add_argument("--out", metavar="FILE", type=Path, help="write the recipe to a new file instead of printing it")
    flags = parser.read(rest if command in COMMANDS else ["--help"])
    if flags.ranks is not None and flags.ranks < 1:
        raise UserError(f"--ranks: {flags.ranks} must be at least 1")
    notes: list[str] = []
    recipe = translate(read(flags.file), flags.ranks, notes.append, str(flags.file))
    text = f"# Taken over from {flags.file.name} of timm's train.py.\n{yaml.safe_dump(recipe, sort_keys=False)}"
    if flags.out is None:
        print(text, end="")
    else:
        try:
            write_new(flags.out, text.encode())
            sync_folder(flags.out.absolute().parent)
        except FileExistsError:
            raise UserError(f"--out: {flags.out} is there already: name another file, or move it away") from None
        except OSError as error:
            raise UserError(f"--out: {flags.out} cannot be written ({error.strerror})") from None
    for note in notes:
        print(note, file=sys.stderr)
    return 0


def read(path: Path) -> dict[str, Any]:
    """The options in timm's file *path*."""
    try:
        text = path.expanduser().read_bytes().decode()
    except OSError as error:
        raise UserError(f"recipe from-timm: {path} cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise UserError(f"recipe from-timm: {path} is no text: name the args.yaml of a run") from None
    found = parse(text, f"recipe from-timm: {path}")
    if not isinstance(found, Mapping) or not isinstance(found.get("model"), str):
        raise UserError(
            f"recipe from-timm: {path} is no file of timm's options: it needs lines such as 'model: resnet50' and 'lr: 0.1'"
        )
    return {str(key): value for key, value in found.items()}


class Options:
    """timm's options, each read once; what is left over was not taken over."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.values, self.where = values, where
        self.taken = set[str]()

    def get(self, key: str, default: Any = None) -> Any:
        """The value as it stands, or *default* where it is missing or null."""
        self.taken.add(key)
        value = self.values.get(key)
        return default if value is None else value

    def number(self, key: str, default: float | None = None, kind: Callable[[Any], float] = float) -> Any:
        """A number of the type *kind*."""
        value = self.get(key, default)
        try:
            if value is None or (not isinstance(value, bool) and kind(value) == float(value)):
                return None if value is None else kind(value)
        except (TypeError, ValueError, OverflowError):
            pass
        raise UserError(f"{self.where}: {key}: {value!r} is not a {'whole ' if kind is int else ''}number")

    def numbers(self, key: str, kind: Callable[[Any], float] = float) -> list[Any] | None:
        """A list of numbers."""
        if (value := self.get(key)) is None:
            return None
        try:
            return [kind(one) for one in value]
        except (TypeError, ValueError):
            raise UserError(f"{self.where}: {key}: {value!r} is not a list of numbers") from None

    def flag(self, key: str) -> bool:
        """A value that is true or false, false where it is missing."""
        if not isinstance(value := self.get(key, False), bool):
            raise UserError(f"{self.where}: {key}: {value!r} is not true or false")
        return value

    def text(self, key: str, default: str = "") -> str:
        if not isinstance(value := self.get(key, default), str):
            raise UserError(f"{self.where}: {key}: {value!r} is not a text")
        return value


def translate(values: Mapping[str, Any], ranks: int | None, say: Callable[[str], None], where: str) -> dict[str, Any]:
    """Return the recipe for the options *values* of a run on so many *ranks*; *say* gets a line for what it leaves out."""
    options = Options(values, where)
    recipe: dict[str, Any] = {}
    output, experiment = options.text("output"), options.text("experiment")
    if experiment:
        recipe["out"] = str(Path(output or "output/train", experiment))
    recipe["seed"] = options.number("seed", 42, int)
    recipe |= {
        "model": _model(options),
        "task": _task(options, say),
        "data": _data(options, say),
        "optim": _optim(options, say),
        "ema": _ema(options),
        "parallel": _parallel(options, say),
        "train": _train(options, ranks, say),
        "checkpoint": _checkpoint(options, say),
        "monitor": {"trackers": ["wandb"]} if options.flag("log_wandb") else {},
    }
    for key, value in values.items():
        if key in options.taken or key in WITHOUT_EFFECT:
            continue
        default, instead = UNLIKE.get(key, (None, ""))
        if key not in UNLIKE:
            say(f"{key}: {value!r} is not taken over: it is no option of timm's train.py that is known here")
        elif value is not None and value != default:
            say(f"{key}: {value!r} is not taken over: {instead}")
    recipe = {key: value for key, value in recipe.items() if value != {}}
    try:
        load_config(recipe)
    except UserError as error:
        raise UserError(f"{where}: it makes a recipe that cannot run: {error}") from None
    return recipe


def _model(options: Options) -> dict[str, Any]:
    keys: dict[str, Any] = {"name": options.text("model")}
    if options.flag("pretrained"):
        keys["pretrained"] = True
    extra = options.get("model_kwargs", {})
    if not isinstance(extra, Mapping):
        raise UserError(f"{options.where}: model_kwargs: {extra!r} is not a mapping of names to values")
    extra, size = dict(extra), options.number("img_size", None, int)
    channels, shape = options.number("in_chans", None, int), options.numbers("input_size", int)
    if shape is not None:
        if len(shape) != 3:
            raise UserError(f"{options.where}: input_size: {shape} is not a list of channels, height and width")
        channels, size = channels or shape[0], shape[1] if shape[1] == shape[2] else shape[1:]
    if size is not None:
        keys["image_size"] = size
    if (classes := options.number("num_classes", None, int)) is not None:
        keys["num_classes"] = classes
    if channels not in (None, 3):
        extra["in_chans"] = channels
    for name, key in (("gp", "global_pool"), ("drop", "drop_rate"), ("drop_block", "drop_block_rate")):
        if value := options.get(name):
            extra[key] = value
    if (rate := options.number("drop_path")) or (rate := options.number("drop_connect")):
        keys["drop_path"] = rate
    if options.flag("sync_bn"):
        keys["sync_batchnorm"] = True
    return keys | ({"options": extra} if extra else {})


def _task(options: Options, say: Callable[[str], None]) -> dict[str, Any]:
    smoothing, mixup, cutmix = options.number("smoothing", 0.1), options.number("mixup", 0.0), options.number("cutmix", 0.0)
    keys: dict[str, Any] = {"loss": "bce"} if options.flag("bce_loss") else {}
    keys["label_smoothing"] = smoothing
    mode = options.text("mixup_mode", "batch")
    if mixup or cutmix:
        keys |= {"mixup": mixup, "cutmix": cutmix, "mix_each": "batch" if mode == "batch" else "pair"}
        if mode == "elem":
            say("mixup_mode: 'elem' becomes task.mix_each: pair, where both samples of a pair are mixed alike")
    return keys


def _data(options: Options, say: Callable[[str], None]) -> dict[str, Any]:
    folder, dataset = options.text("data_dir") or options.text("data"), options.text("dataset")
    options.taken.add("data")
    keys: dict[str, Any] = {"workers": options.number("workers", 4, int)}
    if dataset and dataset not in DATASETS:
        say(f"dataset: {dataset!r} is not taken over: write data.train and data.val, as 'bigvision train --help' lists them")
    elif name := DATASETS.get(dataset, ""):
        keys |= {"train": name, "val": name} | ({"root": folder} if folder else {})
    elif folder:
        keys |= {"train": f"imagefolder:{folder}", "val": f"imagefolder:{folder}"}
    else:
        say("data_dir: it names no images: write data.train and data.val")
    if options.flag("no_aug"):
        return keys | {"augment": False}
    if (scale := options.numbers("scale")) is not None and scale != [0.08, 1.0]:
        keys["crop_scale"] = scale
    for name, usual in (("hflip", 0.5), ("vflip", 0.0)):
        if (share := options.number(name, usual)) != usual:
            keys[name] = share
    policy, jitter = options.text("aa"), options.number("color_jitter", 0.4)
    kind = "randaugment" if policy.startswith("rand") else POLICIES.get(policy)
    if kind is not None:
        keys["policy"] = kind
        if kind == "randaugment" and policy != "rand-m9-n2":
            say(f"aa: {policy!r} becomes data.policy: randaugment, which is torchvision's: 2 operations of magnitude 9")
    elif policy:
        say(f"aa: {policy!r} is not taken over: data.policy has randaugment, autoaugment, trivialaugment and three-augment")
    # timm changes colours beside 3-Augment, and in the place of another policy.
    if jitter and kind in (None, "three-augment"):
        keys["jitter"] = jitter
        say(f"color_jitter: {jitter} becomes data.jitter, which changes the hue too, by a quarter of it")
    if erase := options.number("reprob", 0.0):
        keys["erase"] = erase
    if (repeats := options.number("aug_repeats", 0)) > 1:
        keys["repeats"] = round(repeats)
    return keys


def _optim(options: Options, say: Callable[[str], None]) -> dict[str, Any]:
    asked = options.text("opt", "sgd")
    name = OPTIMIZERS.get(asked.lower().replace("_", ""))
    if name is None:
        name = "sgd" if asked == "momentum" else "adamw"
        why = "momentum is Nesterov's" if asked == "momentum" else f"there are {', '.join(dict.fromkeys(OPTIMIZERS.values()))}"
        say(f"opt: {asked!r} becomes optim.name: {name}: {why}")
    keys: dict[str, Any] = {"name": name}
    if (rate := options.number("lr")) is not None and rate > 0:
        keys["lr"] = rate
        options.taken |= {"lr_base", "lr_base_size", "lr_base_scale"}
    else:
        root = any(part in asked.lower() for part in ("ada", "lamb"))
        keys |= {"lr": options.number("lr_base", 0.1), "lr_base_size": options.number("lr_base_size", 256, int)}
        keys["lr_base_scale"] = options.text("lr_base_scale") or ("sqrt" if root else "linear")
    keys["weight_decay"] = options.number("weight_decay", 2e-5)
    betas, momentum = options.numbers("opt_betas"), options.number("momentum", 0.9)
    if betas is not None and name != "sgd":
        keys["betas"] = betas
    if name in ("sgd", "muon"):
        keys["momentum"] = momentum
    clip, mode = options.number("clip_grad"), options.text("clip_mode", "norm")
    if clip is not None and mode != "norm":
        say(f"clip_mode: {mode!r} is not taken over: gradients are clipped by the norm of all; optim.clip is null")
        clip = None
    elif clip is None and name == "lamb":
        clip = 1.0  # timm's and apex's LAMB clip by themselves
    keys["clip"] = clip
    if (decay := options.number("layer_decay")) is not None:
        keys["layer_decay"] = decay
    return keys | _schedule(options, say)


def _schedule(options: Options, say: Callable[[str], None]) -> dict[str, Any]:
    asked, epochs = options.text("sched", "cosine"), options.number("epochs", 300, int)
    if epochs <= 0:
        raise UserError(f"{options.where}: epochs: {epochs} must be above 0")
    if not options.flag("sched_on_updates"):
        say("sched_on_updates: false is not taken over: the learning rate moves with each step, not once an epoch")
    warmup = options.number("warmup_epochs", 5) / epochs
    if warmup >= 1:
        say(f"warmup_epochs: {options.get('warmup_epochs', 5)} of {epochs} epochs is not taken over: optim.warmup is 0")
        warmup = 0.0
    keys: dict[str, Any] = {"warmup": round(warmup, 9)}
    gamma = options.number("decay_rate", 0.1)
    if asked in ("step", "multistep"):
        every = options.number("decay_epochs", 90)
        if every <= 0:
            raise UserError(f"{options.where}: decay_epochs: {every:g} must be above 0")
        at = [every * n for n in range(1, int(epochs / every) + 1)]
        at = (options.numbers("decay_milestones") or [90.0, 180.0, 270.0]) if asked == "multistep" else at
        if shares := [round(one / epochs, 9) for one in at if one < epochs]:
            return keys | {"schedule": "step", "milestones": shares, "gamma": gamma}
        return keys | {"schedule": "constant"}
    if asked in ("", "none"):
        return keys | {"schedule": "constant"}
    if asked not in ("cosine", "poly"):
        say(f"sched: {asked!r} becomes optim.schedule: cosine: write another, and its keys, where you need it")
    low = options.number("min_lr", 0.0)
    if asked == "poly":
        keys["power"] = gamma  # that is what timm takes
    return keys | {"schedule": "poly" if asked == "poly" else "cosine", "min_lr": low}


def _ema(options: Options) -> dict[str, Any]:
    kept, decay, warmup = options.flag("model_ema"), options.number("model_ema_decay", 0.9998), options.flag("model_ema_warmup")
    return {"decay": decay, "warmup": warmup} if kept else {}


def _parallel(options: Options, say: Callable[[str], None]) -> dict[str, Any]:
    mixed, kind = options.flag("amp"), options.text("amp_dtype", "float16")
    keys: dict[str, Any] = {"strategy": "ddp", "precision": "fp32"}
    if mixed and kind not in ("float16", "bfloat16"):
        raise UserError(f"{options.where}: amp_dtype: {kind!r} is neither float16 nor bfloat16")
    if mixed:
        keys["precision"] = "amp_bf16" if kind == "bfloat16" else "fp16"
        if kind == "float16":
            say("amp_dtype: 'float16' becomes parallel.precision: fp16, which casts the weights and has no autocast")
    if options.flag("channels_last"):
        keys["channels_last"] = "always"
    if options.flag("grad_checkpointing"):
        keys["recompute"] = "blocks"
    compiler = options.get("torchcompile")
    keys["compile"] = bool(compiler)
    if compiler and compiler != "inductor":
        say(f"torchcompile: {compiler!r} becomes parallel.compile: true, with inductor")
    if options.text("device", "cuda").startswith("cpu"):
        keys["device"] = "cpu"
    return keys


def _train(options: Options, ranks: int | None, say: Callable[[str], None]) -> dict[str, Any]:
    size, passes = options.number("batch_size", 128, int), options.number("grad_accum_steps", 1, int)
    if size < 1 or passes < 1:
        raise UserError(f"{options.where}: batch_size: {size} and grad_accum_steps: {passes} must be at least 1")
    if ranks is None:
        say(
            f"batch_size: {size} is that of one GPU, and the file does not tell how many there were: train.global_batch is "
            f"{size * passes}, that of one; give --ranks N"
        )
    return {
        "epochs": options.number("epochs", 300, int), "global_batch": size * passes * (ranks or 1), "micro_batch": size,
    }  # fmt: skip


def _checkpoint(options: Options, say: Callable[[str], None]) -> dict[str, Any]:
    metric = options.text("eval_metric", "top1")
    if metric not in ("top1", "top5", "loss"):
        say(f"eval_metric: {metric!r} is not taken over: checkpoint.keep_best has loss, top1 and top5")
        return {}
    return {"keep_best": metric}
