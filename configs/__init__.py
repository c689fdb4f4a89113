"""Configurations: data of the package, so that an installation finds them by name."""

from pathlib import Path

__all__ = ["find_config"]


def find_config(name: str) -> str:
    """The path of a config file; ``[configs/]cls/digits_r8.yaml`` of this package is found from any folder."""
    packaged = Path(__file__).parent / name.removeprefix("configs/")
    return str(packaged) if not Path(name).exists() and packaged.is_file() else name
