"""Is this the r3 of this project? Other distributions install packages of the same names, and checkouts lose links."""

from __future__ import annotations

from pathlib import Path

from r3.errors import ConfigError

_MARKER = "__r3__ = True"
_REINSTALL = "pip install --force-reinstall --no-deps rollout-router-replay"


def require_own_packages() -> None:
    """Raise `ConfigError` that names the file found unless `r3`, `r3.rollout` and `r3.trainer` are ours.

    pip lets one distribution overwrite another's file without a word, and deletes it with that distribution. A checkout
    without symbolic links holds small text files in place of `r3/rollout` and `r3/trainer`.
    """
    home = Path(__file__).parent
    for link in ("rollout", "trainer", "configs"):
        if (home / link).is_file():
            raise ConfigError(
                f"{home / link} is a file where a symbolic link to ../{link} belongs: this checkout lost its links. "
                "Repair it (git config core.symlinks true && git checkout -- r3), or install the package"
            )
    for name, folder in (("r3", home), ("r3.rollout", home / "rollout"), ("r3.trainer", home / "trainer")):
        _require_own(name, folder)


def _require_own(name: str, folder: Path) -> None:
    init = folder / "__init__.py"
    if not init.is_file():
        raise ConfigError(f"{name} has no {init}; the installation is damaged: {_REINSTALL}")
    if _MARKER not in init.read_text(errors="replace"):
        raise ConfigError(
            f"{init} belongs to a foreign package of the name {name!r}, which another distribution put over this one. "
            f"Uninstall that, then {_REINSTALL}"
        )
