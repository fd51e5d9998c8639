"""The wheels of castlm-runtime where they shall run: in an environment without torch or a compiler, and on 64-bit ARM.

They are built here, or taken from the folder that CASTLM_WHEELS names, as before a release. CASTLM_ARM_PYTHON is the
command of a Python of 64-bit ARM, emulated, that has the libraries which castlm-runtime needs; `.ci/run` makes one.
"""

import contextlib
import importlib.util
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import sysconfig
import time
import urllib.request
import zipfile
from pathlib import Path

import numpy as np
import pytest

from castlm.cli.main import main
from castlm.export import packed
from castlm_runtime.families import FAMILIES
from castlm_runtime.model import Model
from tests.tiny import save_tiny

pytestmark = pytest.mark.slow  # each compiles all kernels

ROOT = Path(__file__).resolve().parents[1]
FROZEN = ROOT / "runtime" / "tests" / "frozen"
FOLDER = FROZEN / "int4-2of4"
ARM_COMPILER, ARM_EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
TURNS = ["Hi.", "Who?", "Why?", "And?", "So?", "Bye."]


def wheel(target: str, folder: Path) -> Path:
    """The wheel for a processor."""
    built = os.environ.get("CASTLM_WHEELS")
    if not built:
        script = ROOT / "runtime" / "wheels.py"
        subprocess.run([sys.executable, script, "--output-dir", folder, "--targets", target], check=True)
    found = list(Path(built or folder).glob(f"castlm_runtime-*{target}.whl"))
    assert len(found) == 1, found
    return found[0]


@pytest.fixture
def alone(tmp_path) -> Path:
    """The Python of an environment that has the wheel with the extra `serve`, and what it depends on."""
    built = wheel(platform.machine(), tmp_path / "dist")
    assert built.stat().st_size < 6e6
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "alone")], check=True)
    python = tmp_path / "alone" / "bin" / "python"
    own = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [python, "-m", "pip", "install", "-q", f"{built}[serve]"]
    install = subprocess.run(command, capture_output=True, text=True, env=own)
    if "Temporary failure in name resolution" in install.stderr or "Network is unreachable" in install.stderr:
        pytest.skip("pip reaches no index of packages")
    assert install.returncode == 0, install.stderr
    return python


@contextlib.contextmanager
def served(python: Path, folder: Path, *command: str):
    """The address of a server in an environment of its own: no PYTHONPATH, no compiler in PATH."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    whole = [python, *command, "serve", folder, "--port", str(port)]
    with subprocess.Popen(whole, env={"PATH": str(python.parent)}, cwd=folder) as server:
        try:
            until = time.monotonic() + 120
            while time.monotonic() < until and server.poll() is None:
                with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health"):
                    break
                time.sleep(0.1)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            server.terminate()


def test_a_wheel_serves_a_chat_without_torch_and_without_a_compiler(alone, tmp_path):
    import openai

    listed = subprocess.run([alone, "-I", "-m", "pip", "list"], capture_output=True, text=True, check=True).stdout
    names = {line.split()[0] for line in listed.splitlines()}
    assert "castlm-runtime" in names
    assert not {"torch", "transformers", "castlm"} & names
    model = shutil.copytree(FOLDER, tmp_path / "model")
    template = "{% for message in messages %}{{ message.role[0] }}:{{ message.content }}\n{% endfor %}"
    (model / "chat_template.jinja").write_text(template)
    with served(alone, model, "-m", "castlm_runtime") as address:
        client = openai.OpenAI(base_url=address, api_key="none", max_retries=0)
        messages, lengths = [], []
        for turn in TURNS:
            messages.append({"role": "user", "content": turn})
            reply = client.chat.completions.create(
                model="model", messages=messages, max_tokens=4, temperature=0, extra_body={"ignore_eos": True}
            )
            assert reply.usage.completion_tokens == 4
            lengths.append(reply.usage.prompt_tokens)
            messages.append({"role": "assistant", "content": reply.choices[0].message.content})
    assert lengths == sorted(set(lengths))  # each turn reads all turns before


def test_the_wheels_of_the_image_have_all_that_its_commands_read(tmp_path):
    """Those that the Dockerfile installs, beside the libraries of this environment."""
    for name in ("pyproject.toml", "README.md", "LICENSE"):  # what the Dockerfile copies
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "src", tmp_path / "src", ignore=shutil.ignore_patterns("*.so", "*.egg-info", "__pycache__"))
    own = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    make = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--wheel-dir", tmp_path, tmp_path]
    subprocess.run(make, check=True, env=own)
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "image"], check=True)
    python, libraries = tmp_path / "image" / "bin" / "python", sysconfig.get_path("purelib")
    inside = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    place = subprocess.run(inside, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()
    Path(place, "libraries.pth").write_text(libraries)
    wheels = [wheel(platform.machine(), tmp_path / "dist"), *tmp_path.glob("castlm-*.whl")]
    install = [python, "-m", "pip", "install", "-q", "--no-deps", "--force-reinstall", *wheels]
    subprocess.run(install, check=True, env=own)
    command = str(python.with_name("castlm"))
    with served(python, FOLDER, command) as address, urllib.request.urlopen(f"{address}/models") as models:
        assert FOLDER.name in models.read().decode()
    code = "from castlm.cli.demo_run import write_texts; write_texts(__import__('pathlib').Path('text'))"
    for arguments in ([command, "demo", "--help"], ["-c", code]):
        subprocess.run([python, *arguments], check=True, env={"PATH": str(python.parent)}, cwd=tmp_path)
    assert (tmp_path / "text" / "held_out.jsonl").stat().st_size


@pytest.fixture(scope="module")
def arm_package(tmp_path_factory) -> Path:
    """The folder that holds the package of the wheel for 64-bit ARM."""
    if not (os.environ.get("CASTLM_WHEELS") or importlib.util.find_spec("ziglang")):
        pytest.skip("needs ziglang (PyPI)")
    folder = tmp_path_factory.mktemp("arm")
    with zipfile.ZipFile(wheel("aarch64", folder / "dist")) as files:
        files.extractall(folder)
    return folder


@pytest.mark.skipif(
    not (shutil.which(ARM_COMPILER) and shutil.which(ARM_EMULATOR)),
    reason=f"needs {ARM_COMPILER}, {ARM_EMULATOR} (Debian: g++-aarch64-linux-gnu, qemu-user)",
)
def test_the_library_of_the_arm_wheel_agrees_with_its_plain_path_under_emulation(arm_package, tmp_path):
    library = arm_package / "castlm_runtime" / "_kernels.so"
    program, driver = tmp_path / "levels", ROOT / "tests" / "kernel_levels.cpp"
    subprocess.run([ARM_COMPILER, "-std=c++17", "-O1", str(driver), str(library), "-o", str(program)], check=True)
    system = ["-L", "/usr/aarch64-linux-gnu", "-E", f"LD_LIBRARY_PATH={library.parent}"]
    for processor in ("max", "cortex-a72"):  # with and without products of four bytes
        run = subprocess.run([ARM_EMULATOR, "-cpu", processor, *system, program], stdout=subprocess.PIPE, text=True)
        assert (run.returncode, run.stdout.split()) == (0, ["plain", "neon"]), run.stdout


@pytest.mark.skipif(not os.environ.get("CASTLM_ARM_PYTHON"), reason="CASTLM_ARM_PYTHON names no Python of 64-bit ARM")
def test_every_family_and_format_has_the_logits_of_this_processor_on_arm(arm_package, tmp_path, monkeypatch):
    monkeypatch.setattr(packed, "check_loads", lambda folder: None)
    ids = np.random.default_rng(0).integers(0, 256, 100).tolist()
    for family in FAMILIES:
        plain, rounded = tmp_path / family, tmp_path / f"{family}-int4"
        save_tiny(plain, family, hidden_size=64, intermediate_size=64)
        command = ["quantize", str(plain), "--packed", "--head", "source", "--kind", "int4"]
        assert main([*command, "--output-dir", str(rounded)]) == 0
        for folder in (plain, rounded):
            (folder / "ids.json").write_text(json.dumps(ids))
    for folder in FROZEN.iterdir():
        shutil.copytree(folder, tmp_path / folder.name)
    code = """
import json, sys
from pathlib import Path
import numpy as np
from castlm_runtime.model import Model
for folder in map(Path, sys.argv[1:]):
    np.save(folder / "arm.npy", Model.open(folder).logits(json.loads((folder / "ids.json").read_text())))
"""
    folders = sorted(tmp_path.iterdir())
    run = [*os.environ["CASTLM_ARM_PYTHON"].split(), "-c", code, *map(str, folders)]
    subprocess.run(run, check=True, env={**os.environ, "PYTHONPATH": str(arm_package)})
    for folder in folders:
        exact = Model.open(folder).logits(json.loads((folder / "ids.json").read_text()))
        errors = np.linalg.norm(np.load(folder / "arm.npy") - exact, axis=1) / np.linalg.norm(exact, axis=1)
        # An activation that the last bit moves to the next of its 255 values changes a token's logits, of int4 too.
        assert np.median(errors) < 1e-4, folder
        assert errors.max() < 3e-2, folder
