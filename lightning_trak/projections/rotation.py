"""A rotation after which all elements of a row have about the same size, so that few bits hold them well."""

import functools

import torch
from torch import Tensor

from lightning_trak.projections.philox import Stream


def rotated(rows: Tensor) -> Tensor:
    """Rotate rows. Inner products of rows that are both rotated stay as they are.

    Some features are hundreds of times larger than the others, or most of them are near zero. Rounding to few levels
    would remove the small ones. After a random rotation, the elements of a row are like independent normal numbers,
    whatever it was (Ailon and Chazelle 2009, "The fast Johnson-Lindenstrauss transform"). To round such rows is best
    practice for vectors of few bits (DRIVE, arXiv 2105.08339; QuaRot, arXiv 2404.00456; TurboQuant, arXiv 2504.19874).

    Each element gets a random sign. Then comes the discrete Hartley transform (Bracewell 1983), the real part of the
    Fourier transform less the imaginary part. It is orthogonal for any number of elements: its matrix holds
    (cos(2 pi i j / k) + sin(2 pi i j / k)) / sqrt(k).

    Args:
        rows: float32 or float64, shape ``(n, k)``.
    """
    k = rows.shape[1]
    spectrum = torch.fft.rfft(rows * _signs(k, rows.device), norm="ortho")
    mirrored = (spectrum.real + spectrum.imag)[:, 1 : (k + 1) // 2].flip(1)  # F_(k - j) is the conjugate of F_j
    return torch.cat([spectrum.real - spectrum.imag, mirrored], dim=1)


@functools.cache
def _signs(k: int, device: torch.device) -> Tensor:
    """The same random signs for all rows of k elements: int8, shape ``(k,)``."""
    with torch.inference_mode(False):  # they are used outside an inference mode, too
        return Stream.derive("rotation", seed=0, checkpoint=0, name=str(k)).signs(range(k), device)
