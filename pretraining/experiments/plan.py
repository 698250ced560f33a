"""From a scale, seeds and tasks to the commands of the experiments, each after those that it depends on.

A command is a line of the README's scripts. It reads and writes files below `$OUT`, and nothing else connects two commands.
Runs that two experiments share are made once: the models of `steps` are those of the middle size of `sizes`, and the standard
ones of `algorithms`.
"""

import dataclasses
import shlex
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pretraining.model.enlarge import TIED_SCALES
from pretraining.report.contract import ALGORITHMS, SIZES, STEPS, Command, Entry, Experiment, Experiments
from pretraining.report.rows import COMPARISON
from pretraining.report.same_loss import MARGIN, MAX_GAP

ADVERSARIAL_TASK = "B"
CHOICE = "adversarial/choice.json"
CHOSEN = "adversarial/chosen.json"
LOOKUP = "lookup table"
TABLE_FOLDER = "models/lookup_table"


@dataclasses.dataclass(frozen=True)
class Size:
    """The shape of a model; feed-forward layers are four times as wide as the hidden vector."""

    hidden_size: int
    layers: int
    heads: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scale:
    """One size of all experiments."""

    name: str
    rules: str
    length_limit: int  # one more than the maximum number of words in a sentence
    shards: int  # of training text
    sentences: int  # per training shard
    test_sentences: int  # of the test shard
    labelled: int  # training rows of a downstream task
    validation: int  # validation rows of a downstream task
    # sizes: shapes by name, from small to large; the width of the largest is a multiple of each
    sizes: dict[str, Size]
    base: str  # the size of `steps` and `algorithms`
    batch: int  # sentences per step
    micro_batch: int  # maximum number of sentences per forward pass
    dropout: float  # of pre-training
    lr: float  # AdamW's highest rate
    warmup: int  # AdamW's steps to it
    half_life: int  # steps in which AdamW's rate halves from there
    sgd_lr: float  # of SGD, which starts from AdamW's models at `steps`
    sgd_warmup: int  # steps after which SGD's rate is constant
    steps: int  # of all runs except those of the experiment `steps`
    checkpoints: tuple[int, ...]  # steps at which those are saved, `steps` among them
    weights: tuple[float, ...]  # of the adversarial term, to choose from
    ridge: float  # of the adversarial term
    adversarial_batch: int  # labelled sentences per step of the adversarial term
    selection_seed: int  # of the models that the weight is chosen on
    trace_sentences: int  # of a trace
    probe: str  # flags of run_lp.py
    finetune: str  # flags of run_ft.py
    finetune_tasks: tuple[str, ...]  # fine-tuning is the most expensive measurement
    precision: str  # flags of run_pretraining.py

    @property
    def tokens(self) -> int:
        """Maximum number of tokens in a sample: [CLS], the words, [SEP]."""
        return self.length_limit - 1 + 2

    @property
    def largest(self) -> str:
        return max(self.sizes, key=lambda name: self.sizes[name].hidden_size)


def _read_scales() -> dict[str, Scale]:
    scales = {}
    for name, fields in tomllib.loads(Path(__file__).with_name("scales.toml").read_text(encoding="utf-8")).items():
        sizes = {size: Size(**shape) for size, shape in fields["sizes"].items()}
        lists = {field: tuple(value) for field, value in fields.items() if isinstance(value, list)}
        scales[name] = Scale(name=name, **(fields | lists | {"sizes": sizes}))
    return scales


SCALES = _read_scales()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """One command and its dependencies."""

    name: str  # unique; of the command in status.json
    words: tuple[str, ...]  # of the command line; `$OUT` in them is the folder of everything
    needs: tuple[str, ...] = ()  # commands that must be done before it
    # after: commands that must have ended, at least one successfully: a measurement of several runs does not need all
    after: tuple[str, ...] = ()
    requires: str | None = None  # a file that an earlier command makes or, for a reason that it prints, does not make
    # makes: files and folders that exist when it is done; a command without `makes` and `records` always runs
    makes: tuple[str, ...] = ()
    # records: (model folder, file): measurements that exist when it is done, for those folders that are models
    records: tuple[tuple[str, str], ...] = ()

    @property
    def command(self) -> str:
        """The command line, as one types it after `OUT=...`."""
        return " ".join(word if "$OUT" in word else shlex.quote(word) for word in self.words)

    @property
    def all_makes(self) -> tuple[str, ...]:
        """`makes`, or the files of `records`."""
        return self.makes or tuple(f"{folder}/{file}" for folder, file in self.records)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """A pre-training run: `models/FOLDER/seedS`."""

    folder: str  # below models/, of all seeds of one kind
    size: str  # name in the scale
    seed: int
    saved: tuple[int, ...]  # steps with a checkpoint, up to the last one
    flags: str  # of run_pretraining.py, in addition to those of all runs
    # needs, requires: as in `Step`
    needs: tuple[str, ...] = ()
    requires: str | None = None

    @property
    def name(self) -> str:
        return f"train {self.folder} seed {self.seed}"

    def model(self, step: int) -> str:
        """The folder of a checkpoint."""
        return f"models/{self.folder}/seed{self.seed}/step{step:07d}"

    def entry(self, group: str, step: int, before: int = 0) -> Entry:
        """A checkpoint in an experiment; `before`: steps before this run began."""
        return Entry(group=group, seed=self.seed, step=before + step, folder=self.model(step))

    @property
    def models(self) -> tuple[str, ...]:
        return tuple(map(self.model, self.saved))


@dataclasses.dataclass
class Planner:
    """The commands of the chosen experiments."""

    scale: Scale
    names: list[str]  # of the experiments, among `NAMES`
    seeds: list[int]  # of pre-training
    tasks: list[str]  # of A, B and C
    launcher: list[str]  # words that start run_pretraining.py, instead of `python`
    steps: list[Step] = dataclasses.field(default_factory=list)  # the commands so far

    def plan(self) -> tuple[list[Step], Experiments]:
        """The commands, and `experiments.json`."""
        scale = self.scale
        self._data()
        base = [self._adamw(scale.base, seed) for seed in self.seeds]
        sgd = [self._sgd(run) for run in base] if STEPS in self.names else []
        others = [name for name in scale.sizes if name != scale.base] if SIZES in self.names else []
        sizes = {name: [self._adamw(name, seed) for seed in self.seeds] for name in others} | {scale.base: base}
        for runs in (base, *[sizes[name] for name in reversed(others)], sgd):
            self._train(runs)
        if ALGORITHMS in self.names:
            adversarial = self._selection()
            self._train(adversarial)
        for runs in (base, sgd, *[sizes[name] for name in others]):
            self._measure(runs, base[0])
        experiments = []
        if STEPS in self.names:
            experiments.append(self._steps_experiment(base, sgd))
        if SIZES in self.names:
            experiments.append(self._sizes_experiment({name: sizes[name] for name in scale.sizes}))
        if ALGORITHMS in self.names:
            self._measure(adversarial, base[0])
            self._lookup_probes()
            experiments.append(self._algorithms_experiment(base, adversarial))
        return self.steps, Experiments(
            scale=scale.name,
            seeds=tuple(self.seeds),
            tasks=tuple(self.tasks),
            finetune_tasks=tuple(task for task in self.tasks if task in scale.finetune_tasks),
            saturated=MAX_GAP,
            margin=MARGIN,
            reference=base[0].model(scale.steps),
            experiments=tuple(experiments),
            commands=tuple(Command(name=step.name, command=step.command, makes=step.all_makes) for step in self.steps),
        )

    def _add(self, name: str, words: str, launcher: Iterable[str] = (), **rest: Any) -> str:
        """One more command, from a text with blanks between its words; returns its name."""
        self.steps.append(Step(name=name, words=(*launcher, *words.split()), **rest))
        return name

    # data

    def _data(self) -> None:
        """The files made from the grammar. Without `makes`: these commands always run, and check existing files by hashes."""
        scale = self.scale
        self._add(
            "text",
            f"python generate_pretraining.py --rule-path {scale.rules} --save-path $OUT/data --sentence-num {scale.sentences} "
            f"--shard-num {scale.shards} --test-shard-num 1 --test-sentence-num {scale.test_sentences} --length-limit "
            f"{scale.length_limit}",
        )
        self._add(
            "samples",
            "python generate_samples.py --dir $OUT/data -o $OUT/data/pretraining --dup_factor 1 --vocab_file vocab.txt "
            f"--do_lower_case 1 --masked_lm_prob 0.15 --max_seq_length {scale.tokens} --model_name bert-large-uncased "
            "--max_predictions_per_seq 5 --single_mask",
            needs=("text",),
        )
        for task in self.tasks:
            self._labelled(f"task {task}", task, "data", scale.labelled, scale.validation, seed=0)
        self._add(
            LOOKUP,
            f"python -m pcfg.lookup --rule-path {scale.rules} --datafile $OUT/data/test0.txt --save-path $OUT/data/lookup.hdf5",
            needs=("text",),
        )

    def _labelled(self, name: str, task: str, folder: str, rows: int, validation: int, seed: int) -> str:
        """Labelled sentences of a task in a folder of their own."""
        return self._add(
            name,
            f"python generate_downstream.py --rule-path {self.scale.rules} --save-path $OUT/{folder} --sentence-num {rows} "
            f"--validation-num {validation} --task-type {task} --seed {seed} --length-limit {self.scale.length_limit}",
        )

    # pre-training

    def _adamw(self, size: str, seed: int) -> Run:
        """A standard run; that of the base size always has the length of the experiment `steps`."""
        scale = self.scale
        # The rate depends on the step alone, so that a longer run begins like a shorter one and continues after convergence.
        flags = (
            f"--optimizer_type adamw --lr {scale.lr:g} --lr_schedule constant_step --num_warmup_steps {scale.warmup} "
            f"--curve exp --decay_rate 0.5 --decay_step {scale.half_life}"
        )
        saved = (0, *scale.checkpoints) if size == scale.base else (0, scale.steps)
        return Run(folder=size, size=size, seed=seed, saved=saved, flags=flags)

    def _sgd(self, start: Run) -> Run:
        """SGD from a model that AdamW has trained until its loss has converged: a warmup, then a constant rate."""
        scale = self.scale
        flags = (
            f"--optimizer_type sgd --lr {scale.sgd_lr:g} --lr_schedule constant_step --num_warmup_steps {scale.sgd_warmup} "
            f"--curve const --model_name_or_path $OUT/{start.model(scale.steps)}"
        )
        # Its steps are counted from there.
        saved = tuple(step - scale.steps for step in scale.checkpoints if step > scale.steps)
        return dataclasses.replace(start, folder=f"{start.folder}_sgd", saved=saved, flags=flags, needs=(start.name,))

    def _train(self, runs: list[Run]) -> None:
        scale = self.scale
        for run in runs:
            size = scale.sizes[run.size]
            words = (
                "run_pretraining.py --model_type bert-mlm --tokenizer_name bert-large-uncased --hidden_act gelu "
                f"--hidden_size {size.hidden_size} --num_hidden_layers {size.layers} --num_attention_heads {size.heads} "
                f"--intermediate_size {4 * size.hidden_size} --hidden_dropout_prob {scale.dropout:g} "
                f"--attention_probs_dropout_prob {scale.dropout:g} --encoder_ln_mode pre-ln --train_batch_size {scale.batch} "
                f"--train_micro_batch_size_per_gpu {scale.micro_batch} --gradient_clipping 1.0 --weight_decay 0.01 "
                f"--adam_beta1 0.9 --adam_beta2 0.98 --adam_eps 1e-6 --max_steps {run.saved[-1]} "
                f"--save_steps {','.join(map(str, run.saved))} --dataset_path $OUT/data/pretraining "
                f"--output_dir $OUT/models/{run.folder} --job_name seed{run.seed} --seed {run.seed} --report_to none "
                f"--total_training_time 100000 --early_exit_time_marker 100000 {run.flags} {scale.precision}"
            )
            needs = ("samples", *run.needs)
            self._add(run.name, words, self.launcher, needs=needs, requires=run.requires, makes=run.models)

    # measurements

    def _measure(self, runs: list[Run], reference: Run, for_selection: bool = False) -> None:
        """Loss, comparison with the reference's loss, trace, probes and fine-tuning of all models of like runs.

        Args:
            runs: seeds of one kind.
            for_selection: only what choosing a weight needs, on the labelled files for that.
        """
        if not runs:
            return
        scale = self.scale
        folder = runs[0].folder
        of_reference = reference.model(scale.steps)

        def add(name: str, words: str, file: str, *needs: str) -> None:
            models = [model for run in runs for model in run.models if model != of_reference or file != COMPARISON]
            trained = tuple(run.name for run in runs)
            records = tuple((model, file) for model in models)
            self._add(f"{name} of {folder}", words, needs=needs, after=trained, records=records)

        data = f"--model-path $OUT/models/{folder} --datafile $OUT/data/test0.txt --vocabfile vocab.txt"
        loss = f"python calculate_loss.py {data} --condprobfile $OUT/data/lookup.hdf5"
        add("loss", loss, "loss.json", LOOKUP)
        add("comparison", f"{loss} --compare-with $OUT/{of_reference}", COMPARISON, LOOKUP, reference.name)
        tasks = self.tasks
        source = "task"
        labelled = "data"
        if for_selection:
            tasks = [ADVERSARIAL_TASK]
            source = "selection task"
            labelled = "data/selection"
        else:
            trace = f"python calculate_hessian.py {data} --nsamples {scale.trace_sentences}"
            add("trace", trace, "hessian.json", "text")
        for task in tasks:
            common = f"--model_name_or_path $OUT/models/{folder} {self._transfer(f'{labelled}/pcfg_{task}')}"
            add(f"probe {task}", f"python run_lp.py {common} {scale.probe}", f"probe_pcfg_{task}.json", f"{source} {task}")
            if task in scale.finetune_tasks and not for_selection:
                finetune = f"python run_ft.py {common} {scale.finetune}"
                add(f"finetune {task}", finetune, f"finetune_pcfg_{task}.json", f"task {task}")

    def _transfer(self, labelled: str, tokenizer: str = "bert-large-uncased") -> str:
        """Flags that probes and fine-tuning share; `labelled`: the labelled files without their endings."""
        return (
            f"--train_file $OUT/{labelled}.csv --validation_file $OUT/{labelled}_validation.csv --tokenizer_name {tokenizer} "
            f"--max_seq_length {self.scale.tokens} --do_train --do_eval --weight_decay 0.01 --max_grad_norm 1.0 "
            "--lr_scheduler_type polynomial"
        )

    def _lookup_probes(self) -> None:
        """Probes of the language's own conditionals, under models/lookup_table."""
        for task in self.tasks:
            # Conditionals are far smaller numbers than hidden states: at the models' rate their probe would not converge.
            words = (
                f"python run_lp.py --features conditional --rule-path {self.scale.rules} --output_dir $OUT/{TABLE_FOLDER} "
                f"{self._transfer(f'data/pcfg_{task}', '$OUT/data/pretraining/bert-large-uncased')} {self.scale.probe} "
                "--solver adamw --learning_rate 1e-1"
            )
            file = f"{TABLE_FOLDER}/probe_pcfg_{task}.json"
            self._add(f"probe {task} of the {LOOKUP}", words, needs=("samples", f"task {task}"), makes=(file,))

    # experiments

    def _steps_experiment(self, base: list[Run], sgd: list[Run]) -> Experiment:
        """Training on: checkpoints of AdamW's runs, and of SGD's, counted from where AdamW began."""
        scale = self.scale
        entries = [run.entry("AdamW", step) for run in base for step in scale.checkpoints]
        for start, run in zip(base, sgd, strict=True):
            entries += [start.entry("SGD", scale.steps), *(run.entry("SGD", step, scale.steps) for step in run.saved)]
        return Experiment(name=STEPS, entries=tuple(entries))

    def _sizes_experiment(self, sizes: dict[str, list[Run]]) -> Experiment:
        """Models of all sizes at the same step, in the parameters of the largest by both rules."""
        step = self.scale.steps
        large = sizes[self.scale.largest][0]
        entries = []
        enlarged: dict[str, list[tuple[str, str]]] = {rule: [] for rule in TIED_SCALES}
        for name, runs in sizes.items():
            for run in runs:
                common = {}
                for rule in TIED_SCALES if name != large.size else ():
                    common[rule] = f"enlarged/{rule}/{run.folder}/seed{run.seed}"
                    command = self._add(
                        f"enlarge {run.folder} seed {run.seed} by {rule}",
                        f"python enlarge.py --checkpoint-path $OUT/{run.model(step)} --large-model-path "
                        f"$OUT/{large.model(step)} --enlarged-model-path $OUT/{common[rule]} --tied-scale {rule}",
                        needs=(run.name, large.name),
                        makes=(common[rule],),
                    )
                    enlarged[rule].append((command, common[rule]))
                entries.append(run.entry(name, step).model_copy(update={"common": common}))
        for rule, models in enlarged.items():
            self._add(
                f"trace of the enlarged by {rule}",
                f"python calculate_hessian.py --model-path $OUT/enlarged/{rule} --datafile $OUT/data/test0.txt --vocabfile "
                f"vocab.txt --nsamples {self.scale.trace_sentences}",
                needs=("text",),
                after=tuple(command for command, _ in models),
                records=tuple((folder, "hessian.json") for _, folder in models),
            )
        return Experiment(name=SIZES, entries=tuple(entries))

    def _selection(self) -> list[Run]:
        """Models for choosing the adversarial weight, the choice, and the runs with the chosen one, not yet trained."""
        scale = self.scale
        seed = scale.selection_seed
        task = ADVERSARIAL_TASK
        # Labelled files of their own: for the adversarial term, and for choosing; the tasks' files stay unseen.
        adversarial = self._labelled("adversarial task", task, "data/adversarial", scale.labelled, 1, seed=1)
        self._labelled(f"selection task {task}", task, "data/selection", scale.labelled, scale.validation, seed=2)
        plain = dataclasses.replace(self._adamw(scale.base, seed), folder="selection_standard", saved=(0, scale.steps))
        tried = {
            weight: self._adversarial(f"selection_{weight:g}", seed, f"--adversarial_weight {weight:g}", adversarial)
            for weight in scale.weights
        }
        runs = [plain, *tried.values()]
        self._train(runs)
        for run in runs:
            self._measure([run], plain, for_selection=True)
        candidates = " ".join(f"--candidate {weight:g} $OUT/{run.model(scale.steps)}" for weight, run in tried.items())
        measured = [f"{what} of {run.folder}" for run in runs for what in ("comparison", f"probe {task}")]
        self._add(
            "choice of the weight",
            f"python -m pretraining.experiments.choose --standard $OUT/{plain.model(scale.steps)} {candidates} "
            f"--task pcfg_{task} --max-gap {MAX_GAP:g} --margin {MARGIN:g} --output $OUT/adversarial",
            needs=tuple(measured),
            makes=(CHOICE,),
        )
        runs = [
            self._adversarial("adversarial", seed, f"--config $OUT/{CHOSEN}", adversarial, "choice of the weight")
            for seed in self.seeds
        ]
        return [dataclasses.replace(run, requires=CHOSEN) for run in runs]

    def _adversarial(self, folder: str, seed: int, flags: str, *needs: str) -> Run:
        """A run with the adversarial term, of the standard one's length and order of sentences."""
        scale = self.scale
        plain = self._adamw(scale.base, seed)
        flags = (
            f"{plain.flags} --adversarial_file $OUT/data/adversarial/pcfg_{ADVERSARIAL_TASK}.csv --adversarial_batch_size "
            f"{scale.adversarial_batch} --adversarial_ridge {scale.ridge:g} {flags}"
        )
        return dataclasses.replace(plain, folder=folder, saved=(0, scale.steps), flags=flags, needs=needs)

    def _algorithms_experiment(self, base: list[Run], adversarial: list[Run]) -> Experiment:
        """Standard, adversarial and lookup table."""
        step = self.scale.steps
        entries = [run.entry("standard", step) for run in base] + [run.entry("adversarial", step) for run in adversarial]
        table = Entry(group=LOOKUP, seed=None, step=None, folder=TABLE_FOLDER)
        return Experiment(name=ALGORITHMS, entries=(*entries, table), choice=CHOICE)
