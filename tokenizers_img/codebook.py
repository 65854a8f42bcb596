"""What the vector quantisers share: the nearest code, and a codebook's start."""

from __future__ import annotations

import torch

from genlab.noise import permutation


@torch.no_grad()
def nearest(x_NC: torch.Tensor, codebook_VC: torch.Tensor) -> torch.Tensor:
    """Ids (N,) of the codes at the smallest Euclidean distance, in float32; the first of equals."""
    codes = codebook_VC.float()
    half_norm = codes.square().sum(1) / 2
    # a few rows at a time, since N x V of a whole batch can be gigabytes
    parts = x_NC.float().split(max(1, 2**24 // len(codes)))
    return torch.cat([(part @ codes.T - half_norm).argmax(1) for part in parts])


@torch.no_grad()
def lloyd(x_NC: torch.Tensor, ids_N: torch.Tensor, codebook_VC: torch.Tensor, seed: int) -> torch.Tensor:
    """One round of k-means (Lloyd, 1982): each code to the mean of its vectors, an unused one to some vector.

    Args:
        x_NC: the vectors.
        ids_N: the code each belongs to.
        codebook_VC: the codes.
        seed: decides which vectors the unused codes take.
    """
    V = len(codebook_VC)
    count = torch.bincount(ids_N, minlength=V).to(x_NC)
    mean = torch.zeros_like(codebook_VC).index_add_(0, ids_N, x_NC) / count.clamp_min(1)[:, None]
    spare = x_NC[permutation(len(x_NC), seed).to(x_NC.device)]
    spare = spare[torch.arange(V, device=x_NC.device) % len(spare)]
    return torch.where(count[:, None] > 0, mean, spare)
