"""`python -m pretraining.report`; see `pretraining.report.command`."""

from pcfg.common.cli import run_main
from pretraining.report.command import main

run_main(main)
