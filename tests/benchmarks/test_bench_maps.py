"""The form of the maps that is made on a device, checked on the CPU."""

import numpy as np
import torch

from benchmarks import bench_maps
from lmim_fast.data.guidance import geometry


def test_maps_densified_by_torch_are_those_of_the_host():
    mesh = bench_maps.random_mesh(5, np.random.default_rng(1))[0]
    expected = geometry._densify(mesh.reshape(5, -1), (32, 128))
    actual = bench_maps.densify(torch.from_numpy(mesh), (32, 128))
    np.testing.assert_allclose(actual.numpy(), expected, atol=1e-4)


def test_without_a_cuda_device_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench_maps.main([]) == 1
    assert "no CUDA device" in capsys.readouterr().err
