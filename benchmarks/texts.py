"""The text of benchmarks that are given none: the Python language reference, which comes with Python.

    python -m benchmarks.texts FOLDER

writes FOLDER/train.jsonl and FOLDER/held_out.jsonl.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from pydoc_data.topics import topics

HELD_OUT = 8  # one topic in 8


def write_texts(folder: Path) -> tuple[Path, Path]:
    """Writes the texts for training and for evaluation as .jsonl, one topic per document.

    The hash of a topic's name decides whether it is held out.
    """
    folder.mkdir(parents=True, exist_ok=True)
    train_file, eval_file = folder / "train.jsonl", folder / "held_out.jsonl"
    with train_file.open("w", encoding="utf-8") as train_out, eval_file.open("w", encoding="utf-8") as eval_out:
        for name in sorted(topics):
            held_out = hashlib.sha256(name.encode()).digest()[0] % HELD_OUT == 0
            (eval_out if held_out else train_out).write(json.dumps({"text": topics[name]}) + "\n")
    return train_file, eval_file


if __name__ == "__main__":
    write_texts(Path(sys.argv[1]))
