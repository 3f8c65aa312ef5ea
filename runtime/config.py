"""The limits and policies of a running engine: every default is written here and nowhere else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args

from slipstream.builder.engine import EngineLimits
from slipstream.errors import InvalidRequestError
from slipstream.runtime.kv_events.config import KvEventsConfig
from slipstream.runtime.speculation.proposer import OFF

_LIMITS = EngineLimits()
SchedulerPolicy = Literal["max_utilization", "guaranteed_no_evict"]


@dataclass(frozen=True, slots=True)
class RuntimeConfig:
    """What one engine loop may use.

    max_batch_size           sequences that run in one step.
    max_num_tokens           tokens (decodes and prefill chunks together) computed in one step.
    max_seq_len              tokens of a prompt and its output together.
    page_size                tokens in one KV page; an engine is built for one value.
    num_threads              cores of a CPU engine; None takes all this process may use, by its
                             affinity and its container's CPU quota, or as many as the size of the
                             engine's weights keeps busy.
    kv_cache_bytes           memory for KV pages; None leaves the choice to the executor.
    kv_cache_free_gpu_memory_fraction
                             how much of a GPU's memory that weights and the largest step leave free
                             KV pages take when kv_cache_bytes is None.
    kv_offload_gib           GiB of the host's memory for pages that the KV cache has no room for;
                             they come back where that saves computing them again. 0: none are kept.
    kv_offload_path          file that is that memory, for a CPU engine: what it holds survives the
                             process.
    kv_transfer_gib          GiB of the host's memory through which pages of prompts go to other
                             engines, or come from them (``runtime/handover``). 0: none do.
    scheduler_policy         ``max_utilization`` admits early and preempts by recomputing when pages
                             run out; ``guaranteed_no_evict`` admits only what can run to its end.
    enable_prefix_caching    keep and share full pages of equal prefixes.
    enable_chunked_prefill   compute a long prompt over several steps.
    max_prefill_tokens       tokens of prompts in a step that others wait for with their next token;
                             The fewer, the evener streams are, and the longer a prompt takes
                             beside them. ``auto``: where answers are streamed, about as many as
                             make a step take twice as long as one without them, by what steps have
                             cost, and more where prompts wait for seconds; offline what
                             max_num_tokens leaves. No bound where prompts are not chunked.
    enable_jump_decoding     append tokens that a structured output leaves no choice about without a
                             step for each.
    speculative              what guesses tokens that a step then verifies: ``ngram`` looks them up
                             in the text of the sequence itself, ``suffix`` also in earlier outputs;
                             ``draft`` asks a smaller model; ``eagle3`` the head inside of the
                             engine; ``off``; or the name of an installed proposer.
    speculative_model        the engine, or checkpoint, of that model; with a checkpoint, the head
                             to build in.
    num_speculative_tokens   how many are verified for a sequence and step at most; ``auto`` takes
                             what gives the most tokens a second, by how often guesses were right
                             and what steps have cost, or none.
    prompt_lookup_min        tokens of the shortest run that is looked up.
    prompt_lookup_max        tokens of a run that are compared to find the longest.
    deterministic            the bits of a request's logits depend on nothing but the request, not
                             on what else runs, chunks, shared prefixes or preemption.
    chat_template            a file with the chat template to use in place of the model's.
    kv_events_config         whether and where it is told what enters and leaves the prefix cache,
                             for routers of several replicas.
    step_timeout             seconds after which a device that does not answer is given up. Kernels
                             that are compiled when they are first needed take minutes.

    Raises ``InvalidRequestError`` for values that cannot work together.
    """

    max_batch_size: int = _LIMITS.max_batch_size
    max_num_tokens: int = _LIMITS.max_num_tokens
    max_seq_len: int = _LIMITS.max_seq_len
    page_size: int = 32
    num_threads: int | None = None
    kv_cache_bytes: int | None = None
    kv_cache_free_gpu_memory_fraction: float = 0.9
    kv_offload_gib: float = 0.0
    kv_offload_path: str | None = None
    kv_transfer_gib: float = 0.0
    scheduler_policy: SchedulerPolicy = "max_utilization"
    enable_prefix_caching: bool = True
    enable_chunked_prefill: bool = True
    max_prefill_tokens: int | Literal["auto"] = "auto"
    enable_jump_decoding: bool = True
    speculative: str = OFF
    speculative_model: str | None = None
    num_speculative_tokens: int | Literal["auto"] = "auto"
    prompt_lookup_min: int = 2
    prompt_lookup_max: int = 32
    deterministic: bool = False
    chat_template: str | None = None
    kv_events_config: KvEventsConfig | None = None
    step_timeout: float = 600.0

    def __post_init__(self) -> None:
        smallest = {"max_batch_size": 1, "max_num_tokens": 1, "max_seq_len": 2, "page_size": 1}
        for name, least in smallest.items():
            value = getattr(self, name)
            if value < least:
                raise InvalidRequestError(f"{name} is {value}; it must be at least {least}")
        beside = self.max_prefill_tokens
        if beside != "auto" and (not isinstance(beside, int) or beside < 1):
            raise InvalidRequestError(
                f"max_prefill_tokens is {beside!r}; it must be auto or at least 1. For no bound,"
                " use max_num_tokens"
            )
        self._check_speculation()
        events = self.kv_events_config
        if events is not None and events.publishes and not self.enable_prefix_caching:
            raise InvalidRequestError(
                "kv_events_config tells of the prefix cache, and enable_prefix_caching is off; "
                "leave one of them out"
            )
        self._check_offload()
        fraction = self.kv_cache_free_gpu_memory_fraction
        if not 0 < fraction <= 1:
            raise InvalidRequestError(
                f"kv_cache_free_gpu_memory_fraction is {fraction}; it must be above 0 and at most 1"
            )
        if not self.step_timeout > 0:
            raise InvalidRequestError(
                f"step_timeout is {self.step_timeout}; it must be above 0 seconds"
            )
        if self.scheduler_policy not in get_args(SchedulerPolicy):
            known = ", ".join(get_args(SchedulerPolicy))
            raise InvalidRequestError(
                f"scheduler_policy is {self.scheduler_policy!r}; known policies: {known}"
            )
        if self.max_num_tokens < self.max_batch_size:
            raise InvalidRequestError(
                f"max_num_tokens is {self.max_num_tokens}, less than max_batch_size"
                f" {self.max_batch_size}: a step could not hold one token of every sequence."
                " Raise max_num_tokens or lower max_batch_size"
            )
        if not self.enable_chunked_prefill and self.max_num_tokens < self.max_seq_len:
            raise InvalidRequestError(
                f"without chunked prefill max_num_tokens ({self.max_num_tokens}) must be at least"
                f" max_seq_len ({self.max_seq_len}). Raise it or enable chunked prefill"
            )

    def _check_offload(self) -> None:
        for name in ("kv_offload_gib", "kv_transfer_gib"):
            if not (0 <= getattr(self, name) < float("inf")):
                raise InvalidRequestError(
                    f"{name} is {getattr(self, name)}; it must be at least 0 GiB"
                )
        if self.kv_offload_gib and not self.enable_prefix_caching:
            raise InvalidRequestError(
                f"kv_offload_gib is {self.kv_offload_gib}, which does nothing without prefix"
                " caching: pages are only kept for others to share. Leave one of them out"
            )
        if self.kv_offload_path is not None and not self.kv_offload_gib:
            raise InvalidRequestError(
                f"kv_offload_path is {self.kv_offload_path}, but kv_offload_gib is 0; say how large"
                " the file may be"
            )
        if self.kv_offload_path is not None and self.kv_transfer_gib:
            raise InvalidRequestError(
                f"kv_transfer_gib is {self.kv_transfer_gib}, and kv_offload_path is"
                f" {self.kv_offload_path}: pages that are handed over are in no file. Leave one of"
                " them out"
            )

    def _check_speculation(self) -> None:
        count = self.num_speculative_tokens
        if count != "auto" and (not isinstance(count, int) or count < 1):
            raise InvalidRequestError(
                f"num_speculative_tokens is {count!r}; it must be auto or at least 1. To have none,"
                " leave speculative off"
            )
        if self.speculative_model is not None and self.speculative in (OFF, "ngram", "suffix"):
            raise InvalidRequestError(
                f"speculative_model is {self.speculative_model}, which does nothing where"
                f" speculative is {self.speculative!r}. Make that draft, or leave it out"
            )
        if not 1 <= self.prompt_lookup_min <= self.prompt_lookup_max:
            raise InvalidRequestError(
                f"prompt_lookup_min is {self.prompt_lookup_min} and prompt_lookup_max"
                f" {self.prompt_lookup_max}; the first must be at least 1, and at most the second"
            )

    def override(self, values: Mapping[str, Any]) -> RuntimeConfig:
        """This configuration with ``values`` by field name; an unknown name is an error."""
        known = [field.name for field in fields(self)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise InvalidRequestError(
                f"unknown runtime option {', '.join(unknown)}; known options: {', '.join(known)}"
            )
        return replace(self, **values)
