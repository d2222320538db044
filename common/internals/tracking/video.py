"""Films of evaluation episodes: mp4 files that browsers play. A film that cannot be made is one warning."""

import contextlib
import math
import numbers
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import IO, Any

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
    image = sys.modules.get("PIL.Image")
    if isinstance(frame, list) and frame and np.ndim(frame[-1]) == 3:
        frame = frame[-1]
    if image is not None and isinstance(frame, image.Image) and not frame.mode.startswith(("I", "F")):
        frame = frame.convert("RGB")  # a palette's numbers and CMYK are no colours
    if isinstance(frame, torch.Tensor):
        frame = frame.detach().cpu()
        frame = frame.float().numpy() if frame.is_floating_point() else frame.numpy()
    pixels = np.asarray(frame)
    channels_first = pixels.ndim == 3 and pixels.shape[0] == 3 and pixels.shape[2] not in (1, 3, 4)
    rgb = pixels.transpose(1, 2, 0) if channels_first else pixels[..., None] if pixels.ndim == 2 else pixels
    kind = rgb.dtype.kind
    if rgb.ndim != 3 or rgb.shape[2] not in (1, 3, 4) or not rgb.size or kind not in "buif":
        what = f"{pixels.dtype} {list(pixels.shape)}" if pixels.ndim else f"of type {type(frame).__name__}"
        raise ValueError(f"the frame is {what}, an RGB frame is uint8 [height, width, 3]")
    most = 1 if kind in "bf" else 255
    if rgb.dtype != np.uint8 and not (rgb.min() >= 0 and rgb.max() <= most):  # or NaN
        what = f"{pixels.dtype} {list(pixels.shape)} with values outside 0 to {most}"
        raise ValueError(f"the frame is {what}, an RGB frame is uint8 [height, width, 3]")
    if kind in "bf":
        rgb = np.rint(rgb.astype(np.float32) * 255)
    return np.broadcast_to(rgb[:, :, :3], (*rgb.shape[:2], 3)).astype(np.uint8, copy=False)


class Camera:
    """Streams one episode's frames into an mp4 file; at most the first minute of it.

    ffmpeg is fed directly: gymnasium's RecordVideo, through moviepy, takes three times as long.
    Whatever goes wrong is one warning, and no film: no method raises.

    Args:
        path: the film; None films nothing. Its folder is made, and must not be a symbolic link.
    """

    def __init__(self, path: Path | None) -> None:
        self.path: Any = path  # never None where a film is made
        self.on = path is not None
        self.ffmpeg: Any = None  # the process, while it runs
        self.size = (0, 0)
        self.frames = 0
        self.set_rate(15.0)  # Atari: 60 frames a second, 4 to an action

    def set_rate(self, fps: Any) -> None:
        """`fps`: an environment's frames a second; 30 if it is no number from 1 to 1,000."""
        known = isinstance(fps, numbers.Real) and not isinstance(fps, bool) and 1 <= fps <= 1000  # type: ignore[operator]
        rate = float(fps) if known else 30.0
        self.stride = math.ceil(rate / 30)  # all of CartPole's 50 frames a second would double the price of a film
        self.fps = rate / self.stride

    def film(self, env_id: str) -> gym.Env:
        """An environment whose first episode is filmed."""
        try:
            # Without gymnasium's checker, which ends the first render of a `render_fps` that is not above 0.
            env = gym.make(env_id, render_mode="rgb_array", disable_env_checker=True)
        except (Exception, SystemExit) as error:
            self.fail(error)
            return gym.make(env_id)
        fps = None
        with contextlib.suppress(Exception):
            fps = env.metadata["render_fps"]
        self.set_rate(fps)
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
                self.size = rgb.shape[:2]
                self._start()
            if rgb.shape[:2] != self.size:
                raise ValueError(f"the frames change from {list(self.size)} to {list(rgb.shape[:2])} pixels")
            # Odd sizes cannot be yuv420p, the one format that all browsers play: the last row or column is doubled.
            rgb = np.pad(rgb, [(0, self.size[0] % 2), (0, self.size[1] % 2), (0, 0)], mode="edge")
            with self._fed() as pipe:
                pipe.write(np.ascontiguousarray(rgb).data)
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
            if self.on:
                with self._fed() as pipe:
                    pipe.close()
                    if self.ffmpeg.wait() != 0:
                        raise BrokenPipeError
                self.part.replace(self.path)
        except Exception as error:
            self.fail(error)
        finally:
            self._kill()
            with contextlib.suppress(OSError):
                self.ffmpeg.stdin.close()
            self.ffmpeg.wait()
            self.ffmpeg = None
            self.errors.close()
            with contextlib.suppress(OSError):
                self.part.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _fed(self) -> Iterator[IO[bytes]]:
        """ffmpeg's input. A pipe that breaks, or takes nothing for PATIENCE seconds, is an OSError that says why."""
        late = threading.Timer(PATIENCE, self._kill)
        late.start()
        try:
            yield self.ffmpeg.stdin
        except OSError as error:
            self.ffmpeg.wait()
            self.errors.seek(0)
            said = self.errors.read(10_000).decode(errors="replace").splitlines()
            said += [f"it took more than {PATIENCE:g} s"] if late.finished.is_set() else []
            raise OSError(": ".join([f"ffmpeg ended with code {self.ffmpeg.returncode}", *said[-1:]])) from error
        finally:
            late.cancel()

    def _kill(self) -> None:
        """Ends ffmpeg, where it has not ended, with the processes of a wrapper script, which would hold the pipe."""
        if self.ffmpeg.poll() is None:
            with contextlib.suppress(OSError):
                os.killpg(self.ffmpeg.pid, signal.SIGKILL) if hasattr(os, "killpg") else self.ffmpeg.kill()

    def _start(self) -> None:
        import imageio_ffmpeg

        if self.path.parent.is_symlink():
            raise ValueError(f"{self.path.parent} is a symbolic link, which is not followed")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.part = self.path.with_suffix(".part.mp4")
        self.part.unlink(missing_ok=True)  # a link there would be followed
        height, width = (n + n % 2 for n in self.size)
        rate = str(Fraction(self.fps).limit_denominator())
        raw = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", rate, "-i", "-"]
        film = ["-vcodec", "libx264", "-pix_fmt", "yuv420p", "-crf", "25", "-preset", "ultrafast"]
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115
        self.ffmpeg = subprocess.Popen(
            [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", *raw, *film, "-movflags", "+faststart", self.part],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=self.errors,
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
        result = self.env.reset(**kwargs)
        self._render()
        return result

    def step(self, action: Any) -> Any:
        result = self.env.step(action)
        self._render()
        return result

    def _render(self) -> None:
        if self.episode == 1 and self.camera.due():
            try:
                self.camera.take(self.env.render())
            except (Exception, SystemExit) as error:
                self.camera.fail(error)


def magnified(frame: np.ndarray) -> np.ndarray:
    """ALE's vector environment cannot render: an Atari game is filmed as the agent sees it, four times as large."""
    return frame.repeat(4, axis=0).repeat(4, axis=1)
