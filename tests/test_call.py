"""The short way from Python to the op of a layer: what it takes on, and what it leaves to torch.ops."""

import threading
from typing import Any, ClassVar

import pytest
import torch
from cases import data, module, parametrize, small
from recording import Dispatches, Functions

import fastrnn
from fastrnn import _backend, reference

pytestmark = pytest.mark.usefixtures("native")


class Logged(torch.Tensor):
    calls: ClassVar[list[str]] = []

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.calls.append(str(func))
        return super().__torch_function__(func, types, args, kwargs or {})


def arguments(cell: str, **changes: Any) -> list[Any]:
    spec = reference.CELLS[cell]
    torch.manual_seed(0)
    values = {
        "input": torch.randn(5, 3, 7),
        "hx": [torch.randn(1, 3, 17) for _ in range(spec.states)],
        "weights": [torch.randn(spec.gates * 17, 7), torch.randn(spec.gates * 17, 17)],
        "lengths": None,
        "reset": None,
        "batch_sizes": None,
        "bidirectional": False,
        "batch_first": False,
        "need_steps": False,
    }
    return list((values | changes).values())


@pytest.mark.parametrize("need_steps", [False, True])
@pytest.mark.parametrize("cell", list(reference.CELLS))
def test_results_are_those_of_the_op(cell, need_steps):
    changes = {"lengths": torch.tensor([5, 1, 3]), "reset": torch.rand(5, 3) < 0.3, "need_steps": need_steps}
    given = arguments(cell, **changes)
    found = _backend.native.layers[cell](*given)
    expected = _backend.layer_ops[cell](*given, False)
    assert len(found) == len(expected) - 1
    torch.testing.assert_close(found, expected[:-1], rtol=0, atol=0)


@pytest.mark.parametrize("cell", list(reference.CELLS))
def test_a_cell_is_a_layer_of_one_step(cell):
    given = arguments(cell, input=torch.randn(1, 3, 7))
    input, hx, weights = given[:3]
    found = _backend.native.cells[cell](input[0], [state[0] for state in hx], weights)
    expected = _backend.native.layers[cell](*given)[1 : 1 + len(hx)]
    assert len(found) == len(hx)
    for one, other in zip(found, expected, strict=True):
        assert one._base is None
        assert torch.equal(one, other[0])
    with Dispatches():
        assert _backend.native.cells[cell](input[0], [], weights) is None


def test_gradients_flow():
    given = arguments("lstm")
    for tensor in (given[0], *given[1], *given[2]):
        tensor.requires_grad_()
    inputs = [given[0], *given[1], *given[2]]
    found = torch.autograd.grad(_backend.native.layers["lstm"](*given)[0].square().sum(), inputs)
    expected = torch.autograd.grad(_backend.layer_ops["lstm"](*given, False)[0].square().sum(), inputs)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("place", ["input", "hx", "weights", "lengths", "reset", "batch_sizes"])
def test_what_is_no_plain_tensor_is_left_to_torch_ops(place):
    subclass = torch.randn(3).as_subclass(Logged)
    for strange in (subclass, "a string", 3):
        given = arguments("gru", **{place: [strange] if place in ("hx", "weights") else strange})
        assert _backend.native.layers["gru"](*given) is None


def test_a_parameter_is_a_plain_tensor():
    given = arguments("gru")
    given[2] = [torch.nn.Parameter(weight) for weight in given[2]]
    assert _backend.native.layers["gru"](*given) is not None


@parametrize(small(num_layers=1, layout="time_major"))
def test_modes_and_subclasses_see_the_op(case):
    net, (input, hx) = module(case), data(case)
    expected = net(input, hx)[0]
    with Functions() as functions:
        torch.testing.assert_close(net(input, hx)[0], expected, rtol=0, atol=0)
    with Dispatches() as dispatches:
        torch.testing.assert_close(net(input, hx)[0], expected, rtol=0, atol=0)
    Logged.calls.clear()
    logged = net(input.as_subclass(Logged), hx)[0]
    assert isinstance(logged, Logged)
    torch.testing.assert_close(logged.as_subclass(torch.Tensor), expected, rtol=0, atol=0)
    for names in (functions.names, dispatches.names, Logged.calls):
        assert any("fastrnn" in name and "_layer" in name for name in names), names


def test_trace_records_the_op():
    net = fastrnn.GRU(7, 17)
    traced = torch.jit.trace(net, torch.randn(5, 3, 7), check_trace=False)
    assert "fastrnn::gru_layer" in str(traced.inlined_graph)


def test_refusals_are_those_of_the_op():
    given = arguments("lstm", lengths=torch.tensor([5, 6, 1]))
    with pytest.raises(RuntimeError, match="lengths should be between 0 and 5, got 6 at index 1") as short:
        _backend.native.layers["lstm"](*given)
    with pytest.raises(RuntimeError) as long:
        _backend.layer_ops["lstm"](*given, False)
    assert str(short.value).splitlines()[0] == str(long.value).splitlines()[0]


def test_several_threads_at_once():
    """The interpreter is not held during a layer."""
    given = arguments("lstm")
    expected, results = _backend.native.layers["lstm"](*given)[0], []
    threads = [
        threading.Thread(target=lambda: results.extend(_backend.native.layers["lstm"](*given)[0] for _ in range(50)))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 150
    for result in results:
        torch.testing.assert_close(result, expected, rtol=0, atol=0)
