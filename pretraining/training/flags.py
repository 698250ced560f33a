"""The flags of `run_pretraining.py` by purpose: those of academic-budget-bert (Izsak et al. 2021) that mean something here.

What the values may be together is checked in `pretraining.training.arguments`.
"""

import argparse

from pcfg.common.cli import boolean, finite, non_negative, non_negative_int, positive_int, probability
from pretraining.model.config import ACTIVATIONS, ATTENTIONS, LAYER_NORM_MODES, LAYER_NORMS

OPTIMIZERS = ("adam", "adamw", "lamb", "adafactor", "sgd")


def decay(text: str) -> float:
    """An argparse type: a number in [0, 1), the weight of the past in a running mean."""
    value = float(text)
    if not 0.0 <= value < 1.0:
        raise argparse.ArgumentTypeError(f"{text} is not in [0, 1)")
    return value


def steps(text: str) -> list[int]:
    """An argparse type: a comma-separated list of steps.

    >>> steps("4000,0,1000")
    [0, 1000, 4000]
    """
    return sorted({non_negative_int(part) for part in text.split(",") if part.strip()})


def proportions(text: str) -> list[float]:
    """An argparse type: a comma-separated list of numbers in [0, 1].

    >>> proportions("0.5,0.25")
    [0.25, 0.5]
    """
    return sorted({probability(part) for part in text.split(",") if part.strip()})


def _switch(group, name: str, text: str) -> None:
    """A flag that may stand alone or be followed by true or false."""
    group.add_argument(f"--{name}", nargs="?", type=boolean, const=True, default=False, help=f"{text} (default: false)")


def _add_data(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("data")
    group.add_argument("--dataset_path", required=True, help="folder of train_shard_*.hdf5 from generate_samples.py")
    group.add_argument(
        "--tokenizer_name",
        required=True,
        help="tokenizer of the samples: the name they were made with, a folder, or a name on the hub",
    )
    group.add_argument(
        "--data_loader_type",
        choices=("dist", "per_device"),
        default="dist",
        help="accepted; both mean the same here: all ranks read the same files and take their own part",
    )
    _switch(
        group,
        "dynamic_masking",
        "new masks every time a training shard is read, by the rule that its file was made with: a function of (--seed, "
        "sample, epoch); generate_samples.py then needs no --dup_factor",
    )


def _add_model(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument("--model_type", choices=("bert-mlm",), default="bert-mlm", help="kind of model (default: bert-mlm)")
    group.add_argument(
        "--model_name_or_path",
        help="model folder, or a name on the hub, whose weights training begins with; the flags must say its shape (default: "
        "new weights, a function of --seed)",
    )
    group.add_argument("--hidden_size", type=positive_int, default=1024, help="width (default: 1024)")
    group.add_argument("--num_hidden_layers", type=positive_int, default=24, help="layers (default: 24)")
    group.add_argument("--num_attention_heads", type=positive_int, default=16, help="attention heads (default: 16)")
    group.add_argument(
        "--intermediate_size", type=positive_int, default=4096, help="width of the feed-forward layers (default: 4096)"
    )
    group.add_argument(
        "--hidden_act", choices=ACTIVATIONS, default="gelu", help="activation of the feed-forward layers (default: gelu)"
    )
    group.add_argument(
        "--hidden_dropout_prob", type=probability, default=0.1, help="dropout of embeddings and sub-layers (default: 0.1)"
    )
    group.add_argument(
        "--attention_probs_dropout_prob", type=probability, default=0.1, help="dropout of attention (default: 0.1)"
    )
    group.add_argument(
        "--max_position_embeddings",
        type=positive_int,
        help="positions, [CLS] and [SEP] included (default: max_seq_length of the samples)",
    )
    group.add_argument("--type_vocab_size", type=positive_int, default=2, help="rows of the segment table (default: 2)")
    group.add_argument(
        "--initializer_range", type=non_negative, default=0.02, help="standard deviation of new weights (default: 0.02)"
    )
    group.add_argument(
        "--encoder_ln_mode", choices=LAYER_NORM_MODES, default="pre-ln", help="where LayerNorm stands (default: pre-ln)"
    )
    group.add_argument("--layer_norm_type", choices=LAYER_NORMS, default="pytorch", help="kind of LayerNorm (default: pytorch)")
    group.add_argument("--attention", choices=ATTENTIONS, default="sdpa", help="attention backend (default: sdpa)")
    _switch(group, "layernorm_embedding", "accepted, changes nothing: the embeddings always have a LayerNorm")


def _add_optimizer(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("optimizer")
    group.add_argument("--optimizer_type", choices=OPTIMIZERS, default="adamw", help="default: adamw")
    group.add_argument("--lr", type=non_negative, default=1e-3, help="highest learning rate (default: 1e-3)")
    group.add_argument("--weight_decay", type=non_negative, default=0.01, help="of matrices only (default: 0.01)")
    group.add_argument("--adam_beta1", type=decay, default=0.9, help="adam, adamw, lamb (default: 0.9)")
    group.add_argument("--adam_beta2", type=decay, default=0.999, help="adam, adamw, lamb (default: 0.999)")
    group.add_argument("--adam_eps", type=non_negative, default=1e-6, help="adam, adamw, lamb (default: 1e-6)")
    group.add_argument("--sgd_momentum", type=decay, default=0.9, help="sgd (default: 0.9)")
    group.add_argument(
        "--gradient_clipping", type=non_negative, default=1.0, help="highest gradient norm; 0: no clipping (default: 1.0)"
    )


def _add_batches(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("batches")
    group.add_argument(
        "--train_batch_size", type=positive_int, default=4096, help="sentences a step, all ranks together (default: 4096)"
    )
    group.add_argument(
        "--train_micro_batch_size_per_gpu",
        type=positive_int,
        default=32,
        help="most sentences of a forward pass; sentences of like lengths are put together (default: 32)",
    )
    group.add_argument(
        "--gradient_accumulation_steps",
        type=positive_int,
        help="accepted; if given, train_batch_size must be train_micro_batch_size_per_gpu x ranks x this",
    )


def _add_adversarial(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "adversarial term",
        # The parser leaves descriptions as they are.
        "Features that are bad for a downstream task (Liu et al. 2023, App. A.4). A step minimises\n"
        "    masked-LM loss - L x mean over validation sentences of || phi W - y ||^2\n"
        "    where W minimises || Phi W - Y ||^2 + r || W ||^2 over the sentences that it is fitted on\n"
        "phi: last hidden states of all positions of the unmasked sentence, concatenated, of norm 1;\n"
        "y: one-hot label minus 1 / classes. The gradient goes through the features of both parts.",
    )
    group.add_argument(
        "--adversarial_weight", type=non_negative, help="L; 0: no term, and nothing else is different (default: no term)"
    )
    group.add_argument(
        "--adversarial_file", help="CSV file text,label of the task, from generate_downstream.py (needed where L is not 0)"
    )
    group.add_argument(
        "--adversarial_batch_size",
        type=positive_int,
        default=256,
        help="labelled sentences a step, all different and drawn anew from (--seed, step): half to fit W on, half to measure "
        "it on; every rank computes the term of all of them (default: 256)",
    )
    group.add_argument(
        "--adversarial_ridge",
        type=non_negative,
        default=1e-3,
        help="r, above 0; the smaller, the further the term can grow (default: 1e-3)",
    )


def _add_schedule(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("learning-rate schedule")
    group.add_argument(
        "--lr_schedule",
        choices=("step", "constant_step", "time"),
        default="time",
        help="what moves the schedule: step: steps of --max_steps, warmup by --warmup_proportion; constant_step: the same "
        "with a warmup of --num_warmup_steps; time: hours of --total_training_time (default: time)",
    )
    group.add_argument(
        "--curve",
        choices=("linear", "exp", "const"),
        default="linear",
        help="after the warmup: linear: to 0 at the end; exp: decay_rate^(steps or hours since the warmup / decay_step); "
        "const: --lr (default: linear)",
    )
    group.add_argument(
        "--warmup_proportion", type=probability, default=0.06, help="of the steps or hours (step, time; default: 0.06)"
    )
    group.add_argument("--num_warmup_steps", type=non_negative_int, default=1000, help="steps (constant_step; default: 1000)")
    group.add_argument("--decay_rate", type=probability, default=0.99, help="of --curve exp (default: 0.99)")
    group.add_argument(
        "--decay_step", type=positive_int, default=1000, help="of --curve exp, in steps or hours (default: 1000)"
    )


def _add_duration(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("duration (what comes first ends the run)")
    group.add_argument("--max_steps", type=positive_int, help="steps (default: no limit)")
    group.add_argument("--num_epochs", type=positive_int, default=1_000_000, help="epochs; one is a shard (default: 1000000)")
    group.add_argument("--max_steps_per_epoch", type=positive_int, help="steps of a shard (default: all)")
    group.add_argument("--total_training_time", type=non_negative, default=24.0, help="hours (default: 24)")
    group.add_argument(
        "--early_exit_time_marker", type=non_negative, default=24.0, help="hours, without effect on lr (default: 24)"
    )
    _switch(group, "use_early_stopping", "stop when --early_stop_time has passed with a high validation loss")
    group.add_argument("--early_stop_time", type=non_negative, default=720.0, help="minutes (default: 720)")
    group.add_argument("--early_stop_eval_loss", type=finite, default=2.1, help="nats (default: 2.1)")
    group.add_argument(
        "--scale_cnt_limit",
        type=positive_int,
        default=100,
        help="with --fp16: stop after this many steps at the lowest loss scale (default: 100)",
    )


def _add_precision(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("precision and DeepSpeed")
    _switch(
        group,
        "fp16",
        "float16 with a dynamic loss scale; on a CPU, with a warning, bf16 if it has instructions for it, else float32",
    )
    _switch(group, "bf16", "bfloat16 arithmetic on float32 weights")
    _switch(group, "deepspeed", "accepted; the engine is always DeepSpeed's")
    group.add_argument(
        "--zero_stage",
        type=int,
        choices=(0, 1, 2),
        default=0,
        help="what is split over ranks: 1: optimizer state, 2: gradients too (default: 0, nothing)",
    )
    _switch(group, "activation_checkpointing", "keep the layers' inputs only, compute the rest again: less memory, slower")
    _switch(group, "compile", "torch.compile for the layers (needs a C++ compiler; minutes at the start)")
    _switch(group, "prescale_gradients", "divide gradients by the number of ranks before they are added up")
    group.add_argument(
        "--gradient_predivide_factor", type=non_negative, help="divide gradients by this before they are added up"
    )
    _switch(group, "wall_clock_breakdown", "DeepSpeed's own timings")
    group.add_argument("--steps_per_print", type=positive_int, help="steps between DeepSpeed's own lines (default: none)")
    group.add_argument("--local_rank", type=int, default=-1, help="set by the launcher")
    group.add_argument("--seed", type=non_negative_int, default=42, help="of weights, order and dropout (default: 42)")


def _add_validation(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("validation")
    _switch(group, "do_validation", "loss on test_shard_*.hdf5, at ends of epochs and at the end")
    group.add_argument(
        "--validation_epochs", type=positive_int, default=10, help="epochs between two validations (default: 10)"
    )
    group.add_argument(
        "--validation_epochs_begin", type=positive_int, default=1, help="the same in the first part (default: 1)"
    )
    group.add_argument("--validation_epochs_end", type=positive_int, default=1, help="the same in the last part (default: 1)")
    group.add_argument(
        "--validation_begin_proportion", type=probability, default=0.1, help="of training: first part (default: 0.1)"
    )
    group.add_argument(
        "--validation_end_proportion", type=probability, default=0.1, help="of training: last part (default: 0.1)"
    )
    group.add_argument("--validation_micro_batch", type=positive_int, default=16, help="sentences a forward pass (default: 16)")
    group.add_argument(
        "--rule-path",
        dest="rule_path",
        help="the grammar of the samples: each validation measures the gap to the entropy too (default: none)",
    )
    group.add_argument(
        "--gap_sentences", type=positive_int, default=300, help="sentences that the gap is measured on (default: 300)"
    )
    group.add_argument(
        "--validation_shards", type=positive_int, default=1, help="test shards used, always the first (default: 1)"
    )


def _add_output(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("output and resuming")
    group.add_argument("--output_dir", required=True, help="everything goes to OUTPUT_DIR/JOB_NAME")
    group.add_argument("--job_name", default="pretraining_experiment", help="default: pretraining_experiment")
    group.add_argument("--current_run_id", default="", help="appended to the job's name (default: nothing)")
    group.add_argument(
        "--save_steps",
        type=steps,
        default=[],
        help="comma-separated steps at which a model folder is saved; 0: before the first step (default: only the end)",
    )
    group.add_argument(
        "--num_epochs_between_checkpoints",
        type=int,
        default=-1,
        help="a model folder every so many epochs; -1: none (default: -1)",
    )
    group.add_argument(
        "--finetune_time_markers",
        type=proportions,
        default=[],
        help="comma-separated parts of --total_training_time at which a model folder is saved (default: none)",
    )
    group.add_argument("--print_steps", type=positive_int, default=100, help="steps between two records (default: 100)")
    group.add_argument(
        "--log_throughput_every", type=positive_int, help="steps between two lines with the speed (default: none)"
    )
    group.add_argument("--project_name", help="record in Weights & Biases too, under this project (default: no)")
    group.add_argument(
        "--report_to", choices=("wandb", "none"), default="wandb", help="none: metrics.jsonl only (default: wandb)"
    )
    group.add_argument(
        "--config",
        help="args.json of a model folder: what the command line doesn't say is as it was in that run, --output_dir and "
        "--job_name too (default: none)",
    )
    group.add_argument(
        "--resume",
        choices=("auto", "never"),
        default="auto",
        help="auto: an interrupted run goes on from its newest whole training state; never: begin anew, with --overwrite "
        "where a run has been (default: auto)",
    )
    group.add_argument(
        "--load_training_checkpoint",
        help="a training_state folder to start from; own state of an interrupted run comes first (default: none)",
    )
    group.add_argument("--load_checkpoint_id", help="which state of that folder (default: the latest)")
    group.add_argument("--keep_checkpoints", type=positive_int, default=2, help="training states kept (default: 2)")
    _switch(group, "overwrite", "delete what another run left in OUTPUT_DIR/JOB_NAME")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add all groups to `parser`."""
    for add in (
        *(_add_data, _add_model, _add_optimizer, _add_batches, _add_adversarial, _add_schedule, _add_duration),
        *(_add_precision, _add_validation, _add_output),
    ):
        add(parser)
