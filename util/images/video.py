"""Videos read as pictures, one after another, and written from pictures; few are in memory at once.

PyAV does both and includes FFmpeg. It is imported only when a video is opened.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import Any

from PIL import Image

from util.errors import UserError
from util.images.files import BadImageError

SUFFIXES = (
    ".mp4",
    ".mov",
    ".m4v",
    ".avi",
    ".mkv",
    ".webm",
    ".mpg",
    ".mpeg",
    ".wmv",
    ".flv",
    ".ts",
    ".mts",
    ".m2ts",
    ".3gp",
    ".ogv",
)
_UPRIGHT = {90: Image.Transpose.ROTATE_90, 180: Image.Transpose.ROTATE_180, 270: Image.Transpose.ROTATE_270}
# BT.709 and its limited range, which players assume by default
_BT709, _LIMITED = 1, 1


@dataclass(frozen=True)
class Frame:
    """A picture of a video, RGB, upright, and when it is shown, in seconds after the first."""

    picture: Image.Image
    seconds: Fraction


class VideoReader:
    """The frames of a video file, in order: `with VideoReader(path) as video: for frame in video:
    ...`

    Attributes:
        rate: frames a second, on average.
        num_frames: 0 if the file does not tell.
        pixel_aspect: width of a pixel by its height, of the upright picture; valid after the first
            frame.

    Raises:
        BadImageError: no video can be read from it; `otherwise` ends the remedy.
        UserError: PyAV is not installed.
    """

    def __init__(self, path: Path, otherwise: str = "or leave it out") -> None:
        self._av = _pyav(path)
        self._path, self._otherwise = path, otherwise
        try:
            self._container = self._av.open(str(path))
        except (OSError, self._av.error.FFmpegError, ValueError) as error:
            raise self._bad(f"can't be opened ({_reason(error)})") from None
        self._stream = stream = self._container.streams.best("video")
        if stream is None:
            self._container.close()
            raise self._bad("holds no pictures")
        stream.thread_type = "AUTO"
        self.rate = Fraction(stream.average_rate or stream.guessed_rate or 25)
        self.num_frames = stream.frames or self._from_duration()
        self.pixel_aspect = Fraction(1)

    def __enter__(self) -> VideoReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._container.close()

    def __iter__(self) -> Iterator[Frame]:
        # seconds are exact fractions, so that no frame moves by rounding
        first, last, count = None, Fraction(-1), 0
        try:
            for frame in self._container.decode(self._stream):
                # when it is shown; in broken files time stamps are missing, stand still or go back
                shown = count / self.rate
                if frame.pts is not None:
                    shown = frame.pts * frame.time_base
                first = shown if first is None else first
                seconds = shown - first
                if seconds <= last:
                    seconds = last + 1 / self.rate
                last, count = seconds, count + 1
                yield Frame(self._upright(frame), seconds)
        except self._av.error.FFmpegError as error:
            raise self._bad(f"can't be decoded after {count} frames ({_reason(error)})") from None
        if not count:
            raise self._bad("holds no pictures")

    def _upright(self, frame: Any) -> Image.Image:
        """Turned as the file says: telephones store the sensor's picture and how they were held."""
        # a quarter turn exchanges the sides of a pixel, too
        aspect = Fraction(self._stream.sample_aspect_ratio or 1)
        turn = frame.rotation % 360
        self.pixel_aspect = 1 / aspect if turn in (90, 270) else aspect
        picture = frame.to_image()
        return picture.transpose(_UPRIGHT[turn]) if turn in _UPRIGHT else picture

    def _from_duration(self) -> int:
        # of the stream if it is known, else of the file
        if self._stream.duration:
            return round(self._stream.duration * self._stream.time_base * self.rate)
        return round((self._container.duration or 0) / self._av.time_base * self.rate)

    def _bad(self, reason: str) -> BadImageError:
        return BadImageError(str(self._path), reason, f"replace the file, {self._otherwise}")


class VideoWriter:
    """An MP4 file of pictures of one size, each at its time.

    H.264, or VP9 if a side is odd, because H.264 needs even sides. After an error the file is closed
    as a whole video of the pictures so far.

    Raises:
        UserError: this FFmpeg lacks the encoder, or the file can't be written.
    """

    def __init__(
        self, path: Path, size: tuple[int, int], rate: Fraction, pixel_aspect: Fraction = Fraction(1)
    ) -> None:
        # codec
        self._av = av = _pyav(path)
        self._path, self._size = path, size
        codec, quality = "libx264", {"crf": "20"}
        if size[0] % 2 or size[1] % 2:
            codec = "libvpx-vp9"
            quality = {"crf": "30", "b": "0", "deadline": "realtime", "cpu-used": "5"}
        if codec not in av.codecs_available:
            raise self._failed(f": this FFmpeg has no {codec}; pip install av brings one that has")

        # file and stream
        try:
            self._container = av.open(str(path), "w", format="mp4")
        except (OSError, av.error.FFmpegError) as error:
            raise self._failed(f" ({_reason(error)})") from None
        self._stream = self._container.add_stream(codec, rate=rate, options=quality)
        context = self._stream.codec_context
        context.width, context.height, context.pix_fmt = *size, "yuv420p"
        context.time_base = self._time_base = Fraction(1, 90000)
        context.sample_aspect_ratio = pixel_aspect
        context.colorspace = context.color_primaries = context.color_trc = _BT709
        context.color_range = _LIMITED

    def add(self, picture: Image.Image, seconds: Fraction) -> None:
        """One more picture, shown `seconds` after the first; scaled if needed. Raises UserError."""
        frame = self._av.VideoFrame.from_image(picture).reformat(
            *self._size, "yuv420p", dst_colorspace=_BT709, dst_color_range=_LIMITED
        )
        # in units of the stream's time base
        frame.time_base = self._time_base
        frame.pts = round(seconds / frame.time_base)
        self._write(frame)

    def close(self) -> None:
        """Finish the file. Raises UserError if it can't be written."""
        # None: the encoder gives out the frames that it still holds
        try:
            self._write(None)
        finally:
            self._container.close()

    def _write(self, frame: Any) -> None:
        try:
            for packet in self._stream.encode(frame):
                self._container.mux(packet)
        except (OSError, self._av.error.FFmpegError) as error:
            raise self._failed(f" ({_reason(error)})") from None

    def _failed(self, why: str) -> UserError:
        return UserError(f"{self._path} can't be written{why}")


def _pyav(path: Path) -> ModuleType:
    try:
        import av
    except ImportError:
        raise UserError(f"{path} is a video, which needs the package av: pip install av") from None
    return av


def _reason(error: BaseException) -> str:
    return getattr(error, "strerror", None) or " ".join(str(error).split())
