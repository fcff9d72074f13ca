"""Recipes for data of one's own: read off the data what must be known of them, and write the rest with comments."""

from __future__ import annotations

import re
from pathlib import Path

from ..common.files import whole_file
from ..data.image_decoder import decode_image
from ..data.image_folder import class_folders, pack_images, pictures_in
from ..data.image_table import open_table
from ..data.split_files import TEXT_ENDINGS

_IMAGES = ("vit", "dit")

#: Examples of a step, where there are as many.
_BATCH = 32

_VIT = """\
model:
  type: ViTForImageClassification  # `diffusionblocks recipes vit/cifar100` is one at the paper's size
  config:
    hidden_size: 128
    num_hidden_layers: 6  # num_blocks must divide them
    num_attention_heads: 4
    intermediate_size: 256
    image_size: {size}
    patch_size: {patch}  # must divide image_size; smaller is slower and usually better
    num_channels: 3
    num_labels: {classes}
blocks:
  num_blocks: 3  # each has two of the layers, and trains in the memory of these
  overlap: 0.05
  noise: {{p_mean: 1.0}}  # higher levels than those that suit images: what is denoised is a label
"""
_DIT = """\
model:
  type: DiT  # `diffusionblocks recipes dit/cifar10` is one at the paper's size
  config:
    sample_size: {size}
    patch_size: {patch}  # must divide sample_size; smaller is slower and usually better
    in_channels: 3
    hidden_size: 128
    num_layers: 6  # num_blocks must divide them
    num_attention_heads: 4
    num_classes: {classes}
blocks:
  num_blocks: 3  # each has two of the layers, and trains in the memory of these
  overlap: 0.05
  target: {{kind: image, label_dropout: 0.1}}  # the share of images shown without their label, for guidance
"""
_IMAGE_DATA = """\
data:
  kind: images
  source: {source}
  test_split: {test}
  image_size: {size}
  num_classes: {classes}
  mean: [0.5, 0.5, 0.5]  # pixels to [-1, 1]
  std: [0.5, 0.5, 0.5]
  augment: {{flip: true}}  # mirror images; leave it out where left and right differ, as in text
"""
_MASKED = """\
model:
  type: MaskedTransformer  # `diffusionblocks recipes text/masked_text8` is one at the paper's size
  config:
    vocab_size: 27  # a to z and the space: other characters are left out, capitals made small
    sequence_length: 64
    embedding_size: 64
    hidden_size: 128
    num_layers: 6  # num_blocks must divide them
    num_attention_heads: 4
    mlp_size: 256
blocks:
  num_blocks: 3  # each has two of the layers, and trains in the memory of these
  overlap: 0.05
  noise: {{kind: masking, vocab_size: 27, schedule: linear}}
  target: {{kind: tokens, weight: elbo}}
"""
_LLAMA = """\
model:
  type: LlamaForCausalLM  # `diffusionblocks recipes text/autoregressive_prose` is one on tokens, at the paper's size
  config:
    vocab_size: 27  # a to z and the space: other characters are left out, capitals made small
    hidden_size: 128
    intermediate_size: 256
    num_hidden_layers: 6  # num_blocks must divide them
    num_attention_heads: 4
    num_key_value_heads: 4
    max_position_embeddings: 256
    tie_word_embeddings: false
blocks:
  num_blocks: 3  # each has two of the layers, and trains in the memory of these
  overlap: 0.1
  noise: {{p_mean: 1.0}}  # higher levels than those that suit images: what is denoised is a character
  target: {{kind: next-token, feedback: sampled}}
"""
_TEXT_DATA = """\
data:
  kind: text
  source: {source}
  length: 64  # characters of an example
"""
_TRAIN = """\
train:
  {length}  # of each block; `diffusionblocks train {name}.yaml --dry-run` says how long that takes
  batch_size: {batch}
  lr: 1.0e-3
  lr_schedule: cosine
  warmup_steps: 0  # some hundreds for a long training
  weight_decay: 0.03
  ema_decay: 0.99  # what is saved is a moving average of the weights
  log_every: 20
  checkpoint_seconds: 600  # an interrupted run goes on from the newest checkpoint
  # precision: bfloat16  # on a GPU, with the two below
  # compile: true
  # resident: active  # only the block that trains on the GPU, the others in host memory
"""
_EVALUATE = {
    "vit": "evaluate:\n  combine: [mean, chain]  # ways to combine what the blocks say\n  steps: [1, 3]\n",
    "dit": "evaluate:\n  samples: 64\n  steps: [20]\n  features: null  # `classifier` trains one, and measures a "
    "Frechet distance\n",
    "masked": "evaluate:\n  times: 1\n  samples: 8\n  steps: 64\n",
    "llama": "evaluate:\n  limit: 256  # test examples\n  samples: 8\n  prompt_length: 32\n  new_tokens: 64\n",
}
_MODELS = {"vit": _VIT, "dit": _DIT, "masked": _MASKED, "llama": _LLAMA}


def write_own_recipe(name: str, data: Path, *, model: str | None = None, size: int = 64) -> list[Path]:
    """Write `NAME.yaml` in the current folder; returns what is written, the recipe last.

    Args:
        name: of the run.
        data: a folder of parquet files, or of a folder of pictures for each class, which are packed into
            `NAME-images/`; a text file, or a folder of text files.
        model: `vit`, `dit`, `masked` or `llama`; None: the first that suits the data.
        size: height and width that pictures are brought to; parquet files have a size of their own.

    Raises:
        FileExistsError: the recipe is there, or the folder of packed pictures.
        FileNotFoundError, ValueError: no such data, data of no known kind, or a model that is not for them.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise ValueError(f"name {name!r}: letters, digits, '.', '_' or '-', the first a letter or digit")
    file, folder = Path(f"{name}.yaml"), Path(f"{name}-images")
    for path in (file, folder):
        if path.exists():
            raise FileExistsError(f"{path} exists, and is not overwritten: give another name, or move it away")
    if not data.exists():
        raise FileNotFoundError(f"{data} is missing: name a folder of images, or a text")
    parquet = data.is_dir() and any(data.glob("*.parquet"))
    pictures = data.is_dir() and not parquet and bool(class_folders(data))
    text = not parquet and not pictures and (data.is_file() or any(data.glob("*.txt*")))
    if not (parquet or pictures or text):
        fix = "; sort them into a folder for each class" if data.is_dir() and pictures_in(data) else ""
        raise ValueError(
            f"{data} holds {'pictures, but ' if fix else ''}neither parquet files, nor a folder of pictures for each "
            f"class, nor *.txt files{fix}"
        )
    if text and data.is_file() and not data.name.endswith(TEXT_ENDINGS):
        raise ValueError(f"{data}: a text is one of {', '.join(f'*{ending}' for ending in TEXT_ENDINGS)}")
    model = model or ("masked" if text else "vit")
    if (model in _IMAGES) == text:
        choices = " or ".join(name for name in _MODELS if (name in _IMAGES) != text)
        raise ValueError(f"--model {model} is not for {'text' if text else 'images'}: choose {choices}")
    files: list[Path] = []
    if text:
        values = {"source": _quoted(data), "name": name, "batch": str(_BATCH)}
        section = _TEXT_DATA
    else:
        if pictures:
            if size < 4 or size > 1024 or size % 4:
                raise ValueError(f"--size {size}: must be a multiple of 4, from 4 to 1024")
            pack_images(data, folder, size)
            files.append(folder)
            data = folder
        values, section = {**_facts_of(data), "name": name}, _IMAGE_DATA
    words = _MODELS[model] + section + _TRAIN + _EVALUATE[model]
    length = "steps: 500" if text else "epochs: 20"
    head = f"# {name}: written by `diffusionblocks init` for {data}. All fields: docs/recipes.md of diffusionblocks.\n"
    body = words.format(**values, length=length)
    with whole_file(file) as temporary:
        temporary.write_text(f"{head}name: {name}\n{body}", encoding="utf-8")
    return [*files, file]


def _facts_of(folder: Path) -> dict[str, str]:
    """Splits, size and classes of a folder of parquet files."""
    splits = ("test", "valid", "validation")
    test = next((split for split in splits if any(folder.glob(f"{split}*.parquet"))), None)
    if test is None:
        raise ValueError(
            f"{folder} has no {' or '.join(f'{split}*.parquet' for split in splits)}: hold some images out"
        )
    table = open_table(str(folder), "train", num_classes=None)
    row = next(iter(table))
    image = decode_image(row.encoded, row.where, 3)
    if image.width != image.height:
        raise ValueError(
            f"{row.where}: image is {image.width}x{image.height}: must be square, and all of one size; give the "
            "pictures as files, in a folder for each class, and they are cropped"
        )
    size = image.width
    patch = next((patch for patch in (8, 4, 2) if size % patch == 0 and size >= 8 * patch), None)
    patch = patch or next(patch for patch in (4, 2, 1) if size % patch == 0)
    return {
        "source": _quoted(folder),
        "test": test,
        "size": str(size),
        "patch": str(patch),
        "classes": str(len(table.class_names)),
        "batch": str(min(_BATCH, table.rows or _BATCH)),
    }


def _quoted(path: Path) -> str:
    """A path as YAML, absolute: a recipe is used from any folder."""
    return "'" + str(path.absolute()).replace("'", "''") + "'"
