"""Models of the Hugging Face hub, by their names."""

from collections.abc import Sequence
from pathlib import Path

from klear_megatron.errors import UserError

_FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")


def local_model(path: Path, files: Sequence[str] = _FILES) -> Path:
    """The folder of a model: `path`, or if it is a name on the hub (owner/name), its snapshot in
    the cache, where it is downloaded first if needed and if there is a network.

    Args:
        files: patterns of the files that are needed.

    Raises:
        UserError: there is no such folder, and no such model can be had.
    """
    name = len(path.parts) == 2 and not path.is_absolute()
    if not name or path.exists() or Path(path.parts[0]).exists():
        return path
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(path), allow_patterns=list(files)))
    except Exception as error:  # the network's, the client's, and the hub's own errors
        said = " ".join(str(error).split())
        raise UserError(
            f"{path}: no such folder here, and no model of that name from the Hugging Face hub or "
            f"its cache: {said}"
        ) from error
