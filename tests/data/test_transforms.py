import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from tempme_vl.data import augment as augmentations
from tempme_vl.data import transforms
from tempme_vl.data.augment import RAND_AUGMENT, rand_augment, random_crop_flip
from tempme_vl.data.sampling import sample_generator
from tempme_vl.data.transforms import Preprocess, VideoTransform, resize


def video(num_frames: int = 3, height: int = 48, width: int = 80, seed: int = 0) -> np.ndarray:
    """Smooth colours with noise: (F, H, W, 3) uint8."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (num_frames, 4, 4, 3), np.uint8)
    frames = [Image.fromarray(frame).resize((width, height)) for frame in coarse]
    return np.stack([np.asarray(frame) for frame in frames]) // 2 + rng.integers(
        0, 99, (num_frames, height, width, 3), np.uint8
    )


@pytest.mark.parametrize("mode", ["shortest", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [(48, 80), (81, 47), (32, 32), (20, 30), (33, 500)])
def test_evaluation_equals_open_clip_bit_for_bit(mode, interpolation, size):
    pixels = video(2, *size)
    ours = VideoTransform(Preprocess(32, resize=mode, interpolation=interpolation))(pixels)
    theirs = open_clip.image_transform(32, is_train=False, resize_mode=mode, interpolation=interpolation)
    expected = torch.stack([theirs(Image.fromarray(frame)) for frame in pixels])
    assert ours.dtype == torch.float32
    assert torch.equal(ours, expected)


def test_mean_and_deviation_are_open_clips_and_can_be_changed():
    assert (transforms.CLIP_MEAN, transforms.CLIP_STD) == (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
    pixels = video(1)
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    theirs = open_clip.image_transform(32, is_train=False, mean=mean, std=std)
    ours = VideoTransform(Preprocess(32, mean=mean, std=std))(pixels)
    assert torch.equal(ours[0], theirs(Image.fromarray(pixels[0])))


@pytest.mark.parametrize("augment", ["none", "randaugment", "crop_flip"])
def test_uint8_is_what_is_normalised(augment):
    how = Preprocess(32)
    raw, ready = (VideoTransform(how, augment, n)(video(), sample_generator(0, 0, 0)) for n in (False, True))
    assert raw.dtype == torch.uint8 and raw.shape == ready.shape == (3, 3, 32, 32) and raw.is_contiguous()
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (how.mean, how.std))
    assert torch.equal(ready, (raw.float() / 255 - mean) / std)
    assert VideoTransform(how, normalize=False).blank(2).dtype == torch.uint8


def test_resized_frames_can_be_cached():
    preprocess = Preprocess(32)
    pixels = video()
    cached = resize(pixels, preprocess)
    assert cached.shape == (3, 32, 32, 3) and cached.dtype == np.uint8
    assert torch.equal(VideoTransform(preprocess)(cached), VideoTransform(preprocess)(pixels))
    augmented = VideoTransform(preprocess, "randaugment")
    for seed in range(5):
        assert torch.equal(
            augmented(cached, np.random.default_rng(seed)), augmented(pixels, np.random.default_rng(seed))
        )


@pytest.mark.parametrize("augment", ["randaugment", "crop_flip"])
def test_all_frames_get_the_same_parameters_and_the_sample_determines_them(augment):
    transform = VideoTransform(Preprocess(32), augment)
    pixels = video(4)
    results = []
    for sample in range(12):
        whole = transform(pixels, sample_generator(0, 0, sample))
        assert whole.shape == (4, 3, 32, 32) and whole.dtype == torch.float32
        for frame in range(4):
            alone = transform(pixels[frame : frame + 1], sample_generator(0, 0, sample))
            assert torch.equal(alone[0], whole[frame])
        results.append(whole)
    distinct = sum(not torch.equal(results[0], other) for other in results[1:])
    assert distinct >= 9
    assert not torch.equal(results[0], transform(pixels, sample_generator(0, 1, 0)))


def test_global_random_states_are_left_alone():
    pixels = video()
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    for augment in ("randaugment", "crop_flip"):
        VideoTransform(Preprocess(32), augment)(pixels, np.random.default_rng(0))
    assert torch.equal(torch_state, torch.get_rng_state())
    assert (numpy_state == np.random.get_state()[1]).all()


@pytest.mark.parametrize("name", RAND_AUGMENT)
def test_each_operation_changes_the_frames_and_keeps_their_form(name):
    frames = torch.from_numpy(video()).permute(0, 3, 1, 2)
    for sign in (-1, 1):
        changed = RAND_AUGMENT[name](frames.clone(), 0.7, sign)
        assert changed.shape == frames.shape and changed.dtype == torch.uint8
        assert not torch.equal(changed, frames)


@pytest.mark.parametrize("name", ["rotate", "shear_x", "shear_y", "translate_x", "translate_y"])
def test_what_comes_in_from_outside_is_middle_grey(name):
    white = torch.full((2, 3, 48, 80), 255, dtype=torch.uint8)
    for sign in (-1, 1):
        moved = RAND_AUGMENT[name](white, 1.0, sign)
        values, counts = moved[moved < 255].unique(return_counts=True)  # at its edge are mixtures
        assert values[counts.argmax()] == 128 and counts.max() > 0.02 * white.numel()


@pytest.mark.parametrize(
    ("name", "sign", "before", "after"),
    [
        ("brightness", 1, 100, 163),  # times 1 + 0.9 * 0.7
        ("brightness", -1, 100, 37),
        ("posterize", 1, 255, 192),  # two bits of eight
        ("solarize", 1, 76, 76),  # from 256 - 179 on
        ("solarize", 1, 77, 178),
        ("solarize_add", 1, 100, 177),
        ("solarize_add", 1, 128, 128),
    ],
)
def test_magnitude_7_is_as_strong_as_in_timm(name, sign, before, after):
    frames = torch.full((1, 3, 4, 4), before, dtype=torch.uint8)
    assert (RAND_AUGMENT[name](frames, 0.7, sign) == after).all()


def test_rand_augment_applies_about_half_of_its_four_operations(monkeypatch):
    calls = []
    counting = {name: lambda frames, x, sign: (calls.append((x, sign)), frames)[1] for name in RAND_AUGMENT}
    monkeypatch.setattr(augmentations, "RAND_AUGMENT", counting)
    for seed in range(500):
        rand_augment(video(1, 4, 4), np.random.default_rng(seed))
    strengths, signs = zip(*calls, strict=True)
    assert 900 < len(calls) < 1100
    assert abs(np.mean(strengths) - 0.7) < 0.01 and abs(np.std(strengths) - 0.05) < 0.01
    assert abs(np.mean(signs)) < 0.1


def test_crops_cover_half_to_all_of_the_picture_and_half_are_flipped():
    # Red rises from left to right, green from top to bottom: the crop can be read off its corners.
    y, x = np.mgrid[:200, :200]
    pixels = np.stack([x, y, 0 * x], -1).astype(np.uint8)[None]
    flips = 0
    for seed in range(200):
        cropped = random_crop_flip(pixels, Preprocess(64), np.random.default_rng(seed)).astype(int)
        width = cropped[0, 32, -1, 0] - cropped[0, 32, 0, 0]
        height = cropped[0, -1, 32, 1] - cropped[0, 0, 32, 1]
        flips += width < 0
        assert 0.45 < abs(width) * height / 200**2 <= 1.0
        assert 0.7 < abs(width) / height < 1.4
    assert 70 < flips < 130


def test_very_long_pictures_are_cropped_too():
    pixels = video(1, 4, 400)
    assert random_crop_flip(pixels, Preprocess(32), np.random.default_rng(0)).shape == (1, 32, 32, 3)


def test_wrong_input_is_named():
    with pytest.raises(ValueError, match="needs a numpy Generator"):
        VideoTransform(augment="randaugment")(video())
    with pytest.raises(ValueError, match=r"expected frames \(F, H, W, 3\) uint8; got \(3, 48, 80, 3\) float64"):
        VideoTransform()(video().astype(float))
    for wrong in ({"resize": "longest"}, {"interpolation": "nearest"}, {"image_size": 0}, {"std": (0.0, 1.0, 1.0)}):
        with pytest.raises(ValueError, match=r"must be|expected"):
            Preprocess(**wrong)
    with pytest.raises(ValueError, match="unknown augmentation 'mixup'; known: none, randaugment, crop_flip"):
        VideoTransform(augment="mixup")
