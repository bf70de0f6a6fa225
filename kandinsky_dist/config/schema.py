"""Every setting of a run, with its default, unit and meaning.

The dataclasses are frozen: a run's configuration is decided once, before anything starts. A field's
`doc` is what `--help` prints, so a setting is documented here and nowhere else.
"""

from dataclasses import dataclass, field, fields
from typing import Any, Literal

Stage = Literal["prior", "decoder"]
STAGES: tuple[Stage, ...] = ("prior", "decoder")


def option(default: Any, doc: str, *, stage: Stage | None = None) -> Any:
    """A documented setting; `stage` names the only stage that it applies to."""
    return field(default=default, metadata={"doc": doc, "stage": stage})


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Identity and length of the run."""

    dir: str = option("runs/{stage}", "run folder; {stage} is replaced by prior or decoder")
    seed: int = option(0, "seed of data order, captions, noise and timesteps")
    max_steps: int = option(1000, "optimizer steps in all, restarts included")
    time_limit_seconds: float = option(
        0.0,
        "seconds after which this start saves itself and ends with 75; 0: before the end of the Slurm job, "
        "where there is one",
    )
    time_margin_seconds: float = option(
        60.0, "seconds that are left for the way out when the last checkpoint of a limited start is written"
    )
    resume: str = option(
        "auto",
        "auto: continue the run folder's newest whole checkpoint; never; or the PATH of another run or one "
        "of its checkpoints, to begin with it where the run has none of its own yet",
    )
    allow_change: tuple[str, ...] = option(
        (), "keys that may differ from those of the run that is resumed, e.g. [run.seed]"
    )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Where the networks come from: a diffusers pipeline folder or a hub name."""

    prior: str = option("kandinsky-community/kandinsky-2-2-prior", "prior pipeline: prior, CLIP, tokenizer")
    decoder: str = option("kandinsky-community/kandinsky-2-2-decoder", "decoder pipeline: U-Net, MoVQ")
    weights: str | None = option(
        None,
        "folder with other initial weights of the trained network, as save_pretrained makes it, e.g. unet/ "
        "of another training; all else is the pipeline's",
    )
    variant: Literal["full", "lora"] = option("full", "full: every weight is trained; lora: adapters")
    lora_rank: int = option(4, "rank of the adapters (variant=lora)")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is trained on and how it is cut into batches."""

    shards: str | None = option(
        None, "shard folder, glob, brace pattern {000..099}, list file (.txt), or folder URL (https, s3)"
    )
    mixture: tuple[str, ...] = option(
        (), "several corpora in place of shards, each SHARDS=WEIGHT, e.g. [/a=0.7,/b=0.3]"
    )
    source: Literal["raw", "cached", "stream"] = option(
        "raw",
        "raw: images and captions, encoded as they are trained on; cached: shards that `precompute` made of "
        "them, trained on without loading an encoder; stream: raw from tars without a manifest, in random "
        "order without end, which cannot be resumed exactly",
    )
    allow_pipe: bool = option(False, "let source=stream run pipe: shards, which are shell commands")
    num_workers: int = option(
        2,
        "decoding threads a rank, in one process for every 4; 0 decodes in the training process; with "
        "source=cached, threads of the training process that read ahead",
    )
    read_ahead_mib: int = option(256, "remote shards: MiB fetched in advance by each decoding process")
    cache_dir: str | None = option(
        None, "remote shards: local folder in which the processes of a machine share what was fetched"
    )
    cache_gib: float = option(64.0, "GiB that cache_dir may take")
    max_bad_fraction: float = option(
        0.01, "share of damaged samples (replaced by others) above which the run stops, 0 to 1"
    )
    global_batch_size: int = option(64, "samples an optimizer step, over all ranks")
    micro_batch_size: int = option(8, "samples a forward pass on one rank")
    resolution: int = option(512, "side of the decoder's square images, pixels", stage="decoder")
    aspect_buckets: bool = option(
        False,
        "batches of one aspect ratio each, with the area of resolution x resolution, in place of squares",
        stage="decoder",
    )
    horizontal_flip: float = option(0.0, "share of images that are mirrored, 0 to 1")
    random_crop: bool = option(
        False, "cut the image anywhere, not in its middle (CLIP sees the middle)", stage="decoder"
    )
    captions: tuple[str, ...] = option(
        ("txt",),
        "members that hold captions, or fields of a .json member, and how often each is taken, "
        "e.g. [txt=0.7,json.tags=0.3]",
        stage="prior",
    )
    caption_dropout: float = option(
        0.1, "share of captions replaced by '' for guidance, 0 to 1", stage="prior"
    )
    group_by_length: bool = option(
        True,
        "source=cached: captions of one length share a micro-batch, so that attention has little padding and "
        "compiled code few shapes; which samples make a step stays as it is",
        stage="prior",
    )
    image_embedding_dropout: float = option(
        0.1, "share of image embeddings replaced by that of a black image, 0 to 1", stage="decoder"
    )
    audit: bool = option(False, "write the keys of every step to audit/rank_*.jsonl")


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """The loss."""

    snr_gamma: float | None = option(
        None,
        "min-SNR weighting (5 is usual); the prior predicts x0, whose weight tends to 0 at high noise, "
        "where text conditioning is learnt",
    )
    noise_draws: int = option(
        1,
        "noises and timesteps a caption in one forward pass, which compute its text once; docs/draws.md says "
        "what it does to the gradient's variance",
        stage="prior",
    )


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW and its schedule; steps are optimizer steps, whatever the accumulation or world size."""

    learning_rate: float = option(1e-4, "peak learning rate")
    lr_scheduler: Literal["constant", "constant_with_warmup", "linear", "cosine"] = option(
        "constant", "shape of the schedule over run.max_steps"
    )
    lr_warmup_steps: int = option(0, "optimizer steps of linear warm-up")
    adam_beta1: float = option(0.9, "decay of the first moment")
    adam_beta2: float = option(0.999, "decay of the second moment")
    adam_epsilon: float = option(1e-8, "added to the root of the second moment")
    weight_decay: float = option(
        0.0, "decoupled decay of matrices and kernels (never norms, biases, statistics)"
    )
    max_grad_norm: float = option(1.0, "global gradient norm is clipped to this; 0 does not clip")
    ema_decay: tuple[float, ...] = option(
        (),
        "decays of moving averages of the weights, e.g. 0.9999 or [0.999,0.9999]; each takes 4 bytes a "
        "trained value, divided over the ranks",
    )


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the model is spread over ranks and in which arithmetic it runs."""

    strategy: Literal["ddp", "fsdp2", "zero0", "zero1", "zero2", "zero3"] = option("ddp", "engine")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = option(
        "auto",
        "type of matrix products; masters stay fp32; auto: bf16 on a GPU, fp32 on a CPU; fp16 scales the "
        "loss, and skips steps that overflow until the scale fits",
    )
    float8: bool = option(
        False,
        "multiply the matrices of the prior's layers in float8 (ddp and fsdp2 in bf16, compute capability "
        "8.9 or more); weights, moments and checkpoints are those without it",
        stage="prior",
    )
    bucket_mib: float = option(25.0, "gradient bucket, MiB of the communicated type")
    first_bucket_mib: float = option(
        0.0, "ddp: smaller first bucket, MiB, so that reduction starts early; 0: as large as the others"
    )
    overlap: bool = option(
        True,
        "reduce gradients beside backward; false, to see what that is worth: ddp reduces one bucket after "
        "backward, in zero1 to zero3 backward waits for each bucket; zero0 always reduces after backward",
    )
    static_graph: bool = option(
        False, "ddp: the same weights take part in every step, so DDP looks for them in the first one only"
    )
    gradient_compression: Literal["none", "bf16", "fp16"] = option(
        "none", "ddp: type that gradients are summed in on their way; weights, gradients, moments stay fp32"
    )
    shard_size: int = option(
        0,
        "fsdp2: neighbouring ranks that share one copy of the weights, e.g. the GPUs of a node; 0: all ranks",
    )
    reshard_after_forward: bool = option(
        True, "fsdp2: let go of a block's gathered weights between forward and backward: less memory"
    )
    prefetch_blocks: int = option(1, "fsdp2: blocks whose weights are gathered ahead")
    ds_config: str | None = option(None, "DeepSpeed file in place of ds_configs/<strategy>.json")
    gradient_checkpointing: bool = option(False, "recompute blocks in backward: less memory, more time")
    compile: bool = option(
        False, "compile the repeated layers, those of the frozen encoders too; minutes at the first start"
    )
    compile_cache: str | None = option(
        None,
        "folder for compiled code, shared by ranks and later starts; null: TORCHINDUCTOR_CACHE_DIR, or "
        "compile_cache in the run folder",
    )
    attention: Literal["sdpa", "flash", "efficient", "cudnn", "xformers"] = option(
        "sdpa",
        "attention kernels of the trained network; sdpa: torch chooses; flash, efficient, cudnn: that one of "
        "torch's, which must be there for the device and precision (flash takes no mask on a GPU); xformers: "
        "the decoder only",
    )
    channels_last: bool | None = option(
        None, "lay pictures out pixel by pixel for convolutions; null: on a GPU only", stage="decoder"
    )


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When the run is saved."""

    every_steps: int = option(500, "optimizer steps between checkpoints; the last step is always saved")
    keep: int = option(3, "checkpoints kept, at least 2")
    async_save: bool = option(
        True,
        "write beside training, from a copy in CPU memory as large as a rank's share; false, or where no "
        "memory is left for it: training waits",
    )


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """When a run counts as diverged: it goes back to a checkpoint and on with the data behind."""

    max_nonfinite_steps: int = option(
        25,
        "so many non-finite steps in a row are a divergence; each of them alone is skipped and changes "
        "nothing; 0: never",
    )
    spike_threshold: float = option(
        0.0,
        "a loss above median + this x 1.4826 x MAD of the last healthy steps is a spike (6 is cautious, for "
        "healthy losses that spread like a normal distribution); 0: off",
    )
    spike_window_steps: int = option(
        200, "healthy steps that a loss is compared with; before there are so many, no step is a spike"
    )
    spike_patience_steps: int = option(10, "so many spikes in a row are a divergence; fewer are forgiven")
    max_rollbacks: int = option(
        3, "how often the run may go back; the divergence after that ends it with exit code 1"
    )


@dataclass(frozen=True, kw_only=True)
class WatchdogConfig:
    """When a run counts as hung: it ends with exit code 1 and names the rank that did not arrive."""

    start_seconds: float = option(
        1800.0, "longest that a rank may be in one phase until it has done two steps: compilation, restoring"
    )
    step_seconds: float = option(
        600.0, "the same for each phase of a later step, and longest silence of a process; 0: watchdog off"
    )
    pause_seconds: float = option(
        3600.0, "the same for saving, validation and going back; all three must outlast a slow run's slowest"
    )
    heartbeat_seconds: float = option(
        10.0, "between two signs of life of a rank in RUN/heartbeat; more than 500 ranks give them less often"
    )
    straggler_share: float = option(
        0.1,
        "a rank that takes this share of a step longer than the ranks' middle for what it does without the "
        "others is named; 0: none is",
    )


@dataclass(frozen=True, kw_only=True)
class TelemetryConfig:
    """What is measured and where it goes."""

    log_every_steps: int = option(
        10, "optimizer steps between log entries; device scalars are read only then"
    )
    report_to: tuple[Literal["tensorboard"], ...] = option(("tensorboard",), "sinks beside metrics.jsonl")
    profile: tuple[str, ...] = option(
        (),
        "steps of which a torch profiler trace, and on a GPU a memory snapshot, goes to profile/ in the run "
        "folder: [20,24] or first:last as 20:24",
    )
    profile_ranks: tuple[int, ...] = option((0,), "ranks that write profiles")


@dataclass(frozen=True, kw_only=True)
class ValidationConfig:
    """Held-out loss."""

    shards: str | None = option(None, "validation shards, as data.shards")
    every_steps: int = option(0, "optimizer steps between validations; 0: never")
    num_samples: int = option(256, "samples of the validation shards that are used, the same ones each time")


@dataclass(frozen=True, kw_only=True)
class Config:
    """A whole run. `stage` is the command's argument, all else are sections."""

    stage: Stage
    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    watchdog: WatchdogConfig = field(default_factory=WatchdogConfig)
    telemetry: TelemetryConfig = field(default_factory=TelemetryConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)

    def get(self, key: str) -> Any:
        """Value of a dotted key such as "data.shards"."""
        section, _, name = key.partition(".")
        return getattr(getattr(self, section), name)


SECTIONS: dict[str, Any] = {
    item.name: item.default_factory for item in fields(Config) if item.name != "stage"
}
"""Section name -> its dataclass, in the order in which they are printed."""

KEYS = {f"{name}.{item.name}": item for name, section in SECTIONS.items() for item in fields(section)}
"""Dotted key -> its dataclass field."""
