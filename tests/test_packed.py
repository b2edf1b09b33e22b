"""PackedSequence: the rows as they lie, with no unpacking, and hidden states in the caller's order."""

import pytest
import torch
from cases import data, module, outputs_and_gradients, parametrize, small, tensors
from recording import Dispatches
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

LENGTHS = torch.tensor([2, 5, 1, 5, 3])
CASES = small(num_layers=2, bidirectional=True, steps=5, batch=5) + small(steps=5, batch=5, hx=False)


def pack(input, lengths):
    return pack_padded_sequence(input, lengths, enforce_sorted=bool((lengths.diff() <= 0).all()))


class Packed:
    """A module that takes padded input and lengths and is run on a PackedSequence."""

    def __init__(self, case):
        self.net = module(case)
        self.named_parameters = self.net.named_parameters

    def __call__(self, input, hx, lengths):
        output, hidden = self.net(pack(input, lengths), hx)
        assert isinstance(output, PackedSequence)
        return torch.nn.utils.rnn.pad_packed_sequence(output)[0], hidden


@pytest.mark.parametrize("lengths", [LENGTHS, LENGTHS.sort(descending=True).values], ids=["unsorted", "sorted"])
@parametrize(CASES)
def test_packed_is_what_lengths_are(case, lengths, backend):
    """Outputs, final states and all gradients, that of hx among them, in the order of the caller's rows."""
    packed = outputs_and_gradients(Packed(case), *data(case), lengths=lengths)
    ragged = outputs_and_gradients(module(case), *data(case), lengths=lengths)
    for name, value in packed.items():
        torch.testing.assert_close(value, ragged[name], rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@parametrize(CASES)
def test_hidden_states_are_in_the_order_of_the_caller(case, backend):
    """Each row by itself in torch.nn, its own initial state with it."""
    input, hx = data(case)
    output, hidden = module(case)(pack(input, LENGTHS), hx)
    theirs = module(case, torch.nn)
    sorted_rows = [output.data[: output.batch_sizes[0]][int(place)] for place in output.unsorted_indices]
    for row, length in enumerate(LENGTHS.tolist()):
        states = [state[:, row : row + 1].contiguous() for state in tensors(hx)]
        alone = (tuple(states) if len(states) == 2 else states[0]) if states else None
        expected, final = theirs(input[:length, row : row + 1], alone)
        torch.testing.assert_close(sorted_rows[row], expected[0, 0])
        for one, other in zip(tensors(hidden), tensors(final), strict=True):
            torch.testing.assert_close(one[:, row], other[:, 0])


@parametrize(CASES)
def test_states_of_packed_rows(case, backend):
    """forward_states packs its states as the output is packed."""
    input, hx = data(case)
    packed = module(case).forward_states(pack(input, LENGTHS), hx)
    padded = module(case).forward_states(input, hx, LENGTHS)
    for found, expected in zip(packed[2:], padded[2:], strict=True):
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, pack(other, LENGTHS).data)
    torch.testing.assert_close(packed.output.data, pack(padded.output, LENGTHS).data)


@parametrize(small(num_layers=2, bidirectional=True, layout="unsorted"))
def test_no_op_per_step_and_no_unpacking(case, native):
    """One op a layer, and the same few around it whatever the number of steps; backward too."""
    net, calls = module(case), []
    for steps in (3, 50):
        input = torch.randn(steps, 3, case.inputs)
        packed = pack(input, torch.tensor([1, steps, 2]))
        packed = packed._replace(data=packed.data.requires_grad_())
        _, hx = data(case)
        net.zero_grad()
        with Dispatches() as made:
            net(packed, hx)[0].data.sum().backward()
        calls.append(made.names)
    assert calls[0] == calls[1]
    ours = [name for name in calls[0] if name.startswith("fastrnn.")]
    assert len(ours) == 4, ours  # two layers, forward and backward
    assert not [name for name in calls[0] if "pack" in name or "pad" in name]
