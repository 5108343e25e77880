"""What `lightning-tips quality` shows: tables, contact sheets, a CSV of all findings."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from lightning_tips.core import inputs_of, render_table
from lightning_tips.data.duplicates import Duplicate
from lightning_tips.data.label_errors import LabelError
from lightning_tips.data.reading import Reading, file_of

__all__ = ["Copies", "Suspects", "draw_duplicates", "draw_suspects", "duplicate_table", "suspect_table", "write_csv"]


@dataclass(frozen=True)
class Copies:
    """Duplicates of one data set in another, or within one.

    Attributes:
        first: Where the originals are.
        second: Whose samples were looked for in it.
        pairs: What was found.
    """

    first: Reading
    second: Reading
    pairs: list[Duplicate]

    @property
    def title(self) -> str:
        """For people."""
        return f"within {self.first.name}" if self.within else f"{self.second.name} in {self.first.name}"

    @property
    def within(self) -> bool:
        """Whether both are the same data set."""
        return self.first is self.second

    def places(self) -> set[int]:
        """Of the samples in ``second`` that have a copy."""
        found = {pair.second for pair in self.pairs}
        return found | {pair.first for pair in self.pairs} if self.within else found

    def contradicts(self, pair: Duplicate) -> bool:
        """Whether the two have different labels."""
        one, other = self.first.labels, self.second.labels
        return one is not None and other is not None and bool(one[pair.first] != other[pair.second])

    def summary(self) -> dict[str, Any]:
        """Numbers, for the table and the JSON file."""
        exact = {pair.second for pair in self.pairs if pair.exact}
        known = self.first.labels is not None and self.second.labels is not None
        return {
            "looked_for": self.second.name,
            "in": self.first.name,
            "samples": len(self.second),
            "with_a_copy": len(self.places()),
            "pairs": len(self.pairs),
            "identical_pairs": sum(pair.exact for pair in self.pairs),
            "near_pairs": sum(not pair.exact for pair in self.pairs),
            "samples_with_an_identical_copy": len(exact),
            "pairs_of_different_labels": sum(self.contradicts(pair) for pair in self.pairs) if known else None,
        }


@dataclass(frozen=True)
class Suspects:
    """Labels of one data set that are probably wrong.

    Attributes:
        reading: The data set.
        judge: What judged it.
        judged: How many of its samples were judged.
        found: The most suspicious first.
        seen: Places of those that have a copy in what the judge was trained on, so that they are not out of sample.
        accuracy: Share of the judged samples for which the judge says what the label says.
    """

    reading: Reading
    judge: str
    judged: int
    found: list[LabelError]
    seen: set[int]
    accuracy: float

    def summary(self, names: Sequence[str], most: int = 10) -> dict[str, Any]:
        """Numbers, for the table and the JSON file."""
        kinds = Counter((one.given, one.suggested) for one in self.found)
        return {
            "data": self.reading.name,
            "judge": self.judge,
            "samples": len(self.reading),
            "judged": self.judged,
            "agrees_with_the_labels": round(self.accuracy, 4),
            "suspicious": len(self.found),
            "judged_but_seen_in_training": len(self.seen),
            "commonest": [
                {"given": name_of(a, names), "suggested": name_of(b, names), "samples": n}
                for (a, b), n in kinds.most_common(most)
            ],
        }


def name_of(label: int, names: Sequence[str]) -> str:
    """Of a class."""
    return names[label] if label < len(names) else str(label)


def duplicate_table(found: Sequence[Copies]) -> str:
    """How many samples have a copy where none should be."""
    rows = []
    for one in found:
        said = one.summary()
        different = said["pairs_of_different_labels"]
        rows.append(
            [
                one.title,
                f"{said['samples']:,}",
                f"{said['with_a_copy']:,}",
                f"{100 * said['with_a_copy'] / said['samples']:.2f} %",
                f"{said['identical_pairs']:,}",
                f"{said['near_pairs']:,}",
                "" if different is None else f"{different:,}",
            ]
        )
    columns = ["duplicates", "samples", "with a copy", "share", "identical pairs", "near pairs", "of different labels"]
    return render_table(columns, rows)


def suspect_table(found: Sequence[Suspects], names: Sequence[str]) -> str:
    """How many labels are suspicious, and which are taken for which."""
    rows = []
    for one in found:
        kinds = one.summary(names, 3)["commonest"]
        often = ", ".join(f"{kind['given']} -> {kind['suggested']} {kind['samples']}" for kind in kinds)
        rows.append(
            [
                one.reading.name,
                one.judge,
                f"{one.judged:,}",
                f"{100 * one.accuracy:.1f} %",
                f"{len(one.found):,}",
                f"{100 * len(one.found) / max(one.judged, 1):.2f} %",
                often,
            ]
        )
    return render_table(["labels of", "judged by", "samples", "it agrees", "suspicious", "share", "most often"], rows)


def write_csv(path: Path, copies: Sequence[Copies], suspects: Sequence[Suspects], names: Sequence[str]) -> None:
    """All findings, one a row, the most suspicious of each kind first.

    Columns: ``finding`` (``identical``, ``near``, ``mirrored`` or ``label``), ``data``, ``place``, ``label`` and
    ``file`` of the sample; ``other_data``, ``other_place``, ``other_label`` and ``other_file`` of its copy; ``score``
    (similarity, or normalised margin); ``suggested``, ``label_confidence`` and ``suggested_confidence`` of a label;
    ``note``.
    """
    columns = [
        "finding", "data", "place", "label", "file", "other_data", "other_place", "other_label", "other_file",
        "score", "suggested", "label_confidence", "suggested_confidence", "note",
    ]  # fmt: skip

    def said(reading: Reading, place: int) -> str:
        return "" if reading.labels is None else name_of(int(reading.labels[place]), names)

    with path.open("w", newline="") as file:
        rows = csv.DictWriter(file, columns)
        rows.writeheader()
        for one in copies:
            for pair in one.pairs:
                rows.writerow(
                    {
                        "finding": "identical" if pair.exact else "mirrored" if pair.mirrored else "near",
                        "data": one.second.name,
                        "place": pair.second,
                        "label": said(one.second, pair.second),
                        "file": file_of(one.second.dataset, pair.second),
                        "other_data": one.first.name,
                        "other_place": pair.first,
                        "other_label": said(one.first, pair.first),
                        "other_file": file_of(one.first.dataset, pair.first),
                        "score": f"{pair.similarity:.5f}",
                        "note": "different labels" if one.contradicts(pair) else "",
                    }
                )
        for group in suspects:
            for error in group.found:
                rows.writerow(
                    {
                        "finding": "label",
                        "data": group.reading.name,
                        "place": error.place,
                        "label": name_of(error.given, names),
                        "file": file_of(group.reading.dataset, error.place),
                        "score": f"{error.score:.5f}",
                        "suggested": name_of(error.suggested, names),
                        "label_confidence": f"{error.given_confidence:.5f}",
                        "suggested_confidence": f"{error.suggested_confidence:.5f}",
                        "note": "a copy was trained on" if error.place in group.seen else "",
                    }
                )


# ---- pictures


def draw_duplicates(copies: Sequence[Copies], path: Path, names: Sequence[str], shown: int = 24) -> int:
    """A contact sheet of pairs, side by side: those of different labels first, then others from the whole ranking.

    Returns:
        How many pairs it shows; 0, and no file, if there is none to show.
    """
    pairs = [(one, pair) for one in copies if one.first.has_images for pair in one.pairs]
    different = [(one, pair) for one, pair in pairs if one.contradicts(pair)][: shown * 2 // 3]
    rest = sorted((p for p in pairs if p not in different), key=lambda p: (p[1].exact, -p[1].similarity))
    free = shown - len(different)
    if len(rest) > free:  # down to the last one, where they may stop being the same
        rest = [rest[round(k)] for k in np.linspace(0, len(rest) - 1, free)]
    tiles = []
    for one, pair in [*different, *rest]:
        left = _picture(one.first, pair.first)
        right = _picture(one.second, pair.second)
        kind = "identical" if pair.exact else f"{'mirrored, ' if pair.mirrored else ''}{pair.similarity:.4f}"
        lines = [f"{one.first.name} {pair.first}{_of(one.first, pair.first, names)}"]
        lines.append(f"{one.second.name} {pair.second}{_of(one.second, pair.second, names)}")
        tiles.append(([left, right], "\n".join([kind, *lines]), one.contradicts(pair)))
    return _sheet(tiles, path, 4, "Duplicates: similarity, places and labels; red: the labels differ")


def draw_suspects(suspects: Sequence[Suspects], path: Path, names: Sequence[str], shown: int = 40) -> int:
    """A contact sheet of the most suspicious labels.

    Returns:
        How many it shows; 0, and no file, if there is none to show.
    """
    with_images = [one for one in suspects if one.reading.has_images and one.found]
    tiles = []
    for group in with_images:
        for error in group.found[: shown // len(with_images)]:
            text = (
                f"{group.reading.name} {error.place}\n{name_of(error.given, names)} {error.given_confidence:.2f}\n->"
                f" {name_of(error.suggested, names)} {error.suggested_confidence:.2f}"
            )
            tiles.append(([_picture(group.reading, error.place)], text, error.place in group.seen))
    return _sheet(tiles, path, 8, "Suspicious labels: given -> suggested, probabilities; red: a copy was trained on")


def _of(reading: Reading, place: int, names: Sequence[str]) -> str:
    return "" if reading.labels is None else f": {name_of(int(reading.labels[place]), names)}"


def _picture(reading: Reading, place: int) -> NDArray[np.float32]:
    """(H, W, 3) in [0, 1]; where the numbers lie outside, they are stretched."""
    inputs: Any = inputs_of(reading.dataset[place], reading.input_key)
    image = np.asarray(inputs)
    if hasattr(inputs, "getbands"):
        image = image.reshape(*image.shape[:2], -1).transpose(2, 0, 1)
    scaled = image.astype(np.float32) / (255.0 if image.dtype == np.uint8 else 1.0)
    low, high = float(scaled.min()), float(scaled.max())
    if low < 0 or high > 1:
        scaled = (scaled - low) / max(high - low, 1e-12)
    shown = scaled if len(scaled) == 3 else scaled[:1]
    return np.broadcast_to(shown.transpose(1, 2, 0), (*shown.shape[1:], 3))


def _sheet(tiles: list[tuple[list[NDArray[np.float32]], str, bool]], path: Path, columns: int, title: str) -> int:
    if not tiles:
        return 0
    columns = min(columns, len(tiles))
    rows = -(-len(tiles) // columns)
    wide = len(tiles[0][0])
    figure = Figure(figsize=(max(columns * (0.9 * wide + 0.5), 6), 1.75 * rows + 0.4), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize="medium")
    axes = np.atleast_1d(figure.subplots(rows, columns)).flatten()
    for axis in axes:
        axis.set_axis_off()
    for axis, (pictures, text, marked) in zip(axes, tiles, strict=False):
        axis.imshow(_beside(pictures), interpolation="nearest")
        axis.set_title(text, fontsize=6.5, color="tab:red" if marked else "black")
    figure.savefig(path, dpi=130)
    return len(tiles)


def _beside(pictures: list[NDArray[np.float32]]) -> NDArray[np.float32]:
    """Side by side, on white."""
    height = max(len(one) for one in pictures)
    gap = max(1, height // 16)
    width = sum(one.shape[1] for one in pictures) + gap * (len(pictures) - 1)
    canvas = np.ones((height, width, 3), np.float32)
    left = 0
    for one in pictures:
        canvas[: len(one), left : left + one.shape[1]] = one
        left += one.shape[1] + gap
    return canvas
