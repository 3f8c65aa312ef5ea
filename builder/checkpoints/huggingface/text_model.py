"""The text model of a checkpoint that sees or hears, too: its part of config.json, its tensors.

Such a config.json has ``text_config`` beside those of the other models. The text model's tensors
are ``model.language_model.*``, or ``language_model.model.*`` in older files, where a text model
alone has ``model.*``.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from slipstream.builder.models import class_of, find_architecture, known_architectures
from slipstream.weights.json import Fields
from slipstream.weights.safetensors import StoredTensor

_TEXT = "text_config"
_MODEL = re.compile(r"(model\.language_model|language_model\.model)\.")
_HEAD = re.compile(r"(language_model\.)?(?=lm_head(\.|$))")
# What the whole says of its text, where it says it.
_OF_THE_WHOLE = ("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings")
# Keys under which quantization names the modules that it has left alone.
_LISTS = ("ignore", "ignored_layers", "modules_to_not_convert", "exclude_modules")


@dataclass(frozen=True, slots=True)
class TextModel:
    """``tensors`` have the names of a text model alone; ``left_out`` has those of all others."""

    tensors: Mapping[str, StoredTensor]
    left_out: tuple[str, ...]


def text_config(raw: Fields, *, has_head: bool) -> Fields | None:
    """The config.json of the text model alone; None where the whole is no more than that.

    ``has_head`` says whether there is a tensor of a head: older files do not say whether it is
    tied. CheckpointError for a text model of an unknown architecture.
    """
    names = raw.texts("architectures", ())
    if not raw.has(_TEXT) or not set(names).isdisjoint(known_architectures()):
        return None
    text = raw.fields(_TEXT)
    found = find_architecture(text.texts("architectures", ()), text.optional_text("model_type"))
    whole = {key: raw.values[key] for key in _OF_THE_WHOLE if raw.has(key)}
    tied = {"tie_word_embeddings": not has_head}
    own = {"architectures": [class_of(found.name)[0]], "model_type": found.name}
    return Fields({**tied, **text.values, **whole, **own}, raw.origin)


def text_tensors(stored: Mapping[str, StoredTensor]) -> TextModel:
    """The tensors of the text model apart from the others."""
    names = {name: text_name(name) for name in stored}
    tensors = {
        ours: replace(stored[theirs], name=ours)
        for theirs, ours in names.items()
        if ours is not None
    }
    return TextModel(tensors, tuple(name for name, ours in names.items() if ours is None))


def text_name(name: str) -> str | None:
    """A module or a tensor by its name in the text model alone; None for one of another model."""
    if _MODEL.match(name):
        return _MODEL.sub("model.", name, count=1)
    return _HEAD.sub("", name, count=1) if _HEAD.match(name) else None


def text_modules(quantization: Fields) -> Fields:
    """What is said of quantization, the modules in its lists by their names in the text model."""
    lists = {
        key: [text_name(name) or name for name in quantization.texts(key)]
        for key in _LISTS
        if quantization.has(key)
    }
    return replace(quantization, values={**quantization.values, **lists})


def counted(names: Iterable[str]) -> str:
    """Tensors by the models that they are of: ``vision_tower 437, multi_modal_projector 2``."""
    parts = (name.removeprefix("model.").split(".")[0] for name in names)
    return ", ".join(f"{part} {count}" for part, count in Counter(parts).most_common(8))
