"""The GPUs that a process sees, without taking memory on any."""

from __future__ import annotations

import ctypes
from uuid import UUID

from r3.errors import EngineError


def visible_gpus() -> tuple[str, ...]:
    """Return the UUIDs of the GPUs that CUDA shows to this process, in CUDA's order, as torch writes them.

    Asks the driver (`cuInit`, `cuDeviceGetUuid` of the CUDA driver API), which makes no context: torch would make one,
    some 500 MiB, in a process whose engine runs in others. Raises `EngineError` where the driver does not answer.
    """
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise EngineError(f"the CUDA driver cannot be loaded: {error}") from error
    count = ctypes.c_int()
    _check("cuInit", driver.cuInit(0))
    _check("cuDeviceGetCount", driver.cuDeviceGetCount(ctypes.byref(count)))
    get_uuid = getattr(driver, "cuDeviceGetUuid_v2", None) or driver.cuDeviceGetUuid
    found = []
    for index in range(count.value):
        device, raw = ctypes.c_int(), (ctypes.c_ubyte * 16)()
        _check("cuDeviceGet", driver.cuDeviceGet(ctypes.byref(device), index))
        _check("cuDeviceGetUuid", get_uuid(ctypes.byref(raw), device))
        found.append(str(UUID(bytes=bytes(raw))))
    return tuple(found)


def _check(call: str, code: int) -> None:
    if code:
        raise EngineError(f"the CUDA driver answers {call} with error {code}")
