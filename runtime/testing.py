"""An engine without weights, to test whatever sits on top of the executor in milliseconds."""

from __future__ import annotations

import string
from typing import Any

import tokenizers

from slipstream.runtime.config import RuntimeConfig
from slipstream.runtime.executors.counting import CountingExecutor, counting_contract
from slipstream.runtime.loaded_engine import LoadedEngine
from slipstream.runtime.sampling.params import SamplingParams
from slipstream.runtime.text.tokenizer import Tokenizer
from slipstream.runtime.text.tokenizer_settings import TokenizerSettings

# One token a character, in the order in which the counting model says them; then end of sequence.
ALPHABET = string.ascii_lowercase + string.ascii_uppercase + string.digits + " .,:;!?-_\n"
EOS = len(ALPHABET)
VOCAB_SIZE = EOS + 1

_TEMPLATE = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }};{% endfor %}a:"


def counting_tokenizer() -> Tokenizer:
    """A tokenizer of single characters with an end-of-sequence token and a chat template."""
    vocab = {char: token for token, char in enumerate([*ALPHABET, "<eos>"])}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token=" "))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    # There is no byte token; but what falls back to bytes, grammars can know the tokens of.
    decoders = tokenizers.decoders
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens(["<eos>"])
    settings = TokenizerSettings({"eos_token": "<eos>"}, chat_templates={"default": _TEMPLATE})
    return Tokenizer(backend, settings)


def counting_engine(
    num_pages: int = 64,
    *,
    delay: float = 0.0,
    runs_ahead: bool = False,
    draft_tokens: int = 0,
    **options: Any,  # noqa: ANN401 - the fields of RuntimeConfig
) -> LoadedEngine:
    """The counting model, which continues "abc" with "defg..."; sampling is greedy by default."""
    config = RuntimeConfig().override({"page_size": 4, "max_seq_len": 256, **options})
    graphs, caches = counting_contract(config.page_size, VOCAB_SIZE)
    executor = CountingExecutor(
        num_pages,
        graphs,
        caches,
        delay=delay,
        runs_ahead=runs_ahead,
        draft_tokens=draft_tokens,
    )
    return LoadedEngine(
        executor=executor,
        tokenizer=counting_tokenizer(),
        config=config,
        caches=caches,
        vocab_size=VOCAB_SIZE,
        generation_defaults=SamplingParams(temperature=0, max_tokens=16),
        fingerprint="fp_counting",
        interactive_defaults=SamplingParams(temperature=0, max_tokens=16),
    )
