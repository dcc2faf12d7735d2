"""Sources whose images are files of their own: what an example says, and where its images lie, are two questions.

Whoever needs the annotations and no pixels reads no image (``data.sources.without_images``), and digests that are
remembered need none either (``data.remembered``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from vlbench.core.types import Example
from vlbench.data.images import read_file
from vlbench.data.sources import BaseSource


class OfFiles(BaseSource):
    """A source whose images are files. A reader adds the two methods in the place of ``__getitem__``."""

    def without_images(self, index: int) -> Example:
        """The example, its images left out."""
        raise NotImplementedError

    def image_files(self, index: int) -> Mapping[str, str]:
        """The files of its images: of ``image``, and of whatever key of ``extra`` holds another one."""
        raise NotImplementedError

    def __getitem__(self, index: int) -> Example:
        example = self.without_images(index)
        read = {part: self._image_bytes(file, example) for part, file in self.image_files(index).items()}
        return replace(example, image=read.pop("image", None), extra={**example.extra, **read})

    def _image_bytes(self, file: str, example: Example) -> bytes:
        return read_file(file)
