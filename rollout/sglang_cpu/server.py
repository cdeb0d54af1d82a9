"""`sglang.launch_server` on the CPU platform: `python -m r3.rollout.sglang_cpu.server --model-path DIR [OPTION ...]`.

Options are SGLang's own, after those of `DEFAULTS`, and win over them. A server for R3 needs
`--enable-return-routed-experts`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

# What the platform needs, and what the bridge asks of any server.
DEFAULTS = (
    "--device=cpu",
    "--attention-backend=torch_native",
    "--sampling-backend=pytorch",
    "--moe-runner-backend=triton",  # not read on this platform, but 'auto' is what the handshake refuses
    "--mem-fraction-static=0.1",
    "--max-total-tokens=32768",
    "--chunked-prefill-size=8192",
    "--disable-cuda-graph",
    "--disable-overlap-schedule",
    "--sleep-on-idle",
    "--skip-tokenizer-init",
    "--weight-version=0",
)


def main(arguments: Sequence[str]) -> None:
    """Serve until interrupted."""
    # First: it installs the stand-ins, as its process functions do in SGLang's children.
    from r3.rollout.sglang_cpu import engine, standins  # isort: skip

    standins.install(standins.SERVER_PACKAGES)
    from sglang.srt.entrypoints.http_server import launch_server
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import prepare_server_args
    from sglang.srt.utils import kill_process_tree

    load_plugins()
    server_args = prepare_server_args([*DEFAULTS, *arguments])
    server_args.resolve_once()
    try:
        launch_server(
            server_args,
            run_scheduler_process_func=engine.run_scheduler_process,
            run_detokenizer_process_func=engine.run_detokenizer_process,
        )
    finally:
        kill_process_tree(os.getpid(), include_parent=False)


if __name__ == "__main__":
    main(sys.argv[1:])
