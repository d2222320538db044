"""Films of evaluation episodes: mp4 files that browsers play. A film that cannot be made is one warning."""

import contextlib
import math
import numbers
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch

from common.args import warn

FILM_SECONDS = 60
PATIENCE = 60.0  # seconds that ffmpeg may take for one frame, and to finish the file


def as_rgb(frame: Any) -> np.ndarray:
    """A picture as uint8 [height, width, 3]; it may share memory with `frame`.

    Args:
        frame: an array, a tensor of any device, a PIL image, or a list of those, of which the last is taken: [height,
            width, 3], [height, width, 4] (alpha is dropped), [height, width] or [height, width, 1] (grey), or [3,
            height, width] where the width is none of 1, 3 and 4. Integers from 0 to 255, floats from 0 to 1, or bool.

    Raises:
        ValueError: it is anything else.
    """
    if isinstance(frame, list) and frame and np.ndim(frame[-1]) == 3:
        frame = frame[-1]
    pil = sys.modules.get("PIL.Image")
    if pil is not None and isinstance(frame, pil.Image) and not frame.mode.startswith(("I", "F")):
        frame = frame.convert("RGB")  # a palette's numbers and CMYK are no colours
    if isinstance(frame, torch.Tensor):
        frame = (frame.float() if frame.is_floating_point() else frame).numpy(force=True)
    pixels = np.asarray(frame)
    channels_first = pixels.ndim == 3 and pixels.shape[0] == 3 and pixels.shape[2] not in (1, 3, 4)
    rgb = pixels.transpose(1, 2, 0) if channels_first else pixels[..., None] if pixels.ndim == 2 else pixels
    kind, most = rgb.dtype.kind, 1 if rgb.dtype.kind in "bf" else 255
    what = f"{pixels.dtype} {list(pixels.shape)}" if pixels.ndim else f"of type {type(frame).__name__}"
    is_image = rgb.ndim == 3 and rgb.shape[2] in (1, 3, 4) and rgb.size and kind in "buif"
    if is_image and rgb.dtype != np.uint8 and not (rgb.min() >= 0 and rgb.max() <= most):  # or NaN
        is_image, what = False, f"{what} with values outside 0 to {most}"
    if not is_image:
        raise ValueError(f"the frame is {what}, an RGB frame is uint8 [height, width, 3]")
    if kind in "bf":
        rgb = np.rint(rgb.astype(np.float32) * 255)
    return np.broadcast_to(rgb[:, :, :3], (*rgb.shape[:2], 3)).astype(np.uint8, copy=False)


class Camera:
    """Streams one episode's frames into an mp4 file; at most the first minute of it.

    ffmpeg is fed directly: gymnasium's RecordVideo, through moviepy, takes three times as long, and imageio_ffmpeg's
    write_frames neither ends an ffmpeg that hangs nor reports one that fails.
    Whatever goes wrong is one warning, and no film: no method raises.

    Args:
        path: the film; None films nothing. Its folder is made, and must not be a symbolic link.
    """

    def __init__(self, path: Path | None) -> None:
        self.path: Any = path  # never None where a film is made
        self.on = path is not None
        self.ffmpeg: Any = None  # the process, while it runs
        self.late: list[str] = []  # why it was killed
        self.frames = 0
        self.set_rate(15.0)  # Atari: 60 frames a second, 4 to an action

    def set_rate(self, fps: Any) -> None:
        """`fps`: an environment's frames a second; 30 if it is no number from 1 to 1,000."""
        known = isinstance(fps, numbers.Real) and not isinstance(fps, bool) and 1 <= fps <= 1000  # type: ignore[operator]
        rate = float(fps) if known else 30.0
        self.stride = math.ceil(rate / 30)  # all of CartPole's 50 frames a second would double the price of a film
        self.fps = rate / self.stride

    def film(self, env_id: str, kwargs: dict[str, Any]) -> gym.Env:
        """An environment whose first episode is filmed."""
        try:
            # Without gymnasium's checker, which ends the first render of a `render_fps` that is not above 0.
            env = gym.make(env_id, render_mode="rgb_array", disable_env_checker=True, **kwargs)
        except (Exception, SystemExit) as error:
            self.fail(error)
            return gym.make(env_id, **kwargs)
        self.set_rate(env.metadata.get("render_fps") if isinstance(env.metadata, dict) else None)
        with contextlib.suppress(Exception):  # MuJoCo: shadows and multisampling are 80 of a frame's 90 ms on a CPU
            quality = env.unwrapped.model.vis.quality  # type: ignore[attr-defined]
            quality.shadowsize = quality.offsamples = 0
        return _Filmed(env, self)

    def due(self) -> bool:
        """Counts a frame, and says whether it is one to keep."""
        self.frames += 1
        keep = (self.frames - 1) % self.stride == 0 and self.frames <= FILM_SECONDS * self.fps * self.stride
        return self.on and keep

    def take(self, frame: Any) -> None:
        """Adds `frame`, whatever `as_rgb` takes, of the first one's size."""
        if not self.on:
            return
        try:
            rgb = as_rgb(frame)
            if self.ffmpeg is None:
                self._start(rgb.shape[:2])
            if rgb.shape[:2] != self.size:
                raise ValueError(f"the frames change from {list(self.size)} to {list(rgb.shape[:2])} pixels")
            # Odd sizes cannot be yuv420p, the one format that all browsers play: the last row or column is doubled.
            rgb = np.pad(rgb, [(0, self.size[0] % 2), (0, self.size[1] % 2), (0, 0)], mode="edge")
            with contextlib.suppress(BrokenPipeError), self._limit():  # `close` says why it broke
                self.ffmpeg.stdin.write(np.ascontiguousarray(rgb).data)
        except (Exception, SystemExit) as error:
            self.fail(error)

    def fail(self, error: BaseException) -> None:
        """No film, because of `error`."""
        self.on = False
        reason = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        warn(f"no video: {reason}; --no-capture-video turns filming off", once=f"no video: {reason}")

    def close(self) -> None:
        """Finishes the film, or leaves nothing of it."""
        if self.ffmpeg is None:
            return
        try:
            with self._limit():
                _, said = self.ffmpeg.communicate()
            code, lines = self.ffmpeg.returncode, said.decode(errors="replace").splitlines() + self.late
            if self.on and code != 0:
                raise OSError(": ".join([f"ffmpeg ended with code {code}", *lines[-1:]]))
            if self.on:
                self.part.replace(self.path)
        except Exception as error:
            self.fail(error)
        finally:
            self._kill()
            self.ffmpeg = None
            with contextlib.suppress(OSError):
                self.part.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _limit(self) -> Iterator[None]:
        """Kills an ffmpeg that takes more than PATIENCE seconds: to read a frame, or to finish the file."""
        late = threading.Timer(PATIENCE, self._kill)
        late.start()
        try:
            yield
        finally:
            late.cancel()

    def _kill(self) -> None:
        if self.ffmpeg.poll() is not None:
            return
        self.late = [f"it took more than {PATIENCE:g} s"]
        with contextlib.suppress(OSError):  # the processes of a wrapper script too: they would hold the pipe
            os.killpg(self.ffmpeg.pid, signal.SIGKILL) if hasattr(os, "killpg") else self.ffmpeg.kill()

    def _start(self, size: tuple[int, ...]) -> None:
        import imageio_ffmpeg

        if self.path.parent.is_symlink():
            raise ValueError(f"{self.path.parent} is a symbolic link, which is not followed")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.part = self.path.with_suffix(".part.mp4")
        self.part.unlink(missing_ok=True)  # a link there would be followed
        self.size = size
        height, width = (n + n % 2 for n in size)
        rate = str(Fraction(self.fps).limit_denominator())
        raw = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", rate, "-i", "-"]
        film = ["-vcodec", "libx264", "-pix_fmt", "yuv420p", "-crf", "25", "-preset", "ultrafast"]
        self.ffmpeg = subprocess.Popen(
            [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", *raw, *film, "-movflags", "+faststart", self.part],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is for training, which then ends the film in order
        )


class _Filmed(gym.Wrapper):
    """Renders the first episode, its last frame too: the vector environment resets within the step."""

    def __init__(self, env: gym.Env, camera: Camera) -> None:
        super().__init__(env)
        self.camera = camera
        self.episode = 0

    def reset(self, **kwargs: Any) -> Any:
        self.episode += 1
        return self._filmed(self.env.reset(**kwargs))

    def step(self, action: Any) -> Any:
        return self._filmed(self.env.step(action))

    def _filmed(self, result: Any) -> Any:
        if self.episode == 1 and self.camera.due():
            try:
                self.camera.take(self.env.render())
            except (Exception, SystemExit) as error:
                self.camera.fail(error)
        return result


def magnified(frame: np.ndarray) -> np.ndarray:
    """ALE's vector environment cannot render: an Atari game is filmed as the agent sees it, four times as large."""
    return frame.repeat(4, axis=0).repeat(4, axis=1)
