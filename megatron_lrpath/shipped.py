"""The example plans, Slurm recipes and settings that travel with the package: where they are, a copy of them."""

from __future__ import annotations

from pathlib import Path

FOLDERS = ("examples", "slurm")
ENDINGS = (".yaml", ".py", ".sh", ".example")


def shipped_folder(name: str) -> Path:
    """The folder `examples` or `slurm`: inside an installed package, beside the package in a checkout."""
    package = Path(__file__).resolve().parent
    return next(folder for folder in (package / name, package.parent / name) if folder.is_dir())


def shipped_files() -> dict[Path, Path]:
    """Every shipped file by its place in a copy, such as `examples/paper/1.2b.yaml`."""
    found: dict[Path, Path] = {}
    for name in FOLDERS:
        folder = shipped_folder(name)
        files = (path for path in sorted(folder.rglob("*")) if path.suffix in ENDINGS and path.is_file())
        found |= {Path(name) / path.relative_to(folder): path for path in files}
    return found
