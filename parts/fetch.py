"""
A model's files from a hub. Without torch, whose import takes a second: prepare_owt.py needs only the tokenizer's files.
"""
import os
from contextlib import suppress
from glob import escape, glob

from parts.errors import UserError, asking_hub

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
                   "vocab.json", "merges.txt", "vocab.txt", "spiece.model", "tokenizer.model")


def fetch(source, weights=True):
    """The directory of a model: `source` itself, or the cached files of the hub repository NAME, ORG/NAME or either
    with @REVISION, if need be without weights. HF_HOME, HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE work as in
    huggingface_hub. UserError."""
    if os.path.isdir(source):
        return source
    if os.path.isfile(source):
        raise UserError(f"{source} is a file, but a model is a directory in Hugging Face's format. A checkpoint of "
                        "nanoGPT can't be read: its GELU is exact, GPT-2's the tanh approximation")
    repo, _, revision = source.partition("@")
    if repo.startswith((".", "/", "~")) or repo.count("/") > 1 or os.path.isdir(repo.split("/")[0]):
        raise UserError(f"there is no directory {source}")
    with asking_hub(f"{source} is not a directory here, and can't be fetched from",
                    "for a private or gated model, accept its terms there, and set HF_TOKEN or run `hf auth login`"):
        directory = download(repo, revision, "config.json", *TOKENIZER_FILES)
        if weights:
            download(repo, revision, "model.safetensors", "model-*.safetensors", "model.safetensors.index.json")
            if not glob(os.path.join(escape(directory), "model*.safetensors")):
                download(repo, revision, "pytorch_model.bin", "pytorch_model-*.bin", "pytorch_model.bin.index.json")
    return directory


def download(repo, revision, *files):
    """The cached directory of a repository, with those of the files that it has. A file of another size than the
    hub's is fetched anew."""
    from huggingface_hub import errors, get_cached_repo_tree, snapshot_download

    options = dict(revision=revision or None, allow_patterns=list(files), ignore_patterns=["*/*"])
    directory = snapshot_download(repo, **options)
    with suppress(errors.CachedRepoTreeNotFoundError):  # another program filled the cache
        for file in get_cached_repo_tree(repo, revision=os.path.basename(directory)):
            path = os.path.join(directory, file.path)
            if os.path.isfile(path) and os.path.getsize(path) != file.size:
                snapshot_download(repo, force_download=True, **options | dict(allow_patterns=[file.path]))
    return directory
