"""The label guard: does an operation keep what an image is of?"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_tips.augmentation import (
    Blur,
    Brightness,
    Crop,
    Erase,
    Rotate,
    Shift,
    VerticalFlip,
    augment_batch,
    guard_table,
    label_guard,
    safe_operation,
)

from harness import PlainData


@pytest.fixture(scope="module")
def digits() -> tuple[nn.Module, Tensor, Tensor]:
    """A network trained on digits at 16x16 with small shifts and turns; validation images and labels."""
    data = PlainData()
    images = F.interpolate(data.images, 16, mode="bilinear")
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(512, 10)),
    )
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for step in range(200):
        chosen = torch.arange(step * 64, step * 64 + 64) % 1000
        batch = augment_batch(images[chosen], [Shift(1), Rotate(25)], torch.arange(64) + step * 64)
        optimizer.zero_grad()
        F.cross_entropy(model(batch), data.labels[chosen]).backward()
        optimizer.step()
    return model.eval(), images[1000:], data.labels[1000:]


def test_guard_flags_what_changes_the_content(digits) -> None:
    rows = label_guard(*digits, [Rotate((180, 180)), Shift(1), Brightness(0.1)])
    flagged = {(row.operation.split("(")[0], row.label): row for row in rows if row.flagged()}
    assert {operation for operation, _ in flagged} == {"Rotate"}
    assert flagged["Rotate", 6].taken_for == 9
    assert flagged["Rotate", 9].taken_for == 6
    assert flagged["Rotate", 6].verdict == "becomes class 9"
    assert flagged["Rotate", 6].confidence < flagged["Rotate", 6].clean_confidence
    assert ("Rotate", 0) not in flagged
    table = guard_table(rows)
    assert "becomes 9" in table
    assert "Rotate(180)" in table
    assert "…" not in guard_table(rows, ["ankle boot"] * 10, all_rows=True)  # nothing is cut off
    assert "Shift" not in table
    assert guard_table([row for row in rows if "Shift" in row.operation]).startswith("None of 10")


def test_nothing_is_cut_off_in_the_table(digits, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    rows = label_guard(*digits, [Erase((0.02, 0.1)), Crop()])
    text = guard_table(rows, [f"the digit {n} as written" for n in range(10)], all_rows=True)
    assert "…" not in text
    for part in ("samples", "confidence", "verdict", "value 0)", "0.75 to 1.333)", "the digit 9 as written"):
        assert part in text, part


def test_guard_shrinks_a_range(digits) -> None:
    smaller = safe_operation(*digits, Rotate(180))
    assert isinstance(smaller, Rotate)
    assert 0 < smaller.degrees[1] < 180  # type: ignore[index]
    assert safe_operation(*digits, Shift(1)) == Shift(1)
    assert safe_operation(*digits, VerticalFlip()) is None
    crop = safe_operation(*digits, Crop((0.05, 0.3)))
    assert isinstance(crop, Crop)
    assert crop.area[0] > 0.4  # type: ignore[index]
    erase = safe_operation(*digits, Erase((0.6, 0.9)))
    assert erase is None or erase.area[1] < 0.9  # type: ignore[attr-defined]
    blur = safe_operation(*digits, Blur((4.0, 6.0)))
    assert blur is None or blur.sigma[1] < 6.0  # type: ignore[attr-defined]


def test_guard_leaves_the_model_as_it_is(digits) -> None:
    model, images, labels = digits
    expected = label_guard(model, images, labels, "light")
    state = {key: value.clone() for key, value in model.state_dict().items()}
    model.train()
    model[4].eval()
    try:
        assert label_guard(model, images, labels, "light") == expected
        assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
        assert model.training
        assert [part.training for part in model] == [n != 4 for n in range(len(model))]
    finally:
        model.eval()
    for targets in (F.one_hot(labels), labels.float(), labels[:5]):
        with pytest.raises(ValueError, match="class by class"):
            label_guard(model, images, targets, "light")
    with pytest.raises(ValueError, match="a column for each class"):
        label_guard(lambda x: x.mean((1, 2, 3)), images, labels, "light")
