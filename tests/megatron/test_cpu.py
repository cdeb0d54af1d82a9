"""The CPU layer fits the installed Megatron-core, and stays away where CUDA is."""

from __future__ import annotations

import pytest
import torch

from r3.errors import ConfigError
from r3.trainer import cpu

pytestmark = pytest.mark.megatron


@pytest.mark.parametrize("patch", cpu.PATCHES, ids=lambda patch: patch.symbol)
def test_every_patched_symbol_exists_and_has_a_reason(patch: cpu.Patch) -> None:
    owner, name = patch.locate()
    assert callable(getattr(owner, name))
    assert patch.reason


def test_a_vanished_symbol_is_an_error_that_names_it() -> None:
    with pytest.raises(ConfigError, match="clip_grads:no_such_thing"):
        cpu.Patch("megatron.core.optimizer.clip_grads:no_such_thing", "test", None).apply()


def test_stand_in_creates_on_the_cpu_and_leaves_torch_alone() -> None:
    stand_in = cpu.torch_stand_in()
    assert stand_in.zeros(2, device="cuda").device.type == "cpu"
    assert stand_in.empty(2, device=stand_in.cuda.current_device(), pin_memory=True).device.type == "cpu"
    assert stand_in.nn is torch.nn
    assert torch.zeros is not stand_in.zeros


def test_with_cuda_only_the_bug_fix_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu.import_megatron()
    from megatron.core.transformer.moe import moe_utils

    monkeypatch.delattr(moe_utils, "te_general_gemm")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(cpu, "PATCHES", (cpu.Patch("megatron.core.optimizer:would_raise", "test", None),))
    cpu.import_megatron()
    assert moe_utils.te_general_gemm is None


def test_cuda_type_names_are_undone() -> None:
    with cpu.cuda_type_names():
        assert torch.zeros(1).type() == "torch.cuda.FloatTensor"
    assert torch.zeros(1).type() == "torch.FloatTensor"


def test_clipping_scales_to_the_limit_and_leaves_smaller_gradients() -> None:
    parameter = torch.nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([3.0, 4.0])
    cpu._clip_by_total_norm([parameter], 10.0, 5.0)
    assert parameter.grad.tolist() == [3.0, 4.0]
    cpu._clip_by_total_norm([parameter], 1.0, 5.0)
    torch.testing.assert_close(parameter.grad.norm(), torch.tensor(1.0))
