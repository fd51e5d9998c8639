"""Work on a pretended GPU: no operation mixes devices, and the results are those of a CPU."""

import copy
import math
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from castlm import prune
from castlm.core.adams import AdamS
from castlm.core.cholesky import upper_factor
from castlm.core.distill import OutputHead, distillation_loss, top_tokens
from castlm.core.nm import NM
from castlm.distributed.world import init_world
from castlm.evaluation.perplexity import perplexity
from castlm.oneshot import sparsegpt, walk
from castlm.oneshot.axes import find_permutation
from castlm.oneshot.folder import HiddenStates
from castlm.oneshot.layer_input import LayerInput
from castlm.oneshot.methods import change_basis_, prune_oneshot_
from castlm.oneshot.options import EFFORTS, NO_REFINEMENTS, BasisOptions, Refinements
from castlm.oneshot.solvers import SOLVERS
from castlm.oneshot.sparsegpt import sparsegpt_by_factor
from castlm.oneshot.steps.round import quantize_
from tests.pretend_gpu import PretendTensor, pretend_gpu
from tests.runs import assert_equal_weights, begin_run, killed_in, small
from tests.slow import slow
from tests.tiny import tiny_model

IDS = torch.randint(256, (3, 32), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def gpu():
    with pretend_gpu():
        yield


def test_devices_do_not_mix(gpu):
    there, here = torch.ones(2, device="cuda"), torch.ones(2)
    assert isinstance(there + 1, PretendTensor)
    assert (there.device.type, there.cpu().device.type) == ("cuda", "cpu")
    with pytest.raises(RuntimeError, match="same device"):
        there + here
    with pytest.raises(TypeError, match="numpy"):
        there.numpy()


@pytest.mark.parametrize("more", [{}, {"step_in_backward": True, "moments_on_host": True}])
def test_a_step_an_evaluation_and_a_checkpoint_of_a_run(more, gpu, llama, text, tmp_path):
    options = more | {"init_from": "magnitude", "max_steps": 2, "mask_interval": 1, "eval_tokens": 128}
    run = begin_run(small(llama, text, tmp_path / "run", **options), init_world("auto", "full"))
    assert run.model.device.type == "cuda"
    assert run.precision == "bf16"
    with run.recording():
        run.log(run.train_step())
        run.evaluate()
        run.save()
        run.saver.finish()
    assert all(isinstance(p, PretendTensor) for p in run.optimizer.sparse_params())
    assert all(isinstance(mask, PretendTensor) for mask in run.method.masks().values())


@pytest.mark.parametrize(("moments", "on_host"), [("fp32", False), ("8bit", False), ("fp32", True), ("8bit", True)])
def test_optimizer_and_masks_are_those_of_a_cpu(moments, on_host):
    generator = torch.Generator().manual_seed(0)
    plain = torch.nn.ParameterList([torch.randn(64, 64, generator=generator), torch.randn(64, generator=generator)])
    gradients = [[torch.randn(p.shape, generator=generator) for p in plain] for _ in range(3)]

    def stepped(model):
        groups = [{"params": [model[0]], "sparse": True}, {"params": [model[1]]}]
        optimizer = AdamS(groups, total_steps=4, moments=moments, moments_on_host=on_host, fused=False)
        optimizer.load_state_dict(optimizer.state_dict())
        for of_step in gradients:
            for parameter, gradient in zip(model, of_step):
                parameter.grad = gradient.to(parameter.device)
            optimizer.fetch_moments(model)
            optimizer.step()
        assert isinstance(optimizer.state[model[0]]["exp_avg"], PretendTensor) == (model[0].is_cuda and not on_host)
        return [*(p.detach().cpu() for p in model), optimizer.mask(model[0]).cpu()]

    expected = stepped(copy.deepcopy(plain))
    with pretend_gpu():
        found = stepped(copy.deepcopy(plain).to("cuda"))
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("top_k", [0, 5])
def test_tokens_that_do_not_count_have_the_weight_0_in_the_loss_of_a_gpu(top_k):
    """A CPU leaves their rows out instead."""
    generator = torch.Generator().manual_seed(0)
    hidden, theirs = (torch.randn(6, 8, generator=generator) for _ in range(2))
    weight, labels = torch.randn(20, 8, generator=generator), torch.tensor([3, -100, 0, 7, -100, 1])

    def loss_of(hidden, theirs, weight, labels):
        hidden = hidden.detach().requires_grad_()
        head = OutputHead(weight)
        teacher = {"teacher_hidden": theirs, "teacher_head": head}
        if top_k:
            teacher = {"teacher_top": top_tokens(theirs, head, top_k)}
        loss = distillation_loss(hidden, head, labels, eta=0.5, chunk_tokens=4, **teacher)
        loss.loss.backward()
        return [*(part.detach().cpu() for part in loss), hidden.grad.cpu()]

    expected = loss_of(hidden, theirs, weight, labels)
    with pretend_gpu():
        found = loss_of(*(tensor.to("cuda") for tensor in (hidden, theirs, weight, labels)))
    torch.testing.assert_close(found, expected)


class Launches(TorchDispatchMode):
    """Counts the operators that are called one by one, and in `captured` steps."""

    def __init__(self):
        super().__init__()
        self.single, self.in_steps, self.steps, self.is_in_step = 0, 0, 0, False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if not function.is_view and "view" not in str(function):
            if self.is_in_step:
                self.in_steps += 1
            else:
                self.single += 1
        return function(*args, **(kwargs or {}))

    def captured(self, step, device):
        def replay():
            self.steps, self.is_in_step = self.steps + 1, True
            step()
            self.is_in_step = False

        return replay


@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8), (5, 32)])
def test_a_gpu_prunes_by_sparsegpt_with_the_masks_of_a_cpu_and_few_launches_for_each_block_of_columns(
    n, m, monkeypatch
):
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(900, 416, generator=generator), torch.randn(40, 416, generator=generator)
    factor, _ = upper_factor(x.T @ x, 0.01)
    expected = sparsegpt_by_factor(weight, factor, n, m)
    with pretend_gpu(), Launches() as launches:
        monkeypatch.setattr(sparsegpt, "captured", launches.captured)
        found = sparsegpt_by_factor(weight.to("cuda"), factor.to("cuda"), n, m).cpu()
    assert torch.equal(found != 0, expected != 0)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    # Three blocks of 128 columns, and 32 columns that are swept group by group. Each group took 18 launches of 2:4.
    of_group = launches.in_steps / (3 * 128 / m)
    assert launches.steps == 3
    assert of_group <= 13 + 2 * (m - n - 1)
    assert launches.single <= 3 * 9 + 32 / m * (of_group + 1) + 30


def test_an_order_of_columns_is_that_of_a_cpu():
    score = torch.rand(40, 96, generator=torch.Generator().manual_seed(0))
    expected = find_permutation(score, NM(2, 4), 6)
    assert not torch.equal(expected, find_permutation(score, NM(2, 4), 0))
    with pretend_gpu():
        found = find_permutation(score.to("cuda"), NM(2, 4), 6)
    assert type(found) is torch.Tensor
    assert torch.equal(found, expected)


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_a_pruned_model_is_that_of_a_cpu(method):
    refinements = Refinements() if method == "sparsegpt" else NO_REFINEMENTS
    options = {"calibration": IDS, "refinements": refinements, "effort": "best"}
    expected = tiny_model("llama")
    prune_oneshot_(expected, method, **options)
    with pretend_gpu():
        found = tiny_model("llama").to("cuda")
        prune_oneshot_(found, method, **options)
        found.to("cpu")
    for ours, theirs in zip(found.parameters(), expected.parameters()):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("free", [math.inf, slow(0)])
def test_hidden_states_stay_in_the_memory_of_the_host_where_they_fit(free, gpu, llama, text, tmp_path, monkeypatch):
    read: list[Path] = []
    fromfile = np.fromfile
    monkeypatch.setattr(walk, "available_memory", lambda: free)
    monkeypatch.setattr(np, "fromfile", lambda file, *args, **more: read.append(file) or fromfile(file, *args, **more))
    sizes = {"calibration_sequences": 20, "seq_len": 64, "reconstruct_epochs": 1, "memory": "block", "device": "cuda"}
    with killed_in(HiddenStates, "move_on", 2):
        prune(llama, text, output_dir=tmp_path / "killed", **sizes)
    assert bool(read) == (free == 0)
    read.clear()
    prune(llama, text, output_dir=tmp_path / "killed", **sizes)
    assert free == 0 or len(read) == len(set(read)) == 2  # what enters the second block, also of the dense model
    monkeypatch.undo()
    prune(llama, text, output_dir=tmp_path / "straight", **sizes)
    assert_equal_weights(tmp_path / "straight", tmp_path / "killed")


@pytest.mark.parametrize("tokens", [1, 300])
def test_bf16_inputs_are_multiplied_as_they_are_on_a_gpu(tokens, monkeypatch):
    x = torch.randn(tokens, 1100, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected = (x.double().T @ x.double()).triu() * 2 / 3
    products: list[torch.dtype] = []
    mm = torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b, **more: products.append(a.dtype) or mm(a, b, **more))
    for place, dtypes in ((nullcontext(), []), (pretend_gpu(), 3 * [torch.bfloat16])):
        with place:
            seen = LayerInput(x.to("cuda" if dtypes else "cpu"), SOLVERS["sparsegpt"])
            seen.add(x.to("cuda" if dtypes else "cpu"), SOLVERS["sparsegpt"], 3)
            found = seen._part.cpu()
        assert products == dtypes
        torch.testing.assert_close(found.double().triu(), expected, rtol=1e-5, atol=1e-4)
    with FakeTensorMode():  # what torch itself says of such a product on a GPU
        narrow = torch.empty(300, 64, dtype=torch.bfloat16, device="cuda")
        assert torch.mm(narrow.T, narrow, out_dtype=torch.float32).dtype == torch.float32


def test_a_change_of_basis_int4_and_perplexity_are_those_of_a_cpu(monkeypatch):
    # A single step: the roundings of two devices part in many.
    monkeypatch.setitem(EFFORTS, "best", EFFORTS["best"]._replace(rotation_iterations=1))
    found = []
    for place, device in ((nullcontext(), "cpu"), (pretend_gpu(), "cuda")):
        with place:
            model = tiny_model("llama", num_hidden_layers=1).to(device)
            changes = change_basis_(model, IDS, BasisOptions()).changes
            quantize_(model, "int4", calibration=IDS)
            found.append((len(changes), perplexity(model, IDS.flatten(), seq_len=32).perplexity))
    (kept, ppl), (kept_there, ppl_there) = found
    assert kept == kept_there > 0
    assert ppl_there == pytest.approx(ppl, rel=0.01)  # a GPU inverts where a CPU takes eigenvectors
