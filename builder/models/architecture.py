"""What an architecture's file declares, and what follows from it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from slipstream.builder.models.config import ModelConfig
from slipstream.builder.models.module import Module, pattern, place

if TYPE_CHECKING:
    from slipstream.builder.models.decoder import Decoder
    from slipstream.weights.json import Fields

PARTS = ("weight", "bias")


def _alike(config: ModelConfig, layer: int) -> ModelConfig:
    return config


def _nothing_more(config: ModelConfig) -> dict[str, Any]:
    return {}


def _nothing_concluded(raw: Mapping[str, Any]) -> dict[str, Any]:
    return {}


@dataclass(frozen=True, slots=True)
class GGUFFamily:
    """How GGUF files say that they are of an architecture.

    ``name`` is their ``general.architecture``. Of several architectures of that name, one whose key
    ``mark`` the file has (as a number other than 0) comes before one without a mark. ``keys`` gives
    keys of config.json the names of metadata beyond what ``gguf/config.py`` reads of every decoder;
    marks and keys are without the prefix of the architecture. Those of ``by_layer`` may differ
    between layers, and are given to ``concluded`` as a list. ``concluded`` gives the keys of
    config.json that no metadata holds, by those that were found: what llama.cpp knows of a family.
    ``only`` are metadata that may have no other value: nothing else is computed.
    """

    name: str
    mark: str | None = None
    keys: Mapping[str, str] = field(default_factory=dict)
    by_layer: Mapping[str, str] = field(default_factory=dict)
    concluded: Callable[[Mapping[str, Any]], Mapping[str, Any]] = _nothing_concluded
    only: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Architecture:
    """One architecture: the class that declares its graph, its modules in the order in which data
    flows, and its own reading and writing of ``config.json``.

    ``name`` is its ``model_type``. ``defaults`` are those of its configuration class in
    transformers, where they differ from those of every decoder. ``write`` gives the keys of
    config.json that ``read`` takes beyond what is common to decoders. ``in_layer`` gives the
    configuration as a layer has it, where layers differ in the size of their heads and the like.
    ``kv_head_counts`` are keys of ``extras`` that count heads of keys, as ``num_kv_heads`` does.
    """

    name: str
    decoder: type[Decoder]
    modules: tuple[Module, ...]
    defaults: Mapping[str, Any]
    read: Callable[[Fields], ModelConfig]
    write: Callable[[ModelConfig], Mapping[str, Any]] = _nothing_more
    gguf: GGUFFamily | None = None
    in_layer: Callable[[ModelConfig, int], ModelConfig] = _alike
    kv_head_counts: tuple[str, ...] = ()

    def module(self, name: str) -> Module | None:
        """The row of a module, by its name in a checkpoint; None for one that is not in the
        table."""
        return next((m for m in self.modules if pattern(m.name).fullmatch(name)), None)

    def shapes(self, config: ModelConfig) -> dict[str, tuple[int, ...]]:
        """Every tensor of a checkpoint of this configuration, by name."""
        shapes: dict[str, tuple[int, ...]] = {}
        for module in self.modules:
            biased = module.biased(config)
            for name in module.places(config):
                shape = self._shape(module, config, name)
                shapes[name if module.bare else f"{name}.weight"] = shape
                if biased:
                    shapes[f"{name}.bias"] = shape[:1]
        return shapes

    def shape(self, config: ModelConfig, tensor: str) -> tuple[int, ...] | None:
        """That of a weight or a bias by its name; None for one that no row is of."""
        name, _, part = tensor.rpartition(".")
        module = self.module(name) if part in PARTS else self.module(tensor)
        if module is None or module.bare != (part not in PARTS):
            return None
        shape = self._shape(module, config, tensor if module.bare else name)
        return shape[:1] if part == "bias" else shape

    def layer_of(self, module: Module, config: ModelConfig, name: str) -> ModelConfig:
        """The configuration of the layer that a module's name in a checkpoint says."""
        layer = _layer(module, name)
        return config if layer is None else self.in_layer(config, layer)

    def _shape(self, module: Module, config: ModelConfig, name: str) -> tuple[int, ...]:
        return module.shape(self.layer_of(module, config, name))

    def is_redundant(self, config: ModelConfig, tensor: str) -> bool:
        """Whether a checkpoint may hold a tensor that nothing reads: the embedding again, with
        which the configuration ties it, or what its layer has no use for."""
        name = tensor.rpartition(".")[0]
        module = self.module(name)
        if module is None:
            return False
        return (module.tied and config.tie_word_embeddings) or module.unread(
            config, _layer(module, name) or 0
        )

    def has(self, config: ModelConfig, name: str) -> bool:
        """Whether a checkpoint of this configuration has a module, by its name there."""
        module = self.module(name)
        return module is not None and module.present(config, _layer(module, name) or 0)

    def has_bias(self, config: ModelConfig, name: str) -> bool:
        """Whether a module, by its name in a checkpoint, has a bias."""
        module = self.module(name)
        return module is not None and module.biased(config)

    def embedding_scale(self, config: ModelConfig, name: str = "model.embed_tokens") -> float:
        """What the rows of an embedding, by its name in a checkpoint, are multiplied by."""
        return self._scale(config, next(m for m in self.modules if m.name == name))

    def logits_scale(self, config: ModelConfig) -> float:
        """What logits are multiplied by, whether the head is the embedding or a matrix of its
        own."""
        return next((self._scale(config, m) for m in self.modules if m.tied), 1.0)

    @staticmethod
    def _scale(config: ModelConfig, module: Module) -> float:
        return 1.0 if module.scale is None else module.scale(config)

    def logits_cap(self, config: ModelConfig) -> float:
        """The c of logits that are c·tanh(x / c), x being what the head makes; 0 for those that are
        x."""
        return next((m.cap(config) for m in self.modules if m.cap is not None), 0.0)

    def with_biases(self, config: ModelConfig, tensors: Iterable[str]) -> ModelConfig:
        """The configuration with the biases that are among the tensors of a file."""
        biased = {self.module(n.removesuffix(".bias")) for n in tensors if n.endswith(".bias")}
        flags = {m.bias: False for m in self.modules if isinstance(m.bias, str)}
        flags |= {m.bias: True for m in biased if m is not None and isinstance(m.bias, str)}
        return config.with_flags(flags)

    def from_gguf(self, tensor: str) -> str | None:
        """The Hugging Face name of a tensor by its name in a GGUF file; None if there is none."""
        found = self._renamed(tensor, lambda m: m.gguf_names, lambda m: (m.name,))
        return found[0] if found else None

    def to_gguf(self, tensor: str) -> tuple[str, ...]:
        """The name of a tensor in a GGUF file by its Hugging Face name, or those of its parts; none
        if there is none."""
        return self._renamed(tensor, lambda m: (m.name,), lambda m: m.gguf_names)

    def _renamed(
        self,
        tensor: str,
        old: Callable[[Module], tuple[str, ...]],
        new: Callable[[Module], tuple[str, ...]],
    ) -> tuple[str, ...]:
        stem, dot, part = tensor.rpartition(".")
        for module in self.modules:
            name, end = (tensor, "") if module.bare else (stem, dot + part)
            found = (pattern(before).fullmatch(name) for before in old(module))
            match = next(filter(None, found), None)
            if match is not None and (module.bare or part in PARTS):
                numbers = {key: int(value) for key, value in match.groupdict().items()}
                i, e = numbers.get("i", 0), numbers.get("e", 0)
                return tuple(place(after, i, e) + end for after in new(module))
        return ()


def _layer(module: Module, name: str) -> int | None:
    """The layer of a module by its name there; None outside of layers."""
    match = pattern(module.name).fullmatch(name)
    number = match.groupdict().get("i") if match else None
    return None if number is None else int(number)


def differing(modules: tuple[Module, ...], **changes: Mapping[str, Any]) -> tuple[Module, ...]:
    """A table with other values in some rows: ``differing(DECODER, q_proj={"bias": True})``.

    Rows are named by the last part of their pattern.
    """
    known = {module.name.rpartition(".")[2] for module in modules}
    assert changes.keys() <= known, f"no row is called {sorted(changes.keys() - known)}"
    return tuple(
        dataclasses.replace(m, **changes.get(m.name.rpartition(".")[2], {})) for m in modules
    )


def stacked(
    modules: tuple[Module, ...], name: str, parts: tuple[str, ...], gguf: str | None = None
) -> tuple[Module, ...]:
    """A table in which checkpoints hold some linears as one, their rows one after the other.

    ``parts`` are the linears in the order of their rows and ``name`` is that of the one, each the
    last part of a pattern. What read a part reads the same rows of the one.
    """
    rows = {m.name: m for part in parts for m in modules if m.name.rpartition(".")[2] == part}
    assert len(rows) == len(parts), f"not every row of {parts} is in the table"
    first, order = next(iter(rows.values())), list(rows)
    one = dataclasses.replace(
        first,
        name=f"{first.name.rpartition('.')[0]}.{name}",
        rows=tuple(measure for row in rows.values() for measure in row.rows),
        gguf=gguf,
        gguf_permuted=False,
    )
    table = [one if m is first else m for m in modules if m is first or m.name not in rows]
    return tuple(
        dataclasses.replace(m, reads=one.name, part=order.index(m.reads)) if m.reads in rows else m
        for m in table
    )
