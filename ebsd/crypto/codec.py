"""Codecs: how the block engine turns sectors of one layer into stored bytes and back.

1. Sector numbers count from the start of the *volume*, in every layer; the tweak is that number.
2. A key covers one segment (1 TiB) of one layer; a range that crosses a segment border is split here.
3. Holes never come here: a chunk without data is zeros by the map, not by decryption.
"""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from types import TracebackType
from typing import Final, Protocol, Self

from ebsd.crypto.kdf import XTS_KEY_BYTES, layer_key
from ebsd.crypto.secret import Secret
from ebsd.crypto.xts import IoBuffer, XtsKey
from ebsd.domain.model import Cipher
from ebsd.domain.units import SECTOR, SEGMENT

LAYERS_KEPT: Final = 16_384
"""Layers whose keys stay derived. Making one key costs 40 us; keeping one costs about 3 KiB."""


class CodecClosed(ValueError):
    """A codec or its factory was used after ``close``: a bug of the caller."""


class LayerCodec(Protocol):
    """Whole sectors of one layer to and from their stored form.

    ``src`` and ``dst`` have the same length, a multiple of the sector size, and are the same buffer or do not
    overlap; ``first_sector`` is the number in the volume of the first one. Any number of threads may call
    at once. ValueError for other lengths or after ``close``; when a call raises, what ``dst`` holds is
    undefined.
    """

    def encrypt_into(self, src: IoBuffer, dst: IoBuffer, first_sector: int) -> None: ...

    def decrypt_into(self, src: IoBuffer, dst: IoBuffer, first_sector: int) -> None: ...

    def close(self) -> None: ...


class _LayerKeys:
    """Derives the XTS keys of one data key's layers, all through one piece of secret memory.

    Secret memory of its own for each key would double what a key costs, and a volume may have thousands of layers.
    """

    __slots__ = ("_data_key", "_lock", "_material")

    def __init__(self, data_key: Secret) -> None:
        self._data_key = data_key
        self._lock = threading.Lock()
        self._material = Secret(XTS_KEY_BYTES)

    def make(self, layer_uuid: bytes, segment: int, sector_size: int) -> XtsKey:
        with self._lock:
            try:
                layer_key(self._data_key, layer_uuid, segment, sector_size, Cipher.AES_256_XTS, self._material)
                return XtsKey(self._material)
            finally:
                self._material.view[:] = bytes(XTS_KEY_BYTES)

    def close(self) -> None:
        with self._lock:
            self._material.wipe()


class XtsLayerCodec:
    """XTS-AES-256 with one key per segment, each derived when it is first needed."""

    __slots__ = (
        "__weakref__",
        "_closed",
        "_derivation",
        "_keys",
        "_layer_uuid",
        "_lock",
        "_sector_size",
        "_span",
    )

    def __init__(
        self, data_key: Secret, layer_uuid: bytes, sector_size: int = SECTOR, *, derivation: _LayerKeys | None = None
    ) -> None:
        """Borrow ``data_key`` (64 bytes): it must outlive the codec, and the codec does not wipe it."""
        if len(layer_uuid) != 16:
            raise ValueError(f"a layer's id has 16 bytes, not {len(layer_uuid)}")
        if sector_size < 512 or SEGMENT % sector_size:
            raise ValueError(f"{sector_size} bytes are no sector")
        self._derivation = derivation or _LayerKeys(data_key)
        self._layer_uuid = layer_uuid
        self._sector_size = sector_size
        self._span = SEGMENT // sector_size
        """Sectors of one segment."""
        self._keys: dict[int, XtsKey] = {}
        self._lock = threading.Lock()
        self._closed = False

    def encrypt_into(self, src: IoBuffer, dst: IoBuffer, first_sector: int) -> None:
        """See LayerCodec."""
        self._run(XtsKey.encrypt, src, dst, first_sector)

    def decrypt_into(self, src: IoBuffer, dst: IoBuffer, first_sector: int) -> None:
        """See LayerCodec."""
        self._run(XtsKey.decrypt, src, dst, first_sector)

    def native_key(self, segment: int) -> XtsKey:
        """Return the key of one segment, derived when it is first needed; the codec closes it. Raises CodecClosed."""
        return self._key(segment)

    def close(self) -> None:
        """Wait for running calls and clear every key of the layer; may be called again."""
        with self._lock:
            self._closed = True
            for key in self._keys.values():
                key.close()
            self._keys.clear()

    def __repr__(self) -> str:
        return f"<XtsLayerCodec of layer {self._layer_uuid.hex()}>"

    def _run(self, direction: _Direction, src: IoBuffer, dst: IoBuffer, first_sector: int) -> None:
        size, span = self._sector_size, self._span
        length = len(src)
        segment, inside = divmod(first_sector, span)
        if segment < 0 or length % size:
            raise _misfit(length, first_sector, size)
        if length <= (span - inside) * size:
            direction(self._key(segment), src, dst, unit=size, first_tweak=first_sector)
            return
        if len(dst) != length:
            raise ValueError(f"{length} bytes do not go into {len(dst)}")
        source, destination = memoryview(src).cast("B"), memoryview(dst).cast("B")
        at = 0
        while at < length:
            sector = first_sector + at // size
            segment, inside = divmod(sector, span)
            end = min(length, at + (span - inside) * size)
            direction(self._key(segment), source[at:end], destination[at:end], unit=size, first_tweak=sector)
            at = end

    def _key(self, segment: int) -> XtsKey:
        # No lock: a dict's get is atomic, and a key that close() took refuses to work.
        key = self._keys.get(segment)
        if key is not None:
            return key
        with self._lock:
            if self._closed:
                raise CodecClosed("the codec of this layer has been closed")
            key = self._keys.get(segment)
            if key is None:
                key = self._derivation.make(self._layer_uuid, segment, self._sector_size)
                self._keys[segment] = key
            return key


class _Direction(Protocol):
    def __call__(self, key: XtsKey, src: IoBuffer, dst: IoBuffer, /, *, unit: int, first_tweak: int) -> None: ...


def _misfit(length: int, first_sector: int, size: int) -> ValueError:
    return ValueError(f"{length} bytes from sector {first_sector} are no whole sectors of {size} bytes")


class PlainCodec:
    """Sectors stored as they are: layers of an unencrypted volume."""

    __slots__ = ("__weakref__", "_sector_size")

    def __init__(self, sector_size: int = SECTOR) -> None:
        self._sector_size = sector_size

    def encrypt_into(self, src: IoBuffer, dst: IoBuffer, first_sector: int) -> None:
        """See LayerCodec; copies."""
        self._copy(src, dst, first_sector)

    def decrypt_into(self, src: IoBuffer, dst: IoBuffer, first_sector: int) -> None:
        """See LayerCodec; copies."""
        self._copy(src, dst, first_sector)

    def native_key(self, segment: int) -> None:
        """There is none: sectors are stored as they are."""

    def close(self) -> None:
        """Nothing is held."""

    def _copy(self, src: IoBuffer, dst: IoBuffer, first_sector: int) -> None:
        if first_sector < 0 or len(src) % self._sector_size:
            raise _misfit(len(src), first_sector, self._sector_size)
        if len(dst) != len(src):
            raise ValueError(f"{len(src)} bytes do not go into {len(dst)}")
        memoryview(dst).cast("B")[:] = memoryview(src).cast("B")


class CodecFactory:
    """The codecs of one volume's layers: derived when asked for, at most ``kept`` of them remembered.

    A codec pushed out of memory goes on working for whoever still holds it; its keys are cleared when the
    last holder drops it. ``close`` clears them all, held or not. The data key is borrowed, as it signs the
    record after the last sector was written: who made it wipes it.
    """

    def __init__(
        self, data_key: Secret | None, *, cipher: Cipher, sector_size: int = SECTOR, kept: int = LAYERS_KEPT
    ) -> None:
        """Make a factory for one cipher of the allow-list; ``data_key`` is None exactly for Cipher.NONE."""
        if (data_key is None) is not (cipher is Cipher.NONE):
            raise ValueError(f"{cipher.name} {'without' if data_key is None else 'with'} a data key")
        if kept < 1:
            raise ValueError("at least one layer is kept")
        self._data_key = data_key
        self._derivation = None if data_key is None else _LayerKeys(data_key)
        self._sector_size = sector_size
        self._kept = kept
        self._plain = PlainCodec(sector_size)
        self._codecs: OrderedDict[bytes, XtsLayerCodec] = OrderedDict()
        self._alive: weakref.WeakSet[XtsLayerCodec] = weakref.WeakSet()
        self._lock = threading.Lock()
        self._closed = False

    def codec(self, layer_uuid: bytes) -> LayerCodec:
        """Return the codec of a layer (16-byte id). Ask per request and do not keep it. Raises
        CodecClosed."""
        with self._lock:
            if self._closed:
                raise CodecClosed("the codecs of this volume have been closed")
            if self._data_key is None:
                return self._plain
            codec = self._codecs.get(layer_uuid)
            if codec is not None:
                self._codecs.move_to_end(layer_uuid)
                return codec
            codec = XtsLayerCodec(self._data_key, layer_uuid, self._sector_size, derivation=self._derivation)
            self._codecs[layer_uuid] = codec
            self._alive.add(codec)
            if len(self._codecs) > self._kept:
                self._codecs.popitem(last=False)
            return codec

    def close(self) -> None:
        """Wait for running calls and clear every key of every codec ever handed out; may be called again."""
        with self._lock:
            self._closed = True
            codecs = list(self._alive)
            self._codecs.clear()
        for codec in codecs:
            codec.close()
        if self._derivation is not None:
            self._derivation.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
