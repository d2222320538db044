"""Films: the right colours or one warning, and nothing else left behind (P19, P23)."""

import os
import resource
import stat
import sys
import time

import gymnasium as gym
import imageio_ffmpeg
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete

from common.evaluation import play
from common.internals.tracking.video import Camera, as_rgb

ORANGE = (200, 100, 0)
HEIGHT, WIDTH = 32, 48


@pytest.fixture(autouse=True)
def nothing_is_warned_of_yet(monkeypatch):
    monkeypatch.setattr("common.args._warned", set())


def still(obs):
    return torch.zeros(len(obs), dtype=torch.int64)


def decoded(path):
    """What the film says of itself, and its frames, uint8 [frames, height, width, 3]."""
    reader = imageio_ffmpeg.read_frames(str(path))
    meta = next(reader)
    width, height = meta["size"]
    return meta, np.stack([np.frombuffer(frame, np.uint8).reshape(height, width, 3) for frame in reader])


def bar(t, height=HEIGHT, width=WIDTH):
    """Black, with an orange bar of 4 t columns at the left."""
    frame = np.zeros((height, width, 3), np.uint8)
    frame[:, : 4 * t] = ORANGE
    return frame


class Bar(gym.Env):
    """Episodes of 8 steps; `as_frame` makes a frame of the picture."""

    observation_space = Box(-1, 1, (2,), np.float32)
    action_space = Discrete(2)
    metadata = {"render_modes": ["rgb_array"], "render_fps": 30}  # noqa: RUF012

    def __init__(self, as_frame=lambda frame: frame, render_mode=None, **attributes):
        self.as_frame, self.render_mode = as_frame, render_mode
        self.__dict__.update(attributes)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return np.zeros(2, np.float32), {}

    def step(self, action):
        self.t += 1
        return np.zeros(2, np.float32), 1.0, False, self.t == 8, {}

    def render(self):
        return self.as_frame(bar(self.t))


gym.register("Bar-v0", Bar)


def filmed(monkeypatch, path, **arguments):
    """Plays two episodes, films the first, and returns the returns: 8 each, whatever becomes of the film."""
    monkeypatch.setitem(gym.registry["Bar-v0"].kwargs, "as_frame", lambda frame: frame)
    for name, value in arguments.items():
        monkeypatch.setitem(gym.registry["Bar-v0"].kwargs, name, value)
    returns, _ = play(still, "Bar-v0", 2, seed=1, video=path)
    return returns.tolist()


def palette(frame):
    return pytest.importorskip("PIL.Image").fromarray(frame).quantize(4)


def picture(frame):
    return pytest.importorskip("PIL.Image").fromarray(frame)


def with_alpha(frame, alpha=7):
    return np.concatenate([frame, np.full((*frame.shape[:2], 1), alpha, frame.dtype)], axis=2)


class Reused:
    """An environment that draws every frame into the same buffer."""

    buffer = np.zeros((HEIGHT, WIDTH, 3), np.uint8)

    def __call__(self, frame):
        self.buffer[:] = frame
        return self.buffer


IN_COLOUR = {
    "uint8": lambda frame: frame,
    "alpha": with_alpha,
    "float64": lambda frame: frame / 255,
    "float32 with alpha": lambda frame: with_alpha((frame / 255).astype(np.float32), 0.5),
    "float16": lambda frame: (frame / 255).astype(np.float16),
    "int64": lambda frame: frame.astype(np.int64),
    "big-endian uint16": lambda frame: frame.astype(">u2"),
    "channels first": lambda frame: frame.transpose(2, 0, 1),
    "upside down twice": lambda frame: frame[::-1],  # a negative stride
    "column-major": np.asfortranarray,
    "read-only": lambda frame: np.frombuffer(frame.tobytes(), np.uint8).reshape(frame.shape),
    "reused buffer": Reused(),
    "torch": torch.from_numpy,
    "torch bfloat16 with gradient": lambda frame: (torch.from_numpy(frame) / 255).bfloat16().requires_grad_(),
    "list of frames": lambda frame: [np.zeros_like(frame), frame],
    "nested lists": lambda frame: frame.tolist(),
    "PIL": picture,
    "PIL palette": palette,
}


@pytest.mark.parametrize("kind", IN_COLOUR)
def test_every_kind_of_frame_has_its_colours_in_the_film(kind, tmp_path, monkeypatch, capsys):
    path = tmp_path / "videos" / "film.mp4"
    assert filmed(monkeypatch, path, as_frame=IN_COLOUR[kind]) == [8.0, 8.0]
    meta, frames = decoded(path)
    assert meta["size"] == (WIDTH, HEIGHT) and len(frames) == 9
    for t, frame in enumerate(frames):
        # yuv420p has a colour for two columns, and the codec is lossy: beside the bar's edge they are near, not equal.
        sure = [x for x in range(WIDTH) if abs(x - 4 * t) > 4]
        assert np.abs(frame[:, sure].astype(int) - bar(t)[:, sure]).max() <= 12
    assert [entry.name for entry in path.parent.iterdir()] == ["film.mp4"]
    assert "no video" not in capsys.readouterr().err


GREY = np.array([[0, 128, 255], [51, 204, 1]], np.uint8)


@pytest.mark.parametrize(
    ("frame", "grey"),
    [
        (GREY, GREY),
        (GREY[..., None], GREY),
        (GREY.astype(np.int16), GREY),
        (GREY > 100, np.where(GREY > 100, 255, 0)),
        (GREY / 255, GREY),
        (torch.from_numpy(GREY > 100), np.where(GREY > 100, 255, 0)),
        (np.float32([[0.0, 0.5, 1.0]]), [[0, 128, 255]]),  # half of 255, to the nearest even number
        (np.uint16([[0, 7, 255]]), [[0, 7, 255]]),  # 16-bit numbers are not scaled
    ],
    ids=repr,
)
def test_a_grey_frame_has_three_equal_channels(frame, grey):
    rgb = as_rgb(frame)
    assert rgb.dtype == np.uint8 and rgb.shape == (*np.shape(grey), 3)
    assert all((rgb[..., channel] == grey).all() for channel in range(3))


@pytest.mark.parametrize("shape", [(3, 5, 3), (3, 5, 4), (3, 5, 1)])
def test_channels_are_last_where_they_can_be(shape):
    frame = np.arange(np.prod(shape), dtype=np.uint8).reshape(shape)
    rgb = as_rgb(frame)
    assert rgb.shape == (3, 5, 3)
    assert (rgb == frame[:, :, :3]).all()


def cmyk(frame):
    return pytest.importorskip("PIL.Image").fromarray(frame).convert("CMYK")


def test_the_numbers_of_a_cmyk_picture_are_no_colours():
    assert (as_rgb(cmyk(bar(4))) == bar(4)).all()


ONES = np.ones((8, 8, 3))
REFUSED = [
    (None, "of type NoneType"),
    ("a frame", "of type str"),
    (b"a frame", "of type bytes"),
    (3, "of type int"),
    ({"left": bar(1)}, "of type dict"),
    ([], "float64 [0]"),
    ((bar(1), ONES[..., :1]), None),  # a picture and its depth
    (ONES * 1.5, "float64 [8, 8, 3] with values outside 0 to 1"),
    (ONES * -0.1, "float64 [8, 8, 3] with values outside 0 to 1"),
    (ONES * 255, "float64 [8, 8, 3] with values outside 0 to 1"),
    (ONES * np.nan, "float64 [8, 8, 3] with values outside 0 to 1"),
    (np.where(np.arange(3) == 1, np.nan, ONES), "float64 [8, 8, 3] with values outside 0 to 1"),
    (ONES.astype(int) * 256, "int64 [8, 8, 3] with values outside 0 to 255"),
    (ONES.astype(np.int8) * -1, "int8 [8, 8, 3] with values outside 0 to 255"),
    (ONES.astype(np.uint16) * 65535, "uint16 [8, 8, 3] with values outside 0 to 255"),
    (ONES.astype(complex), "complex128 [8, 8, 3]"),
    (ONES.astype(object), "object [8, 8, 3]"),
    (ONES.astype(str), "<U32 [8, 8, 3]"),
    (ONES[..., :2], "float64 [8, 8, 2]"),
    (np.zeros((4, 8, 8), np.uint8), "uint8 [4, 8, 8]"),  # four stacked frames
    (np.zeros((2, 8, 8, 3), np.uint8), "uint8 [2, 8, 8, 3]"),
    (np.zeros((0, 8, 3), np.uint8), "uint8 [0, 8, 3]"),
    (np.zeros(8, np.uint8), "uint8 [8]"),
]


@pytest.mark.parametrize(("frame", "what"), REFUSED, ids=[str(what) for _, what in REFUSED])
def test_what_is_no_picture_is_refused(frame, what):
    with pytest.raises(ValueError) as caught:
        as_rgb(frame)
    if what is not None:
        assert str(caught.value) == f"the frame is {what}, an RGB frame is uint8 [height, width, 3]"


def one_warning(capsys, path, reason):
    """No film, and one line that says why."""
    error = [line for line in capsys.readouterr().err.splitlines() if "no video" in line]
    assert len(error) == 1 and error[0].startswith("warning: no video: ") and reason in error[0]
    assert not path.exists() and not list(path.parent.glob("*.part*"))


def leave(frame):
    sys.exit("no window")


def growing(frame):
    """Twice as wide from the first orange column on."""
    return np.concatenate([frame, frame], axis=1) if frame.any() else frame


def brighter(frame):
    """Floats that are black at first, and from 0 to 255 then."""
    return frame.astype(np.float64)


@pytest.mark.parametrize(
    ("as_frame", "reason"),
    [
        (lambda frame: None, "the frame is of type NoneType, an RGB frame is uint8 [height, width, 3]"),
        (brighter, "the frame is float64 [32, 48, 3] with values outside 0 to 1"),
        (growing, "the frames change from [32, 48] to [32, 96] pixels"),
        (leave, "SystemExit: no window"),
        (lambda frame: torch.zeros(8, 8, 3, device="meta"), "NotImplementedError"),
    ],
)
def test_a_frame_that_is_no_picture_is_one_warning_and_no_film(as_frame, reason, tmp_path, monkeypatch, capsys):
    path = tmp_path / "film.mp4"
    for _ in range(3):  # every evaluation tries again, and the first alone speaks of it
        assert filmed(monkeypatch, path, as_frame=as_frame) == [8.0, 8.0]
    one_warning(capsys, path, reason)


def test_an_environment_that_leaves_when_it_is_made_for_filming_plays_on(tmp_path, monkeypatch, capsys):
    make = gym.make

    def without_display(*words, **more):
        return sys.exit(1) if more.get("render_mode") else make(*words, **more)

    monkeypatch.setattr(gym, "make", without_display)
    assert filmed(monkeypatch, tmp_path / "film.mp4") == [8.0, 8.0]
    one_warning(capsys, tmp_path / "film.mp4", "SystemExit: 1")


@pytest.mark.parametrize(
    "fps", [None, 0, -5, float("nan"), float("inf"), "30", 10**9, 10**400, 1e-9, True, [30], np.float32("nan"), 1 + 2j],
    ids=lambda fps: repr(fps)[:12],
)  # fmt: skip
def test_a_rate_that_is_none_is_30_frames_a_second(fps, tmp_path, monkeypatch):
    camera = Camera(None)
    camera.set_rate(fps)
    assert (camera.fps, camera.stride) == (30, 1)


@pytest.mark.parametrize(("fps", "expected"), [(10, 10), (np.float32(12.5), 12.5), (np.int64(60), 30), (1, 1)])
def test_a_rate_that_is_one_is_the_films(fps, expected):
    camera = Camera(None)
    camera.set_rate(fps)
    assert camera.fps == expected


@pytest.mark.parametrize("metadata", [{}, {"render_modes": ["rgb_array"], "render_fps": 0}, {"render_fps": -1}])
def test_metadata_without_a_rate_is_filmed_at_30_frames_a_second(metadata, tmp_path, monkeypatch):
    monkeypatch.setattr(Bar, "metadata", metadata)
    filmed(monkeypatch, tmp_path / "film.mp4")
    assert decoded(tmp_path / "film.mp4")[0]["fps"] == 30


@pytest.mark.parametrize("metadata", [None, ["rgb_array"], 30])
def test_metadata_that_is_no_dict_has_no_rate(metadata, monkeypatch):
    """gymnasium makes no vector environment of it; what one environment renders is filmed all the same."""
    monkeypatch.setitem(gym.registry["Bar-v0"].kwargs, "metadata", metadata)
    camera = Camera(None)
    assert (camera.film("Bar-v0", {}).reset()[0] == 0).all()
    assert camera.fps == 30


@pytest.mark.parametrize(("height", "width"), [(1, 1), (3, 5), (64, 1), (7, 500), (720, 1281)])
def test_a_film_has_its_frames_size_and_odd_ones_a_row_or_column_more(height, width, tmp_path, capfd):
    path = tmp_path / "film.mp4"
    camera = Camera(path)
    for _ in range(3):
        camera.take(np.full((height, width, 3), ORANGE, np.uint8))
    camera.close()
    meta, frames = decoded(path)
    assert meta["size"] == (width + width % 2, height + height % 2)
    assert len(frames) == 3
    assert np.abs(frames.astype(int) - ORANGE).max() <= 8
    assert capfd.readouterr() == ("", "")


def fake_ffmpeg(monkeypatch, tmp_path, script):
    path = tmp_path / "ffmpeg"
    path.write_text("#!/bin/sh\n" + script)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(imageio_ffmpeg, "get_ffmpeg_exe", lambda: str(path))


def shoot(path, frames=3, size=256):
    """A film of frames that are larger than a pipe holds."""
    path.parent.mkdir(exist_ok=True)
    camera = Camera(path)
    for _ in range(frames):
        camera.take(np.zeros((size, size, 3), np.uint8))
    camera.close()


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("echo no codec >&2; exit 1", "ffmpeg ended with code 1: no codec"),
        ("cat > /dev/null; echo disk is full >&2; exit 28", "ffmpeg ended with code 28: disk is full"),
        ("cat > /dev/null; for part; do :; done; echo torn > $part; kill -9 $$", "ffmpeg ended with code -9"),
        ("cat > /dev/null", "FileNotFoundError"),  # well, says ffmpeg, and there is no film
        ("sleep 100", "it took more than 0.5 s"),  # reads nothing, and holds the pipe after the shell is killed
        ("cat > /dev/null; sleep 100", "it took more than 0.5 s"),  # does not finish
    ],
)
@pytest.mark.parametrize("size", [2, 256])  # a frame that a buffer holds, and one that no pipe does
def test_an_ffmpeg_that_fails_or_hangs_is_one_warning(script, reason, size, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("common.internals.tracking.video.PATIENCE", 0.5)
    fake_ffmpeg(monkeypatch, tmp_path, script)
    path = tmp_path / "videos" / "film.mp4"
    began = time.monotonic()
    shoot(path, size=size)
    assert time.monotonic() - began < 10
    one_warning(capsys, path, reason)


def missing():
    raise RuntimeError("No ffmpeg exe could be found")


@pytest.mark.parametrize(
    ("path_of_ffmpeg", "reason"),
    [(missing, "RuntimeError: No ffmpeg exe could be found"), (lambda: "/no/such/ffmpeg", "FileNotFoundError")],
)
def test_a_missing_ffmpeg_is_one_warning(path_of_ffmpeg, reason, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(imageio_ffmpeg, "get_ffmpeg_exe", path_of_ffmpeg)
    shoot(tmp_path / "videos" / "film.mp4")
    one_warning(capsys, tmp_path / "videos" / "film.mp4", reason)


def test_a_disk_that_fills_up_while_filming_is_one_warning(tmp_path, capsys):
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    rng = np.random.default_rng(0)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limit[1]))  # ffmpeg takes it over
    try:
        camera = Camera(tmp_path / "film.mp4")
        for _ in range(20):
            camera.take(rng.integers(256, size=(64, 64, 3), dtype=np.uint8))
        camera.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    one_warning(capsys, tmp_path / "film.mp4", "ffmpeg ended with code")


def test_a_folder_that_is_a_link_is_not_followed(tmp_path, capsys):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "videos").symlink_to(tmp_path / "elsewhere")
    shoot(tmp_path / "videos" / "film.mp4")
    one_warning(capsys, tmp_path / "videos" / "film.mp4", "is a symbolic link, which is not followed")
    assert not list((tmp_path / "elsewhere").iterdir())


def test_a_film_takes_the_place_of_a_link_and_leaves_what_it_points_to(tmp_path):
    kept = tmp_path / "kept"
    kept.write_text("kept")
    for name in ("film.mp4", "film.part.mp4"):
        (tmp_path / name).symlink_to(kept)
    shoot(tmp_path / "film.mp4")
    assert kept.read_text() == "kept"
    assert not (tmp_path / "film.mp4").is_symlink()
    assert len(decoded(tmp_path / "film.mp4")[1]) == 3


@pytest.mark.parametrize("obstacle", ["file", "part", "film"])
def test_a_path_that_cannot_be_written_is_one_warning(obstacle, tmp_path, capsys):
    path = tmp_path / "videos" / "film.mp4"
    if obstacle == "file":
        path.parent.write_text("not a folder")
    else:
        (path if obstacle == "film" else path.with_suffix(".part.mp4")).mkdir(parents=True)
        (path if obstacle == "film" else path.with_suffix(".part.mp4")).joinpath("full").touch()
    camera = Camera(path)
    camera.take(bar(1))
    camera.close()
    camera.close()
    assert capsys.readouterr().err.count("warning: no video: ") == 1


def test_a_run_that_is_stopped_while_filming_leaves_no_process(tmp_path):
    camera = Camera(tmp_path / "film.mp4")
    camera.take(bar(1))
    process = camera.ffmpeg
    camera.fail(OSError("stopped"))
    camera.close()
    assert process.poll() is not None
    assert not os.listdir(tmp_path)


def test_a_film_has_every_frame_of_its_episode_and_none_of_the_next(tmp_path):
    film = tmp_path / "videos" / "film.mp4"
    play(still, "Mixed-v0", 12, seed=1, video=film)  # episodes of 3, 5, 2 ... steps at 10 frames a second
    reader = imageio_ffmpeg.read_frames(str(film))
    facts = next(reader)
    assert facts["size"] == (60, 40)
    assert facts["fps"] == 10
    # Its grey is 20 a step since the episode's start: 0, 20, 40 and the last one, 60.
    greys = [np.frombuffer(frame, np.uint8).mean() for frame in reader]
    assert greys == pytest.approx([0, 20, 40, 60], abs=4)
    assert [path.name for path in film.parent.iterdir()] == ["film.mp4"]


@pytest.mark.parametrize(
    "breakage",
    ["imageio_ffmpeg.get_ffmpeg_exe", "probe_envs.Counter.render", "gymnasium.make"],
)
def test_a_film_that_cannot_be_made_is_one_warning(breakage, tmp_path, monkeypatch, capsys):
    make = gym.make

    def broken(*words, **more):
        if breakage != "gymnasium.make" or more.get("render_mode"):
            raise OSError("no display")
        return make(*words, **more)

    monkeypatch.setattr(breakage, broken)
    returns, _ = play(still, "Mixed-v0", 3, seed=1, video=tmp_path / "film.mp4")
    assert returns.tolist() == [6.0, 6.0, 6.0]
    error = capsys.readouterr().err
    assert error.count("warning: no video: OSError: no display") == 1
    assert len(error.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_frames_are_thinned_and_end_after_a_minute():
    camera = Camera(None)
    camera.on = True
    camera.set_rate(50)  # CartPole: every second frame, 25 a second
    assert camera.fps == 25
    kept = [i for i in range(10_000) if camera.due()]
    assert kept == list(range(0, 3000, 2))


def test_filming_does_not_gather_memory(tmp_path):
    def film(i):
        play(still, "CartPole-v1", 1, seed=i, video=tmp_path / f"{i}.mp4")

    for i in range(3):
        film(i)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for i in range(3, 23):
        film(i)
    assert (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 30_000
    )  # kB; one film's frames are 7,000 to 700,000


def test_atari_is_filmed_as_the_agent_sees_it(tmp_path):
    pytest.importorskip("ale_py")

    def fire(obs):
        return torch.ones(len(obs), dtype=torch.int64)  # in Breakout a game ends only if balls are served

    play(fire, "ALE/Breakout-v5", 1, seed=1, video=tmp_path / "film.mp4")
    facts = next(imageio_ffmpeg.read_frames(str(tmp_path / "film.mp4")))
    assert facts["size"] == (336, 336)
    assert facts["fps"] == 15
