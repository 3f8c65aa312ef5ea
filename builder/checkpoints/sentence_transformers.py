"""What the files of sentence-transformers beside a checkpoint say of its use: vectors or scores."""

from __future__ import annotations

from pathlib import Path
from typing import cast

from slipstream.builder.checkpoints.base import write_json
from slipstream.builder.contract import PoolingMode, Similarity
from slipstream.builder.pooling import StatedPooling
from slipstream.errors import CheckpointError
from slipstream.weights.json import Fields, Origin, parse, read_fields, read_text

MODULES = "modules.json"
SETTINGS = "config_sentence_transformers.json"
_POOLING, _SCORE, _NORMALIZE = "Pooling", "LogitScore", "Normalize"
# Each by the last part of its class.
_KNOWN = ("Transformer", _POOLING, _NORMALIZE, _SCORE)
_CLASSES = {
    "Transformer": "sentence_transformers.models.Transformer",
    _POOLING: "sentence_transformers.models.Pooling",
    _NORMALIZE: "sentence_transformers.models.Normalize",
    _SCORE: "sentence_transformers.cross_encoder.modules.logit_score.LogitScore",
}
_ANSWERS = ("true_token_id", "false_token_id")
_MODES: dict[str, PoolingMode] = {"lasttoken": "last", "mean": "mean"}
# Flags of older files, by the mode that each stands for.
_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
TRANSFORMER = "sentence_bert_config.json"
_MEND_MESSAGES = (
    "texts would be written in the chat template; leave it out for texts as they are, and write "
    "templates into the texts"
)
_REMEDY = "use a model that pools its last token or the mean of all, or correct the file"


def read_sentence_transformers(path: Path) -> StatedPooling | None:
    """What ``modules.json`` and the files it names say; None where there is none.

    Raises CheckpointError for modules that no engine computes.
    """
    if not (path / MODULES).is_file():
        return None
    places = dict(_modules(path))
    settings = _settings(path)
    given = settings.fields("prompts", {})
    prompts = {name: given.text(name) for name in given.values if given.has(name)}
    named = settings.optional_text("default_prompt_name")
    if named is not None and named not in prompts:
        raise settings.refusal("default_prompt_name", "the name of one of prompts")
    if _SCORE in places:
        answers = _answers(path / places[_SCORE])
        normalize = not (settings.optional_text("activation_fn") or "").endswith("Identity")
        return StatedPooling("score", "last", normalize, "dot", prompts, named, answers)
    _check_plain(path)
    mode = _mode(path / places[_POOLING]) if _POOLING in places else "mean"
    similarity = cast(
        Similarity, settings.choice("similarity_fn_name", ("cosine", "dot"), "cosine")
    )
    return StatedPooling("embed", mode, _NORMALIZE in places, similarity, prompts, named)


def write_sentence_transformers(directory: Path, stated: StatedPooling, width: int) -> None:
    """Write files that are read as ``stated``, in names that old and new sentence-transformers
    read; ``width`` is that of the model's states."""
    scores = stated.task == "score"
    kinds = ["Transformer", _SCORE if scores else _POOLING]
    kinds += [_NORMALIZE] * (stated.normalize and not scores)
    modules: list[dict[str, object]] = []
    for index, kind in enumerate(kinds):
        place = f"{index}_{kind}" if index else ""
        (directory / place).mkdir(exist_ok=True)
        modules.append({"idx": index, "name": str(index), "path": place, "type": _CLASSES[kind]})
    write_json(directory / MODULES, modules)
    own: dict[str, object] = dict(zip(_ANSWERS, stated.answers, strict=False))
    if not scores:
        own = {flag: _MODES.get(mode) == stated.mode for flag, mode in _FLAGS.items()}
        own["word_embedding_dimension"] = width
    write_json(directory / f"1_{kinds[1]}" / "config.json", own)
    settings: dict[str, object] = {
        "model_type": "CrossEncoder" if scores else "SentenceTransformer",
        "prompts": dict(stated.prompts),
        "default_prompt_name": stated.default_prompt,
    }
    if not scores:
        settings["similarity_fn_name"] = stated.similarity
    else:
        write_json(directory / TRANSFORMER, {"transformer_task": "text-generation"})
    if scores and not stated.normalize:
        settings["activation_fn"] = "torch.nn.modules.linear.Identity"
    write_json(directory / SETTINGS, settings)


def files_of(path: Path) -> list[Path]:
    """Every file that is read, if it is there."""
    if not (path / MODULES).is_file():
        return []
    folders = [place for _, place in _modules(path) if place]
    names = [MODULES, SETTINGS, TRANSFORMER, *(f"{folder}/config.json" for folder in folders)]
    return [path / name for name in names if (path / name).is_file()]


def _modules(path: Path) -> list[tuple[str, str]]:
    """Class and folder of every module."""
    origin = Origin(path / MODULES)
    listed = {"modules": parse(read_text(path / MODULES).encode(), origin)}
    entries = Fields(listed, origin).list_of_fields("modules")
    modules = [(entry.text("type").rpartition(".")[2], entry.text("path", "")) for entry in entries]
    for kind, place in modules:
        if kind not in _KNOWN:
            raise CheckpointError(
                f"{path / MODULES}: a module {kind:.80} follows the model, which is not computed; "
                f"known are {', '.join(_KNOWN)}: use another model"
            )
        if ".." in Path(place).parts or Path(place).is_absolute():
            raise CheckpointError(f"{path / MODULES}: {place:.80} is no folder beside it")
    return modules


def _settings(path: Path) -> Fields:
    file = path / SETTINGS
    return read_fields(file) if file.is_file() else Fields({}, Origin(file))


def _check_plain(path: Path) -> None:
    """Refuse a model whose texts are messages of its chat template."""
    file = path / TRANSFORMER
    if file.is_file():
        modalities = read_fields(file, Origin(file, _MEND_MESSAGES)).fields("modality_config", {})
        if modalities.has("message"):
            raise modalities.refusal("message", "none")


def _mode(folder: Path) -> PoolingMode:
    file = folder / "config.json"
    fields = read_fields(file, Origin(file, _REMEDY))
    key, modes = "pooling_mode", fields.values.get("pooling_mode")
    if modes is None:
        modes = [mode for flag, mode in _FLAGS.items() if fields.flag(flag, False)] or ["mean"]
        key = next((flag for flag, mode in _FLAGS.items() if mode in modes), key)
    found = modes if isinstance(modes, list) else [modes]
    if len(found) != 1 or found[0] not in _MODES:
        raise fields.refusal(key, f"one of {', '.join(_MODES)}")
    mode = _MODES[found[0]]
    if mode == "mean" and not fields.flag("include_prompt", True):
        raise fields.refusal("include_prompt", "true")
    return mode


def _answers(folder: Path) -> tuple[int, ...]:
    fields = read_fields(folder / "config.json")
    yes, no = fields.integer(_ANSWERS[0]), fields.optional_integer(_ANSWERS[1])
    return (yes,) if no is None else (yes, no)
