"""Which linear gets which scheme and group, and what that takes: from names and shapes alone."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

from slipstream.builder.checkpoints.base import Checkpoint, check_read
from slipstream.builder.checkpoints.names import layer_of, linears
from slipstream.builder.models import architecture_of
from slipstream.builder.models.config import ModelConfig
from slipstream.builder.models.module import Role
from slipstream.builder.parameters import chosen_share
from slipstream.errors import BuildError, CheckpointError
from slipstream.quantize.options import (
    DENSE,
    PATTERN,
    WHOLE_ROW,
    Algorithm,
    QuantizeOptions,
    Scheme,
    Target,
    parse_override,
)
from slipstream.quantize.sites import multiplied_as_one
from slipstream.weights.rtn import GROUP_SIZES
from slipstream.weights.tensor import WeightFormat, numpy_dtype

# Operations a second of float32 matrices on one core of a small server, and bytes a second of
# reading, rounding and writing: for estimates of time only.
_OPERATIONS, _BYTES = 3e10, 1e8


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """One decoder layer: the scheme, with its group, of each linear that is quantized, by name:
    ``model.layers.0.self_attn.q_proj``."""

    index: int
    linears: Mapping[str, Scheme]


@dataclass(frozen=True, slots=True)
class Plan:
    """What a quantization will do.

    ``formats`` has every tensor of the source. ``notes`` says what differs from what was asked.
    """

    config: ModelConfig
    options: QuantizeOptions
    formats: Mapping[str, WeightFormat]
    layers: tuple[LayerPlan, ...]
    notes: tuple[str, ...] = ()

    @property
    def schemes(self) -> dict[str, Scheme]:
        """The scheme of every quantized linear."""
        return {name: scheme for layer in self.layers for name, scheme in layer.linears.items()}

    @property
    def algorithms(self) -> set[Algorithm]:
        """All that are used."""
        return {scheme.algorithm for scheme in self.schemes.values()}

    def shape(self, module: str) -> tuple[int, int]:
        """``[N, K]`` of a linear."""
        n, k = self.formats[f"{module}.weight"].shape
        return n, k

    @property
    def nbytes(self) -> int:
        """Size of all tensors of the result."""
        schemes = self.schemes
        return sum(
            schemes[module].nbytes(self.shape(module))
            if (module := name.removesuffix(".weight")) in schemes
            else _dense_bytes(form)
            for name, form in self.formats.items()
        )

    @property
    def source_nbytes(self) -> int:
        """Size of all tensors of the source."""
        return sum(map(_dense_bytes, self.formats.values()))

    @property
    def parameters(self) -> int:
        """Numbers of all tensors."""
        return sum(map(_elements, self.formats.values()))

    @property
    def effective_bits(self) -> float:
        """Mean bits of the decoder's linears, scales and zeros counted."""
        return effective_bits({m: self.formats[f"{m}.weight"] for m in self.linears}, self.schemes)

    @property
    def linears(self) -> tuple[str, ...]:
        """Every linear of the decoder's layers, experts' among them, quantized or not, but for
        ``routers``."""
        return tuple(name for name, role in self._roles.items() if role != "router")

    @property
    def routers(self) -> tuple[str, ...]:
        """What chooses experts, or how much one counts: small, and quantized only if asked for."""
        return tuple(name for name, role in self._roles.items() if role == "router")

    @property
    def experts(self) -> tuple[str, ...]:
        """The linears of experts."""
        return tuple(name for name, role in self._roles.items() if role == "expert")

    @property
    def _roles(self) -> dict[str, Role]:
        table = architecture_of(self.config.architecture)
        found = linears({name: form.shape for name, form in self.formats.items()})
        rows = {name: table.module(name) for name in found}
        return {name: "linear" if row is None else row.role for name, row in rows.items()}

    @property
    def memory(self) -> int:
        """Bytes that it takes at its peak, about: the head, a layer in float32 with the Gram
        matrices of what is no expert or of one expert, the hidden states of all calibration
        tokens before and after that layer, and before its experts, and what layers take of each
        token besides."""
        embedding = 4 * self.config.vocab_size * self.config.hidden_size
        hidden = (3 if self.experts else 2) * self.config.hidden_size
        states = 4 * self._tokens * (hidden + self._inputs)
        layers: dict[int, list[WeightFormat]] = {}
        for name, form in self.formats.items():
            if (index := layer_of(name)) is not None:
                layers.setdefault(index, []).append(form)
        return embedding + states + max(map(self._layer_memory, layers.values()))

    @property
    def _inputs(self) -> int:
        """Numbers of a token that layers take besides its hidden state."""
        table = architecture_of(self.config.architecture)
        rows = {name: table.module(name.removesuffix(".weight")) for name in self.formats}
        tables = [n for n, row in rows.items() if row is not None and row.role == "embedding"]
        return sum(self.formats[name].shape[1] for name in tables[1:])

    def _layer_memory(self, layer: Iterable[WeightFormat]) -> int:
        inputs = {form.shape[1] for form in layer if len(form.shape) == 2}
        gram = sum(4 * k * k for k in inputs) if self.calibrated else 0
        return 2 * sum(4 * _elements(form) for form in layer) + 3 * gram

    def seconds(self, cores: int) -> float:
        """Time that it takes on so many cores, to within a factor of a few."""
        experts, share = set(self.experts), chosen_share(self.config)
        # A token takes two operations a weight, once to see inputs and once to go on.
        operations = (
            4.0
            * self._tokens
            * sum(
                math.prod(self.shape(name)) * (share if name in experts else 1)
                for name in self.schemes
            )
        )
        if "gptq" in self.algorithms:
            operations += 40.0 * sum(k * k * (n + k) / 4 for n, k in map(self.shape, self.schemes))
        if "awq" in self.algorithms:
            operations += 40.0 * sum(2 * n * k * k for n, k in map(self.shape, self.schemes))
        return operations / (_OPERATIONS * cores) + (self.source_nbytes + self.nbytes) / _BYTES

    @property
    def calibrated(self) -> bool:
        """Whether text must run through the model."""
        options = self.options
        wanted = options.kv_cache_dtype == "fp8" or options.auto_bits is not None
        return wanted or bool(self.algorithms - {"rtn"})

    @property
    def _tokens(self) -> int:
        options = self.options
        return options.calib_size * options.calib_max_seq_length if self.calibrated else 0

    def with_qformats(self, chosen: Mapping[str, str]) -> Plan:
        """The plan with other qformats (or ``dense``) for some linears, by name."""
        notes = list(self.notes)
        schemes = {m: scheme for m, scheme in self.schemes.items() if m not in chosen}
        asked = {m: self.options.scheme(q) for m, q in chosen.items() if q != DENSE}
        extents = [_extent(s, self.shape(m)) for m, s in (schemes | asked).items()]
        group = self.options.group_size or _common_group(extents)
        for module, scheme in asked.items():
            placed = _placed(scheme, module, self.shape(module), group, notes)
            schemes |= {module: placed} if placed else {}
        return replace(self, layers=_by_layer(self.config, schemes), notes=tuple(notes))


def make_plan(checkpoint: Checkpoint, options: QuantizeOptions) -> Plan:
    """The plan for a checkpoint of dense weights.

    Raises CheckpointError for one that is quantized or is no such model, BuildError for targets
    that match no linear and for options that leave nothing to quantize.
    """
    formats = {name: checkpoint.tensor(name).format for name in checkpoint.names()}
    _check_dense(checkpoint, formats)
    check_read(checkpoint)
    base = Plan(checkpoint.config, options, MappingProxyType(formats), ())
    modules = base.linears
    plan = base.with_qformats(_chosen(modules, base.routers, options))
    plan = replace(plan, notes=(*plan.notes, *_mixed_experts(plan)))
    if not plan.schemes:
        raise BuildError(
            f"of the {len(modules)} linears of {checkpoint.path} none would be quantized: "
            f"{'; '.join(plan.notes) or 'all are excluded'}; exclude fewer"
        )
    return replace(plan, notes=tuple(_grouped(plan.notes)))


def effective_bits(formats: Mapping[str, WeightFormat], schemes: Mapping[str, Scheme]) -> float:
    """Mean bits a weight of linears by name, scales and zeros counted."""
    total = sum(
        schemes[module].nbytes(form.shape) if module in schemes else _dense_bytes(form)
        for module, form in formats.items()
    )
    return 8 * total / sum(map(_elements, formats.values()))


def _check_dense(checkpoint: Checkpoint, formats: Mapping[str, WeightFormat]) -> None:
    quantized = [name for name, form in formats.items() if form.kind != "dense"]
    if quantized:
        form = formats[quantized[0]]
        raise CheckpointError(
            f"{checkpoint.path} is quantized already ({len(quantized)} tensors, {quantized[0]} in "
            f"{form.bits}-bit {form.kind}), and quantizing twice adds up the errors of both; give "
            "the original checkpoint in float16 or bfloat16, build an engine of this one with "
            "slipstream build, or change its layout with slipstream convert"
        )


def _chosen(
    modules: Sequence[str], routers: Sequence[str], options: QuantizeOptions
) -> dict[str, str]:
    """The qformat of every linear, and of routers that a target of theirs alone asks for."""
    chosen: dict[str, str] = dict.fromkeys(modules, options.qformat)
    for text in options.overrides:
        target, qformat = parse_override(text)
        asked = [router for router in routers if target.matches(router)]
        if not asked or any(map(target.matches, modules)):
            asked = _matching(target, modules)
        chosen |= dict.fromkeys(asked, qformat)
    for text in options.exclude:
        chosen |= dict.fromkeys(_matching(Target.parse(text), modules), DENSE)
    return chosen


def _matching(target: Target, modules: Sequence[str]) -> list[str]:
    found = [module for module in modules if target.matches(module)]
    if not found:
        hint = "" if target.text.startswith(PATTERN) else "; a pattern starts with re:"
        raise BuildError(
            f"the target {target.text!r} matches none of the {len(modules)} linears, which are "
            f"named like {modules[0] if modules else 'model.layers.0.mlp.down_proj'}{hint}"
        )
    return found


def _mixed_experts(plan: Plan) -> Iterator[str]:
    """What experts of a layer have that are stored as one weight and do not fit together."""
    placed = plan.schemes
    layers: dict[int | None, list[str]] = {}
    for name in plan.experts:
        layers.setdefault(layer_of(f"{name}."), []).append(name)
    for layer, experts in layers.items():
        prefix = f"model.layers.{layer}."
        names = [name.removeprefix(prefix) for name in experts]
        for stack in multiplied_as_one(plan.config, layer or 0, names):
            schemes = {placed.get(prefix + name) for name in stack}
            if len(schemes) > 1:
                yield (
                    f"{prefix}{stack[0]} and the experts' linears that are stored with it have "
                    f"{len(schemes)} schemes: an engine of the result holds them in float32"
                )


def _extent(scheme: Scheme, shape: tuple[int, int]) -> int:
    """What groups must divide in a weight: its columns, for blocks its rows too; 0 is anything."""
    if scheme.grouping == "block":
        return math.gcd(*shape)
    return shape[1] if scheme.grouping == "group" else 0


def _common_group(extents: Iterable[int]) -> int:
    """The largest group that divides every extent which any of them divides."""
    divisible = [extent for extent in extents if extent % GROUP_SIZES[-1] == 0]
    return next(size for size in GROUP_SIZES if all(extent % size == 0 for extent in divisible))


def _placed(
    scheme: Scheme, module: str, shape: tuple[int, int], group: int, notes: list[str]
) -> Scheme | None:
    """The scheme with ``group``, or the next smaller one that fits a weight of this shape; None,
    with a note, if none does."""
    extent = _extent(scheme, shape)
    wanted = scheme.group or group
    if not extent or wanted == WHOLE_ROW:
        return replace(scheme, group=shape[1])
    sizes = (wanted,) if scheme.group else (wanted, *(g for g in GROUP_SIZES if g < wanted))
    found = next((size for size in sizes if extent % size == 0), None)
    block = scheme.grouping == "block"
    size = f"{shape[0]} x {shape[1]}" if block else f"{shape[1]} columns"
    if found is None:
        kind = "block" if block else "group"
        notes.append(f"{module} stays dense: no {kind} of {_either(sizes)} divides its {size}")
        return None
    if found != wanted:
        kind = "blocks" if block else "groups"
        notes.append(f"{module} has {kind} of {found}: {wanted} does not divide its {size}")
    return replace(scheme, group=found)


def _either(sizes: Iterable[int]) -> str:
    return " or ".join(map(str, sizes))


def _by_layer(config: ModelConfig, schemes: Mapping[str, Scheme]) -> tuple[LayerPlan, ...]:
    layers: list[dict[str, Scheme]] = [{} for _ in range(config.num_layers)]
    for module, scheme in schemes.items():
        index = layer_of(f"{module}.")
        assert index is not None
        layers[index][module] = scheme
    return tuple(LayerPlan(i, MappingProxyType(linears)) for i, linears in enumerate(layers))


def _grouped(notes: Iterable[str]) -> Iterator[str]:
    """The notes, those that say the same of many layers, or of many experts, as one."""
    same: dict[str, list[str]] = {}
    for note in notes:
        same.setdefault(re.sub(r"\b(layers|experts)\.\d+", r"\1.*", note), []).append(note)
    for pattern, members in same.items():
        layers = len({layer_of(note) for note in members})
        yield members[0] if len(members) == 1 else f"{pattern} ({layers} layers)"


def _elements(form: WeightFormat) -> int:
    elements = 1
    for size in form.shape:
        elements *= size
    return elements


def _dense_bytes(form: WeightFormat) -> int:
    return _elements(form) * numpy_dtype(form.dtype).itemsize
