"""From a scale, seeds and tasks to the commands of the experiments, each after those that it depends on.

A command is a line of the README's scripts. It reads and writes files below `$OUT`, and nothing else connects two commands.
Runs that two experiments share are made once: the models of `steps` are those of the middle size of `sizes`, and the standard
ones of `algorithms`.
"""

import dataclasses
import shlex
from typing import Any

from pretraining.experiments.scales import Scale
from pretraining.model.enlarge import TIED_SCALES
from pretraining.report import contract
from pretraining.report.contract import ALGORITHMS, SIZES, STEPS, Entry, Experiment, Experiments
from pretraining.report.rows import COMPARISON
from pretraining.report.same_loss import MARGIN, MAX_GAP

ADVERSARIAL_TASK = "B"
CHOICE, CHOSEN = "adversarial/choice.json", "adversarial/chosen.json"
LOOKUP = "lookup table"


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """A pre-training run: `models/FOLDER/seedS`."""

    folder: str  # below models/, of all seeds of one kind
    size: str  # name in the scale
    seed: int
    last: int  # its last step; `saved` are the earlier steps with a checkpoint
    saved: tuple[int, ...]
    flags: tuple[str, ...] = ()  # of run_pretraining.py, in addition to those of all runs
    # needs, requires: as in `Step`
    needs: tuple[str, ...] = ()
    requires: str | None = None

    @property
    def name(self) -> str:
        return f"train {self.folder} seed {self.seed}"

    def model(self, step: int) -> str:
        """The folder of a checkpoint."""
        return f"models/{self.folder}/seed{self.seed}/step{step:07d}"

    @property
    def all_saved(self) -> list[int]:
        return sorted({*self.saved, self.last})

    @property
    def models(self) -> tuple[str, ...]:
        return tuple(map(self.model, self.all_saved))


class Planner:
    """The commands of the chosen experiments.

    Args:
        scale: the sizes of everything.
        names: of the experiments, among `NAMES`.
        seeds: of pre-training.
        tasks: of A, B and C.
        launcher: words that start run_pretraining.py, instead of `python`.
    """

    def __init__(self, scale: Scale, names: list[str], seeds: list[int], tasks: list[str], launcher: list[str]):
        self.scale = scale
        self.names = names
        self.seeds = seeds
        self.tasks = tasks
        self.launcher = launcher
        self.steps: list[Step] = []

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
            self._measure(runs, base[0].model(scale.steps), base[0].name)
        experiments = []
        if STEPS in self.names:
            experiments.append(self._steps_experiment(base, sgd))
        if SIZES in self.names:
            experiments.append(self._sizes_experiment({name: sizes[name] for name in scale.sizes}))
        if ALGORITHMS in self.names:
            self._measure(adversarial, base[0].model(scale.steps), base[0].name)
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
            commands=tuple(
                contract.Command(
                    name=step.name,
                    command=step.command,
                    makes=step.makes or tuple(f"{folder}/{file}" for folder, file in step.records),
                )
                for step in self.steps
            ),
        )

    def _add(self, name: str, words: str | list[str], **rest: Any) -> str:
        """One more command, from words or from a text with blanks between them; returns its name."""
        self.steps.append(Step(name=name, words=tuple(words.split() if isinstance(words, str) else words), **rest))
        return name

    # data

    def _data(self) -> None:
        """The files made from the grammar. Without `makes`: these commands always run, and check existing files by hashes."""
        scale = self.scale
        rules = f"--rule-path {scale.rules}"
        limit = f"--length-limit {scale.length_limit}"
        self._add(
            "text",
            f"python generate_pretraining.py {rules} --save-path $OUT/data --sentence-num {scale.sentences} --shard-num "
            f"{scale.shards} --test-shard-num 1 --test-sentence-num {scale.test_sentences} {limit}",
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
            f"python -m pcfg.lookup {rules} --datafile $OUT/data/test0.txt --save-path $OUT/data/lookup.hdf5",
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
        return Run(folder=size, size=size, seed=seed, last=max(saved), saved=saved, flags=tuple(flags.split()))

    def _sgd(self, start: Run) -> Run:
        """SGD from a model that AdamW has trained until its loss has converged: a warmup, then a constant rate."""
        scale = self.scale
        flags = (
            f"--optimizer_type sgd --lr {scale.sgd_lr:g} --lr_schedule constant_step --num_warmup_steps {scale.sgd_warmup} "
            f"--curve const --model_name_or_path $OUT/{start.model(scale.steps)}"
        )
        *saved, last = self._after_convergence()
        needs = (start.name,)
        folder = f"{start.folder}_sgd"
        return dataclasses.replace(start, folder=folder, last=last, saved=tuple(saved), flags=tuple(flags.split()), needs=needs)

    def _after_convergence(self) -> list[int]:
        """How many steps after `steps` the later checkpoints of the experiment are."""
        return [step - self.scale.steps for step in self.scale.checkpoints if step > self.scale.steps]

    def _train(self, runs: list[Run]) -> None:
        for run in runs:
            scale, size = self.scale, self.scale.sizes[run.size]
            words = [
                *self.launcher,
                *(
                    "run_pretraining.py --model_type bert-mlm --tokenizer_name bert-large-uncased --hidden_act gelu "
                    f"--hidden_size {size.hidden_size} --num_hidden_layers {size.layers} --num_attention_heads {size.heads} "
                    f"--intermediate_size {4 * size.hidden_size} --hidden_dropout_prob {scale.dropout:g} "
                    f"--attention_probs_dropout_prob {scale.dropout:g} --encoder_ln_mode pre-ln --train_batch_size "
                    f"{scale.batch} --train_micro_batch_size_per_gpu {scale.micro_batch} --gradient_clipping 1.0 "
                    f"--weight_decay 0.01 --adam_beta1 0.9 --adam_beta2 0.98 --adam_eps 1e-6 --max_steps {run.last} "
                    f"--save_steps {','.join(map(str, run.all_saved))} --dataset_path $OUT/data/pretraining "
                    f"--output_dir $OUT/models/{run.folder} --job_name seed{run.seed} --seed {run.seed} --report_to none "
                    "--total_training_time 100000 --early_exit_time_marker 100000"
                ).split(),
                *run.flags,
                *scale.precision,
            ]
            self._add(run.name, words, needs=("samples", *run.needs), requires=run.requires, makes=run.models)

    # measurements

    def _measure(self, runs: list[Run], reference: str, reference_run: str, for_selection: bool = False) -> None:
        """Loss, comparison with the reference, trace, probes and fine-tuning of all models of like runs.

        Args:
            runs: seeds of one kind.
            reference: the model that the losses are compared with, made by the command `reference_run`.
            for_selection: only what choosing a weight needs, on the labelled files for that.
        """
        if not runs:
            return
        scale, folder = self.scale, runs[0].folder
        trained = tuple(run.name for run in runs)
        folders = [model for run in runs for model in run.models]

        def add(name: str, words: str, file: str, needs: tuple[str, ...]) -> None:
            records = tuple((model, file) for model in folders if model != reference or file != COMPARISON)
            self._add(f"{name} of {folder}", words, needs=needs, after=trained, records=records)

        where = f"--model-path $OUT/models/{folder}"
        data = "--datafile $OUT/data/test0.txt --vocabfile vocab.txt"
        loss = f"python calculate_loss.py {where} {data} --condprobfile $OUT/data/lookup.hdf5"
        add("loss", loss, "loss.json", (LOOKUP,))
        add("comparison", f"{loss} --compare-with $OUT/{reference}", COMPARISON, (LOOKUP, reference_run))
        if for_selection:
            tasks, source, labelled = [ADVERSARIAL_TASK], "selection task", "data/selection"
        else:
            tasks, source, labelled = self.tasks, "task", "data"
            trace = f"python calculate_hessian.py {where} {data} --nsamples {scale.trace_sentences}"
            add("trace", trace, "hessian.json", ("text",))
        for task in tasks:
            files = f"--train_file $OUT/{labelled}/pcfg_{task}.csv --validation_file $OUT/{labelled}/pcfg_{task}_validation.csv"
            common = f"--model_name_or_path $OUT/models/{folder} {files} {self._transfer()}"
            probe = f"python run_lp.py {common} {' '.join(scale.probe)}"
            add(f"probe {task}", probe, f"probe_pcfg_{task}.json", (f"{source} {task}",))
            if task in scale.finetune_tasks and not for_selection:
                finetune = f"python run_ft.py {common} {' '.join(scale.finetune)}"
                add(f"finetune {task}", finetune, f"finetune_pcfg_{task}.json", (f"task {task}",))

    def _transfer(self, tokenizer: str = "bert-large-uncased") -> str:
        """Flags that probes and fine-tuning share."""
        return (
            f"--tokenizer_name {tokenizer} --max_seq_length {self.scale.tokens} --do_train --do_eval --weight_decay 0.01 "
            "--max_grad_norm 1.0 --lr_scheduler_type polynomial"
        )

    def _lookup_probes(self) -> None:
        """Probes of the language's own conditionals, under models/lookup_table."""
        scale, folder = self.scale, "models/lookup_table"
        flags = self._transfer("$OUT/data/pretraining/bert-large-uncased")
        for task in self.tasks:
            # Conditionals are far smaller numbers than hidden states: at the models' rate their probe would not converge.
            words = (
                f"python run_lp.py --features conditional --rule-path {scale.rules} --output_dir $OUT/{folder} --train_file "
                f"$OUT/data/pcfg_{task}.csv --validation_file $OUT/data/pcfg_{task}_validation.csv {flags} "
                f"{' '.join(scale.probe)} --learning_rate 1e-1"
            )
            file = f"{folder}/probe_pcfg_{task}.json"
            self._add(f"probe {task} of the {LOOKUP}", words, needs=("samples", f"task {task}"), makes=(file,))

    # experiments

    def _steps_experiment(self, base: list[Run], sgd: list[Run]) -> Experiment:
        """Training on: checkpoints of AdamW's runs, and of SGD's, counted from where AdamW began."""
        steps = self.scale.steps
        entries = [
            Entry(group="AdamW", seed=run.seed, step=step, folder=run.model(step))
            for run in base
            for step in self.scale.checkpoints
        ]
        for start, run in zip(base, sgd, strict=True):
            folders = {steps: start.model(steps)} | {steps + step: run.model(step) for step in self._after_convergence()}
            entries += [Entry(group="SGD", seed=run.seed, step=step, folder=folder) for step, folder in folders.items()]
        return Experiment(name=STEPS, entries=tuple(entries))

    def _sizes_experiment(self, sizes: dict[str, list[Run]]) -> Experiment:
        """Models of all sizes at the same step, in the parameters of the largest by both rules."""
        scale = self.scale
        step = scale.steps
        large = sizes[scale.largest][0]
        entries = []
        enlarged: dict[str, list[tuple[str, str]]] = {rule: [] for rule in TIED_SCALES}
        for name, runs in sizes.items():
            for run in runs:
                common = {}
                for rule in TIED_SCALES if name != scale.largest else ():
                    common[rule] = f"enlarged/{rule}/{run.folder}/seed{run.seed}"
                    command = self._add(
                        f"enlarge {run.folder} seed {run.seed} by {rule}",
                        f"python enlarge.py --checkpoint-path $OUT/{run.model(step)} --large-model-path "
                        f"$OUT/{large.model(step)} --enlarged-model-path $OUT/{common[rule]} --tied-scale {rule}",
                        needs=(run.name, large.name),
                        makes=(common[rule],),
                    )
                    enlarged[rule].append((command, common[rule]))
                entries.append(Entry(group=name, seed=run.seed, step=step, folder=run.model(step), common=common))
        for rule, models in enlarged.items():
            self._add(
                f"trace of the enlarged by {rule}",
                f"python calculate_hessian.py --model-path $OUT/enlarged/{rule} --datafile $OUT/data/test0.txt --vocabfile "
                f"vocab.txt --nsamples {scale.trace_sentences}",
                needs=("text",),
                after=tuple(command for command, _ in models),
                records=tuple((folder, "hessian.json") for _, folder in models),
            )
        return Experiment(name=SIZES, entries=tuple(entries))

    def _selection(self) -> list[Run]:
        """Models for choosing the adversarial weight, the choice, and the runs with the chosen one, not yet trained."""
        scale, seed = self.scale, self.scale.selection_seed
        # Labelled files of their own: for the adversarial term, and for choosing; the tasks' files stay unseen.
        adversarial = self._labelled("adversarial task", ADVERSARIAL_TASK, "data/adversarial", scale.labelled, 1, seed=1)
        task = ADVERSARIAL_TASK
        self._labelled(f"selection task {task}", task, "data/selection", scale.labelled, scale.validation, seed=2)
        plain = dataclasses.replace(self._adamw(scale.base, seed), folder="selection_standard", last=scale.steps, saved=(0,))
        tried = {
            weight: self._adversarial(f"selection_{weight:g}", seed, (adversarial,), ("--adversarial_weight", f"{weight:g}"))
            for weight in scale.weights
        }
        runs = [plain, *tried.values()]
        self._train(runs)
        standard = plain.model(scale.steps)
        for run in runs:
            self._measure([run], standard, plain.name, for_selection=True)
        candidates = " ".join(f"--candidate {weight:g} $OUT/{run.model(scale.steps)}" for weight, run in tried.items())
        measured = [f"{what} of {run.folder}" for run in runs for what in ("comparison", f"probe {task}")]
        self._add(
            "choice of the weight",
            f"python -m pretraining.experiments.choose --standard $OUT/{standard} {candidates} --task pcfg_{task} "
            f"--max-gap {MAX_GAP:g} --margin {MARGIN:g} --output $OUT/adversarial",
            needs=tuple(measured),
            makes=(CHOICE,),
        )
        needs = (adversarial, "choice of the weight")
        flags = ("--config", f"$OUT/{CHOSEN}")
        return [self._adversarial("adversarial", seed, needs, flags, requires=CHOSEN) for seed in self.seeds]

    def _adversarial(
        self, folder: str, seed: int, needs: tuple[str, ...], flags: tuple[str, ...], requires: str | None = None
    ) -> Run:
        """A run with the adversarial term, of the standard one's length and order of sentences."""
        scale, plain = self.scale, self._adamw(self.scale.base, seed)
        text = f"--adversarial_file $OUT/data/adversarial/pcfg_{ADVERSARIAL_TASK}.csv"
        text += f" --adversarial_batch_size {scale.adversarial_batch} --adversarial_ridge {scale.ridge:g}"
        return dataclasses.replace(
            plain,
            folder=folder,
            last=scale.steps,
            saved=(0,),
            flags=(*plain.flags, *text.split(), *flags),
            needs=needs,
            requires=requires,
        )

    def _algorithms_experiment(self, base: list[Run], adversarial: list[Run]) -> Experiment:
        """Standard, adversarial and lookup table."""
        step = self.scale.steps
        entries = [
            Entry(group=group, seed=run.seed, step=step, folder=run.model(step))
            for group, runs in (("standard", base), ("adversarial", adversarial))
            for run in runs
        ]
        entries.append(Entry(group=LOOKUP, seed=None, step=None, folder="models/lookup_table"))
        return Experiment(name=ALGORITHMS, entries=tuple(entries), choice=CHOICE)
