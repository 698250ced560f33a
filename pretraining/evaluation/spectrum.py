"""The spectrum of the Hessian of the pre-training loss: its largest eigenvalues, and the density of all of them.

The loss is that of Hutchinson's trace, L in `pretraining.evaluation.hessian`: exact where conditionals are known, the mean over
sentences of the mean over their masked positions; the parameters are those of the trace. H v is computed in float64.

    eigenvalues  the largest, by implicitly restarted Lanczos (ARPACK, scipy's `eigsh`); with residuals || H u - lambda u ||
    density      phi(x) = mean over probes v of sum_k tau_k^2 N(x; theta_k, width^2)

Here theta_k are the eigenvalues of the tridiagonal matrix of some Lanczos steps from v / || v ||, and tau_k are the first
components of its eigenvectors. This is stochastic Lanczos quadrature (Ubaru, Chen and Saad 2017, SIAM J. Matrix Anal. Appl. 38;
for networks Ghorbani, Krishnan and Xiao 2019, arXiv 1901.10159, algorithm 1). The mean of a probe's density is
v^T H v / || v ||^2: times the number of parameters it is an estimate of the trace.

Largest eigenvalues depend on the scale of tables and head norm, as the plain trace does (`pretraining.evaluation.flatness`).
"""

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.linalg import eigh_tridiagonal
from scipy.sparse.linalg import ArpackError, LinearOperator, eigsh

from pcfg.common.files import InputError
from pcfg.common.ranks import Ranks
from pretraining.data.contexts import Contexts, check_length
from pretraining.evaluation import hessian
from pretraining.evaluation.hessian import Places, Sampling
from pretraining.evaluation.inputs import Inputs, Truth
from pretraining.evaluation.records import Density, Eigenvalue, SpectrumRecord, TracePart, write_record
from pretraining.model.bert import MaskedLM

RECORD = "spectrum.json"
GRID = 501  # points of the density
WIDTHS = 100  # of a node's Gaussian between the smallest and the largest node
NOTE = "largest eigenvalues move with the scale of tables and head norm, like the plain trace: compare one parameterisation"


@dataclasses.dataclass(frozen=True)
class SpectrumOptions:
    """What is computed besides the choices of `Sampling`."""

    eigenvalues: int = 5  # the largest
    lanczos_steps: int = 40  # of each probe


def hessian_operator(
    model: MaskedLM, contexts: Contexts, sampling: Sampling, truth: Truth | None, batch_size: int
) -> LinearOperator:
    """v -> H v, float64 vectors of all measured parameters, concatenated in their order.

    Args:
        model: in eval mode, with eager attention, in float64.
        truth: P; None for the words of the text.
        batch_size: contexts of one length per pass.
    """
    parameters = list(hessian.measured_parameters(model).values())
    sizes = [parameter.numel() for parameter in parameters]
    counts = sampling.counts(contexts)

    def product(vector: np.ndarray) -> np.ndarray:
        pieces = torch.from_numpy(vector.reshape(-1).copy()).to(parameters[0].device).split(sizes)
        probe = [piece.view(parameter.shape) for piece, parameter in zip(pieces, parameters, strict=True)]
        total = [torch.zeros_like(parameter) for parameter in parameters]
        for low in range(0, len(counts), hessian.WINDOW):
            high = min(low + hessian.WINDOW, len(counts))
            conditionals = None if truth is None else truth.window(contexts, low, high, model)
            for batch in contexts.batches(hessian.measured_contexts(contexts, range(low, high), sampling), batch_size):
                weights = 1.0 / (counts[contexts.sentence[batch]] * len(counts))
                gradients = hessian.loss_gradients(model, contexts, batch, weights, conditionals)
                products = torch.autograd.grad(gradients, parameters, probe)
                total = [whole + part for whole, part in zip(total, products, strict=True)]
        return torch.cat([whole.reshape(-1) for whole in total]).cpu().numpy()

    number = sum(sizes)
    return LinearOperator((number, number), matvec=product, dtype=np.float64)


def largest_eigenvalues(operator: LinearOperator, number: int, start: np.ndarray) -> list[Eigenvalue]:
    """The largest eigenvalues, descending.

    Args:
        start: (n,) float64, the first vector of the Lanczos process.
    """
    if number >= operator.shape[0]:
        raise InputError(f"--eigenvalues {number}: the model has {operator.shape[0]} parameters in the trace; give fewer")
    try:
        values, vectors = eigsh(operator, k=number, which="LA", v0=start)
    except ArpackError as error:
        raise InputError(f"--eigenvalues {number}: eigsh did not converge ({error}); give another number") from None
    residuals = [np.linalg.norm(operator @ u - value * u) for value, u in zip(values, vectors.T, strict=True)]
    pairs = sorted(zip(values.tolist(), residuals, strict=True), reverse=True)
    return [Eigenvalue(value=value, residual=float(residual)) for value, residual in pairs]


def lanczos(product: Callable[[np.ndarray], np.ndarray], start: np.ndarray, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """The quadrature of a vector's spectral measure: nodes (k,) and weights (k,), which sum to 1; k <= steps.

    Lanczos with full reorthogonalisation, twice per step (Golub and Van Loan, Matrix Computations, section 10.3). It ends early
    where the Krylov space is exhausted.
    """
    basis = [start / np.linalg.norm(start)]
    diagonal: list[float] = []
    off_diagonal: list[float] = []
    while True:
        residual = product(basis[-1])
        diagonal.append(float(basis[-1] @ residual))
        known = np.array(basis)  # (steps so far, n)
        for _ in range(2):
            residual = residual - known.T @ (known @ residual)
        norm = float(np.linalg.norm(residual))
        if len(basis) == min(steps, len(start)) or norm < 1e-10 * np.abs(diagonal).max():
            break
        off_diagonal.append(norm)
        basis.append(residual / norm)
    nodes, vectors = eigh_tridiagonal(np.array(diagonal), np.array(off_diagonal))
    return nodes, vectors[0] ** 2


def density_of(quadratures: list[tuple[np.ndarray, np.ndarray]], largest: float) -> Density:
    """The density on a grid with its standard errors over probes, from the nodes and weights of 2 or more probes.

    Args:
        largest: eigenvalue, which the grid holds too.
    """
    nodes = np.concatenate([*(nodes for nodes, _ in quadratures), [largest]])
    width = max(np.ptp(nodes) / WIDTHS, 1e-12)
    grid = np.linspace(nodes.min() - 5 * width, nodes.max() + 5 * width, GRID)
    peaks = [np.exp(-(((grid[:, None] - nodes) / width) ** 2) / 2) @ weights for nodes, weights in quadratures]
    curves = np.array(peaks) / (width * np.sqrt(2 * np.pi))  # (probes, grid)
    errors = curves.std(0, ddof=1) / np.sqrt(len(curves))
    return Density(grid=grid.tolist(), values=curves.mean(0).tolist(), standard_errors=errors.tolist(), width=float(width))


def measure_spectrum(
    model: MaskedLM,
    contexts: Contexts,
    sampling: Sampling,
    options: SpectrumOptions,
    truth: Truth | None = None,
    batch_size: int = 128,
    source: Path | str = "",
) -> dict[str, Any]:
    """Fields of a record; arguments as in `hessian_operator`, `source` is the data file for messages."""
    check_length(contexts, model.config.max_position_embeddings, source)
    if sampling.probe_num < 2:
        raise InputError("--probe-num 1: one probe has no standard error; give 2 or more")
    started = time.monotonic()
    operator = hessian_operator(model, contexts, sampling, truth, batch_size)
    number = operator.shape[0]
    drawn = [hessian.draw_probe(model, sampling.probe, sampling.seed, 0, draw) for draw in range(sampling.probe_num)]
    probes = [torch.cat([piece.reshape(-1) for piece in probe]).double().cpu().numpy() for probe in drawn]
    eigenvalues = largest_eigenvalues(operator, options.eigenvalues, probes[0])
    quadratures = [lanczos(operator.matvec, probe, options.lanczos_steps) for probe in probes]
    traces = np.array([number * nodes @ weights for nodes, weights in quadratures])
    counts = sampling.counts(contexts)
    return {
        "value": eigenvalues[0].value,
        "standard_error": None,
        "unit": "nats",
        "n": len(counts),
        "contexts": int(counts.sum()),
        "loss": hessian.loss_name(truth),
        "parameters": number,
        "left_out": list(hessian.LEFT_OUT),
        "eigenvalues": eigenvalues,
        "density": density_of(quadratures, eigenvalues[0].value),
        "trace": TracePart(value=traces.mean(), standard_error=traces.std(ddof=1) / np.sqrt(len(traces))),
        "seconds": time.monotonic() - started,
    }


def measure_spectra(
    models: Places, inputs: Inputs, sampling: Sampling, options: SpectrumOptions, batch_size: int, device: str, overwrite: bool
) -> None:
    """Measure the spectrum at each model: write spectrum.json, and print it."""
    ranks = Ranks(device)
    if ranks.size > 1:
        raise InputError(f"--estimator spectrum: runs in one process, not in {ranks.size}; start it with python")
    chosen = {name: sampling.described()[name] for name in ("nsamples", "positions", "seed", "probe", "probe_num")}
    settings = {"estimator": "spectrum", **chosen, **dataclasses.asdict(options)}
    for output, described, model in hessian.unmeasured(models, inputs, {"spectrum": RECORD}, settings, ranks, overwrite):
        fields = measure_spectrum(model.double(), inputs.contexts, sampling, options, inputs.truth, batch_size, inputs.source)
        record = SpectrumRecord(**fields, seeds=[sampling.seed], inputs=described, arguments=settings, device=device)
        write_record(output, RECORD, record)
        largest = ", ".join(f"{eigenvalue.value:.4f}" for eigenvalue in record.eigenvalues)
        residual = max(eigenvalue.residual for eigenvalue in record.eigenvalues)
        print(f"{output}: largest eigenvalues of the Hessian (loss: {record.loss}) {largest} (residuals up to {residual:.1e})")
        trace = f"{record.trace.value:.4f} +- {record.trace.standard_error:.4f}"
        print(f"  trace by the spectral density {trace} ({record.parameters:,} parameters); {NOTE}")
