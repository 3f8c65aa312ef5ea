"""The compiled kernels that an engine brings along, so that a GPU of their kind needs no compiler.

A zip file with two entries a kernel, named by the key of Triton's own cache: its metadata and the
code for the GPU. The key says everything that the code was made of, also the version of Triton, so
that what is stale or for another GPU is never asked for; what cannot be read is not there. The C
that passes arguments to kernels is no part of it: code for the host is made where it runs.
"""

from __future__ import annotations

import base64
import io
import json
import logging
import tempfile
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import triton
from triton.runtime.cache import FileCacheManager

log = logging.getLogger(__name__)
_MOST_BYTES = 256 << 20  # of all kernels together, unpacked
_NUMBERS = ("num_warps", "num_ctas", "shared", "global_scratch_size", "profile_scratch_size")
_ELF = b"\x7fELF"
_CODE = ".cubin"
Kernels = Mapping[str, bytes]  # what is in the file, by the names of its entries

_offered: dict[str, bytes] = {}


class KernelCache(FileCacheManager):  # type: ignore[misc]
    """What was offered, and beside it Triton's cache on disk."""

    def get_group(self, filename: str) -> dict[str, str] | None:
        """The files of a kernel, by name, of which ``filename`` is the metadata."""
        found: dict[str, str] | None = _unpacked(self.key, filename) or super().get_group(filename)
        return found


def offer(kernels: Kernels) -> None:
    """Let Triton take these kernels from now on, and all others from its cache."""
    if not kernels:
        return
    if triton.knobs.cache.manager_class not in (None, KernelCache):
        log.info("kernels of the engine are not used: TRITON_CACHE_MANAGER is set")
        return
    _offered.update(kernels)
    triton.knobs.cache.manager_class = KernelCache


def read_kernels(file: Path) -> Kernels:
    """What is in a file of kernels; nothing of one that is not there, damaged or too large."""
    try:
        # Read at once: every read lets go of the interpreter, which others want at a start.
        with zipfile.ZipFile(io.BytesIO(file.read_bytes())) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > _MOST_BYTES:
                raise ValueError(f"it holds more than {_MOST_BYTES >> 20} MiB")
            return {entry.filename: archive.read(entry) for entry in archive.infolist()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, EOFError, NotImplementedError, RuntimeError) as error:
        return _unread(file, error)
    except (zipfile.BadZipFile, zlib.error) as error:
        return _unread(file, error)


def _unread(file: Path, error: Exception) -> Kernels:
    log.warning("%s is not used, and kernels are compiled: %s", file, error)
    return {}


def pack_kernels(compiled: Iterable[Any]) -> bytes:
    """The file of kernels that ``triton.compile`` made, as many as may be in one."""
    packed, size = io.BytesIO(), 0
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for kernel in sorted(compiled, key=lambda kernel: str(kernel.hash)):
            name = f"{_key(kernel.hash)}/{kernel.src.name[:150]}"
            metadata = Path(kernel.metadata_group[f"{kernel.src.name[:150]}.json"]).read_bytes()
            size += len(metadata) + len(kernel.kernel)
            if size > _MOST_BYTES:
                log.warning("the engine keeps %d MiB of kernels and no more", _MOST_BYTES >> 20)
                break
            # Without a time, so that two builds of an engine have the same bytes.
            archive.writestr(zipfile.ZipInfo(f"{name}.json"), metadata, zipfile.ZIP_DEFLATED)
            archive.writestr(zipfile.ZipInfo(name + _CODE), kernel.kernel, zipfile.ZIP_DEFLATED)
    return packed.getvalue()


def _key(hexadecimal: str) -> str:
    """A hash as the cache on disk spells it."""
    return base64.b32encode(bytes.fromhex(hexadecimal)).decode().rstrip("=")


def _unpacked(key: str, filename: str) -> dict[str, str] | None:
    """The files of a kernel that was offered, in a folder of this process: not in the cache, where
    other programs would find what came with an engine."""
    code_name = filename.removesuffix(".json") + _CODE
    metadata, code = (_offered.get(f"{key}/{name}") for name in (filename, code_name))
    if metadata is None or code is None or not code.startswith(_ELF) or not _is_sound(metadata):
        return None
    folder = Path(_folder().name, key)
    folder.mkdir(exist_ok=True)
    for name, data in ((filename, metadata), (code_name, code)):
        (folder / name).write_bytes(data)
    return {name: str(folder / name) for name in (filename, code_name)}


@cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="slipstream-kernels-")


def _is_sound(metadata: bytes) -> bool:
    """Whether metadata has what Triton reads of it."""
    try:
        found = json.loads(metadata)
        numbers = [found[name] for name in _NUMBERS]
        target = found["target"]
        named = isinstance(found["name"], str) and target["backend"] == "cuda"
        return named and all(type(number) is int and number >= 0 for number in numbers)
    except (ValueError, RecursionError, KeyError, TypeError):
        return False
