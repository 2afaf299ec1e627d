"""Prepare the training data of the shipped model: texts, tokenizer and token arrays, in one folder.

    apt-get download python3.11-doc && dpkg -x python3.11-doc_*.deb unpacked
    python training/prepare.py --sources unpacked/usr/share/doc/python3.11/html/_sources --docstrings --out DATA

writes to DATA: ``{train,valid,test}.txt``; ``{train,valid,test}.npy`` (uint16 [tokens], every document after one end-of-text
token); ``tokenizer.json`` and ``tokenizer_config.json`` (byte-level BPE, trained on the training split only); and
``manifest.json`` (sha256 and counts of everything). ``--excerpts qlab/data/text`` renews the texts shipped in the package.
``--docstrings`` adds those of the standard library of the Python that runs this script; its version is in the manifest.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import sysconfig
from pathlib import Path

import numpy as np
from corpus import SPLITS, Document, docstrings, documentation, excerpt, without_shared_paragraphs
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

VOCABULARY = 2048
END_OF_TEXT = "<|endoftext|>"
MAX_LENGTH = 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sources", type=Path, required=True, help="_sources folder of Python's HTML documentation")
    parser.add_argument("--docstrings", action="store_true", help="add the running Python's standard library docstrings")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--excerpts", type=Path, help="also write heldout.txt and calibration.txt here")
    args = parser.parse_args()

    documents = documentation(args.sources)
    if args.docstrings:
        documents += docstrings(Path(sysconfig.get_paths()["stdlib"]))
    documents = without_shared_paragraphs(documents)
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer([d.text for d in documents if d.split == "train"])
    save_tokenizer(tokenizer, args.out)
    manifest = {
        "schema": 1,
        "source": "reST sources of the Python documentation (Debian package python3.11-doc), PSF licence version 2",
        "docstrings_of_python": platform.python_version() if args.docstrings else None,
        "tokenizer": {"vocabulary": VOCABULARY, "sha256": sha256((args.out / "tokenizer.json").read_bytes())},
        "splits": {split: write_split(documents, split, tokenizer, args.out) for split in SPLITS},
        "files": {s: [d.name for d in documents if d.split == s] for s in ("valid", "test")},
    }
    write_text(args.out / "manifest.json", json.dumps(manifest, indent=1) + "\n")
    if args.excerpts:
        args.excerpts.mkdir(parents=True, exist_ok=True)
        write_text(args.excerpts / "heldout.txt", excerpt(documents, "test", 80_000, 8_000))
        write_text(args.excerpts / "calibration.txt", excerpt(documents, "train", 200_000, 5_000))
    print(json.dumps(manifest["splits"], indent=1))


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Byte-level BPE without normalisation, so that decoding returns every text exactly; id 0 is the end-of-text token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    end = tokenizer.token_to_id(END_OF_TEXT)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END_OF_TEXT} $A", pair=f"{END_OF_TEXT} $A {END_OF_TEXT} $B", special_tokens=[(END_OF_TEXT, end)]
    )
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        "model_max_length": MAX_LENGTH,
        "clean_up_tokenization_spaces": False,
    }
    write_text(folder / "tokenizer.json", tokenizer.to_str(pretty=False))
    write_text(folder / "tokenizer_config.json", json.dumps(config, indent=2) + "\n")


def write_split(documents: list[Document], split: str, tokenizer: Tokenizer, folder: Path) -> dict[str, int | str]:
    texts = [d.text for d in documents if d.split == split]
    joined = "".join(texts).encode()
    tokens = np.concatenate([np.array(e.ids, dtype=np.uint16) for e in tokenizer.encode_batch(texts)])
    write_text(folder / f"{split}.txt", "".join(texts))
    np.save(folder / f"{split}.partial.npy", tokens)
    os.replace(folder / f"{split}.partial.npy", folder / f"{split}.npy")
    return {
        "documents": len(texts),
        "bytes": len(joined),
        "tokens": len(tokens),
        "sha256_text": sha256(joined),
        "sha256_tokens": sha256(tokens.tobytes()),
    }


def write_text(path: Path, text: str) -> None:
    beside = path.with_name(path.name + ".partial")
    beside.write_bytes(text.encode())
    os.replace(beside, path)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


if __name__ == "__main__":
    main()
