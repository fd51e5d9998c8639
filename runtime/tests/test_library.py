"""castlm_runtime by itself: what importing it brings along."""

import subprocess
import sys


def test_importing_the_runtime_imports_neither_torch_nor_transformers():
    code = "import sys, castlm_runtime.library; print(*{'torch', 'transformers'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == ""
