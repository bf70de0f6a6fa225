"""CLIP's tokenizer: the real one, as the pipelines call it, in any process."""

import json
import multiprocessing
import pickle
import shutil

import pytest
import torch
from helpers.campaign import examples
from hypothesis import given
from hypothesis import strategies as st
from transformers import CLIPTokenizer

from kandinsky_dist.errors import ConfigError
from kandinsky_dist.models import tokenizer as tokenizer_module
from kandinsky_dist.models.tokenizer import END, START, load_tokenizer, write_tokenizer

CAT = [49406, 320, 1125, 539, 320, 2368, 49407]


def reference(folder, captions):
    """As diffusers' prior pipeline calls it."""
    tokenizer = CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer")
    return tokenizer(
        captions,
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_attention_mask=True,
        return_tensors="pt",
    )


def test_known_caption(prior_folder):
    tokens_BL, mask_BL = load_tokenizer(prior_folder)(["a photo of a cat", ""])
    assert tokens_BL.shape == mask_BL.shape == (2, 77)
    assert tokens_BL.dtype == torch.int64
    assert mask_BL.dtype == torch.bool
    assert tokens_BL[0].tolist() == CAT + [49407] * 70
    assert mask_BL.sum(1).tolist() == [7, 2]


def test_no_captions(prior_folder):
    tokens_BL, mask_BL = load_tokenizer(prior_folder)([])
    assert tokens_BL.shape == mask_BL.shape == (0, 77)


@examples(25, fast=8)
@given(st.lists(st.text(max_size=120), min_size=1, max_size=3))
def test_same_as_the_pipelines_own_call(prior_folder, captions):
    tokens_BL, mask_BL = load_once(prior_folder)(captions)
    expected = reference_once(prior_folder)(captions)
    assert torch.equal(tokens_BL, expected["input_ids"])
    assert torch.equal(mask_BL, expected["attention_mask"].bool())


_loaded: dict = {}


def load_once(folder):
    return _loaded.setdefault(("ours", folder), load_tokenizer(folder))


def reference_once(folder):
    if ("reference", folder) not in _loaded:
        tokenizer = CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer")
        _loaded["reference", folder] = lambda captions: tokenizer(
            captions, padding="max_length", max_length=77, truncation=True, return_tensors="pt"
        )
    return _loaded["reference", folder]


def test_long_captions_are_cut_and_still_end(prior_folder):
    captions = ["word " * 200, "Ünïcode 🚒 naïve " * 40]
    tokens_BL, mask_BL = load_tokenizer(prior_folder)(captions)
    assert torch.equal(tokens_BL, reference(prior_folder, captions)["input_ids"])
    assert tokens_BL[:, -1].tolist() == [49407, 49407]
    assert mask_BL.all()


def _in_child(tokenize, connection):
    connection.send(tokenize(["a photo of a cat"])[0][0, :7].tolist())


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_works_after_a_fork_that_follows_use(prior_folder):
    tokenize = load_tokenizer(prior_folder)
    tokenize(["warm"] * 8)
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    child = context.Process(target=_in_child, args=(tokenize, theirs))
    child.start()
    assert ours.poll(120), "the child hangs"
    assert ours.recv() == CAT
    child.join()
    assert child.exitcode == 0


def test_pickles_as_a_path(prior_folder):
    tokenize = load_tokenizer(prior_folder)
    tokenize([""])
    content = pickle.dumps(tokenize)
    assert len(content) < 1000
    assert pickle.loads(content)(["a photo of a cat"])[0][0, :7].tolist() == CAT


@pytest.fixture
def copy(tmp_path, prior_folder):
    ignore = shutil.ignore_patterns("*.safetensors")
    return shutil.copytree(prior_folder, tmp_path / "prior", ignore=ignore)


def test_the_two_token_trap_is_refused(copy):
    for name in ("vocab.json", "merges.txt"):
        (copy / "tokenizer" / name).unlink()
    with pytest.raises(ConfigError, match=r"no vocab\.json and no tokenizer\.json"):
        load_tokenizer(copy)
    CLIPTokenizer(vocab={START: 0, END: 1}, merges=[]).save_pretrained(copy / "tokenizer")
    with pytest.raises(ConfigError, match=r"has 2 tokens, its text encoder 49,408"):
        load_tokenizer(copy)


def test_another_vocabulary_is_refused(copy):
    path = copy / "text_encoder" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "vocab_size": 1000}))
    with pytest.raises(ConfigError, match=r"49,408 tokens, its text encoder 1,000"):
        load_tokenizer(copy)


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt"])
def test_damaged_files_are_one_line(copy, name):
    path = copy / "tokenizer" / name
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ConfigError) as caught:
        load_tokenizer(copy)
    print(caught.value)
    assert str(copy / "tokenizer") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_copies_the_tokenizer_of_a_pipeline_or_a_folder(tmp_path, prior_folder):
    for index, source in enumerate((prior_folder, prior_folder / "tokenizer")):
        write_tokenizer(tmp_path / str(index), str(source))
        assert CLIPTokenizer.from_pretrained(tmp_path / str(index))("a photo of a cat")["input_ids"] == CAT


def test_without_a_network_the_line_names_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    with pytest.raises(ConfigError, match=r"open-clip-torch==3\.3\.0 by pip: .*--tokenizer") as caught:
        write_tokenizer(tmp_path / "tokenizer", None)
    assert "\n" not in str(caught.value)


def test_a_damaged_cache_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "kandinsky-dist").mkdir()
    cached = tmp_path / "kandinsky-dist" / "bpe_simple_vocab_16e6.txt.gz"
    cached.write_bytes(b"\x1f\x8b broken")
    with pytest.raises(ConfigError, match=r"is damaged .*: delete it and try again"):
        write_tokenizer(tmp_path / "tokenizer", None)


def test_byte_characters_are_a_bijection():
    characters = tokenizer_module._byte_characters()
    assert len(set(characters)) == 256
    assert characters[:3] == ["!", '"', "#"]
