"""Work on a pretended GPU: no operation mixes devices, and the results are those of a CPU."""

import copy

import pytest
import torch

from castlm.core.adams import AdamS
from castlm.core.distill import OutputHead, distillation_loss, top_tokens
from castlm.distributed.world import init_world
from castlm.evaluation.perplexity import perplexity
from castlm.oneshot.options import NO_REFINEMENTS, BasisOptions, Refinements
from castlm.oneshot.steps.round import quantize_
from castlm.starts import change_basis_, prune_oneshot_
from castlm.training.recorder import Recorder
from castlm.training.stepper import Stepper
from tests.pretend_gpu import PretendTensor, pretend_gpu
from tests.runs import begin_run, small
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
    assert run.evaluator.precision == "bf16"
    recorder = Recorder(run)
    recorder.log(Stepper(run).step())
    recorder.evaluate()
    recorder.save()
    recorder.saver.finish()
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


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_a_pruned_model_is_that_of_a_cpu(method):
    refinements = Refinements() if method == "sparsegpt" else NO_REFINEMENTS
    options = {"calibration": IDS, "refinements": refinements}
    expected = tiny_model("llama")
    prune_oneshot_(expected, method, **options)
    with pretend_gpu():
        found = tiny_model("llama").to("cuda")
        prune_oneshot_(found, method, **options)
        found.to("cpu")
    for ours, theirs in zip(found.parameters(), expected.parameters()):
        torch.testing.assert_close(ours, theirs)


def test_a_change_of_basis_int4_and_perplexity(gpu):
    model = tiny_model("llama", num_hidden_layers=1).to("cuda")
    report = change_basis_(model, IDS, BasisOptions(rotation_iterations=1))
    assert report.changes
    assert quantize_(model, "int4", calibration=IDS).layers
    assert perplexity(model, IDS.flatten(), seq_len=32, autocast_dtype=torch.bfloat16).perplexity > 1
