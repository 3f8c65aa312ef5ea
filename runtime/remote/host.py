"""The engine's side: requests from other processes, and their tokens back."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from slipstream.errors import SlipstreamError
from slipstream.runtime.engine.loop import EngineLoop
from slipstream.runtime.engine.request_state import CompletionState, Ending, RequestState
from slipstream.runtime.engine.stats import EngineStats
from slipstream.runtime.engine_thread import EngineThread
from slipstream.runtime.loaded_engine import LoadedEngine, Model
from slipstream.runtime.remote.link import Link, packed
from slipstream.runtime.remote.messages import (
    Abort,
    Begin,
    Begun,
    Ended,
    Failed,
    Parcel,
    Stop,
    Told,
)
from slipstream.runtime.request import Request
from slipstream.runtime.structured.compiler import GrammarCompiler
from slipstream.runtime.workers import Workers

# Bytes that a process may leave unread before it is taken for dead.
_MOST_UNREAD = 256 << 20


class Client:
    """A process that asks, as the engine's sees it."""

    def __init__(self, host: EngineHost, index: int, link: Link) -> None:
        self.link = link
        self._host = host
        self._index = index
        self._compiling: dict[int, asyncio.Task[None]] = {}

    def received(self, message: Begin | Abort | Stop) -> None:
        """Hear of a request."""
        host, key = self._host, f"{self._index}:{message.number}"
        match message:
            case Begin(number, request):
                self._begin(number, replace(request, request_id=key))
            case Abort(number):
                if (task := self._compiling.pop(number, None)) is not None:
                    task.cancel()
                host.thread.put(lambda: host.loop.abort(key))
            case Stop(_, index):
                host.thread.put(lambda: host.loop.stop(key, index))

    def _begin(self, number: int, request: Request) -> None:
        if request.params.structured is None:
            self._run(number, request)
            return
        task = asyncio.get_running_loop().create_task(self._compile(number, request))
        self._compiling[number] = task

    async def _compile(self, number: int, request: Request) -> None:
        form = request.params.structured
        assert form is not None
        try:
            grammar = await self._host.workers.compile(self._host.grammars.compile, form)
        except SlipstreamError as error:
            self.link.send(Parcel(rest=[Failed(number, error)]))
        else:
            self._run(number, replace(request, grammar=grammar))
        finally:
            self._compiling.pop(number, None)

    def _run(self, number: int, request: Request) -> None:
        host = self._host
        try:
            host.loop.validate(request)
        except SlipstreamError as error:
            self.link.send(Parcel(rest=[Failed(number, error)]))
            return
        if (reason := host.thread.closed) is not None:
            self.link.send(Ended(reason, host.thread.unhealthy is not None))
            return
        host.thread.put(lambda: host.add(request, _Route(self, number)))

    def lost(self) -> None:
        """Hear that it is gone: nobody waits for its requests."""
        for task in self._compiling.values():
            task.cancel()
        self._host.thread.put(lambda: self._host.drop(self))


@dataclass(slots=True, eq=False)
class _Route:
    """Where the tokens of a request go."""

    client: Client
    number: int
    begun: bool = False


class EngineHost:
    """Runs an engine for clients in other processes; belongs to one event loop, beside the engine's
    thread."""

    def __init__(
        self, engine: LoadedEngine, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.model: Model = engine.model
        self.workers = Workers()
        self.grammars = GrammarCompiler(engine.tokenizer, engine.vocab_size)
        self.loop = EngineLoop(engine, clock=clock, detokenizes=False, streams=True)
        self.thread = EngineThread(self.loop, self._step, self._end, engine.config.step_timeout)
        self.clients: dict[int, Client] = {}
        self._event_loop = asyncio.get_running_loop()
        # Those of running requests belong to the engine's thread.
        self._routes: dict[str, _Route] = {}
        self.thread.start()
        if engine.pooling is None:
            self.grammars.prepare_aside()

    @property
    def stats(self) -> EngineStats:
        """What the scheduler is doing and has done."""
        return self.loop.stats

    def connect(self, index: int, link: Link) -> Client:
        """What a process is to be heard by whose link this is, under an index of its own; its
        requests are ``received`` there, and its end."""
        self.clients = {i: each for i, each in self.clients.items() if not each.link.is_lost}
        client = self.clients[index] = Client(self, index, link)
        if (reason := self.thread.closed) is not None:
            link.send(Ended(reason, self.thread.unhealthy is not None))
        return client

    def shutdown(self) -> None:
        """Stop the engine; requests that still run end with an error."""
        self.thread.shutdown()
        self.workers.shutdown()

    def add(self, request: Request, route: _Route) -> None:
        """Run a request; called by the engine's thread."""
        try:
            self.loop.add_request(request)
        except SlipstreamError as error:
            parcel = packed(Parcel(rest=[Failed(route.number, error)]))
            self._post([(route.client, parcel)])
        else:
            self._routes[request.request_id] = route

    def drop(self, client: Client) -> None:
        """End what a client has begun; called by the engine's thread."""
        for request_id in [key for key, route in self._routes.items() if route.client is client]:
            del self._routes[request_id]
            self.loop.abort(request_id)

    def _step(self) -> None:
        parcels: dict[Client, Parcel] = {}
        for state in self.loop.advance():
            route = self._routes.get(state.request.request_id)
            if route is not None:
                parcel = parcels.get(route.client)
                if parcel is None:
                    parcel = parcels[route.client] = Parcel()
                if self._tell(state, route, parcel):
                    del self._routes[state.request.request_id]
        if parcels:
            self._post([(client, packed(parcel)) for client, parcel in parcels.items()])

    def _tell(self, state: RequestState, route: _Route, parcel: Parcel) -> bool:
        """Put what is new of a request into a parcel; whether it has ended."""
        finished = state.finished
        if state.error is not None:
            parcel.rest.append(Failed(route.number, state.error))
            return True
        if not finished and state.request.output_kind == "final":
            return False
        if not route.begun:
            route.begun = True
            parcel.rest.append(_begun(route.number, state))
        for number, completion in enumerate(state.completions, route.number):
            _tell_completion(number, completion, parcel)
        return finished

    def _post(self, parcels: Sequence[tuple[Client, bytes]]) -> None:
        try:
            self._event_loop.call_soon_threadsafe(_send, parcels)
        except RuntimeError:  # the event loop was closed while requests ran
            for client, _ in parcels:
                self.drop(client)

    def _end(self, reason: str) -> None:
        message = packed(Ended(reason, self.thread.unhealthy is not None))

        def tell() -> None:
            for client in self.clients.values():
                client.link.send_packed(message)

        try:
            self._event_loop.call_soon_threadsafe(tell)
        except RuntimeError:  # the event loop is closed: there is nobody to be told
            return


def _begun(number: int, state: RequestState) -> Begun:
    leader, times = state.completions[0].sequence, state.metrics
    return Begun(
        number,
        times.first_scheduled_time,
        times.first_token_time,
        leader.num_cached or 0,
        None if leader.scores_prompt else leader.prompt_logprobs,
        None if leader.pool is None else leader.pool.value,
    )


def _tell_completion(number: int, completion: CompletionState, parcel: Parcel) -> None:
    if completion.told_end:  # and that was told
        return
    sequence, (token_ids, logprobs) = completion.sequence, completion.news()
    ending = None
    if sequence.finish_reason is not None:
        completion.told_end = True
        ending = Ending(
            sequence.finish_reason,
            sequence.stop_reason,
            sequence.ends_in_stop_token,
            sequence.num_accepted,
            sequence.num_rejected,
        )
    if ending is None and not logprobs and len(token_ids) == 1:
        parcel.numbers.append(number)
        parcel.token_ids.append(token_ids[0])
    elif token_ids or ending is not None:
        parcel.rest.append(Told(number, token_ids, logprobs, ending))


def _send(parcels: Sequence[tuple[Client, bytes]]) -> None:
    for client, message in parcels:
        client.link.send_packed(message)
        if client.link.waiting_bytes > _MOST_UNREAD:  # it hangs
            client.link.close()
