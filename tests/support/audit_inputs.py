"""What the tests of `kl-plugins audit` write into files."""

from __future__ import annotations

import json

PROMPTS = ["1+2=", "34-5=", "7+8=", "9-9="]


def lines(path, *rows):
    """Write JSON lines, of rows or of texts that are lines already; returns `path`."""
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path
