"""
The testbed's text: the source code of the packages in packages.txt, below data/testbed_texts/SIDE/, and a
byte-level BPE of 4,096 tokens trained on the pretraining side. `make testbed` runs it, prepares the tokens
and trains the model.

Generated tables and files that are no UTF-8 are left out, and each text is taken once.
"""
import glob
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import zipfile

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

HERE = os.path.dirname(os.path.abspath(__file__))
TEXTS = "data/testbed_texts"
LARGEST = 200_000  # bytes; longer files are mostly tables


def sources(wheel):
    """Yields (path, text) of the .py files in a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        for entry in sorted(archive.infolist(), key=lambda entry: entry.filename):
            if entry.filename.endswith(".py") and 0 < entry.file_size <= LARGEST:
                try:
                    yield entry.filename, archive.read(entry).decode()
                except UnicodeDecodeError:
                    pass


def unpack(side, requirement, seen):
    """Write a package's files, except texts that were seen before. Returns the number of bytes written."""
    size = 0
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "--no-deps", "--only-binary=:all:", "--dest", folder, requirement], check=True)
        (wheel,) = glob.glob(folder + "/*.whl")
        for path, text in sources(wheel):
            digest = hashlib.sha256(text.encode()).digest()
            if digest not in seen:
                seen.add(digest)
                path = os.path.join(TEXTS, side, path)
                os.makedirs(os.path.dirname(path), exist_ok=True)
                with open(path, "w") as f:
                    f.write(text)
                size += len(text.encode())
    return size


def train_tokenizer():
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=4096, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet)
    bpe.train(sorted(glob.glob(f"{TEXTS}/pretrain/**/*.py", recursive=True))[::4], trainer)
    os.makedirs(f"{TEXTS}/tokenizer", exist_ok=True)
    bpe.save(f"{TEXTS}/tokenizer/tokenizer.json")
    with open(f"{TEXTS}/tokenizer/tokenizer_config.json", "w") as f:
        json.dump(dict(tokenizer_class="PreTrainedTokenizerFast", eos_token="<|endoftext|>"), f)


def main():
    seen = set()
    with open(os.path.join(HERE, "packages.txt")) as f:
        for line in f:
            if not line.startswith("#"):
                side, requirement = line.split()
                print(f"{side:<10}{requirement:<32}{unpack(side, requirement, seen):>12,} bytes", flush=True)
    train_tokenizer()


if __name__ == "__main__":
    main()
