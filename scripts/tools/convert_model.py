"""Convert a GGUF file or a ``.bin`` checkpoint to a safetensors checkpoint: ``convert_model.py SOURCE OUT``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # run from a clone, without installation

from configs.errors import UserError  # noqa: E402
from models.checkpoints.convert import convert  # noqa: E402


def main(arguments: list[str] | None = None) -> int:
    """Convert one checkpoint; returns 0, or 2 for bad input."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", help="GGUF file, or folder with .bin weights")
    parser.add_argument("out", type=Path, help="new folder of the safetensors checkpoint")
    given = parser.parse_args(arguments)
    try:
        convert(given.source, given.out)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
