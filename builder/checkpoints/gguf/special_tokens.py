"""Special tokens of a GGUF file that not its keys but names and habit tell, as in llama.cpp."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gguf.constants import TokenType

# Whatever type the file gives them: nothing but a mark of a template is called so.
_NAMES = frozenset(
    {
        "<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<|endoftext|>", "<|end_of_text|>",
        "<end_of_turn>", "<end_of_utterance>", "<turn|>", "<|tool_response>", "<EOT>", "_<EOT>",
        "[EOT]", "[EOS]", "[e~[", "<|return|>", "<|call|>", "<|calls|>",
        "<|flush|>", "<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<|fim_repo|>", "<|repo_name|>",
        "<fim-repo>", "<reponame>", "<|file_sep|>", "<\uff5cend\u2581of\u2581sentence\uff5c>",
    }
)  # fmt: skip
# Common words of some vocabularies, too.
_NAMES_OF_CONTROL = frozenset({"</s>", "<eos>", "<PAD>", "[PAD]", "<REPO>"})
# Where one of these stands, `<|end|>` ends a part of an answer only.
_PARTS = ({"<|return|>", "<|call|>"}, {"<|call|>", "<|flush|>"}, {"<|calls|>", "<|flush|>"})


# What a SentencePiece vocabulary has where the file does not say it.
_SENTENCEPIECE = {"unknown": 0, "bos": 1, "eos": 2}


def token_id(metadata: Mapping[str, Any], role: str) -> Any:  # noqa: ANN401  as it stands there
    """The id of a special token; None where there is none."""
    usual = _SENTENCEPIECE if metadata.get("tokenizer.ggml.model") == "llama" else {}
    value = metadata.get(f"tokenizer.ggml.{role}_token_id")
    return usual.get(role) if value is None else value


def end_tokens(tokens: Sequence[str], types: Sequence[int]) -> dict[str, int]:
    """The ids of tokens that end an answer by their names."""
    named = {token: index for index, token in enumerate(tokens) if token in _NAMES}
    if any(part <= named.keys() for part in _PARTS):
        named.pop("<|end|>", None)
    control = {
        token: index
        for index, token in enumerate(tokens)
        if token in _NAMES_OF_CONTROL and index < len(types) and types[index] == TokenType.CONTROL
    }
    return named | control


def end_token_ids(metadata: Mapping[str, Any]) -> list[Any]:
    """The tokens that end a text or a turn: those that the file names as such, then those by name.

    Values are as they stand in the file.
    """
    given = (token_id(metadata, name) for name in ("eos", "eot", "eom"))
    found = [token for token in given if token is not None]
    tokens, types = (metadata.get(f"tokenizer.ggml.{key}") for key in ("tokens", "token_type"))
    if isinstance(tokens, list) and all(isinstance(token, str) for token in tokens):
        found += end_tokens(tokens, types if isinstance(types, list) else ()).values()
    return [token for i, token in enumerate(found) if token not in found[:i]]
