"""The shards of a dataset, as training reads them."""

from pathlib import Path

from pcfg.artefacts import InputError
from pretraining.data.samples import Samples, read_samples, sample_paths
from pretraining.data.vocabulary import Vocabulary


class Shards:
    """Shards of one split in the order of their numbers, over and over.

    Args:
        folder: of the samples.
        split: "train" or "test".
        vocabulary: that the samples must have been made with.

    Raises:
        InputError: the folder has no such shards.
    """

    def __init__(self, folder, split: str, vocabulary: Vocabulary):
        self.paths = sample_paths(folder, split)
        if not self.paths:
            raise InputError(f"{folder}: has no {split}_shard_*.hdf5; make them with generate_samples.py")
        self.vocabulary = vocabulary
        self._newest: tuple[Path, Samples] | None = None

    def path(self, index: int) -> Path:
        """The file of shard `index`, counted beyond the last one."""
        return self.paths[index % len(self.paths)]

    def read(self, index: int) -> Samples:
        """The samples of `path(index)`.

        Raises:
            InputError: the file is damaged, or was made with another vocabulary.
        """
        path = self.path(index)
        if self._newest is None or self._newest[0] != path:
            samples = read_samples(path)
            if samples.attributes["vocab_sha256"] != self.vocabulary.sha256:
                raise InputError(
                    f"{path}: made with another vocabulary (hash {samples.attributes['vocab_sha256'][:12]}) than the "
                    f"tokenizer's ({self.vocabulary.size} entries, hash {self.vocabulary.sha256[:12]}); give "
                    "--tokenizer_name the one of the samples"
                )
            self._newest = (path, samples)
        return self._newest[1]
