"""The networks' shapes and their operations, for whoever measures or reports; imports nothing.

The package's own tables build modules and need torch; a compile census and a report of results
files must not. The tests hold the two to each other.
"""

from __future__ import annotations

from typing import NamedTuple

IMAGE = 256  # pixels a side
BOTH = "SM"  # `size` of what is the same in EfficientAD-S and M
TEACHER, STUDENT = 384, 768  # channels of the last layers: C and 2 C
DECODER = 64  # channels of every decoder layer but the last


class PdnLayer(NamedTuple):
    """A convolution of teacher and student, with a ReLU behind all but the last."""

    kernel: int
    couts: tuple[int, int]  # output channels of teacher and student
    padding: int  # of the padded variant; the pool behind it has 1 there
    pool: bool  # an average over 2x2, which drops an odd last row and column


class AutoencoderLayer(NamedTuple):
    """A convolution of the encoder ("e1" to "e6") or, behind a resize, of the decoder ("d1"...)."""

    name: str
    cells: int  # of the output along an axis, for IMAGE
    kernel: int
    cin: int
    cout: int
    stride: int
    padding: int
    relu: bool


def _alike(width: int) -> tuple[int, int]:
    return width, width


PDN = {  # Tables 6 and 7
    "S": (
        PdnLayer(4, _alike(128), 3, pool=True),
        PdnLayer(4, _alike(256), 3, pool=True),
        PdnLayer(3, _alike(256), 1, pool=False),
        PdnLayer(4, (TEACHER, STUDENT), 0, pool=False),
    ),
    "M": (
        PdnLayer(4, _alike(256), 3, pool=True),
        PdnLayer(4, _alike(512), 3, pool=True),
        PdnLayer(1, _alike(512), 0, pool=False),
        PdnLayer(3, _alike(512), 1, pool=False),
        PdnLayer(4, (TEACHER, STUDENT), 0, pool=False),
        PdnLayer(1, (TEACHER, STUDENT), 0, pool=False),
    ),
}
AUTOENCODER = (  # Table 8
    AutoencoderLayer("e1", 128, 4, 3, 32, stride=2, padding=1, relu=True),
    AutoencoderLayer("e2", 64, 4, 32, 32, stride=2, padding=1, relu=True),
    AutoencoderLayer("e3", 32, 4, 32, 64, stride=2, padding=1, relu=True),
    AutoencoderLayer("e4", 16, 4, 64, 64, stride=2, padding=1, relu=True),
    AutoencoderLayer("e5", 8, 4, 64, 64, stride=2, padding=1, relu=True),
    AutoencoderLayer("e6", 1, 8, 64, 64, stride=1, padding=0, relu=False),
    AutoencoderLayer("d1", 4, 4, 64, DECODER, stride=1, padding=2, relu=True),
    AutoencoderLayer("d2", 9, 4, DECODER, DECODER, stride=1, padding=2, relu=True),
    AutoencoderLayer("d3", 16, 4, DECODER, DECODER, stride=1, padding=2, relu=True),
    AutoencoderLayer("d4", 33, 4, DECODER, DECODER, stride=1, padding=2, relu=True),
    AutoencoderLayer("d5", 64, 4, DECODER, DECODER, stride=1, padding=2, relu=True),
    AutoencoderLayer("d6", 128, 4, DECODER, DECODER, stride=1, padding=2, relu=True),
    AutoencoderLayer("d7", 56, 3, DECODER, DECODER, stride=1, padding=1, relu=True),
    AutoencoderLayer("d8", 56, 3, DECODER, TEACHER, stride=1, padding=1, relu=False),
)
D6_NEEDED = 112  # of d6's 128 rows and columns: what the last resize, 128 -> 56, reads


def conv_flop(cells: int, kernel: int, cin: int, cout: int) -> int:
    """Operations (a multiplication and an addition are two) of cells x cells outputs."""
    return 2 * cells**2 * kernel**2 * cin * cout


def pdn_layers(size: str) -> list[tuple[int, int, tuple[int, int], tuple[int, int], bool]]:
    """Per layer: outputs computed along an axis, kernel, inputs and outputs of T and S, pooled.

    IMAGE without padding; what a pool drops is not computed.
    """
    layers, cells, cin = [], IMAGE, (3, 3)
    for kernel, couts, _, pool in PDN[size]:
        cells += 1 - kernel
        if pool:
            cells = cells // 2 * 2
        layers.append((cells, kernel, cin, couts, pool))
        cin = couts
        if pool:
            cells //= 2
    return layers


def network_flop(size: str) -> dict[str, int]:
    """Operations per image of teacher, student and autoencoder."""
    layers = pdn_layers(size)
    return {
        "teacher": sum(conv_flop(n, k, cin[0], cout[0]) for n, k, cin, cout, _ in layers),
        "student": sum(conv_flop(n, k, cin[1], cout[1]) for n, k, cin, cout, _ in layers),
        "autoencoder": sum(conv_flop(x.cells, x.kernel, x.cin, x.cout) for x in AUTOENCODER),
    }


def paper_gflop(size: str) -> float:
    """GFLOP an image with every output of a pooled layer counted, as the paper does."""
    spare, h = 0, IMAGE
    for outputs, kernel, cin, couts, pool in pdn_layers(size):
        computed = h - kernel + 1
        spare += sum(
            conv_flop(computed, kernel, *pair) - conv_flop(outputs, kernel, *pair)
            for pair in zip(cin, couts, strict=True)
        )
        h = outputs // 2 if pool else outputs
    return (sum(network_flop(size).values()) + spare) / 1e9
