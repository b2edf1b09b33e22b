"""Inside of programs: parametrizations, pruning, meta device, TorchScript, checkpoints, optimizers, two processes."""

import io
import os

import pytest
import torch
from torch.nn.utils import parametrizations, parametrize, prune, skip_init
from torch.utils.checkpoint import checkpoint

import fastrnn

LAYERS = ("RNN", "LSTM", "GRU")
CELLS = ("RNNCell", "LSTMCell", "GRUCell")
every = pytest.mark.parametrize("name", LAYERS + CELLS)
scripts = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")


def pair(name, **options):
    """Ours and torch.nn's, with the same weights, and an input."""
    nets = []
    for library in (fastrnn, torch.nn):
        torch.manual_seed(0)
        nets.append(getattr(library, name)(3, 5, **options))
    return *nets, torch.randn(3, 3) if "Cell" in name else torch.randn(7, 3, 3)


def recurrent(name):
    return "weight_hh" if "Cell" in name else "weight_hh_l0"


def leaves(value):
    return torch.utils._pytree.tree_leaves(value)


def run(net, input):
    """Results and gradients."""
    found = leaves(net(input))
    loss = sum(tensor.square().sum() for tensor in found)
    return found, torch.autograd.grad(loss, [*net.parameters()])


def same(ours, theirs, input):
    torch.testing.assert_close(run(ours, input), run(theirs, input), rtol=1e-4, atol=1e-5)


PARAMETRIZATIONS = {
    "weight_norm": parametrizations.weight_norm,
    "orthogonal": parametrizations.orthogonal,
    # a step of power iteration at every look: one that has converged, so that more looks change nothing
    "spectral_norm": lambda net, weight: parametrizations.spectral_norm(net, weight, n_power_iterations=500),
}


@pytest.mark.parametrize("kind", PARAMETRIZATIONS)
@every
def test_parametrizations(name, kind, backend):
    ours, theirs, input = pair(name)
    for net in (ours, theirs):
        torch.manual_seed(1)
        PARAMETRIZATIONS[kind](net, recurrent(name))
    same(ours, theirs, input)
    with torch.no_grad():  # what the parametrization makes of the new parameters is used, not of the old ones
        for net in (ours, theirs):
            for parameter in net.parametrizations[recurrent(name)].parameters():
                parameter.add_(0.25)
    same(ours, theirs, input)
    with parametrize.cached():
        torch.testing.assert_close(ours(input), theirs(input))
    before = ours(input)
    parametrize.remove_parametrizations(ours, recurrent(name))
    assert type(ours) is getattr(fastrnn, name)
    torch.testing.assert_close(ours(input), before, rtol=0, atol=1e-6)


@every
def test_pruning(name, backend):
    ours, theirs, input = pair(name)
    other = recurrent(name).replace("hh", "ih")
    for net in (ours, theirs):
        prune.l1_unstructured(net, recurrent(name), 0.3)
        prune.ln_structured(net, other, 0.4, n=2, dim=0)
    same(ours, theirs, input)
    for net in (ours, theirs):
        prune.global_unstructured([(net, recurrent(name)), (net, other)], prune.L1Unstructured, amount=0.2)
    same(ours, theirs, input)
    prune.remove(ours, recurrent(name))
    assert (getattr(ours, recurrent(name)) == 0).sum() > 0
    torch.testing.assert_close(ours(input), theirs(input))


@every
def test_deferred_initialisation(name, backend):
    _, theirs, input = pair(name)
    state = torch.get_rng_state()
    skipped = skip_init(getattr(fastrnn, name), 3, 5)
    with torch.device("meta"):
        deferred = getattr(fastrnn, name)(3, 5)
    assert torch.equal(torch.get_rng_state(), state)
    assert [found.shape for found in leaves(deferred(input.to("meta")))] == [t.shape for t in leaves(theirs(input))]
    deferred.to_empty(device="cpu")
    torch.manual_seed(0)
    deferred.reset_parameters()
    same(deferred, theirs, input)
    skipped.load_state_dict(theirs.state_dict())
    same(skipped, theirs, input)
    with torch.device("meta"):
        assigned = getattr(fastrnn, name)(3, 5)
    assigned.load_state_dict(theirs.state_dict(), assign=True)
    torch.testing.assert_close(assigned(input), theirs(input))


@every
def test_hooks(name, backend):
    ours, theirs, input = pair(name)
    input.requires_grad_()
    calls = {ours: [], theirs: []}
    for net, log in calls.items():
        net.register_forward_pre_hook(lambda net, args: (2 * args[0], *args[1:]))
        net.register_forward_hook(lambda net, args, out, log=log: log.append(args[0].detach()))
        net.register_full_backward_pre_hook(lambda net, grads, log=log: log.append(len(grads)))
        net.register_full_backward_hook(lambda net, grads, out, log=log: log.append(grads[0].detach()))
        sum(tensor.square().sum() for tensor in leaves(net(input))).backward()
    assert len(calls[ours]) == 3
    torch.testing.assert_close(calls[ours], calls[theirs], rtol=1e-4, atol=1e-5)


SCRIPTED = [
    *((name, {}) for name in LAYERS + CELLS),
    *((name, {"num_layers": 2, "bidirectional": True, "batch_first": True}) for name in LAYERS),
    *((name, {"bias": False}) for name in LAYERS + CELLS),
    ("LSTM", {"proj_size": 2}),
    ("RNN", {"nonlinearity": "relu"}),
    ("RNNCell", {"nonlinearity": "relu"}),
]


@scripts
@pytest.mark.parametrize("name, options", SCRIPTED)
def test_script(name, options, backend):
    """Scripted code runs torch's own op, and is a file that needs no fastrnn."""
    ours, _, input = pair(name, **options)
    model = torch.nn.Sequential(ours)
    scripted = torch.jit.script(model)
    assert model[0] is ours  # left as it was
    file = io.BytesIO()
    torch.jit.save(scripted, file)
    file.seek(0)
    assert b"fastrnn::" not in file.getvalue()
    loaded = torch.jit.load(file)
    for given in (input, input[0]):
        torch.testing.assert_close(scripted(given), ours(given))
        torch.testing.assert_close(loaded(given), ours(given))
    same(scripted, model, input)
    states = [torch.randn_like(state) for state in leaves(ours(input))[0 if "Cell" in name else 1 :]]
    hx = tuple(states) if "LSTM" in name else states[0]
    torch.testing.assert_close(torch.jit.script(ours)(input, hx), ours(input, hx))


@scripts
def test_script_draws_the_same_dropout():
    ours, _, input = pair("GRU", num_layers=2, dropout=0.5)
    results = []
    for net in (torch.jit.script(ours), ours):
        torch.manual_seed(4)
        results.append(net(input)[0])
    torch.testing.assert_close(*results)


@scripts
@pytest.mark.parametrize("name", LAYERS)
def test_what_cannot_be_scripted(name):
    ours, _, input = pair(name)
    scripted = torch.jit.script(ours)
    for features in ({"lengths": torch.tensor([1, 2, 3])}, {"reset": torch.ones(7, 3, dtype=torch.bool)}):
        with pytest.raises(torch.jit.Error, match=r"lengths and reset are not available under torch\.jit\.script"):
            scripted(input, **features)
    prune.random_unstructured(ours, "weight_hh_l0", 0.5)
    with pytest.raises(RuntimeError, match=f"cannot compile {name} while weight_hh_l0 is parametrized or pruned"):
        torch.jit.script(ours)
    with pytest.raises(RuntimeError, match="parametrized or pruned"):
        torch.jit.script(torch.nn.Sequential(parametrizations.weight_norm(pair(name)[0], "weight_hh_l0")))


@scripts
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True, "batch_first": True}])
@pytest.mark.parametrize("name", LAYERS)
def test_script_checks_sizes(name, options):
    """Torch's op would read and write beyond what is too small."""
    ours, _, input = pair(name, **options)
    scripted = torch.jit.script(ours)
    good = leaves(ours(input))[1:]

    def with_states(change):
        states = [change(state) for state in good]
        return input, (tuple(states) if name == "LSTM" else states[0])

    torch.testing.assert_close(scripted(*with_states(lambda state: state)), ours(*with_states(lambda state: state)))
    for arguments, words in (
        ((torch.randn(7, 3, 2),), r"input\.size\(-1\) must be equal to input_size\. Expected 3, got 2"),
        ((torch.randn(7, 3000),), r"input\.size\(-1\) must be equal to input_size\. Expected 3, got 3000"),
        ((torch.randn(2, 2, 2, 3),), f"{name}: Expected input to be 2D or 3D, got 4D"),
        ((torch.randn(3),), f"{name}: Expected input to be 2D or 3D, got 1D"),
        (with_states(lambda state: state[:, :2]), r"Expected hidden\[0\] size \[.*\], got \[., 2, 5\]"),
        (with_states(lambda state: state[..., :4]), r"Expected hidden\[0\] size \[.*\], got \[., ., 4\]"),
        (with_states(lambda state: torch.cat([state, state])), r"Expected hidden\[0\] size"),
        (with_states(lambda state: state[:, 0]), "hx should also be 3-D but got 2-D"),
        ((input[0], with_states(lambda state: state)[1]), "hx should also be 2-D but got 3-D"),
    ):
        with pytest.raises(torch.jit.Error, match=words):
            scripted(*arguments)
    if name == "LSTM":
        h, c = good
        with pytest.raises(torch.jit.Error, match=r"Expected hidden\[1\] size"):
            scripted(input, (h, c[..., :4]))


class Packing(torch.nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, input, lengths):
        output, hidden = self.net(torch.nn.utils.rnn.pack_padded_sequence(input, lengths, enforce_sorted=False))
        return torch.nn.utils.rnn.pad_packed_sequence(output)[0], hidden


@scripts
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("name", LAYERS)
def test_trace_of_packed_rows(name, backend):
    """The number of rows is not that of the example."""
    net = Packing(pair(name, num_layers=2, bidirectional=True)[0])
    traced = torch.jit.trace(net, (torch.randn(7, 4, 3), torch.tensor([7, 3, 2, 1])), check_trace=False)
    for lengths in ([7, 1, 3], [2, 7, 1, 3, 4]):
        given = torch.randn(7, len(lengths), 3), torch.tensor(lengths)
        torch.testing.assert_close(traced(*given), net(*given))


@scripts
@every
def test_trace(name, native):
    """A trace keeps fastrnn's op, and runs with other sizes."""
    ours, _, input = pair(name)
    traced = torch.jit.trace(ours, input)
    other = torch.randn(2, 3) if "Cell" in name else torch.randn(4, 2, 3)
    torch.testing.assert_close(traced(other), ours(other), rtol=0, atol=0)
    assert "fastrnn::" in str(traced.inlined_graph)


class Featured(torch.nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, input, lengths, reset):
        return self.net(input, None, lengths, reset)


@scripts
@pytest.mark.parametrize("name", LAYERS)
def test_trace_with_lengths_and_reset(name, native):
    ours, _, input = pair(name)
    model = Featured(ours)
    traced = torch.jit.trace(model, (input, torch.tensor([7, 0, 3]), torch.eye(7, 3, dtype=torch.bool)))
    other = (torch.randn(4, 2, 3), torch.tensor([4, 2]), torch.eye(4, 2, dtype=torch.bool))
    torch.testing.assert_close(traced(*other), model(*other), rtol=0, atol=0)


@pytest.mark.parametrize("reentrant", [False, True], ids=["saved", "reentrant"])
@every
def test_checkpoint(name, reentrant, backend):
    ours, _, input = pair(name, **({} if "Cell" in name else {"num_layers": 2, "dropout": 0.5}))
    input.requires_grad_()
    gradients = []

    def flat(input):  # the reentrant kind sees no tensors within tuples
        return tuple(leaves(ours(input)))

    for call in (flat, lambda input: checkpoint(flat, input, use_reentrant=reentrant)):
        torch.manual_seed(2)
        ours.zero_grad()
        sum(tensor.square().sum() for tensor in call(input)).backward()
        gradients.append([parameter.grad for parameter in ours.parameters()])
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


@pytest.mark.parametrize("how", ["fused", "foreach"])
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW], ids=lambda kind: kind.__name__)
@every
def test_optimizers(name, optimizer, how, backend):
    ours, theirs, input = pair(name)
    for net, options in ((ours, {how: True}), (theirs, {})):
        steps = optimizer(net.parameters(), lr=0.01, **options)
        for _ in range(3):
            steps.zero_grad()
            sum(tensor.square().sum() for tensor in leaves(net(input))).backward()
            steps.step()
    torch.testing.assert_close([*ours.parameters()], [*theirs.parameters()], rtol=1e-4, atol=1e-5)


@every
def test_saved_tensors_elsewhere(name, backend):
    ours, _, input = pair(name)
    expected = run(ours, input)
    with torch.autograd.graph.save_on_cpu():
        torch.testing.assert_close(run(ours, input), expected, rtol=0, atol=0)
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: packed.append(tensor.shape) or tensor.detach().numpy().copy(), torch.from_numpy
    ):
        found = run(ours, input)
    assert packed
    torch.testing.assert_close(found, expected)


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.lstm = fastrnn.LSTM(3, 5, 2, bidirectional=True)
        self.gru = fastrnn.GRU(10, 6)
        self.cell = fastrnn.RNNCell(6, 4)

    def forward(self, input):
        return self.cell(self.gru(self.lstm(input)[0])[0][-1])


def train(model, input):
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        model(input).square().mean().backward()
        optimizer.step()
    return model


def one_of_two(rank, path):
    """A process: half of the batch with DDP and with FSDP2 gives what one process does with all of it."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    input = torch.randn(7, 4, 3, generator=torch.Generator().manual_seed(1))
    half = input[:, 2 * rank : 2 * rank + 2]
    expected = [*train(Model(), input).parameters()]

    replicated = train(torch.nn.parallel.DistributedDataParallel(Model()), half)
    torch.testing.assert_close([*replicated.parameters()], expected, rtol=1e-4, atol=1e-4)

    sharded, mesh = Model(), torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
    for part in (*sharded.children(), sharded):
        torch.distributed.fsdp.fully_shard(part, mesh=mesh)
    assert all(isinstance(p, torch.distributed.tensor.DTensor) for p in sharded.parameters())
    found = [parameter.full_tensor() for parameter in train(sharded, half).parameters()]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    torch.distributed.destroy_process_group()
    # Without the interpreter's own end: gloo's threads outlive the group while anything of torch refers to it, and one
    # that lets go of its last tensor meanwhile aborts the process (pytorch/pytorch#179291; so with torch.nn's layers).
    os._exit(0)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without torch.distributed")
def test_two_processes(tmp_path):
    import torch.distributed.fsdp  # both are imported by no one else here
    import torch.distributed.tensor

    torch.multiprocessing.spawn(one_of_two, (str(tmp_path / "rendezvous"),), nprocs=2)


@every
def test_symbolic_trace(name, backend):
    """One node, as torch.nn's modules are; the graph calls the module itself."""
    ours, theirs, input = pair(name)

    class Net(torch.nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self, input, hx=None):
            return self.net(input, hx)

    graphs = [torch.fx.symbolic_trace(Net(net)) for net in (ours, theirs)]
    targets = [[node.target for node in graph.graph.nodes if node.op == "call_module"] for graph in graphs]
    assert targets == [["net"], ["net"]]
    same(graphs[0], graphs[1], input)
    states = leaves(ours(input))[0 if "Cell" in name else 1 :]
    hx = tuple(states) if "LSTM" in name else states[0]
    torch.testing.assert_close(graphs[0](input, hx), ours(input, hx), rtol=0, atol=0)
