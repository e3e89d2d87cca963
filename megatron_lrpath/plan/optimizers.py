"""Optimizers that are not Megatron's own: the package that provides them."""

from __future__ import annotations

from importlib import metadata

PACKAGE, EXTRA = "emerging-optimizers", "optimizers"
OLDEST = (0, 2)  # Megatron 0.19 takes no older one
OF_MEGATRON = frozenset({"adam", "sgd"})


def missing_package(optimizer: str) -> str | None:
    """Return the missing package of an optimizer and how to install it; None if a suitable version is
    installed.
    """
    if optimizer in OF_MEGATRON or is_installed():
        return None
    return (
        f"--optimizer {optimizer} needs the package {PACKAGE}: pip install 'megatron-lrpath[{EXTRA}]' (in a checkout: "
        f"pip install -e '.[{EXTRA}]')."
    )


def is_installed() -> bool:
    """Return whether the package is installed, in a version that Megatron supports."""
    try:
        return tuple(int(part) for part in metadata.version(PACKAGE).split(".")[:2]) >= OLDEST
    except (metadata.PackageNotFoundError, ValueError):
        return False
