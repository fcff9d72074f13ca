#!/usr/bin/env bash
# load_state_dict(assign=True) unties tied weights when the state dict holds two equal copies, and training pulls them apart.
#
# Library: torch 2.13.0.
# Expected: a model whose head is its embedding stays so when weights are loaded; strict=True reports what does not fit.
# What happens: assign=True replaces each name by the tensor of that name. After a cast, a move or a clone of the entries (an EMA, or
#   float32 from bfloat16), the two names hold separate tensors, and the model has two parameters where it had one.
#   "All keys matched". One step later they differ; the parameter count and the optimizer's memory grow by the vocabulary.
#   assign=False keeps the tie.
# Why it matters: assign=True is the way to fill a model made on the meta device, so it is how blocks of a large transformer are loaded.
#   The target embedding must be one space for all blocks and for the head that reads it.
# Way round: tie again after loading (`head.weight = embedding.weight`; in transformers `model.tie_weights()`), and before
#   the optimizer is made.
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
"${PYTHON:-python3}" -m venv --without-pip "$dir/venv"
"${PYTHON:-python3}" -m pip --python "$dir/venv/bin/python" install --quiet --no-compile --disable-pip-version-check torch==2.13.0 numpy==2.4.6
"$dir/venv/bin/python" - <<'PY'
import torch
from torch import Tensor, nn

print("torch", torch.__version__)


class Tied(nn.Module):
    """An embedding that is its own head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(32, 8), nn.Linear(8, 32, bias=False)
        self.tie()

    def tie(self) -> None:
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.embedding(tokens))


torch.manual_seed(0)
saved = {name: tensor.to(torch.bfloat16) for name, tensor in Tied().state_dict().items()}
tokens, labels = torch.randint(32, (64,)), torch.randint(32, (64,))


def trained(assign: bool, tie_again: bool) -> tuple[int, float]:
    """Return the parameter count and how far head and embedding are apart after one step."""
    with torch.device("meta" if assign else "cpu"):
        model = Tied()
    keys = model.load_state_dict({name: tensor.float() for name, tensor in saved.items()}, strict=True, assign=assign)
    assert not keys.missing_keys and not keys.unexpected_keys
    if tie_again:
        model.tie()
    assert torch.equal(model.head.weight, model.embedding.weight)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    nn.functional.cross_entropy(model(tokens), labels).backward()
    optimizer.step()
    return sum(p.numel() for p in model.parameters()), (model.head.weight - model.embedding.weight).abs().max().item()


rows = {name: trained(*options) for name, options in {
    "assign=False": (False, False), "assign=True": (True, False), "assign=True, tied again": (True, True)
}.items()}
for name, (count, apart) in rows.items():
    print(f"{name:24s} {count} parameters, head and embedding {apart:.2f} apart after one step")
assert rows["assign=False"] == rows["assign=True, tied again"] == (256, 0.0)
assert rows["assign=True"][0] == 512 and rows["assign=True"][1] > 0.1
print("as described")
PY
