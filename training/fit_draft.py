"""Fit the draft of the shipped network, a mixture of low-rank Gaussians, to the training images; half a minute.

    python training/fit_draft.py [--data FOLDER] [--model FOLDER] [--components 16] [--rank 12]

Writes ``draft.safetensors`` beside the weights, in half precision.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from fashion_data import FOLDER, load_images, to_unit
from run_files import write_whole
from safetensors.torch import save_file

from piadm.models import fit_draft, load_folder


def main() -> None:
    """Fit and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=FOLDER)
    parser.add_argument("--model", type=Path, default=Path("src/piadm/models/fashion"))
    parser.add_argument("--components", type=int, default=16)
    parser.add_argument("--rank", type=int, default=12)
    args = parser.parse_args()
    images = to_unit(load_images("train", args.data))
    fitted = fit_draft(load_folder(args.model), images, components=args.components, rank=args.rank)
    assert fitted.draft is not None
    parts = {name: part.half().contiguous() for name, part in fitted.draft.network.state_dict().items()}
    file = args.model / "draft.safetensors"
    write_whole(file, lambda path: save_file(parts, path))
    print(f"{file}: {file.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
