"""Per-sample weight gradients (torch.func.vmap of grad) against the summed gradient of the same batch, timed in turn.

python -m bench.per_sample --threads 1
"""

from __future__ import annotations

import argparse

import torch
from torch.func import functional_call, grad, vmap

import fastrnn
from bench.timing import compare


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--budget", type=float, default=5.0, help="seconds for each cell")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    steps, batch, size = 64, 32, 128
    for name in ("RNN", "LSTM", "GRU"):
        torch.manual_seed(0)
        net, input = getattr(fastrnn, name)(size, size), torch.randn(steps, batch, size)
        weights = {key: value.detach() for key, value in net.named_parameters()}

        def loss(weights, input, net=net):
            return functional_call(net, weights, (input,))[0].square().sum()

        per_sample = vmap(grad(loss), in_dims=(None, 1))
        summed = grad(loss)
        for key, value in per_sample(weights, input).items():
            torch.testing.assert_close(value.sum(0), summed(weights, input)[key], rtol=1e-3, atol=1e-3)
        functions = {
            "per sample": lambda f=per_sample, w=weights, x=input: f(w, x),
            "summed": lambda f=summed, w=weights, x=input: f(w, x),
        }
        timed = compare(functions, budget=options.budget)
        minimum, paired = timed.ratio_of_minima("per sample", "summed"), timed.median_ratio("per sample", "summed")
        print(f"{name}: per-sample over summed {minimum:.2f} (fastest), {paired:.2f} (paired median)")


if __name__ == "__main__":
    main()
