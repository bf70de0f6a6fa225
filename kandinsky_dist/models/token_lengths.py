"""How long captions are to a tokenizer that does not cut them."""

from collections.abc import Callable, Sequence
from pathlib import Path

from kandinsky_dist.errors import ConfigError
from kandinsky_dist.models.tokenizer import END, START


def token_counter(folder: Path) -> Callable[[Sequence[str]], list[int]]:
    """A function that counts the tokens of captions, start and end token included.

    Args:
        folder: with a CLIP tokenizer, or a pipeline folder that has one in tokenizer/.

    Raises:
        ConfigError: no CLIP tokenizer there.
    """
    from transformers import CLIPTokenizer

    path = folder / "tokenizer" if (folder / "tokenizer").is_dir() else folder
    if not any((path / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        raise ConfigError(f"{path} holds no vocab.json and no tokenizer.json: it is not a CLIP tokenizer")
    try:
        tokenizer = CLIPTokenizer.from_pretrained(path, local_files_only=True)
        vocabulary = tokenizer.get_vocab()
    except Exception as error:  # the tokenizers library raises bare exceptions
        text = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(f"{path} cannot be loaded as a CLIP tokenizer: {text}") from error
    # Some versions of transformers build a two-token tokenizer from a folder without vocabulary.
    if not {START, END} <= vocabulary.keys() or len(vocabulary) < 256:
        raise ConfigError(f"{path} has {len(vocabulary):,} tokens: it is not a CLIP tokenizer")
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()

    def count(captions: Sequence[str]) -> list[int]:
        return [len(encoding.ids) for encoding in backend.encode_batch(list(captions))]

    return count
