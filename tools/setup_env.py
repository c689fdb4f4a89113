#!/usr/bin/env python3
"""Build the project's environment: pinned dependencies, Detectron2, and the project itself, editable.

    python3 tools/setup_env.py                # .venv, made or remade only when it is not complete
    python3 tools/setup_env.py --current      # into the interpreter that runs this
    python3 tools/setup_env.py --detectron2   # only Detectron2, into the interpreter that runs this
    DETECTRON2='git+https://github.com/facebookresearch/detectron2' python3 tools/setup_env.py

Detectron2 has no release on the package index under its own name. By default the wheel of the
`sal-detectron2` project is fetched, its hash checked, and packed anew as what it is: upstream commit
a59f0563 in pure Python, without the compiled extension of another Python version. A Detectron2 that is
importable already is kept; the variable DETECTRON2 names any pip requirement to use instead.

Runs on the standard library, because nothing else is there yet.
"""

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCE = "sal-detectron2==0.7.2"
SHA256 = "491af0c7f79bdb2d178e46f6cb16a97c4ac968d45c41ea3f6b6435d59bbee561"
VERSION = "0.6+a59f0563.sal0.7.2"
SUMMARY = "Detectron2 at upstream commit a59f0563, pure Python, packed anew from the files of sal-detectron2 0.7.2"
# numpy 2 was tried and works; black only formats LazyConfig dumps.
DROPPED_REQUIREMENTS = ("numpy<2", "black", "dataclasses")


def pip(python: Path, *arguments: str) -> None:
    subprocess.run([str(python), "-m", "pip", "--disable-pip-version-check", *arguments], check=True, cwd=ROOT)


def fetch_wheel(python: Path, folder: Path) -> Path:
    """Download the source wheel; pip refuses it unless its SHA-256 is the pinned one."""
    requirement = folder / "requirement.txt"
    requirement.write_text(f"{SOURCE} --hash=sha256:{SHA256}\n")
    # The wheel is tagged for Python 3.10 because of its extension; the rest of it runs on any.
    tags = ["--python-version", "3.10", "--implementation", "cp", "--abi", "none", "--platform", "any"]
    only = ["--no-deps", "--only-binary=:all:", "--require-hashes"]
    pip(python, "download", "-q", *only, *tags, "-d", str(folder), "-r", str(requirement))
    return next(folder.glob("*.whl"))


def repack(python: Path, wheel: Path, folder: Path) -> Path:
    """Pack the source wheel anew as a pure-Python `detectron2` wheel in `folder` and return its path."""
    run = [str(python), "-m", "wheel"]
    subprocess.run([*run, "unpack", str(wheel), "--dest", str(folder)], check=True, stdout=subprocess.DEVNULL)
    tree = next(p for p in folder.iterdir() if p.is_dir())
    for extension in (tree / "detectron2").glob("_C*.so"):
        extension.unlink()
    shutil.rmtree(tree / "tools", ignore_errors=True)  # would lie in site-packages as a package "tools"
    info = next(tree.glob("*.dist-info")).rename(tree / f"detectron2-{VERSION}.dist-info")
    for field, text in {"Name": "detectron2", "Version": VERSION, "Summary": SUMMARY}.items():
        replace(info / "METADATA", rf"^{field}: .*$", f"{field}: {text}")
    for name in DROPPED_REQUIREMENTS:
        replace(info / "METADATA", rf"^Requires-Dist: {re.escape(name)}(;[^\n]*)?\n", "")
    replace(info / "WHEEL", r"^Root-Is-Purelib: .*$", "Root-Is-Purelib: true")
    replace(info / "WHEEL", r"^Tag: .*$", "Tag: py3-none-any")
    replace(tree / "detectron2" / "__init__.py", r'^__version__ = ".*"$', f'__version__ = "{VERSION}"')
    subprocess.run([*run, "pack", str(tree), "--dest-dir", str(folder)], check=True, stdout=subprocess.DEVNULL)
    return next(folder.glob("detectron2-*.whl"))


def replace(path: Path, pattern: str, text: str) -> None:
    content, count = re.subn(pattern, text, path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    if not count:
        raise SystemExit(f"{path.name} of {SOURCE} has no line {pattern!r}: the wheel is not the expected one")
    path.write_text(content, encoding="utf-8")


def install_detectron2(python: Path, choice: str) -> None:
    if choice:
        pinned = ["-c", "constraints.txt"] if (ROOT / "constraints.txt").is_file() else []  # only in a checkout
        pip(python, "install", *pinned, "--no-build-isolation", choice)
    elif subprocess.run([str(python), "-c", "import detectron2"], capture_output=True, cwd=os.sep).returncode:
        with tempfile.TemporaryDirectory() as folder:
            wheel = repack(python, fetch_wheel(python, Path(folder)), Path(folder))
            pip(python, "install", "-q", "--no-deps", str(wheel))


def install(python: Path, choice: str) -> None:
    pip(python, "install", "-q", "-c", "constraints.txt", "setuptools", "wheel")
    print("  torch, torchvision and the other packages of constraints.txt", flush=True)
    pip(python, "install", "-q", "-c", "constraints.txt", "--no-build-isolation", "-e", ".[dev]")
    print("  Detectron2", flush=True)
    install_detectron2(python, choice)


def fingerprint(choice: str) -> str:
    """What a complete environment was built from."""
    content = b"".join((ROOT / name).read_bytes() for name in ("constraints.txt", "setup.py"))
    return f"{hashlib.sha256(content).hexdigest()} {sys.version.split()[0]} {ROOT} {choice}".strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--current", action="store_true", help="install into the running interpreter")
    parser.add_argument("--detectron2", action="store_true", help="install only Detectron2, likewise")
    parser.add_argument("--wheel", metavar="DIR", help="only pack Detectron2's wheel, into this folder")
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv", help="where to build (default: .venv)")
    args = parser.parse_args()
    choice, python = os.environ.get("DETECTRON2", ""), Path(sys.executable)
    if args.wheel:
        with tempfile.TemporaryDirectory() as folder:
            shutil.copy(repack(python, fetch_wheel(python, Path(folder)), Path(folder)), args.wheel)
        return
    if args.current:
        install(python, choice)
        return
    if args.detectron2:
        pip(python, "install", "-q", "setuptools<81", "wheel")
        install_detectron2(python, choice)
        return
    # The stamp is written last, so a build that was cut off has none and is made again from nothing.
    venv = args.venv.absolute()
    stamp, wanted = venv / "complete", fingerprint(choice)
    built = stamp.read_text() if stamp.exists() else ""
    if built == wanted or (not choice and built.startswith(wanted + " ")):
        return
    print(f"Building {venv}: about 3 minutes and 6 GB", flush=True)
    shutil.rmtree(venv, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    install(venv / "bin" / "python", choice)
    stamp.write_text(wanted)


if __name__ == "__main__":
    try:
        main()
    except subprocess.CalledProcessError as error:
        raise SystemExit(f"set-up stopped: {' '.join(map(str, error.cmd))} failed; fix that and run it again") from None
