"""What the cffi extension offers. Its names come from native/*.h, which the C compiler checks."""

from typing import Any

ffi: Any
lib: Any
