"""How files are read that others wrote: castlm-runtime reads them the same way."""

from castlm_runtime.reading import (
    check_regular,
    check_regular_entries,
    open_regular,
    parse_json,
    read_bytes,
    read_json,
    read_json_object,
    read_record,
    read_text,
    sha256_file,
    user_path,
)

__all__ = [
    "check_regular",
    "check_regular_entries",
    "open_regular",
    "parse_json",
    "read_bytes",
    "read_json",
    "read_json_object",
    "read_record",
    "read_text",
    "sha256_file",
    "user_path",
]
