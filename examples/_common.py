"""What the example scripts share: real images to train on, and a table to print."""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np


def load_images(folder: Path | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Return images `[n, height, width]` scaled to [0, 1] and integer labels `[n]`.

    Without a folder, scikit-learn's digits (1,797 images of 8x8, part of that package); else the
    MNIST idx files in it, pairs `*images*idx3-ubyte[.gz]` and `*labels*idx1-ubyte[.gz]`, joined in
    order of their names.
    """
    if folder is None:
        from sklearn.datasets import load_digits

        digits = load_digits()
        return (digits.images / 16).astype(np.float32), digits.target.astype(np.int32)
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}")
    images, labels = (
        _read_all(folder, kind) for kind in ("images*idx3-ubyte", "labels*idx1-ubyte")
    )
    if len(images) != len(labels):
        raise ValueError(f"{len(images)} images but {len(labels)} labels in {folder}")
    return (images / 255).astype(np.float32), labels.astype(np.int32)


def load_split(folder: Path | None) -> tuple[np.ndarray, np.ndarray, int]:
    """Return images, labels, and how many are for training: the first 80%, in file order.

    Exits if there are none.
    """
    try:
        images, labels = load_images(folder)
    except (OSError, ValueError) as error:
        raise SystemExit(f"--data: {error}") from error
    num_train = int(0.8 * len(images))
    print(
        f"{num_train} train, {len(images) - num_train} test images "
        f"of {images.shape[1]}x{images.shape[2]} pixels"
    )
    return images, labels, num_train


def read_idx(path: Path) -> np.ndarray:
    """Read one file of MNIST's idx format, possibly compressed: a header of big-endian sizes, then
    bytes.
    """
    packed = path.read_bytes()
    content = gzip.decompress(packed) if path.suffix == ".gz" else packed
    if content[:3] != b"\0\0\x08" or len(content) < 4:
        raise ValueError(
            f"{path} is not an idx file of unsigned bytes: it begins with '{content[:4].hex(' ')}'"
        )
    header = 4 + 4 * content[3]
    shape = [int(size) for size in np.frombuffer(content[4:header], ">u4")]
    if len(content) != header + np.prod(shape):
        raise ValueError(
            f"{path} should hold {shape} bytes after its header, got {len(content) - header}"
        )
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def with_error(values: Any, digits: int = 2, sign: str = "") -> str:
    """Format mean and standard error over runs (`sign="+"`: with its sign); of one run the mean."""
    values = np.asarray(values)
    mean = f"{values.mean():{sign}.{digits}f}"
    if len(values) == 1:
        return mean
    return f"{mean} ± {values.std(ddof=1) / np.sqrt(len(values)):.{digits}f}"


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print rows of cells under a header: the first column flush left, the others flush right."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    line = lambda cells: "  ".join(
        cell.rjust(width) if i else cell.ljust(width)
        for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
    )
    print(
        f"\n{title}",
        line(header),
        "  ".join("-" * width for width in widths),
        *map(line, rows),
        sep="\n",
    )


def _read_all(folder: Path, kind: str) -> np.ndarray:
    # A file that lies there both packed and unpacked counts once.
    paths = {path.name.removesuffix(".gz"): path for path in sorted(folder.glob(f"*{kind}*"))}
    if not paths:
        raise FileNotFoundError(f"no file *{kind} or *{kind}.gz in {folder}")
    return np.concatenate([read_idx(path) for _, path in sorted(paths.items())])
