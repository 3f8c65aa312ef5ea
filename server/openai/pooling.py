"""What requests that are pooled have in common, and how their answers begin and end."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated

from pydantic import Field

from slipstream.runtime.pooling import PoolingParams
from slipstream.runtime.request import RequestOutput
from slipstream.runtime.request_factory import Prompt
from slipstream.runtime.sampling.params import SamplingParams
from slipstream.server.core.fields import Flag, Ignored
from slipstream.server.core.job import Job
from slipstream.server.core.usage import Usage
from slipstream.server.openai.protocol import ModelRequest, OptionalInt

# An engine that pools reads none of it.
_NO_OUTPUT = SamplingParams(max_tokens=1)
Cut = Annotated[int, Field(strict=True, ge=-1)] | None


class PoolingRequest(ModelRequest):
    """What requests for vectors and for scores have in common."""

    truncate_prompt_tokens: Cut = None
    priority: OptionalInt = None
    normalize: Flag = None
    user: Ignored = None


def job_of(
    request: PoolingRequest, prompts: Sequence[Prompt], params: Sequence[PoolingParams], name: str
) -> Job:
    """What a request asks of the engine; ``name`` is the field of its prompts."""
    priority = request.priority or 0
    return Job(prompts, _NO_OUTPUT, "final", priority, fields={"prompt": name}, pooling=params)


@dataclass(slots=True)
class Answer:
    """The frame of an answer: its name, its model and what it took."""

    prefix: str
    model: str
    usage: Usage = field(default_factory=Usage)

    def head(self) -> dict[str, object]:
        """The fields that name it."""
        request_id = self.prefix + uuid.uuid4().hex
        return {"id": request_id, "created": int(time.time()), "model": self.model}

    def count(self, outputs: Sequence[RequestOutput]) -> dict[str, int]:
        """Take outputs into account, and tell what all took."""
        for position, output in enumerate(outputs):
            self.usage.add(output, position)
        return {"prompt_tokens": self.usage.prompt, "total_tokens": self.usage.prompt}
