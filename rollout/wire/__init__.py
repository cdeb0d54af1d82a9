"""Payloads of engines, decoded into `RoutingTrace`: the one place where wide, unchecked routing exists.

One decoder per wire format; numpy only, no engine import, so that every malformed payload can be tested.
"""

from r3.rollout.wire.common import Decoded, Wire
from r3.rollout.wire.lightllm import decode_lightllm
from r3.rollout.wire.sglang import CAPTURE_IS_OFF, decode_sglang, read_rows
from r3.rollout.wire.vllm import decode_vllm

__all__ = ["CAPTURE_IS_OFF", "Decoded", "Wire", "decode_lightllm", "decode_sglang", "decode_vllm", "read_rows"]
