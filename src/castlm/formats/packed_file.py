"""The packed file format, which castlm writes and castlm-runtime reads."""

from castlm_runtime.packed import (
    METADATA_KEY,
    VERSION,
    PackedSpec,
    join_codes,
    mask_bits,
    read_specs,
    split_codes,
    to_metadata,
)

__all__ = [
    "METADATA_KEY",
    "VERSION",
    "PackedSpec",
    "join_codes",
    "mask_bits",
    "read_specs",
    "split_codes",
    "to_metadata",
]
