"""The picture of samples beside the training images that they are nearest to."""

import numpy as np
import pytest
import torch

from eclosion.evaluation.images import Seen
from eclosion.evaluation.pairs import HOW_TO_READ, MAX_COLUMNS, TILE, memorised_sheet
from eclosion.metrics.memorisation import Pair
from eclosion.rundir import LEGEND
from eclosion.sampling import save_png

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def flat(*colours, size=(8, 8), name="x"):
    pixels = torch.tensor(colours, dtype=torch.uint8)[:, :, None, None].expand(-1, -1, *size)
    return Seen(pixels, [name] * len(colours))


def pairs(count, too_near=False):
    return [Pair(i, 7 * i, 0.5 * i, 0.01 * i, too_near) for i in range(count)]


def places(sheet, colour):
    """Where a colour is: left, top, right, bottom, the last two exclusive."""
    y, x = np.nonzero((np.asarray(sheet) == colour).all(2))
    return int(x.min()), int(y.min()), int(x.max()) + 1, int(y.max()) + 1


@pytest.mark.parametrize("size", [(4, 4), (300, 300)])
def test_each_sample_is_left_of_its_training_image_at_the_same_height_and_size(size):
    sheet = memorised_sheet(pairs(2), flat(RED, GREEN, size=size), flat(BLUE, (0, 0, 9)))
    sample, near = places(sheet, RED), places(sheet, BLUE)
    assert sample[2] <= near[0]
    assert (sample[1], sample[3]) == (near[1], near[3])
    assert sample[2] - sample[0] == near[2] - near[0] == TILE - 2  # within the frame
    assert near[2] < places(sheet, GREEN)[0] < places(sheet, (0, 0, 9))[0]


def test_pictures_keep_their_shape():
    left, top, right, bottom = places(memorised_sheet(pairs(1), flat(RED, size=(8, 16)), flat(BLUE, size=(4, 8))), RED)
    assert (right - left, bottom - top) == (TILE - 2, TILE // 2 - 2)


def test_many_pairs_go_on_in_the_next_row():
    one, row, more = (
        memorised_sheet(pairs(n), flat(*[RED] * n), flat(*[BLUE] * n)) for n in (1, MAX_COLUMNS, MAX_COLUMNS + 1)
    )
    assert one.height == row.height < more.height
    assert row.width == more.width


def test_only_samples_that_are_too_near_are_marked():
    def reds(sheet):
        return int((np.asarray(sheet) == (0xC0, 0, 0)).all(2).sum())

    assert reds(memorised_sheet(pairs(1), flat(GREEN), flat(BLUE))) == 0
    assert reds(memorised_sheet(pairs(1, too_near=True), flat(GREEN), flat(BLUE))) > 0


def test_names_of_any_length_and_letters_stay_below_their_own_pair():
    name = "very/long/" * 40 + "\n\udce4\x1b[31m.png"
    sheet = memorised_sheet(pairs(2), flat(RED, GREEN, name=name), flat(BLUE, (0, 0, 9), name=name))
    plain = memorised_sheet(pairs(2), flat(RED, GREEN), flat(BLUE, (0, 0, 9)))
    assert sheet.size == plain.size
    between = np.asarray(sheet)[:, places(sheet, BLUE)[2] + 1 : places(sheet, GREEN)[0] - 1]
    assert (between[30:] == 255).all()
    assert (np.asarray(sheet) != np.asarray(plain)).any()


def test_the_file_says_how_it_is_to_be_read(tmp_path):
    from PIL import Image

    path = save_png(memorised_sheet(pairs(1), flat(RED), flat(BLUE)), tmp_path / "pairs.png")
    with Image.open(path) as image:
        assert image.info[LEGEND] == HOW_TO_READ
