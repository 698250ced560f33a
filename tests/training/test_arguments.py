import shlex

import pytest

from pcfg.common.files import InputError
from pretraining.training import arguments as command_line

README = """
--model_type bert-mlm --tokenizer_name bert-large-uncased --hidden_act gelu --hidden_size 1024 --num_hidden_layers 16
--num_attention_heads 16 --intermediate_size 4096 --hidden_dropout_prob 0.1 --attention_probs_dropout_prob 0.1
--encoder_ln_mode pre-ln --lr 5e-4 --train_batch_size 4096 --train_micro_batch_size_per_gpu 1024 --lr_schedule time
--curve linear --warmup_proportion 0.20 --gradient_clipping 0.0 --optimizer_type adamw --weight_decay 0.01
--adam_beta1 0.9 --adam_beta2 0.98 --adam_eps 1e-6 --dataset_path {data} --output_dir OUT --print_steps 100
--num_epochs_between_checkpoints 100000 --job_name JOB --project_name PROJECT --validation_epochs 3
--validation_epochs_begin 1 --validation_epochs_end 1 --validation_begin_proportion 0.05
--validation_end_proportion 0.01 --validation_micro_batch 16 --deepspeed --data_loader_type dist --do_validation --fp16
"""


def parse(data, flags=""):
    options = command_line.build_parser("").parse_args([*shlex.split(README.format(data=data)), *shlex.split(flags)])
    command_line.check(options)
    return options


def test_the_readme_command_means_what_it_says(tmp_path):
    options = parse(tmp_path)
    assert (options.fp16, options.deepspeed, options.do_validation, options.bf16) == (True, True, True, False)
    assert options.total_training_time == options.early_exit_time_marker == 24.0
    assert options.adam_beta2 == 0.98 and options.validation_end_proportion == 0.01
    config = command_line.model_config(options, vocab_size=205, max_seq_length=32)
    assert (config.vocab_size, config.max_position_embeddings, config.num_hidden_layers) == (205, 32, 16)


def test_switches_take_values_as_hugging_face_parsers_do(tmp_path):
    assert not parse(tmp_path, "--fp16 false").fp16
    assert parse(tmp_path, "--use_early_stopping True").use_early_stopping


def test_the_job_folder_carries_the_run_id(tmp_path):
    assert str(command_line.job_folder(parse(tmp_path))) == "OUT/JOB"
    assert str(command_line.job_folder(parse(tmp_path, "--current_run_id 7"))) == "OUT/JOB-7"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--hidden_size 100", "--hidden_size: 100 is not a multiple of --num_attention_heads 16"),
        ("--bf16", "--fp16 and --bf16"),
        ("--lr_schedule step", "needs --max_steps"),
        ("--lr_schedule constant_step", "needs --max_steps"),
        ("--total_training_time 0", "--total_training_time"),
        ("--load_checkpoint_id step0000004", "--load_training_checkpoint"),
        ("--job_name a/b", "--job_name"),
        ("--job_name ..", "--job_name"),
        ("--job_name .hidden", "--job_name"),
        ("--current_run_id ../x", "--current_run_id"),
        ("--gradient_predivide_factor 0", "--gradient_predivide_factor"),
    ],
)
def test_refused_before_anything_starts(tmp_path, flags, message):
    with pytest.raises(InputError, match=message):
        parse(tmp_path, flags)


def test_a_missing_dataset_is_named():
    with pytest.raises(InputError, match="/nowhere/samples: no such folder"):
        parse("/nowhere/samples")


def test_accumulation_steps_must_agree_if_given(tmp_path):
    command_line.check_accumulation(parse(tmp_path, "--train_batch_size 4001"), 3)
    command_line.check_accumulation(parse(tmp_path, "--gradient_accumulation_steps 2"), 2)
    with pytest.raises(InputError, match="--gradient_accumulation_steps: 3, but --train_batch_size 4096"):
        command_line.check_accumulation(parse(tmp_path, "--gradient_accumulation_steps 3"), 1)


@pytest.mark.parametrize(
    "flags",
    [
        *("--lr -1", "--lr nan", "--save_steps 1,x", "--warmup_proportion 2", "--fp16 maybe"),
        *("--early_stop_eval_loss nan", "--adam_beta1 1", "--adam_beta2 1", "--sgd_momentum 1"),
    ],
)
def test_bad_values_are_argparse_errors(tmp_path, flags, capsys):
    with pytest.raises(SystemExit) as error:
        parse(tmp_path, flags)
    assert error.value.code == 2
    assert flags.split()[0] in capsys.readouterr().err


def test_help_is_grouped_by_purpose():
    text = command_line.build_parser("what it does").format_help()
    titles = "data:,model:,optimizer:,batches:,adversarial term:,duration,precision,validation:,output"
    for title in titles.split(","):
        assert f"\n{title}" in text


def test_every_argument_either_decides_or_is_known_not_to(tmp_path):
    assert vars(parse(tmp_path)).keys() >= command_line.WITHOUT_EFFECT
