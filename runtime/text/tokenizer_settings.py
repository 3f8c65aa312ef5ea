"""What the files beside ``tokenizer.json`` say, as ``transformers`` reads them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tokenizers import AddedToken

from slipstream.weights.json import Fields, Origin, read_fields, read_text

_ROLES = frozenset(f"{role}_token" for role in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
_AGAIN = "fetch it again and build the engine again"
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


@dataclass(frozen=True, slots=True)
class TokenizerSettings:
    """Tokens and templates that ``tokenizer.json`` does not, or not alone, say.

    ``special_tokens``: text of the special tokens by role, e.g. ``{"eos_token": "</s>"}``.
    ``added_tokens``: those that the tokenizer is to have, in this order.
    ``marked_tokens``: those that it is to have as special ones; how it finds one that it has
    already stays as it is.
    ``eos_token_ids``: the ids that end a completion according to ``generation_config.json``.
    ``chat_templates``: Jinja source by name; the usual one is ``default``.
    """

    special_tokens: Mapping[str, str] = field(default_factory=dict)
    added_tokens: tuple[AddedToken, ...] = ()
    marked_tokens: tuple[AddedToken, ...] = ()
    eos_token_ids: frozenset[int] = frozenset()
    chat_templates: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def from_directory(cls, path: Path) -> TokenizerSettings:
        """Read the optional files; raises ``CheckpointError`` on one that is damaged."""
        config = _read(path / "tokenizer_config.json")
        legacy = _read(path / "special_tokens_map.json")
        # Where the newer file lists the added tokens, it is the one that counts.
        files = (legacy, config) if config.has("added_tokens_decoder") else (config, legacy)
        special = {name: token for file in files for name, token in _special_tokens(file)}
        listed = (token for file in files for token in _listed_tokens(file))
        return cls(
            {name: token.content for name, token in special.items()},
            tuple(_added_tokens(path, config, special.values())),
            (*special.values(), *listed),
            _token_ids(_read(path / "generation_config.json"), "eos_token_id"),
            _chat_templates(path, config),
        )


def _read(file: Path) -> Fields:
    origin = Origin(file, _AGAIN)
    return read_fields(file, origin) if file.is_file() else Fields({}, origin)


def _token_ids(config: Fields, key: str) -> frozenset[int]:
    """One token, several or none, which -1 stands for, too."""
    several = isinstance(config.values.get(key), list)
    one = (config.integer(key, minimum=-1),) if config.has(key) and not several else ()
    ids = config.integers(key, minimum=-1) if several else one
    return frozenset(token for token in ids if token >= 0)


def _special_tokens(config: Fields) -> Iterator[tuple[str, AddedToken]]:
    """Every ``..._token``: those of all models and a model's own, such as ``image_token``."""
    for name in filter(config.has, config.values):
        own = name.endswith("_token") and isinstance(config.values[name], str | Mapping)
        if name in _ROLES or own:
            yield name, _special_token(config, name)
    if isinstance(config.values.get("extra_special_tokens"), Mapping):
        named = config.fields("extra_special_tokens")
        yield from ((name, _special_token(named, name)) for name in named.values)


def _listed_tokens(config: Fields) -> Iterator[AddedToken]:
    """Special tokens without a role."""
    for key in ("additional_special_tokens", "extra_special_tokens"):
        if config.has(key) and not isinstance(config.values[key], Mapping):
            listed = {f"{key}[{i}]": token for i, token in enumerate(config.sequence(key))}
            fields = Fields(listed, config.origin, path=config.path)
            yield from (_special_token(fields, name) for name in listed)


def _special_token(config: Fields, name: str) -> AddedToken:
    # An object is a serialised AddedToken.
    if isinstance(config.values[name], Mapping):
        return _token(config.fields(name), special=True)
    return AddedToken(config.text(name), special=True, normalized=False)


def _token(fields: Fields, **more: bool) -> AddedToken:
    flags = {name: fields.flag(name) for name in _FLAGS if fields.has(name)}
    return AddedToken(fields.text("content"), **{**flags, **more})


def _added_tokens(
    path: Path, config: Fields, special: Iterable[AddedToken]
) -> Iterator[AddedToken]:
    """The tokens of ``added_tokens_decoder``, or else of the older added_tokens.json, by id."""
    if config.has("added_tokens_decoder"):
        tokens = config.fields_by_name("added_tokens_decoder")
        if not all(map(str.isdecimal, tokens)):
            raise config.refusal("added_tokens_decoder", "an object of tokens by their ids")
        yield from (_token(tokens[name]) for name in sorted(tokens, key=int))
        return
    older = _read(path / "added_tokens.json")
    known = {token.content for token in special}
    for text in sorted(older.values, key=older.integer):
        yield AddedToken(text, special=text in known, normalized=text not in known)


def _chat_templates(path: Path, config: Fields) -> dict[str, str]:
    file = path / "chat_template.jinja"
    if file.is_file():
        return {"default": read_template(file, _AGAIN)}
    if isinstance(config.values.get("chat_template"), list):
        entries = config.list_of_fields("chat_template")
        return {entry.text("name"): entry.text("template") for entry in entries}
    return {"default": config.text("chat_template")} if config.has("chat_template") else {}


def read_template(file: Path, remedy: str = "name a file of Jinja in UTF-8") -> str:
    """The text of a chat template; ``CheckpointError`` for a file that cannot be read."""
    return read_text(file, Origin(file, remedy))
