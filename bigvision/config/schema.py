"""The run configuration as dataclasses: each field is a YAML key and a flag, and its docstring is the help."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class LoraConfig:
    """`model.lora`."""

    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] | None = None


@dataclass(frozen=True)
class ModelConfig:
    name: str = "vit_tiny_patch16_224"
    """A timm model name, with or without a weights tag."""
    pretrained: bool = False
    """Start from timm's pretrained weights (needs a network or timm's cache)."""
    weights: str | None = None
    """Start from this .safetensors file, its index, or a folder with one of them, such as another run's step folder;
    FILE?prefix=teacher. takes a part of it. Excludes pretrained."""
    image_size: int | tuple[int, int] | None = None
    """Side of a square input in pixels, or [height, width]; null takes the model's own."""
    num_classes: int | None = None
    """Outputs of the classifier; null takes the number of classes in the data. Fewer than those is an error."""
    trainable: str | tuple[str, ...] = "all"
    """What is trained, the rest keeps its values: all, head (timm's classifier), last:N (the head and the last N layers, as
    optim.layer_decay counts them), or a list of names as in optim.groups, such as [head, '*.norm?']."""
    frozen_dtype: Literal["fp32", "bf16"] = "fp32"
    """The format in which what is not trained is held and saved. bf16 halves it; weights of BatchNorm and LSTMs stay fp32."""
    lora: LoraConfig | None = None
    """Low-rank adapters (Hu et al. 2021) beside linear layers, e.g. {rank: 8, alpha: 16, targets: ['*.qkv', '*.mlp']}. All else
    is frozen but the head, or what trainable names ([]: only adapters). targets: layers or modules with some, patterns as in
    optim.groups; null: the projections of attention and MLP in the blocks. What an adapter adds is scaled with alpha / rank."""
    drop_path: float = 0.0
    """Stochastic depth rate (Huang et al. 2016), from 0 to below 1."""
    drop_path_schedule: Literal["linear", "constant"] = "linear"
    """linear: the rate grows from 0 in the first block to drop_path in the last, as in timm. constant: it is drop_path in all
    blocks, as in DeiT III."""
    drop_path_mode: Literal["skip", "mask"] | None = None
    """skip: a residual branch runs only on the samples that it keeps, a fixed number of each micro-batch, where the model
    allows it: less work, measured on CPUs alone. mask: it runs on all samples, and the output of each is zeroed with the rate
    as probability, as in timm. null is skip, but a run that an earlier version began goes on with mask."""
    sync_batchnorm: bool = False
    """Take BatchNorm's statistics over the micro-batches of all data-parallel ranks, not of each one. Needs CUDA."""
    options: dict[str, Any] = field(default_factory=dict)
    """More keyword arguments for the timm constructor, e.g. '{patch_size: 4, depth: 6}'."""


@dataclass(frozen=True)
class TaskConfig:
    name: str = "classify"
    """What is learned: classify (one class for each image), multilabel (any number of classes), regress (numbers), segment (a
    class for each pixel). embed is evaluated only: neighbours and a linear probe of frozen features. A task of your own is
    given from Python."""
    loss: Literal["ce", "bce", "asymmetric", "l2", "l1", "huber", "dice", "ce+dice"] | None = None
    """classify: ce (cross-entropy) or bce (binary, of each class). multilabel: bce or asymmetric (Ridnik et al. 2021). regress:
    l2, l1 or huber. segment: ce, dice (of each sample) or ce+dice. null takes the first of these."""
    class_weights: str | tuple[float, ...] | None = None
    """classify: weights of the classes in the training loss: a number for each, balanced (the rarer, the heavier), or a file
    with a number on each line, or JSON. The loss is divided by the sum of the global batch's weights."""
    standardize: bool = True
    """regress: learn each number less its mean over the training data and divided by its standard deviation there."""
    decoder: Literal["fpn", "upernet", "unet", "dpt"] = "fpn"
    """segment: what is built around the backbone (segmentation_models_pytorch; bigvision[segment]). dpt is for ViTs, the others
    for models with several scales."""
    decoder_options: dict[str, Any] = field(default_factory=dict)
    """segment: its arguments, such as {decoder_pyramid_channels: 128, decoder_dropout: 0.0}."""
    ignore: int = 255
    """segment: the id in masks that stands for no label."""
    label_smoothing: float = 0.0
    """Weight of the uniform distribution in the target (Szegedy et al. 2016), in training only."""
    mixup: float = 0.0
    """Mix pairs of images and of labels (Zhang et al. 2018): parameter of the Beta distribution, often 0.8; 0 does not."""
    cutmix: float = 0.0
    """Put a rectangle of one image into another (Yun et al. 2019), often 1.0; with mixup each pair gets one of the two."""
    mix_each: Literal["pair", "batch"] = "pair"
    """How often it is drawn how to mix: for each pair of samples, or once for each step."""
    k: int = 20
    """embed: nearest training images that vote."""
    teacher: str | None = None
    """classify: learn from this model too (distillation): a timm name with pretrained weights, a step folder, or weights with
    timm's config.json beside them."""
    distill: Literal["logits", "tokens", "features"] = "logits"
    """What is learned from the teacher: its class scores (Hinton et al. 2015), its feature map, or its pooled features."""
    distill_weight: float = 0.5
    """Share of the teacher in the loss, the labels have the rest."""
    temperature: float = 2.0
    """What the scores of teacher and student are divided by; distill: logits."""


@dataclass(frozen=True)
class ResizeConfig:
    """One entry of `data.resize_schedule`."""

    until: float
    image_size: int | tuple[int, int]


@dataclass(frozen=True)
class DataConfig:
    train: str = "digits"
    """digits, imagefolder:PATH, webdataset:PATH, parquet:PATH, arrays:PATH, volumes:PATH, mnist, cifar10, ...,
    synthetic[:SAMPLES[xSIZE]]; several with weights: "0.7*imagefolder:A + 0.3*webdataset:B"."""
    val: str = "digits"
    """The same choices; the validation split of that dataset. Where only train is given, train's."""
    classes: str | None = None
    """A file with the classes in the order of their labels: a name on each line, or ImageNet's class index (JSON)."""
    workers: int = 2
    """Decoding processes per rank; 0 decodes in the training process. The samples do not depend on it."""
    root: str = "data"
    """Folder of the datasets that torchvision downloads."""
    augment: bool = True
    """Random crops, shifts and flips that fit the dataset; false feeds the training images as the evaluation ones."""
    resize_schedule: tuple[ResizeConfig, ...] = ()
    """Progressive resizing: smaller or larger training images in the first steps, e.g. [{until: 0.4, image_size: 128}, {until:
    0.8, image_size: 160}]. until: share of all steps (below 1) or number of steps (1 and above); then model.image_size."""
    val_size: int | tuple[int, int] | None = None
    """Size of the images in evaluations, such as 224 for a model that trains at 176 (Touvron et al. 2019, FixRes); null:
    model.image_size."""
    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Least and largest share of a photo's area that a random crop takes."""
    hflip: float | None = None
    """How often a training image is mirrored, left to right; null: half of them, and no digits. 0 for images of text, and where
    left and right are classes."""
    vflip: float = 0.0
    """How often a training image is turned upside down, such as 0.5 for images from above or through a microscope."""
    policy: Literal["none", "randaugment", "autoaugment", "trivialaugment", "three-augment"] = "none"
    """More augmentation after the crop (Cubuk et al. 2019 and 2020; Müller and Hutter 2021; Touvron et al. 2022)."""
    jitter: float = 0.0
    """Random change of brightness, contrast and saturation, and a quarter of it of hue; often 0.3."""
    erase: float = 0.0
    """How often a random rectangle is erased (Zhong et al. 2020), e.g. 0.25."""
    balance: float = 0.0
    """classify: see classes in proportion to their samples to the power of 1 - balance: 1 all equally often, 0.5 in proportion
    to the square root, 0 as they are."""
    repeats: int = 1
    """Repeated augmentation (Hoffer et al. 2020): each sample this often in a row, and an epoch of fewer samples."""
    shuffle_block: int = 1
    """Samples that lie next to each other and stay near each other, so that a disk reads in long runs; 1 shuffles all."""
    shuffle_window: int = 16
    """Blocks whose samples are shuffled among each other."""
    decode: Literal["cpu", "cuda"] = "cpu"
    """Where JPEGs are decoded, cropped and resized. cuda: on the run's GPU (nvJPEG), by the rank, while workers only read files
    and draw what is random; not quite the same pixels. What a GPU's decoder may not take stays with the workers."""
    reduce: bool = False
    """Decode JPEGs at 1/2, 1/4 or 1/8 where the crop allows it: faster, and not quite the same pixels."""
    max_pixels: int = 180_000_000
    """Images with more pixels are unreadable, and so are those that a resize would give more."""
    image_range: tuple[float, float] | None = None
    """The values that become black and white in images of more than 8 bits, such as [0, 4095]; null: what each file tells,
    and unreadable where that leaves it open."""
    bad_budget: float = 0.01
    """Share (below 1) or number (1 and above) of a dataset's samples that may be unreadable; they are replaced, counted and
    listed in bad_samples.jsonl."""
    trace: str | None = None
    """A file that gets a JSON line for each step and rank: the ids of the samples that were trained on."""


@dataclass(frozen=True)
class GroupConfig:
    """One entry of `optim.groups`."""

    match: str
    lr_scale: float = 1.0
    weight_decay: float | None = None


@dataclass(frozen=True)
class OptimConfig:
    name: Literal["adamw", "sgd", "lion", "lamb", "adafactor", "muon"] = "adamw"
    """adamw, sgd, lion: every strategy. lamb, which takes norms of whole tensors, and muon, which needs whole matrices: ddp,
    fsdp, pipeline. adafactor: ddp, and pipeline with whole copies of each stage."""
    lr: float = 1e-3
    """Peak learning rate, of a global batch of lr_base_size samples where that is given."""
    lr_base_size: int | None = None
    """Scale the rate with the batch: lr x train.global_batch / lr_base_size (Goyal et al. 2017), often 256; null: lr as it
    is."""
    lr_base_scale: Literal["linear", "sqrt"] = "linear"
    """sqrt: scale with the root of that quotient, as is usual for Adam and LAMB (You et al. 2020)."""
    weight_decay: float = 0.05
    """Decoupled, but in the gradient for sgd and in the scaled step for lamb; never applied to norms, biases,
    other tensors with fewer than two dimensions and what the timm model excludes."""
    layer_decay: float | None = None
    """Each layer's rate is that of the layer above times this factor, e.g. 0.75, and the head's is lr; null: one rate."""
    groups: tuple[GroupConfig, ...] = ()
    """Rates and decay by name, e.g. [{match: head, lr_scale: 10}, {match: '*.norm?', weight_decay: 0}]. match: a parameter or
    module of timm's, * and ? as in file names. lr_scale multiplies the rate, after layer_decay; weight_decay takes the place of
    the one above, also for norms and biases. The last match wins."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of the moments of adamw, lion (often 0.9, 0.99), lamb, adafactor (the second: its limit) and of muon's
    NAdamW, which steps what is not a matrix."""
    momentum: float = 0.9
    """Nesterov's, of sgd and muon (often 0.95)."""
    clip: float | None = 1.0
    """Largest norm of the whole model's gradient; null does not clip."""
    schedule: Literal["cosine", "linear", "constant", "wsd", "step", "poly"] = "cosine"
    """The learning rate after the warm-up. cosine, linear and poly fall towards min_lr at the last step, wsd stays at lr until
    its cooldown, step falls at its milestones."""
    warmup: float = 0.05
    """Share of all steps (below 1) or number of steps (1 and above) over which the rate rises linearly from 0."""
    min_lr: float = 0.0
    """cosine, linear, poly, wsd: the rate at the end. It does not scale with the batch."""
    cooldown: float = 0.2
    """wsd: share of all steps (below 1) or number of steps (1 and above) over which the rate falls linearly at the end."""
    milestones: tuple[float, ...] = ()
    """step: shares of all steps (below 1) or numbers of steps (1 and above) from which on the rate is multiplied with gamma
    once more, e.g. [0.3, 0.6, 0.9]."""
    gamma: float = 0.1
    """step: the factor."""
    power: float = 0.9
    """poly: the power of the share of steps that is left; 1 is linear."""


SCHEDULE_KEYS = {
    "min_lr": ("cosine", "linear", "poly", "wsd"),
    "cooldown": ("wsd",),
    "milestones": ("step",),
    "gamma": ("step",),
    "power": ("poly",),
}
"""Keys of `optim` that only some schedules have a use for."""


@dataclass(frozen=True)
class EmaConfig:
    decay: float | None = None
    """Keep an exponential moving average of the weights: its share of itself in each update, e.g. 0.9999; null keeps none."""
    warmup: bool = True
    """Use min(decay, (1 + n) / (10 + n)) after n updates of the average, so that it soon forgets the first weights."""
    every: int = 1
    """Steps between updates of the average."""
    evaluate: bool = True
    """Evaluate the average beside the weights: ema_loss, ema_top1, ..., each evaluation taking twice as long."""


ONE_STAGE = ("gpipe", "1f1b")
"""The pipeline schedules with one stage on each rank; the others have two or more."""
SPLIT_BACKWARD = ("zbv", "dualpipev")
"""Those that go there and back over the ranks, and compute the gradients of weights apart from those of activations."""


@dataclass(frozen=True)
class ParallelConfig:
    strategy: Literal["auto", "ddp", "fsdp", "zero1", "zero2", "zero3", "pipeline"] = "auto"
    """ddp: a whole copy per rank. fsdp: every parameter sharded over the ranks of a replica. zero1, zero2, zero3:
    DeepSpeed, which shards the optimizer state, then the gradients too, then the parameters too. pipeline: each rank has
    some of the blocks, and with more ranks than stages a shard of them. auto: ddp on one rank, which is the plain module; on
    several what the planner predicts to be fastest of what fits. A restart on as many ranks of the same devices keeps it."""
    replicas: int = 1
    """fsdp: full copies of the model, each sharded over ranks / replicas ranks. pipeline: copies of each stage, each sharded
    over ranks / stages / replicas ranks."""
    stages: int | None = None
    """pipeline: ranks over which the blocks are spread; null takes all ranks."""
    stages_per_rank: int | None = None
    """pipeline: pieces of the model on each of these ranks; null takes 1 for gpipe and 1f1b, else 2."""
    schedule: Literal["gpipe", "1f1b", "interleaved", "zbv", "dualpipev"] = "1f1b"
    """pipeline: the order of the micro-batches' passes (Huang et al. 2019; Narayanan et al. 2019 and 2021; Qi et al. 2024;
    DeepSeek-AI 2025). interleaved, zbv and dualpipev have several pieces of the model on a rank."""
    microbatches: int | None = None
    """pipeline: micro-batches of one step; null takes what train.micro_batch gives, else at most four per stage."""
    precision: Literal["fp32", "bf16", "fp16", "amp_bf16", "fp8"] = "bf16"
    """What is computed in; master weights, gradient reduction and optimizer state stay fp32. bf16, fp16: weights are cast once
    in each pass, and what blocks add up stays fp32. amp_bf16: torch.autocast decides for each operation. fp8: as bf16, but wide
    linear layers multiply 8-bit floats, with a scale for each row; the gradients of their weights are computed in bf16."""
    fp8_layers: str | tuple[str, ...] = "auto"
    """precision: fp8: the linear layers that compute in fp8, patterns as in optim.groups. auto: those of the blocks that are
    wide enough to be faster, without the first and the last block."""
    reshard: Literal["forward", "never"] = "forward"
    """fsdp: free gathered parameters after each block's forward pass, or keep them until the backward pass."""
    unit_size: str = "auto"
    """fsdp: consecutive blocks are gathered and scattered together up to this size of fp32 weights (units kB, MB, GB, KiB, MiB,
    GiB); block exchanges each by itself. auto: 8MiB on CPUs, where each exchange takes milliseconds, else block."""
    scatter: Literal["each", "last"] = "each"
    """fsdp: reduce and scatter gradients after each micro-batch, or after a step's last (less traffic, whole gradients)."""
    reduce: Literal["fp32", "bf16"] = "fp32"
    """The number format in which gradients travel and are added up over the ranks. bf16 halves the traffic and rounds each
    gradient to 8 bits; a rank's own micro-batches are added up in fp32 either way."""
    channels_last: Literal["auto", "always", "never"] = "auto"
    """Compute convolutions in channels_last. auto: where convolutions are most of the model; on CUDA where none is grouped, on
    CPUs in fp32 where some are depthwise or grouped."""
    recompute: str = "none"
    """blocks: keep only each block's input and compute its activations again in the backward pass. selective: keep what matrix
    products, convolutions and attention compute too. budget:X, such as budget:0.4: keep those products that save the most, at
    most the share X of what a block keeps without recompute. auto: none, blocks or selective: where the planner predicts
    that it is needed, or faster for its larger micro-batch."""
    compile: Literal["auto"] | bool = "auto"
    """Compile each block with torch.compile. auto: on CUDA, where blocks repeat and nothing forbids it."""
    cuda_graphs: bool = False
    """ddp on one CUDA device: capture the forward and backward pass of a micro-batch as a CUDA graph, and launch it as a whole.
    For small models at small batches, whose step is the time to launch kernels."""
    offload: Literal["none", "optimizer", "all", "activations", "optimizer+activations", "all+activations"] = "none"
    """optimizer (zero1, zero2, zero3): keep the optimizer state in CPU memory and take its step there; all: the parameters too
    (zero3). activations (CUDA, each strategy): what blocks keep for the backward pass waits in pinned CPU memory."""
    deepspeed: str | None = None
    """A DeepSpeed configuration file (JSON): its ZeRO stage is the strategy, "auto" in it takes the values from here."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: CUDA when the machine has it."""

    @property
    def offloads_state(self) -> bool:
        """Whether the optimizer state is in CPU memory."""
        return self.offload.partition("+")[0] in ("optimizer", "all")

    @property
    def offloads_parameters(self) -> bool:
        """Whether the parameters are too."""
        return self.offload.startswith("all")

    @property
    def offloads_activations(self) -> bool:
        """Whether activations wait there for the backward pass."""
        return self.offload.endswith("activations")

    @property
    def pipeline_ranks(self) -> int | None:
        """Ranks in a pipeline; None is all of them."""
        return self.stages if self.strategy == "pipeline" else 1

    @property
    def per_rank(self) -> int:
        """Stages on each rank of a pipeline."""
        return self.stages_per_rank or (1 if self.schedule in ONE_STAGE else 2)


@dataclass(frozen=True)
class TrainConfig:
    epochs: float = 5.0
    """Passes over the training data."""
    steps: int | None = None
    """Optimizer steps in all; overrides epochs."""
    global_batch: int = 128
    """Samples per optimizer step over all ranks, which must divide it."""
    micro_batch: int | Literal["auto"] | None = None
    """Samples in one forward and backward pass on one rank; null takes the rank's whole part of the global batch. auto: the
    largest for which the planner predicts that memory suffices; not for models with BatchNorm."""
    eval_every: int | None = None
    """Steps between evaluations; null evaluates at each epoch's end. The last step is always evaluated."""
    patience: int | None = None
    """Evaluations in a row that may bring no better value of a metric; then the run ends, saved and with exit code 0. null
    trains to the last step."""
    patience_metric: str | None = None
    """The metric that patience looks at (loss, top1, ema_top1, ...); null takes checkpoint.keep_best, else the task's first
    metric beside the loss. Losses and errors are better when lower."""
    deterministic: bool = False
    """Operations that repeat bit for bit alone, which may be slower; one that has no such form ends the run."""


@dataclass(frozen=True)
class CheckpointConfig:
    every: int | None = None
    """Steps between checkpoints; null saves at each epoch's end, unless minutes is set. The last step is always saved."""
    minutes: float | None = None
    """Minutes between checkpoints, beside `every` or alone. SIGUSR2 to any rank saves at the next step too."""
    keep: int = 3
    """Newest valid checkpoints kept in the output folder."""
    keep_best: str | None = None
    """A metric (loss, top1, map, r2, ema_top1, ...): a step whose evaluation is the best so far is saved, and the best one is
    kept too."""
    keep_every: int | None = None
    """Checkpoints of steps that this divides are kept too."""
    resume: str = "auto"
    """auto (the newest valid one in `out`), never, a step of `out`, or the path of any run's step folder. All but auto apply
    once: a restart goes on from the newest."""
    allow: str | None = None
    """What may be another than the checkpoint was trained on, when resuming: data, classes, or both: data,classes."""
    shard_size: str = "5GB"
    """Largest size of one model or optimizer file (units kB, MB, GB, KiB, MiB, GiB)."""
    verify: bool = True
    """Compare checksums of all that is read when resuming; false checks sizes and headers only."""
    background: bool = True
    """Write while training goes on, from a copy of the state in host memory; false waits, and needs no copy."""
    writer: Literal["auto", "direct", "owner"] = "auto"
    """direct: every rank writes into every file. owner: each file has one rank that writes it, for file systems on which
    several hosts must not write one file (NFS, mounted object stores). The bytes are the same. auto: owner on NFS, SMB, 9P and
    FUSE, else direct."""
    verify_after_save: Literal["sample", "full", "none"] = "sample"
    """How much of what was written is read back before it becomes a checkpoint and older ones are pruned."""
    timeout: float = 600.0
    """Seconds that a rank waits for the others while a checkpoint is written, before all give up."""


@dataclass(frozen=True)
class LimitsConfig:
    """Seconds without progress on some rank after which all ranks write their stacks and end; null: for ever.

    `grace` is another limit: it counts from a fault on."""

    start: float | None = 1800.0
    """From the start of a rank to its first step: all ranks have come, the model is built and restored."""
    step: float | None = 600.0
    """One optimizer step, with what is compiled in it and the wait for its data."""
    evaluate: float | None = 600.0
    """One batch of an evaluation."""
    save: float | None = 1800.0
    """One checkpoint, where training waits for it."""
    grace: float | None = 10.0
    """From the fault of a rank, its own error or the end of its process, to the end of all others, also where they block."""


@dataclass(frozen=True)
class FaultsConfig:
    nonfinite: int = 10
    """Steps in a row that may be skipped because the loss or the gradient's norm is not finite; one more ends the run."""
    spike: float | None = None
    """A loss is a spike so many standard deviations above the mean of the last 100 steps, e.g. 8; null does not look."""
    rollback: bool = False
    """After a spike go back to the newest checkpoint, and pass over the batch that made it; false only says it."""
    digest_every: int | None = None
    """Steps between comparisons of the state that several ranks hold alike (silent corruption); null does not compare."""
    out_of_memory: Literal["halve", "stop"] = "halve"
    """A device without memory ends the run; the next start has half of train.micro_batch on all ranks, or not."""
    same_crash: int = 3
    """Crashes in a row at the same step, after which the run is not started again."""
    restarts: int = 20
    """Starts in a row that may come to no newer checkpoint."""


@dataclass(frozen=True)
class MonitorConfig:
    progress: bool = True
    """Show progress with the time left (on rank 0): a bar in a terminal, else a line twice a minute and for each evaluation."""
    every: int = 10
    """Steps between the training lines of metrics.jsonl; the last step always has one."""
    report: bool = True
    """Write report.html into `out`, again every 10 seconds while the run goes on, and at its end."""
    report_images: int = 8
    """Validation images that the report shows with what is predicted for them; 0 shows none."""
    trackers: tuple[str, ...] = ()
    """Where the lines of metrics.jsonl go too: tensorboard, wandb, mlflow, trackio; e.g. [tensorboard]. Each is an extra of the
    package: pip install 'bigvision[tensorboard]'."""
    profile: tuple[int, int] | None = None
    """The first and the last of up to 20 steps that torch's profiler records, such as [100, 103]: a trace of each rank in
    OUT/profile, and a table of where the time went. null records nothing."""
    memory_snapshot: bool = False
    """In the steps of `profile` record each allocation too, and report what was allocated when the most was."""


TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio")
"""The values of `monitor.trackers`."""


@dataclass(frozen=True)
class Config:
    out: str = "auto"
    """Output folder: run.yaml, metrics.jsonl and the checkpoints. auto: checkpoints/RECIPE-DATA-MODEL."""
    seed: int = 0
    """Weights, data order, augmentation and dropout are functions of it."""
    model: ModelConfig = ModelConfig()
    task: TaskConfig = TaskConfig()
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    ema: EmaConfig = EmaConfig()
    parallel: ParallelConfig = ParallelConfig()
    train: TrainConfig = TrainConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    limits: LimitsConfig = LimitsConfig()
    faults: FaultsConfig = FaultsConfig()
    monitor: MonitorConfig = MonitorConfig()

    def to_dict(self) -> dict[str, Any]:
        """The configuration as plain YAML data; :func:`load_config` reads it back."""

        def lists(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
            return {name: list(value) if isinstance(value, tuple) else value for name, value in pairs}

        return dataclasses.asdict(self, dict_factory=lists)
