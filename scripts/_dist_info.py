"""Write this project's metadata beside the tree: `python scripts/_dist_info.py FOLDER`, then FOLDER on PYTHONPATH.

SGLang finds the CPU platform and the provenance plugin by entry points, which Python reads from installed metadata; a
source tree alone has none. Needs no installer and no network.
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def write(folder: Path) -> Path:
    """Write `NAME-VERSION.dist-info` into `folder` and return it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found = re.search(r'__version__ = "([^"]+)"', (ROOT / "r3" / "__init__.py").read_text())
    assert found is not None, "r3/__init__.py has no __version__"
    target = folder / f"{project['name'].replace('-', '_')}-{found[1]}.dist-info"
    target.mkdir(parents=True, exist_ok=True)
    lines = ["Metadata-Version: 2.1", f"Name: {project['name']}", f"Version: {found[1]}"]
    lines += [f"Requires-Dist: {need}" for need in project["dependencies"]]
    for extra, needs in project["optional-dependencies"].items():
        lines += [f"Provides-Extra: {extra}"]
        lines += [f'Requires-Dist: {need}; extra == "{extra}"' for need in needs]
    (target / "METADATA").write_text("\n".join(lines) + "\n")
    groups = [
        "\n".join([f"[{group}]", *(f"{name} = {value}" for name, value in points.items())])
        for group, points in project["entry-points"].items()
    ]
    (target / "entry_points.txt").write_text("\n\n".join(groups) + "\n")
    return target


if __name__ == "__main__":
    print(write(Path(sys.argv[1])))
