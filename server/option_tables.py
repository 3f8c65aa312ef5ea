"""What the command line says of each field: help, defaults in words, parsers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import click

from slipstream.runtime.sampling.params import INTERACTIVE
from slipstream.sizes import parse_size


def size(text: str) -> int:
    """Parse bytes, such as ``512M``, for an option."""
    try:
        return parse_size(text)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error


def process_count(text: str) -> int | None:
    """A number, or None for ``auto``."""
    if text == "auto":
        return None
    if not text.isdecimal() or len(text) > 4:
        raise click.BadParameter(f"{text!r} is neither auto nor a number")
    return int(text)


@dataclass(frozen=True, slots=True)
class Option:
    """What the command line adds to a field: help, and where they differ, flag, parser and default.

    ``default`` is the text shown for a field that is left to the model or the engine; ``least`` is
    the smallest number that makes sense. ``envvar`` is read where the flag is not given.
    """

    help: str
    default: str | None = None
    parse: Callable[[str], object] | None = None
    flag: str | None = None
    least: int | None = None
    envvar: str | None = None


_ENGINES = "the engine's"
_MODELS = {name: f"the model's, or {value}" for name, value in INTERACTIVE.items()}


def auto_or_count(text: str) -> int | str:
    """Parse a number of at least 1, or ``auto``."""
    if text != "auto" and not (text.isdecimal() and int(text)):
        raise click.BadParameter(f"{text} is neither auto nor a number from 1 on")
    return text if text == "auto" else int(text)


RUNTIME = {
    "max_batch_size": Option("Sequences in one step.", _ENGINES, least=1),
    "max_num_tokens": Option("Tokens in one step, prompts included.", _ENGINES, least=1),
    "max_seq_len": Option("Tokens of a prompt and its output together.", _ENGINES, least=2),
    "num_threads": Option(
        "CPU cores to use.", "all that a CPU quota leaves and the model keeps busy", least=1
    ),
    "kv_cache_bytes": Option(
        "Memory for the KV cache, such as 512M or 2G.", "what fits", parse=size
    ),
    "kv_cache_free_gpu_memory_fraction": Option(
        "On a GPU: the part of the memory left free that the KV cache takes."
    ),
    "kv_offload_gib": Option(
        "GiB of the host's memory for pages that the KV cache has no room for."
    ),
    "kv_offload_path": Option("On a CPU: file that is this memory and outlives a server.", "none"),
    "scheduler_policy": Option(
        "max_utilization admits early and recomputes when memory runs out; guaranteed_no_evict "
        "admits only what can run to its end."
    ),
    "enable_prefix_caching": Option("Share the KV pages of equal prefixes."),
    "enable_chunked_prefill": Option("Compute a long prompt over several steps."),
    "max_prefill_tokens": Option(
        "Most tokens of prompts in a step that answers on their way wait for; auto: about as many "
        "as make it take twice as long as one without them, and more where they wait for seconds.",
        parse=auto_or_count,
    ),
    "enable_jump_decoding": Option("Append tokens that a schema forces without a step for each."),
    "speculative": Option(
        "What guesses tokens, so that a step verifies several: ngram (the text so far), suffix "
        "(earlier outputs too), draft (a smaller model), eagle3 (a head inside of the engine), "
        "off, or an installed proposer."
    ),
    "speculative_model": Option(
        "Engine, or checkpoint, of the smaller model; or the head of a checkpoint.", "none"
    ),
    "num_speculative_tokens": Option("Most of them a step; auto: what pays.", parse=auto_or_count),
    "prompt_lookup_min": Option("Tokens of the shortest run that is looked up.", least=1),
    "prompt_lookup_max": Option("Tokens of a run that are compared.", least=1),
    "speculative_config": Option("The same as an object in JSON, with vLLM's names.", "none"),
    "deterministic": Option(
        "Bits of an answer depend on nothing but its request, its seed included."
    ),
    "chat_template": Option("File of a chat template, in Jinja.", "the model's"),
    "kv_events_config": Option("Tell of cached prefixes, by vLLM's JSON.", "none", parse=str),
    "step_timeout": Option("Seconds after which a device that does not answer is given up."),
}
SAMPLING = {
    "max_tokens": Option("Most tokens to generate.", "up to max-seq-len"),
    "min_tokens": Option("Fewest tokens to generate."),
    "temperature": Option(
        "0 takes the likeliest token; higher is more varied.", _MODELS["temperature"]
    ),
    "top_p": Option("Sample from the likeliest tokens of this total mass.", _MODELS["top_p"]),
    "top_k": Option("Sample from this many likeliest tokens; 0 is all.", "the model's, or 0"),
    "min_p": Option(
        "Leave out tokens less likely than this times the likeliest.", _MODELS["min_p"]
    ),
    "repetition_penalty": Option(
        "Above 1 makes tokens of the text so far less likely.", "the model's, or 1.0"
    ),
    "presence_penalty": Option("Subtracted once from tokens of the output."),
    "frequency_penalty": Option("Subtracted from tokens of the output, per occurrence."),
    "seed": Option("Makes sampling repeatable.", "random"),
    "stop": Option("Text that ends the answer; may be repeated.", "none"),
    "stop_token_ids": Option(
        "Token that ends the answer; may be repeated.", "none", flag="stop-token-id"
    ),
    "bad_words": Option("Text never to generate; may be repeated.", "none", flag="bad-word"),
    "ignore_eos": Option("Go on after the end-of-sequence token."),
    "n": Option("Answers to generate."),
    "logprobs": Option(
        "Report log probabilities with this many alternatives; needs --json.", "none"
    ),
}
BUILD = {
    "target": Option("Kind of device; auto takes the best that this machine has."),
    "dtype": Option(
        "Type of unquantized weights, and on a GPU of activations; auto is the checkpoint's on a "
        "CPU, where activations are float32, and bfloat16 on a GPU."
    ),
    "quantization": Option(
        "Quantization, round to nearest, of weights that the checkpoint holds dense; fp8 needs a "
        "GPU and rounds activations too."
    ),
    "group_size": Option(
        "Elements that share a scale: 32, 64 or 128.", "32 on a CPU, 128 on a GPU"
    ),
    "symmetric": Option(
        "Quantize without or with zero points.", "with", flag="symmetric/--asymmetric"
    ),
    "kv_cache_dtype": Option(
        "Type of the KV cache; auto is fp8 where the checkpoint has scales for it, else on a CPU "
        "float32 for a dense engine and float16 for a quantized one, and on a GPU the dtype. k16v8 "
        "(on a CPU): keys of 16 bits and values of 8."
    ),
    "task": Option(
        "What the engine is for: text, vectors of texts, or scores of documents; auto is what the "
        "checkpoint says."
    ),
    "pooling": Option("Which tokens' states make a vector; auto is what the checkpoint says."),
    "speculative_model": Option(
        "An EAGLE-3 head of SpecForge or speculators for this model, to go into the same engine.",
        "none",
    ),
    "gemm_plugin": Option("auto runs linears on Slipstream's kernels; disable, on ONNX Runtime's."),
    "ort_attention": Option(
        "Memory of attention of target onnxruntime: a slot for each sequence, or pages that "
        "sequences share, on its CUDA provider; auto is slots."
    ),
    "ort_activations": Option(
        "What quantized products of target onnxruntime multiply: exact activations, or int8 ones "
        "on its CPU provider with float32, many times faster."
    ),
    "strict_tensors": Option(
        "Refuse a checkpoint that holds more than its text model uses; else the rest is left out."
    ),
    "tp_size": Option(
        "GPUs, or processes of a CPU, that share every layer: 1, 2, 4 or 8.", least=1
    ),
    "max_batch_size": Option(
        "Sequences in one step, at most.", "64 on a CPU, 1024 on a GPU", least=1
    ),
    "max_num_tokens": Option(
        "Tokens in one step, at most.", "512 on a CPU, 8192 on a GPU", least=1
    ),
    "max_seq_len": Option(
        "Tokens of one sequence, at most.", "what the model was trained for", least=1
    ),
}
QUANTIZE = {
    "qformat": Option(
        "Scheme of the decoder's linears: integers by AWQ, GPTQ or rounding (wo), W8A8 (int8_sq), "
        "float8, and formats of nvidia-modelopt (fp8_static, w4a8_awq, nvfp4)."
    ),
    "kv_cache_dtype": Option(
        "KV cache to measure with; fp8 also stores calibrated scales; auto leaves it alone."
    ),
    "group_size": Option(
        "Elements that share a scale: 32, 64, 128, or -1 for whole rows.",
        "the largest of 128, 64 and 32 that divides every linear",
    ),
    "symmetric": Option(
        "Quantize without or with zero points, which transformers does not load.",
        flag="symmetric/--asymmetric",
    ),
    "calib_dataset": Option(
        "A .txt or .jsonl file to calibrate on, or self for text that the model writes.",
        "a text that comes with Slipstream",
    ),
    "calib_size": Option("Windows of calibration text.", least=1),
    "calib_max_seq_length": Option("Tokens in a window.", least=16),
    "eval_dataset": Option(
        "A .txt or .jsonl file to measure the result on.", "a text that comes with Slipstream"
    ),
    "overrides": Option(
        "TARGET=QFORMAT for some linears, such as 're:.*down_proj=int8_wo'; TARGET is a name, or "
        "re: and a pattern of whole names. May be repeated; the last that matches counts.",
        "none",
        flag="override",
    ),
    "exclude": Option("TARGET of linears to leave as they are; may be repeated.", "none"),
    "auto_bits": Option(
        "Mean bits a weight, such as 4.5: the linears that need it most get 8.", "all alike"
    ),
    "max_ppl_increase": Option(
        "Fail, and write nothing, if perplexity rises by more than this percentage.", "no limit"
    ),
    "seed": Option("Chooses the windows of calibration text.", least=0),
    "format": Option("Layout of the files."),
}
SERVER = {
    "host": Option("Address to listen on; 0.0.0.0 is all of this machine's."),
    "port": Option("Port to listen on; 0 takes a free one."),
    "api_processes": Option(
        "Processes that answer requests, before the one that has the engine; 0: that one does.",
        "auto: 0 for an engine of a CPU, else one for every four cores, at most 4",
        parse=process_count,
    ),
    "api_key": Option(
        "Key that requests must carry as Authorization: Bearer or x-api-key; may be repeated. "
        "SLIPSTREAM_API_KEY holds one or several, separated by spaces.",
        "none",
        envvar="SLIPSTREAM_API_KEY",
    ),
    "served_model_name": Option(
        "Name of the model in requests; may be repeated, and answers give the first.",
        "the model's file or directory",
    ),
    "max_queued_requests": Option(
        "Completions that may wait when the batch is full; more are refused with status 429."
    ),
    "allow_priority": Option(
        "Let requests overtake others by their priority.",
        flag="allow-priority/--no-allow-priority",
    ),
    "max_request_bytes": Option("Largest body of a request, such as 512K or 4M.", "4M", parse=size),
    "allowed_origins": Option(
        "Origin of web pages that may ask (CORS), or *; may be repeated.",
        "none",
        flag="allowed-origins",
    ),
    "allowed_hosts": Option(
        "Name by which a server on a loopback address may be asked, such as a proxy's, or *; may "
        "be repeated. Addresses, names without a dot and localhost always may.",
        "none",
        flag="allowed-hosts",
    ),
    "log_format": Option("Log lines for people or for machines."),
    "log_prompts": Option("Write prompts into the log."),
    "drain_timeout": Option(
        "Seconds that running requests have to end in after SIGTERM or Ctrl-C."
    ),
    "max_stored_responses": Option(
        "Answers of /v1/responses to keep in memory for requests that go on with them.", least=0
    ),
    "max_stored_bytes": Option("Most memory for them, such as 64M.", "256M", parse=size),
    "default_max_tokens": Option(
        "Most tokens of an answer whose request does not say.", "the model's, or what fits", least=1
    ),
    "tool_call_parser": Option("How the model writes calls of tools.", "by its chat template"),
    "reasoning_parser": Option("How the model writes thoughts.", "by its chat template"),
}
