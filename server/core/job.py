"""What one request of a client asks of the engine, whatever API it came through."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from slipstream.runtime.chat.conversation import Conversation
from slipstream.runtime.pooling import PoolingParams
from slipstream.runtime.request import OutputKind
from slipstream.runtime.request_factory import Prompt
from slipstream.runtime.sampling.params import SamplingParams


@dataclass(frozen=True, slots=True)
class Job:
    """What one request of a client asks of the engine.

    ``fields`` says what the client's API calls a parameter, where that is another name.

    ``add_special_tokens``: whether texts are encoded with what the tokenizer puts around them;
    None: prompts are, and conversations, whose templates write it themselves, are not.

    ``pooling``: how each prompt is pooled; none: they are continued.

    ``last_tokens``: only so many of each prompt's last tokens are read, -1: as many as fit; None:
    all, and too many are refused. Prompts are remembered among jobs of equal ``cache_salt`` only.
    """

    prompts: Sequence[Prompt | Conversation]
    params: SamplingParams
    kind: OutputKind
    priority: int = 0
    add_special_tokens: bool | None = None
    fields: Mapping[str, str] = field(default_factory=dict)
    pooling: Sequence[PoolingParams] = ()
    last_tokens: int | None = None
    cache_salt: str = ""

    @property
    def cuts(self) -> bool:
        """Whether prompts may be longer than what is read of them."""
        return self.last_tokens is not None

    def cut(self, prompt: Prompt, max_seq_len: int) -> Prompt:
        """What is read of a prompt, which is tokens if it is cut."""
        if self.last_tokens is None or isinstance(prompt, str):
            return prompt
        room = max(1, max_seq_len - (self.params.max_tokens or 1))
        return prompt[-(room if self.last_tokens < 0 else self.last_tokens) :]
