import argparse
import csv
import shutil

import numpy as np
import pytest
import torch
from deepspeed.accelerator import get_accelerator

from pcfg.common.files import InputError, read_json
from pretraining.data.vocabulary import Vocabulary
from pretraining.model.bert import MaskedLM
from pretraining.model.checkpoints import load_model
from pretraining.model.config import ModelConfig
from pretraining.training import pretrain
from pretraining.training.adversarial import AdversarialTerm, ridge_validation_loss
from pretraining.training.metrics import read_metrics
from tests.training.conftest import NO_DROPOUT, PLAIN_SGD, assert_same_weights, crash_after_saving


@pytest.fixture
def term_flags(labelled):
    """Flags of a term of 20 sentences of the labelled file."""
    return lambda weight: f"--adversarial_weight {weight} --adversarial_file {labelled} --adversarial_batch_size 20"


@pytest.fixture
def make_term(labelled, tiny_data):
    """Makes the term of 20 sentences of the labelled file, or of another."""

    def make(path=labelled, size=20, positions=10):
        return AdversarialTerm(path, size, 1e-3, Vocabulary.read(tiny_data / "vocab.txt"), positions, 42)

    return make


def curve(job):
    return [(r["step"], r.get("loss"), r.get("adversarial_loss")) for r in read_metrics(job / "metrics.jsonl")]


def test_the_dual_solution_is_the_primal_one():
    rng = np.random.default_rng(0)
    features, validation = rng.normal(size=(6, 9)), rng.normal(size=(4, 9))
    targets, validation_targets = rng.normal(size=(6, 3)), rng.normal(size=(4, 3))
    phi, other = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (features, validation))
    head = np.linalg.solve(phi.T @ phi + 0.1 * np.eye(9), phi.T @ targets)
    expected = ((other @ head - validation_targets) ** 2).sum() / 4
    inputs = [torch.from_numpy(array).requires_grad_() for array in (features, targets, validation, validation_targets)]
    assert ridge_validation_loss(*inputs, 0.1).item() == pytest.approx(expected, rel=1e-12)
    assert torch.autograd.gradcheck(lambda *parts: ridge_validation_loss(*parts, 0.1), inputs)  # by finite differences


def test_a_head_that_predicts_nothing_costs_one_minus_one_over_classes():
    targets = torch.eye(4)[[0, 1, 3]] - 1 / 4
    loss = ridge_validation_loss(torch.eye(3, 9), targets, torch.eye(9)[5:8], targets, 1e-3)  # orthogonal to all it has seen
    assert loss.item() == pytest.approx(0.75, abs=1e-12)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_cannot_be_solved_is_nan_and_raises_nothing(value):
    rows, targets = torch.ones(4, 3), torch.eye(4)
    assert ridge_validation_loss(rows, targets, rows, targets, ridge=-1.0).isnan()  # not positive definite
    spoilt = rows.index_fill(0, torch.tensor([1]), value)
    assert ridge_validation_loss(spoilt, targets, rows, targets, 1e-3).isnan()
    assert ridge_validation_loss(rows, targets, spoilt, targets, 1e-3).isnan()


@pytest.mark.parametrize("mode", ["pre-ln", "post-ln"])
def test_the_term_and_its_gradient_are_those_of_the_naive_one(make_term, naive_adversarial, labelled, tiny_data, mode):
    torch.manual_seed(0)
    config = ModelConfig(13, 8, 2, 2, 16, max_position_embeddings=10, encoder_ln_mode=mode, initializer_range=0.3)
    model, term = MaskedLM(config).double().eval(), make_term()
    parameters = [parameter for name, parameter in model.named_parameters() if not name.startswith(("head", "decoder"))]
    for step in (0, 7):
        loss = term.loss(model, step)
        expected = naive_adversarial(model, labelled, tiny_data / "vocab.txt", term.rows(step))
        torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
        gradients = torch.autograd.grad(loss, parameters), torch.autograd.grad(expected, parameters)
        scale = max(gradient.abs().max() for gradient in gradients[1])
        for got, wanted in zip(*gradients, strict=True):
            torch.testing.assert_close(got, wanted, rtol=0, atol=1e-10 * scale)


def test_a_batch_has_no_sentence_twice_and_is_a_function_of_the_step(make_term, labelled):
    with open(labelled) as file:
        texts = [row["text"] for row in csv.DictReader(file)]
    assert len(set(texts)) < len(texts)  # the file has some
    term, seen = make_term(), dict.fromkeys(texts, 0)
    for step in range(400):
        batch = [texts[row] for row in term.rows(step)]
        assert len(set(batch)) == len(batch) == 20
        for text in batch:
            seen[text] += 1
    np.testing.assert_array_equal(term.rows(5), make_term().rows(5))
    assert (term.rows(5) != term.rows(6)).any()
    single = [n for text, n in seen.items() if texts.count(text) == 1]
    frequent = [n for text, n in seen.items() if texts.count(text) > 1]
    assert min(single) > 0 and np.mean(frequent) > 1.3 * np.mean(single)


def test_dropout_is_the_same_on_all_ranks(make_term):
    config = ModelConfig(13, 8, 1, 2, 16, max_position_embeddings=10)
    model, term = MaskedLM(config).train(), make_term()
    first = term.loss(model, 3)
    torch.manual_seed(1)  # another rank has drawn others
    assert term.loss(model, 3) == first
    assert term.loss(model.eval(), 3) != first


@pytest.mark.parametrize("flags", ["--zero_stage 0", "--zero_stage 1 --activation_checkpointing", "--zero_stage 2"])
def test_a_step_is_the_gradient_of_both(train, naive_total, relative_error, term_flags, flags):
    final = train(f"{PLAIN_SGD} {NO_DROPOUT} --max_steps 1 --save_steps 0 {flags} {term_flags(3)}")
    before = load_model(final.parent / "step0000000").train()
    loss, term = naive_total(before, batch_size=32, weight=3.0)
    (record,) = read_metrics(final.parent / "metrics.jsonl")
    assert record["loss"] == pytest.approx(loss, rel=1e-6)
    assert record["adversarial_loss"] == pytest.approx(term, rel=1e-5)
    assert relative_error(before, load_model(final)) < 1e-5


@pytest.mark.parametrize("arithmetic", ["bfloat16", "float16"])
def test_the_gradient_in_narrow_arithmetic(train, naive_total, relative_error, term_flags, monkeypatch, arithmetic):
    """On the CPU, with float16 instructions that are said to be there; the gradient of the term is most of it."""
    monkeypatch.setattr(pretrain, "precision", lambda *_: arithmetic)
    monkeypatch.setattr(type(get_accelerator()), "is_fp16_supported", lambda _: True)
    monkeypatch.setattr(type(get_accelerator()), "supported_dtypes", lambda _: [torch.float32, torch.float16, torch.bfloat16])
    flags = "--fp16" if arithmetic == "float16" else "--bf16"
    final = train(f"{PLAIN_SGD} {NO_DROPOUT} --max_steps 1 --save_steps 0 {flags} {term_flags(1)} --initializer_range 0.3")
    before = load_model(final.parent / "step0000000").train()
    _, term = naive_total(before, batch_size=32, weight=1.0)
    (record,) = read_metrics(final.parent / "metrics.jsonl")
    assert record["adversarial_loss"] == pytest.approx(term, rel=0.05)
    assert relative_error(before, load_model(final)) < 0.1


def test_a_weight_of_zero_changes_nothing(train, labelled):
    plain = train("", job="plain")
    zero = train(f"--adversarial_weight 0 --adversarial_file {labelled}", job="zero")
    assert_same_weights(plain, zero)
    assert curve(plain.parent) == curve(zero.parent)
    assert "adversarial" not in read_json(zero / "args.json")
    # the same run: both are finished, whichever asks
    arguments = read_json(zero / "args.json")["arguments"] | {"job_name": "plain"}
    assert pretrain.finished_model(argparse.Namespace(**arguments)) == plain


def test_a_resumed_run_is_the_undisturbed_one_bit_for_bit(train, term_flags, monkeypatch):
    flags = f"--save_steps 3,6 {term_flags(1)}"
    undisturbed = train(flags, job="undisturbed")
    assert [step for step, _, term in curve(undisturbed.parent) if 0 < term < 2] == list(range(1, 9))

    for _ in range(2):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            crash_after_saving(patch, 1)
            train(flags, job="killed")
    resumed = train(flags, job="killed")
    assert_same_weights(undisturbed, resumed)
    assert curve(undisturbed.parent) == curve(resumed.parent)


def test_the_term_goes_up(train, term_flags):
    """Against a run that only measures it: its weight is next to nothing."""
    last = {}
    for weight in (1e-9, 100):
        final = train(f"{NO_DROPOUT} --max_steps 40 {term_flags(weight)}", job=f"weight{weight}")
        last[weight] = np.mean([term for _, _, term in curve(final.parent)[-10:]])
    assert last[100] > last[1e-9] + 0.2


def test_a_term_that_is_not_finite_stops_the_run_at_that_step(train, term_flags, monkeypatch, tmp_path):
    loss = AdversarialTerm.loss
    monkeypatch.setattr(
        AdversarialTerm, "loss", lambda self, model, step: loss(self, model, step) * (1 if step < 4 else np.nan)
    )
    with pytest.raises(InputError, match=r"step 5 \(batch 4 of epoch 0\): the adversarial loss is nan; .* are kept"):
        train(f"--print_steps 100 --save_steps 2,5 {term_flags(1)}")
    assert [folder.name for folder in tmp_path.glob("job/step*")] == ["step0000002"]


def test_a_state_with_another_term_is_refused(train, labelled, tmp_path):
    other = tmp_path / "other.csv"
    other.write_text("".join(labelled.read_text().splitlines(keepends=True)[:-1]))
    flags = f"--max_steps 4 --adversarial_weight 1 --adversarial_file {tmp_path}/task.csv --adversarial_batch_size 20"
    shutil.copy(labelled, tmp_path / "task.csv")
    final = train(flags)
    assert read_json(final / "args.json")["adversarial"].keys() == {"name", "sha256"}
    for changed, message in (
        ("--adversarial_weight 2", "adversarial_weight was 1.0, now 2.0"),
        ("--adversarial_weight 0", "adversarial_weight was 1.0, now None"),
        ("--adversarial_ridge 1", "adversarial_ridge was 0.001, now 1.0"),
        ("--adversarial_batch_size 10", "adversarial_batch_size was 20, now 10"),
        (f"--adversarial_file {other}", "adversarial_file was "),
    ):
        with pytest.raises(InputError, match=message):
            train(f"{flags} {changed}")
    shutil.copy(other, tmp_path / "task.csv")
    with pytest.raises(InputError, match="doesn't fit this run: the SHA-256 of --adversarial_file was '.*', now '"):
        train(flags)
    # As with other arguments, a state can be gone on from by name.
    state = f"--load_training_checkpoint {final.parent}/training_state"
    assert train(f"{flags} {state} --max_steps 5 --adversarial_weight 2", job="second").name == "step0000005"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--adversarial_weight 1", "--adversarial_weight: 1, but of which task"),
        ("--adversarial_file {file}", "--adversarial_file: .*say with --adversarial_weight"),
        (
            "--adversarial_weight 1 --adversarial_file {file} --adversarial_batch_size 7",
            "--adversarial_batch_size: 7 has no halves",
        ),
        ("--adversarial_weight 1 --adversarial_file {file} --adversarial_ridge 0", "--adversarial_ridge: 0"),
        ("--adversarial_weight 1 --adversarial_file {file}.not", "csv.not: no such file"),
    ],
)
def test_flags_that_do_not_go_together(train, labelled, tmp_path, flags, message):
    with pytest.raises(InputError, match=message):
        train(flags.format(file=labelled))
    assert not (tmp_path / "job").exists()


@pytest.mark.parametrize("value", ["-1", "nan", "inf", "much"])
def test_weights_that_are_none(train, value, capsys):
    with pytest.raises(SystemExit):
        train(f"--adversarial_weight {value}")
    assert "--adversarial_weight" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["cat dog,1", "dog dog,1", "dog cat,1", "dog,1"], "all labels are 1; a task needs at least 2 classes"),
        (
            ["cat dog,1", "cat dog,1", "dog cat,0", "dog dog,0"],
            "has 3 distinct sentences, fewer than --adversarial_batch_size 4",
        ),
        (["cat dog,1", "cat dog,0", "dog cat,0"], "sentences 1 and 2 are the same, but their labels are 1 and 0"),
        (["cat dog,1", "cat cow,0"], "sentence 2: word 'cow' is not in the vocabulary"),
        (["cat dog,1", "dog" + " cat" * 8 + ",0"], "sentence 2 has 9 words.*samples of --max_seq_length 11 or more, not 10"),
        (["cat dog,1", "cat cat,x"], ":3: label 'x'; it must be an integer"),
        (["cat dog,1", "cat cat"], ":3: empty 'label'"),
    ],
)
def test_files_that_cannot_be_used(make_term, tmp_path, rows, message):
    path = tmp_path / "task.csv"
    path.write_text("\n".join(["text,label", *rows]) + "\n")
    with pytest.raises(InputError, match=message):
        make_term(path, size=4)
