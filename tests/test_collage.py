"""References side by side, as the reference implementation shows them to its language model."""

from PIL import Image

from flux2_trt.collage import MAX_AREA, side_by_side


def test_small_pictures_are_joined_as_they_are_centred_on_white():
    joined = side_by_side([Image.new("RGB", (40, 20), "red"), Image.new("L", (10, 60), 0)])
    assert joined.size == (50, 60) and joined.mode == "RGB"
    assert joined.getpixel((0, 20)) == joined.getpixel((39, 39)) == (255, 0, 0)
    assert joined.getpixel((0, 19)) == joined.getpixel((39, 40)) == (255, 255, 255)
    assert joined.getpixel((40, 0)) == joined.getpixel((49, 59)) == (0, 0, 0)


def test_one_picture_is_itself_or_shrunk():
    picture = Image.linear_gradient("L").convert("RGB")
    assert side_by_side([picture]).tobytes() == picture.tobytes()
    shrunk = side_by_side([picture.resize((3000, 1000))])
    assert 0.99 * MAX_AREA < shrunk.width * shrunk.height <= MAX_AREA
    assert abs(shrunk.width / shrunk.height - 3) < 0.01


def test_many_and_odd_shapes_stay_within_the_area():
    for sizes in ([(8000, 1000)] * 10, [(64, 512), (4000, 500)], [(10_000, 1)]):
        joined = side_by_side([Image.new("RGB", size) for size in sizes])
        assert 0 < joined.width * joined.height <= MAX_AREA
