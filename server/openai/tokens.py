"""``/tokenize``, ``/detokenize`` and ``/tokenizer_info``, in vLLM's shapes."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from slipstream.errors import InvalidRequestError
from slipstream.runtime.text.tokenizer import Tokenizer
from slipstream.server.core.dump import dump
from slipstream.server.core.http.respond import service_of
from slipstream.server.core.refusal import Refusal
from slipstream.server.core.service import Service
from slipstream.server.openai.messages import conversation_of
from slipstream.server.openai.protocol import DetokenizeRequest, TokenizeRequest

router = APIRouter()


@router.post("/tokenize")
async def tokenize(body: TokenizeRequest, request: Request) -> Response:
    """Token ids of a text, or of a conversation in the model's chat template."""
    service = service_of(request)
    service.model(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise Refusal("invalid", "give either prompt or messages", param="prompt")
    prompt = conversation_of(body) if body.prompt is None else body.prompt
    tokens = await service.encode(prompt, body.add_special_tokens)
    answer = await service.llm.workers.run(
        len(tokens), _tokenized, service, tokens, bool(body.return_token_strs)
    )
    return Response(answer, media_type="application/json")


def _tokenized(service: Service, tokens: list[int], named: bool) -> bytes:
    tokenizer, max_seq_len = service.llm.tokenizer, service.llm.config.max_seq_len
    names = [tokenizer.id_to_token(i) for i in tokens] if named else None
    return dump({"count": len(tokens), "max_model_len": max_seq_len, "tokens": tokens,
                 "token_strs": names})  # fmt: skip


@router.post("/detokenize")
async def detokenize(body: DetokenizeRequest, request: Request) -> Response:
    """The text of token ids."""
    service = service_of(request)
    service.model(body.model)
    answer = await service.llm.workers.run(
        len(body.tokens), _detokenize, service.llm.tokenizer, body.tokens
    )
    return Response(answer, media_type="application/json")


def _detokenize(tokenizer: Tokenizer, tokens: list[int]) -> bytes:
    if tokens and max(tokens) >= tokenizer.vocab_size:
        raise InvalidRequestError(
            f"tokens holds {max(tokens)}; this model's tokens go from 0 to "
            f"{tokenizer.vocab_size - 1}",
            param="tokens",
        )
    return dump({"prompt": tokenizer.decode(tokens, skip_special_tokens=False)})


@router.get("/tokenizer_info")
async def tokenizer_info(request: Request) -> dict[str, Any]:
    """What a client needs to make prompts itself, as lm-eval does."""
    tokenizer = service_of(request).llm.tokenizer
    special = {
        name: tokenizer.special_tokens.get(name) for name in ("bos_token", "eos_token", "pad_token")
    }
    return {**special, "chat_template": tokenizer.chat_template}
