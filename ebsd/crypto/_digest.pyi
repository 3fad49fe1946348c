"""Types of the compiled module; the functions are described in digest_kernel.h."""

from typing import Any, Protocol

class _CData(Protocol):
    def __len__(self) -> int: ...

class _Lib(Protocol):
    EBSD_DIGEST_DONE: int
    EBSD_DIGEST_BAD_LENGTH: int
    EBSD_DIGEST_OPENSSL: int

    def ebsd_digest_pieces(
        self,
        prefix: bytes,
        prefix_length: int,
        first: int,
        data: _CData,
        piece: int,
        count: int,
        digests: _CData,
        plain: int,
    ) -> int: ...
    def ebsd_digest_pairs(self) -> int: ...
    def ebsd_digest_sixteens(self) -> int: ...

class _Ffi(Protocol):
    def typeof(self, ctype: str) -> Any: ...
    def from_buffer(self, ctype: Any, buffer: object, require_writable: bool = False) -> _CData: ...

ffi: _Ffi
lib: _Lib
