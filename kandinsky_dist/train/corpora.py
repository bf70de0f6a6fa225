"""From a configuration to the corpora of a run, their order and the loaders."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from kandinsky_dist.config.schema import Config
from kandinsky_dist.data.cache_description import CacheDescription, read_description
from kandinsky_dist.data.cached import CachedDataset, CachedViews
from kandinsky_dist.data.captions import Captions, CaptionSource
from kandinsky_dist.data.catalogue import check_presence, read_manifest
from kandinsky_dist.data.dataset import ShardDataset, Views
from kandinsky_dist.data.loader import Loader, Source
from kandinsky_dist.data.locations import is_remote
from kandinsky_dist.data.order import ORDER_VERSION, Order
from kandinsky_dist.data.remote.remote_storage import make_storage
from kandinsky_dist.data.rows import Views as ImageViews
from kandinsky_dist.data.stream import StreamDataset
from kandinsky_dist.errors import ConfigError
from kandinsky_dist.models.frozen import clip_preprocessing
from kandinsky_dist.models.tokenizer import load_tokenizer
from kandinsky_dist.objectives.encoders import encoder_settings
from kandinsky_dist.runtime.process import Process
from kandinsky_dist.train.build import Folders

STREAM_NOTICE = (
    "data.source=stream: samples come in random order, some again before others have come at all, and a run "
    "that stops cannot continue at the same sample; index the shards for exact epochs and resume"
)
MIB = 2**20
GIB = 2**30
IDENTITY_KEYS = {
    "prior": ("data.captions", "data.caption_dropout", "data.horizontal_flip"),
    "decoder": (
        "data.image_embedding_dropout",
        "data.resolution",
        "data.aspect_buckets",
        "data.horizontal_flip",
        "data.random_crop",
    ),
}
"""Settings, by stage, that decide what a position of the stream looks like."""


def training_order(config: Config) -> Order | None:
    """The corpora that are trained on, None for an endless stream."""
    if config.data.source == "stream":
        return None
    weights = [float(part.rpartition("=")[2]) for part in config.data.mixture] or None
    manifests = [read_manifest(shards, key) for shards, key in _training_corpora(config)]
    bucket = config.data.global_batch_size if config.data.aspect_buckets else None
    return Order(manifests, seed=config.run.seed, weights=weights, bucket_samples=bucket)


def validation_order(config: Config) -> Order:
    """The held-out corpus, always as squares."""
    assert config.validation.shards is not None
    return Order([read_manifest(config.validation.shards, "validation.shards")], seed=config.run.seed)


def cache_description(config: Config, folders: Folders) -> CacheDescription | None:
    """What the encoder outputs of source=cached are, once for all corpora; None for another source.

    Raises:
        ConfigError: they are not those of the run's encoders and settings, or not alike.
    """
    if config.data.source != "cached":
        return None
    corpora = [(*corpus, config.data.aspect_buckets) for corpus in _training_corpora(config)]
    flip = config.data.horizontal_flip
    if config.validation.every_steps and config.validation.shards is not None:
        corpora.append((config.validation.shards, "validation.shards", False))
    found = None
    for shards, key, aspect_buckets in corpora:
        description = read_description(shards, key)
        wanted = encoder_settings(config, folders.prior, folders.decoder, aspect_buckets=aspect_buckets)
        is_training = key != "validation.shards"
        description.check(wanted, f"{key}={shards}", horizontal_flip=flip if is_training else 0.0)
        if found is not None and is_training and description.layouts() != found.layouts():
            raise ConfigError(
                f"{key}={shards} has records of {description.dtype}{' with flips' * description.has_flips}, "
                f"another corpus of {found.dtype}{' with flips' * found.has_flips}: precompute them alike"
            )
        found = found or description
    return found


def check_corpora(config: Config, share: slice = slice(None)) -> None:
    """Makes sure that all shards are there. For one rank: a thousand would bring a file system down.

    Args:
        share: of each corpus, where several look at a part each.

    Raises:
        DataError: a shard is missing or of another size than its manifest says.
    """
    corpora = [] if config.data.source == "stream" else _training_corpora(config)
    if config.validation.every_steps and config.validation.shards is not None:
        corpora.append((config.validation.shards, "validation.shards"))
    for shards, key in corpora:
        check_presence(read_manifest(shards, key), shards, key, share)


def _training_corpora(config: Config) -> list[tuple[str, str]]:
    """Shards of each corpus, and the key that names them."""
    if config.data.mixture:
        return [(part.rpartition("=")[0], "data.mixture") for part in config.data.mixture]
    assert config.data.shards is not None
    return [(config.data.shards, "data.shards")]


def build_loader(
    config: Config, prior_folder: Path, order: Order | None, process: Process, *, is_training: bool
) -> Loader:
    """Batches of an order, or of the endless stream; captions and images are changed in training only."""
    data = config.data
    is_grouped = data.group_by_length and config.stage == "prior" and is_training
    source: Source
    if data.source == "cached":
        assert order is not None
        source = _cached(config, order, process, is_training=is_training)
    else:
        views = _image_views(config, prior_folder, is_training=is_training)
        source = _stream(config, views) if order is None else _shards(config, views, order)
    return Loader(
        source,
        global_batch_size=data.global_batch_size,
        micro_batch_size=data.micro_batch_size,
        rank=process.rank,
        world_size=process.world_size,
        num_workers=data.num_workers if is_training else 0,
        device=process.device,
        lengths=source.num_text_states if is_grouped and isinstance(source, CachedDataset) else None,
    )


def _image_views(config: Config, prior_folder: Path, *, is_training: bool) -> ImageViews:
    data, is_prior = config.data, config.stage == "prior"
    sources = tuple(CaptionSource.parse(source) for source in data.captions)
    return ImageViews(
        clip_size=clip_preprocessing(prior_folder).size,
        resolution=None if is_prior else data.resolution,
        tokenize=load_tokenizer(prior_folder) if is_prior else None,
        captions=Captions(sources, config.run.seed) if is_prior else None,
        caption_dropout=data.caption_dropout if is_prior and is_training else 0.0,
        horizontal_flip=data.horizontal_flip if is_training else 0.0,
        random_crop=data.random_crop and is_training,
        seed=config.run.seed,
    )


def _cached(config: Config, order: Order, process: Process, *, is_training: bool) -> Source:
    shards, key = _training_corpora(config)[0]
    if not is_training:
        assert config.validation.shards is not None
        shards, key = config.validation.shards, "validation.shards"
    is_prior = config.stage == "prior"
    views = CachedViews(
        description=read_description(shards, key),
        caption_dropout=config.data.caption_dropout if is_prior and is_training else 0.0,
        horizontal_flip=config.data.horizontal_flip if is_training else 0.0,
        seed=config.run.seed,
    )
    if any(is_remote(order.manifest.tar(shard)) for shard in range(len(order.manifest))):
        return _shards(config, views, order)
    return CachedDataset(order, views, pin_memory=process.device.type == "cuda")


def _stream(config: Config, views: ImageViews) -> StreamDataset:
    assert config.data.shards is not None
    return StreamDataset(config.data.shards, views, allow_pipe=config.data.allow_pipe)


def _shards(config: Config, views: Views, order: Order) -> ShardDataset:
    data = config.data
    storage = make_storage(
        order.manifest,
        read_ahead_bytes=data.read_ahead_mib * MIB,
        cache_dir=None if data.cache_dir is None else Path(data.cache_dir),
        cache_bytes=int(data.cache_gib * GIB),
    )
    return ShardDataset(order, views, storage)


def identity(config: Config, order: Order | None) -> dict[str, Any]:
    """Configuration key -> value or fingerprint of the data that a resumed run must share."""
    keys = ("run.seed", "data.global_batch_size", *IDENTITY_KEYS[config.stage])
    found = {key: config.get(key) for key in keys}
    weights = [part.rpartition("=")[2] for part in config.data.mixture]
    key = "data.mixture" if weights else "data.shards"
    if order is None:
        # Never equal to that of another start: a stream has no place to come back to.
        found[key] = f"an endless stream begun at {datetime.now(UTC).isoformat(timespec='microseconds')}"
    else:
        found[key] = f"corpus {order.manifest.fingerprint[:16]} in order {ORDER_VERSION}"
    if weights:
        found[key] += f" weighted {':'.join(weights)}"
    return {key: list(value) if isinstance(value, tuple) else value for key, value in found.items()}
