"""The one rule of accuracy: at most twice torch's own error, plus four units in the last place of the largest value.

The error of a tensor is its largest one, against torch.nn in float64. Nothing more exact than float64 is at hand to
measure torch's own float64 error: there it is torch's float32 error scaled by the ratio of the two epsilons, and is
allowed once more, because the oracle has it too.
"""

import torch


def check(name, ours, theirs, oracle, *, dtype=None, own=None, of_oracle=0.0):
    """``theirs`` is torch.nn's result in the same dtype (in float32 if that is float64), ``oracle`` its float64 one.

    ``own`` replaces torch's own error where the test knows it from more than this tensor. ``of_oracle`` is the error of
    an oracle that is no more exact than what is tested; as in float64, it is allowed once more.
    """
    dtype = ours.dtype if dtype is None else dtype
    assert ours.dtype == dtype, f"{name} has {ours.dtype}, expected {dtype}"
    assert ours.shape == oracle.shape, f"{name} has shape {tuple(ours.shape)}, expected {tuple(oracle.shape)}"
    if oracle.numel() == 0:
        return
    own = error(theirs, oracle) if own is None else own
    eps = torch.finfo(dtype).eps
    if dtype == torch.float64:
        own *= eps / torch.finfo(torch.float32).eps
        of_oracle = own
    bound = 2 * own + 4 * eps * oracle.abs().max().item() + of_oracle
    found = error(ours, oracle)
    assert found <= bound, f"{name} is off by {found:.3g}, allowed {bound:.3g} (torch itself: {own:.3g})"


def error(tensor, oracle):
    return (tensor.detach().double().to(oracle.device) - oracle).abs().max().item()


def worst(results, oracle):
    """The error of the worst tensor, relative to its largest value; both are by name.

    It is torch's own error for every tensor where torch gets at the results another way than we do, and so rounds other
    sums: tensor by tensor, it may be lucky.
    """
    largest = {name: value.abs().max().item() for name, value in oracle.items() if value.numel() and value.any()}
    return max((error(results[name], oracle[name]) / value for name, value in largest.items()), default=0.0)
