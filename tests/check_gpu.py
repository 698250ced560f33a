"""Every CUDA path of the project on a machine with one GPU: what is expected, what was measured, and a verdict.

    bash scripts/check_gpu.sh

Some of the checks, in a folder where an earlier call has left data and models:

    bash scripts/check_gpu.sh --folder FOLDER measurements probes

All checks on the CPU in small sizes, to find out whether they run; rates and kernels are not judged:

    bash scripts/check_gpu.sh --rehearsal

All checks together take at most 8 minutes: one that has no time left fails. Speeds in bytes, operations or sentences per second
are judged on an H100 or H200 only. The exit code is 0 if all is as expected, 1 if not, and 2 without a CUDA GPU.
"""

import argparse
import copy
import dataclasses
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.append(str(Path(__file__).with_name("benchmarks")))

import numpy as np
import torch
from torch.nn.attention import SDPBackend

from pcfg.common.cli import Parser, run_main
from pcfg.common.files import InputError
from pcfg.grammar import find_rules
from pretraining.data.samples import Samples, read_samples
from pretraining.evaluation.records import Record, read_records
from pretraining.model.bert import MaskedLM
from pretraining.model.config import ModelConfig
from pretraining.training.batches import MicroBatch, Packing, masked_loss, micro_batch
from pretraining.training.metrics import read_metrics

ROOT = Path(__file__).parents[1]
RULES = "rule_deep_mlm.txt"
SECONDS, OF_ONE = 8 * 60, 150  # of all checks, and of each
STEPS, SEED = 30, 42  # of the runs of `training`
MODEL = f"models/float32/step{STEPS:07d}"  # that measurements take
LOSSES = ("loss", "validation_loss", "gap_pairs")
RUNS = {  # flags, and the run that has the same losses up to rounding
    "float32": (f"--save_steps {STEPS // 2}", None),
    "clipping": ("--gradient_clipping 0.1", None),
    "bf16": ("--bf16", "float32"),
    "fp16": ("--fp16", "float32"),
    "bf16-zero1": ("--bf16 --zero_stage 1", "float32"),
    "bf16-zero2-clipping": ("--bf16 --zero_stage 2 --gradient_clipping 0.1", "clipping"),
    "bf16-compile": ("--bf16 --compile", "float32"),
    "checkpointing": ("--activation_checkpointing", "float32"),
    "seeds": (f"--seeds {SEED},{SEED + 1}", "float32"),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclasses.dataclass
class Figure:
    what: str
    expected: str
    measured: str
    is_ok: bool


def near(what: str, value: float, expected: float, tolerance: float) -> Figure:
    return Figure(what, f"{expected:.7g} ± {tolerance:.1g}", f"{value:.7g}", abs(value - expected) <= tolerance)


@dataclasses.dataclass
class Work:
    """Where the checks run: a folder for their files, a device, and `small` sizes in a rehearsal."""

    folder: Path
    device: torch.device
    small: bool = False

    def size(self, full: int, small: int) -> int:
        return small if self.small else full

    def samples(self) -> Samples:
        return read_samples(self.folder / "data" / "pretraining" / "train_shard_0.hdf5")

    def rate(self, what: str, value: float, unit: str, least: float, everywhere: bool = False) -> Figure:
        """A rate that is at least `least`, on an H100 or H200 or `everywhere`; a rehearsal does not judge it."""
        is_judged = not self.small and (everywhere or any(name in torch.cuda.get_device_name() for name in ("H100", "H200")))
        expected = f"{least:,g} {unit} or more{'' if everywhere else ' (H100)'}"
        return Figure(what, expected, f"{value:,.3g} {unit}", value >= least or not is_judged)

    def seconds(self, function: Callable[[], object], repeats: int = 5) -> float:
        """Median duration of `function`, after a first call."""
        times = []
        for _ in range(repeats + 1):
            start = time.perf_counter()
            function()
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        return statistics.median(times[1:])

    def run(self, commands: dict[str, tuple[str, str]]) -> dict[str, str]:
        """Run programs in the folder, several at the same time, each a device and its words by a name.

        Those on "cpu" see no GPU. Their outputs are in logs/NAME. The result is the reason, in one line, of each that fails.
        """
        logs = self.folder / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        waiting, running, failures = list(commands), {}, {}
        try:
            while waiting or running:
                if waiting and len(running) < max(1, (os.cpu_count() or 1) // 2):
                    name = waiting.pop(0)
                    device, words = commands[name]
                    program, *arguments = words.split()
                    environment = os.environ | ({"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {})
                    with open(logs / name, "w") as log:
                        command = [sys.executable, ROOT / program, *arguments]
                        running[name] = subprocess.Popen(command, cwd=self.folder, stdout=log, stderr=log, env=environment)
                for name in [name for name, process in running.items() if process.poll() is not None]:
                    if code := running.pop(name).returncode:
                        last = (logs / name).read_text(errors="replace").strip().rpartition("\n")[2]
                        failures[name] = f"exit code {code}, {last[:200]}"
                time.sleep(0.02)
        finally:
            for process in running.values():
                process.kill()
                process.wait()
        return failures

    def succeed(self, commands: dict[str, tuple[str, str]]) -> None:
        """`run`; raises the first failure."""
        for name, reason in self.run(commands).items():
            raise RuntimeError(f"{name}: {reason}")

    def pretrain(self, name: str, flags: str) -> str:
        """The command of a run, of which nothing earlier is left; of two equal flags the last one counts."""
        shutil.rmtree(self.folder / "models" / name, ignore_errors=True)
        shape = "--hidden_size 256 --num_hidden_layers 4 --num_attention_heads 4 --intermediate_size 1024"
        if self.small:
            shape = "--hidden_size 32 --num_hidden_layers 2 --num_attention_heads 2 --intermediate_size 64"
        return (
            f"run_pretraining.py --dataset_path data/pretraining --output_dir models {shape} "
            "--tokenizer_name bert-large-uncased --hidden_dropout_prob 0 --attention_probs_dropout_prob 0 --lr 1e-3 "
            f"--train_batch_size {self.size(1024, 64)} --train_micro_batch_size_per_gpu 1024 --gradient_clipping 0 "
            f"--lr_schedule step --curve const --warmup_proportion 0 --max_steps {STEPS} --print_steps 10 --report_to none "
            f"--do_validation --rule-path {RULES} --gap_sentences 50 --seed {SEED} --job_name {name} {flags}"
        )

    def last(self, run: str) -> dict[str, float]:
        """What a run has recorded of its last step."""
        records = read_metrics(self.folder / "models" / run / "metrics.jsonl")
        return {
            name: value
            for record in records
            if record["step"] == STEPS and record.get("seed", SEED) == SEED
            for name, value in record.items()
        }

    def both(self, programs: dict[str, str]) -> dict[str, list[dict[str, Record]]]:
        """By the name of a program, its records on the CPU and on the device, by the names of their files."""
        places = {"cpu": "cpu", "gpu": self.device.type}
        commands = {}
        for name, words in programs.items():
            for place, device in places.items():
                flags = f"--records_path records/{name}-{place} --overwrite"
                commands[f"{name}-{place}"] = (device, f"{words.replace('DEVICE', device)} {flags}")
        self.succeed(commands)
        return {name: [read_records(self.folder / "records" / f"{name}-{place}") for place in places] for name in programs}


def data(work: Work) -> list[Figure]:
    """Text, labelled sentences and samples."""
    start = time.monotonic()
    text = "--shard-num 1 --test-shard-num 1"
    text += f" --sentence-num {work.size(40_000, 2_500)} --test-sentence-num {work.size(2_000, 200)}"
    labels = f"--task-type B --sentence-num {work.size(4_000, 400)} --validation-num {work.size(2_000, 200)}"
    masks = "--vocab_file vocab.txt --masked_lm_prob 0.15 --max_seq_length 32 --max_predictions_per_seq 5"
    source = f"--rule-path {RULES} --save-path data"
    programs = {"text": f"generate_pretraining.py {source} {text}", "labels": f"generate_downstream.py {source} {labels}"}
    work.succeed({name: ("cpu", words) for name, words in programs.items()})
    work.succeed({"samples": ("cpu", f"generate_samples.py --dir data -o data/pretraining {masks}")})
    return [Figure("text, labels, samples", "are written", f"in {time.monotonic() - start:.0f} s", True)]


def ceilings(work: Work) -> list[Figure]:
    """The speed of copies and of products of matrices."""
    side = work.size(8192, 256)
    one, other = torch.randn(2, side, side, device=work.device).to(torch.bfloat16)
    source = torch.zeros(work.size(1 << 30, 1 << 16), device=work.device)
    target = torch.empty_like(source)
    copies = 2 * source.nbytes / work.seconds(lambda: target.copy_(source))
    products = 2 * side**3 / work.seconds(lambda: one @ other)
    return [
        work.rate("copy", copies / 1e12, "TB/s", 2.4),
        work.rate(f"bf16 product of {side:,} x {side:,} matrices", products / 1e12, "TFLOP/s", 550),
    ]


def attention(work: Work) -> list[Figure]:
    """The kernels that are chosen, and the time of batches of new sizes: cuDNN would build a plan for each."""

    def inputs(sentences: int, dtype: torch.dtype) -> torch.Tensor:
        """Query, key and value of 14 tokens and 16 heads, in the layout of `SelfAttention`."""
        packed = torch.randn(sentences * 14, 3 * 1024, device=work.device, dtype=dtype, requires_grad=True)
        return packed.view(sentences, 14, 3, 16, 64).permute(2, 0, 3, 1, 4)

    figures = []
    for name, dtype in DTYPES.items():
        for mask in (None, torch.ones(64, 1, 1, 14, dtype=torch.bool, device=work.device)):
            choices = {SDPBackend(torch._fused_sdp_choice(*inputs(64, dtype), mask, dropout)).name for dropout in (0.0, 0.1)}
            expected = "FLASH_ATTENTION" if mask is None and name != "float32" else "EFFICIENT_ATTENTION"
            what = f"{name} {'without' if mask is None else 'with'} padding"
            figures.append(Figure(what, expected, ", ".join(sorted(choices)), choices == {expected} or work.small))
    sizes = iter(range(301, 308))
    attend = torch.nn.functional.scaled_dot_product_attention
    seconds = work.seconds(lambda: attend(*inputs(next(sizes), torch.bfloat16)).sum().backward())
    return [*figures, Figure("a batch of a new size", "below 50 ms", f"{1e3 * seconds:.1f} ms", seconds < 0.05 or work.small)]


def cases(work: Work, arithmetic: str, **shape: str) -> Iterator[tuple[MaskedLM, MicroBatch]]:
    """A model without dropout and its micro-batches: with a block for each length, and as the trainer packs them."""
    samples = work.samples()
    words = int(samples.attributes["vocab_size"])
    config = ModelConfig(words, 128, 3, 2, 256, "gelu", 0.0, 0.0, max_position_embeddings=32, **shape)
    torch.manual_seed(0)
    model = MaskedLM(config)
    for packing in (Packing(overhead=0), Packing.of(config, work.device, arithmetic)):
        yield model, micro_batch(samples, np.arange(work.size(512, 64)), packing)


def gradient(model: MaskedLM, batch: MicroBatch, arithmetic: str, device: torch.device) -> torch.Tensor:
    """The gradient of a copy of the model on a device: (parameters,)."""
    model = copy.deepcopy(model).to(device)
    with torch.autocast(device.type, DTYPES.get(arithmetic), enabled=arithmetic in ("bfloat16", "float16")):
        loss = masked_loss(model, batch.to(device))
    loss.backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


def gradients(work: Work) -> list[Figure]:
    """Gradients of packed micro-batches against those in float64 on the CPU."""
    figures = []
    for arithmetic, limit in {"float32": 1e-5, "bfloat16": 2e-2, "float16": 2e-2}.items():
        errors = []
        for norm in ("pytorch", "rms_norm"):
            for mode in ("pre-ln", "post-ln"):
                for model, batch in cases(work, arithmetic, layer_norm_type=norm, encoder_ln_mode=mode):
                    own = gradient(model, batch, arithmetic, work.device).cpu().double()
                    exact = gradient(copy.deepcopy(model).double(), batch, "float64", torch.device("cpu"))
                    errors.append(float((own - exact).norm() / exact.norm()))
        is_ok = all(error < limit for error in errors)
        figures.append(Figure(f"relative error, {arithmetic}", f"below {limit:g}", f"{np.max(errors):.1e}", is_ok))
    return figures


def waits(work: Work) -> list[Figure]:
    """How often the host waits for the device in a forward and backward pass."""
    set_mode = torch.cuda.set_sync_debug_mode if work.device.type == "cuda" else lambda _: None
    figures = []
    for arithmetic in ("float32", "bfloat16"):
        lines = []
        for model, batch in cases(work, arithmetic):
            model.to(work.device)
            gradient(model, batch, arithmetic, work.device)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                set_mode("warn")
                gradient(model, batch, arithmetic, work.device)
                set_mode("default")
            found = [warning for warning in caught if "synchroniz" in str(warning.message)]
            lines += [f"{Path(warning.filename).name}:{warning.lineno}" for warning in found]
        figures.append(Figure(f"of the host, {arithmetic}", "0", " ".join([str(len(lines)), *sorted(set(lines))]), not lines))
    return figures


def training(work: Work) -> list[Figure]:
    """Precisions, ZeRO stages, compiling and other ways to train: the losses of the last step are those of float32."""
    failures = work.run({name: (work.device.type, work.pretrain(name, flags)) for name, (flags, _) in RUNS.items()})
    figures = []
    for name, (_, other) in RUNS.items():
        if failed := [run for run in (name, other) if run in failures]:
            figures.append(Figure(name, "exit code 0", f"{failed[0]}: {failures[failed[0]]}", False))
            continue
        own = work.last(name)
        if other is None:
            uniform = math.log(int(work.samples().attributes["vocab_size"]))
            what, is_ok = f"loss at step {STEPS}, {name}", own["loss"] < uniform - 0.1
            figures.append(Figure(what, f"below {uniform:.3f} - 0.1", f"{own['loss']:.4f}", is_ok))
            continue
        values, wanted = ([record[key] for key in LOSSES] for record in (own, work.last(other)))
        is_ok = all(abs(value - expected) <= 0.02 for value, expected in zip(values, wanted, strict=True))
        what = f"loss, that of validation and gap at step {STEPS}, {name}"
        texts = [", ".join(f"{value:.4f}" for value in numbers) for numbers in (wanted, values)]
        figures.append(Figure(what, f"{texts[0]}, all ± 0.02", texts[1], is_ok))
    is_hit = "recompile_limit" in (work.folder / "logs" / "bf16-compile").read_text()
    return [*figures, Figure("limit of graphs, bf16-compile", "not hit", "hit" if is_hit else "not hit", not is_hit)]


def resuming(work: Work) -> list[Figure]:
    """Runs that begin on one device and go on on the other one have the loss of the run float32."""

    def onward(device: str, run: str) -> dict[str, tuple[str, str]]:
        state = f"--load_training_checkpoint models/{run}/training_state --load_checkpoint_id step{STEPS // 2:07d}"
        return {f"on-{device}": (device, work.pretrain(f"on-{device}", state))}

    begin = work.pretrain("begun-on-cpu", f"--max_steps {STEPS // 2}")
    work.succeed({"begun-on-cpu": ("cpu", begin)} | onward("cpu", "float32"))
    work.succeed(onward(work.device.type, "begun-on-cpu"))
    loss = work.last("float32")["loss"]
    names = {"from the device to the CPU": "cpu", "from the CPU to the device": work.device.type}
    return [near(f"loss at step {STEPS}, {what}", work.last(f"on-{name}")["loss"], loss, 2e-3) for what, name in names.items()]


def measurements(work: Work) -> list[Figure]:
    """Exact loss, gap and both traces on both devices."""
    inputs = f"--model-path {MODEL} --vocabfile data/vocab.txt --datafile data/pcfg_B_validation.csv --rule-path {RULES}"
    programs = {
        "loss": f"calculate_loss.py {inputs} --device DEVICE --nsamples {work.size(500, 50)}",
        "traces": f"calculate_hessian.py {inputs} --device DEVICE --nsamples {work.size(64, 32)} --estimator both",
    }
    records = work.both(programs)
    here, there = (pair["loss.json"] for pair in records["loss"])
    parts = {name: (getattr(there, name).pairs.mean, getattr(here, name).pairs.mean) for name in ("loss", "gap")}
    figures = [near(f"{name}, as on the CPU", value, expected, 1e-6) for name, (value, expected) in parts.items()]
    here, there = records["traces"]
    for name in ("hessian.json", "hessian_hutchinson.json"):
        figures.append(near(f"{name}, as on the CPU", there[name].value, here[name].value, 1e-4 * abs(here[name].value)))
    return figures


def probes(work: Work) -> list[Figure]:
    """Linear probes and fine-tuning on both devices."""
    inputs = f"--model_name_or_path {MODEL} --train_file data/pcfg_B.csv --validation_file data/pcfg_B_validation.csv"
    steps = "--num_train_epochs {} --per_device_train_batch_size {} --learning_rate {} --warmup_steps 2"
    programs = {
        "adamw": f"run_lp.py {inputs} {steps.format(10, 512, 1e-3)}",
        "ridge": f"run_lp.py {inputs} --solver ridge",
        "lbfgs": f"run_lp.py {inputs} --solver lbfgs",
        "fine-tuning": f"run_ft.py {inputs} {steps.format(1, 128, 1e-4)}",
    }
    figures = []
    for name, records in work.both(programs).items():
        (here,), (there,) = (pair.values() for pair in records)
        figures.append(near(f"accuracy of {name}, as on the CPU", there.value, here.value, 0.02))
    return figures


def encoder(work: Work) -> list[Figure]:
    """Training of the README's encoder in bf16, and of transformers' model with padding in a plain loop."""
    import benchmark_pretraining as benchmark  # brings DeepSpeed, which takes seconds
    from naive_training import PlainLoop

    sizes = "--hidden-size 1024 --layers 16 --heads 16 --batch 4096 --micro-batch 4096 --scale 0.4"
    if work.small:
        sizes = "--hidden-size 32 --layers 2 --heads 2 --batch 64 --micro-batch 64 --scale 0.002"
    options = benchmark.build_parser().parse_args(sizes.split())
    options.rules = find_rules(RULES).resolve()
    bench = benchmark.Bench(options, Path(tempfile.mkdtemp(dir=work.folder)))
    bf16 = not work.small
    flags = ["--gradient_clipping", 0, "--bf16", str(bf16).lower()]
    trainer = bench.trainer(benchmark.FULL_VOCABULARY, "encoder", *flags)
    config = trainer.learner.models()[0].config
    plain = PlainLoop(config, bench.samples, bench.device, sparse=False, autocast=torch.bfloat16 if bf16 else None)

    def padded_step(rows: np.ndarray) -> None:
        for part in np.array_split(rows, 8):  # all at once need more memory than a GPU has
            plain.loss(part).backward()
        plain.optimizer.step()
        plain.optimizer.zero_grad()

    rates = bench.rates({"ours": lambda rows: bench.train(trainer, [rows]), "plain": padded_step})
    trainer.metrics.close()
    share = rates["ours"] * benchmark.useful_flops(bench.samples, config) / bench.peak(bf16)
    return [
        work.rate("useful arithmetic, of the peak", 100 * share, "%", 50, everywhere=True),
        work.rate("speed, of a plain loop's with padding", rates["ours"] / rates["plain"], "times", 3, everywhere=True),
        work.rate("speed", rates["ours"], "sentences/s", 20_000),
    ]


def sampling(work: Work) -> list[Figure]:
    """Sentences of a model of OPT-125M's shape with random weights: nearly all have the maximum length."""
    from transformers import OPTConfig, OPTForCausalLM

    from pretraining.sources.opt.causal_lm import RestrictedLM
    from pretraining.sources.opt.source import sample

    model = OPTForCausalLM(OPTConfig(num_hidden_layers=work.size(12, 1))).eval().requires_grad_(False)
    restricted = RestrictedLM(model.to(work.device, torch.bfloat16), list(range(4, 2004)), 2, 3, 23)
    figures = []
    for size, least in ((256, 500), (8192, 10_000)):
        uniform = np.random.default_rng(0).random((work.size(size, 8), 23))
        seconds = work.seconds(lambda uniform=uniform: sample(restricted, uniform), repeats=1)
        figures.append(work.rate(f"batches of {size:,}", len(uniform) / seconds, "sentences/s", least))
    return figures


Check = Callable[[Work], list[Figure]]
FIRST: Check = data  # makes what the others read
CHECKS: tuple[Check, ...] = (ceilings, attention, gradients, waits, training, resuming, measurements, probes, sampling, encoder)


def rows_of(check: Check, work: Work, seconds: float) -> list[list[str]]:
    """The lines of a check in the table; one that raises, or takes more than `seconds`, has one line with the reason."""

    def end(*_: object) -> None:
        raise TimeoutError(f"not finished within {seconds:.0f} s")

    signal.signal(signal.SIGALRM, end)
    signal.alarm(math.ceil(seconds))
    try:
        figures = check(work)
    except Exception as error:  # whatever it is, the other checks go on
        first = (str(error).strip().splitlines() or [""])[0]
        figures = [Figure("", "no error", f"{type(error).__name__}: {first[:300]}", False)]
    finally:
        signal.alarm(0)
    rows = [[check.__name__, one.what, one.expected, one.measured, "ok" if one.is_ok else "FAILED"] for one in figures]
    return [[cell.replace("|", "/") for cell in row] for row in rows]


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="bash scripts/check_gpu.sh", description=__doc__)
    names = [check.__name__ for check in CHECKS]
    parser.add_argument("checks", nargs="*", metavar="CHECK", help=f"of {', '.join(names)} (default: all)")
    text = "for data, models, records and logs, which stay there (default: a new one, which is deleted if all is ok)"
    parser.add_argument("--folder", type=Path, help=text)
    parser.add_argument("--rehearsal", action="store_true", help="on the CPU, in small sizes")
    return parser


def main(arguments: list[str] | None = None) -> None:
    options = build_parser().parse_args(arguments)
    if unknown := set(options.checks) - {check.__name__ for check in CHECKS}:
        raise InputError(f"{min(unknown)}: no such check; --help lists them")
    if not options.rehearsal and not torch.cuda.is_available():
        raise InputError(f"no CUDA GPU on this machine (torch {torch.__version__}); --rehearsal runs all checks on the CPU")
    from measure import machine

    start = time.monotonic()
    folder = (options.folder or Path(tempfile.mkdtemp(prefix="check_gpu_"))).resolve()
    work = Work(folder, torch.device("cpu" if options.rehearsal else "cuda"), options.rehearsal)
    device = "rehearsal on the CPU" if options.rehearsal else f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
    facts = f"{device}; {machine('torch', 'deepspeed', 'transformers')}"
    rows = []
    for check in (FIRST, *(check for check in CHECKS if not options.checks or check.__name__ in options.checks)):
        left = SECONDS - (time.monotonic() - start)
        print(f"{check.__name__} ...", flush=True)
        of_check = rows_of(check, work, 10 * OF_ONE if options.rehearsal else max(1, min(left, OF_ONE)))
        print(*("    " + "; ".join(row[1:]) for row in of_check), sep="\n", flush=True)
        rows += of_check
    table = [["check", "what", "expected", "measured", "verdict"], ["---"] * 5, *rows]
    print(f"\n{facts}\n", *(f"| {' | '.join(row)} |" for row in table), sep="\n")
    failed = dict.fromkeys(row[0] for row in rows if row[-1] != "ok")
    seconds = f"{time.monotonic() - start:.0f} s"
    if failed:
        print(f"\nFAILED: {', '.join(failed)} ({seconds}); data, models, records and logs are in {folder}")
        sys.exit(1)
    print(f"\nok: all figures are as expected ({seconds})")
    if options.folder is None:
        shutil.rmtree(folder)


if __name__ == "__main__":
    run_main(main)
