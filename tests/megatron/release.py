"""Letting go of Megatron models: nothing else does, and every one keeps the threads of its process groups."""

from __future__ import annotations

import gc
import sys


def release_models() -> None:
    """Cut every Megatron DDP in this process off what it holds.

    Its hooks hang on AccumulateGrad nodes, a cycle through C++ that Python's collector cannot see, so the model would
    live for ever, and with it some 50 gloo threads that wake a hundred times a second.
    """
    if "megatron.core.distributed" not in sys.modules:
        return
    from megatron.core.distributed import DistributedDataParallel
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

    for wrapper in [found for found in gc.get_objects() if type(found) is DistributedDataParallel]:
        vars(wrapper).clear()
    for method in vars(RotaryEmbedding).values():
        if hasattr(method, "cache_clear"):  # an lru_cache over `self`
            method.cache_clear()
    gc.collect()
