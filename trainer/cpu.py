"""What Megatron-core needs to run on a machine without CUDA, over gloo.

Megatron-core 0.16.1 is written for CUDA, yet its local (non Transformer Engine) modules are plain PyTorch; only device
names, streams and type checks stand in the way. Every changed symbol is listed in `PATCHES` with the reason. The real
`torch` module stays as it is: Megatron's modules get a stand-in as their global name `torch`, which creates tensors on
the CPU where they ask for CUDA. Nothing of this is installed where CUDA is available, except `BUG_FIXES`.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from r3.errors import ConfigError

# `megatron.core.jit` binds torch.compile at import; on a CPU that costs seconds and a C++ compiler for nothing.
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

import torch

CPU = torch.device("cpu")
MODULES = (
    "megatron.core.distributed.finalize_model_grads",
    "megatron.core.models.gpt.gpt_layer_specs",
    "megatron.core.models.gpt.gpt_model",
    "megatron.core.optimizer",
    "megatron.core.optimizer.clip_grads",
    "megatron.core.optimizer_param_scheduler",
    "megatron.core.pipeline_parallel.schedules",
    "megatron.core.tensor_parallel.random",
    "megatron.core.transformer.moe.token_dispatcher",
)


@dataclass(frozen=True, slots=True)
class Patch:
    """One symbol `module:attribute` of Megatron-core, what stands in for it, and why."""

    symbol: str
    reason: str
    replacement: Any

    def apply(self) -> None:
        """Replace the symbol; raise `ConfigError` when this Megatron-core does not have it."""
        owner, name = self.locate()
        setattr(owner, name, self.replacement)

    def locate(self) -> tuple[Any, str]:
        """Return the object that owns the attribute, and its name; raise `ConfigError` when either is missing."""
        module, _, path = self.symbol.partition(":")
        *parents, name = path.split(".")
        owner: Any = importlib.import_module(module)
        for parent in parents:
            owner = getattr(owner, parent)
        if not hasattr(owner, name):
            raise ConfigError(f"megatron-core has no {self.symbol}; its CPU layer fits 0.16.1, install that version")
        return owner, name


def _generator_state(*_: object, **__: object) -> torch.Tensor:
    return torch.get_rng_state()


def _set_generator_state(new_state: torch.Tensor, *_: object, **__: object) -> None:
    torch.set_rng_state(new_state)


@contextlib.contextmanager
def _fork(tracker: Any, name: str = "model-parallel-rng") -> Iterator[None]:
    outside = torch.get_rng_state()
    torch.set_rng_state(tracker.states_[name])
    try:
        yield
    finally:
        tracker.states_[name] = torch.get_rng_state()
        torch.set_rng_state(outside)


def _split_sizes(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


def _clip_by_total_norm(parameters: Any, max_norm: float, total_norm: float, use_decoupled_grad: bool = False) -> None:
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    scale = max_norm / (total_norm + 1.0e-6)
    if scale < 1.0 and gradients:
        torch._foreach_mul_(gradients, scale)


PATCHES = (
    Patch(
        "megatron.core.tensor_parallel.random:_get_cuda_rng_state",
        "the CPU generator plays the CUDA one (seeding, activation recompute)",
        _generator_state,
    ),
    Patch("megatron.core.tensor_parallel.random:_set_cuda_rng_state", "as above", _set_generator_state),
    Patch(
        "megatron.core.tensor_parallel.random:CudaRNGStatesTracker.fork",
        "it warns that the CPU generator changed, which is the one in use here",
        _fork,
    ),
    Patch(
        "megatron.core.transformer.moe.token_dispatcher:maybe_move_tensor_to_cpu",
        "all-to-all split sizes become numpy only if the tensor is on CUDA; gloo refuses tensors as sizes",
        _split_sizes,
    ),
    Patch("megatron.core.transformer.moe.moe_utils:maybe_move_tensor_to_cpu", "as above", _split_sizes),
    Patch(
        "megatron.core.optimizer.clip_grads:clip_grad_by_total_norm_fp32",
        "it asserts the type name torch.cuda.FloatTensor",
        _clip_by_total_norm,
    ),
    Patch("megatron.core.optimizer.optimizer:clip_grad_by_total_norm_fp32", "as above", _clip_by_total_norm),
)


def import_megatron() -> None:
    """Import the parts of Megatron-core that R3 uses, ready for this machine; call it before any other import of them.

    Without CUDA this installs `PATCHES` and the stand-in for `torch`; with CUDA only the bug fixes. Idempotent.
    Raises `ConfigError` when the installed Megatron-core is not one that the CPU layer fits.
    """
    with warnings.catch_warnings():
        # Transformer Engine and Apex are optional; Megatron warns once per missing kernel.
        warnings.simplefilter("ignore")
        for module in MODULES:
            importlib.import_module(module)
    fix_gating_without_transformer_engine()
    if torch.cuda.is_available():
        return
    for patch in PATCHES:
        patch.apply()
    stand_in = torch_stand_in()
    for name, loaded in list(sys.modules.items()):
        if name.startswith("megatron.core") and getattr(loaded, "torch", None) is torch:
            loaded.torch = stand_in  # type: ignore[attr-defined]
    # Context parallelism and tied embeddings under pipelines call tensor.cuda() (rope_utils.py, language_module.py).
    torch.Tensor.cuda = _identity


def fix_gating_without_transformer_engine() -> None:
    """Bind the name that `RouterGatingLinearFunction` reads; 0.16.1 leaves it unbound without Transformer Engine.

    Every router call then raises NameError, on any device; fixed upstream in 0.19.
    """
    utils = importlib.import_module("megatron.core.transformer.moe.moe_utils")
    if not hasattr(utils, "te_general_gemm"):
        utils.te_general_gemm = None  # type: ignore[attr-defined]


@contextlib.contextmanager
def cuda_type_names() -> Iterator[None]:
    """Let CPU tensors name their type as `torch.cuda.*` while Megatron's optimizers sort parameters by that name.

    Mixed-precision and distributed optimizers check the name when they are built (optimizer.py, distrib_optimizer.py);
    use it round `get_megatron_optimizer` alone. With CUDA it does nothing.
    """
    if torch.cuda.is_available():
        yield
        return

    def type_name(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        found = torch._C.TensorBase.type(self, *args, **kwargs)
        return found.replace("torch.", "torch.cuda.") if isinstance(found, str) else found

    torch.Tensor.type = type_name  # type: ignore[method-assign]
    try:
        yield
    finally:
        del torch.Tensor.type


def torch_stand_in() -> types.ModuleType:
    """Return a module like `torch` whose factories answer `device="cuda"` with the CPU and whose `cuda` is inert."""
    nothing = functools.partial(_nothing)
    cuda = _overlay(
        torch.cuda,
        current_device=lambda: CPU,
        synchronize=nothing,
        empty_cache=nothing,
        Event=_Event,
        Stream=_Stream,
        stream=lambda _: contextlib.nullcontext(),
        current_stream=lambda *_: _STREAM,
        default_stream=lambda *_: _STREAM,
        get_rng_state=_generator_state,
        set_rng_state=_set_generator_state,
        manual_seed=torch.manual_seed,
        manual_seed_all=torch.manual_seed,
        memory_allocated=lambda *_: 0,
        max_memory_allocated=lambda *_: 0,
        is_current_stream_capturing=lambda: False,
    )
    factories = """
        arange as_tensor empty empty_like eye full full_like linspace
        ones ones_like rand randint randn tensor zeros zeros_like
    """
    return _overlay(torch, cuda=cuda, **{name: _on_cpu(getattr(torch, name)) for name in factories.split()})


def _overlay(base: types.ModuleType, **changes: Any) -> types.ModuleType:
    class Overlay(types.ModuleType):
        def __getattr__(self, name: str) -> Any:
            return getattr(base, name)

    module = Overlay(base.__name__)
    module.__dict__.update(changes)
    return module


def _on_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(factory)
    def create(*args: Any, **kwargs: Any) -> Any:
        device = kwargs.get("device")
        if isinstance(device, int) or str(device).startswith("cuda"):
            kwargs["device"] = CPU
        if "pin_memory" in kwargs:
            kwargs["pin_memory"] = False
        return factory(*args, **kwargs)

    return create


def _identity(tensor: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
    return tensor


def _nothing(*_: object, **__: object) -> None:
    return None


class _Event:
    """A CUDA event on a device that runs everything in order."""

    def __init__(self, *_: object, **__: object) -> None:
        self.record = self.wait = self.synchronize = _nothing


class _Stream:
    """A CUDA stream on a device that has only one."""

    def __init__(self, *_: object, **__: object) -> None:
        self.wait_stream = self.wait_event = self.synchronize = _nothing

    def record_event(self, event: _Event | None = None) -> _Event:
        return event or _Event()


_STREAM = _Stream()
