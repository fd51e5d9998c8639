"""Packed folders that were made once, and never again, have the logits that they had; nothing of torch is imported."""

import ctypes
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from castlm_runtime import library, packed
from castlm_runtime.formats import PACKABLE
from castlm_runtime.generate import Session
from castlm_runtime.machine import processors
from castlm_runtime.model import Model

FROZEN = sorted(path for path in (Path(__file__).parent / "frozen").iterdir() if path.is_dir())
ABSENT = ("torch", "transformers", "castlm", "datasets", "scipy", "huggingface_hub")

pytestmark = pytest.mark.skipif(library.kernels() is None, reason=library.NOT_BUILT)


def test_there_is_a_folder_of_each_format():
    assert {path.name.partition("-")[0] for path in FROZEN} == set(PACKABLE)


@pytest.mark.parametrize("folder", FROZEN, ids=lambda path: path.name)
def test_a_frozen_folder_has_its_logits(folder):
    """Integers within the rounding of activations to int8."""
    ids = json.loads((folder / "ids.json").read_text())
    exact = load_file(folder / "logits.safetensors")["logits"]
    found = Model.open(folder).logits(ids)
    # the head is int8 or int6 in all of them, and rounds its input
    worst = np.linalg.norm(found - exact) / np.linalg.norm(exact)
    assert worst < 3e-2, worst
    assert Session.open(folder).generate(ids, max_new_tokens=5, ignores_end=True).new_tokens == 5


def test_threads_beyond_the_processors_would_wait_for_each_other():
    most = len(processors())
    assert [Model.open(FROZEN[0], threads).threads for threads in (1, most + 3)] == [1, most]


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_the_c_code_of_the_page_decodes_masks_and_codes(tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "reference" / "packed-format.md").read_text(encoding="utf-8")
    code = re.search(r"```c\n(.*?)```", page, re.S)
    assert code is not None
    features = {name: int(bit) for name, bit in re.findall(r"CASTLM_(\w+) = (\d+)", code[1])}
    assert features == {feature.name: feature.value for feature in packed.Feature}
    (tmp_path / "page.c").write_text(code[1].replace("static inline ", ""))
    subprocess.run(["cc", "-shared", "-fPIC", str(tmp_path / "page.c"), "-o", str(tmp_path / "page.so")], check=True)
    read = ctypes.CDLL(str(tmp_path / "page.so"))
    read.castlm_code.argtypes = [ctypes.c_char_p, ctypes.c_int64, ctypes.c_int]
    draw = np.random.default_rng(0)
    for bits in (3, 4, 6):
        codes = draw.integers(0, 1 << bits, (1, 50), np.uint8)
        row = packed.join_codes(codes, bits).tobytes()
        sign = 1 << bits - 1
        expected = [(int(code) ^ sign) - sign for code in codes[0]]
        assert [read.castlm_code(row, number, bits) for number in range(50)] == expected
    for n, m in ((2, 4), (1, 4), (3, 4), (4, 8), (1, 2)):
        mask_of, _ = packed._mask_tables(n, m)
        bits = packed.mask_bits(n, m) * m // 8
        for code in range(1 << bits):
            whole = sum(code << group * bits for group in range(8 // m))
            of_group = max(read.castlm_group_mask(code, n, m), 0)
            assert mask_of[whole] == sum(of_group << group * m for group in range(8 // m))


def test_generating_imports_nothing_of_torch():
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({ABSENT}))  # importing one of them fails\n"
        "from castlm_runtime.__main__ import main\n"
        f"sys.exit(main(['generate', {str(FROZEN[0])!r}, '--prompt', 'Story', '--max-new-tokens', '4']))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "new tokens" in run.stderr
