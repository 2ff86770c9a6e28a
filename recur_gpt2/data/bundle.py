"""What commands name in their help and their defaults: known without PyTorch, whose import takes seconds."""

from pathlib import Path

# The models and texts that come with the project: inside the package where it was installed from a wheel, beside it in
# a clone.
_PACKAGE = Path(__file__).resolve().parents[1]
BUNDLED = _PACKAGE / "bundled" if (_PACKAGE / "bundled").is_dir() else _PACKAGE.parent / "data"
BUNDLED_MODEL = BUNDLED / "gpt2-mini"
BUNDLED_RECURRENT = BUNDLED / "recur-gpt2-mini"

# Of embedding, chosen by measurement (docs/embedding.md).
POOLINGS = ("mean", "last", "memory", "mean+memory")
POOLING = "mean"  # of documents: over a layer two thirds of the way up
BATCH_TOKENS = 2048  # read at once: as fast as more on a CPU; a GPU wants more
