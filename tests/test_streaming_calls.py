"""What a session promises beside its numbers: chunks, states, outputs, refusals, no cost but the step's."""

import copy
import itertools
import pickle
import threading

import pytest
import torch
from cases import KINDS, data, module, small, tensors
from test_streaming import build
from torch.nn.utils import prune

import fastrnn
from fastrnn import StreamingSession


@pytest.mark.parametrize("batch, steps", [(1, 101), (2, 27), (3, 40), (5, 19), (17, 7), (65, 3)])
@pytest.mark.parametrize("weight_dtype", [None, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("inputs, hidden", [(5, 33), (48, 48)])
@pytest.mark.parametrize("kind", KINDS)
def test_chunk_is_the_steps(kind, inputs, hidden, weight_dtype, batch, steps, native):
    """To the last bit, wherever it is cut: as many steps as are multiplied together, fewer, and one.

    Inputs and outputs of whole lines are used where they lie."""
    net = build(kind, inputs, hidden, 2)
    one, other = (StreamingSession(net, batch, weight_dtype) for _ in range(2))
    x = torch.randn(steps, batch, inputs)
    expected = torch.stack([one.step(row) for row in x])
    cuts = sorted({0, 1, 3, min(steps // 2 + 3, steps), steps})
    chunks = [other.chunk(x[a:b]) for a, b in itertools.pairwise(cuts)]
    assert torch.equal(torch.cat(chunks), expected)
    for a, b in zip(tensors(one.state), tensors(other.state), strict=True):
        assert torch.equal(a, b)
    if inputs == hidden and expected.shape == x.shape:
        other.reset()
        other.chunk(x, out=x)
        assert torch.equal(x, expected)
        assert torch.equal(tensors(one.state)[0], tensors(other.state)[0])


@pytest.mark.parametrize("weight_dtype", [None, torch.bfloat16, torch.int8])
def test_chunk_keeps_what_is_not_finite_in_its_row(weight_dtype, native):
    net = build("gru", 5, 17, 2)
    x = torch.randn(9, 2, 5)
    expected = StreamingSession(net, 2, weight_dtype).chunk(x)
    session = StreamingSession(net, 2, weight_dtype)
    x[4, 0, 2] = float("nan")
    found = session.chunk(x)
    assert found[4:, 0].isnan().all()
    assert torch.equal(found[:, 1], expected[:, 1]) and torch.equal(found[:4], expected[:4])
    session.reset(torch.tensor([True, False]))
    x[4, 0, 2] = 0
    assert torch.equal(session.chunk(x)[:, 0], StreamingSession(net, 2, weight_dtype).chunk(x)[:, 0])


def test_chunk_layouts(backend):
    net = build("gru", 5, 17, batch_first=True)
    x = torch.randn(2, 7, 5)
    with torch.no_grad():
        expected = net(x)[0]
    torch.testing.assert_close(StreamingSession(net, 2).chunk(x), expected, rtol=0, atol=1e-6)
    found = StreamingSession(net).chunk(x[:1])
    assert found.shape == (1, 7, 17)
    assert torch.equal(StreamingSession(net).chunk(x[0]), found[0])


@pytest.mark.parametrize("batch", [1, 3, 33])
def test_outputs_of_a_chunk_are_the_callers(batch, native):
    """They lie where the last state is read while the chunk runs, and are no part of the session afterwards."""
    net = build("lstm", 16, 32)
    session, other = StreamingSession(net, batch), StreamingSession(net, batch)
    x = torch.randn(9, batch, 16)
    first = session.chunk(x[:5])
    expected = other.chunk(x)
    assert torch.equal(first, expected[:5])
    first.fill_(float("nan"))
    assert torch.equal(session.chunk(x[5:]), expected[5:])
    spaced = torch.randn(18, batch, 16)[::2].copy_(x)
    other.reset()
    assert torch.equal(other.chunk(spaced), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_shapes_and_strides_of_a_step(kind, backend):
    net = build(kind, 4, 6)
    a, b = StreamingSession(net), StreamingSession(net)
    x = torch.randn(8)
    flat, row = a.step(x[::2]), b.step(x[None, ::2])
    assert flat.dim() == 1 and row.dim() == 2
    assert torch.equal(flat, row[0])
    wide = StreamingSession(net, 3)
    x = torch.randn(4, 3)
    expected = StreamingSession(net, 3).step(x.t().contiguous())
    torch.testing.assert_close(wide.step(x.t()), expected, rtol=0, atol=1e-6)
    wide.reset()
    one_row = wide.step(x[:, :1].t().expand(3, 4))
    torch.testing.assert_close(one_row, expected[:1].expand_as(one_row), rtol=0, atol=1e-6)


def test_a_step_gives_a_fresh_tensor(backend):
    session = StreamingSession(build("lstm"))
    x = torch.randn(5)
    first = session.step(x)
    kept = first.clone()
    second = session.step(x)
    assert first.data_ptr() != second.data_ptr()
    assert torch.equal(first, kept)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("kind", KINDS)
def test_out(kind, backend):
    net = build(kind, 17, 17)
    session, other = StreamingSession(net, 2), StreamingSession(net, 2)
    x = torch.randn(4, 2, 17)
    outputs = net.proj_size or 17
    # in the same calls, from memory aligned alike: on some processors torch adds up in an order that depends on both
    expected = [other.step(x[0]), other.step(x[1].clone()), other.chunk(x[2:].clone())]
    out = torch.full((2, 2 * outputs), float("nan"))[:, ::2]  # any strides
    version = out._version
    assert session.step(x[0], out) is out
    assert torch.equal(out, expected[0])
    assert out._version > version
    if outputs == 17:
        shared = x[1].clone()
        session.step(shared, out=shared)
        assert torch.equal(shared, expected[1])
        rest = x[2:].clone()
        assert session.chunk(rest, out=rest) is rest
        assert torch.equal(rest, expected[2])


def test_out_that_is_refused(backend):
    session = StreamingSession(build("gru", 17, 17), 2)
    x = torch.randn(2, 17)
    before = session.state
    for out, error, message in (
        (torch.empty(17), ValueError, "out should have the shape"),
        (torch.empty(2, 17, dtype=torch.float64), TypeError, "out should be of the module's dtype"),
        (torch.empty(2, 17, device="meta"), ValueError, "out should be a plain tensor on the CPU"),
        (torch.empty(2, 17, requires_grad=True), ValueError, "out should not require grad"),
        ([0.0], TypeError, "out should be a Tensor, got: list"),
    ):
        with pytest.raises(error, match=message):
            session.step(x, out)
    assert torch.equal(session.state, before)  # nothing has gone on


def test_out_that_shares_memory_is_refused(native):
    session = StreamingSession(build("gru", 17, 17), 2)
    with pytest.raises(ValueError, match="out should not share memory between its elements"):
        session.step(torch.randn(2, 17), torch.empty(1, 17).expand(2, 17))
    memory = torch.randn(5, 2, 17)
    with pytest.raises(ValueError, match="out should be the input itself or share no memory with it"):
        session.chunk(memory[:4], out=memory[1:])
    session.chunk(memory[:2], out=memory[3:])


@pytest.mark.parametrize("kind", KINDS)
def test_state(kind, backend):
    """Set and got: after a module's call, to go back, and to go on in another session."""
    net = build(kind, 5, 17, 2)
    x = torch.randn(6, 3, 5)
    with torch.no_grad():
        output, hx = net(x)
        expected = net(x, hx)[0]
    session = StreamingSession(net, 3)
    session.state = hx
    torch.testing.assert_close(session.state, hx, rtol=0, atol=0)
    first = session.chunk(x)
    torch.testing.assert_close(first, expected, rtol=0, atol=2e-6)
    kept = session.state
    again = session.chunk(x)
    session.state = kept
    assert torch.equal(session.chunk(x), again)
    for value in tensors(kept):
        value.zero_()  # a copy: the session's own is not touched
    session.state = None
    torch.testing.assert_close(session.chunk(x), output, rtol=0, atol=2e-6)


def test_state_of_an_unbatched_call(backend):
    net = build("lstm", 5, 17, 2)
    x = torch.randn(6, 5)
    with torch.no_grad():
        _, hx = net(x)
        expected = net(x, hx)[0]
    session = StreamingSession(net)
    session.state = hx
    torch.testing.assert_close(session.chunk(x), expected, rtol=0, atol=2e-6)


def test_states_that_are_refused(backend):
    session = StreamingSession(build("lstm", 5, 17), 3)
    h = torch.randn(1, 3, 17)
    session.state = (h, h)
    for state, error, message in (
        (h, TypeError, r"state should be a tuple \(h, c\), got: Tensor"),
        ((h, [0.0]), TypeError, "state should be of Tensors, got: list"),
        ((h, h[:, :2]), ValueError, r"state\[1\] should be a tensor on the CPU of the shape"),
        ((h, h.double()), TypeError, r"state\[1\] should be of dtype"),
        ((h.to("meta"), h), ValueError, r"state\[0\] should be a tensor on the CPU"),
    ):
        with pytest.raises(error, match=message):
            session.state = state
    torch.testing.assert_close(session.state, (h, h), rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_reset(kind, backend):
    net = build(kind, 5, 17, 2)
    session = StreamingSession(net, 3)
    x = torch.randn(4, 3, 5)
    from_zeros = session.chunk(x)
    running = session.state
    session.reset(torch.tensor([True, False, True]))
    mixed = session.chunk(x)
    assert torch.equal(mixed[:, ::2], from_zeros[:, ::2])
    session.state = running
    assert torch.equal(session.chunk(x)[:, 1], mixed[:, 1])
    session.reset()
    assert torch.equal(session.chunk(x), from_zeros)


def test_masks_that_are_refused(backend):
    session = StreamingSession(build("gru"), 3)
    for mask, error in (
        (torch.ones(3), TypeError),
        ([True, False, True], TypeError),
        (torch.ones(2, dtype=torch.bool), ValueError),
        (torch.ones(1, 3, dtype=torch.bool), ValueError),
    ):
        with pytest.raises(error, match="mask should"):
            session.reset(mask)


@pytest.mark.parametrize("weight_dtype", [None, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("kind", KINDS)
def test_refresh(kind, weight_dtype, backend):
    """Weights are a snapshot: what happens to the module shows after a refresh, and the state stays."""
    net = build(kind, 5, 17, 2)
    session, other = StreamingSession(net, 2, weight_dtype), StreamingSession(net, 2, weight_dtype)
    x = torch.randn(3, 2, 5)
    expected = other.chunk(x)
    with torch.no_grad():
        for weight in net.parameters():
            weight.mul_(0.5)
    assert torch.equal(session.chunk(x), expected)
    session.refresh()
    fresh = StreamingSession(net, 2, weight_dtype)
    fresh.state = other.state
    assert torch.equal(session.chunk(x), fresh.chunk(x))


HOOKED = {
    "pruned": lambda net: prune.l1_unstructured(net, "weight_hh_l0", 0.5),
    "weight_norm": lambda net: torch.nn.utils.weight_norm(net, "weight_hh_l0"),
    "spectral_norm": lambda net: torch.nn.utils.spectral_norm(net, "weight_hh_l0"),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
@pytest.mark.parametrize("how", HOOKED)
def test_weights_that_a_hook_sets_before_forward(how, backend):
    """As the next call of the module would have them; vectors of a spectral norm stay what they are."""
    net = HOOKED[how](build("gru", 5, 17))
    session, x = StreamingSession(net, 2), torch.randn(4, 2, 5)
    vectors = {name: value.clone() for name, value in net.named_buffers()}
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(0.5)
    session.refresh()
    for name, value in net.named_buffers():
        assert torch.equal(value, vectors[name])
    with torch.no_grad():
        expected = net.eval()(x)[0]
    for found in (session, StreamingSession(net, 2)):
        torch.testing.assert_close(found.chunk(x), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("weight_dtype", [None, torch.int8])
@pytest.mark.parametrize("way", [copy.deepcopy, lambda session: pickle.loads(pickle.dumps(session))])
def test_copies(way, weight_dtype, backend):
    """They go on where the session was, by themselves."""
    session, x = StreamingSession(build("lstm", 5, 17, 2), 3, weight_dtype), torch.randn(4, 3, 5)
    session.chunk(x)
    twin = way(session)
    assert twin.module is not session.module
    expected = session.chunk(x)
    assert torch.equal(twin.chunk(x), expected)
    holder = torch.nn.Linear(3, 4)
    holder.session = session
    assert torch.equal(way(holder).session.chunk(x), session.chunk(x))


def test_refresh_refuses_another_dtype(backend):
    net = build("gru")
    session = StreamingSession(net)
    net.double()
    with pytest.raises(RuntimeError, match="dtype"):
        session.refresh()


# --- Modules ----------------------------------------------------------------------------------------------------------


def test_eval_semantics_whatever_the_mode(backend):
    net = build("lstm", 5, 17, 2, dropout=0.9).train()
    x = torch.randn(4, 2, 5)
    with torch.no_grad():
        expected = net.eval()(x)[0]
    net.train()
    torch.testing.assert_close(StreamingSession(net, 2).chunk(x), expected, rtol=0, atol=2e-6)


def test_torch_modules_and_parametrized_weights(backend):
    net = torch.nn.LSTM(5, 17)
    x = torch.randn(4, 2, 5)
    torch.nn.utils.parametrizations.weight_norm(net, "weight_hh_l0")
    with torch.no_grad():
        net.parametrizations.weight_hh_l0.original0.mul_(0.5)
        plain = fastrnn.LSTM(5, 17)
        plain.load_state_dict({name: getattr(net, name) for name in plain.state_dict()})
        expected = plain(x)[0]
    torch.testing.assert_close(StreamingSession(net, 2).chunk(x), expected, rtol=0, atol=2e-6)


def test_modules_that_are_refused(backend):
    with pytest.raises(TypeError, match="module should be an RNN, LSTM or GRU, got: Linear"):
        StreamingSession(torch.nn.Linear(3, 4))
    with pytest.raises(ValueError, match="a bidirectional module cannot be streamed"):
        StreamingSession(fastrnn.GRU(3, 4, bidirectional=True))
    with pytest.raises(ValueError, match=r"a session runs on the CPU, and the module is on meta: module.cpu\(\)"):
        StreamingSession(fastrnn.GRU(3, 4, device="meta"))
    for batch, error in ((0, ValueError), (1.0, TypeError), (True, TypeError)):
        with pytest.raises(error, match="batch_size should be"):
            StreamingSession(fastrnn.GRU(3, 4), batch)
    with pytest.raises(TypeError, match=r"weight_dtype should be None, .*, got: torch\.int4"):
        StreamingSession(fastrnn.GRU(3, 4), weight_dtype=torch.int4)
    with pytest.raises(ValueError, match="weight_dtype should be None for a float64 module"):
        StreamingSession(fastrnn.GRU(3, 4).double(), weight_dtype=torch.int8)


class Doubled(torch.nn.GRU):
    def forward(self, input, hx=None):
        output, h_n = super().forward(input, hx)
        return 2 * output, h_n


def test_a_forward_of_its_own_is_refused(backend):
    with pytest.raises(TypeError, match="Doubled has a forward of its own"):
        StreamingSession(Doubled(3, 4))


@pytest.mark.parametrize("units", [3, 129])
def test_layers_of_unequal_sizes_are_refused(units, backend):
    """As their module refuses them; their states would not be one tensor."""
    net, below = build("lstm", 5, 17, 2), fastrnn.LSTM(5, units)
    for name in ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"):
        setattr(net, name, getattr(below, name))
    net.weight_ih_l1 = torch.nn.Parameter(torch.randn(68, units))
    with pytest.raises(ValueError, match="the layers should be of one size"):
        StreamingSession(net)


def test_more_rows_than_there_can_be(native):
    with pytest.raises(ValueError, match="batch is too large"):
        StreamingSession(build("lstm"), 2**60)
    with pytest.raises(MemoryError):
        StreamingSession(build("lstm"), 2**40)


def test_autocast_and_default_devices_change_nothing(backend):
    session, x = StreamingSession(build("gru", 5, 17), 2), torch.randn(3, 2, 5)
    expected = session.chunk(x)
    with torch.autocast("cpu"), torch.device("meta"):
        session.reset()
        assert torch.equal(session.chunk(x), expected)
    assert session.state.dtype == torch.float32


def test_a_refusal_changes_no_state(backend):
    session, x = StreamingSession(build("gru", 5, 17), 2), torch.randn(2, 5)
    session.step(x)
    before = session.state
    with torch.inference_mode():
        inference = torch.empty(2, 17)
    for out, error in ((torch.empty(2, 1).expand(2, 17), ValueError), (inference, RuntimeError)):
        with pytest.raises(error):
            session.step(x, out)
    with pytest.raises(ValueError, match="x should have the shape"):
        session.chunk(torch.tensor(1.0))
    with pytest.raises(ValueError, match="plain tensor"):
        torch.func.vmap(session.step)(torch.randn(2, 2, 5))
    assert torch.equal(session.state, before)


def test_a_tensor_without_memory_is_refused(native):
    with pytest.raises(ValueError, match="x should be a plain tensor"):
        StreamingSession(build("gru", 5, 17)).step(torch._efficientzerotensor(5))


def test_a_state_that_is_a_negative_view(backend):
    session = StreamingSession(build("gru", 5, 17))
    session.state = torch._neg_view(torch.ones(1, 1, 17))
    assert torch.equal(session.state, -torch.ones(1, 1, 17))


def test_inputs_that_are_refused(backend):
    session = StreamingSession(build("gru", 5, 17), 2)
    for x, error, message in (
        (torch.randn(2, 4), ValueError, r"x should have the shape \(N, I\) = \(2, 5\), got: \[2, 4\]"),
        (torch.randn(3, 5), ValueError, "x should have the shape"),
        (torch.randn(5), ValueError, "x should have the shape"),
        (torch.randn(0, 5), ValueError, "x should have the shape"),
        (torch.tensor(1.0), ValueError, "x should have the shape"),
        (torch.randn(2, 5).double(), TypeError, "x should be of the module's dtype"),
        (torch.randn(2, 5, device="meta"), ValueError, "x should be a plain tensor on the CPU"),
        (None, TypeError, "x should be a Tensor, got: NoneType"),
    ):
        with pytest.raises(error, match=message):
            session.step(x)
    for x in (torch.randn(3, 5), torch.randn(0, 2, 5), torch.randn(4, 3, 5), torch.randn(4, 2, 4)):
        with pytest.raises(ValueError, match="x should have"):
            session.chunk(x)
    single = StreamingSession(build("gru", 5, 17))
    with pytest.raises(ValueError, match=r"x should have the shape \(I,\) or \(N, I\) = \(1, 5\)"):
        single.step(torch.randn(4))


def test_nothing_is_recorded(backend):
    session = StreamingSession(build("lstm"))
    x = torch.randn(5, requires_grad=True)
    assert not session.step(x).requires_grad
    with torch.inference_mode():
        assert session.step(x).is_inference()


# --- No cost that is not the step's -----------------------------------------------------------------------------------


def test_no_operator_and_no_allocation(native):
    """The profiler sees every operator, and every allocation of a tensor's memory."""
    session = StreamingSession(build("lstm", 5, 17, 2))
    x, out = torch.randn(5), torch.empty(17)
    chunk, chunk_out = torch.randn(9, 5), torch.empty(9, 17)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        for _ in range(10):
            session.step(x, out)
            session.chunk(chunk, chunk_out)
        marker = torch.empty(3)
    names = [event.name for event in profile.events()]
    assert [name for name in names if not name.startswith(("aten::empty", "[memory]"))] == []
    assert names.count("aten::empty") == 1 and marker is not None
    assert sum(event.cpu_memory_usage > 0 for event in profile.events()) <= 1


@pytest.mark.parametrize("kind", small())
def test_sessions_are_independent(kind, native):
    """Each thread its own session, and torch's threads have no part in it."""
    net, x = module(kind), data(kind)[0].detach()
    sessions = [StreamingSession(net, kind.batch) for _ in range(4)]
    expected = StreamingSession(net, kind.batch).chunk(x.repeat(50, 1, 1))
    found = [None] * 4

    def work(index):
        found[index] = torch.cat([sessions[index].chunk(x) for _ in range(50)])

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for output in found:
        assert torch.equal(output, expected)


def test_two_threads_in_one_session_are_refused(native):
    """A long chunk lets go of the interpreter; who comes meanwhile is told."""
    session = StreamingSession(build("lstm", 256, 256))
    x = torch.randn(2000, 256)
    thread = threading.Thread(target=session.chunk, args=(x,))
    thread.start()
    with pytest.raises(RuntimeError, match="a session is used by one thread at a time"):
        while thread.is_alive():
            session.step(x[0])
    thread.join()
    session.step(x[0])


def test_two_threads_in_one_session_of_python_are_refused():
    with fastrnn.backend("python"):
        session = StreamingSession(build("lstm"))
    with session._session.in_use, pytest.raises(RuntimeError, match="a session is used by one thread at a time"):
        session.step(torch.randn(5))
    session.step(torch.randn(5))
