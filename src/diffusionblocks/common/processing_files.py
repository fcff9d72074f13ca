"""The files beside a model's weights that say how its input is made: tokenizer, chat template, image processor.

They have the names that transformers gives them, so `AutoTokenizer` and `AutoImageProcessor` open the folder.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from .files import whole_file
from .tokenizer_file import TOKENIZER

#: what lies beside a `tokenizer.json`: its class and special tokens, and how a chat becomes text
TOKENIZER_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
#: how pictures are resized, cropped and normalised
IMAGE_PROCESSOR = "preprocessor_config.json"
PROCESSING_FILES = (TOKENIZER, *TOKENIZER_SETTINGS, IMAGE_PROCESSOR)


def read_files(folder: Path, names: Iterable[str] = PROCESSING_FILES) -> dict[str, bytes]:
    """The content of those of the named files that a folder has, by name."""
    return {name: (folder / name).read_bytes() for name in names if (folder / name).is_file()}


def write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Put files into a model's folder as they are, each through a temporary name.

    Args:
        folder: of the model.
        files: content by name.

    Raises:
        ValueError: a name that is none of `PROCESSING_FILES`.
    """
    if other := sorted(files.keys() - set(PROCESSING_FILES)):
        raise ValueError(f"{other[0]} does not belong beside a model; allowed: {', '.join(PROCESSING_FILES)}")
    for name, content in files.items():
        with whole_file(folder / name) as temporary:
            temporary.write_bytes(content)
