"""The text of benchmarks that are given none: the Python language reference, which comes with Python.

    python -m benchmarks.texts FOLDER

writes FOLDER/train.jsonl and FOLDER/held_out.jsonl.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from pydoc_data.topics import topics

from castlm.cli.demo_run import write_split


def write_texts(folder: Path) -> tuple[Path, Path]:
    """Writes the texts for training and for evaluation as .jsonl, one topic per document."""
    return write_split(folder, ((name, json.dumps({"text": topics[name]})) for name in sorted(topics)))


if __name__ == "__main__":
    write_texts(Path(sys.argv[1]))
