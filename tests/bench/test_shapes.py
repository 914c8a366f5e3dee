"""The torch-free table of the networks' shapes, against the networks."""

from __future__ import annotations

import pytest
import torch

from bench import shapes
from efficientad.model.networks import PDN, PDN_LAYERS, Autoencoder
from efficientad.ops.reference import resize_reads


@pytest.mark.parametrize("size", ["S", "M"])
def test_layers_are_those_of_the_networks(size):
    """Filters and cells of the tables, against the modules."""
    for column, channels in ((0, 384), (1, 768)):
        net = PDN(size, channels)
        want = [tuple(m.weight.shape) for m in net.modules() if isinstance(m, torch.nn.Conv2d)]
        got = [(cout[column], cin[column], k, k)
               for _, k, cin, cout, _ in shapes.pdn_layers(size)]  # fmt: skip
        assert got == want
        assert shapes.pdn_layers(size)[-1][0] == 56
    cells = []
    net = Autoencoder().eval()
    convs = [m for m in net.modules() if isinstance(m, torch.nn.Conv2d)]
    for module in convs:
        module.register_forward_hook(lambda m, x, y: cells.append((y.shape[-1], *m.weight.shape)))
    with torch.no_grad():
        net(torch.zeros(1, 3, 256, 256))
    assert cells == [(x.cells, x.cout, x.cin, x.kernel, x.kernel) for x in shapes.AUTOENCODER]
    assert [(m.stride[0], m.padding[0]) for m in convs] == [
        (x.stride, x.padding) for x in shapes.AUTOENCODER
    ]
    assert len(resize_reads(128, 56)) == shapes.D6_NEEDED


@pytest.mark.parametrize("size", ["S", "M"])
def test_rows_are_those_of_the_networks(size):
    """Of the padded variant, too: the census compiles and the reports count what exists."""
    rows = PDN_LAYERS[size]
    channels = [
        (shapes.TEACHER, shapes.STUDENT) if row.out_channels is None else (row.out_channels,) * 2
        for row in rows
    ]
    assert list(shapes.PDN[size]) == [
        shapes.PdnLayer(row.kernel, couts, row.padding, row.pool)
        for row, couts in zip(rows, channels, strict=True)
    ]
    assert [row.relu for row in rows] == [True] * (len(rows) - 1) + [False]


def test_relus_of_the_autoencoder():
    """Behind every layer but the last of either half: there a negative value comes through."""
    net = Autoencoder().eval()
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, torch.nn.Conv2d):
                module.bias.fill_(-100.0)
        image = torch.zeros(1, 3, 256, 256)
        signs = []
        convs = [m for m in net.modules() if isinstance(m, torch.nn.Conv2d)]
        for module in convs[1:]:
            module.register_forward_hook(lambda m, x, y: signs.append(bool((x[0] < 0).any())))
        signs.append(bool((net(image) < 0).any()))
    assert signs == [not x.relu for x in shapes.AUTOENCODER]
