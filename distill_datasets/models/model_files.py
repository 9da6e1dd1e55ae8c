"""The files of a local model."""

from hashlib import sha256
from pathlib import Path

from distill_datasets.errors import ModelError


def find_model(source: str) -> Path:
    """The folder of a local model: itself, or the Hub's copy on this disk.

    Raises `ModelError` where it is neither.
    """
    folder = Path(source).expanduser()
    if (folder / "config.json").is_file():
        return folder.resolve()
    if source.count("/") != 1 or folder.exists():
        raise ModelError(
            f"'embedded:{source}' is no model: expected a folder with config.json, weights and a "
            "tokenizer with a chat template, or a Hub id like org/name."
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(source))
    except (HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise ModelError(f"The Hub model {source!r} can't be fetched: {error}") from error


def digest_weights(folder: Path) -> str:
    """What tells two models of one name apart: weights and tokenizer, in 12 digits."""
    content = sha256()
    for path in sorted([*folder.glob("*.safetensors"), folder / "tokenizer.json"]):
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                content.update(block)
    return content.hexdigest()[:12]
