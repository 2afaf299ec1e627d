"""A checkpoint's identity, from its content and not its place."""

from __future__ import annotations

import hashlib
from pathlib import Path

from qlab import checkpoint, data
from qlab.checkpoint.config import parse
from qlab.checkpoint.files import inside, read_json
from qlab.errors import CheckpointError, QlabError
from qlab.logprobs.manifest import Model


def identify(directory: Path) -> Model:
    """Name, method and content digest of a Hugging Face directory. Reads every byte of its weights.

    Raises CheckpointError naming the file that is missing or damaged.
    """
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is not a directory; name one that holds config.json and safetensors files")
    config = read_json(directory, "config.json")
    vocabulary = config.get("vocab_size")
    if type(vocabulary) is not int or vocabulary < 1:
        raise CheckpointError(f"{directory / 'config.json'}: vocab_size is {vocabulary!r}; it must be a positive number")
    names = {p.name for p in directory.iterdir() if p.suffix == ".safetensors"}
    if not names:
        raise CheckpointError(f"{directory}: no *.safetensors file; is this a Hugging Face checkpoint?")
    names.add("config.json")
    method = "unquantised"
    if checkpoint.quantised(directory, config):
        declared = parse(directory, config)
        method = declared.method
        names.add(declared.source.name)
    lines = [f"{name} {_sha256(inside(directory, name, directory))}\n" for name in sorted(names)]
    digest = hashlib.sha256("".join(lines).encode()).hexdigest()
    return Model(directory.resolve().name, method, digest, vocabulary)


def check_same(generator: Model, model: Model, *, any_model: bool = False) -> None:
    """Raise QlabError where ``model`` cannot re-execute what ``generator`` made, or is not known to belong to it.

    Of the shipped model the AWQ and the GPTQ checkpoint belong together; of other models nobody can tell from the files, so
    ``any_model`` says it.
    """
    if generator.vocabulary != model.vocabulary:
        raise QlabError(
            f"the trace's model {generator.name} has {generator.vocabulary} token ids, {model.name} {model.vocabulary}; "
            "name a checkpoint of the same model"
        )
    if any_model or generator.digest == model.digest or {generator.digest, model.digest} <= set(_shipped()):
        return
    raise QlabError(
        f"the trace was made with {_said(generator)}, and this is {_said(model)}; name that checkpoint, or say "
        "--any-model if the other one is meant"
    )


def is_shipped(model: Model) -> bool:
    """Whether it is one of qlab's own checkpoints."""
    return model.digest in _shipped()


def _shipped() -> tuple[str, str]:
    return identify(data.model_directory("awq")).digest, identify(data.model_directory("gptq")).digest


def _said(model: Model) -> str:
    return f"{model.name} ({model.method}, {model.digest[:12]})"


def _sha256(path: Path) -> str:
    try:
        h = hashlib.sha256()
        with path.open("rb") as f:
            while part := f.read(2**22):
                h.update(part)
        return h.hexdigest()
    except OSError as e:
        raise CheckpointError(f"{path}: cannot be read ({e.strerror}); check the file and its permissions") from None
