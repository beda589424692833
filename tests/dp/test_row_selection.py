"""Layers on rows that the batch's values chose are refused; choosing afterwards and putting back are covered."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_matches_loop
from torch import Tensor, nn

import privimage_fast as pf

TOKENS = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [1, 0, 0, 0], [1, 1, 0, 0]], dtype=torch.bool)  # eight, as two each would be


class Chosen(nn.Module):
    """A layer on the tokens that a mask chooses, in one of the ways there are, or on all before choosing, or put back before."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.linear = how, nn.Linear(5, 4)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        empty, wide = x.new_zeros(*mask.shape, 4), mask[..., None].expand(*mask.shape, 4)
        if self.how == "mask":
            return empty.masked_scatter(wide, self.linear(x[mask])).sum((1, 2))
        if self.how == "mask, then more":
            return empty.masked_scatter(wide, self.linear(F.silu(x[mask]) * 2)).sum((1, 2))
        if self.how == "masked_select":
            return empty.masked_scatter(wide, self.linear(x.masked_select(mask[..., None]).view(-1, 5))).sum((1, 2))
        if self.how == "nonzero":
            return empty.masked_scatter(wide, self.linear(x.flatten(0, 1)[mask.flatten().nonzero()[:, 0]])).sum((1, 2))
        if self.how == "sort":
            return self.linear(x[mask.sum(1).argsort()]).sum((1, 2))
        if self.how == "index_select":
            return self.linear(torch.index_select(x, 0, mask.sum(1).argsort())).sum((1, 2))
        if self.how == "filled buffer":  # as many rows as the batch has, the chosen ones first
            buffer = x.new_zeros(16, 5)
            buffer[: int(mask.sum())] = x[mask]
            return self.linear(buffer).view(4, 4, 4).sum((1, 2))
        if self.how == "cut by numbers":  # of which no tensor knows
            parts = torch.cat([x[b, :n] for b, n in enumerate(mask.sum(1).tolist())])
            return torch.stack([part.sum() for part in self.linear(parts).split(mask.sum(1).tolist())])
        if self.how == "stacked by token":  # twice as many pieces as rows
            return self.linear(torch.stack(x[mask].unbind(0))).view(4, 2, 4).sum((1, 2))
        if self.how == "gather":
            return self.linear(x.gather(0, mask.sum(1).argsort()[:, None, None].expand_as(x))).sum((1, 2))
        if self.how == "from behind":
            return self.linear(x.index_select(-3, mask.sum(1).argsort())).sum((1, 2))
        if self.how == "take_along_dim":
            return self.linear(x.take_along_dim(mask.sum(1).argsort()[:, None, None].expand_as(x), 0)).sum((1, 2))
        if self.how == "sorted":
            return self.linear(x.sort(dim=0).values).sum((1, 2))
        if self.how == "pooled one by one":
            return self.linear(torch.stack([x[b][mask[b]].mean(0) for b in range(len(x))])).sum(1)
        if self.how == "padded one by one":
            rows = [F.pad(x[b][mask[b]], (0, 0, 0, 4 - int(mask[b].sum()))) for b in range(len(x))]
            return self.linear(torch.stack(rows)).sum((1, 2))
        if self.how == "constants":
            upper = torch.ones(4, 4, dtype=torch.bool).triu()
            pairs = (x @ x.mT).masked_select(upper).view(len(x), -1)
            along = torch.take_along_dim(x, mask.long()[:, :, None].expand_as(x), 1)
            twice = torch.repeat_interleave(input=x, repeats=2, dim=1).mean(1)
            return self.linear(pairs[:, :5]).sum(1) + self.linear(along).sum((1, 2)) + self.linear(twice).sum(1)
        if self.how == "within rows":
            return self.linear(x[:, torch.tensor([True, False, True, False])][torch.arange(len(x)), mask[:, :2].sum(1) - 1]).sum(
                1
            )
        if self.how == "all, then a mask":
            return empty.masked_scatter(wide, self.linear(x)[mask]).sum((1, 2))
        assert self.how == "put back"
        return (self.linear(torch.zeros_like(x).masked_scatter(mask[..., None].expand_as(x), x[mask])) * mask[..., None]).sum(
            (1, 2)
        )


def chosen_loss(module: nn.Module, x: Tensor, mask: Tensor) -> Tensor:
    return module(x, mask)


@pytest.mark.parametrize(
    "how",
    ["mask", "mask, then more", "masked_select", "nonzero", "sort", "index_select", "gather", "from behind", "take_along_dim",
     "sorted", "filled buffer", "stacked by token"],
)  # fmt: skip
def test_layers_on_rows_that_the_batch_chose_are_refused(how: str) -> None:
    """A first batch with two tokens each would pass every look at its gradients, and the next one's be grouped by it."""
    even = torch.tensor([1, 1, 0, 0], dtype=torch.bool).expand(4, 4).clone()
    for mask in (even, TOKENS):
        with pytest.raises(pf.UncoveredParameterError, match=r"linear\(linear.*chosen by the batch's own values"):
            pf.clipped_grad(Chosen(how), chosen_loss, (torch.randn(4, 4, 5), mask), max_grad_norm=0.1)


@pytest.mark.parametrize("how", ["cut by numbers"])
def test_what_numbers_read_from_the_batch_do_is_looked_at_in_every_call(how: str) -> None:
    """What Python does by them no tensor shows; that a sample's loss stands in another's rows shows, more likely than not."""
    even = torch.tensor([1, 1, 0, 0], dtype=torch.bool).expand(4, 4).clone()
    module, x = Chosen(how), torch.randn(4, 4, 5)
    pf.clipped_grad(module, chosen_loss, (x, even), max_grad_norm=0.1)
    with pytest.raises(pf.UncoveredParameterError, match="rows of"):
        for _ in range(40):
            pf.clipped_grad(module, chosen_loss, (x, TOKENS), max_grad_norm=0.1)


@pytest.mark.parametrize(
    "how", ["all, then a mask", "put back", "within rows", "pooled one by one", "padded one by one", "constants"]
)
def test_choosing_afterwards_and_putting_back_are_covered(how: str) -> None:
    assert_matches_loop(Chosen(how), chosen_loss, (torch.randn(4, 4, 5), TOKENS), max_grad_norm=0.1)
