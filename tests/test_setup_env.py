"""The set-up: a build that was cut off is made again, and Detectron2's wheel is packed as what it is."""

import importlib.util
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def setup_env(monkeypatch):
    spec = importlib.util.spec_from_file_location("setup_env", ROOT / "tools" / "setup_env.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.delenv("DETECTRON2", raising=False)
    return module


@pytest.fixture
def built(setup_env, monkeypatch, tmp_path):
    """Runs main() with the expensive steps replaced; returns the calls it made."""
    calls = []

    def build(**environment):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(sys, "argv", ["setup_env.py", "--venv", str(tmp_path / "venv")])
        monkeypatch.setattr(setup_env.subprocess, "run", lambda command, **_: Path(command[-1]).mkdir())
        monkeypatch.setattr(setup_env, "install", lambda python, choice: calls.append(choice))
        setup_env.main()
        return calls

    return build


def test_built_once_and_reused(built, tmp_path):
    assert built() == [""] and built() == [""]
    assert (tmp_path / "venv" / "complete").exists()


def test_half_built_is_noticed(built, tmp_path):
    built()
    (tmp_path / "venv" / "complete").unlink()
    (tmp_path / "venv" / "debris").touch()
    assert built() == ["", ""]
    assert not (tmp_path / "venv" / "debris").exists()


def test_changed_pins_are_noticed(built, setup_env, monkeypatch):
    built()
    monkeypatch.setattr(setup_env, "fingerprint", lambda choice: "another")
    assert built() == ["", ""]


def test_own_choice_of_detectron2_is_kept_later(built):
    assert built(DETECTRON2="git+https://example.org/d2") == ["git+https://example.org/d2"]
    assert built(DETECTRON2="") == ["git+https://example.org/d2"]
    assert built(DETECTRON2="other") == ["git+https://example.org/d2", "other"]


def test_detectron2_alone(setup_env, monkeypatch):
    calls = []
    monkeypatch.setattr(sys, "argv", ["setup_env.py", "--detectron2"])
    monkeypatch.setattr(setup_env, "pip", lambda python, *arguments: calls.append(arguments[-1]))
    monkeypatch.setattr(setup_env, "install_detectron2", lambda python, choice: calls.append((python, choice)))
    setup_env.main()
    assert calls == ["wheel", (Path(sys.executable), "")]


def test_the_wheel_is_packed_as_what_it_is(setup_env, tmp_path):
    tree = tmp_path / "source" / "sal_detectron2-0.7.2"
    info = tree / "sal_detectron2-0.7.2.dist-info"
    metadata = "Metadata-Version: 2.1\nName: sal-detectron2\nVersion: 0.7.2\nSummary: x\nRequires-Dist: numpy<2\n"
    metadata += 'Requires-Dist: black\nRequires-Dist: dataclasses; python_version < "3.7"\nRequires-Dist: tabulate\n'
    for path, text in {
        tree / "detectron2/__init__.py": '__version__ = "0.7.2"\n',
        tree / "detectron2/_C.cpython-310-x86_64-linux-gnu.so": "machine code",
        tree / "tools/train_net.py": "",
        info / "METADATA": metadata + "\ntext\n",
        info / "WHEEL": "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: false\nTag: cp310-cp310-linux_x86_64\n",
        info / "RECORD": "",
    }.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    subprocess.run([sys.executable, "-m", "wheel", "pack", tree, "--dest-dir", tree.parent], check=True)
    wheel = next(tree.parent.glob("*.whl"))
    (tmp_path / "work").mkdir()
    packed = setup_env.repack(Path(sys.executable), wheel, tmp_path / "work")
    assert packed.name == f"detectron2-{setup_env.VERSION}-py3-none-any.whl"
    with zipfile.ZipFile(packed) as archive:
        names = archive.namelist()
        info = f"detectron2-{setup_env.VERSION}.dist-info"
        metadata, init = archive.read(f"{info}/METADATA").decode(), archive.read("detectron2/__init__.py").decode()
    assert not [name for name in names if name.endswith(".so") or name.startswith("tools")]
    assert "Name: detectron2\n" in metadata and "a59f0563" in metadata and "sal-detectron2 0.7.2" in metadata
    assert "numpy" not in metadata and "black" not in metadata and "Requires-Dist: tabulate" in metadata
    assert init == f'__version__ = "{setup_env.VERSION}"\n'


def test_a_wheel_with_another_hash_is_refused(setup_env, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(setup_env, "pip", lambda python, *arguments: seen.extend(arguments))
    with pytest.raises(StopIteration):
        setup_env.fetch_wheel(Path(sys.executable), tmp_path)
    assert "--require-hashes" in seen
    assert (tmp_path / "requirement.txt").read_text() == f"{setup_env.SOURCE} --hash=sha256:{setup_env.SHA256}\n"


def test_what_is_installed_here():
    import detectron2

    assert not list(Path(detectron2.__file__).parent.glob("_C*")) or "+a59f0563" not in detectron2.__version__
