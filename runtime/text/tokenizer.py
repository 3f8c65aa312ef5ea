"""Text to tokens and back, and chat templates, from the tokenizer files of an engine directory."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tokenizers
from tokenizers import AddedToken

from slipstream.errors import CheckpointError, ExecutionError, InvalidRequestError
from slipstream.runtime.text.stream import (
    BYTE_TOKEN,
    ByteLevelStream,
    TextStream,
    WindowStream,
    byte_level_bytes,
)
from slipstream.runtime.text.tokenizer_settings import TokenizerSettings, read_template
from slipstream.weights.tokenizer import read_tokenizer

if TYPE_CHECKING:
    from slipstream.runtime.text.chat_template import ChatTemplate

_FEW = 1000  # tokens whose text is quickly made


class Tokenizer:
    """A Hugging Face fast tokenizer with its chat templates; safe to use from several threads."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        settings: TokenizerSettings,
        vocab_size: int = sys.maxsize,
    ) -> None:
        """Wrap ``backend``, switching off truncation and padding: no prompt is cut silently.

        It gets the tokens of ``settings`` that the model knows, which has ``vocab_size`` of them.
        """
        backend.no_truncation()
        backend.no_padding()
        _add_tokens(backend, settings, vocab_size)
        self._backend = backend
        self._settings = settings
        self._vocab_size = vocab_size
        self._templates: dict[str, ChatTemplate] = {}
        self._bytes: dict[int, bytes] = {}
        self._widths: dict[int, int] = {}
        self._byte_level = _is_byte_level(backend)
        self.special_token_ids = frozenset(
            i for i, token in backend.get_added_tokens_decoder().items() if token.special
        )
        self.bos_token_id = self._special_id("bos_token")
        self.eos_token_id = self._special_id("eos_token")
        eos = () if self.eos_token_id is None else (self.eos_token_id,)
        self.eos_token_ids = settings.eos_token_ids | frozenset(eos)

    def __reduce__(self) -> tuple[type[Tokenizer], tuple[object, ...]]:
        """It is the same in another process."""
        return Tokenizer, (self._backend, self._settings, self._vocab_size)

    @classmethod
    def from_directory(
        cls,
        path: str | Path,
        vocab_size: int = sys.maxsize,
        chat_template: str | Path | None = None,
    ) -> Tokenizer:
        """Load ``tokenizer.json`` and what lies beside it.

        Reads special_tokens_map.json, added_tokens.json, tokenizer_config.json,
        generation_config.json and chat_template.jinja where present; ``chat_template`` is the file
        of another template, which takes the place of the model's. Tokens that only the smaller
        files name are left out at and above ``vocab_size``, the width of the model's logits. Raises
        ``CheckpointError`` if a file is missing or damaged.
        """
        file = Path(path) / "tokenizer.json"
        if not file.is_file():
            raise CheckpointError(
                f"{file} is missing; an engine needs a fast tokenizer: save one with transformers' "
                "AutoTokenizer.from_pretrained(...).save_pretrained(...) and build again"
            )
        backend = read_tokenizer(file)
        settings = TokenizerSettings.from_directory(Path(path))
        if chat_template is None:
            return cls(backend, settings, vocab_size)
        given = {"default": read_template(Path(chat_template))}
        tokenizer = cls(backend, replace(settings, chat_templates=given), vocab_size)
        tokenizer._compiled("default")  # a broken one is told at once
        return tokenizer

    @property
    def vocab_size(self) -> int:
        """How many tokens there are, added ones included; a model's logits may be wider."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    @property
    def added_tokens(self) -> dict[int, str]:
        """Tokens beside the vocabulary proper, as a text or a grammar names them."""
        return {i: token.content for i, token in self._backend.get_added_tokens_decoder().items()}

    @property
    def special_tokens(self) -> Mapping[str, str]:
        """Text of the special tokens by role, such as ``eos_token``."""
        return self._settings.special_tokens

    @property
    def marker_tokens(self) -> dict[str, int]:
        """Ids of added tokens that are special or look like a tag (``<think>``): to a grammar they
        are no text, but tokens of their own."""
        added = self._backend.get_added_tokens_decoder().items()
        return {
            token.content: i
            for i, token in added
            if token.special or (token.content[:1], token.content[-1:]) == ("<", ">")
        }

    @property
    def chat_templates(self) -> Mapping[str, str]:
        """Jinja sources of all chat templates by name."""
        return self._settings.chat_templates

    @property
    def chat_template(self) -> str | None:
        """Jinja source of the usual chat template."""
        return self._settings.chat_templates.get("default")

    @property
    def has_chat_template(self) -> bool:
        """Whether ``apply_chat_template`` can work."""
        return bool(self._settings.chat_templates)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of ``text``, with what the tokenizer puts around a text (e.g. BOS) if asked."""
        if not isinstance(text, str):
            raise InvalidRequestError(
                f"the prompt is {type(text).__name__} {text!r:.80}, expected text", param="prompt"
            )
        try:
            # `encode` would hold the interpreter's lock to its end: seconds for megabytes of text.
            (encoded,) = self._backend.encode_batch_fast(
                [text], add_special_tokens=add_special_tokens
            )
            return encoded.ids
        except (TypeError, UnicodeError) as error:
            raise InvalidRequestError(
                f"the prompt {text!r:.80} is not valid Unicode ({error}); remove lone surrogates",
                param="prompt",
            ) from error
        except BaseException as error:
            if not _is_panic(error):
                raise
            raise InvalidRequestError(
                f"the tokenizer gave up on the prompt {text!r:.80} ({error}); send another text, or"
                " mend tokenizer.json in the checkpoint and build the engine again",
                param="prompt",
            ) from error

    def offsets(self, text: str) -> list[int]:
        """Where in ``text`` each token of ``encode(text)`` begins; one that the tokenizer puts
        around it (e.g. BOS) has no length, and the parts of a character begin where that does."""
        (encoded,) = self._backend.encode_batch([text])
        offsets, end = [], 0
        for start, stop in encoded.offsets:
            offsets.append(min(start, end) if start < stop else end)
            end = max(end, stop)
        return offsets

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of all tokens at once; ids outside the vocabulary are left out.

        Raises ``ExecutionError`` where the library panics.
        """
        return self._decode(token_ids, skip_special_tokens)

    def least_tokens(self, text: str) -> int:
        """A number of tokens that ``text`` has at least, told from its length alone."""
        return len(text.encode("utf-8", "surrogatepass")) // self._most_bytes

    @cached_property
    def _most_bytes(self) -> int:
        """The most bytes of a text that one token can stand for."""
        # In a byte-level vocabulary a character is a byte; elsewhere it is at most as long as here.
        sizes = [
            len(token) if self._byte_level else len(token.encode())
            for token in self._backend.get_vocab(with_added_tokens=False)
        ]
        added = self._backend.get_added_tokens_decoder().values()
        sizes += [len(token.content.encode()) for token in added]
        longest = max(4, *sizes)  # a character that no token knows has up to 4
        # Composing characters (NFC) makes a text up to three times as short.
        return longest if self._backend.normalizer is None else 3 * longest

    @property
    def vocabulary(self) -> dict[str, int]:
        """Every token as its file spells it, and its id."""
        vocabulary: dict[str, int] = self._backend.get_vocab()
        return vocabulary

    def to_json(self) -> str:
        """All of it as the text of a ``tokenizer.json``."""
        return self._backend.to_str()

    def token_to_id(self, token: str) -> int | None:
        """The id of a token written as in the vocabulary."""
        return self._backend.token_to_id(token)

    def id_to_token(self, token_id: int) -> str | None:
        """A token as written in the vocabulary, or None outside it."""
        return self._backend.id_to_token(token_id)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token adds to a text: maybe a part of a character, or a special token's
        own name; none for an id outside the vocabulary."""
        if self._byte_level:
            return self._token_bytes(token_id)
        fallback = BYTE_TOKEN.fullmatch(self._backend.id_to_token(token_id) or "")
        if fallback:
            return bytes([int(fallback[1], 16)])
        # A decoder may treat the first token of a text differently.
        first, both = (self.decode([token_id] * n, skip_special_tokens=False) for n in (1, 2))
        return both[len(first) :].encode()

    def text_stream(
        self,
        *,
        skip_special_tokens: bool,
        shown_special_tokens: Sequence[str] = (),
        prompt: Sequence[int] = (),
    ) -> TextStream:
        """A stream whose increments join to ``decode`` of its tokens, as text after ``prompt``;
        special tokens that are ``shown_special_tokens`` are never left out."""
        skip: frozenset[int] = frozenset()
        if skip_special_tokens:
            shown = map(self._backend.token_to_id, shown_special_tokens)
            skip = self.special_token_ids.difference(shown)
        if self._byte_level:
            return ByteLevelStream(self._token_bytes, skip)

        return WindowStream(self._decode, self._backend.id_to_token, skip, prompt, self._widths)

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        continue_final_message: bool = False,
        **variables: Any,  # noqa: ANN401 - templates define their own
    ) -> str:
        """The prompt text for a conversation; encode it with ``add_special_tokens=False``.

        The assistant's turn is begun (``add_generation_prompt``), unless the last message is to be
        gone on with (``continue_final_message``): then the text ends with what it says.
        ``variables`` reach the template (e.g. ``enable_thinking=False``). Raises
        ``InvalidRequestError`` if there is no template, the messages are malformed, or the
        template refuses them.
        """
        if add_generation_prompt and continue_final_message:
            raise InvalidRequestError(
                "continue_final_message and add_generation_prompt cannot both be true; leave one "
                "out",
                param="continue_final_message",
            )
        if add_generation_prompt is None:
            add_generation_prompt = not continue_final_message
        # Imported here because jinja2 is slow to import and plain prompts do not need it.
        from slipstream.runtime.text.chat_template import select_template

        name = select_template(self._settings.chat_templates, with_tools=tools is not None)
        variables = {
            **self._settings.special_tokens,
            "documents": None,
            **variables,
            "add_generation_prompt": add_generation_prompt,
        }
        render = self._compiled(name).render
        return render(messages, tools, variables, continue_final_message=continue_final_message)

    def _compiled(self, name: str) -> ChatTemplate:
        from slipstream.runtime.text.chat_template import ChatTemplate

        if name not in self._templates:
            self._templates[name] = ChatTemplate(self._settings.chat_templates[name])
        return self._templates[name]

    def _decode(self, token_ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        backend, skip = self._backend, skip_special_tokens
        try:
            if len(token_ids) <= _FEW:
                return backend.decode(token_ids, skip_special_tokens=skip)
            # `decode` would hold the interpreter's lock to its end.
            (text,) = backend.decode_batch([token_ids], skip_special_tokens=skip)
            return text
        except BaseException as error:
            if not _is_panic(error):
                raise
            raise ExecutionError(
                f"the tokenizer gave up on decoding {len(token_ids)} tokens ({error}); mend"
                " tokenizer.json in the checkpoint and build the engine again"
            ) from error

    def _special_id(self, name: str) -> int | None:
        token = self._settings.special_tokens.get(name)
        return None if token is None else self._backend.token_to_id(token)

    def _token_bytes(self, token_id: int) -> bytes:
        known = self._bytes.get(token_id)
        if known is None:
            known = byte_level_bytes(self._backend.id_to_token(token_id) or "")
            self._bytes[token_id] = known
        return known


def _add_tokens(
    backend: tokenizers.Tokenizer, settings: TokenizerSettings, vocab_size: int
) -> None:
    backend.add_tokens(_within(backend, settings.added_tokens, vocab_size))
    known = {token.content: token for token in backend.get_added_tokens_decoder().values()}
    marked = _within(backend, settings.marked_tokens, vocab_size)
    backend.add_special_tokens([known.get(token.content, token) for token in marked])


def _within(
    backend: tokenizers.Tokenizer, tokens: Iterable[AddedToken], vocab_size: int
) -> list[AddedToken]:
    """The tokens that the backend has, or will give an id below ``vocab_size``."""
    added = max(backend.get_added_tokens_decoder(), default=-1)
    room = vocab_size - max(backend.get_vocab_size(with_added_tokens=False), added + 1)
    new = dict.fromkeys(t.content for t in tokens if backend.token_to_id(t.content) is None)
    beyond = set(list(new)[max(room, 0) :])
    return [token for token in tokens if token.content not in beyond]


def _is_panic(error: BaseException) -> bool:
    """Whether the Rust library panicked: what it then raises is no ``Exception``, and its class can
    be imported from nowhere."""
    return type(error).__name__ == "PanicException"


def _is_byte_level(backend: tokenizers.Tokenizer) -> bool:
    """Whether text is made of tokens by GPT-2's alphabet of bytes, and by nothing else."""
    return backend.decoder is not None and {"ByteLevel"} == set(
        _decoders(json.loads(backend.decoder.__getstate__()))
    ) - {"Fuse"}


def _decoders(decoder: Mapping[str, Any]) -> Iterator[str]:
    """The kinds of a decoder's steps, of which ``Sequence`` has several."""
    if decoder["type"] == "Sequence":
        for step in decoder["decoders"]:
            yield from _decoders(step)
    else:
        yield decoder["type"]
