"""What the files of sentence-transformers beside a checkpoint say of its use: vectors or scores."""

from __future__ import annotations

from pathlib import Path
from typing import cast

from slipstream.builder.contract import PoolingMode, Similarity
from slipstream.builder.pooling import StatedPooling
from slipstream.errors import CheckpointError
from slipstream.weights.json import Fields, Origin, parse, read_fields, read_text

MODULES = "modules.json"
SETTINGS = "config_sentence_transformers.json"
_POOLING, _SCORE, _NORMALIZE = "Pooling", "LogitScore", "Normalize"
# Each by the last part of its class.
_KNOWN = ("Transformer", _POOLING, _NORMALIZE, _SCORE)
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
    no = fields.optional_integer("false_token_id")
    yes = fields.integer("true_token_id")
    return (yes,) if no is None else (yes, no)
