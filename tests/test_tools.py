from __future__ import annotations

import json
import math

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from vretrver_hf.images import ImageRef
from vretrver_hf.protocol import get_preset
from vretrver_hf.tools import VisualTools


RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)
PAIR = [Image.new("RGB", (1000, 800), BLUE), None, Image.new("RGB", (640, 480), RED)]
QUERY = Image.new("RGB", (56, 56), WHITE)


def crop(image: Image.Image, box, preset="release", **options):
    return VisualTools(None, [image], preset, **options).crop_image(box, 1)


class TestSelect:
    def test_release(self):
        observation = VisualTools(QUERY, PAIR).select_images([3, 0])
        # 640 x 480 is 22.86 x 17.14 multiples of 28: 23 x 17
        assert observation.text == (
            "Here are the selected images for detailed analysis. (Image Size: 644x476, Numbered 1 to 2):"
        )
        assert observation.valid
        assert observation.refs == (ImageRef(3, 644, 476), ImageRef(0, 56, 56))
        assert [image.size for image in observation.images] == [(644, 476), (56, 56)]
        assert [image.getpixel((5, 5)) for image in observation.images] == [RED, WHITE]

    def test_foveated(self):
        observation = VisualTools(QUERY, PAIR, "foveated").select_images([1])
        assert observation.text == "Image 1:"
        # 1000 x 800 is 35.7 x 28.6 multiples: 36 x 29
        assert observation.refs == (ImageRef(1, 1008, 812),)

    def test_numbers_do_not_shift_past_a_text_only_candidate(self):
        observation = VisualTools(None, [None, PAIR[0], None, PAIR[2]]).select_images([4])
        assert observation.refs[0].index == 4 and observation.images[0].getpixel((0, 0)) == RED

    def test_release_takes_any_number_of_images(self):
        images = [Image.new("RGB", (56, 56))] * 50
        assert len(VisualTools(None, images).select_images(list(range(1, 51))).images) == 50

    def test_factor_32(self):
        # 640 x 480 is 20 x 15 multiples of 32
        assert VisualTools(None, PAIR, factor=32).select_images([3]).images[0].size == (640, 480)

    @pytest.mark.parametrize(
        ("preset", "inspect_pixels", "size"),
        [
            # area 800,000; the budget wins over the preset's: shrunk by sqrt(800000 / 19600) = 6.389 to 156.5 x 125.2
            ("release", 140 * 140, (140, 112)),
            ("foveated", 140 * 140, (140, 112)),
            # no budget of its own: 5120 x 784 pixels are enough for all of it
            ("release", None, (1008, 812)),
            # the preset's budget: shrunk by sqrt(800000 / 50176) = 3.993 to 250.4 x 200.4
            (get_preset("release", inspect_pixels=224 * 224), None, (224, 196)),
        ],
    )
    def test_inspect_pixels(self, preset, inspect_pixels, size):
        tools = VisualTools(None, PAIR, preset, inspect_pixels=inspect_pixels)
        assert tools.select_images([1]).images[0].size == size

    def test_a_large_image_is_held_to_5120_tokens(self):
        # shrunk by sqrt(25e6 / 4014080) = 2.4956 to 2003.5, which is 71.55 multiples
        assert VisualTools(None, [Image.new("RGB", (5000, 5000))]).select_images([1]).images[0].size == (1988, 1988)

    def test_a_tiny_image_gets_four_tokens(self):
        assert VisualTools(None, [Image.new("RGB", (1, 1))]).select_images([1]).images[0].size == (56, 56)

    @pytest.mark.parametrize(
        ("numbers", "text"),
        [
            ([], "target_images must be a list of image numbers, at least one. Images: 0-1, 3."),
            (3, "target_images must be a list of image numbers, at least one. Images: 0-1, 3."),  # no list
            (None, "target_images must be a list of image numbers, at least one. Images: 0-1, 3."),
            ("1", "target_images must be a list of image numbers, at least one. Images: 0-1, 3."),  # nor is a string
            ({"1": 1}, "target_images must be a list of image numbers, at least one. Images: 0-1, 3."),
            (["1"], "An image number must be an integer. Images: 0-1, 3."),
            ([1.0], "An image number must be an integer. Images: 0-1, 3."),
            ([True], "An image number must be an integer. Images: 0-1, 3."),  # Python would take it for 1
            ([None], "An image number must be an integer. Images: 0-1, 3."),
            ([[1]], "An image number must be an integer. Images: 0-1, 3."),
            ([4], "An image number is out of range. Images: 0-1, 3."),
            ([-1], "An image number is out of range. Images: 0-1, 3."),  # Python would take it for the last
            ([10**5000], "An image number is out of range. Images: 0-1, 3."),  # too long to be written out
            ([2], "Candidate 2 has no image. Images: 0-1, 3."),  # text only
            ([1, 2], "Candidate 2 has no image. Images: 0-1, 3."),  # one bad number spoils the call
            ([1, 3, 1], "target_images names an image twice; name each once."),
        ],
    )
    def test_misuse(self, numbers, text):
        observation = VisualTools(QUERY, PAIR).select_images(numbers)
        assert (observation.text, observation.images, observation.valid, observation.refs) == (text, [], False, ())

    def test_a_query_without_an_image(self):
        assert VisualTools(None, PAIR).select_images([0]).text == "The query has no image. Images: 1, 3."

    def test_no_images_at_all(self):
        assert VisualTools(None, [None, None]).select_images([1]).text == "Candidate 1 has no image. Images: none."
        assert VisualTools(None, []).select_images([1]).text == "An image number is out of range. Images: none."

    def test_too_many(self):
        tools = VisualTools(None, [QUERY] * 5, "foveated")
        assert tools.select_images([1, 2, 3, 4]).valid
        observation = tools.select_images([1, 2, 3, 4, 5])
        assert observation.text == "target_images names 5 images; 4 at most are allowed." and not observation.valid

    @pytest.mark.parametrize("size", [(1, 300), (603, 3), (0, 5), (5, 0), (0, 0)])
    def test_an_extreme_image_is_refused(self, size):
        observation = VisualTools(None, [Image.new("RGB", size)]).select_images([1])
        assert not observation.valid and not observation.images
        assert observation.text == (
            f"Image 1 is {size[0]}x{size[1]} pixels; the sides may differ by 200:1 at most. "
            "Choose another image or a wider region."
        )

    @pytest.mark.parametrize("size", [(8000, 40), (40, 8000), (200, 1)])
    def test_exactly_200_to_1_is_shown(self, size):
        (image,) = VisualTools(None, [Image.new("RGB", size)]).select_images([1]).images
        assert max(image.size) <= 200 * min(image.size)  # a processor would refuse more


class TestCrop:
    @pytest.mark.parametrize(
        ("size", "box", "region", "fitted"),
        [
            # padding 100 and 80 pixels; 400 x 360 is 14.29 x 12.86 multiples of 28
            ((1000, 800), [100, 100, 300, 300], (0, 20, 400, 380), (392, 364)),
            # the same in relative numbers, all at most 1
            ((1000, 800), [0.1, 0.125, 0.3, 0.375], (0, 20, 400, 380), (392, 364)),
            # padding 100 and 80, clamped at the lower right; 300 x 280 is 10.71 x 10
            ((1000, 800), [800, 600, 1000, 800], (700, 520, 1000, 800), (308, 280)),
            # all at most 1: the whole image, not its first pixel
            ((1000, 800), [0, 0, 1, 1], (0, 0, 1000, 800), (1008, 812)),
            # one number above 1: pixels; padding 100 and 80; 102 x 81 is 3.64 x 2.89
            ((1000, 800), [0, 0, 2, 1], (0, 0, 102, 81), (112, 84)),
            # 10 % of 8000 is 800, cut to 600; 10 % of 4000 is 400; 1300 x 900 is 46.4 x 32.1
            ((8000, 4000), [1000, 1000, 1100, 1100], (400, 600, 1700, 1500), (1288, 896)),
            # partly outside: clamped; 200 x 180
            ((1000, 800), [-500, -500, 100, 100], (0, 0, 200, 180), (196, 168)),
            ((1000, 800), [900, 700, 5000, 1e300], (800, 620, 1000, 800), (196, 168)),
            # fractions of pixels: 10.4 - 1 and 30.6 + 1, 5.5 - 0.8 and 7.5 + 0.8; 23 x 3 grows by sqrt(3136 / 69)
            ((10, 8), [2.4, 1.5, 3.6, 2.5], (1, 1, 5, 3), (84, 56)),
        ],
    )
    def test_release(self, size, box, region, fitted):
        image = Image.new("RGB", size)
        observation = crop(image, box)
        assert observation.valid
        assert observation.text == f"Here is the cropped image. (Image Size: {fitted[0]}x{fitted[1]})\n"
        assert observation.refs == (ImageRef(1, *fitted, box=region),)
        assert observation.images[0].size == fitted

    @pytest.mark.parametrize(
        ("coordinates", "box"),
        [("pixels", [100, 100, 300, 300]), ("relative", [0.1, 0.125, 0.3, 0.375]), ("thousand", [100, 125, 300, 375])],
    )
    def test_one_region_in_every_frame(self, coordinates, box):
        preset = get_preset("foveated", coordinates=coordinates)
        observation = crop(PAIR[0], box, preset)
        assert observation.refs[0].box == (0, 20, 400, 380)
        assert observation.text == "Image 1 [0.00, 0.03, 0.40, 0.47]:"  # 20 / 800 = 0.025, 380 / 800 = 0.475

    def test_small_numbers_are_thousandths_in_that_frame(self):
        preset = get_preset("release", coordinates="thousand", crop_padding=0)
        assert crop(Image.new("RGB", (2000, 4000)), [0, 0, 1, 1], preset).refs[0].box == (0, 0, 2, 4)

    @pytest.mark.parametrize(
        ("changes", "region"),
        [
            ({"crop_padding": 0}, (100, 100, 300, 300)),
            ({"crop_padding": 0.05}, (50, 60, 350, 340)),
            ({"crop_padding": 1, "crop_padding_pixels": 10}, (90, 90, 310, 310)),
            ({"crop_padding": 1}, (0, 0, 900, 800)),  # 600 pixels at most
        ],
    )
    def test_padding_is_the_presets(self, changes, region):
        assert crop(PAIR[0], [100, 100, 300, 300], get_preset("release", **changes)).refs[0].box == region

    def test_the_crop_shows_the_region(self):
        image = Image.new("RGB", (100, 100), BLUE)
        image.paste(RED, (50, 0, 100, 100))
        observation = crop(image, [0.6, 0.1, 0.9, 0.9])  # 60 - 10 to 90 + 10: exactly the red half
        assert observation.refs[0].box == (50, 0, 100, 100)
        assert observation.images[0].getcolors() == [(56 * 112, RED)]

    def test_a_reference_renders_what_the_model_saw(self):
        image = Image.effect_mandelbrot((300, 200), (-2, -1, 1, 1), 50).convert("RGB")
        observation = crop(image, [30, 40, 90, 99])
        assert observation.refs[0].render(image) == observation.images[0]

    def test_a_box_smaller_than_a_pixel_shows_a_pixel(self):
        preset = get_preset("release", crop_padding=0)
        for box, region in [
            ([0.5, 0.5, 0.501, 0.501], (5, 5, 6, 6)),
            ([0.999, 0.999, 1, 1], (9, 9, 10, 10)),
            ([0, 0, 5e-324, 5e-324], (0, 0, 1, 1)),
        ]:
            assert crop(Image.new("RGB", (10, 10)), box, preset).refs[0].box == region

    @pytest.mark.parametrize("box", [(0, 0, 50, 50), [0, 0.0, 50, 50.0]])
    def test_a_tuple_and_mixed_numbers_are_fine(self, box):
        assert crop(PAIR[0], box).valid

    @pytest.mark.parametrize(
        "box",
        [
            [],
            [1, 2, 3],
            [1, 2, 3, 4, 5],
            None,
            7,
            "[1, 2, 3, 4]",  # a list in a string is a string
            {"x1": 1, "y1": 2, "x2": 3, "y2": 4},
            [[1, 2], [3, 4]],
            ["1", "2", "3", "4"],
            [None, 0, 1, 1],
            [False, False, True, True],  # Python would take it for the whole image
            [0, 0, math.nan, 1],
            [0, 0, math.inf, 1],
            [-math.inf, 0, 1, 1],
            [0, 0, 10**400, 1],  # beyond the largest float
        ],
    )
    def test_what_is_no_box(self, box):
        observation = crop(PAIR[0], box)
        assert observation.text == "bbox_2d must be a list of four finite numbers, [x1, y1, x2, y2]."
        assert not observation.valid and observation.images == [] and observation.refs == ()

    @pytest.mark.parametrize(
        ("box", "reason"),
        [
            ([300, 100, 100, 300], "empty or reversed"),  # x reversed
            ([100, 300, 300, 100], "empty or reversed"),  # y reversed
            ([100, 100, 100, 300], "empty or reversed"),  # no width
            ([100, 100, 300, 100], "empty or reversed"),  # no height
            ([0, 0, 0, 0], "empty or reversed"),
            ([1000, 0, 1100, 100], "lies outside image 1, which is 1000x800 pixels"),  # begins where the image ends
            ([0, 800, 100, 900], "lies outside image 1, which is 1000x800 pixels"),
            ([-50, 10, 0, 90], "lies outside image 1, which is 1000x800 pixels"),  # ends where it begins
            ([10, -50, 90, -10], "lies outside image 1, which is 1000x800 pixels"),  # padding does not save it
            ([-0.5, -0.5, -0.1, -0.1], "lies outside image 1, which is 1000x800 pixels"),
        ],
    )
    def test_misuse_in_release(self, box, reason):
        observation = crop(PAIR[0], box)
        assert reason in observation.text and not observation.valid and observation.images == []

    @pytest.mark.parametrize(
        ("coordinates", "box", "reason"),
        [
            ("relative", [0, 0, 1.01, 1], "must lie in 0..1: shares"),  # a small overshoot is said and not hidden
            ("relative", [-0.01, 0, 1, 1], "must lie in 0..1: shares"),
            ("relative", [100, 100, 300, 300], "must lie in 0..1: shares"),  # pixels
            ("relative", [0.5, 0, 0.5, 1], "empty or reversed"),
            ("thousand", [0, 0, 1001, 1000], "must lie in 0..1000: shares"),
            ("thousand", [-1, 0, 1000, 1000], "must lie in 0..1000: shares"),
            ("thousand", [500, 0, 400, 1000], "empty or reversed"),
        ],
    )
    def test_misuse_in_other_frames(self, coordinates, box, reason):
        observation = crop(PAIR[0], box, get_preset("foveated", coordinates=coordinates))
        assert reason in observation.text and not observation.valid and observation.images == []

    @pytest.mark.parametrize(
        ("number", "text"),
        [
            (2, "Candidate 2 has no image. Images: 0-1, 3."),
            (9, "An image number is out of range. Images: 0-1, 3."),
            (-1, "An image number is out of range. Images: 0-1, 3."),
            ([1], "An image number must be an integer. Images: 0-1, 3."),
            ("1", "An image number must be an integer. Images: 0-1, 3."),
            (1.0, "An image number must be an integer. Images: 0-1, 3."),
            (True, "An image number must be an integer. Images: 0-1, 3."),
            (None, "An image number must be an integer. Images: 0-1, 3."),
        ],
    )
    def test_misuse_of_the_number(self, number, text):
        observation = VisualTools(QUERY, PAIR).crop_image([0, 0, 1, 1], number)
        assert observation.text == text and not observation.valid

    def test_a_region_beyond_200_to_1_is_refused_and_padding_may_save_it(self):
        image = Image.new("RGB", (500, 500))
        box = [100, 0, 101, 500]
        observation = crop(image, box, get_preset("release", crop_padding=0))
        assert observation.text.startswith("The region is 1x500 pixels; the sides may differ by 200:1 at most.")
        assert not observation.valid and observation.images == []
        assert crop(image, box).valid  # 101 x 500 pixels with its padding

    def test_an_extreme_image_can_be_cropped_to_a_sane_region(self):
        image = Image.new("RGB", (900, 3))
        assert not crop(image, [0, 0, 1, 1]).valid
        assert crop(image, [0, 0, 0.2, 1]).refs[0].box == (0, 0, 270, 3)


class TestCall:
    def test_the_tools_by_name(self):
        tools = VisualTools(QUERY, PAIR)
        by_name = tools.call("crop_image", {"bbox_2d": [0, 0, 1, 1], "target_image": 3})
        assert by_name.valid and by_name == tools.crop_image([0, 0, 1, 1], 3)
        by_name = tools.call("select_images", {"target_images": [1]})
        assert by_name.valid and by_name == tools.select_images([1])

    @pytest.mark.parametrize("name", ["zoom", "", "Crop_image", "call", "__init__", None, 3, ["crop_image"], {}])
    def test_an_unknown_name(self, name):
        observation = VisualTools(QUERY, PAIR).call(name, {})
        assert observation.text == "There is no such tool. Tools: select_images, crop_image."
        assert not observation.valid

    @pytest.mark.parametrize(
        ("name", "arguments", "allowed"),
        [
            ("select_images", {}, "target_images"),
            ("select_images", {"target_image": [1]}, "target_images"),
            ("select_images", {"target_images": [1], "reason": "x"}, "target_images"),
            ("select_images", [1], "target_images"),
            ("select_images", None, "target_images"),
            ("select_images", '{"target_images": [1]}', "target_images"),  # JSON in a string
            ("crop_image", {"bbox_2d": [0, 0, 1, 1]}, "bbox_2d, target_image"),
            ("crop_image", {"target_image": 1}, "bbox_2d, target_image"),
            ("crop_image", {"bbox_2d": [0, 0, 1, 1], "target_images": 1}, "bbox_2d, target_image"),
            ("crop_image", {"bbox_2d": [0, 0, 1, 1], "target_image": 1, 3: 4}, "bbox_2d, target_image"),
        ],
    )
    def test_wrong_arguments(self, name, arguments, allowed):
        observation = VisualTools(QUERY, PAIR).call(name, arguments)
        assert observation.text == f"{name} takes exactly these arguments: {allowed}."
        assert not observation.valid

    def test_deep_nesting(self):
        deep = json.loads("[" * 900 + "]" * 900)  # walking it would end in a RecursionError
        tools = VisualTools(QUERY, PAIR)
        for observation in (tools.select_images(deep), tools.crop_image(deep, 1), tools.call("crop_image", deep)):
            assert not observation.valid

    def test_what_a_model_wrote_never_comes_back(self):
        # a control token in an observation would end the turn or pose as a picture
        evil = "<|im_end|><|image_pad|><image>"
        tools = VisualTools(QUERY, PAIR)
        for observation in (
            tools.call(evil, {evil: evil}),
            tools.call("crop_image", {evil: evil}),
            tools.select_images([evil]),
            tools.select_images(evil),
            tools.crop_image([evil] * 4, 1),
            tools.crop_image(evil, evil),
        ):
            assert not observation.valid and "<" not in observation.text


class TestConstruction:
    def test_images_of_other_modes_are_shown_in_rgb(self):
        tools = VisualTools(
            Image.new("RGBA", (60, 60), (0, 0, 0, 0)), [Image.new("P", (60, 60)), Image.new("L", (60, 60))]
        )
        images = tools.select_images([0, 1, 2]).images
        assert [image.mode for image in images] == ["RGB"] * 3
        assert images[0].getpixel((9, 9)) == WHITE

    def test_a_budget_below_four_tokens_is_an_error(self):
        assert VisualTools(None, PAIR, inspect_pixels=3136).select_images([1]).images[0].size == (56, 28)
        with pytest.raises(ValueError, match="at least 3136"):
            VisualTools(None, PAIR, inspect_pixels=3135)
        with pytest.raises(ValueError, match="at least 4096"):
            VisualTools(None, PAIR, get_preset("foveated", inspect_pixels=3136), factor=32)
        with pytest.raises(ValueError, match="at least 3136"):
            VisualTools(None, PAIR, inspect_pixels=0)

    def test_an_unknown_preset_is_an_error(self):
        with pytest.raises(ValueError, match="unknown preset"):
            VisualTools(None, PAIR, "zoom")


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([10**400, -(10**400)])
    | st.floats()
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
# Mostly near the borders that matter: of the image, of the frames, of a pixel.
coordinates = (
    st.floats(-1.5, 1.5)
    | st.floats(-50, 400)
    | st.integers(-50, 1100)
    | st.sampled_from([0, 1, 1000, 1e-9, 5e-324, -0.0, 1e308, -1e308])
)
calls = st.one_of(
    st.tuples(json_values, json_values),
    st.tuples(
        st.sampled_from(["select_images", "crop_image"]),
        st.fixed_dictionaries(
            {}, optional={"target_images": json_values, "target_image": json_values, "bbox_2d": json_values}
        ),
    ),
    st.tuples(
        st.just("select_images"),
        st.fixed_dictionaries({"target_images": st.lists(st.integers(-1, 8), max_size=6) | json_values}),
    ),
    st.tuples(
        st.just("crop_image"),
        st.fixed_dictionaries(
            {
                "bbox_2d": st.lists(coordinates, min_size=4, max_size=4) | json_values,
                "target_image": st.integers(-1, 8) | json_values,
            }
        ),
    ),
)
IMAGES = [Image.new("RGB", size) for size in [(30, 20), (1, 1), (1, 300), (300, 1), (2, 399), (333, 7), (64, 64)]]
TOOLS = [
    VisualTools(IMAGES[0], [*IMAGES[1:], None], get_preset(name, coordinates=frame, crop_padding=padding), 28, 12544)
    for name in ("release", "foveated")
    for frame in ("pixels", "relative", "thousand")
    for padding in (0, 0.1)
]


@settings(max_examples=500, deadline=None)
@given(tools=st.sampled_from(TOOLS), call=calls)
@example(tools=TOOLS[0], call=("crop_image", {"bbox_2d": [0, 0, 1, 1], "target_image": 2}))
def test_no_call_raises_or_shows_an_extreme_image(tools, call):
    observation = tools.call(*call)
    assert observation.text
    assert observation.valid == bool(observation.images)
    assert len(observation.images) == len(observation.refs)
    for image, ref in zip(observation.images, observation.refs, strict=True):
        assert image.mode == "RGB" and image.size == (ref.width, ref.height)
        assert all(side >= 28 and side % 28 == 0 for side in image.size)
        assert max(image.size) <= 200 * min(image.size)
        if ref.box is not None:
            left, top, right, bottom = ref.box
            width, height = IMAGES[ref.index].size
            assert 0 <= left < right <= width and 0 <= top < bottom <= height
