"""A small transformer as a large one: the same function, K times as wide, as deep or deeper.

    python enlarge.py --checkpoint-path SMALL --large-model-path LARGE --enlarged-model-path ENLARGED --time-enlarged K

A laptop's version, after scripts/quickstart.sh (its medium model has twice the width of the small one, and one more layer):

    python enlarge.py --checkpoint-path quickstart/models/small/step0001500 \\
        --large-model-path quickstart/models/medium/step0001500 --enlarged-model-path quickstart/models/small_as_medium

For several sizes in the parameters of the largest, repeat --checkpoint-path: each becomes a folder in ENLARGED.

The hidden vector is copied K times, h' = (h, .., h): matrices are tiled K x K and divided by K, vectors tiled (Liu et al. 2023,
section 4.3). The trace depends on --tied-scale, which args.json records. LARGE gives the shape only (its config.json): heads of
the same size or number, at least as many layers (pre-LN), feed-forward units and positions; its weights are not read. The
logits of the two models are compared before anything is written.
"""

if __name__ == "__main__":
    import pcfg.common.start  # noqa: F401  before libraries, whose import takes seconds

import argparse
import os
from pathlib import Path

from pcfg.common.cli import Parser, positive_int, run_main
from pcfg.common.files import InputError, atomic_folder
from pretraining.data.vocabulary import resolve_tokenizer
from pretraining.model.bert import MaskedLM
from pretraining.model.checkpoints import load_model, load_vocabulary, read_config, read_facts, save_model, weights_sha256
from pretraining.model.config import ModelConfig
from pretraining.model.enlarge import LOGIT_TOLERANCE, TIED_SCALES, Growth, enlarge, logit_differences


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__)
    files = parser.add_argument_group("folders")
    files.add_argument("--checkpoint-path", required=True, action="append", help="folder of a small model; may be repeated")
    files.add_argument("--large-model-path", required=True, help="folder of a model of the large shape")
    files.add_argument("--enlarged-model-path", required=True, help="folder to write; must not exist")
    rule = parser.add_argument_group("rule")
    text = "K: copies of the hidden vector (default: the ratio of the two widths; another number is an error)"
    rule.add_argument("--time-enlarged", type=positive_int, help=text)
    text = "what is divided by K, so that K copies of the hidden vector and of a word's row in the tied table keep its logit. "
    text += "tables: all embedding tables, as in the released code; head: the MLM head's LayerNorm (default: tables)"
    rule.add_argument("--tied-scale", choices=TIED_SCALES, default=TIED_SCALES[0], help=text)
    return parser


def folder_names(paths: list[str]) -> dict[str, Path]:
    """Paths below ENLARGED: a single checkpoint becomes ENLARGED, several keep their paths below their common folder."""
    if len(paths) == 1:
        return {paths[0]: Path()}
    resolved = {path: Path(path).resolve() for path in paths}
    common = os.path.commonpath(resolved.values())
    names = {path: folder.relative_to(common) for path, folder in resolved.items()}
    if len(names) < len(paths) or Path() in names.values() or len(set(names.values())) < len(names):
        raise InputError(f"--checkpoint-path: {', '.join(paths)}; give different folders, none inside another")
    return names


def grow(checkpoint: str, large_config: ModelConfig, times: int | None, tied_scale: str) -> tuple[MaskedLM, dict]:
    """The enlarged model and its `args.json`."""
    small = load_model(checkpoint)
    facts = read_facts(checkpoint)
    if "enlarged" in facts:
        raise InputError(f"--checkpoint-path {checkpoint}: was enlarged itself; enlarge the model it was made from")
    try:
        growth = Growth(small.config, large_config, tied_scale)
    except InputError as error:
        raise InputError(f"--checkpoint-path {checkpoint}: {error}") from None
    if times not in (None, growth.times):
        raise InputError(f"--time-enlarged {times}: the large model is {growth.times} times as wide as {checkpoint}")
    differences = logit_differences(small, growth)
    if not differences["float32"] <= LOGIT_TOLERANCE:  # also NaN
        raise InputError(
            f"--checkpoint-path {checkpoint}: the enlarged model's logits differ by {differences['float32']:.2e}, more than "
            f"{LOGIT_TOLERANCE:.0e} ({differences['epsilon']:.2e} by the LayerNorm's epsilon, which --tied-scale head leaves "
            "alone); nothing was written"
        )
    enlarged = enlarge(small, growth)
    facts["enlarged"] = {
        **growth.facts(),
        "from": {"weights_sha256": weights_sha256(checkpoint), "parameters": small.config.parameters},
        "logit_differences": differences,
    }
    facts["parameters"] = enlarged.config.parameters
    facts.pop("number_of_parameters", None)  # that of the small model, by the name in older folders
    return enlarged, facts


def main(arguments: list[str] | None = None) -> None:
    args = build_parser().parse_args(arguments)
    target = Path(args.enlarged_model_path)
    if target.exists():
        raise InputError(f"--enlarged-model-path {target}: exists already; give a new folder, nothing is overwritten")
    names = folder_names(args.checkpoint_path)
    large_config = read_config(args.large_model_path)
    with atomic_folder(target) as temporary:
        for checkpoint, name in names.items():
            enlarged, facts = grow(checkpoint, large_config, args.time_enlarged, args.tied_scale)
            tokenizer = resolve_tokenizer(checkpoint, [])
            save_model(temporary / name, enlarged, tokenizer, load_vocabulary(checkpoint), facts)
            differences = facts["enlarged"]["logit_differences"]
            print(
                f"{target / name}: {checkpoint} x {facts['enlarged']['times']}, {facts['parameters']:,} parameters, largest "
                f"difference of a logit {differences['float32']:.2e} (float64: {differences['float64']:.2e}, due to the "
                f"LayerNorm's epsilon: {differences['epsilon']:.2e})"
            )


if __name__ == "__main__":
    run_main(main)
