"""The model configuration of Triton: what Slipstream adds to it, and what cannot stand in it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from slipstream.errors import InvalidRequestError
from slipstream.server.triton.interface import INPUTS, OUTPUTS, Tensor

_TABLES: Mapping[str, Mapping[str, Tensor]] = {"input": INPUTS, "output": OUTPUTS}


class ModelConfig(Protocol):
    """Triton's own, while it is completed."""

    def as_dict(self) -> Mapping[str, Any]:
        """What ``config.pbtxt`` says."""
        ...

    def add_input(self, tensor: Mapping[str, Any], /) -> None:
        """Declare an input."""
        ...

    def add_output(self, tensor: Mapping[str, Any], /) -> None:
        """Declare an output."""
        ...

    def set_max_batch_size(self, size: int, /) -> None:
        """Say how many requests Triton may put together."""
        ...

    def set_model_transaction_policy(self, policy: Mapping[str, Any], /) -> None:
        """Say whether a request may have several responses."""
        ...


def complete(config: ModelConfig) -> None:
    """Add what ``config.pbtxt`` leaves out; raises ``InvalidRequestError`` for what is wrong."""
    given = config.as_dict()
    policy = given.get("model_transaction_policy", {})
    _check(given, decoupled=policy.get("decoupled", True))
    for kind, add in (("input", config.add_input), ("output", config.add_output)):
        names = {tensor["name"] for tensor in given[kind]}
        for name, tensor in _TABLES[kind].items():
            if name not in names:
                add(tensor.describe(name))
    config.set_max_batch_size(0)
    config.set_model_transaction_policy({"decoupled": True})


def check(config: Mapping[str, Any]) -> None:
    """Raise ``InvalidRequestError`` for what a model that is to be loaded cannot work with; Triton
    does not complete configurations where it was told not to."""
    _check(config, decoupled=config.get("model_transaction_policy", {}).get("decoupled", False))
    for kind, table in _TABLES.items():
        names = {tensor["name"] for tensor in config[kind]}
        missing = [name for name, tensor in table.items() if name not in names]
        if missing:
            raise InvalidRequestError(
                f"config.pbtxt declares no {kind} {', '.join(missing)}; start Triton without "
                "--disable-auto-complete-config, or declare them"
            )


def _check(config: Mapping[str, Any], *, decoupled: bool) -> None:
    size = config.get("max_batch_size", 0)
    if size:
        raise InvalidRequestError(
            f"config.pbtxt has max_batch_size: {size}, but Slipstream batches requests itself; "
            "write 0 there, and say in model.json how many share a step, for example "
            f'"max_batch_size": {size}'
        )
    if not decoupled:
        raise InvalidRequestError(
            "config.pbtxt has model_transaction_policy { decoupled: false }, but a stream has many "
            "responses, and requests run beside each other; write true, and ask without stream for "
            "one response"
        )
    for kind, table in _TABLES.items():
        for tensor in config[kind]:
            _check_tensor(kind, tensor, table)


def _check_tensor(kind: str, given: Mapping[str, Any], table: Mapping[str, Tensor]) -> None:
    name, data_type = given["name"], given["data_type"]
    if name not in table:
        does = "reads" if kind == "input" else "gives"
        raise InvalidRequestError(
            f"config.pbtxt declares the {kind} {name!r:.80}, which Slipstream never {does}; take "
            f"it out ({kind}s need not be declared). There are {', '.join(table)}"
        )
    if data_type != table[name].data_type:
        raise InvalidRequestError(
            f"config.pbtxt declares the {kind} {name} as {data_type}, but it is "
            f"{table[name].data_type}; correct it or take it out"
        )
