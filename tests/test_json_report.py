"""`--json` replaces nothing but a report, and is checked before the work."""

from __future__ import annotations

import json
import os

import pytest

from castlm.cli.main import main
from castlm.cli.options import check_json_path, write_json
from castlm.core.errors import InputError
from castlm.files.atomic_file import atomic_write_json


@pytest.mark.parametrize(
    "name", ["model/config.json", "model/tokenizer.json", "thesis.txt", "link.json", "folder", "no/x"]
)
def test_what_is_not_a_report_is_refused_and_kept(tmp_path, name):
    for file in ("model/config.json", "model/tokenizer.json", "thesis.txt"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text('{"of": "a model"}' if file.startswith("model") else "Chapter 1")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link.json").symlink_to(tmp_path / "model" / "config.json")
    with pytest.raises(InputError, match="--json"):
        check_json_path(str(tmp_path / name))
    assert main(["verify", str(tmp_path / "model"), "--json", str(tmp_path / name)]) == 2
    assert (tmp_path / "model" / "config.json").read_text() == '{"of": "a model"}'
    assert (tmp_path / "thesis.txt").read_text() == "Chapter 1"


def test_a_new_file_and_an_older_report_are_accepted(tmp_path):
    for name in (None, "-", str(tmp_path / "new.json")):
        check_json_path(name)
    write_json(str(tmp_path / "old.json"), {"ok": True})
    check_json_path(str(tmp_path / "old.json"))


@pytest.mark.parametrize("name", ["castlm-output.json", "progress.json", "text.jsonl.castlm.json", "one.jsonl"])
def test_records_and_texts_are_no_reports(tmp_path, name):
    (tmp_path / name).write_text("{}")
    with pytest.raises(InputError, match="not a report"):
        check_json_path(str(tmp_path / name))


def test_a_pipe_is_never_replaced_by_a_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    for name in ("pipe", "link"):
        with pytest.raises(InputError, match="not a report"):
            check_json_path(str(tmp_path / name))
        with pytest.raises(InputError, match="not a regular file"):
            atomic_write_json(tmp_path / name, {})
    assert (tmp_path / "link").is_symlink()


def test_the_file_behind_a_link_is_replaced(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "real.json")
    (tmp_path / "real.json").write_text("{}")
    atomic_write_json(tmp_path / "link", {"a": 1})
    assert (tmp_path / "link").is_symlink()
    assert json.loads((tmp_path / "real.json").read_text()) == {"a": 1}
