"""The processor: turns conversations and images into samples and batches, on the host.

Axis legend: T tokens.
"""

import dataclasses
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import PIL.Image

from vl2jax.common.errors import UserError
from vl2jax.config import VL2Config
from vl2jax.config.processor import ProcessorConfig
from vl2jax.processing import image as images_lib
from vl2jax.processing import prompt as prompt_lib
from vl2jax.processing.batch import TEXT, Batch
from vl2jax.processing.collate import Sample, collate
from vl2jax.processing.image_source import ImageSource
from vl2jax.processing.limits import Limits, TooLong, end_of_room
from vl2jax.processing.model_files import (
    check_sizes,
    check_vocabulary,
    read_settings,
    read_tokenizer,
)
from vl2jax.processing.prompt import Message, Piece
from vl2jax.processing.tokenizer import Tokenizer

# If a conversation has more images than this, none of them is tiled (DeepSeek-VL2, section 2).
MAX_TILED_IMAGES = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Processor:
    """Turns conversations and images into model inputs; the original's `DeepseekVLV2Processor`.

    Attributes:
      tokenizer: the tokenizer.
      settings: the processor settings.
      config: the architecture, which has the sizes of tiles and the length limit.

    Raises:
      UserError: settings, tokenizer and architecture do not fit together.
    """

    tokenizer: Tokenizer
    settings: ProcessorConfig
    config: VL2Config

    def __post_init__(self):
        check_sizes(self.settings, self.config)
        check_vocabulary(self.tokenizer, self.config)

    @classmethod
    def from_dir(cls, path: str | os.PathLike, config: VL2Config) -> "Processor":
        """Reads `processor_config.json` and the tokenizer of a model directory.

        Args:
          path: the model directory.
          config: the architecture.

        Raises:
          UserError: a file is missing or malformed, has an unsupported value, or does not fit the
            architecture.
        """
        path = pathlib.Path(path)
        settings = read_settings(path)
        return cls(tokenizer=read_tokenizer(path, settings), settings=settings, config=config)

    def __call__(
        self,
        conversation: Sequence,
        images: Sequence | None = None,
        *,
        inference: bool = True,
        mask_prompt: bool | None = None,
        sft_format: str | None = None,
        crop: bool | None = None,
        exif: bool = True,
    ) -> Batch:
        """Makes a batch of one conversation or of several.

        Args:
          conversation: a list of messages (see `prompt.read_conversation`), or a list of such
            lists.
          images: sources of the conversation's images, or a list of sources for each conversation;
            None: the messages name their images.
          inference: whether to drop the eos at the end, so that the model can continue.
          mask_prompt: whether only answers are targets; None: the setting.
          sft_format: chat format; None: the setting.
          crop: whether to tile images; None: if there are at most `MAX_TILED_IMAGES`.
          exif: whether to apply the EXIF orientation of image files.

        Returns:
          A `Batch` of numpy arrays, padded on the right to the longest conversation.

        Raises:
          UserError: a conversation is malformed or too long, an image cannot be loaded, or images
            and placeholders differ in number.
        """
        options = {
            "inference": inference,
            "mask_prompt": mask_prompt,
            "sft_format": sft_format,
            "crop": crop,
            "exif": exif,
        }
        first = conversation[0] if isinstance(conversation, list | tuple) and conversation else None
        if not isinstance(first, list | tuple):
            return self.collate([self.sample(conversation, images, **options)])
        if images is None:
            images = [None] * len(conversation)
        if len(images) != len(conversation):
            raise UserError(
                f"{len(conversation)} conversations and {len(images)} lists of images; give one"
                " list for each"
            )
        rows = zip(conversation, images, strict=True)
        return self.collate([self.sample(row, pictures, **options) for row, pictures in rows])

    def sample(
        self,
        conversation: Sequence[Mapping[str, Any]],
        images: Sequence[ImageSource] | None = None,
        *,
        inference: bool = True,
        mask_prompt: bool | None = None,
        sft_format: str | None = None,
        crop: bool | None = None,
        exif: bool = True,
        add_placeholders: bool = False,
        limits: Limits | None = None,
    ) -> Sample:
        """Makes a sample of one conversation.

        Args:
          conversation: a list of messages, see `prompt.read_conversation`.
          images: sources of the images; they replace those under the messages' "images", and are an
            error if an image part has its own source.  None: the messages name their images.
          inference, mask_prompt, sft_format, crop, exif: see `__call__`.
          add_placeholders: whether to put a placeholder for each of `images` before the text of the
            last message if it has none.
          limits: room for the sample; None: that of the model.

        Raises:
          UserError: as for `__call__`; `TooLong` if the sample has no room.
        """
        sft_format = self.settings.sft_format if sft_format is None else sft_format
        mask_prompt = self.settings.mask_prompt if mask_prompt is None else mask_prompt
        token = self.tokenizer.image_token
        if add_placeholders:
            *before, last = conversation
            content = prompt_lib.with_placeholders(last["content"], len(images or ()), token)
            conversation = [*before, {**last, "content": content}]
        messages, named = prompt_lib.read_conversation(
            conversation, sft_format=sft_format, image_token=token
        )
        pieces = prompt_lib.conversation_pieces(
            messages, sft_format=sft_format, mask_prompt=mask_prompt, image_token=token
        )
        sources = _choose_images(conversation, named, images)
        crop = len(sources) <= MAX_TILED_IMAGES if crop is None else crop
        if sft_format == "alignment" and len(sources) == _count(messages, token):
            # This format replaces each question by a single placeholder: keep the first images.
            sources = sources[: prompt_lib.count_placeholders(pieces)]
        display = prompt_lib.render_conversation(
            messages, sft_format=sft_format, eos_token=self.tokenizer.eos_token
        )
        return self._build(_without_eos(pieces, inference), sources, display, crop, exif, limits)

    def sample_prompt(
        self,
        prompt: str,
        images: Sequence[ImageSource] = (),
        *,
        apply_sft_format: bool = False,
        system_prompt: str = "",
        inference: bool = True,
        crop: bool | None = None,
        exif: bool = True,
        limits: Limits | None = None,
    ) -> Sample:
        """Makes a sample of one text.

        All its tokens except visual ones are targets, as in the original.

        Args:
          prompt: the text, with a placeholder for each image.
          images: sources of the images.
          apply_sft_format: whether to format the text as a question in the chat format.
          system_prompt: text before the question; only used by the `deepseek` format.
          inference, crop, exif: see `__call__`.
          limits: see `sample`.

        Raises:
          UserError: as for `sample`.
        """
        if apply_sft_format:
            prompt = prompt_lib.render_prompt(
                prompt, sft_format=self.settings.sft_format, system_prompt=system_prompt
            )
        pieces = prompt_lib.prompt_pieces(prompt, image_token=self.tokenizer.image_token)
        crop = len(images) <= MAX_TILED_IMAGES if crop is None else crop
        pieces = _without_eos(pieces, inference)
        return self._build(pieces, list(images), prompt, crop, exif, limits)

    def collate(
        self, samples: Sequence[Sample], length: int | None = None, tile_slots: int | None = None
    ) -> Batch:
        """Pads samples on the right and concatenates their tiles; see `collate.collate`.

        Args:
          samples: one sample per row.
          length: number of columns; None: the length of the longest sample.
          tile_slots: number of tile slots; None: the number of tiles.

        Returns:
          A `Batch` of numpy arrays.

        Raises:
          UserError: there is no sample, or the samples do not fit.
        """
        return collate(
            samples,
            pad_id=self.tokenizer.pad_id,
            tile_side=self.config.vision.image_size,
            tokens_per_tile=self.config.tokens_per_tile,
            length=length,
            tile_slots=tile_slots,
        )

    def _build(
        self,
        pieces: Sequence[Piece],
        sources: Sequence[ImageSource],
        display: str,
        crop: bool,
        exif: bool,
        limits: Limits | None,
    ) -> Sample:
        """Tokenizes the pieces, checks the length, then decodes one image after the other."""
        needed = prompt_lib.count_placeholders(pieces)
        if len(sources) != needed:
            raise UserError(
                f"{needed} {self.tokenizer.image_token} placeholders but {len(sources)} images;"
                " give one image for each placeholder, in order"
            )
        sizes = [images_lib.image_size(source, exif=exif) for source in sources]
        canvases = [self._canvas(size, crop) for size in sizes]
        side = self.config.vision.image_size
        grids = [(width // side, height // side) for width, height in canvases]
        tokens, index, mask, prompt_length = self._lay_out(pieces, grids)
        counts = [images_lib.image_tokens(*grid, tile_grid=self.config.tile_grid) for grid in grids]
        end, images = self._room(index, mask, grids, counts, limits)
        sources, sizes, canvases = sources[:images], sizes[:images], canvases[:images]
        return Sample(
            tokens=tokens[:end],
            image_index=index[:end],
            loss_mask=mask[:end],
            tiles=_decode(sources, sizes, canvases, side, exif),
            image_sizes=tuple(sizes),
            image_tiles=tuple(grids[:images]),
            image_tokens=tuple(counts[:images]),
            prompt_length=min(prompt_length, end),
            display=display,
            image_sources=tuple(sources),
            truncated=end < len(tokens),
        )

    def _room(
        self,
        index: np.ndarray,
        mask: np.ndarray,
        grids: Sequence[tuple[int, int]],
        counts: Sequence[int],
        limits: Limits | None,
    ) -> tuple[int, int]:
        """Numbers of tokens and images that are kept; raises TooLong if there is no room."""
        tiles = [1 + wide * high for wide, high in grids]
        if limits is None or not limits.truncate:
            self._check_length(len(index), grids, counts)
            if limits is not None:
                limits.check(len(index), sum(tiles))
            return len(index), len(grids)
        most = min(limits.length, self.config.decoder.max_position_embeddings)
        end, images = end_of_room(index, tiles, counts, dataclasses.replace(limits, length=most))
        if not mask[1:end].any() and mask[1:].any():
            raise TooLong(
                f"the sample has {len(index)} tokens, and nothing that is supervised is left when"
                f" it is cut to {end}; shorten its question or give fewer images"
            )
        return end, images

    def _canvas(self, size: tuple[int, int], crop: bool) -> tuple[int, int]:
        """Size of the local view: the best candidate resolution, or a single tile."""
        if crop:
            return images_lib.select_best_resolution(size, self.settings.candidate_resolutions)
        side = self.config.vision.image_size
        return side, side

    def _lay_out(
        self, pieces: Sequence[Piece], grids: Sequence[tuple[int, int]]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
        """Tokens int32[T], image index int32[T], loss mask bool[T], and the prompt length."""
        tokens: list[list[int]] = []
        index: list[np.ndarray] = []
        slot, remaining = 0, iter(grids)
        for piece in pieces:
            if piece.kind == "image":
                tiles_wide, tiles_high = next(remaining)
                rows = images_lib.image_layout(
                    tiles_wide,
                    tiles_high,
                    self.config.tile_grid,
                    first_slot=slot,
                    global_view_pos=self.config.global_view_pos,
                )
                slot += 1 + tiles_wide * tiles_high
                tokens.append([self.tokenizer.image_id] * len(rows))
            else:
                tokens.append(self._encode(piece))
                rows = np.full(len(tokens[-1]), TEXT, np.int32)
            index.append(rows)
        mask = np.repeat([piece.supervised for piece in pieces], [len(part) for part in tokens])
        prompt_length = sum(map(len, tokens[: _answer_start(pieces)]))
        flat = np.array([token for part in tokens for token in part], np.int32)
        return flat, np.concatenate(index), mask, prompt_length

    def _encode(self, piece: Piece) -> list[int]:
        if piece.kind == "bos":
            return [self.tokenizer.bos_id]
        if piece.kind == "eos":
            return [self.tokenizer.eos_id]
        return self.tokenizer.encode(piece.text)

    def _check_length(
        self, total: int, grids: Sequence[tuple[int, int]], counts: Sequence[int]
    ) -> None:
        limit = self.config.decoder.max_position_embeddings
        if total <= limit:
            return
        parts = [f"text {total - sum(counts)}"]
        for number, ((wide, high), count) in enumerate(zip(grids[:6], counts[:6], strict=True), 1):
            parts.append(f"image {number} {count} ({wide} x {high} tiles)")
        if len(counts) > 6:
            parts.append(f"{len(counts) - 6} more images {sum(counts[6:])}")
        single = images_lib.image_tokens(1, 1, self.config.tile_grid)
        fix = f"; without tiling an image takes {single}" if counts else ""
        raise TooLong(
            f"the prompt has {total} tokens, more than max_position_embeddings {limit}:"
            f" {', '.join(parts)}{fix}; shorten it or give fewer images"
        )


def _decode(
    sources: Sequence[ImageSource],
    sizes: Sequence[tuple[int, int]],
    canvases: Sequence[tuple[int, int]],
    side: int,
    exif: bool,
) -> np.ndarray:
    """The tiles of images, uint8[n, S, S, 3]; only one image is in memory at a time."""
    counts = [1 + width * height // side**2 for width, height in canvases]
    tiles = np.zeros((sum(counts), side, side, 3), np.uint8)
    first = 0
    for source, size, canvas, count in zip(sources, sizes, canvases, counts, strict=True):
        picture = images_lib.load_image(source, exif=exif)
        if picture.size != size:
            raise UserError(
                f"an image of {size[0]} x {size[1]} pixels has {picture.size[0]} x"
                f" {picture.size[1]} when it is decoded; get it again"
            )
        tiles[first : first + count] = images_lib.make_views(picture, canvas, side)
        first += count
    return tiles


def _choose_images(
    conversation: Sequence[Mapping[str, Any]], named: list[Any], images: Sequence | None
) -> list[Any]:
    """Images of a conversation: the given ones, else those that the messages name."""
    if images is None:
        if any(source is None for source in named):
            raise UserError("a part of type image has no source, and no images are given for it")
        return named
    if isinstance(images, str | bytes | os.PathLike | PIL.Image.Image):
        raise UserError("images must be a list of images, got a single one; put it into a list")
    parts = sum(not isinstance(message.get("content"), str | None) for message in conversation)
    if parts and any(source is not None for source in named):
        raise UserError(
            "images are given twice, as parts of the messages and as `images`; give them once"
        )
    return list(images)


def _count(messages: Sequence[Message], image_token: str) -> int:
    """Number of placeholders in the messages."""
    return sum(message.text.count(image_token) for message in messages)


def _answer_start(pieces: Sequence[Piece]) -> int:
    """Index of the piece with the answer at the end; number of pieces if there is none."""
    for number in range(max(0, len(pieces) - 2), len(pieces)):
        if pieces[number].kind == "answer":
            return number
    return len(pieces)


def _without_eos(pieces: list[Piece], inference: bool) -> list[Piece]:
    """Drops the eos at the end for inference."""
    return pieces[:-1] if inference and pieces[-1].kind == "eos" else pieces
