"""Several pre-training runs in one launch, for tests: torchrun's processes each take a JSON list of command lines."""

import json
import sys

import run_pretraining

if __name__ == "__main__":
    for arguments in json.loads(sys.argv[1]):
        run_pretraining.main(arguments)
