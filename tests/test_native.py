"""What only the native backend promises: threads, compile, export, and ops that torch's own checks accept."""

import os
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from cases import (
    Case,
    data,
    module,
    mostly_slow,
    outputs_and_gradients,
    parametrize,
    row_lengths,
    small,
    tensors,
    threads,
)
from tolerance import check, worst
from torch._dynamo.testing import CompileCounterWithBackend

import fastrnn


@pytest.mark.parametrize("count", [2, 3, 5])
@parametrize(small(num_layers=2, bidirectional=True, steps=7, batch=17, hidden=129) + small(steps=7, hidden=129))
def test_number_of_threads(case, count, native):
    """More threads than cores too; repeatable at each number, and the same to rounding at all."""
    with threads(1):
        expected = outputs_and_gradients(module(case), *data(case))
    with threads(count):
        found, again = (outputs_and_gradients(module(case), *data(case)) for _ in range(2))
    for name, value in found.items():
        assert torch.equal(value, again[name]), name
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("batch", [1, 2, 3, 7])
@pytest.mark.parametrize("kind", ["rnn_tanh", "lstm", "lstm_proj", "gru"])  # relu leaves states that are all but zero
def test_units_of_the_last_block(kind, batch, native):
    """Every number of units that a vector may be left with, and every number of vectors that a block may be."""
    for hidden in (*range(2, 17), 20, 23, 26, 29, 49, 65, 81, 97):
        case = Case(kind, steps=5, batch=batch, inputs=9, hidden=hidden)
        theirs = outputs_and_gradients(module(case, torch.nn), *data(case))
        oracle = outputs_and_gradients(module(case, torch.nn, torch.float64), *data(case, torch.float64))
        own = worst(theirs, oracle)  # some of these tensors have two elements
        for name, value in outputs_and_gradients(module(case), *data(case)).items():
            check(f"{case} {name}", value, theirs[name], oracle[name], own=own * oracle[name].abs().max().item())


@parametrize(small(num_layers=2, bidirectional=True, steps=7, batch=17, hidden=33))
def test_several_python_threads(case, native):
    net, arguments = module(case), data(case)  # made here: the seed is global
    expected = outputs_and_gradients(net, *arguments)
    start = threading.Barrier(4)

    def work(_):
        start.wait()
        return [outputs_and_gradients(net, *arguments) for _ in range(3)]

    with threads(2), ThreadPoolExecutor(4) as pool:
        runs = [run for result in pool.map(work, range(4)) for run in result]
    for run in runs:
        for name, value in run.items():
            torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_after_fork(native):
    """As in a DataLoader's worker: the parent's threads are not there."""
    net = fastrnn.LSTM(3, 129, 2, bidirectional=True)
    input = torch.randn(7, 17, 3)
    with threads(2):
        expected = net(input)[0]
    child = os.fork()
    if child == 0:
        torch.set_num_threads(2)
        os._exit(0 if torch.allclose(net(input)[0], expected, atol=1e-5) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def layer_arguments(case, lengths, reset, grad, device="cpu"):
    net = module(case).to(device)
    input, hx = data(case, device=device)
    weights = [weight.detach().requires_grad_(grad) for layer in net.all_weights for weight in layer]
    states = [state.detach().requires_grad_(grad) for state in tensors(hx)]
    rest = (lengths, reset, None, case.bidirectional, case.batch_first, False, False)
    return input.detach().requires_grad_(grad), states, weights, *rest


@pytest.mark.parametrize("features", [False, True], ids=["plain", "lengths and reset"])
@parametrize(mostly_slow(small(bidirectional=True) + small(layout="batch_first", hx=False)))
def test_opcheck(case, features, native):
    """torch's checks of schema, autograd registration, fake tensors and AOT dispatch."""
    op = getattr(torch.ops.fastrnn, f"{case.kind.removesuffix('_proj')}_layer").default
    shape = (case.batch, case.steps) if case.batch_first else (case.steps, case.batch)
    lengths = torch.tensor([3, 0, 2]) if features else None
    reset = torch.eye(3, dtype=torch.bool).expand(*shape) if features else None
    torch.library.opcheck(op, layer_arguments(case, lengths, reset, grad=True))


def train(function, net, *arguments):
    results = tensors(function(*arguments))
    loss = sum(result.square().sum() for result in results)
    return [*results, *torch.autograd.grad(loss, list(net.parameters()))]


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@parametrize(mostly_slow(small(num_layers=2, bidirectional=True) + small(layout="batch_first", hx=False)))
def test_compile_in_one_graph(case, dynamic, native):
    torch._dynamo.reset()
    net = module(case)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(net, fullgraph=True, dynamic=dynamic, backend=counter)
    # no two sizes alike at first: dynamo would take them for one
    sizes = [(7, 5), (9, 4), (2, 11)] if dynamic else [(3, 3)]
    graphs = set()
    for steps, batch in sizes:
        input, hx = data(Case(**{**vars(case), "steps": steps, "batch": batch}))
        arguments = (input, hx) if case.hx else (input,)
        torch.testing.assert_close(train(compiled, net, *arguments), train(net, net, *arguments), rtol=0, atol=0)
        with torch.no_grad():
            torch.testing.assert_close(compiled(*arguments), net(*arguments), rtol=0, atol=0)
        graphs.add(counter.frame_count)
    assert len(graphs) == 1  # what serves the first size serves all


@parametrize(small(num_layers=2))
def test_compile_with_lengths_and_reset(case, native):
    torch._dynamo.reset()
    net = module(case)
    compiled = torch.compile(net, fullgraph=True, dynamic=True, backend="aot_eager")
    input, hx = data(case)
    reset = torch.eye(3, dtype=torch.bool)
    arguments = (input, hx, row_lengths(case), reset)
    torch.testing.assert_close(train(compiled, net, *arguments), train(net, net, *arguments), rtol=0, atol=0)
    states = torch.compile(net.forward_states, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(tensors(states(*arguments)), tensors(net.forward_states(*arguments)), rtol=0, atol=0)


@parametrize(small(layout="sorted") + small(layout="unsorted", num_layers=2) + small(layout="sorted", hx=False))
def test_compile_packed(case, native):
    """In one graph with hx; without, the number of rows has to be read from batch_sizes, which breaks the graph."""
    torch._dynamo.reset()
    net = module(case)
    compiled = torch.compile(net, fullgraph=case.hx, backend="aot_eager")
    arguments = data(case)
    torch.testing.assert_close(train(compiled, net, *arguments), train(net, net, *arguments), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["RNNCell", "LSTMCell", "GRUCell"])
def test_compile_cells(name, native):
    torch._dynamo.reset()
    net = getattr(fastrnn, name)(3, 5)
    compiled = torch.compile(net, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch in (2, 3):
        input = torch.randn(batch, 3)
        torch.testing.assert_close(train(compiled, net, input), train(net, net, input), rtol=0, atol=0)


def test_compile_dropout(native):
    torch._dynamo.reset()
    net = fastrnn.LSTM(3, 5, 2, dropout=0.5, batch_first=True)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    input = torch.randn(4, 6, 3)
    results = []
    for function in (compiled, net):
        torch.manual_seed(9)
        results.append(function(input)[0])
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_compile_with_inductor(native):
    torch._dynamo.reset()
    net = torch.nn.Sequential(fastrnn.GRU(3, 5))
    compiled = torch.compile(net, fullgraph=True)
    input = torch.randn(4, 2, 3)
    torch.testing.assert_close(train(compiled, net, input), train(net, net, input))


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non-strict"])
@parametrize(small(num_layers=2, bidirectional=True, hx=False))
def test_export_with_dynamic_steps_and_batch(case, strict, native):
    net = module(case).eval()
    steps, batch = torch.export.Dim("steps", max=4096), torch.export.Dim("batch", max=4096)
    example = (torch.randn(4, 3, case.inputs),)
    program = torch.export.export(net, example, dynamic_shapes={"input": {0: steps, 1: batch}}, strict=strict)
    ops = [str(node.target) for node in program.graph.nodes if "fastrnn" in str(node.target)]
    assert len(ops) == 2  # a layer stays one node
    for sizes in ((4, 3), (9, 5)):
        input = torch.randn(*sizes, case.inputs)
        torch.testing.assert_close(program.module()(input), net(input), rtol=0, atol=0)


@parametrize([case for case in small(dtype=torch.float64, bidirectional=True) if case.kind != "rnn_relu"])
def test_forward_mode(case, native):
    """The tangent against the gradient: jvp . v = vjp of the sum."""
    net = module(case)
    input, hx = data(case)
    input, hx = input.detach(), torch.utils._pytree.tree_map(torch.Tensor.detach, hx)
    tangent = torch.randn_like(input)
    _, along = torch.func.jvp(lambda x: net(x, hx)[0].square().sum(), (input,), (tangent,))
    gradient = torch.func.grad(lambda x: net(x, hx)[0].square().sum())(input)
    torch.testing.assert_close(along, (gradient * tangent).sum())


@pytest.mark.parametrize("cell", [fastrnn.RNN, fastrnn.LSTM, fastrnn.GRU])
def test_compiled_autograd(cell):
    torch.manual_seed(0)
    net = cell(4, 6, num_layers=2, bidirectional=True)
    input = torch.randn(3, 2, 4)
    expected = torch.autograd.grad(net(input)[0].square().sum(), list(net.parameters()))
    loss = net(input)[0].square().sum()
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager", fullgraph=True)):
        loss.backward()
    for parameter, grad in zip(net.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, grad)


def test_backward_op_refuses_rows_that_do_not_add_up():
    weights = [torch.randn(5, 4), torch.randn(5, 5)]
    h0 = torch.zeros(1, 3, 5)
    sizes = torch.tensor([3, 2])
    flags = (False, False)
    output, _, reserve = torch.ops.fastrnn.rnn_tanh_layer(
        torch.randn(5, 4), [h0], weights, None, None, sizes, *flags, False, True
    )
    with pytest.raises(RuntimeError, match="Expected batch_sizes to add up to 5 rows, got 600"):
        torch.ops.fastrnn.rnn_tanh_layer_backward(
            [output, None],
            torch.randn(5, 4),
            [h0],
            weights,
            None,
            None,
            torch.full((200,), 3),
            output,
            reserve,
            *flags,
            [True] * 4,
            0,
        )


@pytest.mark.parametrize("groups", [-1, 3])
def test_backward_op_refuses_groups_that_do_not_divide_the_batch(groups):
    weights = [torch.randn(5, 4), torch.randn(5, 5)]
    input = torch.randn(2, 4, 4)
    output, _, reserve = torch.ops.fastrnn.rnn_tanh_layer(
        input, [], weights, None, None, None, False, False, False, True
    )
    arguments = ([output, None], input, [], weights, None, None, None, output, reserve, False, False, [True] * 3)
    with pytest.raises(RuntimeError, match=r"Expected (groups|the batch) to be"):
        torch.ops.fastrnn.rnn_tanh_layer_backward(*arguments, groups)


def test_backward_op_refuses_what_the_forward_op_did_not_save():
    weights = [torch.randn(5, 4).bfloat16(), torch.randn(5, 5).bfloat16()]
    input = torch.randn(2, 4, 4).bfloat16()
    output, _, reserve = torch.ops.fastrnn.rnn_tanh_layer(
        input, [], weights, None, None, None, False, False, False, True
    )

    def backward(output, reserve):
        arguments = (None, None, None, output, reserve, False, False, [True] * 3, 0)
        return torch.ops.fastrnn.rnn_tanh_layer_backward([output, None], input, [], weights, *arguments)

    assert backward(output, reserve)[0].dtype == torch.bfloat16
    with pytest.raises(RuntimeError, match="not the same dtype, found input tensor with BFloat16 and output tensor"):
        backward(output.float(), reserve)
    with pytest.raises(RuntimeError, match="Expected a reserve of Float on cpu, got BFloat16 on cpu"):
        backward(output, reserve.bfloat16())
    with pytest.raises(RuntimeError, match="Expected a reserve of Float on cpu, got Float on meta"):
        backward(output, reserve.to("meta"))
