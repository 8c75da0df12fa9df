"""Would the tests notice a fault? Put faults into the normalizations, one at a time, and see.

    python tests/mutations/check_mutations.py [WORD ...]  # only faults with a WORD in file or name

Each fault is one line, put into a copy of the package in a temporary folder; the tests named for
its file run there until the first one fails. Prints which test noticed which fault, and ends with
status 1 if a fault survived. A run takes some minutes, so it is no test itself; test_mutations.py
checks that every line to be replaced is still there.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

REPOSITORY = Path(__file__).resolve().parents[2]
NORMS = REPOSITORY / "normexp" / "norms"

ORACLE = ("test_golden", "test_references", "test_padding")
STATE = ("test_broken_batches", "test_precision")
SYNC = ("test_synchronized",)
CHECKPOINTING = ("test_replace",)


class Fault(NamedTuple):
    file: str
    old: str
    new: str
    what: str
    tests: tuple[str, ...] = ORACLE


FAULTS = [
    Fault(
        "core/averaging.py",
        "torch.lerp(running, value.to(running.dtype), update_rate)",
        "torch.lerp(value.to(running.dtype), running, update_rate)",
        "momentum swapped: past and present",
    ),
    Fault(
        "core/averaging.py",
        "running.copy_(torch.where(usable, averaged, running))",
        "running.copy_(averaged)",
        "unusable batches averaged",
        (*STATE, "test_padding"),
    ),
    Fault(
        "core/masking.py",
        "tokens = tokens.float()",
        "tokens = tokens.clone()",
        "statistics of half-precision input in half precision",
        STATE,
    ),
    Fault(
        "core/masking.py",
        "token_mask = ~(padding_mask.t() if x.dim() == 3 else padding_mask)",
        "token_mask = ~padding_mask",
        "mask not transposed to the order of the tokens",
    ),
    Fault(
        "core/masking.py",
        "return token_mask.sum().to(tokens.dtype)",
        "return tokens.new_full((), tokens.shape[0])",
        "mean over padding: N counts all positions",
    ),
    Fault(
        "core/masking.py",
        "return values if token_mask is None else torch.where(token_mask, values, 0.0)",
        "return values",
        "padding not masked out of sums",
    ),
    Fault(
        "batch.py",
        "return var * n / (n - 1).clamp(min=1)",
        "return var",
        "biased running variance",
    ),
    Fault(
        "batch.py",
        "return torch.rsqrt(var + self.eps)",
        "return 1 / (var.sqrt() + self.eps)",
        "eps outside the root",
    ),
    Fault(
        "batch.py",
        "mask_padding_(centered.sub_(mean), token_mask)",
        "centered.sub_(mean)",
        "padded zeros in the variance",
    ),
    Fault(
        "batch.py",
        "gradient = mask_padding_(gradient.clone(), token_mask)",
        "gradient = gradient.clone()",
        "gradients at padding reach real tokens",
    ),
    Fault(
        "batch.py",
        "average_(self.running_mean, mean.detach(), self.momentum, usable)",
        "average_(self.running_mean, mean.detach(), 1 - self.momentum, usable)",
        "momentum swapped for the mean",
    ),
    Fault(
        "batch.py",
        "return -0.5 * self._inverse_std(var) ** 3",
        "return 0.5 * self._inverse_std(var) ** 3",
        "sign of the variance's gradient",
    ),
    Fault(
        "batch.py",
        "d_mean = d_mean - d_bias * weight * inverse",
        "d_mean = d_mean + 0 * d_bias",
        "no gradient through the mean",
    ),
    Fault(
        "batch.py",
        "mask_padding_(centered.add_(local_mean - mean), token_mask)",
        "mask_padding_(centered, token_mask)",
        "centred by the rank's own mean",
        SYNC,
    ),
    Fault(
        "regularized_batch.py",
        "return torch.where(var < self.eps, 0.0, super()._inverse_std_slope(var))",
        "return super()._inverse_std_slope(var)",
        "gradient through a clamped variance",
    ),
    Fault(
        "batch.py",
        "return scale, self.bias - self.running_mean.clone() * scale",
        "return scale, self.bias - self.running_mean",
        "inference: mean not scaled",
    ),
    Fault(
        "regularized_batch.py",
        "self.penalty_var * (running_var - var).abs().sum()",
        "self.penalty_var * (running_var - var).square().sum()",
        "penalty of the variance squared",
    ),
    Fault(
        "regularized_batch.py",
        "penalty = self.penalty_mean * (running_mean - mean).square().sum()",
        "penalty = self.penalty_mean * (running_mean - mean.detach()).square().sum()",
        "penalty without its gradient",
    ),
    Fault(
        "regularized_batch.py",
        "return torch.rsqrt(var.clamp(min=self.eps))",
        "return torch.rsqrt(var + self.eps)",
        "eps added instead of clamped",
    ),
    Fault(
        "power_v.py",
        "average_(self.running_psi2, psi2, 1 - self.alpha, usable)",
        "average_(self.running_psi2, psi2, self.alpha, usable)",
        "alpha swapped",
    ),
    Fault(
        "power_v.py",
        "return sum_over_ranks(products, self.sync) / n.clamp(min=1)",
        "return 0 * sum_over_ranks(products, self.sync) / n.clamp(min=1)",
        "no gradient through psi2",
    ),
    Fault(
        "core/second_order.py",
        "psi2 = mean(tokens.square().sum(0), num_tokens(tokens, token_mask))",
        "psi2 = mean(tokens.detach().square().sum(0), num_tokens(tokens, token_mask))",
        "no second gradient through psi2",
        ("test_state",),
    ),
    Fault(
        "power_v.py",
        "buf = mask_padding_(gradient * tokens, token_mask)",
        "buf = gradient * tokens",
        "NaN at padding in the gradient's sums",
    ),
    Fault(
        "power_v.py",
        "gradient = mask_padding_(gradient.clone(), token_mask)",
        "gradient = mask_padding_(gradient, token_mask)",
        "the gradient of others overwritten",
        ("test_state", "test_padding"),
    ),
    Fault(
        "power_v.py",
        "d_tokens = mask_padding_(buf, token_mask)",
        "d_tokens = buf",
        "gradients at padding",
    ),
    Fault(
        "power.py",
        "in_warmup = self.step < self.warmup_steps",
        "in_warmup = self.step <= self.warmup_steps",
        "warm-up one step too long",
    ),
    Fault(
        "power_v.py",
        "buf.addcmul_(tokens, correction * inverse.square(), value=-1)",
        "buf.addcmul_(tokens, correction * inverse.square(), value=1)",
        "sign of nu",
    ),
    Fault(
        "power.py",
        "average_(self.running_psi2, psi2_batch, 1 - self.alpha_fwd, usable)",
        "average_(self.running_psi2, psi2_batch, 1 - self.alpha_bwd, usable)",
        "alpha_bwd in the forward",
    ),
    Fault(
        "power.py",
        "nu = self.nu * (1 - update_rate * gamma) + update_rate * lambda_",
        "nu = self.nu * (1 - update_rate) + update_rate * lambda_",
        "Gamma forgotten",
    ),
    Fault(
        "power.py",
        "update_rate = torch.minimum(update_rate, 1 / gamma)",
        "update_rate = torch.minimum(update_rate, 2 / gamma)",
        "bound of nu twice too wide",
        ("test_references", "test_runaway_nu"),
    ),
    Fault(
        "power.py",
        "correction = torch.where(in_warmup, lambda_, self.nu.to(lambda_.dtype))",
        "correction = self.nu.to(lambda_.dtype)",
        "no exact gradient in warm-up",
    ),
    Fault(
        "power_released.py",
        "psi2 = torch.where(step <= self.warmup_steps, psi2_batch, running.to(sum_sq.dtype))",
        "psi2 = torch.where(step < self.warmup_steps, psi2_batch, running.to(sum_sq.dtype))",
        "warm-up one step too short",
    ),
    Fault(
        "power_released.py",
        "cumulative = (running * (step - 1) + psi2_batch) / step",
        "cumulative = running * ((step - 1) / step) + psi2_batch / step",
        "a quotient of integers in float32",
    ),
    Fault(
        "power_released.py",
        "d_scaled = gradient * (weight * batch_inverse)",
        "d_scaled = gradient * (weight * inverse)",
        "backward divides by the running statistic",
    ),
    Fault(
        "power_released.py",
        "mean, _ = pooled_mean(partial_sums, partial_sums.new_full((), positions), self.sync)",
        "mean, _ = pooled_mean(partial_sums, n, self.sync)",
        "e averages over real tokens",
    ),
    Fault(
        "power_released.py",
        "factor = (1 - self.alpha_bwd) * self.e.to(products.dtype)",
        "factor = self.e.to(products.dtype)",
        "e not scaled by 1 - alpha_bwd",
    ),
    Fault(
        "power_released.py",
        "d_tokens.addcmul_(scaled.unflatten(1, by_group), mean, value=-1).mul_(r)",
        "d_tokens.mul_(r)",
        "no gradient through the group scaling",
    ),
    Fault(
        "power_released.py",
        "token_sum_sq = sum_sq if token_mask is None else mask_padding_(buf, token_mask).sum(0)",
        "token_sum_sq = sum_sq",
        "padding in psi2",
    ),
    Fault(
        "batch_released.py",
        "tokens = torch.where(token_mask, tokens, masked_mean(tokens, token_mask))",
        "tokens = torch.where(token_mask, tokens, 0.0)",
        "padding not replaced by the mean",
    ),
    Fault(
        "batch_released.py",
        "return self.running_mean.to(dtype, copy=True), self.running_var.to(dtype, copy=True)",
        "return self.running_mean.to(dtype), self.running_var.to(dtype, copy=True)",
        "statistics averaged before they are checked",
        (*STATE, "test_padding"),
    ),
    Fault(
        "unified.py",
        "slot = slots == step % self.window_size",
        "slot = slots == self.step % self.window_size",
        "window slot off by one",
    ),
    Fault(
        "unified.py",
        "geometric = window.log().mean(0).exp()",
        "geometric = window.mean(0)",
        "arithmetic mean of the window",
    ),
    Fault(
        "unified.py",
        "spread = self.psi2_window.sqrt().var(0, correction=0)",
        "spread = self.psi2_window.sqrt().var(0, correction=1)",
        "filtration by the unbiased variance",
    ),
    Fault(
        "unified.py",
        "ratio = torch.sqrt((v + self.eps) / (running + self.eps))",
        "ratio = torch.sqrt((running + self.eps) / (v + self.eps))",
        "factor of the gradient inverted",
    ),
    Fault(
        "unified.py",
        "window = torch.where(slot, torch.where(skip, self.e, lambda_), self.lambda_window)",
        "window = torch.where(slot, lambda_, self.lambda_window)",
        "skipped batches enter the window of lambda",
    ),
    Fault(
        "instance.py",
        "var = deviations.square().sum(0, keepdim=True) / n",
        "var = deviations.square().sum(0, keepdim=True) / (n - 1).clamp(min=1)",
        "unbiased variance",
    ),
    Fault(
        "adaptive.py",
        "y = self.scale * (1 - self.k * x_hat).detach() * x_hat",
        "y = self.scale * (1 - self.k * x_hat) * x_hat",
        "missing detach",
    ),
    Fault(
        "rms.py",
        "inverse = torch.rsqrt(tokens.square().mean(-1, keepdim=True) + self.eps)",
        "inverse = 1 / (tokens.square().mean(-1, keepdim=True).sqrt() + self.eps)",
        "eps outside the root",
    ),
    Fault(
        "running_norm.py",
        "self.num_rejected += (n > 0) & ~finite",
        "pass",
        "rejected batches not counted",
        STATE,
    ),
    Fault(
        "running_norm.py",
        "return (n > 0) & finite",
        "return n > 0",
        "NaN averaged into the state",
        STATE,
    ),
    Fault(
        "running_norm.py",
        "value.to(dtype).isfinite().all()",
        "value.isfinite().all()",
        "overflow in the dtype of the state",
        STATE,
    ),
    Fault(
        "running_norm.py",
        "self._buffers[name] = before[name].to(buffer.device, torch.float32)",
        "self._buffers[name] = buffer",
        "state in half precision",
        STATE,
    ),
    Fault(
        "running_norm.py",
        "self._num_rejected_reported = num_rejected",
        "pass",
        "warns again of the same batches",
        STATE,
    ),
    Fault(
        "core/replay_cache.py",
        "return torch._C._current_graph_task_id() != -1",
        "return False",
        "recomputed forwards count as steps",
        CHECKPOINTING,
    ),
    Fault(
        "distributed/collectives.py",
        "packed = sum_over_ranks(torch.cat([partial_sums, n[None]]), sync)",
        "packed = torch.cat([sum_over_ranks(partial_sums, sync), n[None]])",
        "sums over all ranks by the tokens of one",
        SYNC,
    ),
    Fault(
        "distributed/collectives.py",
        "mean = (n_of * mean_of).sum(0) / n.clamp(min=1)",
        "mean = mean_of.mean(0)",
        "ranks weighted equally, whatever their tokens",
        SYNC,
    ),
    Fault(
        "distributed/collectives.py",
        "return total[dist.get_rank()]",
        "return gradient[dist.get_rank()]",
        "gradient of the moments not summed over ranks",
        SYNC,
    ),
    Fault(
        "distributed/deferred.py",
        "self.wait()",
        "pass",
        "a step begins before the totals of the last one are used",
        SYNC,
    ),
    Fault(
        "distributed/deferred.py",
        "zip(sent.entries, sent.packed.split(sizes), strict=True)",
        "zip(sent.entries[::-1], sent.packed.split(sizes), strict=True)",
        "totals of one layer used by another",
        SYNC,
    ),
    Fault(
        "power.py",
        "nu.copy_(self.nu)",
        "pass",
        "nu as it was at the forward, not at the backward",
        SYNC,
    ),
    Fault(
        "power.py",
        "products = d_weight.detach() * weight.detach()",
        "products = d_weight.detach()",
        "Lambda without the layer's weight",
        SYNC,
    ),
    Fault(
        "power.py",
        'if DEFERRED.pending((self, "nu")):',
        "if False:",
        "a second backward reads nu before the first one's has arrived",
        SYNC,
    ),
]


def copy_of_tree(folder: Path) -> None:
    """What the tests of the normalizations need."""
    unwanted = shutil.ignore_patterns("__pycache__", ".hypothesis", ".pytest_cache")
    shutil.copytree(REPOSITORY / "normexp", folder / "normexp", ignore=unwanted)
    shutil.copytree(REPOSITORY / "tests", folder / "tests", ignore=unwanted)
    shutil.copy(REPOSITORY / "pyproject.toml", folder)


def first_failure(folder: Path, tests: tuple[str, ...]) -> str | None:
    """The first test that fails in the copy, None if all pass."""
    files = [f"tests/norms/{test}.py" for test in tests]
    environment = {**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    environment.setdefault("OMP_NUM_THREADS", "1")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *files],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    if run.returncode == 0:
        return None
    failed = re.search(r"^(?:FAILED|ERROR) (\S+)", run.stdout, re.MULTILINE)
    if run.returncode != 1 or not failed:
        raise RuntimeError(f"pytest did not get as far as a test:\n{run.stdout}{run.stderr}")
    return failed[1].removeprefix("tests/norms/")


def main(words: list[str]) -> int:
    faults = [f for f in FAULTS if not words or any(w in f"{f.file} {f.what}" for w in words)]
    survived = 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        copy_of_tree(folder)
        needed = tuple(dict.fromkeys(test for fault in faults for test in fault.tests))
        if failure := first_failure(folder, needed):
            raise SystemExit(f"{failure} fails without any fault; cure that first")
        for fault in faults:
            path = folder / "normexp" / "norms" / fault.file
            sound = path.read_text(encoding="utf-8")
            path.write_text(sound.replace(fault.old, fault.new), encoding="utf-8", newline="\n")
            killer = first_failure(folder, fault.tests)
            path.write_text(sound, encoding="utf-8", newline="\n")
            survived += killer is None
            print(f"{fault.file:22} {fault.what:52} {killer or 'SURVIVED'}", flush=True)
    print(f"{len(faults) - survived} of {len(faults)} faults noticed")
    return 1 if survived else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
