import numpy as np
import pytest

from tempme_vl.data import sampling
from tempme_vl.data.sampling import SAMPLING, frames_per_second, segment_middle, segment_random, strided


@pytest.mark.parametrize("name", SAMPLING)
@pytest.mark.parametrize("random", [False, True])
def test_exactly_as_many_sorted_indices_inside_the_video(name, random):
    for num_raw in (1, 2, 5, 11, 12, 13, 100, 1001):
        for num_frames in (1, 2, 12, 64):
            for fps in (0.3, 10.0, 29.97):
                rng = np.random.default_rng(num_raw) if random else None
                indices = SAMPLING[name](num_raw, fps, num_frames, rng)
                assert indices.shape == (num_frames,)
                assert indices.dtype == np.int64
                assert (np.diff(indices) >= 0).all()
                assert indices[0] >= 0 and indices[-1] < num_raw


def test_one_frame_a_second():
    # 10 s at 30 fps hold 10 candidates.
    assert frames_per_second(300, 29.97, 10).tolist() == list(range(0, 300, 30))
    assert frames_per_second(300, 29.97, 4).tolist() == [0, 90, 180, 270]
    # More wanted than candidates: uniform over the raw frames, up to the last one.
    assert frames_per_second(300, 29.97, 12).tolist() == np.linspace(0, 299, 12).astype(int).tolist()
    # Below one frame a second the stride stays at least one.
    assert frames_per_second(5, 0.4, 5).tolist() == [0, 1, 2, 3, 4]


def test_strided_frames_end_a_step_before_the_last():
    assert strided(191, 4).tolist() == [0, 47, 95, 143]
    assert strided(300, 3).tolist() == [0, 100, 200]
    assert strided(3, 4).tolist() == [0, 0, 1, 2]


def test_segment_middle_is_in_the_middle_and_segment_random_stays_inside_its_segment():
    assert segment_middle(24, 4).tolist() == [2, 8, 14, 20]
    draws = np.stack([segment_random(24, 4, np.random.default_rng(seed)) for seed in range(200)])
    for segment in range(4):
        assert set(draws[:, segment]) == set(range(6 * segment, 6 * segment + 6))


def test_a_generator_selects_the_random_variant_and_determines_it():
    fixed = SAMPLING["segment"](240, 30.0, 12, None)
    first, again = (SAMPLING["segment"](240, 30.0, 12, sampling.sample_generator(1, 2, 3)) for _ in range(2))
    assert (first == again).all()
    assert (first != fixed).any()
    for other in ((2, 2, 3), (1, 3, 3), (1, 2, 4)):
        assert (first != SAMPLING["segment"](240, 30.0, 12, sampling.sample_generator(*other))).any()


def test_nothing_to_sample_is_an_error():
    for num_raw, num_frames in ((0, 4), (4, 0)):
        with pytest.raises(ValueError, match="at least one"):
            frames_per_second(num_raw, 25.0, num_frames)
