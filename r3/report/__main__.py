"""`python -m r3.report RUN [RUN ...]`: write the report of runs, also while they go on."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from r3.checkpoint import replace_text
from r3.errors import R3Error
from r3.report.figures import write_pngs
from r3.report.page import render
from r3.report.read import ENDED, read_groups

_WATCH_S = 15


def main(arguments: Sequence[str] | None = None, sleep: Callable[[float], None] = time.sleep) -> int:
    """Write the page and the PNGs and print their paths; return 0, or 2 for a path that is no run directory."""
    options = _parser().parse_args(arguments)
    try:
        _write(options, sleep)
    except R3Error as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    return 0


def _write(options: argparse.Namespace, sleep: Callable[[float], None]) -> None:
    page = options.out or (options.runs[0] / "report.html" if len(options.runs) == 1 else Path("report.html"))
    while True:
        groups = read_groups(options.runs)
        going = options.watch is not None and any(run.state not in ENDED for group in groups for run in group.runs)
        page.parent.mkdir(parents=True, exist_ok=True)
        replace_text(page, render(groups, refresh_s=options.watch if going else None))
        print(page, flush=True)
        if not going:
            break
        sleep(options.watch)
    for path in write_pngs(groups, options.png or page.with_name(f"{page.stem}_png")):
        print(path, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="r3.report",
        description="Write one HTML file (no network, no script) and PNGs that show what runs measured. Runs that "
        "differ in their seed alone are drawn as a band, others beside each other.",
        epilog="exit codes: 0 written, 2 usage or no run directory",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run directory, finished or going on")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="page (default RUN/report.html; ./report.html for several runs)"
    )
    parser.add_argument("--png", type=Path, metavar="DIR", help="folder of the PNGs (default <page>_png)")
    parser.add_argument(
        "--watch", nargs="?", type=int, const=_WATCH_S, metavar="SECONDS",
        help=f"write it again every SECONDS (default {_WATCH_S}) until the runs end; the page reloads itself",
    )  # fmt: skip
    return parser


if __name__ == "__main__":
    sys.exit(main())
