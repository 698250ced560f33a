import numpy as np
import pytest

from pretraining.data.tasks import read_task
from pretraining.evaluation.finetuning import FinetuningArguments
from pretraining.sources import examples


@pytest.mark.parametrize(("task", "pairs"), [("sst2", False), ("qnli", True)])
def test_labelled_files_are_a_glue_task_with_all_classes(tmp_path, task, pairs):
    folder = tmp_path / task
    examples.main([task, str(folder), "--documents", "20"])
    files = {f"{split}_file": str(folder / f"{split}.csv") for split in ("train", "validation")}
    data = read_task(FinetuningArguments(task_name=task, **files))
    for part in (data.train, data.validation):
        assert (part.pairs is not None) == pairs
        assert np.bincount(part.labels, minlength=2).min() > 3
