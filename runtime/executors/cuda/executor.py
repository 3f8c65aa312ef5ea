"""Runs an engine of the ``cuda`` target: captured graphs of our own kernels, one step ahead."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import Tensor

from slipstream.builder.contract import (
    EAGLE3,
    HEAD_GRAPH,
    TARGET_GRAPH,
)
from slipstream.builder.engine import COSTS, TACTICS, Engine, Manifest
from slipstream.errors import CapacityError
from slipstream.phases import phase
from slipstream.plugins.cuda.binding import Binding, Memory
from slipstream.plugins.linear.cuda.fixed import FixedTactics
from slipstream.plugins.linear.cuda.tactics import Tactics
from slipstream.plugins.paged_attention.cuda.attention import DecodeWorkspace, query_block
from slipstream.runtime.config import RuntimeConfig
from slipstream.runtime.engine.host_pages import HostSpace, Transfer
from slipstream.runtime.engine.kv_cache import Move
from slipstream.runtime.engine.plan import MAX_STEP_DRAFTS
from slipstream.runtime.engine.stats import Traffic
from slipstream.runtime.engine.step import StepBatch
from slipstream.runtime.executors.cuda.buckets import QUERIES, Buckets, counts_of, mixed_sizes
from slipstream.runtime.executors.cuda.costs import StepCosts
from slipstream.runtime.executors.cuda.device import Device, Work
from slipstream.runtime.executors.cuda.drafter import Drafter, head_part
from slipstream.runtime.executors.cuda.host import CUDAHost
from slipstream.runtime.executors.cuda.load import Loading, begin_loading
from slipstream.runtime.executors.cuda.pages import CUDAPages
from slipstream.runtime.executors.cuda.pending import StartedCUDAStep
from slipstream.runtime.executors.cuda.program import CUDAProgram, target_spec
from slipstream.runtime.executors.cuda.runner import StepRunner
from slipstream.runtime.executors.cuda.sampling import CUDASampler
from slipstream.runtime.speculation.proposer import OFF

if TYPE_CHECKING:  # engines of one rank start without them
    from slipstream.plugins.collectives.cuda.communicator import Communicator
    from slipstream.runtime.executors.cuda.team import Team

# What cuBLAS, captured graphs and torch's own rounding take beside what is counted.
_RESERVE_BYTES = 512 << 20


class CUDAExecutor:
    """The ``Executor`` of an NVIDIA GPU.

    Python pays for three launches a step, beside two copies of what it is given: all layers (one
    captured graph), norm, head and sampling (another), and the copy of the tokens to the host; only
    steps of many tokens are launched kernel by kernel. Sampled tokens stay on the device, from
    where the next step reads them. No request changes that: what some want beside is launched after
    the head.
    """

    runs_ahead = True
    draft_tokens = 0
    max_drafts = max(QUERIES) - 1
    _runner_type: type[StepRunner] = StepRunner
    _steps: str | None = None
    # How calls of the graph's own functions are run, by the name of the node: there are none.
    _calls: Mapping[str, Binding] = MappingProxyType({})
    # Of which counts guesses of a head are captured.
    guess_counts: Sequence[int] = ()
    # Of steps, measured when the engine was tuned; without, at the start.
    _costs: StepCosts | None = None
    _team: Team | None = None  # of ranks

    def __init__(
        self,
        engine: Engine,
        config: RuntimeConfig,
        rank: int = 0,
        meet: Callable[[Device], Team] | None = None,
        loading: Loading | None = None,
    ) -> None:
        """Put an engine's weights on the GPU, or those of one ``rank`` on its own, which then
        ``meet`` the others; their ``loading`` may have begun.

        The machine has been checked (``device.require``). Raises CapacityError when weights or
        buffers do not fit.
        """
        loading = loading or begin_loading(engine, rank)
        self._device = loading.device
        with phase("graph"):
            graph = ir.load(engine.path / engine.manifest.graphs[TARGET_GRAPH].file).graph
            head = None
            if engine.manifest.head is not None and config.speculative == EAGLE3:
                head = ir.load(engine.path / engine.manifest.graphs[HEAD_GRAPH].file).graph
        with phase("wait for weights and kernels"):
            weights = loading.weights.result()
            loading.prepared.result()
        if meet is not None:
            with phase("other ranks"):
                self._team = meet(self._device)
        # What tells the kernels of its steps from those of others.
        self._steps = f"{engine.fingerprint} {config}"
        with phase("program and buffers"):
            self._start(engine.manifest, config, (graph, head), weights, engine.path / TACTICS)
        if not config.deterministic:  # whose kernels are others
            self._costs = StepCosts.load(engine.path / COSTS, self._device.name)

    @classmethod
    def from_weights(
        cls,
        manifest: Manifest,
        config: RuntimeConfig,
        graph: ir.Graph,
        weights: Mapping[str, Tensor],
        tactics: Path | None = None,
        device: Device | None = None,
        head: ir.Graph | None = None,
    ) -> CUDAExecutor:
        """An executor of a graph, and of one of a ``head``, whose weights are on the device
        already."""
        executor = cls.__new__(cls)
        executor._device = device or Device()
        executor._start(manifest, config, (graph, head), weights, tactics)
        return executor

    def _start(
        self,
        manifest: Manifest,
        config: RuntimeConfig,
        graphs: tuple[ir.Graph, ir.Graph | None],
        weights: Mapping[str, Tensor],
        tactics: Path | None,
    ) -> None:
        graph, head = graphs
        spec = target_spec(manifest)
        guesses = head is not None and config.speculative == EAGLE3
        self._caches = tuple(c for c in manifest.caches if guesses or c.name != HEAD_GRAPH)
        self._config, device = config, self._device
        self._host: CUDAHost | None = None
        tuned = table = Tactics.load(tactics, device.capability, device.name)
        if config.deterministic:
            table = FixedTactics(device.capability, device.name)
        drafts = self._drafts_of_step()
        rows = config.max_batch_size + drafts
        self._pages = CUDAPages(self._caches, config)
        with device.work(), self._fitting():
            program = CUDAProgram(
                graph,
                spec,
                weights,
                table,
                device.torch,
                self._calls,
                self._communicator(manifest),
                gives_states=guesses,
            )
            part = None
            if head is not None and guesses:  # whatever is guessed, answers are deterministic
                part = head_part(manifest, head, weights, tuned, device)
            self._attention = [*program.attention, *(part.program.attention if part else ())]
            block = min(query_block(layer) for layer in self._attention)
            buckets = Buckets(
                config.max_batch_size, config.max_num_tokens, block, config.deterministic, drafts
            )
            self._sampler = CUDASampler(
                rows, config.max_batch_size, program.vocab_size, config.max_seq_len, device.torch
            )
            self._sampler.buffers.enable_full()  # before pages take what is free
            drafter = logits = None
            if part is not None:
                logits = torch.zeros((rows, program.vocab_size), device=device.torch)
                sampled, size = self._sampler.buffers, self._pages.page_size
                drafter = Drafter(part, sampled, logits, device, buckets, size)
            self.runner = self._runner(program, buckets, logits, drafter)
        self.guess_counts = () if drafter is None else counts_of(config.num_speculative_tokens)

    def _runner(
        self,
        program: CUDAProgram,
        buckets: Buckets,
        logits: Tensor | None = None,
        drafter: Drafter | None = None,
    ) -> StepRunner:
        """What runs the steps, with the head's part if there is one."""
        of = (program, self._sampler, self._device, buckets, self._pages.columns, self._team)
        return self._runner_type(*of, logits=logits, drafter=drafter)

    def _communicator(self, manifest: Manifest) -> Communicator | None:
        """Who speaks to the other ranks; on a device that is only planned, whose kernels do."""
        if manifest.ranks == 1:
            return None
        if self._team is None:
            from slipstream.runtime.executors.cuda.team import Team

            assert self._device.is_planned, "ranks have met before they start"
            self._team = Team.planned(manifest.ranks, self._device)
        return self._team.communicator

    def reserve_kv(self, num_bytes: int | None) -> int:
        """Allocate pages, then capture the graphs that write to them.

        None takes ``kv_cache_free_gpu_memory_fraction`` of what weights and the largest step leave
        free, at most what the limits can use. More than is free shrinks to that, with a message.
        Of several ranks all have as many pages as that which has room for the fewest.
        A cache with a window has fewer pages where a full batch cannot use as many as it returns.
        """
        with self._fitting():
            with phase("largest steps"):
                self._allocate(1)
                free = self._free_after_largest_step() + self._pages.bytes_of(1)
                pages = self._pages.affordable(max(free, 0), num_bytes)
            if self._team is not None:
                pages = self._team.least(pages)
            with phase("pages"):
                self._allocate(pages)
            with phase("graphs of the first steps"):
                # What steps cost, and other ranks, are not to be waited for later.
                at_once = self._team is not None or self._config.speculative != OFF
                self.runner.capture(self.guess_counts, at_once)
        return pages

    def prepare_next(self) -> bool:
        """Capture another graph of those that small batches run."""
        return self.runner.capture_next()

    @property
    def padded_sizes(self) -> Sequence[int]:
        """Those of captured steps that are more than decodes."""
        return mixed_sizes(self._config.max_num_tokens)

    def reserve_host(self, num_bytes: int, file: str | None) -> HostSpace:
        """Pin memory; a GPU has no use for a ``file``."""
        assert file is None, "refused when the engine is loaded"
        self._host = CUDAHost(self._device, self._caches, num_bytes)
        return self._host.space

    @property
    def stored(self) -> Traffic:
        """Copies that were over when the last step with some was submitted."""
        return Traffic() if self._host is None else self._host.stored

    @property
    def loaded(self) -> Traffic:
        """The same of those to the device."""
        return Traffic() if self._host is None else self._host.loaded

    def transfer(self, transfers: Sequence[Transfer]) -> None:
        """Copy pages, and wait for that."""
        self._copy_pages(transfers)
        self._device.synchronize()

    def _copy_pages(self, transfers: Sequence[Transfer]) -> None:
        """Enqueue copies of pages, which what is enqueued after them waits for."""
        if self._host is not None:
            self._host.transfer(transfers, self._pages.by_cache(self.runner.memory.pages))

    def step_seconds(self) -> dict[int, float]:
        """Of steps as the GPU takes them one after the other, as the engine's file of costs has
        them, or of those that are captured at the start; what the host adds is seen when there are
        requests."""
        if self._costs is not None:
            return dict(self._costs.rows)
        return self.runner.step_seconds() if self._device.is_cuda else {}

    @property
    def guesses(self) -> int:
        """How many tokens a head of the engine guesses after a step, at most."""
        return max(self.guess_counts, default=0)

    @property
    def verifies_unseen(self) -> bool:
        """Where it guesses, what it has guessed stays on the device."""
        return self.guesses > 0

    @property
    def captures(self) -> int:
        """How many graphs were captured so far."""
        return self._device.captures

    def guess_seconds(self) -> dict[tuple[int, int], float]:
        """What the head takes after such steps."""
        if self._costs is not None and self._costs.guesses:
            return dict(self._costs.guesses)
        guessing = self.runner.guessing
        if guessing is None or not self._device.is_cuda:
            return {}
        return guessing.seconds(self.guess_counts)

    def measure(self) -> StepCosts:
        """What all steps of decodes take that are captured some day, when pages are reserved."""
        self.runner.capture_decodes(self.guess_counts)
        guessing = self.runner.guessing
        guesses = {} if guessing is None else guessing.seconds(self.guess_counts)
        return StepCosts(self._device.name, self.runner.step_seconds(), guesses)

    def works(self) -> list[Work]:
        """What launches every kernel that steps of this engine take, on a page of padding."""
        self._allocate(1)
        return self.runner.works(self.guess_counts)

    def submit(self, batch: StepBatch) -> StartedCUDAStep:
        """Enqueue a step's layers and return at once."""
        if batch.guessing is not None:  # of counts for which there are graphs
            count = batch.guessing.count
            count = next((each for each in self.guess_counts if each >= count > 0), 0)
            batch.guessing = replace(batch.guessing, count=count)
        self._copy_pages(batch.transfers)
        guessing = self.runner.guessing
        guessed = None if guessing is None else guessing.latest
        with self._device.work():
            self._move_pages(batch.moves)
            rows = enumerate(batch.sampling)
            places = [i for i, row in rows if row.target is None and not row.pooled]
            hidden = self.runner.layers(batch, batch.logits_rows[places])
        of = (self._device, self.runner, self._sampler)
        return StartedCUDAStep(*of, batch, places, hidden, guessed)

    def shutdown(self) -> None:
        """Let go of the graphs and the pages."""
        self._device.synchronize()
        self.runner.bind(None)
        if self._host is not None:
            self._host.close()
        self._host = None

    def logits(self, batch: StepBatch) -> NDArray[np.float32]:
        """Run a step and return its logits float32 ``[L, vocab]``; nothing is sampled."""
        with self._device.work():
            hidden = self.runner.layers(batch, batch.logits_rows[:0], eager=True)
            size, found = self._config.max_batch_size, []
            for start in range(0, len(batch.logits_rows), size):
                logits = self.runner.logits_of(hidden, batch.logits_rows[start : start + size])
                # The head writes to one place, which is on the host in the interpreter.
                found.append(logits.to("cpu", copy=True).numpy())
            return np.concatenate(found)

    def _drafts_of_step(self) -> int:
        """For how many drafts there is room beside a token of every sequence."""
        if self._config.speculative == OFF:
            return 0
        return min(self._config.max_batch_size * self.max_drafts, MAX_STEP_DRAFTS)

    def _move_pages(self, moves: Sequence[Move]) -> None:
        self._pages.move(moves, self.runner.memory.pages)

    def _allocate(self, pages: int) -> None:
        config, device, layers = self._config, self._device.torch, self._attention
        self.runner.bind(None)  # the old pages go before the new ones come
        with self._device.work():
            arrays = self._pages.allocate(pages, device)
            workspace = DecodeWorkspace.allocate(
                config.max_batch_size + self._drafts_of_step(),
                max(layer.num_heads for layer in layers),
                max(layer.head_dim for layer in layers),
                config.max_seq_len,
                device,
            )
        self.runner.bind(Memory(arrays, self._sampler.last_tokens, workspace))

    def _free_after_largest_step(self) -> int:
        """Bytes left when the largest step runs, measured by running one of padding.

        Captured graphs have memory of their own, which the steps between them cannot use.
        """
        device = self._device
        if not device.is_cuda:
            return device.free_memory()
        with phase("kernels"):
            self._compile()
        alone = device.peak(self.runner.largest_step)
        captured = max(device.peak(work) for work in self.runner.largest_captured())
        return device.free_memory() - alone - captured - _RESERVE_BYTES

    def _compile(self) -> None:
        """Of several ranks the first compiles for all, who find it on disk."""
        team = self._team
        works = partial(self.runner.works, self.guess_counts)
        if team is not None and not team.is_first:
            self._device.compile(works, self._steps, ready=team.meet)
            return
        self._device.compile(works, self._steps)
        if team is not None:
            team.meet()

    @contextmanager
    def _fitting(self) -> Iterator[None]:
        try:
            yield
        except torch.OutOfMemoryError as error:
            raise CapacityError(
                f"steps of {self._config.max_num_tokens} tokens and {self._config.max_batch_size} "
                "sequences do not fit in the GPU's memory beside the weights; lower "
                "--max-num-tokens, --max-batch-size or --kv-cache-bytes"
            ) from error
