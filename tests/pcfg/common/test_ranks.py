import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pcfg.common import ranks
from pcfg.common.ranks import WIDE, use_threads

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize(
    ("width", "variables", "threads"),
    [
        (32, {}, 1),
        (WIDE, {}, 8),
        (WIDE, {"LOCAL_WORLD_SIZE": "2"}, 4),
        (WIDE, {"LOCAL_SIZE": "16"}, 1),
        (WIDE, {"LOCAL_WORLD_SIZE": "4", "SLURM_CPUS_ON_NODE": "32"}, 8),  # bound to its share by srun
        (WIDE, {"LOCAL_WORLD_SIZE": "4", "SLURM_CPUS_ON_NODE": "8"}, 2),  # not bound
        (32, {"LOCAL_WORLD_SIZE": "4", "SLURM_CPUS_ON_NODE": "32"}, 1),
        (32, {"OMP_NUM_THREADS": "3"}, 3),
        (WIDE, {"OMP_NUM_THREADS": "3,2", "LOCAL_WORLD_SIZE": "2"}, 3),
        (32, {"OMP_NUM_THREADS": "many"}, 1),
    ],
)
def test_threads_depend_on_the_command_and_the_machine_alone(monkeypatch, width, variables, threads):
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(ranks, "available_cores", lambda: 8)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    before = torch.get_num_threads()
    try:
        assert use_threads(width) == torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("own", "spins"), [({}, "some"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "ACTIVE"}, None)]
)
def test_threads_spin_for_a_short_time_unless_the_user_says_otherwise(own, spins):
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))} | own
    program = "import sys; import pcfg.common.start, os; print(os.environ.get('GOMP_SPINCOUNT'), 'torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    found, has_torch = run.stdout.split()
    assert has_torch == "False"
    assert int(found) < 300_000 if spins == "some" else found == str(spins)
