"""The `data` sections of text, as characters and as tokens."""

from __future__ import annotations

import dataclasses
import math
from abc import abstractmethod
from pathlib import Path
from typing import ClassVar, Literal, Self

import torch
from pydantic import Field
from typing_extensions import override

from ..common.fields import MOST_TOKENS, Int, Length, Share
from ..common.files import RUNS
from ..common.processing_files import TOKENIZER_SETTINGS, read_files
from ..common.tokenizer_file import TOKENIZER, same_ids, same_tokenizer, tokenizer_in
from .character_text import characters, python_topics
from .data_config import Batches, DataSection, FilesSection, register_data
from .dataset import BatchMaker, ExampleCount
from .text_batches import TextBatches, evaluation_chunks
from .text_codec import CharacterCodec, TextCodec, TokenCodec
from .text_data import TextChunks, TextData
from .token_text import (
    chat_prompt,
    corpus_tokenizer,
    corpus_tokenizer_path,
    encoded_split,
    end_token,
    load_tokenizer,
    split_files,
    start_token,
)


class TextSection(DataSection):
    """A text in examples of one length.

    Attributes:
        length: Characters or tokens of an example; examples overlap in training.
        train_limit: Characters or tokens to train on, the first of the train split; null takes all of it.
    """

    examples: ClassVar[str] = "characters"
    users: ClassVar[str] = "text models"
    of_text: ClassVar[bool] = True

    length: Length
    train_limit: Int | None = Field(default=None, ge=2, le=10**15)

    @abstractmethod
    def text(self, split: str) -> TextData:
        """Read the text of a split; see `load`."""

    @override
    def load(self, split: str) -> TextChunks:
        text = self.text(split)
        if split == "train" and self.train_limit is not None:
            if len(text) < self.train_limit:
                raise ValueError(
                    f"data.train_limit = {self.train_limit:,}: the train split has {len(text):,} {self.examples}; set "
                    "data.train_limit lower, or null it"
                )
            text = dataclasses.replace(text, ids=text.ids[: self.train_limit])
        return TextChunks(text, self.length)

    @override
    def batches(self, data: TextChunks, device: torch.device) -> BatchMaker:
        return TextBatches(data.text, data.length, device=device, placement=self.placement)

    @override
    def evaluation_batches(self, data: TextChunks, *, batch_size: int, device: torch.device) -> Batches:
        return evaluation_chunks(data.text, data.length, batch_size=batch_size, device=device)

    def codec(self) -> TextCodec:
        """What turns text into ids and back.

        Of `tokens` this reads the tokenizer, or trains it where it is not there yet, for which the train split must be
        at hand; with `data.tokenizer` no data are needed.

        Raises:
            FileNotFoundError, ValueError: what reading or training the tokenizer refuses.
        """
        return CharacterCodec()

    def chat_tokens(self, question: str) -> torch.Tensor:
        """The prompt of a chat that begins with a question, as the chat template beside the tokenizer writes it.

        Returns:
            Ids, int64 (n,), up to where the answer begins.

        Raises:
            ValueError: there is no chat template.
        """
        raise ValueError(
            f"--chat: data.kind: {self.kind} has no tokenizer, and so no chat template: use --prompt alone"
        )

    @override
    def example_bytes(self, shape: tuple[int, ...], num_classes: int) -> int:
        return math.prod(shape)  # uint8 characters


@register_data
class TopicsConfig(TextSection):
    """The language reference that CPython carries, in the 27 characters of text8: some 300,000; needs no download."""

    kind: Literal["topics"]

    @override
    def text(self, split: str) -> TextData:
        return python_topics(split)

    @override
    def count_examples(self) -> ExampleCount:
        return ExampleCount(len(self.load("train")), "")


class TextFilesSection(TextSection, FilesSection):
    """Texts in files.

    Attributes:
        split_files: Patterns of file names in a folder, by split; null: files named after the split, without backups.
    """

    split_files: dict[str, str] | None = None

    @override
    def _count(self, location: str, split: str) -> ExampleCount:
        if Path(location).is_dir():
            split_files(Path(location), split, self.split_files)
        return ExampleCount(None, "a plan does not read text")


@register_data
class TextConfig(TextFilesSection):
    """A text in the 27 characters of text8: a file, which is split by shares, or a folder with files for each split.

    Attributes:
        source: A text file (plain, .xz, .gz or .bz2), or a folder.
        folder: Name below the folder in DIFFUSIONBLOCKS_DATA, see kind `images`.
        fractions: Shares of train, valid and test, of a single file.
        cache: Folder for the text as ids, which are then mapped and not read into memory; null reads it at every start.
    """

    kind: Literal["text"]
    fractions: tuple[Share, Share, Share] = (0.9, 0.05, 0.05)
    cache: Path | None = None

    @override
    def text(self, split: str) -> TextData:
        return characters(
            self.location(),
            self.split_name(split),
            split_files=self.split_files,
            fractions=self.fractions,
            cache_dir=self.cache,
        )


@register_data
class TokensConfig(TextFilesSection):
    """A corpus as tokens, encoded once and then mapped: of a pretrained model's tokenizer, or of a byte-level BPE that
    is trained on the train split.

    Attributes:
        source: A folder with text files for each split (plain, .xz, .gz or .bz2).
        folder: Name below the folder in DIFFUSIONBLOCKS_DATA, see kind `images`.
        separator: What stands between documents within a file; null: a file is a document.
        special_tokens: Read special tokens in the text, such as chat markers, as their ids. Otherwise their letters are
            letters; those of `end` always are.
        start: Token before each document and prompt; null: none, but where `tokenizer` is left to a pretrained
            model the one that it puts there itself (Llama's `<s>`, Gemma's `<bos>`).
        end: Token after each document; null: <|endoftext|>, or where the tokenizer has none the `eos_token` of the
            tokenizer_config.json beside it.
        vocab_size: Tokens of the tokenizer that is trained, the end of a document among them.
        tokenizer: A ready tokenizer.json, which has a size of its own; null takes that of `model.pretrained`, or
            trains one where training starts afresh.
        train_characters: Characters of the train split, the first, on which the tokenizer is trained; null takes all.
        cache: Folder for the tokenizer and the ids; null: runs/tokens-<name of the folder>.
    """

    examples: ClassVar[str] = "tokens"
    users: ClassVar[str] = "autoregressive models"

    kind: Literal["tokens"]
    separator: str | None = Field(default=None, min_length=1)
    special_tokens: bool = False
    start: str | None = Field(default=None, min_length=1)
    end: str | None = Field(default=None, min_length=1)
    vocab_size: Int = Field(default=8192, ge=257, le=MOST_TOKENS)
    tokenizer: Path | None = None
    train_characters: Int | None = Field(default=None, ge=1, le=10**15)
    cache: Path | None = None

    @property
    def cache_folder(self) -> Path:
        """Where tokenizer and ids are kept."""
        return self.cache or RUNS / f"tokens-{self.folder or Path(str(self.source)).name}"

    @override
    def text(self, split: str) -> TextData:
        return self._encoded(split, self.train_limit if split == "train" else None)

    @override
    def load_first(self, split: str, count: int | None) -> TextChunks:
        if count is None or split == "train":
            return self.load(split)
        return TextChunks(self._encoded(split, count * self.length), self.length)

    def _encoded(self, split: str, limit: int | None) -> TextData:
        """The text of a split, or its first so many tokens."""
        name = self.split_name(split)
        files = split_files(Path(self.location()), name, self.split_files)
        file = self._tokenizer_file()
        text = encoded_split(
            files,
            load_tokenizer(file, self._end_token(file)),
            self.cache_folder,
            name,
            separator=self.separator,
            special_tokens=self.special_tokens,
            start=self.start,
            end=self._end_token(file),
            limit=limit,
            progress=True,
        )
        settings = read_files(file.parent, TOKENIZER_SETTINGS)
        return dataclasses.replace(text, processing={TOKENIZER: file.read_bytes(), **settings})

    @override
    def codec(self) -> TextCodec:
        file = self._tokenizer_file()
        end = self._end_token(file)
        return TokenCodec(load_tokenizer(file, end), self.start, end)

    @override
    def with_processing_of(self, folder: Path) -> Self:
        """With the tokenizer of a trained model, if it has one: then no corpus has to be read.

        Raises:
            ValueError: the section's own tokenizer (`tokenizer`, or the one trained on its corpus, where that is at
                hand and in the cache) is another one, or the file is no tokenizer.
        """
        theirs = tokenizer_in(folder)
        if theirs is None:
            return self
        own = self.tokenizer or self._trained_tokenizer()
        if own is not None and own.is_file() and not same_tokenizer(theirs, own):
            raise ValueError(
                f"{theirs}, which the model learned, and {own}, the recipe's own, are different tokenizers: give the "
                "recipe and the corpus that the model was trained with, or go by the model's: --set "
                f"data.tokenizer={theirs}"
            )
        return self.model_copy(update={"tokenizer": theirs})

    @override
    def of_pretrained(self, folder: Path | None) -> Self:
        theirs = None if folder is None else tokenizer_in(folder)
        if folder is None or (theirs is None and self.tokenizer is not None):
            return self
        if theirs is None:
            raise ValueError(
                f"model.pretrained = {folder} has no {TOKENIZER}, whose ids its weights know: name it, --set "
                f"data.tokenizer=FILE, or let transformers write it: AutoTokenizer.from_pretrained({str(folder)!r})"
                f".save_pretrained({str(folder)!r})"
            )
        if self.tokenizer is not None and self.tokenizer.is_file() and not same_ids(theirs, self.tokenizer):
            raise ValueError(
                f"data.tokenizer = {self.tokenizer} has other ids than {theirs}, which the weights know: leave it out"
            )
        if self.tokenizer is not None:
            return self
        return self.model_copy(update={"tokenizer": theirs, "start": self.start or start_token(theirs)})

    @override
    def chat_tokens(self, question: str) -> torch.Tensor:
        return chat_prompt(self._tokenizer_file(), question)

    def _end_token(self, tokenizer: Path) -> str:
        """The token that ends a document."""
        return self.end or end_token(tokenizer)

    def _trained_tokenizer(self) -> Path | None:
        """Where the tokenizer of the corpus is kept, or would be; None without a corpus."""
        try:
            return corpus_tokenizer_path(
                self._corpus(), self.vocab_size, self.cache_folder, limit=self.train_characters
            )
        except (FileNotFoundError, ValueError):  # of the corpus: whoever reads it is told why it cannot be
            return None

    def _tokenizer_file(self) -> Path:
        """The tokenizer, which is trained where it is not there yet."""
        if self.tokenizer is not None:
            return self.tokenizer
        files, limit = self._corpus(), self.train_characters
        corpus_tokenizer(files, self.vocab_size, self.cache_folder, limit=limit, progress=True)
        return corpus_tokenizer_path(files, self.vocab_size, self.cache_folder, limit=limit)

    def _corpus(self) -> list[Path]:
        return split_files(Path(self.location()), self.train_split, self.split_files)

    @override
    def example_bytes(self, shape: tuple[int, ...], num_classes: int) -> int:
        return math.prod(shape) * (2 if num_classes <= 1 << 16 else 4)  # uint16 or uint32, as `encoded_corpus` writes
