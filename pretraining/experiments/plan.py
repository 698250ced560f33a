"""From the design of studies to commands, each with its dependencies, and to `study.json`.

A command is a line of the README's scripts. It reads and writes files below `$OUT`, and nothing else connects two commands.
"""

import dataclasses
import itertools
import json
import shlex
from typing import Any

from pretraining.experiments.flags import REFERENCE, flag_words
from pretraining.experiments.resolve import Design, references_of
from pretraining.experiments.study import Control, Flags, Group, Studies, Task, decision_file

LOOKUP = "lookup table"
SAMPLES = "$OUT/data/pretraining"
STAGES = ("data", "selection", "choices", "training", "measurements", "controls")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """One command and its dependencies."""

    name: str  # unique; of the command in status.json
    words: tuple[str, ...]  # of the command line; `$OUT` in them is the folder of everything
    stage: str = "data"  # one of `STAGES`
    needs: tuple[str, ...] = ()  # commands that must be done before it
    # after: commands that must have ended, at least one successfully: a measurement of several runs does not need all
    after: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()  # whose values are in the words as {NAME}
    # makes: files and folders that exist when it is done; a command without `makes` and `records` always runs
    makes: tuple[str, ...] = ()
    draft: str = ""  # the name of the one file in `makes` until a command that is not ours has ended well
    # records: (model folder, file): measurements that exist when it is done, for those folders that are models
    records: tuple[tuple[str, str], ...] = ()

    @property
    def command(self) -> str:
        """The command line, as one types it after `OUT=...`."""
        return " ".join(f'"{word}"' if "$OUT" in word else shlex.quote(word) for word in self.words)

    @property
    def all_makes(self) -> tuple[str, ...]:
        """`makes`, or the files of `records`."""
        return self.makes or tuple(f"{folder}/{file}" for folder, file in self.records)


def _task_needs(task: Task) -> tuple[str, ...]:
    """The command that makes the labelled files of a task, unless they are the user's own."""
    return (f"task {task.label}",) if task.generate else ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """The models of a group that one folder has: `ABOVE/JOB/seedS/stepT`."""

    group: Group
    above: str  # models, selection or choices/NAME
    job: str
    seeds: tuple[int, ...]
    steps: tuple[int, ...]
    trained: tuple[str, ...]  # names of the commands

    @property
    def folder(self) -> str:
        return f"{self.above}/{self.job}"

    @property
    def title(self) -> str:
        return self.job if self.above == "models" else f"{self.above} {self.job}"

    def models(self, seed: int) -> list[str]:
        """The folders of a seed's models."""
        return [self.group.folder(seed, step, self.folder) for step in self.steps]


class Planner:
    """Collects the commands of a design; `launcher`: words that start run_pretraining.py for one seed, instead of `python`."""

    def __init__(self, design: Design, launcher: list[str]):
        self.design = design
        self.launcher = launcher
        self.steps: list[Step] = []
        self.selection: dict[str, Run] = {}  # by group: models of the selection seeds
        self.decided: dict[str, str] = {}  # by choice: the name of the command that decides it
        self.measured = [task for task in design.tasks.values() if task.is_measured]

    def plan(self) -> tuple[list[Step], Studies]:
        """All commands, each after those that it needs, and `study.json` without registrations."""
        design = self.design
        self._data()
        base = self._select(design.base.group)
        for name in design.choices:
            self._decide(name)
        trained = [self._train(group, "models", group.name, group.seeds) for group in self._ordered()]
        self._measure_accuracy(base, self.measured, "selection")
        for models in trained:
            self._measure(models)
        controls = self._controls(base)
        places = itertools.product(base.seeds, base.steps)
        folders = {f"{seed}@{step}": base.group.folder(seed, step, base.folder) for seed, step in places}
        same = ("scale", "studies", "text", "samples", "stacked", "readouts", "label_counts", "groups", "base", "criteria")
        studies = Studies(
            **{name: getattr(design, name) for name in same},
            tasks=tuple(self.measured),
            finetuned=tuple(design.tasks[label].name for label in design.finetuned),
            selection=base.group.model_copy(update={"seeds": base.seeds, "folders": folders}),
            controls=controls,
            choices=tuple(design.choices.values()),
            measurements=tuple(design.measurements.values()),
            registrations=(),
            commands={path: step.command for step in self.steps for path in step.all_makes},
        )
        return self.steps, studies

    def _add(self, stage: str, name: str, words: list[str], **rest: Any) -> str:
        """One more command; returns its name."""
        self.steps.append(Step(stage=stage, name=name, words=tuple(words), **rest))
        return name

    def _ordered(self) -> list[Group]:
        """The groups, each after the one that it starts from."""
        groups = self.design.groups
        done: dict[str, Group] = {}

        def visit(group: Group) -> None:
            if group.start:
                visit(groups[group.start.group])
            done.setdefault(group.name, group)

        for group in groups.values():
            visit(group)
        return list(done.values())

    # data

    def _data(self) -> None:
        """Text, samples, labelled sentences. Without `makes`: these commands check existing files by hashes."""
        design = self.design
        source = str(design.text.get("source", "pcfg"))
        words = flag_words("generate_pretraining", design.text, source)
        self._add("data", "text", ["python", "generate_pretraining.py", "--save-path", "$OUT/data", *words])
        words = flag_words("generate_samples", design.samples)
        words = ["python", "generate_samples.py", "--dir", "$OUT/data", "-o", SAMPLES, *words]
        self._add("data", "samples", words, needs=("text",))
        for label, task in design.tasks.items():
            if task.generate:
                words = ["python", "generate_downstream.py", "--save-path", "$OUT/data"]
                self._add("data", f"task {label}", words + flag_words("generate_downstream", task.generate))
        if design.has_conditionals:
            if design.has_grammar:
                words = ["pcfg.lookup", "--rule-path", str(design.text["rule_path"])]
            else:
                model = str(design.text.get("model_name", "facebook/opt-125m"))
                words = ["pretraining.sources.opt.lookup", "--data-path", "$OUT/data", "--model-name", model]
            words += ["--datafile", "$OUT/data/test0.txt", "--save-path", "$OUT/data/lookup.hdf5"]
            self._add("data", LOOKUP, ["python", "-m", *words], needs=("text",))

    def _labelled_files(self, task: Task) -> list[str]:
        """The labelled files as words: made below `$OUT`, or the user's own."""
        return [f"$OUT/{file}" if task.generate else file for file in (task.train_file, task.validation_file)]

    # training

    def _train(self, group: Group, above: str, job: str, seeds: tuple[int, ...], value: tuple[str, float] | None = None) -> Run:
        """Train a group's models of some seeds, in one process if stacked; `value`: flag and value of a choice's candidate."""
        design = self.design
        is_base = above == "selection" and group.name == design.base.group
        flags = group.flags | dict([value] if value else [])
        steps = (0, *group.steps) if is_base else group.steps
        references = references_of(flags)
        choices = tuple(name for name in references if name in design.choices)
        tasks = [design.tasks[name.removeprefix("tasks.")] for name in references if name not in choices]
        needs = ["samples", *(need for task in tasks for need in _task_needs(task)), *(self.decided[name] for name in choices)]
        words = flag_words("run_pretraining", {name: self._resolved(flag) for name, flag in flags.items()})
        words += self._saving(group, steps)
        start_words: list[str] = []
        start: Run | None = None
        if group.start:
            before = design.groups[group.start.group]
            start = self._select(before.name) if above != "models" else None
            folder = start.folder if start else f"models/{before.name}"
            leaf = before.folder(0, group.start.step, folder).replace("seed0", "seed{seed}")
            start_words = ["--model_name_or_path", f"$OUT/{leaf}"]
        models = Run(group=group, above=above, job=job, seeds=seeds, steps=steps, trained=())
        stage = {"models": "training", "selection": "selection"}.get(above, "choices")
        names = []
        for part in [seeds] if design.stacked else [(seed,) for seed in seeds]:
            ending = [] if design.stacked else [f"seed {part[0]}"]
            own = list(needs)
            if group.start:
                origin = start.title if start else group.start.group
                own.append(" ".join(["train", origin, *ending]))
            if design.stacked:
                of_seeds = [*start_words, "--seeds", ",".join(map(str, part))]
                of_seeds += ["--output_dir", f"$OUT/{above}", "--job_name", job]
            else:
                of_seeds = [word.replace("{seed}", str(part[0])) for word in start_words]
                of_seeds += ["--seed", str(part[0]), "--output_dir", f"$OUT/{models.folder}", "--job_name", f"seed{part[0]}"]
            launcher = ["python"] if design.stacked else self.launcher
            command = [*launcher, "run_pretraining.py", "--dataset_path", SAMPLES, *words, *of_seeds]
            makes = tuple(folder for seed in part for folder in models.models(seed))
            name = " ".join(["train", models.title, *ending])
            names.append(self._add(stage, name, command, needs=tuple(own), choices=choices, makes=makes))
        return dataclasses.replace(models, trained=tuple(names))

    def _resolved(self, flag: Any) -> Any:
        """The value of a flag, with a file of a task in place of {tasks.NAME}: its adversarial one, else that for training."""
        match = REFERENCE.fullmatch(flag) if isinstance(flag, str) else None
        if match is None or not match[1].startswith("tasks."):
            return flag
        task = self.design.tasks[match[1].removeprefix("tasks.")]
        train_file = self._labelled_files(task)[0]
        return train_file.replace(".csv", "_adversarial.csv") if task.generate.get("adversarial_num") else train_file

    def _saving(self, group: Group, steps: tuple[int, ...]) -> list[str]:
        """Flags of the duration and of the models that are saved."""
        words = ["--max_steps", str(steps[-1])]
        if group.flags.get("lr_schedule") != "wsd":
            return [*words, "--save_steps", ",".join(map(str, steps))]
        words += ["--branch_steps", ",".join(str(step) for step in steps if step)]
        return words + (["--save_steps", "0"] if 0 in steps else [])

    def _select(self, name: str) -> Run:
        """The models of a group on the selection seeds, trained and with their losses, once."""
        if name not in self.selection:
            models = self._train(self.design.groups[name], "selection", name, self.design.selection_seeds)
            self.selection[name] = models
            self._measure_loss(models, "selection")
        return self.selection[name]

    def _decide(self, name: str) -> None:
        """Train the candidates of a choice on the selection seeds, and decide."""
        if name in self.decided:
            return
        design = self.design
        choice = design.choices[name]
        group = design.groups[choice.group]
        for other in references_of(group.flags):
            if other != name and other in design.choices:
                self._decide(other)
        # Its candidates' models are those of its last step.
        group = group.model_copy(update={"steps": group.steps[-1:]})
        needs = []
        labelled = [task for task in self.measured if task.name == choice.task]
        for value in choice.values:
            models = self._train(group, f"choices/{name}", f"{value:g}", design.selection_seeds, (choice.flag, value))
            needs.append(self._measure_loss(models, "choices"))
            needs += self._measure_accuracy(models, labelled, "choices", design.readouts[:1])
        if choice.reference:
            reference = self._select(choice.reference.group)
            needs += [f"loss of {reference.title}"]
        words = ["python", "-m", "pretraining.experiments.choose", "$OUT", name]
        self.decided[name] = self._add("choices", f"choice {name}", words, needs=tuple(needs), makes=(decision_file(name),))

    # measurements

    def _add_records(self, models: Run, what: str, file: str, words: list[str], stage: str, needs: tuple[str, ...]) -> str:
        """A measurement of all models of a folder; returns the name of its command."""
        records = tuple((folder, file) for seed in models.seeds for folder in models.models(seed))
        return self._add(stage, f"{what} of {models.title}", words, needs=needs, after=models.trained, records=records)

    def _data_words(self, flags: Flags, script: str) -> list[str]:
        """The text and the vocabulary that the loss and the trace are measured on."""
        text = "$OUT/data/test0.txt" if self.design.has_conditionals else f"{SAMPLES}/test_shard_0.hdf5"
        words = flag_words(script, {"datafile": text} | flags)
        return [*words, "--vocabfile", f"{SAMPLES}/{self.design.samples['model_name']}/vocab.txt"]

    def _measure_loss(self, models: Run, stage: str) -> str:
        is_exact = self.design.has_conditionals
        flags = {"condprobfile": "$OUT/data/lookup.hdf5"} if is_exact else {}
        words = ["python", "calculate_loss.py", "--model-path", f"$OUT/{models.folder}"]
        words += self._data_words(flags | self.design.loss, "calculate_loss")
        return self._add_records(models, "loss", "loss.json", words, stage, (LOOKUP,) if is_exact else ("samples",))

    def _measure_accuracy(self, models: Run, tasks: list[Task], stage: str, readouts: tuple[str, ...] = ()) -> list[str]:
        """Label curves of all models of a folder; returns the names of the commands."""
        names = []
        for task, solver in itertools.product(tasks, readouts or self.design.readouts):
            words = self._curve_words(["--model_name_or_path", f"$OUT/{models.folder}"], task, solver)
            file = f"curve_{task.name}_{solver}.json"
            names.append(self._add_records(models, f"{solver} {task.label}", file, words, stage, _task_needs(task)))
        return names

    def _transfer_words(self, task: Task) -> list[str]:
        """Flags that label curves and fine-tuning share."""
        train_file, validation_file = self._labelled_files(task)
        length = self.design.samples.get("max_seq_length", 32)
        files = ["--train_file", train_file, "--validation_file", validation_file]
        files += ["--task_name", task.task_name] if task.task_name else []
        return [*files, "--max_seq_length", str(length), "--tokenizer_name", f"{SAMPLES}/{self.design.samples['model_name']}"]

    def _curve_words(self, features: list[str], task: Task, solver: str) -> list[str]:
        counts = ",".join(map(str, self.design.label_counts))
        words = ["python", "run_lp.py", *features, *self._transfer_words(task), "--solver", solver, "--label-counts", counts]
        return words + flag_words("run_lp", self.design.probe)

    def _measure(self, models: Run) -> None:
        """Everything that is measured of a group's models."""
        design = self.design
        stage = "measurements"
        self._measure_loss(models, stage)
        data = self._data_words(design.trace, "calculate_hessian")
        words = ["python", "calculate_hessian.py", "--model-path", f"$OUT/{models.folder}", *data]
        needs: tuple[str, ...] = ("text",) if design.has_conditionals else ("samples",)
        self._add_records(models, "trace", "hessian.json", words, stage, needs)
        for estimator, number, file in (
            ("hutchinson", design.hutchinson, "hessian_hutchinson.json"),
            ("spectrum", design.spectrum, "spectrum.json"),
        ):
            truth = ["--condprobfile", "$OUT/data/lookup.hdf5"] if design.has_conditionals else []
            for seed in models.seeds[:number]:
                one = dataclasses.replace(models, seeds=(seed,))
                words = ["python", "calculate_hessian.py", "--model-path", f"$OUT/{models.folder}/seed{seed}", *data, *truth]
                words += ["--estimator", estimator]
                self._add_records(one, f"{estimator} seed {seed}", file, words, stage, (LOOKUP,) if truth else needs)
        self._measure_accuracy(models, self.measured, stage)
        for label in design.finetuned:
            task = design.tasks[label]
            words = ["python", "run_ft.py", "--model_name_or_path", f"$OUT/{models.folder}", *self._transfer_words(task)]
            words += flag_words("run_ft", design.finetune)
            needs = _task_needs(task)
            self._add_records(models, f"finetune {label}", f"finetune_{task.name}.json", words, stage, needs)
        # The measurements that the study's author has written.
        folders = [folder for seed in models.seeds for folder in models.models(seed)]
        for measurement, folder in itertools.product(self.design.measurements.values(), folders):
            record = f"{folder}/{measurement.name}.json"
            words = shlex.split(measurement.command)
            draft = f"{folder}/.{measurement.name}.json.tmp"
            words = [word.replace("{model}", f"$OUT/{folder}").replace("{record}", f"$OUT/{draft}") for word in words]
            what = f"{measurement.name} of {folder}"
            self._add("measurements", what, words, after=models.trained, makes=(record,), draft=draft)

    def _controls(self, base: Run) -> tuple[Control, ...]:
        """Probes without pre-training, of the words and of the language itself."""
        design = self.design
        untrained = tuple(base.group.folder(seed, 0, base.folder) for seed in base.seeds)
        controls = [Control(name="untrained", folders=untrained)]
        kinds = {"words": ["--features", "words"]}
        if design.has_grammar:
            kinds["lookup"] = ["--features", "conditional", "--rule-path", str(design.text["rule_path"])]
        for name, features in kinds.items():
            folder = f"controls/{name}"
            controls.append(Control.model_validate({"name": name, "folders": (folder,)}))
            for task, solver in itertools.product(self.measured, design.readouts):
                words = self._curve_words([*features, "--output_dir", f"$OUT/{folder}"], task, solver)
                needs = ("samples", *_task_needs(task))
                makes = (f"{folder}/curve_{task.name}_{solver}.json",)
                self._add("controls", f"{solver} {task.label} of {name}", words, needs=needs, makes=makes)
        return tuple(controls)


def fingerprint(studies: Studies) -> str:
    """The canonical JSON of a resolved study, for its hash: equal for the same study on every machine."""
    content = studies.model_dump(mode="json", exclude={"registrations"})
    return json.dumps(content, sort_keys=True, separators=(",", ":"))
