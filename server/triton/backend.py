"""What Triton's Python backend calls: one object a model instance, each in a process of its own."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import triton_python_backend_utils as pb_utils

from slipstream.errors import ExecutionError, SlipstreamError
from slipstream.server.triton import model_config
from slipstream.server.triton.errors import code_of
from slipstream.server.triton.parameters import Query, read_query
from slipstream.server.triton.settings import read_settings

if TYPE_CHECKING:
    from slipstream.server.triton.answers import Outputs


class TritonPythonModel:
    """Serves an engine to any number of clients at a time, who share its steps."""

    @staticmethod
    def auto_complete_config(config: Any) -> Any:  # noqa: ANN401 - Triton's ModelConfig
        """Add what ``config.pbtxt`` leaves out."""
        try:
            model_config.complete(config)
        except SlipstreamError as error:
            raise pb_utils.TritonModelException(str(error)) from None
        return config

    def initialize(self, args: Mapping[str, str]) -> None:
        """Load the engine that ``model.json`` names; an error makes the model unavailable."""
        _forward_logs()
        try:
            _check_numpy()
            self._load(args)
        except SlipstreamError as error:
            raise pb_utils.TritonModelException(str(error)) from None

    def execute(self, requests: Sequence[Any]) -> None:
        """Begin to answer; the answers are sent from another thread."""
        for request in requests:
            reply = _Reply(request.get_response_sender())
            try:
                self._serving.submit(self._read(request), reply)
            except SlipstreamError as error:
                reply.fail(error)
            except Exception as error:
                logging.getLogger(__name__).exception("a request could not be read")
                reply.fail(ExecutionError(f"the request could not be read: {error!r}"))

    def is_ready(self) -> bool:
        """Whether requests are taken. Triton asks from 2026 on; older ones do not."""
        return self._serving.unavailable is None

    def finalize(self) -> None:
        """Free the engine."""
        if hasattr(self, "_serving"):
            self._serving.close()

    def _load(self, args: Mapping[str, str]) -> None:
        # Imported here because a configuration is completed without any of it.
        from slipstream.runtime.async_llm import AsyncLLM
        from slipstream.server.triton.metrics import create_metrics
        from slipstream.server.triton.serving import Serving

        config = json.loads(args["model_config"])
        model_config.check(config)
        instances = sum(group["count"] for group in config["instance_group"])
        directory = Path(args["model_repository"], args["model_version"])
        settings = read_settings(directory).shared_among(instances)
        llm = AsyncLLM(settings.model, **settings.options)
        self._defaults = llm.generation_defaults
        self._tokenizer = llm.tokenizer
        self._serving = Serving(llm, create_metrics(args, llm))

    def _read(self, request: Any) -> Query:  # noqa: ANN401 - Triton's InferenceRequest
        # The tensors are gone when `execute` has returned.
        inputs = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
        parameters = json.loads(request.parameters())
        return read_query(inputs, parameters, self._defaults, self._tokenizer, request.request_id())


class _Reply:
    """A client, as the outbox sees it."""

    def __init__(self, sender: Any) -> None:  # noqa: ANN401 - Triton's InferenceResponseSender
        self._sender = sender

    def send(self, outputs: Outputs, *, final: bool) -> None:
        tensors = [pb_utils.Tensor(name, array) for name, array in outputs.items()]
        response = pb_utils.InferenceResponse(output_tensors=tensors)
        flags = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL if final else 0
        self._sender.send(response, flags=flags)

    def fail(self, error: SlipstreamError) -> None:
        code = getattr(pb_utils.TritonError, code_of(error))
        response = pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error), code))
        self._sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def is_cancelled(self) -> bool:
        return bool(self._sender.is_cancelled())


class _TritonHandler(logging.Handler):
    """Log lines of this package, in Triton's log."""

    def emit(self, record: logging.LogRecord) -> None:
        """Pass on a line."""
        names = {logging.INFO: "log_info", logging.WARNING: "log_warn"}
        write = getattr(pb_utils.Logger, names.get(record.levelno, "log_error"))
        write(self.format(record))


def _forward_logs() -> None:
    logger = logging.getLogger("slipstream")
    logger.handlers = [_TritonHandler()]
    logger.propagate = False
    logger.setLevel(logging.INFO)


def _check_numpy() -> None:
    """Refuse a Python backend that misreads NumPy 2's arrays: its process would die on the first
    request."""
    if np.lib.NumpyVersion(np.__version__) < "2.0.0":
        return
    hook = sys.unraisablehook
    sys.unraisablehook = lambda _: None  # NumPy cannot free a capsule that Triton has renamed
    try:
        read = pb_utils.Tensor.from_dlpack("check", np.arange(2, dtype=np.int32)).as_numpy()
    finally:
        sys.unraisablehook = hook
    if read.tolist() != [0, 1]:
        raise ExecutionError(
            f"this Triton cannot read the arrays of NumPy {np.__version__}: its Python backend is "
            "older than NumPy 2. Use Triton 2.53 (container 24.12) or newer, or install numpy<2 "
            f"in {sys.prefix}"
        )
