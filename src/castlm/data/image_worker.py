"""Decodes an image, in the process of `castlm.data.images`. It imports nothing but Pillow."""

import base64
import io
import warnings
from typing import Any

from PIL import Image, ImageOps

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
"""Formats that hold pixels; JPEG includes MPO. Pillow hands EPS, which is a program, to Ghostscript."""

warnings.filterwarnings("ignore", module="PIL")  # of damaged EXIF data
Image.MAX_IMAGE_PIXELS = None  # `most_pixels` takes its place
Image.init()
_KNOWN = [name for name in FORMATS if name in Image.OPEN]  # some builds of Pillow lack AVIF


def decode(request: dict[str, Any], content: str) -> tuple[tuple[int, int], bytes]:
    """The size and the RGB bytes of an image, rotated by its EXIF orientation.

    Args:
        request: the `path` of a file, or None, and `most_pixels`.
        content: the bytes of an image without a path, in base64.
    """
    source = request["path"] or io.BytesIO(base64.b64decode(content))
    with Image.open(source, formats=_KNOWN) as image:
        pixels = image.width * image.height
        if pixels > request["most_pixels"]:  # before it is decoded
            raise ValueError(f"it has {pixels:,} pixels, more than {request['most_pixels']:,}: scale it down")
        upright = ImageOps.exif_transpose(image).convert("RGB")
        return upright.size, upright.tobytes()
