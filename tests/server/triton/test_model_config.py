"""What stands in ``config.pbtxt``, without a server."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from slipstream.errors import InvalidRequestError
from slipstream.server.triton.interface import INPUTS, OUTPUTS
from slipstream.server.triton.model_config import check, complete


class Config:
    """Triton's object, as far as it is used."""

    def __init__(self, **given: Any) -> None:  # noqa: ANN401 - fields of many types
        self.fields: dict[str, Any] = {"max_batch_size": 0, "input": [], "output": [], **given}

    def as_dict(self) -> Mapping[str, Any]:
        return self.fields

    def add_input(self, tensor: Mapping[str, Any], /) -> None:
        self.fields["input"] = [*self.fields["input"], tensor]

    def add_output(self, tensor: Mapping[str, Any], /) -> None:
        self.fields["output"] = [*self.fields["output"], tensor]

    def set_max_batch_size(self, size: int, /) -> None:
        self.fields["max_batch_size"] = size

    def set_model_transaction_policy(self, policy: Mapping[str, Any], /) -> None:
        self.fields["model_transaction_policy"] = dict(policy)


def tensor(name: str, data_type: str = "TYPE_STRING") -> dict[str, Any]:
    return {"name": name, "data_type": data_type, "dims": [1]}


def test_what_is_left_out_is_added() -> None:
    config = Config(input=[tensor("text_input")])
    complete(config)
    fields = config.fields
    assert [given["name"] for given in fields["input"]] == list(INPUTS)
    assert [given["name"] for given in fields["output"]] == list(OUTPUTS)
    assert fields["max_batch_size"] == 0
    assert fields["model_transaction_policy"] == {"decoupled": True}
    check(fields)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"max_batch_size": 8}, "has max_batch_size: 8, but Slipstream batches requests itself"),
        (
            {"model_transaction_policy": {"decoupled": False}},
            "has model_transaction_policy { decou",
        ),
        ({"input": [tensor("lora")]}, "declares the input 'lora', which Slipstream never reads"),
        ({"output": [tensor("logits")]}, "declares the output 'logits', which Slipstream never g"),
        ({"input": [tensor("top_k")]}, "the input top_k as TYPE_STRING, but it is TYPE_INT32"),
        ({"output": [tensor("logprobs", "TYPE_FP32")]}, "as TYPE_FP32, but it is TYPE_STRING"),
    ],
)
def test_what_cannot_be_is_one_sentence(given: dict[str, Any], message: str) -> None:
    config = Config(**given)
    with pytest.raises(InvalidRequestError) as completing:
        complete(config)
    completed = Config()
    complete(completed)
    with pytest.raises(InvalidRequestError) as loading:
        check({**completed.fields, **given})
    for error in (completing, loading):
        assert message in str(error.value)
        assert str(error.value).startswith("config.pbtxt ") and "\n" not in str(error.value)


def test_a_configuration_that_triton_did_not_complete_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match=r"decoupled: false"):
        check({"max_batch_size": 0, "input": [], "output": []})
    config = Config(model_transaction_policy={"decoupled": True}).fields
    with pytest.raises(InvalidRequestError, match=r"no input text_input, .*--disable-auto-compl"):
        check(config)
