"""Parallel layouts as people write them: `tp2,pp2,distopt` <-> the keys of `trainer`."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from r3.config import TrainerConfig
from r3.errors import ConfigError

_SIZES: Mapping[str, str] = {
    "tp": "tensor_parallel",
    "pp": "pipeline_parallel",
    "vpp": "virtual_pipeline",
    "cp": "context_parallel",
    "ep": "expert_parallel",
    "etp": "expert_tensor_parallel",
}
_WORDS: Mapping[str, Mapping[str, Any]] = {
    "distopt": {"distributed_optimizer": True},
    "alltoall": {"dispatcher": "alltoall"},
    "allgather": {"dispatcher": "allgather"},
    "packed": {"packed": True},
    "padded": {"packed": False},
    "none": {"recompute": "none"},
    "full": {"recompute": "full"},
    "selective": {"recompute": "selective"},
}


def parse_layout(trainer: TrainerConfig, text: str | None) -> TrainerConfig:
    """Return `trainer` in the layout `text`, such as `tp2,pp2,full`; None leaves it as it is.

    Sizes that `text` leaves out are 1, other keys stay. Without `dpN` there are as many processes as the sizes need.
    Raises `ConfigError` for a word that is not known and for sizes that cannot be combined.
    """
    if text is None:
        return trainer
    changes: dict[str, Any] = {key: 1 for key in _SIZES.values()} | {
        "expert_tensor_parallel": None,
        "distributed_optimizer": False,
    }
    data = None
    for word in filter(None, re.split(r"[,+\s]+", text.strip())):
        sized = re.fullmatch(r"(dp|tp|pp|vpp|cp|ep|etp)([1-9]\d*)", word)
        if sized and sized[1] == "dp":
            data = int(sized[2])
        elif sized:
            changes[_SIZES[sized[1]]] = int(sized[2])
        elif word in _WORDS:
            changes |= _WORDS[word]
        else:
            known = ", ".join(["dpN", *(f"{name}N" for name in _SIZES), *_WORDS])
            raise ConfigError(f"layout {text!r}: {word!r} is unknown; a layout is a comma list of {known}")
    dense = changes["tensor_parallel"] * changes["pipeline_parallel"] * changes["context_parallel"]
    expert_tensor = changes["expert_tensor_parallel"] or changes["tensor_parallel"]
    experts = expert_tensor * changes["expert_parallel"] * changes["pipeline_parallel"]
    changes["processes"] = dense * data if data else math.lcm(dense, experts)
    try:
        return TrainerConfig.model_validate(trainer.model_dump() | changes)
    except ValidationError as error:
        reasons = "; ".join(str(one["msg"]).removeprefix("Value error, ") for one in error.errors())
        raise ConfigError(f"layout {text!r}: {reasons}") from error


def describe_layout(trainer: TrainerConfig) -> str:
    """Return a layout as `parse_layout` reads it."""
    sizes = [f"{short}{getattr(trainer, key)}" for short, key in _SIZES.items() if (getattr(trainer, key) or 1) > 1]
    if trainer.expert_tensor_parallel == 1 and trainer.tensor_parallel > 1:
        sizes.append("etp1")
    words = ["distopt"] if trainer.distributed_optimizer else []
    words += [trainer.dispatcher] if trainer.dispatcher != "alltoall" else []
    words += [trainer.recompute] if trainer.recompute != "none" else []
    data = [f"dp{trainer.data_parallel}"] if trainer.data_parallel > 1 or not sizes else []
    return ",".join([*data, *sizes, *words, "packed" if trainer.packed else "padded"])
