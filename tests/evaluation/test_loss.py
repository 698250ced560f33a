import numpy as np
import pytest
import torch

from pcfg.artefacts import InputError
from pcfg.grammar import Grammar
from pcfg.lookup import LookupTable, main
from pcfg.means import mean_by_pairs, mean_by_sentences
from pcfg.text import read_texts
from pretraining.evaluation.contexts import from_texts
from pretraining.evaluation.loss import measure_loss
from pretraining.model.checkpoints import load_model, load_vocabulary


@pytest.fixture(scope="module")
def measured(tiny_rules, tiny_data, tiny_model):
    """Model, vocabulary, 40 sentences, their contexts, table and columns."""
    texts = read_texts(tiny_data / "test0.txt")[:40]
    vocabulary = load_vocabulary(tiny_model)
    table = LookupTable.compute(Grammar.read(tiny_rules), texts, "test0.txt")
    columns = np.array([vocabulary.ids[word] for word in table.words])
    return load_model(tiny_model), vocabulary, texts, from_texts(texts, vocabulary, "test0.txt"), table, columns


@torch.no_grad()
def naive_losses(model, vocabulary, texts, table):
    """Per sentence lists of (loss, entropy, sampled loss), one position and one word at a time, without padding."""
    sentences, row = [], 0
    for number, text in enumerate(texts):
        words, facts = text.split(), []
        ids = [vocabulary.cls_id, *(vocabulary.ids[word] for word in words), vocabulary.sep_id]
        conditionals = table.conditionals(number, number + 1)
        for t, word in enumerate(words):
            masked = [*ids[: t + 1], vocabulary.mask_id, *ids[t + 2 :]]
            log_f = model.predict(model.encode(torch.tensor([masked]))[0, t + 1]).double().log_softmax(-1)
            loss = entropy = 0.0
            for candidate, probability in zip(table.words, conditionals[t], strict=True):
                loss -= probability * log_f[vocabulary.ids[candidate]].item()
                entropy -= probability * np.log(probability) if probability > 0 else 0.0
            facts.append((loss, entropy, -log_f[vocabulary.ids[word]].item()))
            row += 1
        sentences.append(facts)
    return sentences


@pytest.mark.parametrize("batch_size", [1, 7, 1000])
def test_against_a_naive_loop(measured, batch_size):
    model, vocabulary, texts, contexts, table, columns = measured
    details = measure_loss(model, contexts, table, columns, batch_size)
    naive = naive_losses(model, vocabulary, texts, table)
    pairs = np.array([fact for facts in naive for fact in facts]).mean(0)
    sentences = np.array([np.mean(facts, 0) for facts in naive])
    for kind, mean in (("pairs", pairs), ("sentences", sentences.mean(0))):
        assert details["loss"][kind]["mean"] == pytest.approx(mean[0], abs=1e-5)
        assert details["entropy"][kind]["mean"] == pytest.approx(mean[1], abs=1e-6)
        assert details["sampled_loss"][kind]["mean"] == pytest.approx(mean[2], abs=1e-5)
        assert details["gap"][kind]["mean"] == pytest.approx(mean[0] - mean[1], abs=1e-5)
    error = (sentences[:, 0] - sentences[:, 1]).std(ddof=1) / np.sqrt(len(texts))
    assert details["gap"]["sentences"]["standard_error"] == pytest.approx(error, rel=1e-3)
    assert details["contexts"] == sum(map(len, naive)) and details["sentences"] == 40


def test_the_true_distribution_has_no_gap(measured):
    """A "model" that answers with the table's own conditionals: gap 0, loss = entropy."""
    model, vocabulary, _, contexts, table, columns = measured
    rows = table.conditionals(0, 40)

    class Truth(torch.nn.Module):
        config = model.config
        order = iter(contexts.batches(16))

        def __init__(self):
            super().__init__()
            self.unused = torch.nn.Parameter(torch.zeros(1))

        def forward(self, *_):
            chosen = next(self.order)
            logits = np.full((len(chosen), vocabulary.size), -np.inf)
            with np.errstate(divide="ignore"):
                logits[:, columns] = np.log(rows[chosen])
            return torch.from_numpy(np.maximum(logits, -1e30))

    details = measure_loss(Truth(), contexts, table, columns, 16)
    assert details["gap"]["pairs"]["mean"] == pytest.approx(0.0, abs=1e-12)
    assert details["loss"]["pairs"]["mean"] == pytest.approx(details["entropy"]["pairs"]["mean"], abs=1e-12)


def test_sampled_and_exact_loss_agree_on_the_languages_own_text(measured, tiny_rules, tiny_data):
    model, vocabulary, *_ = measured
    texts = [text for name in ("training0.txt", "training1.txt") for text in read_texts(tiny_data / name)]
    table = LookupTable.compute(Grammar.read(tiny_rules), texts, "training")
    columns = np.array([vocabulary.ids[word] for word in table.words])
    details = measure_loss(model, from_texts(texts, vocabulary, "training"), table, columns)
    difference = details["sampled_minus_exact"]["pairs"]
    assert 0 < difference["standard_error"] < 0.2
    assert abs(difference["mean"]) < 4 * difference["standard_error"]


def test_sentences_too_long_for_the_model(measured):
    model, vocabulary, *_ = measured
    contexts = from_texts(["cat dog cat dog cat dog cat dog cat"], vocabulary, "long.txt")
    with pytest.raises(InputError, match="long.txt: its longest sentence has 11 tokens.*10 positions"):
        measure_loss(model, contexts, source="long.txt")


def test_a_table_of_entropies_only_gives_the_same_loss_up_to_its_error(measured, tiny_rules, tiny_data, tmp_path):
    model, _, _, contexts, table, columns = measured
    main(["--rule-path", str(tiny_rules), "--datafile", str(tiny_data / "test0.txt"), "--save-path", str(tmp_path / "t.hdf5")])
    reduced = tmp_path / "reduced.hdf5"
    main(
        [
            "--rule-path",
            str(tiny_rules),
            "--datafile",
            str(tiny_data / "test0.txt"),
            "--save-path",
            str(reduced),
            "--entropy-only",
        ]
    )
    full = measure_loss(model, contexts, table, columns)
    details = measure_loss(model, contexts, LookupTable.open(reduced), columns)
    assert "sampled_minus_exact" not in details
    assert details["sampled_loss"] == full["sampled_loss"]
    assert details["entropy"]["pairs"]["mean"] == pytest.approx(full["entropy"]["pairs"]["mean"], rel=1e-6)
    for kind in ("pairs", "sentences"):
        difference = full["sampled_minus_exact"][kind]
        gap = full["gap"][kind]["mean"] + difference["mean"]
        expected = np.asarray(-table.log_true - table.entropy)
        offset = (mean_by_pairs if kind == "pairs" else mean_by_sentences)(expected, contexts.counts)[0]
        assert details["gap"][kind]["mean"] == pytest.approx(gap - offset, abs=1e-5)
