"""A small transformer seen as a large one: the same function, K times as wide, as deep or deeper.

    python enlarge.py --checkpoint-path SMALL --large-model-path LARGE --enlarged-model-path ENLARGED --time-enlarged K

A laptop's version, after scripts/quickstart.sh (its medium model has twice the width of the small one, and a layer more):

    python enlarge.py --checkpoint-path quickstart/models/small/step0001500 \\
        --large-model-path quickstart/models/medium/step0001500 --enlarged-model-path quickstart/enlarged --time-enlarged 2

LARGE gives the shape only (its config.json); its weights are not read. The logits of the two models are compared before
anything is written (Liu et al. 2023: traces of different sizes are compared in one parameterisation).
"""

import argparse
from pathlib import Path

from pcfg.artefacts import InputError, read_json
from pcfg.cli import positive_int, run_main
from pretraining.data.vocabulary import resolve_tokenizer
from pretraining.model.checkpoints import (
    CONFIG_FILE,
    load_model,
    load_vocabulary,
    read_facts,
    save_model,
    weights_sha256,
)
from pretraining.model.config import ModelConfig
from pretraining.model.enlarge import LOGIT_TOLERANCE, enlarge, largest_logit_difference


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint-path", required=True, help="folder of the small model")
    parser.add_argument("--large-model-path", required=True, help="folder of a model of the large shape")
    parser.add_argument("--enlarged-model-path", required=True, help="folder to write; must not exist")
    parser.add_argument("--time-enlarged", type=positive_int, required=True, help="K: copies of the hidden vector")
    return parser


def main(arguments: list[str] | None = None) -> None:
    args = build_parser().parse_args(arguments)
    target = Path(args.enlarged_model_path)
    if target.exists():
        raise InputError(f"--enlarged-model-path {target}: exists already; give a new folder, nothing is overwritten")
    small = load_model(args.checkpoint_path)
    large_path = Path(args.large_model_path) / CONFIG_FILE
    large_config = ModelConfig.from_transformers(read_json(large_path), large_path)
    enlarged = enlarge(small, large_config, args.time_enlarged)
    difference = largest_logit_difference(small, enlarged)
    if not difference <= LOGIT_TOLERANCE:  # NaN, too
        raise InputError(
            f"--checkpoint-path {args.checkpoint_path}: the enlarged model's logits differ by {difference:.2e}, more than "
            f"{LOGIT_TOLERANCE:.0e}; nothing was written"
        )
    facts = read_facts(args.checkpoint_path)
    facts["enlarged_from"] = {"weights_sha256": weights_sha256(args.checkpoint_path), "times": args.time_enlarged}
    facts["tables"] = "tiled and divided by the number of copies"
    facts["parameters"] = enlarged.number_of_parameters()
    tokenizer = resolve_tokenizer(args.checkpoint_path, [])
    save_model(target, enlarged, tokenizer, load_vocabulary(args.checkpoint_path), facts)
    print(f"{target}: {facts['parameters']:,} parameters, largest difference of a logit {difference:.2e}")


if __name__ == "__main__":
    run_main(main)
