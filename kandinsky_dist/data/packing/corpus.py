"""The demo corpus: 3,119 rendered emoji, captioned with their names, from two MIT-licensed npm packages."""

import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import tarfile
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image
from tqdm import tqdm

from kandinsky_dist.data.decode import decode_image, square_view
from kandinsky_dist.data.manifest import Manifest
from kandinsky_dist.data.packing.writer import write_shards
from kandinsky_dist.errors import ConfigError, DataError, DiskFullError

IMAGES_PACKAGE = "@lobehub/fluent-emoji-3d@1.1.0"
NAMES_PACKAGE = "emojibase-data@17.0.0"
FLAGS_GROUP = "flags"
"""Their artwork is not the package's own."""
HELD_OUT_FRACTION = 0.06
JPEG_QUALITY = 92
ALTERNATIVE = "or make shards of your own images: kandinsky-dist data pack SRC OUT"


@dataclass(frozen=True)
class Emoji:
    """One image and what is known of it. `base` is the emoji without its skin tone."""

    key: str
    base: str
    label: str
    tags: tuple[str, ...]
    group: str


def build_demo(
    out: Path, *, image_size: int = 128, max_samples: int | None = None, samples_per_shard: int = 512
) -> dict[str, Manifest]:
    """Builds OUT/train and OUT/validation, each a folder of shards with its manifest.

    Skin tones of one emoji are on the same side of the split.

    Args:
        out: folder of the corpus.
        image_size: side of the square images, pixels.
        max_samples: an even subset of about this many, for quick tests.
        samples_per_shard: the last shard of a split may be shorter.

    Returns:
        manifests by split: "train", "validation".

    Raises:
        ConfigError: no npm, no network, or `out` holds something else.
        DiskFullError: no space left for the corpus, or for the packages in the cache.
    """
    if image_size < 1 or (max_samples is not None and max_samples < 2):
        raise ConfigError(
            f"image_size={image_size} must be at least 1 and max_samples={max_samples} at least 2"
        )
    images, names = _read_images(_fetch(IMAGES_PACKAGE)), _read_names(_fetch(NAMES_PACKAGE))
    manifests = {}
    for split, emojis in split_held_out(match_names(sorted(images), names), max_samples).items():
        origin = {
            "command": "data demo",
            "split": split,
            "sources": [IMAGES_PACKAGE, NAMES_PACKAGE],
            "licences": "MIT",
            "image_size": image_size,
            "samples_per_shard": samples_per_shard,
            "keys_sha256": hashlib.sha256("\n".join(emoji.key for emoji in emojis).encode()).hexdigest(),
        }
        samples = _samples(images, emojis, image_size, split)
        manifests[split] = write_shards(
            samples, out / split, samples_per_shard=samples_per_shard, origin=origin, prefix=split
        )
    return manifests


def match_names(stems: list[str], names: list[dict[str, Any]]) -> list[Emoji]:
    """Pairs image files with their names, without flags and duplicates, in an order without meaning.

    Args:
        stems: hex code points of the images, as in "1f44b-1f3fb".
        names: the rows of emojibase, each with `group` as text; skin tones are nested in `skins`.
    """
    known = {}
    for row in names:
        base = _code(row["hexcode"])
        for variant in (row, *row.get("skins", ())):
            tags = tuple(variant.get("tags") or row.get("tags") or ())
            known[_code(variant["hexcode"])] = Emoji(
                _code(variant["hexcode"]), base, variant["label"], tags, row["group"]
            )
    codes = dict.fromkeys(_code(stem) for stem in stems)
    emojis = [known[code] for code in codes if code in known and known[code].group != FLAGS_GROUP]
    return sorted(emojis, key=lambda emoji: _hash("order", emoji.key))


def split_held_out(emojis: list[Emoji], max_samples: int | None) -> dict[str, list[Emoji]]:
    """Holds out every variant of some emoji, chosen by a hash of the emoji itself."""
    held = [_hash("split", emoji.base) < HELD_OUT_FRACTION for emoji in emojis]
    validation = [emoji for emoji, is_held in zip(emojis, held, strict=True) if is_held]
    train = [emoji for emoji, is_held in zip(emojis, held, strict=True) if not is_held]
    if max_samples is not None and max_samples < len(emojis):
        num_validation = max(1, round(max_samples * len(validation) / len(emojis)))
        validation, train = validation[:num_validation], train[: max_samples - num_validation]
    return {"train": train, "validation": validation}


def _samples(
    images: dict[str, bytes], emojis: list[Emoji], image_size: int, split: str
) -> Iterator[dict[str, Any]]:
    by_code = {_code(stem): data for stem, data in images.items()}
    for emoji in tqdm(emojis, desc=f"demo {split}", unit="image", disable=None):
        image = Image.fromarray(square_view(decode_image(by_code[emoji.key], emoji.key), image_size))
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0)
        about = {"label": emoji.label, "tags": emoji.tags, "group": emoji.group, "base": emoji.base}
        yield {
            "__key__": emoji.key,
            "jpg": buffer.getvalue(),
            "txt": f"a 3d emoji of {emoji.label}".encode(),
            "json": json.dumps(about).encode(),
        }


def _read_images(path: Path) -> dict[str, bytes]:
    """Images of the package by the stems of their names, the longest name of one emoji first."""
    members = _read_members(path, re.compile(r"package/assets/[0-9a-f-]+\.webp"))
    return {PurePosixPath(name).stem: members[name] for name in sorted(members, reverse=True)}


def _read_names(path: Path) -> list[dict[str, Any]]:
    rows_name, groups_name = "package/en/data.json", "package/meta/groups.json"
    members = _read_members(path, re.compile(rf"{rows_name}|{groups_name}"))
    try:
        rows, groups = json.loads(members[rows_name]), json.loads(members[groups_name])["groups"]
    except (KeyError, ValueError) as error:
        raise DataError(f"{path} lacks {error}; remove it and retry") from error
    return [{**row, "group": groups.get(str(row.get("group")), "other")} for row in rows]


def _read_members(path: Path, wanted: re.Pattern[str]) -> dict[str, bytes]:
    """Reads files out of an archive, in one pass and in memory: nothing is unpacked to where it says."""
    try:
        with tarfile.open(path, "r:gz") as archive:
            files = (
                (member.name, archive.extractfile(member))
                for member in archive
                if wanted.fullmatch(member.name)
            )
            return {name: file.read() for name, file in files if file is not None}
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise DataError(f"{path} cannot be read ({error}); remove it and retry") from error


def _code(hexcode: str) -> str:
    """Code points without the variation selector, which sources add as they please."""
    return "-".join(part for part in hexcode.lower().split("-") if part != "fe0f")


def _hash(purpose: str, text: str) -> float:
    """A number in [0, 1) that stays the same for ever."""
    return int.from_bytes(hashlib.sha256(f"{purpose} {text}".encode()).digest()[:8], "big") / 2**64


def _fetch(package: str) -> Path:
    """The npm package's archive in the cache folder, downloaded if it is not there."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kandinsky-dist"
    target = cache / (package.lstrip("@").replace("/", "-").replace("@", "-") + ".tgz")
    if target.exists():
        return target
    npm = shutil.which("npm")
    if npm is None:
        raise ConfigError(f"npm is not on PATH, which fetches {package}; install it, {ALTERNATIVE}")
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        command = [npm, "pack", package, "--loglevel=error", "--pack-destination", folder]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode or not (Path(folder) / target.name).is_file():
            code = re.search(r"^npm \S+ code (\S+)", result.stderr, re.MULTILINE)
            lines = result.stderr.strip().splitlines() or [f"exit code {result.returncode}"]
            reason = code[1] if code else lines[-1]  # npm's last line only says where its log is
            if reason == "ENOSPC":
                raise DiskFullError(f"no space left for {package} in {cache}; make room and retry")
            raise ConfigError(f"npm pack {package} failed ({reason}); check the network, {ALTERNATIVE}")
        os.replace(Path(folder) / target.name, target)
    return target
