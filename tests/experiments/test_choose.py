"""The rules of choices against naive ones, and their records."""

import itertools

import numpy as np
import pytest

from pcfg.common.files import InputError
from pretraining.evaluation.records import CurveRecord, LossRecord, write_record
from pretraining.experiments import choose
from pretraining.experiments.plan import Planner
from pretraining.experiments.resolve import resolve
from pretraining.experiments.study import Choice, read_decision, write_studies
from tests.experiments.test_plan import TINY

COMMON = {"inputs": {"data": {"sha256": "ab" * 32}}, "arguments": {}, "seconds": 1.0, "device": "cpu", "n": 10}


def naive(rule, gaps, accuracies, reference, tolerance):
    """The chosen value by plain loops."""
    mean_gap = {value: sum(numbers) / len(numbers) for value, numbers in gaps.items()}
    best = None
    for value in mean_gap:
        limit = (min(mean_gap.values()) if reference is None else sum(reference) / len(reference)) + tolerance
        if rule == "lowest_gap":
            if best is None or mean_gap[value] < mean_gap[best]:
                best = value
        elif mean_gap[value] <= limit:
            if best is None:
                best = value
            elif rule == "largest":
                best = max(best, value)
            elif sum(accuracies[value]) < sum(accuracies[best]):
                best = value
    return best


@pytest.mark.parametrize("rule", ["lowest_gap", "largest", "lowest_accuracy"])
def test_rules_against_naive_ones(rule):
    rng = np.random.default_rng(0)
    chosen = set()
    for _, tolerance, has_reference in itertools.product(range(40), (0.0, 0.2), (False, True)):
        values = (0.5, 1.0, 2.0, 4.0)
        gaps = {value: rng.random(3).tolist() for value in values}
        accuracies = {value: rng.random(3).tolist() for value in values} if rule == "lowest_accuracy" else {}
        reference = (rng.random(3) - 0.1).tolist() if has_reference else None
        choice = Choice(name="c", group="g", flag="lr", values=values, rule=rule, tolerance=tolerance)
        decision = choose.decide(choice, (1, 2, 3), gaps, accuracies, reference)
        assert decision.chosen == naive(rule, gaps, accuracies, reference, tolerance)
        chosen.add(decision.chosen)
        for candidate in decision.candidates:
            numbers = gaps[candidate.value]
            assert candidate.gap == pytest.approx(np.mean(numbers))
            assert candidate.gap_error == pytest.approx(np.std(numbers, ddof=1) / 3**0.5)
    assert chosen >= {0.5, 1.0, 2.0, 4.0} and (None in chosen) == (rule != "lowest_gap")


def write_model(folder, gap, accuracy):
    folder.mkdir(parents=True)
    means = {by: {"mean": gap, "standard_error": 0.001} for by in ("pairs", "sentences")}
    numbers = {"value": 2 + gap, "standard_error": 0.001, "unit": "nats"}
    write_record(folder, "loss.json", LossRecord(sampled_loss=means, gap=means, **numbers, **COMMON))
    mean = {"mean": accuracy, "standard_error": 0.01}
    point = {"labels": 40, "draws": 2, "accuracy": mean, "missing_classes": 0, "sampling_standard_error": 0.01}
    point["strengths"] = [1.0, 1.0]
    facts = {"task": "pcfg_A", "pool": "concat", "features": "hidden", "solver": "ridge", "majority": 0.3, "points": [point]}
    record = CurveRecord(value=accuracy, standard_error=0.01, unit="accuracy", **facts, **COMMON)
    write_record(folder, "curve_pcfg_A_ridge.json", record)


def test_decision_from_the_records_of_a_study(tmp_path, capsys):
    _, studies = Planner(resolve(TINY, None), ["python"]).plan()
    write_studies(tmp_path, studies)
    main = lambda: choose.main([str(tmp_path), "weight"])  # noqa: E731
    with pytest.raises(InputError, match=r"seed50/step0000004: has no loss.json; run the study again"):
        main()
    numbers = {"0.1": (0.1, 0.6), "0.2": (0.9, 0.2)}
    for (value, (gap, accuracy)), seed in itertools.product(numbers.items(), (50, 51)):
        write_model(tmp_path / f"choices/weight/{value}/seed{seed}/step0000004", gap, accuracy)
    for seed in (50, 51):
        write_model(tmp_path / f"selection/base/seed{seed}/step0000004", 0.0, 0.9)
    main()
    decision = read_decision(tmp_path, "weight")
    assert decision.chosen == 0.2 and decision.limit == 1.0 and decision.reference_gap == 0.0 and decision.seeds == (50, 51)
    assert [(row.value, row.gap, row.accuracy, row.admitted) for row in decision.candidates] == [
        (0.1, 0.1, 0.6, True),
        (0.2, 0.9, 0.2, True),
    ]
    assert (
        "adversarial_weight 0.2: gap 0.9000 +- 0.0000 nats, accuracy 20.0%, admitted\nchosen: 0.2\n" in capsys.readouterr().out
    )
    tighter = studies.choices[0].model_copy(update={"tolerance": 0.5})
    write_studies(tmp_path, studies.model_copy(update={"choices": (tighter,)}))
    main()
    assert read_decision(tmp_path, "weight").chosen == 0.1
    none = studies.choices[0].model_copy(update={"tolerance": 0.05})
    write_studies(tmp_path, studies.model_copy(update={"choices": (none,)}))
    main()
    assert read_decision(tmp_path, "weight").chosen is None and "none is admitted" in capsys.readouterr().out
    with pytest.raises(InputError, match="no study with a choice 'wait' there; it has weight"):
        choose.main([str(tmp_path), "wait"])
