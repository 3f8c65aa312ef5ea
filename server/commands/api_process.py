"""A process of ``slipstream serve`` that answers requests; see ``server/core/processes``."""

from __future__ import annotations

import socket
import sys

from fastapi import FastAPI

from slipstream.runtime.remote.link import Link
from slipstream.server.anthropic.api import ANTHROPIC
from slipstream.server.core.processes.member import run_member
from slipstream.server.ollama.api import OLLAMA
from slipstream.server.openai.api import OPENAI
from slipstream.server.responses.api import RESPONSES
from slipstream.server.responses.store import RemoteStore

APIS = (OPENAI, RESPONSES, ANTHROPIC, OLLAMA)


def _share(app: FastAPI, link: Link) -> None:
    app.state.responses = RemoteStore(link.ask)


def main() -> None:
    """Serve; the arguments are numbers of open files: link, listening socket, shared places."""
    link, listener, places = map(int, sys.argv[1:])
    run_member(socket.socket(fileno=link), socket.socket(fileno=listener), places, APIS, _share)


if __name__ == "__main__":
    main()
