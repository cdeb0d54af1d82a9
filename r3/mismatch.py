"""How far are this engine and this trainer apart? `python -m r3.mismatch --config FILE [key.path=value ...]`.

Generates answers with the engine, recomputes their log-probs with the trainer, natively and under replay, and prints
the consistency table with bootstrap intervals. Nothing is trained. It tells in minutes whether a stack needs replay.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from r3._identity import require_own_packages
from r3.checkpoint import replace_text
from r3.config import Config, load_config
from r3.consistency import Estimate, Row, draw, factor, markdown
from r3.errors import ConfigError, R3Error

if TYPE_CHECKING:
    from r3.study import Earlier, Keep, Study

ROWS = ("native", "r3", "r3_response", "r3_last_half")
DTYPES = ("bfloat16", "float32", "float16")
_FACTORS = (
    ("k3", "native", "r3", "native k3 / R3 k3"),
    ("abs_mean", "native", "r3", "native mean abs / R3 mean abs"),
    ("extreme_1p5", "native", "r3", "tokens beyond ratio 1.5, native / R3"),
    ("k3", "native", "dense", "native k3 / dense k3"),
    ("k3", "r3", "dense", "R3 k3 / dense k3"),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    options = _parser().parse_intermixed_args(arguments)
    logging.basicConfig(level=logging.ERROR)
    try:
        require_own_packages()
        config = study_config(options)
        dense = None if options.dense is None else dense_config(config, options.dense)
        for one in filter(None, (config, dense)):
            _check(one)
        report = _report(options, config, dense)
    except R3Error as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    if options.json:
        print(json.dumps(report, indent=1))
    return 0


def study_config(options: argparse.Namespace) -> Config:
    """Load the configuration under the options; raise `ConfigError` for what the study cannot do."""
    overrides = list(options.overrides)
    overrides += [f"rollout.dtype={options.engine_dtype}"] if options.engine_dtype else []
    overrides += [f"trainer.dtype={options.trainer_dtype}"] if options.trainer_dtype else []
    config = load_config(options.config, overrides)
    if not config.routing.capture and (options.controls or options.noise or options.dense):
        raise ConfigError("routing.capture is false: the table has one row, without --controls, --noise and --dense")
    if unknown := set(options.rows) - set(ROWS):
        raise ConfigError(f"--rows {','.join(sorted(unknown))}: there are {', '.join(ROWS)}")
    if options.tokens < 1 or options.control_tokens < 1:
        raise ConfigError(f"--tokens {options.tokens} --control-tokens {options.control_tokens}: both must be positive")
    if options.out is not None and not options.out.absolute().parent.is_dir():
        raise ConfigError(f"--out {options.out}: {options.out.absolute().parent} is no directory")
    return config


def dense_config(config: Config, model: str) -> Config:
    """Return the configuration of the dense twin: the same run without routing."""
    parts = {
        "model": config.model.model_copy(update={"path": model}),
        "routing": config.routing.model_copy(update={"capture": False}),
        "replay": config.replay.model_copy(update={"mode": "none"}),
        "metrics": config.metrics.model_copy(update={"counterfactual_r2": False}),
    }
    return config.model_copy(update=parts)


def _check(config: Config) -> None:
    from r3.preflight import check, check_installed

    check(config, trains=False)
    if not os.environ.get("RAY_ADDRESS"):
        check_installed(config)


def _report(options: argparse.Namespace, config: Config, dense: Config | None) -> dict[str, Any]:
    """Measure and print the table; return what `--out` holds."""
    earlier = read_earlier(options.add, config)
    say(f"engine {config.rollout.dtype}, trainer {config.trainer.dtype}, model {config.model.path}")
    studies: dict[str, Study] = {}

    def keep(name: str, study: Study) -> None:
        studies[name] = study
        if options.out is not None:
            # Behind every round: a command that is killed has lost one round, and `--add` goes on from there.
            report = _contents(config, dense, studies, earlier, list(_rows(studies)), dict(_factors(studies)))
            replace_text(options.out, json.dumps(report, indent=1) + "\n")

    _study(config, options, earlier, partial(keep, "moe"), controls=True)
    if dense is not None:
        say(f"dense twin {dense.model.path}")
        _study(dense, options, earlier, partial(keep, "dense"), controls=False)
    rows, ratios = list(_rows(studies)), dict(_factors(studies))
    if not options.json:
        print(*markdown(rows), "", *_summary(rows, ratios), sep="\n", flush=True)
    return _contents(config, dense, studies, earlier, rows, ratios)


def _contents(
    config: Config,
    dense: Config | None,
    studies: dict[str, Study],
    earlier: dict[str, dict[str, Any]],
    rows: Sequence[Row],
    ratios: dict[str, Estimate | None],
) -> dict[str, Any]:
    """Return what `--out` holds; a model that has no round yet stands there as it was in `--add`."""
    paths = {"moe": config.model.path, **({} if dense is None else {"dense": dense.model.path})}
    kept = {name: earlier[path] for name, path in paths.items() if path in earlier}
    kept |= {name: {"model": paths[name], **_kept(study)} for name, study in studies.items()}
    return {
        "setting": _setting(config),
        "rows": [asdict(row) for row in rows],
        "factors": {name: _finite(found) for name, found in ratios.items()},
        "studies": kept,
    }


def _setting(config: Config) -> dict[str, Any]:
    """Return what two commands must share for their rounds to be added up."""
    return {
        "engine_dtype": config.rollout.dtype,
        "trainer_dtype": config.trainer.dtype,
        "seed": config.run.seed,
        "temperature": config.rollout.temperature,
        "prompts_per_step": config.rollout.prompts_per_step,
        "group_size": config.grpo.group_size,
    }


def _kept(study: Study) -> dict[str, Any]:
    """Return a study for JSON, with everything that `--add` needs."""
    sums = {
        key: {"clusters": [part.tolist() for part in one.sums], "passes": np.array(one.passes).tolist(),
              "alarms": sorted(one.alarms)}
        for key, one in study.found.items()
    }  # fmt: skip
    return {"rounds": study.rounds, **study.facts, "sums": sums}


def read_earlier(path: Path | None, config: Config) -> dict[str, dict[str, Any]]:
    """Return the studies of an earlier `--out` by model; raise `ConfigError` for one of another setting."""
    if path is None:
        return {}
    try:
        found = json.loads(path.read_text())
        setting, studies = found["setting"], {study["model"]: study for study in found["studies"].values()}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"--add {path} is not what --out of this command writes: {error!r}") from error
    other = [f"{key} is {setting.get(key)!r}, now {value!r}" for key, value in _setting(config).items()
             if setting.get(key) != value]  # fmt: skip
    if other:
        raise ConfigError(f"--add {path} was measured in another setting: {'; '.join(other)}")
    return studies


def earlier_of(study: dict[str, Any]) -> Earlier:
    """Return what `_kept` wrote, to go on from."""
    from r3.study import Collected, Earlier

    def arrays(parts: Sequence[Any]) -> list[Any]:
        return [np.array(part, np.float64) for part in parts]

    found = {
        key: Collected(arrays(one["clusters"]), arrays(one["passes"]), set(one["alarms"]))
        for key, one in study["sums"].items()
    }
    return Earlier(study["rounds"], found)


def _study(
    config: Config, options: argparse.Namespace, earlier: dict[str, dict[str, Any]], keep: Keep, *, controls: bool
) -> None:
    """Measure one model and hand over what there is behind every round, and at the end."""
    from r3.builtin import resolve_model
    from r3.study import NOTHING, actors, control_variants, measure, variants_of
    from r3.tasks import open_task

    before = earlier_of(earlier[config.model.path]) if config.model.path in earlier else NOTHING
    extra = control_variants(options.noise, records=options.controls) if controls else ()
    task = open_task(config.task)
    model = resolve_model(config.model.path, target_reward=config.model.warm_start_reward, seed=config.run.seed)
    say("starting engine and trainer")
    with actors(config, str(model)) as (pool, trainers):
        variants = variants_of(config, trainers.spec(), extra, options.rows)
        absent = [variant.key for variant in variants if before.rounds and variant.key not in before.found]
        if absent:
            raise ConfigError(f"--add {options.add} lacks the rows {absent}; ask for the same rows (--rows)")
        measure(
            config, task, pool, trainers, variants,
            tokens=options.tokens, control_tokens=options.control_tokens, seconds=options.max_seconds,
            earlier=before, keep=keep, say=say,
        )  # fmt: skip


def _rows(studies: dict[str, Study]) -> Iterator[Row]:
    """Yield the rows, the dense twin behind the replay variants and before the controls."""
    rows = list(studies["moe"].rows())
    controls = {variant.key for variant in studies["moe"].variants if variant.control}
    yield from (row for row in rows if row.key not in controls)
    if "dense" in studies:
        (row,) = studies["dense"].rows()
        yield Row("dense", "dense twin", row.tokens, row.sequences, row.values)
    yield from (row for row in rows if row.key in controls)


def _factors(studies: dict[str, Study]) -> Iterator[tuple[str, Estimate | None]]:
    drawn = {key: found for key, found in studies["moe"].drawn.items() if key in ("native", "r3")}
    if "dense" in studies:
        # Other answers, so another draw.
        drawn |= draw({"dense": studies["dense"].found["native"].all_sums()}, seed=1)
    for column, above, below, name in _FACTORS:
        if above in drawn and below in drawn:
            yield name, factor(drawn[above], drawn[below], column)


def _summary(rows: Sequence[Row], ratios: dict[str, Estimate | None]) -> Iterator[str]:
    first = rows[0]
    yield f"{first.tokens:,} response tokens of {first.sequences:,} answers; intervals: 95 % bootstrap over prompts"
    for name, found in ratios.items():
        if found is None:
            yield f"{name}: not defined, the divisor is 0"
        elif found.low is None or found.high is None:
            yield f"{name}: {found.value:.3g} (too few prompts for an interval)"
        else:
            yield f"{name}: {found.value:.3g} [{found.low:.3g}, {found.high:.3g}]"


def _finite(found: Estimate | None) -> dict[str, float | None] | None:
    """Return an estimate for JSON, which knows no infinity: an end that is unbounded is null."""
    if found is None:
        return None
    return {key: value if value is None or math.isfinite(value) else None for key, value in asdict(found).items()}


def say(text: str) -> None:
    """Show progress on stderr."""
    print(text, file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="r3.mismatch",
        usage="python -m r3.mismatch --config FILE [key.path=value ...] [--engine-dtype D] [--trainer-dtype D] ...",
        description="Measure how far engine and trainer of a config are apart, natively and under router replay, "
        "without training, and print the consistency table.",
        epilog="exit codes: 0 measured, 2 usage or config, 3 a record that cannot be used, 4 engine or cluster",
    )
    parser.add_argument("--config", type=Path, required=True, metavar="FILE", help="as for r3.train")
    parser.add_argument("--engine-dtype", choices=DTYPES, help="dtype of the engine (default: rollout.dtype)")
    parser.add_argument("--trainer-dtype", choices=DTYPES[:2], help="dtype of the trainer (default: trainer.dtype)")
    parser.add_argument("--tokens", type=int, default=20_000, metavar="N", help="response tokens (default 20000)")
    parser.add_argument(
        "--max-seconds", type=float, default=math.inf, metavar="S",
        help="stop sampling behind the round that passes this, and report what there is (of each model)",
    )  # fmt: skip
    parser.add_argument(
        "--dense", metavar="MODEL", help="dense Qwen3 directory, or builtin:tiny-qwen3: the floor without routers"
    )
    parser.add_argument(
        "--controls", action="store_true", help="add rows with wrong records and gates, and the alarms that they raise"
    )
    parser.add_argument(
        "--noise", type=float, action="append", default=[], metavar="SIGMA",
        help="add rows with normal noise injected into the trainer's own choice of experts, in standard deviations of "
        "a row's router scores; may be repeated",
    )  # fmt: skip
    parser.add_argument(
        "--control-tokens", type=int, default=5_000, metavar="N",
        help="response tokens that the rows of --controls and --noise see (default 5000)",
    )  # fmt: skip
    parser.add_argument(
        "--rows", type=lambda text: tuple(text.split(",")), default=(), metavar="KEY,...",
        help=f"measure these rows only, of {', '.join(ROWS)} (default: all)",
    )  # fmt: skip
    parser.add_argument(
        "--add", type=Path, metavar="FILE", help="go on behind an earlier --out of the same setting and add it up"
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="write everything as JSON to FILE too, anew behind every round"
    )
    parser.add_argument("--json", action="store_true", help="print that JSON instead of the table")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="change single keys")
    return parser


if __name__ == "__main__":
    sys.exit(main())
