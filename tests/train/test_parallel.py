"""What is done to a model before it is trained, and how processes share it: real ones, on gloo."""

import pytest
import torch
from parallel_runs import MODEL, WORLD, Ddp, assert_close, assert_equal, config_of, train
from ranks import run_ranks
from torch.distributed.fsdp import FSDPModule

from lmim_fast.errors import UsageError
from lmim_fast.models.lmim import LMIM
from lmim_fast.models.mae import MAE
from lmim_fast.train import parallel
from lmim_fast.train.world import World


def _train_in_all_ways(world):
    answers = {"flat": train(world, config_of()), "flat 2": train(world, config_of(accumulation=2))}
    answers["graph"] = train(world, config_of(cuda_graph="on"), graphed=True)
    answers["ddp"] = train(world, config_of(), wrap=lambda step: Ddp(step, world))
    answers["ddp 2"] = train(world, config_of(accumulation=2), wrap=lambda step: Ddp(step, world))
    answers["shard"] = train(world, config_of(parallel="shard"))
    answers["shard 2"] = train(world, config_of(parallel="shard", accumulation=2))
    answers["reshard"] = train(world, config_of(parallel="shard", reshard=True))
    answers["recompute"] = train(world, config_of(parallel="shard", activation_checkpointing=True))
    answers["bf16"] = train(world, config_of(parallel="shard", precision="bf16"))
    answers["flat bf16"] = train(world, config_of(precision="bf16"))
    return answers


@pytest.fixture(scope="module")
def two():
    """What two ranks trained, by the way in which they did."""
    return run_ranks(_train_in_all_ways)


@pytest.fixture(scope="module")
def one():
    """The same in this process."""
    return train(WORLD, config_of())


@pytest.mark.parametrize(("flat", "ddp"), [("flat", "ddp"), ("flat 2", "ddp 2")])
def test_r16_two_ranks_with_a_flat_buffer_are_bitwise_those_with_ddp(two, flat, ddp):
    for rank in two:
        assert_equal(rank[flat], rank[ddp])


def test_a_captured_step_of_two_ranks_is_bitwise_the_eager_one(two):
    for rank in two:
        assert_equal(rank["graph"], rank["flat"])


@pytest.mark.parametrize("way", ["flat", "shard", "flat 2", "shard 2", "reshard", "recompute"])
def test_r16_every_way_of_two_ranks_trains_as_one_process(two, one, way):
    for rank in two:
        assert_close(rank[way], one)
    assert_equal(two[0][way], two[1][way])


def test_r16_bf16_with_fsdp_stays_within_a_hundredth_of_fp32_in_one_process(two, one):
    for way in ("bf16", "flat bf16"):
        difference = abs(two[0][way][0] / one[0] - 1)
        assert 0 < difference[:, 0].max() < 1e-2, (way, difference)


def test_a_split_model_holds_half_of_the_weights_on_each_of_two_ranks(two):
    whole = two[0]["flat"][3]
    assert [rank["shard"][3] / whole for rank in two] == pytest.approx([0.5, 0.5], abs=0.02)
    assert sum(rank["shard"][3] for rank in two) == whole


def _hooks_after_steps(world):
    """Hooks on the gathered weights of every unit, the most of them on one."""
    counts = []

    def count(step):
        counts.append(step._model)

    train(world, config_of(parallel="shard"), wrap=count)
    units = [module for module in counts[0].modules() if isinstance(module, FSDPModule)]
    states = [unit._get_fsdp_state() for unit in units]
    groups = [
        group
        for state in states  # torch 2.11 has one group a unit
        for group in getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
    ]
    weights = [weight._unsharded_param for group in groups for weight in group.fsdp_params]
    assert len(weights) > 20
    return max(len(weight._backward_hooks or ()) for weight in weights)


def test_the_steps_of_a_split_model_leave_no_hooks_behind():
    assert run_ranks(_hooks_after_steps, size=1, grouped=True) == [0]


def _train_hybrid(world):
    return train(world, config_of(parallel="hybrid", shard_size=2))


@pytest.mark.slow
def test_four_ranks_in_two_replicas_of_two_shards_train_as_one_process(one):
    for rank in run_ranks(_train_hybrid, size=4):
        assert_close(rank, one)
        assert rank[3] < 0.6 * one[3]


def _train_alone(world):
    assert world.size == 1
    return train(world, config_of(parallel="shard"))


def test_fsdp_of_one_process_is_bitwise_the_plain_model():
    # In a process of its own, as the plain one is: the order of sums depends on the threads.
    assert_equal(run_ranks(_train_alone, size=1, grouped=True)[0], run_ranks(_train_plain, size=1)[0])


def _train_plain(world):
    return train(world, config_of())


def _train_compiled(world):
    compiled = [
        train(world, config_of(parallel="shard", compile=True)),
        train(world, config_of(compile=True, activation_checkpointing=True)),
    ]
    return compiled, train(world, config_of(parallel="shard"))


@pytest.mark.slow
def test_blocks_compiled_one_by_one_train_as_those_that_are_not():
    for compiled, plain in run_ranks(_train_compiled):
        for way in compiled:
            assert_close(way, plain)


def test_recomputed_blocks_give_the_same_gradients_and_keep_their_names(one):
    config = config_of(activation_checkpointing=True)
    assert_equal(train(WORLD, config), one)
    model = LMIM(MODEL)
    names = list(model.state_dict())
    parallel.apply(model, config, WORLD)
    assert list(model.state_dict()) == names


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_the_teachers_matrices_and_no_others_are_bf16_in_a_bf16_run(precision, dtype):
    model = LMIM(MODEL)
    parallel.place(model, config_of(precision=precision), WORLD)
    matrices = {
        name
        for name, module in model.model_maeenc_momentum.named_modules()
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d) and module.weight.dtype == dtype
    }
    assert len(matrices) == 9  # patches; qkv, proj, fc1, fc2 of two blocks
    rest = [p for name, p in model.named_parameters() if "momentum" not in name]
    assert {p.dtype for p in rest} == {torch.float32}


def test_a_model_without_frozen_matrices_stays_as_it_is():
    model = MAE(MODEL)
    parallel.frozen_to_bf16(model)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


CUDA = torch.device("cuda", 0)
GROUP = object()  # as good as a process group for what is decided from it


class _Memory:
    def __init__(self, total):
        self.total_memory = total


@pytest.mark.parametrize(
    ("total", "size", "mode"), [(2**40, 8, "replicate"), (2**20, 8, "shard"), (2**20, 1, "replicate")]
)
def test_auto_splits_a_model_that_does_not_fit_in_half_of_a_gpu(monkeypatch, total, size, mode):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: _Memory(total))
    world = World(0, size, CUDA, GROUP if size > 1 else None, size)
    settled = parallel.settle(config_of(parallel="auto", cuda_graph="auto"), MAE(MODEL), world)
    assert settled.parallel == mode
    assert settled.cuda_graph == ("on" if mode == "replicate" else "off")


@pytest.mark.parametrize(
    "changes", [dict(accumulation=2), dict(activation_checkpointing=True), dict(parallel="shard"), {}]
)
def test_a_graph_is_the_default_on_cuda_wherever_it_is_possible(changes):
    world = World(0, 8, CUDA, GROUP, 8)
    settled = parallel.settle(config_of(cuda_graph="auto", **changes), MAE(MODEL), world)
    assert settled.cuda_graph == ("off" if changes else "on")
    assert parallel.settle(config_of(cuda_graph="auto"), MAE(MODEL), WORLD).cuda_graph == "off"


@pytest.mark.parametrize(
    ("changes", "device", "message"),
    [
        (dict(cuda_graph="on"), "cpu", "--cuda-graph on is for CUDA, not for cpu: drop it"),
        (dict(cuda_graph="on", parallel="shard"), "cuda", "drop --parallel shard"),
        (dict(cuda_graph="on", activation_checkpointing=True), "cuda", "drop --activation-checkpointing"),
        (dict(parallel="hybrid", shard_size=3), "cpu", "groups of 3 of 8 processes"),
        (dict(parallel="hybrid", shard_size=8), "cpu", "or --parallel shard or replicate"),
        (dict(parallel="hybrid"), "cpu", "groups of 8 of 8 processes"),
        (dict(shard_size=2), "cpu", "--shard-size 2 is for --parallel hybrid: drop it"),
        (dict(reshard=True), "cpu", "--reshard is for --parallel shard or hybrid: drop it"),
    ],
)
def test_options_that_do_not_go_together_are_refused_with_the_one_to_drop(changes, device, message):
    world = World(0, 8, torch.device(device), GROUP, 8)
    with pytest.raises(UsageError, match=message):
        parallel.settle(config_of(**changes), MAE(MODEL), world)


def test_a_split_model_without_torchrun_is_refused():
    with pytest.raises(UsageError, match="--parallel shard needs torchrun"):
        parallel.settle(config_of(parallel="shard"), MAE(MODEL), WORLD)
