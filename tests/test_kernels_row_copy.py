"""Rows of bytes go from anywhere to anywhere, and nothing else is touched."""

from __future__ import annotations

import pytest
import torch

from ch15_helpers.kernels.row_copy import copy_rows

# (row bytes, distance of rows, first byte): words of eight, four and one byte, whole and ragged.
SHAPES = [(36_888, 36_952, 0), (40_004, 40_012, 4), (50, 61, 3), (16, 16, 0)]


@pytest.mark.parametrize(("size", "stride", "first"), SHAPES)
@pytest.mark.parametrize("programs", [1, 2, 500])
def test_rows_are_copied_and_their_neighbours_are_not(
    size: int, stride: int, first: int, programs: int, device: str
) -> None:
    source = torch.randint(0, 256, (9, stride), dtype=torch.uint8, device=device)
    target = torch.randint(0, 256, (7, stride), dtype=torch.uint8, device=device)
    expected = target.clone()
    expected[[1, 6, 2], first : first + size] = source[[8, 0, 3], first : first + size]
    ids = torch.tensor([[8, 0, 3], [1, 6, 2]], dtype=torch.int32, device=device)
    part = slice(first, first + size)
    copy_rows(source[:, part], target[:, part], ids, programs)
    assert torch.equal(target, expected)


def test_no_rows(device: str) -> None:
    rows = torch.ones((2, 8), dtype=torch.uint8, device=device)
    copy_rows(rows * 2, rows, torch.empty((2, 0), dtype=torch.int32, device=device))
    assert (rows == 1).all()


def test_rows_that_do_not_fit_are_refused(device: str) -> None:
    ids = torch.zeros((2, 1), dtype=torch.int32, device=device)
    rows = torch.zeros((2, 8), dtype=torch.uint8, device=device)
    with pytest.raises(ValueError, match="8 and 4 bytes"):
        copy_rows(rows, rows[:, :4], ids)
    with pytest.raises(ValueError, match="uint8"):
        copy_rows(rows.view(torch.int32), rows, ids)
