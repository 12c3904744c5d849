"""The package as others get it: a wheel, installed in an environment that knows nothing of the repository."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
USE = """
import json
import sys
from importlib.metadata import version
from pathlib import Path

import torch
import tempme_vl
from tempme_vl.data.videoqa import read_questions
from tempme_vl.evaluation.metrics import retrieval_metrics
from tempme_vl.evaluation.videoqa import accuracy
from tempme_vl.integrations import compress
from tempme_vl.integrations.tiny import tiny_host

frontend = tempme_vl.create_frontend(
    "open_clip:tiny", num_frames=4, r=1, merge_layers=(2, 3), merge_frames=(2, 2), cross_percent=30, intra_percent=10
)
side = frontend.shape.image_size
tokens = frontend(torch.randn(1, 4, 3, side, side)).tokens

options = {"r": 1, "merge_layers": (2, 3), "merge_frames": (2, 2), "cross_percent": 30, "intra_percent": 10}
compressed = compress(*tiny_host("VideoLlava", ["what moves"]), "tempme", 4, **options)
frames = torch.zeros(4, 40, 40, 3, dtype=torch.uint8).numpy()
inputs = compressed.prepare("USER: <video> what moves ASSISTANT:", [frames])

qa = read_questions("questions.json")
print(json.dumps({
    "file": tempme_vl.__file__,
    "version": [tempme_vl.__version__, version("tempme_vl")],
    "tokens": [tokens.shape[1], frontend.schedule.output_tokens],
    "host": list(compressed.model(**inputs).logits.shape[:1]),
    "r1": retrieval_metrics(torch.eye(3))["r1"],
    "accuracy": accuracy({"0": "red", "1": "two"}, qa)["accuracy"],
}))
"""
MYPY = """
[mypy]
ignore_missing_imports = True
# libraries are not what is looked at
[mypy-torch.*,torchvision.*,numpy.*,transformers.*,timm.*,open_clip.*,einops.*,PIL.*,safetensors.*,huggingface_hub.*]
follow_imports = skip
"""
TYPED = """
import tempme_vl

frontend = tempme_vl.create_frontend("open_clip:tiny", num_frames="four")
reveal_type(frontend.schedule.output_tokens)
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter with the wheel, in a folder that has nothing else; libraries are those of this environment."""
    folder = tmp_path_factory.mktemp("wheel")
    source, wheels, home = folder / "source", folder / "wheels", folder / "home"
    source.mkdir()
    home.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "tempme_vl", source / "tempme_vl", ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "--quiet"]
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(wheels), str(source)], check=True)
    (wheel,) = wheels.glob("*.whl")
    files = {path.relative_to(source).as_posix() for path in (source / "tempme_vl").rglob("*") if path.is_file()}
    assert "tempme_vl/search/web/templates/page.html" in files and files <= set(zipfile.ZipFile(wheel).namelist())
    shutil.rmtree(source)

    venv.create(folder / "venv", symlinks=True)
    python = folder / "venv" / "bin" / "python"
    subprocess.run([*pip, "--python", str(python), "install", "--no-deps", str(wheel)], check=True)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    site = folder / "venv" / "lib" / version / "site-packages"
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def run(python: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    home = python.parents[2] / "home"
    return subprocess.run([str(python), *arguments], cwd=home, env=env, capture_output=True, text=True)


@pytest.mark.slow
def test_an_installed_wheel_works_outside_the_repository(installed: Path) -> None:
    home = installed.parents[2] / "home"
    questions = [
        {"video_id": 7, "id": i, "question": question, "answer": answer}
        for i, (question, answer) in enumerate([("what colour is it", "red"), ("how many are there", "three")])
    ]
    (home / "questions.json").write_text(json.dumps(questions))
    done = run(installed, "-c", USE)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert Path(said["file"]).is_relative_to(installed.parents[1])
    assert len(set(said["version"])) == 1
    assert said["tokens"][0] == said["tokens"][1] < 4 * 16
    assert said["host"] == [1]
    assert (said["r1"], said["accuracy"]) == (100.0, 50.0)


@pytest.mark.slow
def test_the_command_trains_and_counts_outside_the_repository(installed: Path) -> None:
    command, folder = installed.with_name("tempme-vl"), installed.parents[2] / "empty"
    folder.mkdir()
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(*arguments: str) -> str:
        done = subprocess.run([str(command), *arguments], cwd=folder, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    assert "train retrieval" in run("--help") and "--deepspeed-config PATH" in run("train", "videoqa", "--help")
    run("efficiency", "--json", "costs.json")
    rows = json.loads((folder / "costs.json").read_text())["rows"]
    assert 97 in [row["tokens"] for row in rows if (row["backbone"], row["method"]) == ("B/32", "tempme")]
    said = run("train", "retrieval", "--max-steps", "2", "--output", "run", "--deepspeed-config", "zero2")
    assert "stopped after 2 of" in said
    steps = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in steps if "loss" in line] == [1, 2]
    assert json.loads((folder / "run" / "options.json").read_text())["deepspeed_config"] == "zero2"


@pytest.mark.slow
def test_types_are_seen_from_outside(installed: Path) -> None:
    home = installed.parents[2] / "home"
    (home / "mypy.ini").write_text(MYPY)
    (home / "typed.py").write_text(TYPED)
    mypy = [sys.executable, "-m", "mypy", "--python-executable", str(installed), "typed.py"]
    done = subprocess.run(mypy, cwd=home, capture_output=True, text=True)
    assert 'Argument "num_frames" to "create_frontend" has incompatible type "str"' in done.stdout, done.stdout
    assert 'Revealed type is "int"' in done.stdout.replace("builtins.", ""), done.stdout
