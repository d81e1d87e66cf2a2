"""Rows of images with their text: where they lie, and an image opened within bounds. Pillow is imported only here.

An image is a stranger's file. Only what is plainly an image is opened, by no reader that starts another program, and no
more pixels of it than `MOST_PIXELS`.
"""

import base64
import binascii
import hashlib
import io
import math
import random
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_nullspace.checkpoint.header import opened
from pytest_nullspace.errors import CheckpointError, TextError, first_line

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
"""What a file is called that holds an image."""
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
MOST_PIXELS = 1024**3 // 4 // 3
"""Of one image, as Pillow's own bound; what is larger may be a small file that fills all memory."""
MOST_BYTES = 1 << 28
"""Of the file of one image."""
_ORIENTATION = 0x0112


@dataclass(frozen=True)
class Picture:
    """One image, not yet read.

    Attributes:
        held: Its file, or its bytes.
        where: Where it lies, in words.
    """

    held: Path | bytes
    where: str

    def data(self) -> bytes:
        """The bytes of its file.

        Raises:
            TextError: It is missing, cannot be read, or is too large.
        """
        if isinstance(self.held, bytes):
            return self.held
        try:
            with opened(self.held, "the image") as (stream, status):
                if status.st_size > MOST_BYTES:
                    raise TextError(f"{self.where}: has {status.st_size:,} bytes; at most {MOST_BYTES:,} are read")
                return stream.read(MOST_BYTES)
        except CheckpointError as error:
            raise TextError(f"{self.where}: {error}") from None

    def image(self) -> "Image":
        """It, read to its end, turned as its camera says.

        Raises:
            TextError: It is no image, a truncated one, or one of too many pixels.
        """
        from PIL import Image, ImageOps

        with self._told(), warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(self.data()), formats=_FORMATS) as image:
                if image.width * image.height > MOST_PIXELS:
                    raise TextError(
                        f"{self.where}: has {image.width:,} x {image.height:,} pixels; at most {MOST_PIXELS:,} are "
                        "read; scale it down"
                    )
                image.load()
                if image.getexif().get(_ORIENTATION) is not None:
                    return ImageOps.exif_transpose(image)
                return image.copy()

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Say of which image it is what Pillow, which raises many kinds of errors, cannot read."""
        from PIL import Image, UnidentifiedImageError

        try:
            yield
        except TextError:
            raise
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise TextError(f"{self.where}: {first_line(error)}; scale it down") from None
        except UnidentifiedImageError:
            kinds = ", ".join(_FORMATS)
            raise TextError(f"{self.where}: no image that is read ({kinds}); replace or remove it") from None
        except Exception as error:
            raise TextError(f"{self.where}: not a whole image: {first_line(error)}; replace or remove it") from error


@dataclass(frozen=True)
class Row:
    """A text, or a conversation, and the images that stand in it.

    Attributes:
        text: Its text, which may be empty; of a conversation what a chat template wrote of it, or nothing until then.
        pictures: Its images, in order; there may be none.
        where: Where it stands, in words.
        talk: The conversation, as `pytest_nullspace.text.conversations` keeps one; empty where it is a text.
    """

    text: str
    pictures: tuple[Picture, ...]
    where: str
    talk: str = ""


@dataclass(frozen=True)
class Images:
    """What stands in place of a text where rows hold images: each of them is a window.

    Attributes:
        source: What was given.
        rows: All of them.
    """

    source: str
    rows: tuple[Row, ...]

    @property
    def are_talks(self) -> bool:
        """Whether they are conversations."""
        return bool(self.rows[0].talk)

    def drawn(self, count: int, seed: int) -> Sequence[int]:
        """The numbers of ``count`` rows, each at most once; in the order in which they are read."""
        if count >= len(self.rows):
            return range(len(self.rows))
        return random.Random(seed).sample(range(len(self.rows)), count)

    def count(self, numbers: Iterable[int]) -> int:
        """How many images the rows of these numbers have."""
        return sum(len(self.rows[number].pictures) for number in numbers)

    def sha256(self) -> str:
        """A digest of the text and the image files of all rows, in hexadecimal."""
        digest = hashlib.sha256()
        for row in self.rows:
            for part in (
                (row.talk or row.text).encode("utf-8", "surrogatepass"),
                *(picture.data() for picture in row.pictures),
            ):
                digest.update(len(part).to_bytes(8, "little") + part)
            digest.update(b"\xff" * 8)
        return digest.hexdigest()


def require_pillow(images: Images) -> None:
    """Refuse images where what reads them is not installed.

    Raises:
        TextError: It is so.
    """
    try:
        import PIL.Image  # noqa: F401
    except ImportError:
        raise TextError(
            f"{images.source}: holds images, and Pillow, which reads them, is not installed; pip install "
            "'pytest-nullspace[images]', or name the column of the text to read that alone"
        ) from None


def pictures_of(value: Any, folder: Path | None, where: str) -> tuple[Picture, ...]:
    """The images that a cell of a table holds: a path, bytes, a struct of both, or a list of these.

    Args:
        value: The cell.
        folder: In which its paths lie; None where none can.
        where: The cell, in words.

    Raises:
        TextError: It holds something else, or a path that leads out of ``folder``.
    """
    match value:
        case None:
            return ()
        case list() | tuple():
            return tuple(picture for item in value for picture in pictures_of(item, folder, where))
        case bytes():
            return (Picture(value, where),)
        case {"bytes": bytes(data)}:
            return (Picture(data, where),)
        case str(name) if name.startswith("data:"):
            return (Picture(_written(name, where), where),)
        case {"path": str(name)} | str(name):
            return (Picture(_inside(name, folder, where), f"{where}, {name}"),)
        case _:
            kind = type(value).__name__
            raise TextError(f"{where}: holds {kind}, neither an image's path nor its bytes; name another column")


def _written(uri: str, where: str) -> bytes:
    """The bytes of an image that is written out as base64."""
    try:
        return base64.b64decode(uri.partition(",")[2], validate=True)
    except (binascii.Error, ValueError) as error:
        raise TextError(f"{where}: an image written out as text is no base64: {first_line(error)}") from None


def _inside(name: str, folder: Path | None, where: str) -> Path:
    if folder is None or "://" in name:
        raise TextError(
            f"{where}: {name!r} is not at hand, and nothing is fetched; save the images' bytes with the rows"
        )
    path = folder / name
    if Path(name).is_absolute() or not path.resolve().is_relative_to(folder.resolve()):
        raise TextError(f"{where}: {name!r} leads out of {folder}; put the images beside the file, or below")
    return path


@contextmanager
def bounded(where: str) -> Iterator[None]:
    """Within this context images, and the tiles into which they are cut, become no more than `MOST_PIXELS`.

    Every backend comes to its sizes in its own way, and all of them have Pillow or torchvision do it.
    """
    from PIL import Image

    beside: Any = sys.modules.get("torchvision.transforms.v2.functional")
    pixels, resize = 0, Image.Image.resize

    def count(width: int, height: int, of: int = 1) -> None:
        nonlocal pixels
        pixels += width * height * of
        if pixels > MOST_PIXELS:
            raise TextError(
                f"{where}: the model's processor would make {width:,} x {height:,} pixels of an image; give an image "
                "of another shape, or the processor that was saved with the model"
            )

    def by_pillow(image: Any, size: Any, *args: Any, **how: Any) -> Any:
        count(*size)
        return resize(image, size, *args, **how)

    def by_torchvision(image: Any, size: Any, *args: Any, **how: Any) -> Any:
        sides = [size] if isinstance(size, int) else list(size or ())
        if len(sides) == 1:  # the shorter one
            short, long = sorted(image.shape[-2:])
            sides.append(sides[0] * long // short)
        if sides:
            count(sides[1], sides[0], math.prod(image.shape[:-3]))
        return real(image, size, *args, **how)

    Image.Image.resize = by_pillow  # type: ignore[method-assign, assignment]
    if beside is not None:
        real, beside.resize = beside.resize, by_torchvision
    try:
        yield
    finally:
        Image.Image.resize = resize  # type: ignore[method-assign]
        if beside is not None:
            beside.resize = real
