"""From study files to what they ask for, `Design`: all names resolved, all mistakes refused with file and line."""

import dataclasses
import itertools
import os
import re
from pathlib import Path
from typing import Any

from pcfg.common.files import InputError
from pcfg.grammar import Grammar, find_rules
from pcfg.labels import task_name
from pretraining.data.tasks import GLUE
from pretraining.experiments.flags import REFERENCE, actions, take_flags
from pretraining.experiments.study import Choice, Comparison, Criteria, Flags, Group, Measurement, Models, Study, Task
from pretraining.experiments.study_file import REQUIRED, Table, Tree, read_tree, suggestion

ROOT = Path(__file__).parents[2]  # of the commands
NAME = re.compile(r"[A-Za-z0-9][\w.-]*")  # of groups, tasks, choices, measurements: parts of paths
RECORD_NAMES = ("loss", "comparison", "hessian", "spectrum", "probe", "curve", "finetune", "args", "config")
SOLVERS = ("ridge", "lbfgs")  # of label curves
# Of run_pretraining.py; a run ends by its steps, never by its time.
TRAIN = {"total_training_time": 100000, "early_exit_time_marker": 100000, "report_to": "none"}
TOKENIZER = "bert-large-uncased"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Design:
    """What study files ask for, resolved; everything below the studies is shared by them."""

    studies: tuple[Study, ...]
    scale: str
    text: Flags
    samples: Flags
    tasks: dict[str, Task]  # by label
    groups: dict[str, Group]
    base: Models
    selection_seeds: tuple[int, ...]
    stacked: bool
    choices: dict[str, Choice]
    measurements: dict[str, Measurement]
    criteria: Criteria
    loss: Flags
    trace: Flags
    hutchinson: int  # number of seeds per group
    spectrum: int  # number of seeds per group
    readouts: tuple[str, ...]
    label_counts: tuple[int, ...]
    probe: Flags
    finetune: Flags
    finetuned: tuple[str, ...]  # labels of tasks

    @property
    def has_grammar(self) -> bool:
        return self.text.get("source", "pcfg") == "pcfg"

    @property
    def has_conditionals(self) -> bool:
        """Whether the text's exact conditionals are known: those of a grammar or of a language model."""
        return self.has_grammar or self.text["source"] == "opt"


def merge(designs: list[Design], paths: list[Path]) -> Design:
    """One design of several study files; what they share must be the same."""
    first = designs[0]
    shared: dict[str, Any] = {}
    for other, path in zip(designs[1:], paths[1:], strict=True):
        if repeated := {study.name for study in first.studies} & {study.name for study in other.studies}:
            raise InputError(f"{path}: a second study of the name {min(repeated)}; rename the file")
        for field in dataclasses.fields(Design):
            mine = shared.get(field.name, getattr(first, field.name))
            theirs = getattr(other, field.name)
            if field.name == "studies":
                shared[field.name] = mine + theirs
            elif field.name in ("tasks", "groups", "choices", "measurements"):
                for name in mine.keys() & theirs.keys():
                    if mine[name] != theirs[name]:
                        raise InputError(
                            f"{path}: {field.name}.{name} is not that of {paths[0]}; rename it, or give another --out"
                        )
                shared[field.name] = mine | theirs
            elif mine != theirs:
                raise InputError(f"{path}: {field.name} is {theirs!r}, in {paths[0]} {mine!r}; run it in another --out")
    return dataclasses.replace(first, **shared)


def resolve(path: Path, scale: str | None) -> Design:
    """The design of one study file at a scale."""
    tree = read_tree(path, scale)
    return _Resolver(path, tree, scale or "mini").design()


def _number(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


class _Resolver:
    """Reads the tables of a study file, each once."""

    def __init__(self, path: Path, tree: Tree, scale: str):
        self.path = path
        self.tree = tree
        self.scale = scale
        self.top = Table(tree, (), dict(tree.values))
        self.tables: dict[str, dict[str, Table]] = {}
        for kind in ("models", "groups", "tasks", "choices", "measurements"):
            self.tables[kind] = self.top.table(kind).tables()
            for name, table in self.tables[kind].items():
                if not NAME.fullmatch(name) or name in ("seed", "model", "record"):
                    raise table.error(
                        f"{name!r}: a name has letters, digits, '_', '-' and '.', and is not seed, model or record"
                    )
        self.groups: dict[str, Group] = {}
        self.tokenizer = TOKENIZER

    def design(self) -> Design:
        """Everything that the file asks for."""
        top = self.top
        title = top.take("title", str, self.path.stem)
        question = top.take("question", str)
        paper = top.take_one("paper", ("steps", "sizes", "algorithms"), None)
        self.seeds = self._seeds(top, "seeds", tuple(range(100, 108)))
        selection_seeds = self._seeds(top, "selection_seeds", tuple(range(1000, 1004)))
        if both := set(self.seeds) & set(selection_seeds):
            text = f"selection_seeds: {min(both)} is one of seeds, too; settings are chosen on other seeds"
            raise top.error(text, "selection_seeds")
        text_flags, samples = self._language(top.table("language"))
        self.tokenizer = samples["model_name"]
        self._expand_groups()
        tasks = self._tasks(text_flags)
        train = top.table("train")
        for name in list(self.tables["groups"]):
            self._group(name, train, ())
        probe = top.table("probe")
        readouts = probe.take_list("readouts", str, SOLVERS)
        if unknown := set(readouts) - set(SOLVERS):
            raise probe.error(f"readouts: {min(unknown)!r} is no solver of label curves; there are ridge and lbfgs", "readouts")
        label_counts = tuple(sorted(probe.take_list("label_counts", int, (100, 1000))))
        comparisons = self._comparisons(tasks, label_counts)
        trace = top.table("trace")
        finetune = top.table("finetune")
        finetuned = finetune.take_list("tasks", str, ())
        for label in finetuned:
            self._task(finetune, "tasks", label, tasks)
        base = top.take("base", str, None)
        design = Design(
            studies=(
                Study(name=self.path.stem, title=title, question=question, paper=paper, sha256="", comparisons=comparisons),
            ),
            scale=self.scale,
            text=text_flags,
            samples=samples,
            tasks=tasks,
            groups=self.groups,
            base=comparisons[0].before if base is None else self._models(top, "base", base),
            selection_seeds=selection_seeds,
            stacked=top.take("stacked", bool, False),
            choices=self._choices(tasks),
            measurements=self._measurements(),
            criteria=self._criteria(),
            loss=self._paths(top.table("loss"), "calculate_loss"),
            hutchinson=trace.take("hutchinson", int, 1),
            spectrum=trace.take("spectrum", int, 0),
            trace=self._paths(trace, "calculate_hessian"),
            readouts=readouts,
            label_counts=label_counts,
            probe=self._paths(probe, "run_lp"),
            finetune=self._paths(finetune, "run_ft"),
            finetuned=finetuned,
        )
        top.finish()
        return self._used(design)

    def _seeds(self, table: Table, name: str, default: tuple[int, ...]) -> tuple[int, ...]:
        """Seeds as a list, or as a text FIRST-LAST."""
        value = table.values.get(name)
        if isinstance(value, str) and (match := re.fullmatch(r"(\d+)-(\d+)", value)):
            table.take(name, str)
            seeds = tuple(range(int(match[1]), int(match[2]) + 1))
        else:
            seeds = table.take_list(name, int, default)
        if len(seeds) < 2 or min(seeds) < 0:
            raise table.error(f"{name}: must be two or more numbers of 0 or more, as a list or as '100-107'", name)
        return tuple(sorted(seeds))

    def _paths(self, table: Table, script: str, *arguments: str, references: frozenset[str] = frozenset()) -> Flags:
        """The flags that are left in a table; files next to the study file get a path for the commands."""
        places = {name.replace("-", "_"): table.tree.place((*table.keys, name))[0] for name in table.values}
        flags = take_flags(table, script, *arguments, references=references)
        flags = {name: self._file(value, places[name]) for name, value in flags.items()}
        if "rule_path" in flags:
            path = ROOT / flags["rule_path"]
            try:
                Grammar.read(find_rules(path if path.is_file() else flags["rule_path"]))
            except InputError as error:
                raise table.error(f"rule_path: {error}", "rule_path") from None
        return flags

    def _file(self, value: Any, source: Path) -> Any:
        path = source.parent / value if isinstance(value, str) and value and not value.startswith("$") else None
        # The name of a folder may also be a word, such as a schedule.
        if path is None or not (path.is_file() or ("/" in value and path.is_dir())):
            return value
        return os.path.relpath(path.resolve(), ROOT) if path.resolve().is_relative_to(ROOT) else str(path.resolve())

    def _criteria(self) -> Criteria:
        """The thresholds, with the defaults of their schema."""
        table = self.top.table("criteria")
        values = {name: table.take(name, float, field.default) for name, field in Criteria.model_fields.items()}
        for name, value in values.items():
            if value <= 0:
                raise table.error(f"{name}: is {value:g}, must be more than 0", name)
        table.finish()
        return Criteria(**values)

    # language and tasks

    def _language(self, table: Table) -> tuple[Flags, Flags]:
        text_table = table.table("text")
        source = text_table.values.get("source", "pcfg")
        text_table.known.add("source")
        if source not in ("pcfg", "opt", "corpus"):
            raise text_table.error(f"source: is {source!r}, must be one of pcfg, opt, corpus", "source")
        text = self._paths(text_table, "generate_pretraining", source)
        if source == "pcfg" and "rule_path" not in text:
            raise text_table.error("language.text: no rule_path; give a rules file, or the name of a shipped grammar")
        samples_table = table.table("samples")
        samples = self._paths(samples_table, "generate_samples")
        table.finish()
        defaults: Flags = {"model_name": TOKENIZER}
        if source == "pcfg":
            defaults |= {"single_mask": True, "max_seq_length": text.get("length_limit", 32) + 1}  # [CLS], the words, [SEP]
        return {"test_shard_num": 1, **text}, defaults | samples

    def _tasks(self, text: Flags) -> dict[str, Task]:
        tasks: dict[str, Task] = {}
        files: dict[str, str] = {}
        for label, table in self.tables["tasks"].items():
            is_measured = table.take("measured", bool, True)
            train_file = table.take("train_file", str, None)
            if train_file is not None:
                validation_file = table.take("validation_file", str)
                paths = []
                for key, file in (("train_file", train_file), ("validation_file", validation_file)):
                    place = table.tree.place((*table.keys, key))[0].parent / file
                    if not place.is_file():
                        raise table.error(f"{key}: {place}: no such file; paths are relative to the study file", key)
                    paths.append(self._file(file, table.tree.place((*table.keys, key))[0]))
                glue = table.take_one("task_name", GLUE, None)
                table.finish()
                generate: Flags = {}
                name = glue or Path(train_file).stem
            else:
                glue = None
                inherited = {key: text[key] for key in ("rule_path", "length_limit") if key in text}
                generate = inherited | self._paths(table, "generate_downstream")
                if "task_type" not in generate or "rule_path" not in generate:
                    raise table.error("give task_type and a grammar, or train_file and validation_file of your own")
                try:
                    name = f"pcfg_{task_name(generate['task_type'], generate.get('span'), generate.get('position'))}"
                except InputError as error:
                    raise table.error(str(error), "span") from None
                paths = [f"data/{name}.csv", f"data/{name}_validation.csv"]
            if name in files:
                raise table.error(
                    f"the same file name as tasks.{files[name]} ({name}.csv), which names the records; one is enough"
                )
            files[name] = label
            facts: dict[str, Any] = {"name": name, "label": label, "task_name": glue, "is_measured": is_measured}
            tasks[label] = Task(**facts, train_file=paths[0], validation_file=paths[1], generate=generate)
        if not any(task.is_measured for task in tasks.values()):
            raise self.top.error('no tasks; give at least one, such as [tasks.A] with task_type = "A"', "tasks")
        return tasks

    def _task(self, table: Table, name: str, label: str, tasks: dict[str, Task]) -> Task:
        """The measured task that a key names."""
        possible = [other for other, task in tasks.items() if task.is_measured]
        if label not in possible:
            raise table.error(f"{name}: task {label!r} is unknown{suggestion(label, possible)}", name)
        return tasks[label]

    # groups

    def _expand_groups(self) -> None:
        """Replace each group with `vary` by one group per combination of its values."""
        expanded: dict[str, Table] = {}
        for name, table in self.tables["groups"].items():
            vary = table.take("vary", dict, {})
            for flag, values in vary.items():
                if not isinstance(values, list) or not values:
                    raise table.error(f"vary: {flag} must be a list of values", "vary", flag)
            for values in itertools.product(*vary.values()):
                own = "-".join([name, *map(_number, values)])
                if own in expanded or (own != name and own in self.tables["groups"]):
                    raise table.error(f"{own}: a second group of this name; rename one", "vary")
                for flag in vary:
                    self.tree.places[*table.keys, flag] = self.tree.place((*table.keys, "vary", flag))
                copied = Table(table.tree, table.keys, {**table.values, **dict(zip(vary, values, strict=True))}, {"vary"})
                if vary and "label" in table.values:
                    copied.values["label"] = f"{table.values['label']} {', '.join(map(_number, values))}"
                expanded[own] = copied
        self.tables["groups"] = expanded
        if not expanded:
            raise self.top.error("no groups; give at least one, such as [groups.base]")

    def _group(self, name: str, train: Table, below: tuple[str, ...]) -> Group:
        """The group of a name, after the one that it starts from."""
        if name in self.groups:
            return self.groups[name]
        table = self.tables["groups"][name]
        common = Table(train.tree, train.keys, dict(train.values))
        default = self._steps(common, REQUIRED if "steps" in common.values else None)
        steps = self._steps(table, default if default else REQUIRED)
        label = table.take("label", str, name)
        seeds = self._seeds(table, "seeds", self.seeds)
        models = self.tables["models"]
        model = table.take_one("model", models, "base" if "base" in models else next(iter(models), None))
        start = table.take("start", str, None)
        references = frozenset({*self.tables["choices"], *(f"tasks.{label}" for label in self.tables["tasks"])})
        shape = Table(models[model].tree, models[model].keys, dict(models[model].values)) if model else None
        flags: Flags = {"tokenizer_name": self.tokenizer, **TRAIN}
        for part in filter(None, (common, shape, table)):
            flags |= self._paths(part, "run_pretraining", references=references)
        if "train_batch_size" in flags:
            flags.setdefault("train_micro_batch_size_per_gpu", flags["train_batch_size"])
        models_of_start = None
        if start is not None:
            if name in (*below, start.split("@")[0]):
                raise table.error(f"start: {name} starts from itself", "start")
            if "model_name_or_path" in flags:
                raise table.error("start: model_name_or_path is given as well; leave one of them out", "start")
            models_of_start = self._models(table, "start", start, (*below, name), train)
            if missing := set(seeds) - set(self.groups[models_of_start.group].seeds):
                raise table.error(f"start: {models_of_start.group} has no seed {min(missing)}", "start")
        group = Group(name=name, label=label, flags=flags, start=models_of_start, seeds=seeds, steps=steps, folders={})
        folders = {f"{seed}@{step}": group.folder(seed, step) for seed in seeds for step in steps}
        self.groups[name] = group.model_copy(update={"folders": folders})
        return self.groups[name]

    def _steps(self, table: Table, default: Any) -> Any:
        steps = table.take_list("steps", int, default)
        if steps and min(steps) < 1:
            raise table.error("steps: must be 1 or more", "steps")
        return tuple(sorted(steps)) if steps else None

    def _models(self, table: Table, key: str, text: str, below: tuple[str, ...] = (), train: Table | None = None) -> Models:
        """`GROUP`, `GROUP@STEP`, `GROUP@first` or `GROUP@last`."""
        name, at, step = text.partition("@")
        if name not in self.tables["groups"]:
            raise table.error(f"{key}: group {name!r} is unknown{suggestion(name, self.tables['groups'])}", key)
        group = self._group(name, train, below) if train else self.groups[name]
        steps = {"": group.steps[-1], "last": group.steps[-1], "first": group.steps[0]} | {
            str(step): step for step in group.steps
        }
        if step not in steps or (at and not step):
            numbers = ", ".join(map(str, group.steps))
            raise table.error(f"{key}: {text}: {name} is not measured at step {step!r}; its steps are {numbers}", key)
        return Models(group=name, step=steps[step])

    # what is done with the groups

    def _choices(self, tasks: dict[str, Task]) -> dict[str, Choice]:
        choices = {}
        for name, table in self.tables["choices"].items():
            users = [group.name for group in self.groups.values() if f"{{{name}}}" in map(str, group.flags.values())]
            group = table.take_one("group", self.groups, users[0] if len(users) == 1 else REQUIRED)
            own = [flag for flag, value in self.groups[group].flags.items() if value == f"{{{name}}}"]
            flag = table.take_one("flag", actions("run_pretraining"), own[0] if own else REQUIRED)
            rule = table.take_one("rule", ("lowest_gap", "largest", "lowest_accuracy"), "lowest_gap")
            reference = table.take("reference", str, None)
            is_by_accuracy = rule == "lowest_accuracy"
            task = table.take("task", str, REQUIRED if is_by_accuracy else None)
            values = table.take_list("values", float)
            if len(values) < 2:
                raise table.error("values: must be two or more numbers", "values")
            choices[name] = Choice(
                name=name,
                group=group,
                flag=flag,
                values=tuple(sorted(values)),
                rule=rule,
                reference=self._models(table, "reference", reference) if reference else None,
                tolerance=table.take("tolerance", float, 0.0),
                task=self._task(table, "task", task, tasks).name if task else None,
                labels=table.take("labels", int, REQUIRED if is_by_accuracy else None),
            )
            table.finish()
        return choices

    def _measurements(self) -> dict[str, Measurement]:
        measurements = {}
        for name, table in self.tables["measurements"].items():
            command = table.take("command", str)
            if name.split("_")[0] in RECORD_NAMES:
                raise table.error(f"{name}: {name}.json is a record of the project's own scripts; rename the measurement")
            if "{model}" not in command:
                raise table.error("command: has no {model}, the folder of the model to measure", "command")
            source = table.tree.place((*table.keys, "command"))[0]
            words = " ".join(str(self._file(word, source)) for word in command.split(" "))
            texts = {key: table.take(key, str, default) for key, default in (("value", "value"), ("error", None), ("unit", ""))}
            table.finish()
            measurements[name] = Measurement(name=name, command=words, **texts)
        return measurements

    def _comparisons(self, tasks: dict[str, Task], label_counts: tuple[int, ...]) -> tuple[Comparison, ...]:
        rows = self.top.take("comparisons", list, [])
        if not rows:
            raise self.top.error("no comparisons; give at least one [[comparisons]] with before and after")
        comparisons = [
            self._comparison(Table(self.tree, ("comparisons", number), dict(row)), tasks, label_counts)
            for number, row in enumerate(rows)
        ]
        names = [comparison.name for comparison in comparisons]
        if repeated := [number for number, name in enumerate(names) if name in names[:number]]:
            raise self.tree.error(
                ("comparisons", repeated[0]), f"{names[repeated[0]]!r}: a second comparison of this name; give it a name"
            )
        if not any(comparison.primary for comparison in comparisons):
            comparisons = [comparison.model_copy(update={"primary": True}) for comparison in comparisons]
        return tuple(comparisons)

    def _comparison(self, table: Table, tasks: dict[str, Task], label_counts: tuple[int, ...]) -> Comparison:
        before = self._models(table, "before", table.take("before", str))
        after = self._models(table, "after", table.take("after", str))
        self._check_pair(table, before, after)
        labels = table.take_list("labels", int, label_counts[-1:])
        for count in labels:
            if count not in label_counts:
                raise table.error(f"labels: {count} is none of the label_counts {', '.join(map(str, label_counts))}", "labels")
        measured = tuple(label for label, task in tasks.items() if task.is_measured)
        names = table.take_list("tasks", str, measured)
        sides = [of.group if len(self.groups[of.group].steps) == 1 else f"{of.group}@{of.step}" for of in (before, after)]
        comparison = Comparison(
            name=table.take("name", str, " to ".join(sides)),
            claim=table.take("claim", str, ""),
            before=before,
            after=after,
            trace=table.take_one("trace", ("trace", "balanced"), "trace"),
            flatness=table.take_one("flatness", ("falls", "rises"), None),
            accuracy=table.take_one("accuracy", ("falls", "rises"), None),
            primary=table.take("primary", bool, False),
            tasks=tuple(self._task(table, "tasks", label, tasks).name for label in names),
            labels=labels,
        )
        table.finish()
        return comparison

    def _check_pair(self, table: Table, before: Models, after: Models) -> None:
        """Refuse a comparison that says nothing about its groups."""
        first = self.groups[before.group]
        second = self.groups[after.group]
        if before == after:
            raise table.error(f"after: {after.group} at step {after.step} is compared with itself", "after")
        if not set(first.seeds) & set(second.seeds):
            raise table.error(f"after: {first.name} and {second.name} have no seed in common, so they can't be paired", "after")
        totals = [models.total(step, self.groups) for models, step in ((first, before.step), (second, after.step))]
        lines = [set(self._line(group)) for group in (first, second)]
        if totals[0] != totals[1] and first.name not in lines[1] and second.name not in lines[0]:
            text = f"{first.name} has {totals[0]} steps of training, {second.name} {totals[1]}"
            raise table.error(f"after: {text}; compare at equal steps, or groups of which one starts from the other", "after")

    def _line(self, group: Group) -> list[str]:
        """The group and all those before it."""
        return [group.name, *(self._line(self.groups[group.start.group]) if group.start else [])]

    def _used(self, design: Design) -> Design:
        """Without the groups and choices of included files and the tasks that nothing in the study needs."""
        tables = self.tables["groups"]
        own = {name for name in design.groups if self.tree.place(tables[name].keys)[0] == self.path}
        [study] = design.studies
        compared = {models.group for pair in study.comparisons for models in (pair.before, pair.after)}
        needed = own | compared | {design.base.group}
        waiting = list(needed)
        choices: dict[str, Choice] = {}
        labels: set[str] = set()
        while waiting:
            group = design.groups[waiting.pop()]
            names = {group.start.group} if group.start else set()
            for reference in references_of(group.flags):
                if reference.startswith("tasks."):
                    labels.add(reference.removeprefix("tasks."))
                    continue
                choice = choices[reference] = design.choices[reference]
                names |= {choice.group} | ({choice.reference.group} if choice.reference else set())
            waiting += names - needed
            needed |= names
        groups = {name: group for name, group in design.groups.items() if name in needed}
        tasks = {label: task for label, task in design.tasks.items() if task.is_measured or label in labels}
        return dataclasses.replace(design, groups=groups, choices=choices, tasks=tasks)


def references_of(flags: Flags) -> list[str]:
    """The names in braces among the values of flags."""
    return [match[1] for value in flags.values() if isinstance(value, str) and (match := REFERENCE.fullmatch(value))]
