"""What has to move so that weights fit, against every way there is."""

from __future__ import annotations

import random
from itertools import product

import pytest

from engines.residency import SLOTS, Arrangement, Blocks, arrangements, least_bytes, reside
from flux2_trt.spec import Component

WEIGHTS: dict[Component, int] = {
    "text_encoder": 300,
    "conditioning": 20,
    "transformer": 510,  # 10 of which are in no block
    "vae_decoder": 5,
}
BLOCKS = Blocks(num_double=3, double_bytes=60, num_single=10, single_bytes=32)
STAYS, ALTERNATES = Arrangement(False, False, False), Arrangement(True, False, False)
STREAMS = Arrangement(False, False, True)


def fewest_bytes(blocks: Blocks, room: int) -> int | None:
    """Of all choices of streamed blocks that fit, with slots for the larger of them."""
    fitting = []
    for doubles, singles in product(range(blocks.num_double + 1), range(blocks.num_single + 1)):
        slot = blocks.double_bytes if doubles else blocks.single_bytes if singles else 0
        left = doubles * blocks.double_bytes + singles * blocks.single_bytes
        if blocks.bytes - left + SLOTS * slot <= room:
            fitting.append(left)
    return min(fitting, default=None)


def test_blocks_are_streamed_as_little_as_it_takes() -> None:
    rng = random.Random(0)
    for _ in range(300):
        single = rng.randint(1, 50)
        blocks = Blocks(rng.randint(0, 4), rng.randint(single, 2 * single), rng.randint(3, 12), single)
        for room in range(blocks.least_bytes, blocks.bytes + 2):
            streamed = blocks.streamed(room)
            fewest = fewest_bytes(blocks, room)
            assert fewest is not None
            assert fewest <= streamed.bytes < fewest + blocks.double_bytes
            assert streamed.device_bytes <= room
            assert 0 <= streamed.doubles <= blocks.num_double
            assert 0 <= streamed.singles <= blocks.num_single
            left = streamed.doubles * blocks.double_bytes + streamed.singles * single
            assert streamed.bytes == left
        assert fewest_bytes(blocks, blocks.least_bytes - 1) is None


@pytest.mark.parametrize("arrangement", [*arrangements(can_stream=True)])
def test_an_arrangement_fits_from_its_least_bytes_on(arrangement: Arrangement) -> None:
    least = least_bytes(arrangement, WEIGHTS, BLOCKS)
    assert reside(arrangement, WEIGHTS, BLOCKS, least - 1) is None
    found = reside(arrangement, WEIGHTS, BLOCKS, least)
    assert found is not None
    assert found.peak_bytes <= least
    assert sum(placement.weight_bytes for placement in found.placements.values()) == sum(WEIGHTS.values())


def test_everything_stays_where_it_fits() -> None:
    found = reside(STAYS, WEIGHTS, BLOCKS, 835)
    assert found is not None
    assert {placement.kind for placement in found.placements.values()} == {"resident"}
    assert (found.peak_bytes, found.pinned_bytes) == (835, 0)
    assert reside(STREAMS, WEIGHTS, BLOCKS, 835) is None  # nothing is left to stream


def test_text_encoder_and_transformer_take_turns() -> None:
    found = reside(ALTERNATES, WEIGHTS, BLOCKS, 535)
    assert found is not None
    kinds = {name: placement.kind for name, placement in found.placements.items()}
    assert kinds == {
        "text_encoder": "swapped",
        "conditioning": "resident",
        "transformer": "swapped",
        "vae_decoder": "resident",
    }
    assert (found.peak_bytes, found.pinned_bytes) == (20 + 5 + 510, 300 + 510)


def test_blocks_that_find_no_room_are_streamed_around_what_stays() -> None:
    found = reside(STREAMS, WEIGHTS, BLOCKS, 800)
    assert found is not None
    streamed = found.placements["transformer"].streamed
    assert streamed is not None
    # 835 would hold all; two slots of 32 and 35 bytes too many take four blocks of 32.
    assert (streamed.doubles, streamed.singles, streamed.bytes) == (0, 4, 128)
    assert found.peak_bytes == 835 - 128 + 64
    assert found.pinned_bytes == 128


def test_in_turns_the_kept_blocks_come_back_for_every_batch() -> None:
    found = reside(Arrangement(True, False, True), WEIGHTS, BLOCKS, 400)
    assert found is not None
    placement = found.placements["transformer"]
    assert placement.kind == "streamed"
    assert placement.streamed is not None
    assert placement.moved_bytes == 510 - placement.streamed.bytes
    assert found.pinned_bytes == 300 + 510


def test_plans_that_are_whole_are_not_streamed() -> None:
    assert not any(arrangement.streams for arrangement in arrangements(can_stream=False))
