"""Train an EAGLE-3 head for a small model on text that the model itself writes, on a CPU.

    python examples/train_eagle3_head.py CHECKPOINT HEAD --minutes 30
    slipstream build CHECKPOINT -o engine --speculative-model HEAD
    slipstream eval engine --speculative eagle3

CHECKPOINT is a directory or a .gguf file. HEAD gets config.json and model.safetensors in the format
of SpecForge, in float32. Needs torch and transformers (pip install 'slipstream[quantize]').
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from slipstream import LLM, SamplingParams
from slipstream.builder.checkpoints import Checkpoint, open_checkpoint
from slipstream.builder.models.config import ModelConfig
from slipstream.quantize.calibration_data import calibration_windows
from slipstream.quantize.forward import CheckpointModel

BATCH = 8
PROMPT = 32  # tokens


@dataclass(frozen=True)
class Lesson:
    """Windows of one length: tokens ``[N, T]``, the states of three layers beside each other
    ``[N, T, 3 * K]``, and what the head of the target reads ``[N, T, K]``."""

    tokens: Tensor
    states: Tensor
    last: Tensor


def written(checkpoint: str, count: int, length: int) -> Tensor:
    """What the model writes after the first words of the texts for calibration, greedily in half
    of the windows: ``[count, length]``."""
    params = [
        SamplingParams(temperature=0.7 * (i % 2), seed=i, max_tokens=length - PROMPT,
                       ignore_eos=True)
        for i in range(count)
    ]  # fmt: skip
    with LLM(checkpoint) as llm:
        windows = calibration_windows(llm.tokenizer.encode, None, None, count, PROMPT)
        prompts = [window.tolist() for window in windows]
        outputs = llm.generate(prompts, params[: len(prompts)])
    texts = [p + o.outputs[0].token_ids for p, o in zip(prompts, outputs, strict=True)]
    return torch.tensor(texts)


def studied(checkpoint: Checkpoint, tokens: Tensor) -> Lesson:
    """What the target computes of them, after layers 2, L // 2 and L - 3, and at the end."""
    model, layers = CheckpointModel(checkpoint), checkpoint.config.num_layers
    wanted = 2, layers // 2, layers - 3
    with torch.no_grad():
        states = model.embed([np.array(window, np.int32) for window in tokens.tolist()])
        last = torch.cat([each.hidden for each in states])
        seen = {0: last}
        for layer in range(1, layers + 1):
            states = model.run_layer(layer - 1, states)
            last = torch.cat([each.hidden for each in states])
            seen |= {layer: last} if layer in wanted else {}
        norm = model.weight("model.norm.weight")
        last = functional.rms_norm(last, norm.shape, norm, checkpoint.config.rms_norm_eps)
    return Lesson(tokens, torch.cat([seen[layer] for layer in wanted], dim=-1), last)


class Attention(nn.Module):
    """Of a guess to all that was known before it, and to the guesses of its own row."""

    def __init__(self, config: ModelConfig, theta: float) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.size = (
            config.num_heads,
            config.num_kv_heads,
            config.head_dim,
        )
        width = config.hidden_size
        self.q_proj = nn.Linear(2 * width, self.heads * self.size, bias=False)
        self.k_proj = nn.Linear(2 * width, self.kv_heads * self.size, bias=False)
        self.v_proj = nn.Linear(2 * width, self.kv_heads * self.size, bias=False)
        self.o_proj = nn.Linear(self.heads * self.size, width, bias=False)
        self.theta = theta

    def forward(self, x: Tensor, cache: list[tuple[Tensor, Tensor]]) -> Tensor:
        """``cache`` has the keys and values of the steps before, and gets those of this one."""
        batch, length, _ = x.shape
        angles = self.angles(length, len(cache))
        q = rotated(self.split(self.q_proj(x), self.heads), angles)
        k = rotated(self.split(self.k_proj(x), self.kv_heads), angles)
        group = self.heads // self.kv_heads
        v = self.split(self.v_proj(x), self.kv_heads).repeat_interleave(group, dim=1)
        cache.append((k.repeat_interleave(group, dim=1), v))
        (known, values), own = cache[0], cache[1:]
        scores = q @ known.transpose(-1, -2)
        future = torch.ones(length, length, dtype=torch.bool).triu(1)
        scores = scores.masked_fill(future, float("-inf"))
        of_own = [(q * key).sum(-1, keepdim=True) for key, _ in own]
        weights = torch.cat([scores, *of_own], dim=-1).mul(self.size**-0.5).softmax(-1)
        out = weights[..., :length] @ values
        for i, (_, value) in enumerate(own):
            out = out + weights[..., length + i, None] * value
        attended: Tensor = self.o_proj(out.transpose(1, 2).reshape(batch, length, -1))
        return attended

    def split(self, x: Tensor, heads: int) -> Tensor:
        """``[N, heads, T, size]``."""
        batch, length, _ = x.shape
        return x.reshape(batch, length, heads, self.size).transpose(1, 2)

    def angles(self, length: int, step: int) -> Tensor:
        """Of the places of a step."""
        turns = self.theta ** (-torch.arange(0, self.size, 2) / self.size)
        return (torch.arange(length) + step)[:, None] * turns


def rotated(x: Tensor, angles: Tensor) -> Tensor:
    """Halves of each head turned against each other."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Of one layer."""
        out: Tensor = self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Layer(nn.Module):
    """The only one, whose attention reads the embedding of a token beside the hidden state."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.rms_norm_eps
        self.hidden_norm = nn.RMSNorm(width, eps)
        self.input_layernorm = nn.RMSNorm(width, eps)
        self.post_attention_layernorm = nn.RMSNorm(width, eps)
        self.self_attn = Attention(config, config.rope_theta)
        self.mlp = MLP(width, config.intermediate_size)

    def forward(self, x: Tensor, given: Tensor, cache: list[tuple[Tensor, Tensor]]) -> Tensor:
        """What the next step is given."""
        both = torch.cat([self.input_layernorm(x), self.hidden_norm(given)], dim=-1)
        x = given + self.self_attn(both, cache)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class Head(nn.Module):
    """Names are those of SpecForge's files."""

    def __init__(self, config: ModelConfig, known: int) -> None:
        super().__init__()
        width = config.hidden_size
        self.fc = nn.Linear(3 * width, width, bias=False)
        self.midlayer = Layer(config)
        self.norm = nn.RMSNorm(width, config.rms_norm_eps)
        self.lm_head = nn.Linear(width, known, bias=False)

    def forward(self, embedded: Tensor, states: Tensor, steps: int) -> list[Tensor]:
        """Logits ``[N, T - steps, known]`` of each guess in a row, where ``embedded`` are all
        tokens."""
        length, cache, logits = embedded.shape[1] - steps, list[tuple[Tensor, Tensor]](), []
        given = self.fc(states[:, :length])
        for step in range(steps):
            given = self.midlayer(embedded[:, step + 1 : step + 1 + length], given, cache)
            logits.append(self.lm_head(self.norm(given)))
        return logits


def train(
    head: Head, lesson: Lesson, table: Tensor, target: Tensor, *, minutes: float, steps: int
) -> None:
    """Towards what the target says, among the tokens that the head knows, ``steps`` guesses in a
    row; ``table`` is the embedding, ``target`` the rows of the target's own head."""
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-3, betas=(0.9, 0.95))
    began, batch, told = time.monotonic(), 0, 0.0
    while (part := (time.monotonic() - began) / (60 * minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1.0, (batch + 1) / 50) * (1 - 0.95 * part)
        chosen = torch.randint(len(lesson.tokens), (BATCH,))
        embedded, last = table[lesson.tokens[chosen]], lesson.last[chosen]
        length = embedded.shape[1] - steps
        loss, right = torch.zeros(()), []
        for step, logits in enumerate(head(embedded, lesson.states[chosen], steps)):
            wanted = functional.linear(last[:, step + 1 : step + 1 + length], target)
            loss = loss + functional.kl_div(
                logits.log_softmax(-1).flatten(0, 1), wanted.softmax(-1).flatten(0, 1),
                reduction="batchmean",
            )  # fmt: skip
            right.append((logits.argmax(-1) == wanted.argmax(-1)).float().mean().item())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(head.parameters(), 1.0)
        optimizer.step()
        batch += 1
        if time.monotonic() - told > 30:
            told = time.monotonic()
            shares = " ".join(f"{share:.2f}" for share in right)
            print(f"{part:.0%}: batch {batch}, loss {loss.item():.2f}, right {shares}", flush=True)


def save(head: Head, config: ModelConfig, known: Tensor, directory: Path) -> None:
    """config.json and model.safetensors."""
    directory.mkdir(parents=True, exist_ok=True)
    mapping = {
        "d2t": known - torch.arange(len(known)),
        "t2d": torch.isin(torch.arange(config.vocab_size), known),
    }
    save_file({**head.state_dict(), **mapping}, directory / "model.safetensors")
    described: dict[str, Any] = {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": 1,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "max_position_embeddings": config.max_position_embeddings,
        "vocab_size": config.vocab_size,
        "draft_vocab_size": len(known),
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
    }
    (directory / "config.json").write_text(json.dumps(described, indent=2) + "\n")


def main() -> None:
    """Write, study, train, save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint")
    parser.add_argument("head", type=Path)
    parser.add_argument("--minutes", type=float, default=30, help="of training")
    parser.add_argument("--windows", type=int, default=256, help="texts that the model writes")
    parser.add_argument("--length", type=int, default=160, help="tokens of each")
    parser.add_argument("--guesses", type=int, default=3, help="in a row that are trained")
    parser.add_argument("--inner", type=int, help="between the matrices of the MLP; the model's")
    parser.add_argument("--vocabulary", type=int, default=4096, help="tokens that the head knows")
    options = parser.parse_args()
    torch.manual_seed(0)
    tokens = written(options.checkpoint, options.windows, options.length)
    print(f"{tokens.numel()} tokens written", flush=True)
    checkpoint = open_checkpoint(options.checkpoint)
    lesson, config = studied(checkpoint, tokens), checkpoint.config
    config = replace(config, intermediate_size=options.inner or config.intermediate_size)
    counts = torch.bincount(tokens.flatten(), minlength=config.vocab_size)
    known = counts.argsort(descending=True)[: options.vocabulary].sort().values
    model = CheckpointModel(checkpoint)
    table = model.weight("model.embed_tokens.weight")
    target = table if config.tie_word_embeddings else model.weight("lm_head.weight")
    head = Head(config, len(known))
    with torch.no_grad():  # what the target knows already
        head.lm_head.weight.copy_(target[known])
        head.norm.weight.copy_(model.weight("model.norm.weight"))
    train(head, lesson, table, target[known], minutes=options.minutes, steps=options.guesses)
    save(head, config, known, options.head)
    print(f"the head is in {options.head}")


if __name__ == "__main__":
    main()
